"""The one grid of network tiles over the whole image, and the mapping of the image onto it.

Cellpose rescales an image, pads it and lays 256-pixel tiles over it, spaced evenly over the *whole* length
(`cellpose.transforms.make_tiles`). A block that did this by itself would get other tiles, and so other cells.
Here every block asks the same global grid. Covers coordinates only, no pixels.

    image (Y, X)  --scale-->  scaled (y, x)  --pads-->  padded  --starts-->  tiles

All four spaces are whole pixels of the whole image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box

TILE = 256
"""Side of a tile in pixels: the input Cellpose-SAM is made for."""
OVERLAP = 0.1
"""Share of a tile that overlaps each neighbour (Cellpose's default)."""
MEAN_DIAMETER = 30.0
"""Diameter in pixels that the networks are trained for; a given diameter is rescaled to it."""


@dataclass(frozen=True)
class TileGrid:
    """Tiles of an image of `image` ``(Y, X)`` pixels that is first rescaled to `scaled` pixels."""

    image: tuple[int, int]
    scaled: tuple[int, int]

    @classmethod
    def lay(cls, image: tuple[int, int], diameter: float | None = None) -> TileGrid:
        """The grid Cellpose would lay for cells of `diameter` pixels (None: no rescaling)."""
        if not diameter:
            return cls(image, image)
        factor = MEAN_DIAMETER / diameter
        scaled = (int(image[0] * factor), int(image[1] * factor))
        if 0 in scaled:
            raise InputError(
                f"diameter={diameter:g} leaves no pixel of an image of {image[0]} x {image[1]}. "
                "Please give a smaller one."
            )
        return cls(image, scaled)

    @cached_property
    def pads(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros before and after, along y and x (`cellpose.transforms.get_pad_yx`)."""
        pads = []
        for side in self.scaled:
            extra = math.ceil(side / 16) * 16 - side if side >= TILE else max(0, TILE - side - 16)
            pads.append((8 + extra // 2, 8 + extra - extra // 2))
        return pads[0], pads[1]

    @cached_property
    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """First padded pixel of each row and each column of tiles."""
        starts = []
        for side, (before, after) in zip(self.scaled, self.pads, strict=True):
            length = side + before + after
            count = 1 if length <= TILE else math.ceil((1.0 + 2 * OVERLAP) * length / TILE)
            starts.append(np.linspace(0, length - TILE, count).astype(int))
        return starts[0], starts[1]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of tiles down and across."""
        return len(self.starts[0]), len(self.starts[1])

    def __len__(self) -> int:
        return self.counts[0] * self.counts[1]

    def box(self, tile: int) -> Box:
        """Pixels of a tile in the scaled image; may reach beyond it, into the padding."""
        i, j = divmod(tile, self.counts[1])
        y = int(self.starts[0][i]) - self.pads[0][0]
        x = int(self.starts[1][j]) - self.pads[1][0]
        return Box(y, x, y + TILE, x + TILE)

    def touching(self, box: Box) -> list[int]:
        """Tiles that share a pixel with `box` of the scaled image, in reading order."""
        rows, columns = (
            np.flatnonzero((starts - before < stop) & (starts - before + TILE > start))
            for starts, (before, _), start, stop in zip(
                self.starts, self.pads, (box.y0, box.x0), (box.y1, box.x1), strict=True
            )
        )
        return [int(i) * self.counts[1] + int(j) for i in rows for j in columns]

    def owned(self, core: Box) -> list[int]:
        """Tiles whose centre lies in `core` of the image: every tile has one owner on any block grid."""
        rows, columns = (
            np.flatnonzero((centres >= start) & (centres < stop))
            for centres, start, stop in zip(
                self._centres, (core.y0, core.x0), (core.y1, core.x1), strict=True
            )
        )
        return [int(i) * self.counts[1] + int(j) for i in rows for j in columns]

    @cached_property
    def _centres(self) -> tuple[np.ndarray, np.ndarray]:
        centres = []
        for starts, (before, _), scaled, side in zip(
            self.starts, self.pads, self.scaled, self.image, strict=True
        ):
            middle = np.clip(starts - before + TILE // 2, 0, scaled - 1)
            centres.append(np.minimum(middle * side // scaled, side - 1))
        return centres[0], centres[1]

    def to_image(self, box: Box) -> Box:
        """Pixels of the image that linear interpolation needs for `box` of the scaled image."""
        return _footprint(box.clip(self.scaled), self.scaled, self.image)

    def to_scaled(self, box: Box) -> Box:
        """Pixels of the scaled image that linear interpolation needs for `box` of the image."""
        return _footprint(box.clip(self.image), self.image, self.scaled)


def _footprint(box: Box, target: tuple[int, int], source: tuple[int, int]) -> Box:
    """Pixels of `source` sampled by `box` of `target`, both being the same image at two scales."""
    if source == target:
        return box
    edges = []
    for start, stop, t, s in zip((box.y0, box.x0), (box.y1, box.x1), target, source, strict=True):
        first = math.floor((start + 0.5) * (s / t) - 0.5)
        last = math.floor((stop - 0.5) * (s / t) - 0.5) + 1
        edges.append((max(0, first), min(s, last + 1)))
    return Box(edges[0][0], edges[1][0], edges[0][1], edges[1][1])
