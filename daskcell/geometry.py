"""Boxes, block grids and halos, in whole pixels of the whole image.

Integers only; knows no Dask, no files and no pixel values. Boxes are half-open; orders are ``(y, x)``.

    |hhhhh|cccccccccccc|hhhhh|      c core: the pixels a block writes
    |<------- grown -------->|      h halo: pixels it also reads, clipped to the image
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from daskcell.errors import InputError


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """Half-open rectangle ``[y0, y1) x [x0, x1)``.

    Examples
    --------
    >>> core = Box(0, 256, 256, 512)
    >>> grown = core.grow(10).clip((1000, 1000))
    >>> grown
    Box(y0=0, x0=246, y1=266, x1=522)
    >>> core.within(grown)                     # where the core lies in the pixels of the grown box
    (slice(0, 256, None), slice(10, 266, None))
    """

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
        """The box with `halo` more pixels on each side."""
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
    """An image cut into blocks, which may be uneven (any Dask chunking).

    Attributes
    ----------
    rows, columns : tuple of int
        Edges of the blocks along y and x, increasing from 0 to the side of the image.

    Examples
    --------
    >>> grid = Grid.regular((500, 300), 256)
    >>> grid.counts, list(grid)
    ((2, 2), [(0, 0), (0, 1), (1, 0), (1, 1)])
    >>> grid.core((1, 0))
    Box(y0=256, x0=0, y1=500, x1=256)
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def regular(cls, shape: tuple[int, int], block: int) -> Grid:
        """Blocks with sides of `block` pixels; the last of a row or column may be smaller."""
        return cls(*((*range(0, side, block), side) if side else (0,) for side in shape))

    @classmethod
    def from_chunks(cls, chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Grid:
        """The grid of the last two ``chunks`` of a Dask array."""
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
        """Height and width of the image in pixels."""
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
