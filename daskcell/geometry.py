"""Where things are: boxes, block grids and halos, in whole pixels of the whole image.

Covers integer geometry only. Knows neither Dask nor files nor pixel values.
All boxes are half-open and all orders are ``(y, x)``.

    |hhhhh|cccccccccccc|hhhhh|      c core: the pixels a block writes
    |<------- grown -------->|      h halo: pixels it reads besides, cut at the image's border
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from daskcell.errors import InputError


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """Half-open rectangle ``[y0, y1) x [x0, x1)``."""

    y0: int
    x0: int
    y1: int
    x1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of this box in an array that starts at ``(0, 0)``."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    @property
    def is_empty(self) -> bool:
        return self.y1 <= self.y0 or self.x1 <= self.x0

    def within(self, outer: Box) -> tuple[slice, slice]:
        """Index of this box in an array that holds `outer`."""
        return (
            slice(self.y0 - outer.y0, self.y1 - outer.y0),
            slice(self.x0 - outer.x0, self.x1 - outer.x0),
        )

    def grow(self, halo: int) -> Box:
        return Box(self.y0 - halo, self.x0 - halo, self.y1 + halo, self.x1 + halo)

    def clip(self, shape: tuple[int, int]) -> Box:
        """The part inside an image of `shape` ``(Y, X)``."""
        return self & Box(0, 0, *shape)

    @classmethod
    def hull(cls, boxes: Iterable[Box]) -> Box:
        """The smallest box around some boxes; an empty one if there are none."""
        corners = [(box.y0, box.x0, box.y1, box.x1) for box in boxes]
        if not corners:
            return cls(0, 0, 0, 0)
        y0, x0, y1, x1 = zip(*corners, strict=True)
        return cls(min(y0), min(x0), max(y1), max(x1))

    def __and__(self, other: Box) -> Box:
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Box(y0, x0, max(y0, min(self.y1, other.y1)), max(x0, min(self.x1, other.x1)))

    def __contains__(self, point: tuple[int, int]) -> bool:
        return self.y0 <= point[0] < self.y1 and self.x0 <= point[1] < self.x1


@dataclass(frozen=True, slots=True)
class Grid:
    """A picture of `shape` ``(Y, X)`` cut into blocks by their edges along each axis.

    `rows` and `columns` are increasing edges, from 0 to the side: uneven blocks (any Dask chunking) are
    allowed.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def regular(cls, shape: tuple[int, int], block: int) -> Grid:
        """Blocks of ``block`` pixels a side; the last of a row or column may be smaller."""
        return cls(*((*range(0, side, block), side) if side else (0,) for side in shape))

    @classmethod
    def from_chunks(cls, chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Grid:
        """The grid of a Dask array's two last ``chunks``."""
        edges = []
        for sizes in chunks:
            edge = [0]
            for size in sizes:
                if size:
                    edge.append(edge[-1] + size)
            edges.append(tuple(edge))
        return cls(*edges)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.rows[-1], self.columns[-1]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of blocks down and across."""
        return len(self.rows) - 1, len(self.columns) - 1

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Block sizes as Dask writes them."""
        return tuple(tuple(b - a for a, b in pairwise(edges)) for edges in (self.rows, self.columns))  # type: ignore[return-value]

    def __len__(self) -> int:
        return self.counts[0] * self.counts[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Block indices ``(row, column)`` in reading order."""
        down, across = self.counts
        return ((i, j) for i in range(down) for j in range(across))

    def core(self, index: tuple[int, int]) -> Box:
        """The pixels block `index` writes."""
        i, j = index
        return Box(self.rows[i], self.columns[j], self.rows[i + 1], self.columns[j + 1])

    def touching(self, box: Box) -> list[tuple[int, int]]:
        """Blocks that share a pixel with `box`, in reading order."""
        box = box.clip(self.shape)
        if box.is_empty:
            return []
        rows = [i for i in range(self.counts[0]) if self.rows[i] < box.y1 and self.rows[i + 1] > box.y0]
        columns = [
            j for j in range(self.counts[1]) if self.columns[j] < box.x1 and self.columns[j + 1] > box.x0
        ]
        return [(i, j) for i in rows for j in columns]


def check_inside(box: Box, shape: tuple[int, int], path: str) -> None:
    """Raise `InputError` unless `box` holds pixels and lies inside a level of `shape`."""
    if box.is_empty or box.clip(shape) != box:
        raise InputError(f"{box} is not inside {path}, which has {shape[0]} x {shape[1]} pixels.")
