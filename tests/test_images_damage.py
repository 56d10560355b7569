"""Damage put into sound TIFF files: refused in one sentence, or the sound file's pixels; never filled up."""

from __future__ import annotations

import contextlib
import io
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from daskcell.errors import ImageError
from daskcell.geometry import Box
from daskcell.images.readers import open_reader, tiffstreams

RNG = np.random.default_rng(0)
STRIPS, TILES = {"rowsperstrip": 20}, {"tile": (64, 48)}
SOUND: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    f"{codec} {'tiles' if layout is TILES else 'strips'} {dtype}": (
        dtype,
        (150, 170),
        {**layout, "compression": codec, "predictor": predictor},
    )
    for codec in ("lzw", "zlib", "zstd", "lzma")
    for layout in (STRIPS, TILES)
    for dtype, predictor in (("uint8", 1), ("uint16", 2), ("float32", 3))
}
SOUND |= {
    "packbits": ("uint8", (150, 170), {**STRIPS, "compression": "packbits"}),
    "bits": ("bool", (150, 170), {**STRIPS, "compression": "packbits"}),
    "jpeg": ("uint8", (150, 170), {"rowsperstrip": 32, "compression": "jpeg"}),
    "colour jpeg": ("uint8", (150, 170, 3), {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb"}),
    "webp": ("uint8", (150, 170, 3), {"tile": (64, 64), "compression": "webp", "photometric": "rgb"}),
    "jpeg2000": ("uint8", (150, 170), {"tile": (64, 64), "compression": "jpeg2000"}),
    "jpegxl": ("uint8", (150, 170), {"tile": (64, 64), "compression": "jpegxl"}),
    "png": ("uint16", (150, 170), {"tile": (64, 64), "compression": "png"}),
    "planes": ("uint8", (3, 150, 170), {**STRIPS, "compression": "lzw", "planarconfig": "separate"}),
    "big": ("uint16", (150, 170), {"bigtiff": True, "compression": "zlib", "tile": (64, 64)}),
    "pages": ("uint16", (3, 150, 170), {**STRIPS, "compression": "zlib"}),
    "raw pages": ("uint16", (3, 150, 170), {}),
    "turned": ("uint8", (150, 170), {**STRIPS, "compression": "lzw", "extratags": [(274, 3, 1, 6, True)]}),
}


def picture(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Waves and some noise: nothing that is zero, and nothing that compresses to nothing."""
    rng = np.random.default_rng(3)
    axes = [np.arange(side) for side in shape]
    wave = sum(np.sin(a.reshape(-1, *[1] * (len(shape) - k - 1)) / 9 + k) for k, a in enumerate(axes))
    values = 0.2 + 0.7 * (wave + len(shape)) / (2 * len(shape)) + rng.random(shape) * 0.05
    if dtype == "bool":
        return values > 0.55
    return (values * {"u": 250, "f": 1}[np.dtype(dtype).kind]).astype(dtype)


def written(name: str) -> bytes:
    dtype, shape, options = SOUND[name]
    if options.get("planarconfig"):
        options = {**options, "photometric": "rgb"}
    file = io.BytesIO()
    tifffile.imwrite(file, picture(dtype, shape), **{"photometric": "minisblack", **options})
    return file.getvalue()


def pixels(path: Path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    reader = open_reader(path)
    try:
        return reader.read(0, Box(0, 0, *reader.levels[0]))
    finally:
        reader.close()


def segments(content: bytes | bytearray) -> list[tuple[int, int]]:
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        pages = file.series[0].pages
        return [pair for page in pages for pair in zip(page.dataoffsets, page.databytecounts, strict=True)]


def count_place(content: bytes, rng: np.random.Generator) -> tuple[int, str]:
    """Where in the file one of the counts of bytes stands, and its format."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tags = file.pages[0].tags
        tag = tags[279] if 279 in tags else tags[325]
        form = {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)]
        return tag.valueoffset + int(rng.integers(tag.count)) * struct.calcsize(form), form


def damaged(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    start, count = segments(content)[rng.integers(len(segments(content)))]
    changed = bytearray(content)
    if kind == "cut":
        return content[: rng.integers(9, len(content))]
    if kind == "zeros":
        changed[start : start + count] = bytes(count)
    if kind == "zeros at the end":
        kept = int(count * rng.uniform(0.1, 0.9))
        changed[start + kept : start + count] = bytes(count - kept)
    if kind == "hole":  # of a file that was copied in blocks, one of which never came
        first, length = start + int(count * rng.uniform(0.2, 0.6)), max(count // 4, 96)
        changed[first : first + length] = bytes(length)
    if kind == "short":
        place, form = count_place(content, rng)
        (value,) = struct.unpack_from("<" + form, content, place)
        struct.pack_into("<" + form, changed, place, max(1, int(value * rng.uniform(0.1, 0.95))))
    if kind == "flips":
        for _ in range(3):
            changed[start + rng.integers(count)] ^= 1 << rng.integers(8)
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_missing_data_are_never_filled_up(tmp_path: Path, name: str) -> None:
    """What is missing (cut, never written, a count too small) is refused.

    Not tested, since nothing in the file tells: zeros among raw pixels, single bits where the codec has no
    checksum.
    """
    rng = np.random.default_rng(0)
    content = written(name)
    expected = pixels(tmp_path / "sound.tif", content)
    raw = name.startswith("raw")
    kinds = ["cut"] if raw else ["cut", "zeros", "zeros at the end", "hole", "short"]
    if SOUND[name][2].get("compression") in ("zlib", "lzma", "png"):
        kinds.append("flips")
    refused: Counter[str] = Counter()
    for kind in kinds:
        for _ in range(6):
            try:
                got = pixels(tmp_path / "damaged.tif", damaged(content, kind, rng))
            except ImageError as error:
                refused[kind] += "damaged.tif" in str(error) and "\n" not in str(error)
                continue
            np.testing.assert_array_equal(got, expected, err_msg=kind)
    assert all(refused[kind] >= 4 for kind in kinds), refused


@pytest.mark.parametrize("codec", ["jpeg", "webp", "jpeg2000"])
def test_without_the_check_of_streams_their_ends_are_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """The control: what decoders give for data that end in zeros passes for a picture."""
    content = written(codec)
    expected = pixels(tmp_path / "sound.tif", content)
    monkeypatch.setattr(tiffstreams, "defect", lambda *_, **__: "")
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(10):
        try:
            got = pixels(tmp_path / "damaged.tif", damaged(content, "zeros at the end", rng))
        except ImageError:
            continue
        wrong += got.shape == expected.shape and bool((got != expected).any())
    assert wrong


@pytest.mark.parametrize("reverse", [False, True], ids=["", "fill order 2"])
@pytest.mark.parametrize("compression", ["group4", "group3", "tiff_ccitt"])
def test_fax_that_ends_early_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, reverse: bool
) -> None:
    """Fax decoders give white for what is missing."""
    from PIL import Image

    bits = picture("bool", (150, 170))
    order = {"tiffinfo": {266: 2}} if reverse else {}
    Image.fromarray(bits).save(tmp_path / "a.tif", compression=compression, **order)
    content = (tmp_path / "a.tif").read_bytes()
    ((start, count),) = segments(content)
    encoded = content[start : start + count]

    def read(strip: bytes) -> np.ndarray:
        return pixels(tmp_path / "b.tif", content[:start] + strip + content[start + count :])[0]

    np.testing.assert_array_equal(read(encoded), bits)
    wrong = 0
    for kept in np.random.default_rng(0).integers(1, count - 3, 20):
        with pytest.raises(ImageError, match=r"fax piece|damaged"):
            read(encoded[:kept] + bytes(count - kept))
        with monkeypatch.context() as patch, contextlib.suppress(ImageError):
            patch.setattr(tiffstreams, "defect", lambda *_, **__: "")
            patch.setattr(tiffstreams, "runs_out", lambda *_, **__: False)
            wrong += bool((read(encoded[:kept] + bytes(count - kept)) != bits).any())
    assert wrong > 15  # without the checks


@pytest.mark.parametrize("name", ["jpeg", "colour jpeg", "webp", "jpeg2000", "lzw strips uint8"])
def test_padding_after_the_end_is_let_pass(tmp_path: Path, name: str) -> None:
    """Some writers fill up compressed tiles."""
    content = written(name)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        codec = int(file.pages[0].compression)
    for start, count in segments(content):
        data = content[start : start + count]
        for padding in (b"", bytes(tiffstreams.MOST_PADDING - 1)):
            assert not tiffstreams.defect(data + padding, codec, 0, reverse_bits=False, abbreviated=False)


@pytest.mark.parametrize("grey", [True, False], ids=["grey", "colour"])
def test_blank_jpeg_pictures_may_be_zeros(grey: bool) -> None:
    """Glass, with tables made for it: all its bits may be zero."""
    import imagecodecs

    glass = np.full((1024, 1024) if grey else (1024, 1024, 3), 240, np.uint8)
    long = 0
    for optimize in (False, True):
        for subsampling in ("444", "420"):
            data = imagecodecs.jpeg8_encode(glass, 90, optimize=optimize, subsampling=subsampling)
            long += bytes(tiffstreams.MOST_PADDING + 1) in data
            assert not tiffstreams.defect(data, 7, glass.nbytes, reverse_bits=False, abbreviated=False)
    assert long


def test_pages_that_are_lost_or_lead_back_are_refused(tmp_path: Path) -> None:
    content = written("pages")
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        first, second, _ = (page.offset for page in file.pages)
        place = first + 2 + len(file.pages[0].tags) * 12
    assert struct.unpack_from("<I", content, place) == (second,)
    for target, reason in ((len(content) + 5, "beyond its end"), (first, "points back"), (3, "Cannot read")):
        changed = bytearray(content)
        struct.pack_into("<I", changed, place, target)
        with pytest.raises(ImageError, match=reason):
            pixels(tmp_path / "a.tif", bytes(changed))


TAGS_THAT_SAY_WHAT_PIXELS_MEAN = {
    "palette": ({"photometric": "palette", "colormap": RNG.integers(0, 65535, (3, 256), np.uint16)}, 320),
    "bits per sample": ({"photometric": "rgb"}, 258),
    "sample format": ({"photometric": "rgb"}, 339),
    "offsets": ({"rowsperstrip": 8, "compression": "zlib"}, 273),
}


@pytest.mark.parametrize("what", TAGS_THAT_SAY_WHAT_PIXELS_MEAN)
@pytest.mark.parametrize("damage", ["beyond the end", "of no known type"])
def test_tags_that_cannot_be_read_are_not_left_out(tmp_path: Path, what: str, damage: str) -> None:
    """tifffile leaves out tags it cannot read: a palette's indices would pass for intensities."""
    options, code = TAGS_THAT_SAY_WHAT_PIXELS_MEAN[what]
    colours = options.get("photometric") == "rgb"
    dtype = "float32" if what == "sample format" else "uint8"
    file = io.BytesIO()
    shape = (50, 60, 3) if colours else (50, 60)
    tifffile.imwrite(file, picture(dtype, shape), metadata=None, **options)
    content = file.getvalue()
    assert pixels(tmp_path / "sound.tif", content).any()
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        at = tiff.pages[0].tags[code].offset
    changed = bytearray(content)
    if damage == "beyond the end":
        struct.pack_into("<I", changed, at + 8, len(content) - 1)
    else:
        struct.pack_into("<H", changed, at + 2, 99)
    with pytest.raises(ImageError, match=f"tag {code}"):
        pixels(tmp_path / "damaged.tif", bytes(changed))


CONTRADICTIONS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], dict[int, int]]] = {
    "raw, fewer bits": ("uint16", (50, 60), {"rowsperstrip": 10}, {258: 8}),
    "raw, narrower": ("uint8", (50, 60), {"rowsperstrip": 10}, {256: 30}),
    "raw, lower": ("uint8", (50, 60), {"rowsperstrip": 50}, {257: 20}),
    "raw, one more sample": ("uint8", (50, 60), {"rowsperstrip": 10}, {277: 2}),
    "strips left over": ("uint8", (50, 60), {"rowsperstrip": 10, "compression": "zlib"}, {257: 20}),
    "tiles left over": ("uint8", (64, 64), {"tile": (16, 16), "compression": "zlib"}, {256: 30}),
    "lzw, narrower": ("uint8", (50, 60), {"rowsperstrip": 10, "compression": "lzw"}, {256: 30}),
    "lzw, fewer bits": ("uint16", (50, 60), {"rowsperstrip": 10, "compression": "lzw"}, {258: 8}),
    "packbits, lower": (
        "uint8",
        (50, 60),
        {"rowsperstrip": 50, "compression": "packbits"},
        {257: 20, 278: 20},
    ),
    "zstd, lower": ("uint8", (50, 60), {"rowsperstrip": 50, "compression": "zstd"}, {257: 20, 278: 20}),
    "lzma, lower": ("uint8", (50, 60), {"rowsperstrip": 50, "compression": "lzma"}, {257: 20, 278: 20}),
    "jpeg of another form": (
        "uint8",
        (64, 64),
        {"tile": (64, 64), "compression": "jpeg"},
        {322: 128, 323: 32},
    ),
    "jpeg cropped": ("uint8", (64, 64), {"rowsperstrip": 64, "compression": "jpeg"}, {257: 32, 278: 32}),
    "jpeg of one bit": ("uint8", (64, 64), {"tile": (64, 64), "compression": "jpeg"}, {258: 1}),
    "png of fewer bits": ("uint16", (64, 64), {"tile": (64, 64), "compression": "png"}, {258: 8}),
    "palette without colours": ("uint8", (50, 60), {"rowsperstrip": 10}, {262: 3}),
    "colours of one sample": ("uint8", (50, 60), {"rowsperstrip": 10}, {262: 2}),
    "fax of bytes": ("uint8", (50, 60), {"rowsperstrip": 10, "compression": "packbits"}, {259: 4}),
    "unknown photometric": ("uint8", (50, 60), {"rowsperstrip": 10}, {262: 999}),
    "unknown planar configuration": ("uint8", (50, 60), {"rowsperstrip": 10}, {284: 7}),
    "unknown order of bits": ("uint8", (50, 60), {"rowsperstrip": 10}, {266: 9}),
    "unknown predictor": ("uint8", (50, 60), {"compression": "zlib", "predictor": 2}, {317: 77}),
    "unknown sample format": ("float32", (50, 60), {"rowsperstrip": 10}, {339: 77}),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_tags_that_contradict_the_data_are_refused(tmp_path: Path, what: str) -> None:
    """Decoders give the first of too many bytes, or the right number in another form."""
    dtype, shape, options, changes = CONTRADICTIONS[what]
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, picture(dtype, shape), photometric="minisblack", metadata=None, **options)
    assert pixels(path, path.read_bytes()).any()
    with tifffile.TiffFile(path, mode="r+") as file:
        for code, value in changes.items():
            tags = file.pages[0].tags
            (tags[code] if code in tags else tags[296]).overwrite(
                value
            )  # which says a unit of no meaning here
            if code not in tags:
                file.filehandle.seek(tags[296].offset)
                file.filehandle.write(struct.pack("<H", code))
    with pytest.raises(ImageError, match=r"damaged\.tif") as error:
        pixels(path, path.read_bytes())
    assert "\n" not in str(error.value)


def test_directories_out_of_order_are_read_unless_a_tag_is_lost(tmp_path: Path) -> None:
    """Some writers do not sort tags. A code that changed stands out of order, too, and the tag is missing."""
    tifffile.imwrite(tmp_path / "a.tif", picture("uint16", (50, 60)), photometric="minisblack", metadata=None)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        places = {tag.code: tag.offset for tag in file.pages[0].tags}
    expected = pixels(tmp_path / "a.tif", bytes(content))
    swapped = bytearray(content)
    for one, other in ((256, 282), (282, 256)):
        swapped[places[one] : places[one] + 12] = content[places[other] : places[other] + 12]
    np.testing.assert_array_equal(pixels(tmp_path / "swapped.tif", bytes(swapped)), expected)
    for code, changed in ((258, 2), (262, 263), (277, 1107), (256, 257)):
        lost = bytearray(content)
        struct.pack_into("<H", lost, places[code], changed)
        with pytest.raises(ImageError, match=r"lost\.tif"):
            pixels(tmp_path / "lost.tif", bytes(lost))


OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="{Type}" SizeX="{SizeX}" SizeY="{SizeY}" '
    'SizeC="{SizeC}" SizeZ="1" SizeT="1">{channels}{planes}</Pixels></Image></OME>'
)


def ome_tiff(path: Path, pages: list[np.ndarray], planes: tuple[int, ...] = (0, 1, 2), **said: Any) -> bytes:
    """An OME-TIFF whose metadata say what they like of its pages; channel k is said to be page planes[k]."""
    size = {"Type": "uint8", "SizeX": 60, "SizeY": 50, "SizeC": 3} | said
    xml = OME.format(
        **size,
        channels="".join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(3)),
        planes="".join(f'<TiffData FirstC="{c}" IFD="{i}" PlaneCount="1"/>' for c, i in enumerate(planes)),
    )
    with tifffile.TiffWriter(path) as writer:
        for k, page in enumerate(pages):
            description = xml if k == 0 else None
            writer.write(page, description=description, metadata=None, photometric="minisblack")
    return path.read_bytes()


def test_ome_metadata_that_contradict_the_pages_are_refused(tmp_path: Path) -> None:
    """tifffile believes the metadata, or the first page, of all others: channels are lost, or bytes of other
    things read as pixels."""
    path = tmp_path / "damaged.ome.tif"
    pages = list(picture("uint8", (3, 50, 60)))
    thumbnail = pages[0][::5, ::5]
    for sound in (pages, [*pages, thumbnail]):
        np.testing.assert_array_equal(pixels(path, ome_tiff(path, sound)), np.stack(pages))
    others = {
        "smaller": [pages[0], pages[1][:20], pages[2]],
        "narrower": [pages[0], pages[1][:, :30], pages[2]],
        "wider type": [pages[0], pages[1].astype(np.uint16), pages[2]],
        "more": [*pages, pages[0]],
        "fewer": pages[:2],
    }
    said: list[dict[str, Any]] = [
        *({"SizeC": count} for count in (0, -1, 1, 2, 4, 10**9, "three")),
        *({"SizeX": side} for side in (0, 30, 10**6)),
        {"SizeY": 20},
        {"Type": "uint16"},
        {"Type": "float"},
        {"planes": (0, 0, 2)},
        {"planes": (0, 1, 7)},
    ]
    for what, contradiction in [*others.items(), *((str(one), one) for one in said)]:
        if isinstance(contradiction, dict):
            content = ome_tiff(path, pages, **contradiction)
        else:
            content = ome_tiff(path, contradiction)
        with pytest.raises(ImageError, match=r"damaged\.ome\.tif"):
            pytest.fail(f"{what}: {pixels(path, content).shape}")


IMAGEJ = "ImageJ=1.53\nimages={}\nchannels={}\nslices={}\nhyperstack=true\n"


@pytest.mark.parametrize(
    ("description", "fits"),
    [
        (IMAGEJ.format(3, 3, 1), True),
        (IMAGEJ.format(3, 1, 3), True),
        (IMAGEJ.format(7, 7, 1), False),
        (IMAGEJ.format(3, 7, 1), False),
        (IMAGEJ.format(10**9, 10**9, 1), False),
        (IMAGEJ.format(3, -3, 1), False),
        ('{"shape": [3, 50, 60]}', True),
        ('{"shape": [2, 50, 60]}', False),
        ('{"shape": [3, 500, 60]}', False),
        ('{"shape": [1000000000, 50, 60]}', False),
    ],
)
def test_stacks_with_other_pages_than_they_say_are_refused(
    tmp_path: Path, description: str, fits: bool
) -> None:
    """tifffile takes what pages there are, as if nothing had been said of them."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for k, page in enumerate(picture("uint8", (3, 50, 60))):
            said = {"description": description} if k == 0 else {}
            writer.write(page, metadata=None, photometric="minisblack", contiguous=False, **said)
    if fits:
        assert pixels(path, path.read_bytes()).any()
    else:
        with pytest.raises(ImageError, match=r"a\.tif"):
            pixels(path, path.read_bytes())
