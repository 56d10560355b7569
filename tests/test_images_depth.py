"""No decoder narrows: what is read equals what was written, in every format, or one sentence refuses it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

import daskcell as dc
from daskcell.errors import ImageError
from daskcell.images import open_image
from daskcell.images.readers.raster import orient

RNG = np.random.default_rng(0)
SHAPE = (40, 60)


def deep(*more: int, bits: int = 16) -> np.ndarray:
    return RNG.integers(0, 2**bits, (*SHAPE, *more), np.uint16)


def planes(pixels: np.ndarray) -> np.ndarray:
    """``(Y, X)`` or ``(Y, X, S)`` as channels first."""
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def write_png(
    path: Path,
    pixels: np.ndarray,
    bits: int,
    kind: int,
    *chunks: tuple[bytes, bytes],
    interlaced: bool = False,
) -> None:
    """A PNG of any depth and colour type, by hand; samples ``(Y, X)`` or ``(Y, X, S)`` as they are stored."""
    height, width = pixels.shape[:2]

    def rows(part: np.ndarray) -> bytes:
        out = b""
        for row in part.reshape(len(part), -1):
            wide = row.astype(">u2").view(np.uint8).reshape(-1, 2)
            all_bits = np.unpackbits(wide, axis=1)[:, 16 - bits :]
            out += b"\0" + np.packbits(all_bits.ravel()).tobytes()
        return out

    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [pixels]
    data = b"".join(rows(part) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced))
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)


def check(path: Path, expected: np.ndarray, tmp_path: Path) -> None:
    """The same pixels and type through `open_image` and `convert`."""
    image = open_image(path)
    assert image.dtype == expected.dtype
    np.testing.assert_array_equal(image.data.compute(), expected)
    made = dc.convert(path, tmp_path / "made.zarr")
    assert made.dtype == expected.dtype
    np.testing.assert_array_equal(made.data.compute(), expected)


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize(("kind", "samples", "kept"), [(0, 0, 1), (4, 2, 1), (2, 3, 3), (6, 4, 3)])
def test_png_of_16_bits(tmp_path: Path, kind: int, samples: int, kept: int, interlaced: bool) -> None:
    pixels = deep(*([samples] if samples else []))
    write_png(
        tmp_path / "a.png", pixels, 16, kind, (b"gAMA", struct.pack(">I", 22222)), interlaced=interlaced
    )
    check(tmp_path / "a.png", planes(pixels)[:kept], tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_of_few_bits(tmp_path: Path, bits: int) -> None:
    """Grey is spread over 8 bits, so that white is 255; of one bit it is 0 and 1. Nothing falls together."""
    pixels = deep(bits=bits)
    write_png(tmp_path / "a.png", pixels, bits, 0)
    step = {1: 1, 2: 85, 4: 17, 8: 1}[bits]
    check(tmp_path / "a.png", (planes(pixels) * step).astype(np.uint8), tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_with_a_palette(tmp_path: Path, bits: int) -> None:
    palette = RNG.integers(0, 255, (2**bits, 3), np.uint8)
    pixels = deep(bits=bits)
    alpha = bytes(range(2**bits))
    write_png(tmp_path / "a.png", pixels, bits, 3, (b"PLTE", palette.tobytes()), (b"tRNS", alpha))
    check(tmp_path / "a.png", np.moveaxis(palette[pixels], 2, 0), tmp_path)


def test_grey_of_16_bits_saved_in_colour_is_one_channel(tmp_path: Path) -> None:
    grey = deep()
    write_png(tmp_path / "a.png", np.stack([grey] * 3, axis=2), 16, 2)
    check(tmp_path / "a.png", grey[None], tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_at_every_depth(tmp_path: Path, orientation: int) -> None:
    """As Pillow turns pictures of 8 bits."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = deep(3)
    low = (pixels >> 8).astype(np.uint8)
    write_png(tmp_path / "a.png", pixels, 16, 2, (b"eXIf", exif.tobytes()[6:]))
    Image.fromarray(low).save(tmp_path / "b.png", exif=exif)
    high, shown = (open_image(tmp_path / name).data.compute() for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(high >> 8, shown)
    np.testing.assert_array_equal(high, planes(orient(pixels, orientation)))


@pytest.mark.parametrize("bits", [12, 16])
def test_jpeg_of_more_than_8_bits(tmp_path: Path, bits: int) -> None:
    pixels = deep(bits=bits)
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg_encode(pixels, lossless=True, bitspersample=bits))
    check(tmp_path / "a.jpg", pixels[None], tmp_path)


def test_lossy_jpeg_of_12_bits(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint16) * 40
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg_encode(smooth, level=98, bitspersample=12))
    image = open_image(tmp_path / "a.jpg")
    assert image.dtype == np.uint16
    np.testing.assert_allclose(image.data.compute()[0].astype(int), smooth, atol=30)


TIFF: dict[str, Callable[[Path], np.ndarray]] = {}


def tiff(name: str, pixels: np.ndarray, expected: np.ndarray | None = None, **options) -> None:
    def write(path: Path) -> np.ndarray:
        tifffile.imwrite(path, pixels, metadata=None, **options)
        return planes(pixels) if expected is None else expected

    TIFF[name] = write


for _name in ("uint8", "int8", "uint16", "int16", "uint32", "int32"):
    _limits = np.iinfo(_name)
    tiff(_name, RNG.integers(_limits.min, _limits.max, SHAPE, _name, endpoint=True))
for _name in ("float32", "float64"):
    tiff(_name, RNG.random(SHAPE).astype(_name))
_half = RNG.random(SHAPE).astype(np.float16)
tiff("float16", _half, _half.astype(np.float32)[None])
tiff("float16, predictor", _half, _half.astype(np.float32)[None], compression="zlib", predictor=3)
tiff("big-endian", deep(), byteorder=">")
tiff("colour of 16 bits", deep(3), photometric="rgb")
tiff("colour and alpha of 16 bits", _rgba := deep(4), planes(_rgba)[:3], photometric="rgb", extrasamples=[2])
tiff("CMYK", RNG.integers(0, 255, (*SHAPE, 4), np.uint8), photometric="separated")
for _bits in (10, 12, 14):
    tiff(f"{_bits} bits packed", deep(bits=_bits), bitspersample=_bits, photometric="minisblack")
tiff(
    "JPEG of 12 bits, lossless",
    deep(bits=12),
    compression="jpeg",
    compressionargs={"lossless": True, "bitspersample": 12},
)
tiff("JPEG 2000 of 16 bits", deep(), compression="jpeg2000", compressionargs={"reversible": True, "level": 0})
tiff("JPEG XR of 16 bits", deep(), compression="jpegxr", compressionargs={"level": 1.0})
tiff("JPEG XL of 16 bits", deep(), compression="jpegxl", compressionargs={"lossless": True})
tiff("LZW", deep(), compression="lzw", predictor=2)
tiff("Zstandard", deep(), compression="zstd")
tiff(
    "lossless WebP",
    RNG.integers(0, 255, (*SHAPE, 3), np.uint8),
    photometric="rgb",
    compression="webp",
    compressionargs={"lossless": True},
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIFF)
def test_tiff_keeps_every_bit_or_says_no(tmp_path: Path, name: str) -> None:
    try:
        expected = TIFF[name](tmp_path / "a.tif")
    except (ValueError, NotImplementedError, TypeError, RuntimeError) as error:
        pytest.skip(f"tifffile does not write it ({error})")
    check(tmp_path / "a.tif", expected, tmp_path)


def animation_png(path: Path) -> None:
    frames = [Image.fromarray(np.full(SHAPE, value, np.uint8)) for value in (10, 20)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "animated PNG": ("a.png", animation_png),
    "GIF": ("a.gif", lambda path: Image.fromarray(np.zeros(SHAPE, np.uint8)).save(path)),
    "WebP": ("a.webp", lambda path: Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(path)),
    "JPEG 2000": ("a.jp2", lambda path: path.write_bytes(imagecodecs.jpeg2k_encode(deep()))),
    "complex TIFF": ("a.tif", lambda path: tifffile.imwrite(path, np.zeros(SHAPE, np.complex64))),
    "TIFF of 64 bits": ("a.tif", lambda path: tifffile.imwrite(path, np.zeros(SHAPE, np.int64))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_one_sentence(tmp_path: Path, what: str) -> None:
    name, write = REFUSED[what]
    write(tmp_path / name)
    with pytest.raises(ImageError, match=name) as error:
        open_image(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_deep_png_that_ends_early_is_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", deep(3), 16, 2)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"Cannot read .*a\.png") as error:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)
