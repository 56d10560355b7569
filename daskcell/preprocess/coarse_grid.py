"""A coarse grid over the whole image, read and written block by block.

    | cell 0 | cell 1 | cell 2 | c3 |      cells of one size, counted from the image's corner, so that they
        +---------|---------+              are the same for every block; the last ones may be smaller
        block: cell 1 is whole in it

Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box


@dataclass(frozen=True)
class CoarseGrid:
    """Square cells of `cell` pixels a side on an image of `shape` ``(Y, X)``."""

    shape: tuple[int, int]
    cell: int

    @property
    def counts(self) -> tuple[int, int]:
        """Cells down and across."""
        return -(-self.shape[0] // self.cell), -(-self.shape[1] // self.cell)

    def inside(self, box: Box) -> Box:
        """The cells that lie whole in a box of pixels, as a box of cells."""
        low = [-(-start // self.cell) for start in (box.y0, box.x0)]
        high = [
            -(-side // self.cell) if stop == side else stop // self.cell
            for stop, side in zip((box.y1, box.x1), self.shape, strict=True)
        ]
        cells = Box(*low, *high)
        if cells.is_empty:
            raise InputError(
                f"A block of {box.shape} pixels holds no cell of {self.cell} pixels: read it with its halo."
            )
        return cells

    def means(self, plane: np.ndarray, box: Box) -> np.ndarray:
        """Mean (float64) of every whole cell of a plane ``(h, w)`` that lies at `box`."""
        from daskcell.preprocess._kernels import cell_means

        cells = self.inside(box)
        edges = []
        for first, last, start, side in zip(
            (cells.y0, cells.x0), (cells.y1, cells.x1), (box.y0, box.x0), self.shape, strict=True
        ):
            edges.append(np.minimum(np.arange(first, last + 1) * self.cell, side) - start)
        return cell_means(plane, *edges)

    def spread(self, values: np.ndarray, cells: Box, box: Box) -> np.ndarray:
        """Values at the middles of `cells`, in between linearly, for every pixel of `box`.

        Beyond the outermost middles the values hold. (`skimage.transform.resize` of order 1 does the same.)
        """
        row, column = (
            self._between(start, stop, first, last)
            for start, stop, first, last in zip(
                (box.y0, box.x0), (box.y1, box.x1), (cells.y0, cells.x0), (cells.y1, cells.x1), strict=True
            )
        )
        below, part = column
        wide = values[:, below] * (1 - part) + values[:, np.minimum(below + 1, values.shape[1] - 1)] * part
        below, part = row
        part = part[:, None]
        return wide[below] * (1 - part) + wide[np.minimum(below + 1, values.shape[0] - 1)] * part

    def _between(self, start: int, stop: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Index of the cell whose middle lies before each pixel, and the way from it to the next."""
        place = (np.arange(start, stop) + 0.5) / self.cell - 0.5
        below = np.floor(place)
        index = np.clip(below.astype(np.int64), first, last - 1) - first
        return index, np.where((below >= first) & (below < last - 1), place - below, 0.0)
