"""PNG, JPEG and the like: small images, decoded whole.

A colour image whose channels are all the same (fluorescence saved as RGB) is read as one channel; alpha is
left out; the orientation of EXIF is honoured; gamma and colour profiles are not. All bits are kept: of what
Pillow would narrow, and of JPEG that it does not know (12 bits, lossless), imagecodecs decodes. Grey of 2 and
4 bits is spread over 0 to 255, as everywhere; of one bit it is 0 and 1.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError
from daskcell.geometry import Box, check_inside
from daskcell.images.readers import ZChoice, tiffstreams
from daskcell.storage import paths

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp")
LARGEST_BYTES = 2 * 2**30
"""Decoded images beyond this are refused: these formats can only be read whole."""

_PNG, _JPEG, _BMP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"


def matches(path: str, head: bytes) -> bool:
    return head.startswith((_PNG, _JPEG)) or (head.startswith(_BMP) and path.lower().endswith(".bmp"))


def may_be_stack(path: str) -> bool:
    return False


class RasterReader:
    """An image held in memory."""

    def __init__(
        self, pixels: NDArray, name: str, is_rgb: bool, pixel_size: tuple[float, float] | None
    ) -> None:
        self.pixels = pixels
        self.name = name
        self.axes = "CYX"
        self.levels = ((pixels.shape[1], pixels.shape[2]),)
        self.is_rgb = is_rgb
        self.channels = ("red", "green", "blue") if is_rgb else ("grey",)
        self.pixel_size = pixel_size
        self.dtype = pixels.dtype
        self.sizes = {"t": 1, "z": 1}
        self.scenes = ("",)
        self.piece = self.levels[0]
        self.files: tuple[str, ...] = ()

    def read(self, level: int, box: Box) -> NDArray:
        check_inside(box, self.levels[level], self.name)
        return self.pixels[(slice(None), *box.slices)]

    def close(self) -> None:
        self.pixels = self.pixels[:, :0, :0]


def open(path: str, *, t: int = 0, z: ZChoice = "max") -> RasterReader:
    from PIL import Image as Pillow
    from PIL import ImageFile, ImageOps

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    content = paths.read(path)
    if content.startswith(_JPEG) and tiffstreams.has_hole(content):
        raise ImageError(
            f"Cannot read {path}: damaged, its data hold zeros in a row that were never written."
        )
    deep = _deep(content)
    if deep is not None:
        pixels = _decode_deep(content, path, deep)
    else:
        with Pillow.open(io.BytesIO(content)) as file:
            if file.format == "PNG" and getattr(file, "n_frames", 1) > 1:
                raise ImageError(_ANIMATED.format(path))
            _check_size(path, file.height, file.width, len(file.getbands()))
            mode = file.mode
            shown = file.convert("RGB") if mode in _CONVERTED else file
            pixels = np.asarray(ImageOps.exif_transpose(shown))
        if pixels.dtype == bool:
            pixels = pixels.astype(np.uint8)
        if pixels.dtype == np.int32 and mode.startswith("I") and 0 <= pixels.min() <= pixels.max() <= 65535:
            pixels = pixels.astype(np.uint16)  # Pillow holds the 16 bits of a grey PNG in 32
    if pixels.ndim == 3:
        colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))  # without alpha
        pixels = np.moveaxis(pixels[..., :colours], 2, 0)
        if colours == 3 and (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all():
            pixels = pixels[:1]
    else:
        pixels = pixels[None]
    reader = RasterReader(np.ascontiguousarray(pixels), Path(path).stem, pixels.shape[0] == 3, None)
    reader.files = (paths.realpath(path),)
    return reader


_CONVERTED = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX")
"""Modes of Pillow that become red, green and blue."""
_ANIMATED = "Cannot read {}: it is an animation; please save each of its images as a file."
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
"""JPEG markers of frames that Pillow does not decode."""


def _deep(content: bytes) -> tuple[int, int, int] | None:
    """Height, width and samples of files that Pillow would reduce to 8 bits or cannot decode; else None."""
    if content.startswith(_PNG) and len(content) > 26:
        width, height, bits, kind = struct.unpack_from(">IIBB", content, 16)
        return (height, width, {2: 3, 4: 2, 6: 4}[kind]) if bits == 16 and kind in (2, 4, 6) else None
    if content.startswith(_JPEG):
        for marker, at in tiffstreams.frames(content):
            bits, height, width, samples = struct.unpack_from(">BHHB", content, at)
            return (height, width, samples) if bits != 8 or marker in _LOSSLESS else None
    return None


def _decode_deep(content: bytes, path: str, shape: tuple[int, int, int]) -> NDArray:
    """Pixels in their full depth, oriented as the file says."""
    import imagecodecs
    from PIL import Image as Pillow

    height, width, samples = shape
    _check_size(path, height, width, 2 * samples)
    if content.startswith(_PNG):
        if b"acTL" in content[: content.find(b"IDAT")]:
            raise ImageError(_ANIMATED.format(path))
        pixels = imagecodecs.png_decode(content)
        with Pillow.open(io.BytesIO(content)) as file:
            turn = int(file.getexif().get(_ORIENTATION, 1))
        return np.asarray(orient(pixels, turn))
    if samples not in (1, 3):
        raise ImageError(f"Cannot read {path}: a JPEG of {samples} colours and more than 8 bits is not read.")
    return np.asarray(imagecodecs.jpeg_decode(content))


_ORIENTATION = 0x0112


def orient(pixels: NDArray, orientation: int) -> NDArray:
    """``(Y, X, ...)`` in the orientation that EXIF gives; 1 and unknown values are as stored."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _check_size(path: str, height: int, width: int, pixel_bytes: int) -> None:
    if width * height * pixel_bytes > LARGEST_BYTES:
        raise ImageError(
            f"{path} is too large for its format ({height} x {width} pixels); please save it as TIFF."
        )
