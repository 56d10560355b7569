"""Slides in DICOM (extra ``wsidicom``): the levels that one file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError
from daskcell.geometry import Box, check_inside
from daskcell.images.readers import ZChoice
from daskcell.storage import paths


class WsiDicomReader:
    """The image of a slide; label and overview are left out."""

    def __init__(self, path: str) -> None:
        from wsidicom import WsiDicom

        self.slide: Any = WsiDicom.open(path)
        base = self.slide.levels[0]
        self.path, self.name, self.axes = path, Path(path).stem, "YXS"
        self.instances = list(self.slide.levels)
        self.levels = tuple((level.size.height, level.size.width) for level in self.instances)
        self.files = (paths.realpath(path),)
        self.sizes = {"t": 1, "z": len(base.focal_planes) or 1}
        self.pixel_size = None
        self.scenes = ("",)
        if base.mpp is not None:
            self.pixel_size = (float(base.mpp.height), float(base.mpp.width))
        self.piece = (base.tile_size.height, base.tile_size.width)
        first = self._pixels(0, Box(0, 0, 1, 1))
        self.dtype = first.dtype
        self.is_rgb = first.shape[0] == 3
        self.channels = ("red", "green", "blue") if self.is_rgb else ("grey",)
        if first.shape[0] not in (1, 3) or self.sizes["z"] > 1:
            raise ImageError(
                f"Cannot read {path}: DICOM slides with several planes or channels are not read."
            )

    def _pixels(self, level: int, box: Box) -> NDArray:
        number = self.instances[level].level  # halvings of the first level
        size = box.shape[1], box.shape[0]
        pixels = self.slide.read_region((box.x0, box.y0), number, size, threads=1, as_array=True)
        pixels = np.asarray(pixels)
        return np.ascontiguousarray(np.moveaxis(np.atleast_3d(pixels), 2, 0))

    def read(self, level: int, box: Box) -> NDArray:
        check_inside(box, self.levels[level], self.path)
        return self._pixels(level, box)

    def close(self) -> None:
        self.slide.close()


def open(path: str, *, t: int = 0, z: ZChoice = "max") -> WsiDicomReader:
    return WsiDicomReader(path)
