"""Where the signal of an image lies: percentiles that neither padding nor a large empty background can move.

Percentiles over all pixels describe an image well as long as cells cover more of it than the percentile
leaves out. Six cells on a dark field of 4096 x 4096 pixels cover 0.03 %: its 99th percentile is noise, and
contrast up to it makes cells of noise. Likewise the 1st percentile of an image that was padded with zeros is
the padding.

The rule, for each channel, from counts of its pixels and of its *tiles* (4 x 4 pixels at multiples of 4; one
is *flat* if all its pixels are equal):

padding     Values of which at least 1 % of the image consists in flat tiles, that make up less than 5 % of
            all other tiles (not counting those that a straight outline cuts), and that lie outside the 1st to
            99th percentile of the other pixels. Such values are padding or cells that saturate the camera.
            They are told apart by where their flat tiles lie:

            straight  The outline of padding runs along rows and columns, that of cells turns all the time:
                      padding has more than 20 tiles of straight outline for every corner. So zeros or white
                      around an image, or in gaps between the fields of a mosaic, are padding.
            rim       Padding of another outline (a rotated image, a round aperture) lies at the image's rim:
                      of the tiles there it holds a fifth or more, plus half of its share of the image. Not
                      for values more than twice as bright as the background: white glass around tissue.

            The background is told without padding; percentiles too, where it lies a tenth of the range from
            the 1st to the 99th percentile away or more. A background that is exactly 0 lies between cells
            too, in the tiles at their outlines, and stays.
background  The middle of the shortest range that holds half of the pixels; `noise`, its standard deviation,
            is that range / 1.35, as for a normal distribution. Exact from counts, and not moved by the other
            half.
cells       Tiles all of whose pixels lie more than three `noise` above (or below) the background. Of 16 noisy
            pixels one always is lower: a tile of noise, a hot pixel or a dead one is no such tile; cells of 8
            pixels and more have some.
limits      A percentile is *overdriven* where three quarters of the way up the tiles of cells (by their
            darkest pixels) lies more than twice as far from the background. Then the 95th percentile of these
            tiles is taken in its place; the same downwards for dark cells on a bright background.

Where cells cover more than about 4 % (for the 99th percentile; 1 % for the 99.8th) no percentile is
overdriven, and without padding the limits are those over all pixels, in every bit.

Limits of the rule: cells of fewer than 8 pixels across are no signal; an unevenly lit background counts as
noisy (`correct_background` first); dust that covers more than a twentieth of what cells cover decides the
contrast; a value is padding everywhere or nowhere, so that cells of exactly the value of padding beside them
are left out too; rectangles of one value with sides of 60 to 110 pixels and more (as they lie) are padding.

Counts are sums over parts of the image that begin at multiples of `SPAN` pixels, so they depend neither on
how it is cut nor on the order: tiles next to each other are compared within squares of `SPAN` pixels only.
Integers of up to 16 bits have one bin a value; others are counted by the first 16 bits of their float32
(about 1 %), for these limits alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numba import njit

from daskcell.geometry import Box
from daskcell.preprocess.dtypes import all_values, is_small

TILE = 4
SPAN = 16
"""Parts begin at multiples of so many pixels."""
PIXELS, FLAT, DARKEST, BRIGHTEST, RIM, FLAT_RIM, STRAIGHT = range(7)
"""Rows of the counts: pixels by value; flat tiles by value; all tiles by their darkest and by their brightest
pixel; all tiles at the image's rim by their first pixel, and the flat ones; by value, how straight the
outline of flat tiles is: straight pieces less `_CORNER` times the corners."""
ROWS = 7

_PADDED = 0.01
_STRAY = 0.05
_AWAY = 0.1
_BRIGHT = 2.0
_CORNER = 20
_AT_RIM = 0.2
SIGMAS = 3.0
_HALF = 1.349
"""Length in standard deviations of the shortest range that holds half of a normal distribution."""
_RANGE = 3.532
"""Expected range of 16 values of a normal distribution, in standard deviations."""
_UNEVEN = 1.5
_OVERDRIVEN = 2.0
_USUAL, _HIGH = 75.0, 95.0
_NAMED = 3
"""Values of padding that are named."""


@dataclass(frozen=True)
class Limits:
    """Grey levels of one channel that become black and white."""

    low: float
    high: float
    notes: tuple[str, ...] = ()
    """How they differ from percentiles over all pixels, in words."""


@dataclass(frozen=True, eq=False)
class Signal:
    """What the counts of one channel say.

    Attributes
    ----------
    pixels : (bins,) int64
        Counts of the values percentiles are taken of.
    padding : (bins,) bool
        Values that are not counted.
    padded : float
        Share of the image's pixels that have these values.
    background, noise : float
        Grey level of the background, and its standard deviation.
    bright, dark : (bins,) int64
        Tiles of cells above the background by their darkest pixel, and below it by their brightest.
    even : bool
        The background is most of the image: neighbouring pixels differ about as much as distant ones.
    """

    values: np.ndarray
    pixels: np.ndarray
    padding: np.ndarray
    padded: float
    background: float
    noise: float
    bright: np.ndarray
    dark: np.ndarray
    even: bool

    @property
    def is_empty(self) -> bool:
        """There is noise, and no cell."""
        return self.even and self.noise > 0 and not self.bright.any() and not self.dark.any()

    def percentile(self, percentile: float) -> float:
        """Of the pixels without padding."""
        return _percentile(self.values, self.pixels, percentile)

    def without_padding(self, pixels: np.ndarray) -> np.ndarray:
        """Those of some pixels ``(n,)``, in the image's type, that are no padding."""
        return pixels[~self.padding[_keys(pixels)]] if self.padding.any() else pixels

    def cell_level(self, percentile: float, *, dark: bool = False) -> float | None:
        """Percentile of the tiles of cells, counted from the background; None: there are none."""
        if dark:
            found = self.dark
            return float(_percentile(self.values, found, 100 - percentile)) if found.any() else None
        return float(_percentile(self.values, self.bright, percentile)) if self.bright.any() else None

    @property
    def is_sparse(self) -> bool:
        """The 99th percentile, or for a bright background the 1st, is overdriven."""
        limits = self.percentile(1), self.percentile(99)
        return self.widen(*limits) != limits

    def count_cell_tiles(self, counts: np.ndarray) -> int:
        """Tiles of cells in a part of the image, by its counts ``(ROWS, bins)``."""
        reach = SIGMAS * self.noise
        bright = counts[DARKEST][~self.padding & (self.values > self.background + reach)]
        dark = counts[BRIGHTEST][~self.padding & (self.values < self.background - reach)]
        return int(bright.sum() + dark.sum())

    def limits(self, low: float, high: float) -> Limits:
        """`widen`, and in words what became of the image's percentiles `low` and `high`."""
        limits, notes = self.widen(low, high), []
        if self.padded:
            values = ", ".join(f"{value:g}" for value in self.values[self.padding][:_NAMED])
            notes.append(
                f"{100 * self.padded:.3g} % of the image is padding (value {values}); it is left out of the "
                "percentiles that set black and white"
            )
        if limits != (low, high):
            changed = [
                f"{name} is {new:.4g}, a level of the cells, and not the percentile {old:.4g}"
                for name, new, old in zip(("black", "white"), limits, (low, high), strict=True)
                if new != old
            ]
            notes.append(
                f"cells cover little of the image (background {self.background:.4g}, noise "
                f"{self.noise:.3g}); {'; '.join(changed)}"
            )
        return Limits(*limits, tuple(notes))

    def widen(self, low: float, high: float) -> tuple[float, float]:
        """Limits with those replaced that are overdriven."""
        usual, wide = self.cell_level(_USUAL), self.cell_level(_HIGH)
        if usual is not None and usual - self.background > _OVERDRIVEN * max(high - self.background, 0.0):
            high = max(high, float(wide or high))
        usual, wide = self.cell_level(_USUAL, dark=True), self.cell_level(_HIGH, dark=True)
        if usual is not None and self.background - usual > _OVERDRIVEN * max(self.background - low, 0.0):
            low = min(low, float(low if wide is None else wide))
        return low, high


def find_signal(counts: np.ndarray, values: np.ndarray) -> Signal | None:
    """Background, padding and cells of one channel.

    Parameters
    ----------
    counts : (ROWS, bins) int64
        As `count_tiles` makes them, of all parts together.
    values : (bins,)
        The values of the bins, in order.

    Returns
    -------
    Signal, or None for a channel of a single value
    """
    padding = _padding(counts, values)
    pixels = np.where(padding, 0, counts[PIXELS])
    if np.count_nonzero(pixels) < 2:
        return None
    darkest, brightest = counts[DARKEST].copy(), counts[BRIGHTEST].copy()
    darkest[padding] = brightest[padding] = 0  # of tiles across its outline too
    first, last = _shortest_half(values, pixels)
    background, noise = (first + last) / 2, (last - first) / _HALF
    bright = np.where(values > background + SIGMAS * noise, darkest, 0)
    dark = np.where(values < background - SIGMAS * noise, brightest, 0)
    even = False
    if darkest.any() and brightest.any():
        local = (_percentile(values, brightest, 50) - _percentile(values, darkest, 50)) / _RANGE
        even = bool(noise <= _UNEVEN * local)
    low, high = _percentile(values, pixels, 1), _percentile(values, pixels, 99)
    away = _AWAY * (high - low)
    padding &= (values < low - away) | (values > high + away)
    pixels = np.where(padding, 0, counts[PIXELS])
    padded = 1 - float(pixels.sum() / counts[PIXELS].sum()) if padding.any() else 0.0
    return Signal(values, pixels, padding, padded, background, noise, bright, dark, even)


def may_matter(pixels: np.ndarray, values: np.ndarray, low: float, high: float) -> bool:
    """Whether tiles could change the limits `low` and `high`, told by the pixels ``(bins,)`` alone."""
    if np.count_nonzero(pixels) < 2:
        return False
    if _spikes(pixels, pixels).any():
        return True
    first, last = _shortest_half(values, pixels)
    background, least = (first + last) / 2, TILE * TILE
    return bool(
        pixels[values > background + _OVERDRIVEN * max(high - background, 0.0)].sum() >= least
        or pixels[values < background - _OVERDRIVEN * max(background - low, 0.0)].sum() >= least
    )


def _padding(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Bins ``(bins,)`` bool whose values are padding."""
    pixels, flat = counts[PIXELS], TILE * TILE * counts[FLAT]
    spikes, straight = _spikes(pixels, flat), np.maximum(counts[STRAIGHT], 0)
    others, tiles = pixels.sum() - flat[spikes].sum(), max(int(counts[DARKEST].sum()), 1)
    at_rim = counts[FLAT_RIM] / max(int(counts[RIM].sum()), 1)
    # In no flat tile: of tiles that the border cuts, a share as of those at the rim. A straight outline cuts
    # tiles too, and a quarter of it is not seen.
    stray = pixels - flat - at_rim * max(pixels.sum() - TILE * TILE * tiles, 0)
    found = spikes & (stray < _STRAY * others + TILE * TILE * straight)
    if not found.any():
        return np.asarray(found)
    # They are padding or cells: where do they lie?
    dim = ~_bright(values, np.where(found, 0, pixels))
    around = at_rim >= _AT_RIM + counts[FLAT] / tiles / 2
    # An outline that lies at multiples of SPAN everywhere is not seen.
    unseen = counts[STRAIGHT] == 0
    return np.asarray(found & ((straight > 0) | (dim & around) | (unseen & (dim | around))))


def _bright(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Bins ``(bins,)`` bool of values more than twice as bright as the background of `pixels`."""
    if not pixels.any():
        return np.zeros(len(values), bool)
    background = sum(_shortest_half(values, pixels)) / 2
    black = min(0.0, float(values[np.flatnonzero(pixels)[0]]))
    return np.asarray(values - black > _BRIGHT * (background - black))


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


def count_tiles(part: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Counts of a part of an image.

    Parameters
    ----------
    part : array ``(C, h, w)``
    box : Box
        Where the part lies; it begins at multiples of `SPAN` pixels, and ends there or at the border.
    shape : (Y, X)
        Of the image. Tiles that its border cuts are left out.

    Returns
    -------
    array ``(C, ROWS, bins)`` int64
    """
    assert box.y0 % SPAN == box.x0 % SPAN == 0, f"tiles are cut by the block at {box}"
    part = part.view(np.uint8) if part.dtype == bool else part
    bins = 1 << (8 * part.dtype.itemsize if is_small(part.dtype) else 16)
    out = np.zeros((len(part), ROWS, bins), np.int64)
    height, width = (side // TILE * TILE for side in part.shape[1:])
    first = np.array([box.y0 // TILE, box.x0 // TILE])
    last = np.array([shape[0] // TILE - 1, shape[1] // TILE - 1]) - first
    for plane, counts in zip(part, out, strict=True):
        plane = np.ascontiguousarray(plane)
        keys = _keys(plane)
        flat = np.empty((height // TILE, width // TILE), np.bool_)
        _count(keys, counts, flat)
        if not is_small(plane.dtype):
            # Values of one bin differ: only tiles of one value are flat.
            tiles = plane[:height, :width].reshape(height // TILE, TILE, width // TILE, TILE)
            flat = tiles.min(axis=(1, 3)) == tiles.max(axis=(1, 3))
        _count_places(keys, flat, -first, last, counts)
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
def _count(keys, counts, flat):  # pragma: no cover - compiled
    """Pixels, and tiles by their darkest and brightest; and which of the tiles are flat."""
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
                flat[y // 4, x // 4] = low == high


@njit(cache=True, nogil=True)
def _count_places(keys, flat, first, last, counts):  # pragma: no cover - compiled
    """Where flat tiles lie: at the rim (rows and columns `first` and `last`), and along their outline."""
    height, width = flat.shape
    for y in range(height):
        for x in range(width):
            key = keys[4 * y, 4 * x]
            rim = y == first[0] or y == last[0] or x == first[1] or x == last[1]
            if rim:
                counts[4, key] += 1
            if flat[y, x]:
                counts[1, key] += 1
                if rim:
                    counts[5, key] += 1
            if y % 4 == 3 or x % 4 == 3 or y == height - 1 or x == width - 1:
                continue
            # Four tiles around a corner, one after the other: how often does each value's outline pass there?
            for i in range(4):
                ty, tx = y + i // 2, x + i % 2
                if not flat[ty, tx]:
                    continue
                value = keys[4 * ty, 4 * tx]
                number = where = 0
                new = True
                for j in range(4):
                    sy, sx = y + j // 2, x + j % 2
                    if flat[sy, sx] and keys[4 * sy, 4 * sx] == value:
                        new &= j >= i
                        number += 1
                        where += j
                if new and number < 4:
                    # Of two tiles, the numbers of those that lie across add up to 3.
                    counts[6, value] += 1 if number == 2 and where != 3 else -_CORNER


def aligned(chunks: Sequence[Sequence[int]], step: int) -> tuple[tuple[int, ...], ...]:
    """Chunks along each axis whose borders lie at the multiples of `step` next before the given ones."""
    out = []
    for sides in chunks:
        ends = [end // step * step for end in accumulate(sides)]
        ends = sorted({0, *ends[:-1], sum(sides)})
        out.append(tuple(b - a for a, b in pairwise(ends)))
    return tuple(out)
