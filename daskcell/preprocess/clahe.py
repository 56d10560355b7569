"""Contrast limited adaptive histogram equalisation (CLAHE) on one grid over the whole image.

Gives block by block what `skimage.exposure.equalize_adapthist` gives for each channel of the whole: the same
tiles, the same 14-bit grey values, the same rounding. (For a colour image scikit-image equalises the V of
HSV; here every channel is equalised by itself.) Read three times: extremes, histograms of the tiles,
extremes of the result.

        |   tile 0   |   tile 1   |   tile 2 ..r|      r: reflected, so that the last tile is whole
        |     m0     |     m1     |     m2      |      one grey-value map a tile, at its middle;
    |  m0  |  m0..m1  |  m1..m2  |   m2   |            between the middles two maps are mixed (four in 2-D)

K. Zuiderveld, "Contrast Limited Adaptive Histogram Equalization", Graphics Gems IV (1994) 474-485. The
clipping follows scikit-image (Modified BSD licence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from daskcell.geometry import Box
from daskcell.preprocess.dtypes import float_dtype
from daskcell.preprocess.statistics import pool
from daskcell.preprocess.steps import _by_table, _Placed, decode_array, encode_array

GRAYS = 2**14


@dataclass(frozen=True)
class Tiling:
    """Tiles of the whole image, and the grey values of its pixels."""

    shape: tuple[int, int]
    """Height and width of the whole image."""
    kernel: tuple[int, int]
    """Height and width of a tile."""
    bins: int
    extremes: tuple[tuple[float, float], ...]
    """Smallest and largest pixel of each channel."""

    @property
    def counts(self) -> tuple[int, int]:
        """Tiles down and across."""
        return -(-self.shape[0] // self.kernel[0]), -(-self.shape[1] // self.kernel[1])

    def grays(self, plane: np.ndarray, channel: int) -> np.ndarray:
        """Bin (uint16) of every pixel of one channel."""
        return _by_table(plane, lambda values: self._grays(values, *self.extremes[channel]))

    def _grays(self, values: np.ndarray, smallest: float, largest: float) -> np.ndarray:
        from skimage.util import img_as_uint

        ends = np.array([smallest, largest]).astype(values.dtype)
        if values.dtype.kind == "f":
            # Outside of -1..1 (which scikit-image refuses) the range is brought to 0..1 first.
            if smallest < -1 or largest > 1:
                values, ends = ((v - ends[0]) / (ends[1] - ends[0]) for v in (values, ends))
            # A table holds values the image does not have.
            values = np.clip(values, ends[0], ends[1])
        else:
            values = np.clip(values, ends[0], ends[1])
        values = img_as_uint(values).astype(np.float64)
        low, high = (float(end) for end in img_as_uint(ends))
        scaled = (values - low) / (high - low) * (GRAYS - 1) if low < high else np.clip(values, 0, GRAYS - 1)
        return np.round(scaled).astype(np.uint16) // np.uint16(1 + GRAYS // self.bins)

    def members(self, axis: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Index from `start`, and tile, of rows (or columns) ``start..stop``; reflected ones come twice."""
        side, kernel = self.shape[axis], self.kernel[axis]
        own = np.arange(start, stop)
        beyond = np.arange(side, self.counts[axis] * kernel)
        source = 2 * (side - 1) - beyond
        inside = (source >= start) & (source < stop)
        index = np.concatenate([own, source[inside]]) - start
        return index, np.concatenate([own, beyond[inside]]) // kernel


@dataclass(frozen=True)
class ClaheAim:
    """Settings of CLAHE, waiting for the image's extremes."""

    shape: tuple[int, int]
    kernel: tuple[int, int]
    clip_limit: float
    bins: int
    linked: bool = False

    def after_extremes(self, extremes: np.ndarray) -> TileCounts:
        pairs = tuple((float(a), float(b)) for a, b in extremes.T)
        return TileCounts(Tiling(self.shape, self.kernel, self.bins, pairs), self.clip_limit, self.linked)


@dataclass(frozen=True)
class TileCounts:
    """Histogram of every tile: counts ``(C, down, across, bins)``."""

    tiling: Tiling
    clip_limit: float
    linked: bool = False

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        down, across = self.tiling.counts
        rows, row_tiles = self.tiling.members(0, box.y0, box.y1)
        columns, column_tiles = self.tiling.members(1, box.x0, box.x1)
        bins = self.tiling.bins
        offset = (row_tiles[:, None] * across + column_tiles) * bins
        out = np.empty((len(block), down * across * bins), np.int64)
        for channel, plane in enumerate(block):
            grays = self.tiling.grays(plane, channel)[rows[:, None], columns]
            out[channel] = np.bincount((offset + grays).ravel(), minlength=down * across * bins)
        return out.reshape(len(block), down, across, bins)

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def finish(self, total: np.ndarray) -> ResultExtremes:
        size = self.tiling.kernel[0] * self.tiling.kernel[1] * (len(total) if self.linked else 1)
        total = pool(total, self.linked)
        limit = int(np.clip(self.clip_limit * size, 1, None)) if self.clip_limit > 0 else size
        maps = np.empty(total.shape, np.uint16)
        for index in np.ndindex(total.shape[:-1]):
            clipped = clip_histogram(total[index], limit)
            maps[index] = np.minimum(np.cumsum(clipped).astype(float) * ((GRAYS - 1) / size), GRAYS - 1)
        # The outermost maps hold up to the border.
        maps = np.pad(maps, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
        return ResultExtremes(Clahe(self.tiling, maps, None), self.linked)


def clip_histogram(counts: np.ndarray, limit: int) -> np.ndarray:
    """Cut counts at `limit` and deal what was cut off evenly to the other bins."""
    counts = counts.copy()
    over = counts > limit
    excess = int(counts[over].sum()) - int(over.sum()) * limit
    counts[over] = limit
    share = excess // counts.size
    upper = limit - share
    below = counts < upper
    excess -= int(below.sum()) * share
    counts[below] += share
    near = (counts >= upper) & (counts < limit)
    excess += int(counts[near].sum()) - int(near.sum()) * limit
    counts[near] = limit
    while excess > 0:
        before = excess
        for first in range(counts.size):
            free = counts < limit
            step = max(1, int(np.count_nonzero(free)) // excess)
            free = free[first::step]
            counts[first::step][free] += 1
            excess -= int(np.count_nonzero(free))
            if excess <= 0:
                break
        if excess == before:
            break
    return counts


@dataclass(frozen=True, eq=False)
class ResultExtremes:
    """Smallest and largest value of the equalised image, which becomes the 0-1 scale."""

    step: Clahe
    linked: bool = False

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        values = [self.step.equalise(plane, channel, box) for channel, plane in enumerate(block)]
        return np.array([[v.min() for v in values], [v.max() for v in values]], np.int64)

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])

    def finish(self, total: np.ndarray) -> Clahe:
        if self.linked:
            total = np.broadcast_to([[total[0].min()], [total[1].max()]], total.shape)
        return Clahe(self.step.tiling, self.step.maps, tuple((int(a), int(b)) for a, b in total.T))


@dataclass(frozen=True, eq=False)
class Clahe(_Placed):
    """The step of a plan. Result on the 0-1 scale.

    At a coarser level the tiles and their maps are the whole image's, looked up at the middle of each pixel.
    """

    kind: ClassVar[str] = "clahe"
    tiling: Tiling
    maps: np.ndarray
    """``(C, down + 2, across + 2, bins)`` uint16: grey value of every bin, per tile."""
    limits: tuple[tuple[int, int], ...] | None
    """Per channel, equalised grey values that become 0 and 1."""

    def dtype(self, dtype: np.dtype) -> np.dtype:
        return float_dtype(dtype)

    def equalise(self, plane: np.ndarray, channel: int, box: Box) -> np.ndarray:
        """Equalised grey values (uint16) of one plane at `box`."""
        grays = self.tiling.grays(plane, channel)
        tiles, parts = [], []
        for axis, (start, stop) in enumerate(((box.y0, box.y1), (box.x0, box.x1))):
            kernel = self.tiling.kernel[axis]
            place = np.minimum(self.places(start, stop), self.tiling.shape[axis] - 1) + kernel // 2
            tiles.append(place // kernel)
            parts.append((place % kernel) / kernel)
        maps = self.maps[channel]
        total = np.zeros(plane.shape, np.float32)
        for down in (0, 1):
            weight_y = parts[0] if down else 1 - parts[0]
            for across in (0, 1):
                weight_x = parts[1] if across else 1 - parts[1]
                values = maps[(tiles[0] + down)[:, None], tiles[1] + across, grays]
                total += (values * (weight_x * weight_y[:, None])).astype(np.float32)
        return total.astype(np.uint16)

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        assert self.limits is not None
        # Integers are scaled in float64, as scikit-image does, and only then brought to float32.
        exact = np.float32 if block.dtype == np.float32 else np.float64
        out = np.empty(block.shape, self.dtype(block.dtype))
        for channel, (target, plane) in enumerate(zip(out, block, strict=True)):
            low, high = map(float, self.limits[channel])
            values: np.ndarray = self.equalise(plane, channel, box).astype(exact)
            # An empty channel stays empty; scikit-image makes it white.
            target[...] = (values - low) / (high - low) if low < high else 0
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.tiling.shape),
            "kernel": list(self.tiling.kernel),
            "bins": self.tiling.bins,
            "extremes": [list(pair) for pair in self.tiling.extremes],
            "maps": encode_array(self.maps),
            "limits": [list(pair) for pair in self.limits or ()],
            "level": self.level,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Clahe:
        tiling = Tiling(
            tuple(values["shape"]),
            tuple(values["kernel"]),
            values["bins"],
            tuple(tuple(pair) for pair in values["extremes"]),
        )
        limits = tuple(tuple(pair) for pair in values["limits"])
        return cls(tiling, decode_array(values["maps"]), limits, level=values.get("level", 0))
