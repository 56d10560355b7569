"""The tiles in which a network sees the whole image: one grid of overlapping tiles, at one scale.

    |mmmm|cccccccccccccccc|mmmm|      c core: a cell whose middle lies here is pooled from this tile
    |<-------- frame -------->|      m margin: seen besides, so that a cell at the core's edge is seen whole

The grid is laid over the whole image, in the network's pixels, and every tile is made from the image's
pixels alone: so no tile depends on how the image is cut into blocks. A cell that no single frame holds is
pooled from all the tiles whose cores it touches.

Pure geometry and resampling; knows no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from daskcell.features.cell_index import ReadPlan
from daskcell.geometry import Box

FRAME = 512
MARGIN = 48
_STEP = 32  # strides of the usual networks divide it
_EDGE = 16  # network pixels at a frame's edge that hardly know their surroundings: no cell may reach there


@dataclass(frozen=True)
class NetworkTiling:
    """The grid of one image.

    Attributes
    ----------
    shape : (Y, X)
        Of the image.
    scale : float
        Network pixels per pixel of the image.
    """

    shape: tuple[int, int]
    scale: float = 1.0

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of every tile in network pixels; a small image has one tile."""
        sides = [int(np.ceil(side * self.scale)) + 2 * MARGIN for side in self.shape]
        return tuple(min(FRAME, -(-side // _STEP) * _STEP) for side in sides)  # type: ignore[return-value]

    @property
    def core(self) -> tuple[int, int]:
        """Height and width of a core in network pixels."""
        return self.frame[0] - 2 * MARGIN, self.frame[1] - 2 * MARGIN

    @property
    def counts(self) -> tuple[int, int]:
        """Tiles down and across."""
        return tuple(  # type: ignore[return-value]
            max(1, int(np.ceil(np.ceil(side * self.scale) / core)))
            for side, core in zip(self.shape, self.core, strict=True)
        )

    def origin(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Where a tile's frame begins, in the network's pixels of the whole image."""
        return tile[0] * self.core[0] - MARGIN, tile[1] * self.core[1] - MARGIN

    def source(self, tile: tuple[int, int]) -> Box:
        """Pixels of the image that a tile is made from."""
        edges = []
        for start, length, side in zip(self.origin(tile), self.frame, self.shape, strict=True):
            reach = 0.5 + max(1.0, 1 / self.scale)
            first = int(np.floor((start + 0.5) / self.scale - 0.5 - reach))
            last = int(np.ceil((start + length - 0.5) / self.scale - 0.5 + reach))
            edges.append((min(max(first, 0), side), min(max(last + 1, 0), side)))
        (y0, y1), (x0, x1) = edges
        return Box(y0, x0, y1, x1)

    def home(self, records: np.ndarray) -> np.ndarray:
        """Tile whose core holds the middle of each cell's box: ``(n, 2)`` of row and column."""
        core, counts = np.array(self.core), np.array(self.counts)
        box = _boxes(records)
        middle = (box[:, :2] + box[:, 2:]) / 2 * self.scale
        return np.minimum((middle // core).astype(np.int64), counts - 1)

    def tiles_of(self, records: np.ndarray) -> list[list[tuple[int, int]]]:
        """Tiles each cell is pooled from: one where its frame holds the cell well, else all it touches."""
        homes = self.home(records)
        box = _boxes(records)
        start = homes * self.core - MARGIN + _EDGE
        stop = start + np.array(self.frame) - 2 * _EDGE
        one = ((box[:, :2] * self.scale >= start) & (box[:, 2:] * self.scale <= stop)).all(axis=1)
        found = []
        for home, alone, (y0, x0, y1, x1) in zip(homes.tolist(), one, box.tolist(), strict=True):
            if alone:
                found.append([(home[0], home[1])])
            else:
                (top, left), (bottom, right) = self.at(y0, x0), self.at(y1 - 1, x1 - 1)
                found.append([(i, j) for i in range(top, bottom + 1) for j in range(left, right + 1)])
        return found

    def at(self, y: float, x: float) -> tuple[int, int]:
        """Tile whose core holds the middle of pixel ``(y, x)`` of the image."""
        return tuple(  # type: ignore[return-value]
            min(int((p + 0.5) * self.scale // core), count - 1)
            for p, core, count in zip((y, x), self.core, self.counts, strict=True)
        )

    def plan(self, records: np.ndarray, block: int) -> dict[int, list[ReadPlan]]:
        """What to read to pool all cells: groups of tiles about as large as blocks of `block` pixels.

        A read holds its cells whole and all pixels of their tiles. Groups are unions of cores, so no tile
        of ordinary cells is computed twice. Cells of several tiles get reads of their own.
        """
        if not len(records):
            return {}
        side = [max(1, int(block * self.scale) // core) for core in self.core]
        across = -(-self.counts[1] // side[1])
        homes = self.home(records)
        group = homes[:, 0] // side[0] * across + homes[:, 1] // side[1]
        tiles = self.tiles_of(records)
        plans: dict[int, list[ReadPlan]] = {}
        for number in np.unique(group).tolist():
            members = np.flatnonzero(group == number)
            small = [i for i in members if len(tiles[i]) == 1]
            shares = [small] if small else []
            shares += [[i] for i in members if len(tiles[i]) > 1]
            plans[number] = [self._read_plan(records[share], [tiles[i] for i in share]) for share in shares]
        return plans

    def _read_plan(self, records: np.ndarray, tiles: list[list[tuple[int, int]]]) -> ReadPlan:
        sources = [self.source(tile) for tile in {tile for some in tiles for tile in some}]
        edges = np.array([(b.y0, b.x0, b.y1, b.x1) for b in sources])
        edges = np.concatenate([edges, _boxes(records)])
        return ReadPlan(Box(*edges[:, :2].min(axis=0).tolist(), *edges[:, 2:].max(axis=0).tolist()), records)

    def resample(self, pixels: np.ndarray, tile: tuple[int, int], background: np.ndarray) -> np.ndarray:
        """A tile from its `source` pixels: ``(C, h, w)`` to ``(C, *frame)`` float32.

        Bilinear, antialiased where it shrinks (as torch's ``interpolate(antialias=True)``); beyond the
        image it is `background`, a value for each channel.
        """
        box = self.source(tile)
        origin = self.origin(tile)
        if self.scale == 1:
            out = np.empty((len(pixels), *self.frame), np.float32)
            out[:] = background[:, None, None]
            y, x = box.y0 - origin[0], box.x0 - origin[1]
            y0, x0 = max(0, -y), max(0, -x)  # the source has a few pixels more than the frame
            part = pixels[:, y0 : y0 + self.frame[0] - max(y, 0), x0 : x0 + self.frame[1] - max(x, 0)]
            out[:, max(y, 0) :, max(x, 0) :][:, : part.shape[1], : part.shape[2]] = part
            return out
        (rows, inside_y), (columns, inside_x) = (
            _weights(origin[axis], self.frame[axis], first, last, self.shape[axis], self.scale)
            for axis, (first, last) in enumerate(((box.y0, box.y1), (box.x0, box.x1)))
        )
        out = rows @ pixels @ columns.T
        beyond = ~(inside_y[:, None] & inside_x[None])
        out[:, beyond] = background[:, None]
        return out


def _boxes(records: np.ndarray) -> np.ndarray:
    return np.stack([records[name] for name in ("y0", "x0", "y1", "x1")], axis=1)


@lru_cache(maxsize=64)
def _weights(
    start: int, length: int, first: int, last: int, side: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shares ``(length, last - first)`` of the pixels ``first..last`` in network pixels from `start` on,
    along one axis, and which of these lie in the image."""
    middle = (np.arange(start, start + length) + 0.5) / scale - 0.5
    width = max(1.0, 1 / scale)
    shares = np.maximum(0, 1 - np.abs(np.arange(first, last)[None] - middle[:, None]) / width)
    inside = (middle >= -0.5) & (middle <= side - 0.5)
    total = shares.sum(axis=1, keepdims=True)
    inside &= total[:, 0] > 0
    shares = np.where(inside[:, None], shares / np.where(total > 0, total, 1), 0)
    return np.ascontiguousarray(shares, np.float32), inside
