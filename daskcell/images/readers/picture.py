"""PNG, JPEG and the like: small pictures, decoded whole.

A colour picture whose channels are all the same (fluorescence saved as RGB) is read as one channel; alpha is
left out.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcell import places
from daskcell.errors import ImageError
from daskcell.geometry import Box, check_inside
from daskcell.images.readers import ZChoice, tiffstreams

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp")
LARGEST_BYTES = 2 * 2**30
"""Decoded pictures beyond this are refused: these formats can only be read whole."""

_PNG, _JPEG, _BMP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"


def matches(path: str, head: bytes) -> bool:
    return head.startswith((_PNG, _JPEG)) or (head.startswith(_BMP) and path.lower().endswith(".bmp"))


def may_be_stack(path: str) -> bool:
    return False


class PictureReader:
    """A picture held in memory."""

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


def open(path: str, *, t: int = 0, z: ZChoice = "max") -> PictureReader:
    from PIL import Image as Pillow
    from PIL import ImageFile, ImageOps

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    content = places.read(path)
    if content.startswith(_JPEG) and tiffstreams.has_hole(content):
        raise ImageError(
            f"Cannot read {path}: damaged, its data hold zeros in a row that were never written."
        )
    with Pillow.open(io.BytesIO(content)) as file:
        width, height = file.size
        if width * height * len(file.getbands()) > LARGEST_BYTES:
            raise ImageError(
                f"{path} is too large for its format ({height} x {width} pixels); please save it as TIFF."
            )
        mode = file.mode
        picture = file.convert("RGB") if mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX") else file
        pixels = np.asarray(ImageOps.exif_transpose(picture))
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
    reader = PictureReader(np.ascontiguousarray(pixels), Path(path).stem, pixels.shape[0] == 3, None)
    reader.files = (places.real(path),)
    return reader
