"""Where the signal of an image lies: percentiles that neither padding nor a large empty ground can move.

Percentiles over all pixels describe an image well as long as cells cover more of it than the percentile
leaves out. Six cells on a dark field of 4096 x 4096 pixels cover 0.03 %: its 99th percentile is noise, and
contrast up to it makes cells of noise. Likewise the 1st percentile of an image that was padded with zeros is
the padding.

The rule, for each channel, from counts of its pixels and of its *tiles* (4 x 4 pixels at multiples of 4):

padding   Values of which at least 1 % of the image consists in tiles of nothing else, that make up less than
          5 % of all other tiles, and that lie outside the 1st to 99th percentile of the other pixels: zeros
          or white around or between images. The ground is told without them; percentiles too, where they
          lie a tenth of that range away or more. A ground that is exactly 0 lies between cells too, in the
          tiles at their outlines, and stays. So do values more than twice as bright as the ground: cells
          that saturate the camera are flat as well.
ground    The middle of the shortest range that holds half of the pixels; `noise`, its standard deviation, is
          that range / 1.35, as for a normal distribution. Exact from counts, and not moved by the other half.
cores     Tiles all of whose pixels lie more than three `noise` above (or below) the ground. Of 16 noisy
          pixels one always is lower: a tile of noise, a hot pixel or a dead one is no core; cells of 8
          pixels and more have some.
limits    A percentile is *overdriven* where three quarters of the way up the cores (by their darkest pixels)
          lies more than twice as far from the ground. Then the 95th percentile of the cores is taken in its
          place; the same downwards for dark cells on a bright ground.

Where cells cover more than about 4 % (for the 99th percentile; 1 % for the 99.8th) no percentile is
overdriven, and without padding the limits are those over all pixels, in every bit.

Limits of the rule: cells of fewer than 8 pixels across are no signal; a ground that is unevenly lit counts as
noisy (`correct_background` first); dust that covers more than a twentieth of what cells cover decides the
contrast; a flat ground that is white (255) in nearly all tiles without cells is taken for padding, and
white padding of a dark field for cells.

Counts are sums over parts of the image that begin at multiples of 4 pixels, so they depend neither on how it
is cut nor on the order. Integers of up to 16 bits have one bin a value; others are counted by the first 16
bits of their float32 (about 1 %), for these limits alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numba import njit

from daskcell.preprocess.dtypes import all_values, is_small

TILE = 4
PIXELS, FLAT, DARKEST, BRIGHTEST = range(4)
"""Rows of the counts: pixels by value; tiles of one value by it; tiles by their darkest, brightest pixel."""

_PADDED = 0.01
_STRAY = 0.05
_AWAY = 0.1
_SATURATED = 2.0
SIGMAS = 3.0
_HALF = 1.349
"""Length in standard deviations of the shortest range that holds half of a normal distribution."""
_RANGE = 3.532
"""Expected range of 16 values of a normal distribution, in standard deviations."""
_UNEVEN = 1.5
_OVERDRIVEN = 2.0
_USUAL, _HIGH = 75.0, 95.0


@dataclass(frozen=True, eq=False)
class Signal:
    """What the counts of one channel say.

    Attributes
    ----------
    pixels : (bins,) int64
        Counts of the values percentiles are taken of.
    padding : (bins,) bool
        Values that are not counted.
    ground, noise : float
        Grey level of the ground, and its standard deviation.
    bright, dark : (bins,) int64
        Cores above the ground by their darkest pixel, and below it by their brightest.
    even : bool
        The ground is most of the image: neighbouring pixels differ about as much as distant ones.
    """

    values: np.ndarray
    pixels: np.ndarray
    padding: np.ndarray
    ground: float
    noise: float
    bright: np.ndarray
    dark: np.ndarray
    even: bool

    @property
    def is_empty(self) -> bool:
        """There is noise, and no core."""
        return self.even and self.noise > 0 and not self.bright.any() and not self.dark.any()

    def percentile(self, percentile: float) -> float:
        """Of the pixels without padding."""
        return _percentile(self.values, self.pixels, percentile)

    def without_padding(self, pixels: np.ndarray) -> np.ndarray:
        """Those of some pixels ``(n,)``, in the image's type, that are no padding."""
        return pixels[~self.padding[_keys(pixels)]] if self.padding.any() else pixels

    def core(self, percentile: float, *, dark: bool = False) -> float | None:
        """Percentile of the cores, counted from the ground; None: there are none."""
        if dark:
            found = self.dark
            return float(_percentile(self.values, found, 100 - percentile)) if found.any() else None
        return float(_percentile(self.values, self.bright, percentile)) if self.bright.any() else None

    @property
    def is_sparse(self) -> bool:
        """The 99th percentile, or for a bright ground the 1st, is overdriven."""
        limits = self.percentile(1), self.percentile(99)
        return self.widen(*limits) != limits

    def count_cores(self, counts: np.ndarray) -> int:
        """Cores of a part of the image, by its counts ``(4, bins)``."""
        reach = SIGMAS * self.noise
        bright = counts[DARKEST][~self.padding & (self.values > self.ground + reach)]
        dark = counts[BRIGHTEST][~self.padding & (self.values < self.ground - reach)]
        return int(bright.sum() + dark.sum())

    def widen(self, low: float, high: float) -> tuple[float, float]:
        """Limits with those replaced that are overdriven."""
        usual, wide = self.core(_USUAL), self.core(_HIGH)
        if usual is not None and usual - self.ground > _OVERDRIVEN * max(high - self.ground, 0.0):
            high = max(high, float(wide or high))
        usual, wide = self.core(_USUAL, dark=True), self.core(_HIGH, dark=True)
        if usual is not None and self.ground - usual > _OVERDRIVEN * max(self.ground - low, 0.0):
            low = min(low, float(low if wide is None else wide))
        return low, high


def find_signal(counts: np.ndarray, values: np.ndarray) -> Signal | None:
    """Ground, padding and cores of one channel.

    Parameters
    ----------
    counts : (4, bins) int64
        As `count_tiles` makes them, of all parts together.
    values : (bins,)
        The values of the bins, in order.

    Returns
    -------
    Signal, or None for a channel of a single value
    """
    padding = _padding(counts)
    padding &= ~_saturated(values, np.where(padding, 0, counts[PIXELS]))
    pixels = np.where(padding, 0, counts[PIXELS])
    if np.count_nonzero(pixels) < 2:
        return None
    darkest, brightest = counts[DARKEST].copy(), counts[BRIGHTEST].copy()
    darkest[padding] = brightest[padding] = 0  # of tiles across their rim too
    first, last = _shortest_half(values, pixels)
    ground, noise = (first + last) / 2, (last - first) / _HALF
    bright = np.where(values > ground + SIGMAS * noise, darkest, 0)
    dark = np.where(values < ground - SIGMAS * noise, brightest, 0)
    even = False
    if darkest.any() and brightest.any():
        local = (_percentile(values, brightest, 50) - _percentile(values, darkest, 50)) / _RANGE
        even = bool(noise <= _UNEVEN * local)
    low, high = _percentile(values, pixels, 1), _percentile(values, pixels, 99)
    away = _AWAY * (high - low)
    padding &= (values < low - away) | (values > high + away)
    pixels = np.where(padding, 0, counts[PIXELS])
    return Signal(values, pixels, padding, ground, noise, bright, dark, even)


def may_matter(pixels: np.ndarray, values: np.ndarray, low: float, high: float) -> bool:
    """Whether tiles could change the limits `low` and `high`, told by the pixels ``(bins,)`` alone."""
    if np.count_nonzero(pixels) < 2:
        return False
    if _spikes(pixels, pixels).any():
        return True
    first, last = _shortest_half(values, pixels)
    ground, least = (first + last) / 2, TILE * TILE
    return bool(
        pixels[values > ground + _OVERDRIVEN * max(high - ground, 0.0)].sum() >= least
        or pixels[values < ground - _OVERDRIVEN * max(ground - low, 0.0)].sum() >= least
    )


def _padding(counts: np.ndarray) -> np.ndarray:
    """Bins ``(bins,)`` bool whose values are padding."""
    pixels, flat = counts[PIXELS], TILE * TILE * counts[FLAT]
    spikes = _spikes(pixels, flat)
    others = pixels.sum() - flat[spikes].sum()
    return np.asarray(spikes & (pixels - flat < _STRAY * others))


def _saturated(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Bins ``(bins,)`` bool that are cells if they are flat: more than twice as bright as the ground."""
    if not pixels.any():
        return np.zeros(len(values), bool)
    ground = sum(_shortest_half(values, pixels)) / 2
    black = min(0.0, float(values[np.flatnonzero(pixels)[0]]))
    return np.asarray(values - black > _SATURATED * (ground - black))


def _spikes(pixels: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Values that hold much of the image in `flat` tiles, more than their neighbours, and lie outside the
    usual range of the other pixels."""
    total = int(pixels.sum())
    beside = np.maximum(np.append(pixels[1:], 0), np.append(0, pixels[:-1]))
    much = (flat >= max(_PADDED * total, TILE * TILE)) & (pixels > 2 * beside)
    others, below = total - pixels, np.cumsum(pixels) - pixels
    outside = (below < 0.01 * others) | (others - below < 0.01 * others)
    return np.asarray(much & outside & (others > 0))


def _shortest_half(values: np.ndarray, pixels: np.ndarray) -> tuple[float, float]:
    """Ends of the shortest range of values that holds half of the pixels; of equals the lowest."""
    present = np.flatnonzero(pixels)
    levels, until = values[present].astype(np.float64), np.cumsum(pixels[present])
    half = (int(until[-1]) + 1) // 2
    before = until - pixels[present]
    ends = np.searchsorted(until, before + half)
    starts = np.flatnonzero(ends < len(levels))
    shortest = int(np.argmin(levels[ends[starts]] - levels[starts]))
    return float(levels[starts[shortest]]), float(levels[ends[starts[shortest]]])


def _percentile(values: np.ndarray, counts: np.ndarray, percentile: float) -> float:
    """The smallest of the values up to which at least the percentile of them lies."""
    until = np.cumsum(counts)
    place = int(np.searchsorted(until, percentile / 100 * int(until[-1])))
    # At a percentile of 0 the first value that occurs.
    return float(values[max(place, int(np.argmax(counts > 0)))])


# -- counting ---------------------------------------------------------------------------------------
def bin_values(dtype: np.dtype) -> np.ndarray:
    """The values of the bins that pixels of `dtype` are counted in."""
    dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype
    if is_small(dtype):
        return all_values(dtype)
    keys = np.arange(1 << 16, dtype=np.uint32) << 16
    sign = np.uint32(1 << 31)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.where(keys & sign, keys ^ sign, ~keys).view(np.float32), nan=0.0)


def count_tiles(part: np.ndarray) -> np.ndarray:
    """Counts ``(C, 4, bins)`` int64 of a part ``(C, h, w)`` that begins at multiples of `TILE` pixels.

    Tiles that the image's border cuts are left out.
    """
    part = part.view(np.uint8) if part.dtype == bool else part
    bins = 1 << (8 * part.dtype.itemsize if is_small(part.dtype) else 16)
    out = np.zeros((len(part), 4, bins), np.int64)
    for plane, counts in zip(part, out, strict=True):
        plane = np.ascontiguousarray(plane)
        _count(_keys(plane), counts)
        if not is_small(plane.dtype):
            # Values of one bin differ: only tiles of one value are flat.
            height, width = (side // TILE * TILE for side in plane.shape)
            tiles = plane[:height, :width].reshape(height // TILE, TILE, width // TILE, TILE)
            flat = tiles.min(axis=(1, 3)) == tiles.max(axis=(1, 3))
            values = np.ascontiguousarray(tiles[:, 0, :, 0][flat])
            counts[FLAT] = np.bincount(_keys(values), minlength=bins)
    return out


def _keys(plane: np.ndarray) -> np.ndarray:
    """Bins of pixels, in the order of their values."""
    plane = plane.view(np.uint8) if plane.dtype == bool else plane
    if is_small(plane.dtype):
        keys = plane.view(f"u{plane.dtype.itemsize}")
        return (
            keys ^ keys.dtype.type(1 << (8 * plane.dtype.itemsize - 1)) if plane.dtype.kind == "i" else keys
        )
    with np.errstate(over="ignore"):
        bits = (plane.astype(np.float32) + np.float32(0)).view(np.uint32)  # no -0
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (bits >> 16).astype(np.uint16)


@njit(cache=True, nogil=True)
def _count(keys, counts):  # pragma: no cover - compiled
    height, width = keys.shape
    lows, highs = np.empty(width, keys.dtype), np.empty(width, keys.dtype)
    for y in range(height):
        for x in range(width):
            counts[0, keys[y, x]] += 1
        if y % 4 == 0:
            lows[:] = keys[y]
            highs[:] = keys[y]
        else:
            row = keys[y]
            for x in range(width):
                lows[x] = min(lows[x], row[x])
                highs[x] = max(highs[x], row[x])
        if y % 4 == 3:
            for x in range(0, width - 3, 4):
                low = min(min(lows[x], lows[x + 1]), min(lows[x + 2], lows[x + 3]))
                high = max(max(highs[x], highs[x + 1]), max(highs[x + 2], highs[x + 3]))
                counts[2, low] += 1
                counts[3, high] += 1
                if low == high:
                    counts[1, low] += 1


def aligned(chunks: Sequence[Sequence[int]], step: int) -> tuple[tuple[int, ...], ...]:
    """Chunks along each axis whose borders lie at the multiples of `step` next before the given ones."""
    out = []
    for sides in chunks:
        ends = [end // step * step for end in accumulate(sides)]
        ends = sorted({0, *ends[:-1], sum(sides)})
        out.append(tuple(b - a for a, b in pairwise(ends)))
    return tuple(out)
