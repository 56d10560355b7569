"""OME-Zarr 0.4 and 0.5: images, and plates by their single fields."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images.readers import ZChoice
from daskcell.images.store import OmeZarr


def matches(path: str, head: bytes) -> bool:
    return os.path.isdir(path) and any(
        os.path.isfile(os.path.join(path, name)) for name in ("zarr.json", ".zattrs", ".zgroup")
    )


class OmeZarrReader:
    """An OME-Zarr image at one time point."""

    def __init__(self, path: str, t: int = 0, z: ZChoice = "max") -> None:
        self.image = OmeZarr(path)
        self.name = self.image.name
        self.axes = self.image.axes.upper()
        self.levels = self.image.levels
        self.channels = self.image.channels
        self.pixel_size = self.image.pixel_size
        self.dtype = self.image.dtype
        self.is_rgb = self.image.is_rgb
        self.sizes = {axis: self.image.size(axis) for axis in "tz"}
        if not 0 <= t < self.sizes["t"]:
            raise InputError(f"{path} has {self.sizes['t']} time points; there is none with number {t}.")
        if z != "max" and not 0 <= z < self.sizes["z"]:
            raise InputError(f"{path} has {self.sizes['z']} planes; there is none with number {z}.")
        self.image.t = t
        self.planes = range(self.sizes["z"]) if z == "max" else [z]
        first = self.image.arrays[0]
        shape = first.shards or first.chunks
        self.piece = (shape[-2], shape[-1])

    def read(self, level: int, box: Box) -> NDArray:
        pixels: NDArray | None = None
        for plane in self.planes:
            self.image.z = plane
            one = self.image.read(level, box)
            pixels = one if pixels is None else np.maximum(pixels, one)
        assert pixels is not None
        return pixels

    def close(self) -> None:
        self.image.close()


def open(path: str, *, t: int = 0, z: ZChoice = "max") -> OmeZarrReader:
    if not os.path.isdir(path):
        raise ImageError(f"{path} is not an OME-Zarr folder.")
    return OmeZarrReader(path, t, z)
