"""Slides that OpenSlide reads (extra ``openslide``): colour images with levels of any ratio."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcell.geometry import Box, check_inside
from daskcell.images.readers import ZChoice
from daskcell.storage import paths
from daskcell.storage.atomic import files_of

PIECE = 512
"""Side in pixels of what is asked for at once, where the slide does not say its tiles."""


class OpenSlideReader:
    """A slide: red, green and blue; where nothing was scanned, white."""

    def __init__(self, path: str) -> None:
        import openslide

        self.slide: Any = openslide.OpenSlide(path)
        properties = self.slide.properties
        self.path, self.name, self.axes = path, Path(path).stem, "YXS"
        self.levels = tuple((height, width) for width, height in self.slide.level_dimensions)
        self.channels = ("red", "green", "blue")
        sizes = [float(properties.get(f"openslide.mpp-{axis}") or 0) for axis in "yx"]
        self.pixel_size = (sizes[0], sizes[1]) if all(sizes) else None
        self.dtype = np.dtype(np.uint8)
        self.is_rgb = True
        self.sizes = {"t": 1, "z": 1}
        self.scenes = ("",)
        self.files = tuple(files_of_slide(path))
        tile = [properties.get(f"openslide.level[0].tile-{side}", PIECE) for side in ("height", "width")]
        self.piece = (int(tile[0]), int(tile[1]))

    def read(self, level: int, box: Box) -> NDArray:
        check_inside(box, self.levels[level], self.path)
        # The corner is given in pixels of the first level; rounding up finds the level's own pixel again.
        step = self.slide.level_downsamples[level]
        corner = tuple(int(np.ceil(start * step)) for start in (box.x0, box.y0))
        rgba = np.asarray(self.slide.read_region(corner, level, (box.shape[1], box.shape[0])))
        alpha = rgba[..., 3:].astype(np.uint16)
        shown = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
        return np.ascontiguousarray(np.moveaxis(shown.astype(np.uint8), 2, 0))

    def close(self) -> None:
        self.slide.close()


def files_of_slide(path: str) -> list[str]:
    """The files of a slide: of MRXS those in the folder of its name, of VMS and VMU those that it lists."""
    real = paths.realpath(path)
    stem, suffix = os.path.splitext(real)
    found = {real}
    if suffix.lower() == ".mrxs":
        found.update(map(str, files_of(Path(stem))) if os.path.isdir(stem) else ())
    elif suffix.lower() in (".vms", ".vmu"):
        folder = os.path.dirname(real)
        with builtins.open(real, encoding="utf-8", errors="replace") as lines:
            values = (line.partition("=")[2].strip() for line in lines)
            listed = (os.path.join(folder, value) for value in values if value)
            found.update(paths.realpath(file) for file in listed if os.path.isfile(file))
    return sorted(found)


def open(path: str, *, t: int = 0, z: ZChoice = "max") -> OpenSlideReader:
    return OpenSlideReader(path)
