"""Reading files: equal to tifffile, only the pieces of the box, and one sentence for what is broken."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images.readers import Reader, kinds, open_reader, suffixes
from daskcell.images.readers.tiff import is_ramp
from daskcell.images.readers.tiffpieces import Pieces

RNG = np.random.default_rng(0)


def whole(reader: Reader, level: int = 0) -> np.ndarray:
    return reader.read(level, Box(0, 0, *reader.levels[level]))


def assert_equal(found: np.ndarray, expected: np.ndarray, name: str = "") -> None:
    """`assert_array_equal`, which takes five times as long, only to say where they differ, or for NaN."""
    if not np.array_equal(found, expected):
        np.testing.assert_array_equal(found, expected, err_msg=name)


def check_reader(reader: Reader, expected: np.ndarray) -> None:
    """The contract of every reader: header and pixels agree, and any box is that part of the whole."""
    assert isinstance(reader, Reader)
    assert (len(reader.channels), *reader.levels[0]) == expected.shape
    assert reader.dtype == expected.dtype
    assert_equal(whole(reader), expected)
    height, width = reader.levels[0]
    rng = np.random.default_rng(1)
    for _ in range(8):
        y0, y1 = sorted(rng.choice(height + 1, 2, replace=False))
        x0, x1 = sorted(rng.choice(width + 1, 2, replace=False))
        part = reader.read(0, Box(int(y0), int(x0), int(y1), int(x1)))
        assert part.dtype == reader.dtype
        assert_equal(part, expected[:, y0:y1, x0:x1])
    for outside in (Box(0, 0, height + 1, width), Box(-1, 0, height, width), Box(0, 0, 0, width)):
        with pytest.raises(InputError, match="not inside"):
            reader.read(0, outside)
    reader.close()


STORED = {
    "strips": {"rowsperstrip": 7},
    "one strip": {},
    "tiles": {"tile": (32, 16)},
    "lzw strips": {"rowsperstrip": 5, "compression": "lzw"},
    "deflate tiles": {"tile": (16, 48), "compression": "zlib", "predictor": True},
    "big endian": {"byteorder": ">", "rowsperstrip": 9, "compression": "zlib"},
    "raw big endian": {"byteorder": ">"},
    "bigtiff": {"bigtiff": True, "tile": (16, 16)},
}


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64", "int8"]
)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_grey_tiff_is_read_whole_and_in_parts(tmp_path: Path, stored: str, dtype: str) -> None:
    pixels = (RNG.random((61, 83)) * 120).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", **STORED[stored])
    check_reader(open_reader(tmp_path / "a.tif"), pixels[None])


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_colour_tiff_is_three_channels(tmp_path: Path, stored: str, planar: str) -> None:
    pixels = RNG.integers(0, 255, (3, 61, 83), np.uint8)
    data = pixels if planar == "separate" else np.moveaxis(pixels, 0, 2)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", planarconfig=planar, **STORED[stored])
    reader = open_reader(tmp_path / "a.tif")
    assert reader.is_rgb
    assert reader.channels == ("red", "green", "blue")
    check_reader(reader, pixels)


def test_only_tiles_that_the_box_touches_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((640, 640), np.uint8), tile=(64, 64), compression="zlib")
    decoded: list[int] = []
    piece = Pieces._piece
    monkeypatch.setattr(Pieces, "_piece", lambda *args: decoded.append(args[2][-1]) or piece(*args))
    reader = open_reader(tmp_path / "a.tif")
    reader.read(0, Box(64, 64, 128, 128))
    assert decoded == [11]
    decoded.clear()
    reader.read(0, Box(63, 127, 65, 129))
    assert decoded == [1, 2, 11, 12]


def test_neighbouring_boxes_decode_a_strip_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RNG.integers(0, 255, (128, 256), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, rowsperstrip=32, compression="zlib")
    reader = open_reader(tmp_path / "a.tif")
    decoded = []
    decode = reader.keyframe.decode  # type: ignore[attr-defined]
    monkeypatch.setitem(reader.keyframe.__dict__, "decode", lambda *a: decoded.append(a[1]) or decode(*a))
    for x in range(0, 256, 64):
        np.testing.assert_array_equal(reader.read(0, Box(0, x, 64, x + 64))[0], pixels[:64, x : x + 64])
    assert decoded == [0, 1]


@pytest.mark.parametrize("band", [1, 5000, 2**20])
def test_imagej_stack_maximum_or_one_plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band: int
) -> None:
    monkeypatch.setattr("daskcell.images.readers.tiff.BAND_BYTES", band)
    stack = RNG.integers(0, 4000, (2, 5, 3, 40, 50), np.uint16)  # TZCYX
    tifffile.imwrite(
        tmp_path / "a.tif",
        stack,
        imagej=True,
        resolution=(4.0, 2.0),
        metadata={"axes": "TZCYX", "unit": "um"},
    )
    reader = open_reader(tmp_path / "a.tif", t=1)
    assert reader.sizes == {"t": 2, "z": 5}
    assert reader.pixel_size == (0.5, 0.25)
    check_reader(reader, stack[1].max(axis=0))
    check_reader(open_reader(tmp_path / "a.tif", t=0, z=3), stack[0, 3])
    with pytest.raises(InputError, match="2 time points"):
        open_reader(tmp_path / "a.tif", t=2)
    with pytest.raises(InputError, match="5 planes"):
        open_reader(tmp_path / "a.tif", z=5)


def test_ome_tiff_says_names_size_and_levels(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (2, 100, 120), np.uint8)
    metadata = {
        "axes": "CYX",
        "PhysicalSizeX": 250,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": ["DNA", "actin"]},
    }
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        writer.write(pixels, subifds=1, tile=(32, 32), photometric="minisblack", metadata=metadata)
        writer.write(pixels[:, ::2, ::2], subfiletype=1, tile=(32, 32), photometric="minisblack")
    reader = open_reader(tmp_path / "a.ome.tif")
    assert reader.name == "a"
    assert reader.channels == ("DNA", "actin")
    assert reader.pixel_size == (0.5, 0.25)
    assert reader.levels == ((100, 120), (50, 60))
    np.testing.assert_array_equal(whole(reader, 1), pixels[:, ::2, ::2])
    check_reader(reader, pixels)


@pytest.mark.parametrize("other", ["uint16", "minisblack"])
def test_smaller_pages_of_another_kind_are_no_levels(tmp_path: Path, other: str) -> None:
    pixels = RNG.integers(0, 255, (100, 120), np.uint8)
    small = pixels[::2, ::2].astype(np.uint16 if other == "uint16" else np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(pixels, subifds=1, photometric="miniswhite")
        kind = "miniswhite" if other == "uint16" else "minisblack"
        writer.write(small, subfiletype=1, photometric=kind)
    reader = open_reader(tmp_path / "a.tif")
    assert reader.levels == ((100, 120),)
    check_reader(reader, 255 - pixels[None])


def test_plain_pages_are_channels_and_many_are_planes(tmp_path: Path) -> None:
    pages = RNG.integers(0, 255, (12, 20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "few.tif", pages[:3], photometric="minisblack", metadata=None)
    tifffile.imwrite(tmp_path / "many.tif", pages, photometric="minisblack", metadata=None)
    check_reader(open_reader(tmp_path / "few.tif"), pages[:3])
    reader = open_reader(tmp_path / "many.tif")
    assert reader.sizes["z"] == 12
    check_reader(reader, pages.max(axis=0)[None])


@pytest.mark.parametrize("band", [1, 2**20])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, band: int
) -> None:
    from PIL import Image, ImageOps

    monkeypatch.setattr("daskcell.images.readers.tiff.BAND_BYTES", band)
    pixels = RNG.integers(0, 255, (50, 70), np.uint8)
    tag = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(16, 16), extratags=tag, resolution=(1e5, 2e5))
    oriented = Image.fromarray(pixels)
    oriented.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(oriented))
    check_reader(open_reader(tmp_path / "a.tif"), expected[None])


def test_white_is_zero_is_inverted(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    check_reader(open_reader(tmp_path / "a.tif"), 255 - pixels[None])


def test_one_bit_becomes_zero_and_one(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 2, (20, 33)).astype(bool)
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression="packbits", photometric="minisblack")
    check_reader(open_reader(tmp_path / "a.tif"), pixels[None].astype(np.uint8))


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bits_are_unpacked(tmp_path: Path, bits: int) -> None:
    """Cameras of 10 to 14 bits: no writer here makes such files, so the tags of another are changed."""
    import imagecodecs

    height, width = 20, 32
    pixels = RNG.integers(0, 2**bits, (height, width), np.uint16)
    packed = np.frombuffer(imagecodecs.packints_encode(pixels, bits, runlen=width), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", packed.reshape(height, -1), rowsperstrip=5, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags[256].overwrite(width)
        file.pages[0].tags[258].overwrite(bits)
    check_reader(open_reader(tmp_path / "a.tif"), pixels[None])


def test_the_largest_picture_of_a_slide_is_read_and_not_its_label(tmp_path: Path) -> None:
    """QPTIFF: channels as pages of one kind, a thumbnail among them, smaller levels after."""
    pixels = RNG.integers(0, 255, (2, 128, 192), np.uint8)
    describe = (
        '<?xml version="1.0" encoding="utf-16"?><PerkinElmer-QPI-ImageDescription>'
        "<ImageType>{}</ImageType></PerkinElmer-QPI-ImageDescription>"
    )
    with tifffile.TiffWriter(tmp_path / "a.qptiff") as writer:
        options = {"tile": (64, 64), "photometric": "minisblack", "metadata": None}
        software = {"software": "PerkinElmer-QPI"}
        for page in pixels:
            writer.write(page, description=describe.format("FullResolution"), **options, **software)
        thumbnail = {"photometric": "rgb", "metadata": None}
        writer.write(
            np.zeros((16, 24, 3), np.uint8), description=describe.format("Thumbnail"), **thumbnail, **software
        )
        for page in pixels[:, ::2, ::2]:
            writer.write(page.copy(), description=describe.format("ReducedResolution"), **options, **software)
    with tifffile.TiffFile(tmp_path / "a.qptiff") as file:
        assert file.is_qpi
    reader = open_reader(tmp_path / "a.qptiff")
    assert reader.levels == ((128, 192), (64, 96))
    np.testing.assert_array_equal(whole(reader, 1), pixels[:, ::2, ::2])
    check_reader(reader, pixels)


def test_leica_slide_is_its_largest_picture_with_its_levels(tmp_path: Path) -> None:
    """SCN: an overview of the whole glass comes first, and all pages stand in one row."""
    pixels = RNG.integers(0, 255, (128, 192, 3), np.uint8)
    pages = [np.zeros((40, 30, 3), np.uint8), pixels, pixels[::2, ::2], pixels[::4, ::4]]
    scanned = "".join(f'<dimension sizeX="1" sizeY="1" r="{r}" ifd="{r + 1}"/>' for r in range(3))
    description = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection>'
        '<image name="overview"><pixels><dimension sizeX="30" sizeY="40" r="0" ifd="0"/></pixels></image>'
        f'<image name="tissue"><pixels>{scanned}</pixels></image></collection></scn>'
    )
    options = {"photometric": "rgb", "tile": (32, 32), "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.scn", bigtiff=True) as writer:
        for k, page in enumerate(pages):
            said = {"description": description} if k == 0 else {}
            size = {"resolution": (40000 / 2**k * 2, 40000 / 2**k * 2), "resolutionunit": "CENTIMETER"}
            writer.write(np.ascontiguousarray(page), **options, **size, **said)
    with tifffile.TiffFile(tmp_path / "a.scn") as file:
        assert file.is_scn
    reader = open_reader(tmp_path / "a.scn")
    assert reader.levels == ((128, 192), (64, 96), (32, 48))
    assert reader.pixel_size == (0.25, 0.25)
    np.testing.assert_array_equal(whole(reader, 2), np.moveaxis(pixels[::4, ::4], 2, 0))
    check_reader(reader, np.moveaxis(pixels, 2, 0))


def test_aperio_slide_keeps_levels_and_leaves_out_label_and_macro(tmp_path: Path) -> None:
    """SVS: the slide, a thumbnail, smaller levels, then label and macro."""
    pixels = RNG.integers(0, 255, (256, 320, 3), np.uint8)
    about = "Aperio Image Library v11.2.1 \r\n320x256 (240x240) JPEG/RGB Q=30|AppMag = 20|MPP = 0.5"
    tiles = {"photometric": "rgb", "tile": (32, 32), "metadata": None, "description": about}
    strips = {"photometric": "rgb", "metadata": None, "rowsperstrip": 16}
    with tifffile.TiffWriter(tmp_path / "a.svs") as writer:
        writer.write(pixels, **tiles)
        writer.write(np.zeros((51, 64, 3), np.uint8), **strips, description=about)
        for step in (2, 4):
            writer.write(np.ascontiguousarray(pixels[::step, ::step]), **tiles)
        for name, kind in (("label", 1), ("macro", 9)):
            picture = np.full((300, 400, 3), 9, np.uint8)
            writer.write(picture, **strips, subfiletype=kind, description=f"Aperio Image Library\r\n{name}")
    with tifffile.TiffFile(tmp_path / "a.svs") as file:
        assert file.is_svs
    reader = open_reader(tmp_path / "a.svs")
    assert reader.levels == ((256, 320), (128, 160), (64, 80))
    np.testing.assert_array_equal(whole(reader, 1), np.moveaxis(pixels[::2, ::2], 2, 0))
    check_reader(reader, np.moveaxis(pixels, 2, 0))


def test_alpha_is_left_out_and_other_samples_are_kept(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (20, 30, 4), np.uint8)
    tifffile.imwrite(tmp_path / "alpha.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    reader = open_reader(tmp_path / "alpha.tif")
    assert reader.is_rgb
    check_reader(reader, np.moveaxis(pixels, 2, 0)[:3])
    tifffile.imwrite(tmp_path / "more.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    reader = open_reader(tmp_path / "more.tif")
    assert not reader.is_rgb
    check_reader(reader, np.moveaxis(pixels, 2, 0))


RAMP = np.arange(256)
LUTS = {
    "grey": np.array([RAMP, RAMP, RAMP]) * 257,
    "grey of 8 bits": np.array([RAMP, RAMP, RAMP]) * 256,
    "green": np.array([0 * RAMP, RAMP, 0 * RAMP]) * 257,
    "blue": np.array([0 * RAMP, 0 * RAMP, RAMP]) * 257,
    "gamma": np.array([RAMP, RAMP, RAMP]) ** 0.45 / 255**0.45 * 65535,
    "hot": np.clip(np.array([RAMP * 3, RAMP * 3 - 255, RAMP * 3 - 510]), 0, 255) * 257,
}


@pytest.mark.parametrize("lut", LUTS)
def test_palette_that_is_a_ramp_keeps_the_stored_intensities(tmp_path: Path, lut: str) -> None:
    colormap = LUTS[lut].astype(np.uint16)
    assert is_ramp(colormap)
    pixels = RNG.integers(0, 255, (20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="palette", colormap=colormap)
    reader = open_reader(tmp_path / "a.tif")
    assert not reader.is_rgb
    check_reader(reader, pixels[None])


@pytest.mark.parametrize("sort", [False, True], ids=["as it comes", "sorted by brightness"])
def test_palette_of_a_colour_picture_is_expanded(tmp_path: Path, sort: bool) -> None:
    colormap = np.random.default_rng(3).integers(0, 65535, (3, 256)).astype(np.uint16)
    if sort:
        colormap = colormap[:, np.argsort(np.array([0.299, 0.587, 0.114]) @ colormap)]
    pixels = RNG.integers(0, 255, (20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="palette", colormap=colormap)
    reader = open_reader(tmp_path / "a.tif")
    assert reader.is_rgb
    check_reader(reader, (colormap >> 8).astype(np.uint8)[:, pixels])


@pytest.mark.parametrize("count", [2, 7])
def test_every_page_has_its_own_palette(tmp_path: Path, count: int) -> None:
    pixels = RNG.integers(0, 255, (count, 20, 30), np.uint8)
    palettes = np.random.default_rng(3).integers(0, 65535, (count, 3, 256)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page, colormap in zip(pixels, palettes, strict=True):
            writer.write(page, photometric="palette", colormap=colormap, metadata=None)
    reader = open_reader(tmp_path / "a.tif")
    assert reader.channels[::3] == tuple(f"page {i + 1} red" for i in range(count))
    shown = [(own >> 8).astype(np.uint8)[:, page] for own, page in zip(palettes, pixels, strict=True)]
    check_reader(reader, np.concatenate(shown))


def test_an_inverted_ramp_is_shown_as_its_colours() -> None:
    assert not is_ramp(LUTS["grey"][:, ::-1])


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((20000, 10000), "CENTIMETER", (1.0, 0.5)),
        ((72, 72), "INCH", None),
        ((150, 150), "INCH", None),
        ((1, 1), None, None),
    ],
)
def test_resolution_tags_of_screens_are_not_believed(tmp_path: Path, resolution, unit, expected) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((8, 8), np.uint8),
        resolution=resolution,
        resolutionunit=unit,
        metadata=None,
    )
    assert open_reader(tmp_path / "a.tif").pixel_size == expected


def test_aperio_description_gives_the_pixel_size(tmp_path: Path) -> None:
    description = (
        "Aperio Image Library v11.2.1 \r\n64x64 (240x240) JPEG/RGB Q=30|AppMag = 20|MPP = 0.4990|Left = 1"
    )
    tifffile.imwrite(
        tmp_path / "a.svs", np.zeros((64, 64, 3), np.uint8), description=description, metadata=None
    )
    assert open_reader(tmp_path / "a.svs").pixel_size == (0.499, 0.499)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    from PIL import Image

    pixels = RNG.integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    expected = np.asarray(Image.open(tmp_path / f"a.{suffix}"))
    reader = open_reader(tmp_path / f"a.{suffix}")
    assert reader.is_rgb
    check_reader(reader, np.ascontiguousarray(np.moveaxis(expected, 2, 0)))


def test_a_jpeg_picture_with_a_hole_is_refused(tmp_path: Path) -> None:
    """Of a file copied in blocks, one of which never came; Pillow (the control) makes up what was there."""
    from PIL import Image

    pixels = np.random.default_rng(2).integers(0, 255, (200, 200), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    sound = whole(open_reader(tmp_path / "a.jpg"))
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 256] = bytes(256)
    (tmp_path / "a.jpg").write_bytes(content)
    with Image.open(tmp_path / "a.jpg") as file:
        assert not np.array_equal(np.asarray(file), sound[0])
    with pytest.raises(ImageError, match="zeros in a row"):
        open_reader(tmp_path / "a.jpg")


def test_grey_png_saved_in_colour_is_one_channel_and_16_bits_are_kept(tmp_path: Path) -> None:
    from PIL import Image

    grey = RNG.integers(0, 255, (20, 30), np.uint8)
    rgba = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    reader = open_reader(tmp_path / "rgba.png")
    assert not reader.is_rgb
    check_reader(reader, grey[None])
    deep = RNG.integers(0, 65535, (20, 30)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    check_reader(open_reader(tmp_path / "deep.png"), deep[None])


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no images, and a word that the sentence about each must hold."""
    tifffile.imwrite(folder / "good.tif", RNG.integers(0, 255, (64, 64), np.uint8), rowsperstrip=8)
    good = (folder / "good.tif").read_bytes()
    tifffile.imwrite(
        folder / "lzw.tif", RNG.integers(0, 255, (64, 64), np.uint8), rowsperstrip=8, compression="lzw"
    )
    packed = (folder / "lzw.tif").read_bytes()
    contents = {
        "empty.tif": (b"", "empty"),
        "text.tif": (b"this is not a picture\n" * 50, "text"),
        "pointer.tif": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        "page.tif": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        "zeros.tif": (bytes(4096), "zeros"),
        "gzip.tif": (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        "cut.tif": (good[: len(good) // 2], "truncated"),
        "cut_packed.tif": (packed[: len(packed) // 2], "truncated"),
        "header.tif": (good[:8], "Cannot read"),
        "noise.tif": (np.random.default_rng(5).bytes(5000), "no kind of image"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: word for name, (_, word) in contents.items()}


def test_what_is_no_picture_is_refused_in_one_sentence_that_names_it(tmp_path: Path) -> None:
    for name, word in broken_files(tmp_path).items():
        with pytest.raises(ImageError, match=word) as error:
            whole(open_reader(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="No such file"):
        open_reader(tmp_path / "absent.tif")
    with pytest.raises(ImageError, match="folder"):
        open_reader(tmp_path)


def test_missing_file_of_a_multi_file_ome_tiff_is_not_read_as_zeros(tmp_path: Path) -> None:
    uuids = ["urn:uuid:00000000-0000-0000-0000-00000000000" + d for d in "12"]
    planes = "".join(
        f'<TiffData FirstC="{c}" PlaneCount="1"><UUID FileName="c{c}.ome.tif">{uuid}</UUID></TiffData>'
        for c, uuid in enumerate(uuids)
    )
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    for c, uuid in enumerate(uuids):
        xml = (
            f'<OME xmlns="{schema}" UUID="{uuid}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="30" SizeY="20" SizeC="2" '
            'SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" Name="one"/><Channel ID="Channel:0:1" Name="two"/>'
            f"{planes}</Pixels></Image></OME>"
        )
        tifffile.imwrite(
            tmp_path / f"c{c}.ome.tif", np.full((20, 30), c + 1, np.uint8), description=xml, metadata=None
        )
    reader = open_reader(tmp_path / "c0.ome.tif")
    assert reader.channels == ("one", "two")
    check_reader(reader, np.stack([np.full((20, 30), c + 1, np.uint8) for c in range(2)]))
    (tmp_path / "c1.ome.tif").unlink()
    with pytest.raises(ImageError, match="1 of 2 pages are not there"):
        open_reader(tmp_path / "c0.ome.tif")


def test_readers_of_other_packages_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dist = tmp_path / "other-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text("[daskcell.readers]\nother = other_reader\n")
    (tmp_path / "other_reader.py").write_text(
        "SUFFIXES = ('.oth',)\n\n\n"
        "def matches(path, head):\n    return head.startswith(b'OTHER')\n\n\n"
        "def open(path, *, t=0, z='max'):\n    raise RuntimeError('opened by the other')\n"
    )
    (tmp_path / "a.oth").write_bytes(b"OTHER")
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (kinds, suffixes):
        cached.cache_clear()
    try:
        assert ".oth" in suffixes()
        with pytest.raises(ImageError, match="opened by the other"):
            open_reader(tmp_path / "a.oth")
    finally:
        for cached in (kinds, suffixes):
            cached.cache_clear()


def test_a_reader_that_cannot_be_imported_does_not_hinder_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dist = tmp_path / "broken-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text("[daskcell.readers]\nbroken = absent_module\n")
    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8), np.uint8))
    monkeypatch.syspath_prepend(tmp_path)
    kinds.cache_clear()
    try:
        with pytest.warns(UserWarning, match="'broken' .absent_module. cannot be used"):
            assert whole(open_reader(tmp_path / "a.tif")).all()
    finally:
        kinds.cache_clear()


def zoo_truth(path: Path) -> tuple[np.ndarray, str]:
    """What tifffile gives, as channels; orientation, white-is-zero and palettes as the reader promises."""
    pixels = tifffile.imread(path)
    with tifffile.TiffFile(path) as file:
        page, axes = file.series[0].keyframe, file.series[0].axes
        bits, kind = page.bitspersample, int(page.photometric)
        colormaps = [page.aspage().colormap for page in file.series[0].pages]
        orientation = page.tags.valueof(274, 1) or 1
    pixels = pixels.astype(np.uint8) if pixels.dtype == bool else pixels
    pixels = pixels.astype(np.float32) if pixels.dtype == np.float16 else pixels
    pixels = np.moveaxis(pixels, -1, -3) if axes.endswith("S") else pixels
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    if kind == 3 and path.name not in GREY_PALETTES:
        colours = [(colormap >> 8).astype(np.uint8) for colormap in colormaps]
        pixels = np.concatenate([own[:, page] for own, page in zip(colours, pixels, strict=True)])
    if kind == 0:
        pixels = (2**bits - 1 - pixels.astype(np.int64)).astype(pixels.dtype)
    pixels = pixels[:, ::-1] if orientation in (3, 4, 6, 7) else pixels
    pixels = pixels[:, :, ::-1] if orientation in (2, 3, 7, 8) else pixels
    return (pixels.swapaxes(1, 2) if orientation >= 5 else pixels), axes


GREY_PALETTES = ("palette-1c-1b.tiff",)
NOT_READ = {
    "f64_nan_inf_negative.tif": None,
    "logluv-3c-16b.tiff": "SGILOG",
    "multifile.companion.ome": "text file",
}


@pytest.mark.slow
@pytest.mark.data
def test_every_variant_of_the_zoo_is_read_as_tifffile_reads_it(data_dir: Path) -> None:
    folder = data_dir / "tiff-zoo"
    with (folder / "manifest.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file) if row["kind"] == "variants"]
    assert len(names) > 100
    for name in names:
        path = folder / name
        if NOT_READ.get(path.name):
            with pytest.raises(ImageError, match=NOT_READ[path.name]):
                whole(open_reader(path))
            continue
        reader = open_reader(path)
        expected, _ = zoo_truth(path)
        got = whole(reader)
        with_alpha = len(expected) == len(got) + 1
        assert_equal(got, expected[: len(got)] if with_alpha else expected, name)
        assert not with_alpha or "rgba" in path.name.lower() or path.name in ("pil136.tiff",), name
        reader.close()


@pytest.mark.data
def test_fluorescence_palettes_are_one_channel(data_dir: Path) -> None:
    for name in ("fly/01_POS002_D.TIF", "sbs/Channel1-01-A-01.tif"):
        path = data_dir / "channels" / name
        check_reader(open_reader(path), tifffile.imread(path)[None])


@pytest.mark.data
def test_slides(data_dir: Path) -> None:
    folder = data_dir / "slide"
    reader = open_reader(folder / "CMU-1-Small-Region.svs")
    assert reader.levels == ((2967, 2220),)
    assert reader.pixel_size == (0.499, 0.499)
    check_reader(reader, np.moveaxis(tifffile.imread(folder / "CMU-1-Small-Region.svs"), 2, 0))
    reader = open_reader(folder / "test3-DAPI-2-(387).ndpi")
    assert reader.levels == ((4864, 3968), (2432, 1984), (1216, 992), (608, 496))
    assert reader.pixel_size == pytest.approx((0.228, 0.228), abs=1e-3)
    np.testing.assert_array_equal(
        whole(reader, 2), np.moveaxis(tifffile.imread(folder / "test3-DAPI-2-(387).ndpi", level=2), 2, 0)
    )
    reader = open_reader(folder / "human_3ch_pyramid.ome.tif")
    assert reader.channels == ("DNA", "PH3", "cellbody")
    assert len(reader.levels) == 2
