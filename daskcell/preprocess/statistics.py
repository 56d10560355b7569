"""Global statistics of an image, counted block by block in one or more passes.

A *pass* counts something in every block; counts are merged by integer sums, minima and maxima, so the result
depends neither on how the image is cut nor on the order; the merged counts finish the pass, which gives the
next pass or the step itself.

    state = first pass
    while state is a pass:
        state = state.finish(merge(state.count(block, box) for every block))

Small integers (up to 16 bits) have one bin a value: every statistic is exact after one pass. Wider types are
read more than once: percentiles by exact selection, 16 bits of the value at a time; curves from bins between
the extremes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from daskcell.geometry import Box
from daskcell.preprocess.dtypes import all_values, check_finite, float_dtype, is_small
from daskcell.preprocess.signal import (
    PIXELS,
    ROWS,
    Limits,
    Signal,
    bin_values,
    count_tiles,
    find_signal,
    may_matter,
)
from daskcell.preprocess.steps import Curve, Step, Stretch

DIGIT = 16
MATCH_BINS = 65536


class Pass(Protocol):
    """One reading of the whole image."""

    def count(self, block: np.ndarray, box: Box) -> Any:
        """Counts of one block ``(C, h, w)`` that lies at `box`; blocks must not overlap."""

    def merge(self, a: Any, b: Any) -> Any:
        """Counts of two parts together."""

    def finish(self, total: Any) -> Pass | Step | Reference:
        """What the counts of the whole image lead to."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What another image is matched to: per channel, values and the share of pixels up to each."""

    values: tuple[np.ndarray, ...]
    quantiles: tuple[np.ndarray, ...]


def pool(counts: np.ndarray, linked: bool) -> np.ndarray:
    """Counts ``(C, ...)`` of all channels together, given to each of them, where channels are linked."""
    return np.broadcast_to(counts.sum(axis=0), counts.shape) if linked else counts


def lerp(a: Any, b: Any, t: float) -> float:
    """Between `a` and `b` as `numpy.percentile` does it, in the type of `a` and `b`."""
    difference = b - a
    return float(b - difference * (1 - t)) if t >= 0.5 else float(a + difference * t)


def rank_of(percentile: float, count: int) -> tuple[int, int, float]:
    """Ranks below and above a percentile of `count` sorted values, and the way between them (linear)."""
    rank = (count - 1) * (percentile / 100)
    below = math.floor(rank)
    return min(below, count - 1), min(below + 1, count - 1), rank - below


# -- small integers: everything from exact histograms -----------------------------------------------
@dataclass(frozen=True)
class Stretching:
    """Values at two percentiles of the signal (see `signal`) become black and white."""

    low: float
    high: float


@dataclass(frozen=True)
class Equalizing:
    """Every value becomes the share of pixels up to it; `bins` for types wider than 16 bits."""

    bins: int = 256


@dataclass(frozen=True, eq=False)
class Matching:
    """Every value becomes the reference's value with the same share of pixels up to it."""

    reference: Reference


@dataclass(frozen=True)
class Referring:
    """Only summarise: the counted image is a reference."""


Aim = Stretching | Equalizing | Matching | Referring


@dataclass(frozen=True, eq=False)
class ExactCounts:
    """One bin a value: counts ``(C, 256 or 65536)``."""

    aim: Equalizing | Matching | Referring
    dtype: np.dtype
    linked: bool = False
    """All channels get the curve of their common histogram."""

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        bits = 8 * self.dtype.itemsize
        unsigned = block.view(f"u{self.dtype.itemsize}")
        counts = np.stack([np.bincount(plane.ravel(), minlength=1 << bits) for plane in unsigned])
        # Seen as unsigned, negative values lie behind the positive ones.
        return np.roll(counts, 1 << (bits - 1), axis=1) if self.dtype.kind == "i" else counts

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def finish(self, total: np.ndarray) -> Step | Reference:
        total = pool(total, self.linked)
        values = all_values(self.dtype)
        present = [np.flatnonzero(counts) for counts in total]
        found = tuple(values[where] for where in present)
        shares = tuple(
            np.cumsum(counts[where]) / float(counts.sum())
            for counts, where in zip(total, present, strict=True)
        )
        if isinstance(self.aim, Equalizing):
            curves = (share if len(share) > 1 else 0 * share for share in shares)
            return Curve(found, tuple(curve.astype(np.float32) for curve in curves), to_float=True)
        if isinstance(self.aim, Referring):
            return Reference(found, shares)
        return Curve(found, _matched(shares, self.aim.reference), to_float=False)

    def limits(self, total: np.ndarray, aim: Stretching) -> list[tuple[float, float]]:
        """What becomes black and white in each channel."""
        return [self._limits(all_values(self.dtype), counts, aim) for counts in total]

    @staticmethod
    def _limits(values: np.ndarray, counts: np.ndarray, aim: Stretching) -> tuple[float, float]:
        until = np.cumsum(counts)
        size = int(until[-1])

        def at(rank: int) -> int:
            return int(values[np.searchsorted(until, rank, side="right")])

        limits = []
        for percentile in (aim.low, aim.high):
            below, above, part = rank_of(percentile, size)
            limits.append(lerp(at(below), at(above), part))
        return _apart(limits[0], limits[1], at(0), at(size - 1))


@dataclass(frozen=True, eq=False)
class SignalCounts:
    """Percentiles of the signal: pixels and tiles, one bin a value: counts ``(C, ROWS, 256 or 65536)``."""

    aim: Stretching
    dtype: np.dtype
    shape: tuple[int, int]
    """Height and width of the whole image."""
    linked: bool = False

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        return count_tiles(block, box, self.shape)

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def finish(self, total: np.ndarray) -> Stretch:
        return stretch([self._limits(counts) for counts in pool(total, self.linked)], self.linked)

    def _limits(self, counts: np.ndarray) -> Limits:
        values = all_values(self.dtype)
        signal = find_signal(counts, values)
        pixels = counts[PIXELS] if signal is None else signal.pixels
        usual = ExactCounts._limits(values, pixels, self.aim)
        return Limits(*usual) if signal is None else signal.limits(*usual)

    def of_pixels(self, counts: np.ndarray) -> np.ndarray | None:
        """The counts that known pixels ``(C, bins)`` lead to the same limits with; None: tiles must be
        counted."""
        values = all_values(self.dtype)
        for pixels in pool(counts, self.linked)[: 1 if self.linked else None]:
            if may_matter(pixels, values, *ExactCounts._limits(values, pixels, self.aim)):
                return None
        total = np.zeros((len(counts), ROWS, counts.shape[1]), np.int64)
        total[:, PIXELS] = counts
        return total


def _apart(low: float, high: float, smallest: float, largest: float) -> tuple[float, float]:
    # Where nearly all pixels have one value the percentiles coincide, and stretching between them would erase
    # the few that differ: a handful of bright cells on black. The extremes are taken instead.
    return (low, high) if low < high else (float(smallest), float(largest))


def _matched(shares: Sequence[np.ndarray], reference: Reference) -> tuple[np.ndarray, ...]:
    return tuple(
        np.interp(share, quantiles, values)
        for share, quantiles, values in zip(shares, reference.quantiles, reference.values, strict=True)
    )


# -- wide types: exact selection for percentiles ----------------------------------------------------
def sortable(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the same order as `values` (floats by their bits, signed integers shifted)."""
    bits = 8 * values.dtype.itemsize
    sign = np.dtype(f"u{values.dtype.itemsize}").type(1 << (bits - 1))
    keys = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    if values.dtype.kind == "u":
        return keys
    if values.dtype.kind == "i":
        return keys ^ sign
    return np.where(keys & sign, ~keys, keys | sign)


def unsortable(key: int, dtype: np.dtype) -> Any:
    """The value (numpy scalar of `dtype`) whose `sortable` is `key`."""
    bits = 8 * dtype.itemsize
    sign = 1 << (bits - 1)
    if dtype.kind == "i":
        key ^= sign
    elif dtype.kind == "f":
        key = key ^ sign if key & sign else ~key & ((1 << bits) - 1)
    return np.array([key], f"u{dtype.itemsize}").view(dtype)[0]


@dataclass(frozen=True)
class Target:
    """A value looked for: its first digits as far as known, and its rank among the values that begin so."""

    prefix: int
    rank: int


@dataclass(frozen=True, eq=False)
class Selection:
    """Exact order statistics, 16 bits a pass (radix selection): counts ``(C, targets, 65536)``.

    The first pass counts tiles too, in `ROWS` more rows, for the limits of the signal.
    """

    aim: Stretching
    dtype: np.dtype
    shape: tuple[int, int]
    """Height and width of the whole image."""
    size: int
    """Pixels of a channel, or of all linked ones."""
    linked: bool = False
    known: int = 0
    """Digits known so far."""
    targets: tuple[tuple[Target, ...], ...] = ()
    """Per channel: smallest, below and above `low`, below and above `high`, largest."""
    signals: tuple[Signal | None, ...] = ()
    """Per channel, after the first pass."""

    @classmethod
    def start(cls, aim: Stretching, dtype: np.dtype, shape: tuple[int, ...], linked: bool) -> Selection:
        channels, height, width = shape
        size = height * width * (channels if linked else 1)
        ranks = [0, *rank_of(aim.low, size)[:2], *rank_of(aim.high, size)[:2], size - 1]
        return cls(
            aim,
            dtype,
            (height, width),
            size,
            linked,
            0,
            (tuple(Target(0, rank) for rank in ranks),) * channels,
        )

    @property
    def _shift(self) -> int:
        return 8 * self.dtype.itemsize - DIGIT * (self.known + 1)

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        if not self.known:
            check_finite(block)
        out = np.zeros((len(block), len(self.targets[0]), 1 << DIGIT), np.int64)
        for plane, targets, counts in zip(block, self.targets, out, strict=True):
            keys = sortable(plane.ravel()) >> np.array(self._shift, f"u{self.dtype.itemsize}")
            seen: dict[int, np.ndarray] = {}
            for target, row in zip(targets, counts, strict=True):
                if target.prefix not in seen:
                    seen[target.prefix] = self._digits(keys, target.prefix)
                row[...] = seen[target.prefix]
        if not self.known:
            out = np.concatenate([out, count_tiles(block, box, self.shape)], axis=1)
        return out

    def _digits(self, keys: np.ndarray, prefix: int) -> np.ndarray:
        if self.known:
            keys = keys[keys >> np.array(DIGIT, keys.dtype) == prefix]
        return np.bincount(keys.astype(np.uint16), minlength=1 << DIGIT)

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def finish(self, total: np.ndarray) -> Selection | Stretch:
        total = pool(total, self.linked)
        signals = self.signals
        if not self.known:
            values = bin_values(self.dtype)
            signals = tuple(find_signal(counts[-ROWS:], values) for counts in total)
        found = tuple(
            tuple(self._narrow(target, row) for target, row in zip(targets, counts, strict=False))
            for targets, counts in zip(self.targets, total, strict=True)
        )
        narrowed = replace(self, known=self.known + 1, targets=found, signals=signals)
        if self._shift:
            return narrowed
        return stretch([narrowed._limits(*one) for one in zip(found, signals, strict=True)], self.linked)

    @staticmethod
    def _narrow(target: Target, counts: np.ndarray) -> Target:
        until = np.cumsum(counts)
        digit = int(np.searchsorted(until, target.rank, side="right"))
        before = int(until[digit - 1]) if digit else 0
        return Target((target.prefix << DIGIT) | digit, target.rank - before)

    def _limits(self, targets: Sequence[Target], signal: Signal | None) -> Limits:
        smallest, *around, largest = (unsortable(target.prefix, self.dtype) for target in targets)
        if self.dtype.kind != "f":
            smallest, *around, largest = (int(value) for value in (smallest, *around, largest))
        low = lerp(around[0], around[1], rank_of(self.aim.low, self.size)[2])
        high = lerp(around[2], around[3], rank_of(self.aim.high, self.size)[2])
        low, high = _apart(low, high, smallest, largest)
        if signal is not None and signal.padding.any():
            low, high = (signal.percentile(part) for part in (self.aim.low, self.aim.high))
        return Limits(low, high) if signal is None else signal.limits(low, high)


# -- wide types: curves from bins between the extremes ----------------------------------------------
@dataclass(frozen=True, eq=False)
class Extremes:
    """Smallest and largest value of each channel: ``(2, C)`` in the image's type."""

    aim: Any
    """What is counted next: an `Aim`, or anything with ``after_extremes(extremes)``."""
    dtype: np.dtype
    linked: bool = False

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        check_finite(block)
        return np.stack([block.min(axis=(1, 2)), block.max(axis=(1, 2))])

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])

    def finish(self, total: np.ndarray) -> Pass:
        if self.linked:
            total = np.broadcast_to([[total[0].min()], [total[1].max()]], total.shape).astype(self.dtype)
        if hasattr(self.aim, "after_extremes"):
            return self.aim.after_extremes(total)
        bins = self.aim.bins if isinstance(self.aim, Equalizing) else MATCH_BINS
        return BinCounts(self.aim, self.dtype, total, bins, self.linked)


@dataclass(frozen=True, eq=False)
class BinCounts:
    """Equal bins between the extremes: counts ``(C, bins)``. Bins as `numpy.histogram` lays them."""

    aim: Equalizing | Matching | Referring
    dtype: np.dtype
    extremes: np.ndarray
    bins: int
    linked: bool = False

    def _range(self, channel: int) -> tuple[Any, Any]:
        return self.extremes[0, channel], self.extremes[1, channel]

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        return np.stack([np.histogram(p, self.bins, self._range(c))[0] for c, p in enumerate(block)])

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def finish(self, total: np.ndarray) -> Curve | Reference:
        total = pool(total, self.linked)
        nothing = np.zeros(0, self.dtype)
        edges = [np.histogram_bin_edges(nothing, self.bins, self._range(c)) for c in range(len(total))]
        centers = [(edge[:-1] + edge[1:]) / 2 for edge in edges]
        shares = [np.cumsum(counts) / float(counts.sum()) for counts in total]
        if isinstance(self.aim, Equalizing):
            kind = float_dtype(self.dtype)
            flat = self.extremes[0] == self.extremes[1]
            curves = (0 * share if empty else share for share, empty in zip(shares, flat, strict=True))
            return Curve(tuple(centers), tuple(curve.astype(kind) for curve in curves), to_float=True)
        # From here as for integers, with the middle of each bin that holds pixels for a value.
        present = [np.flatnonzero(counts) for counts in total]
        found = tuple(center[where] for center, where in zip(centers, present, strict=True))
        reached = tuple(share[where] for share, where in zip(shares, present, strict=True))
        if isinstance(self.aim, Referring):
            return Reference(found, reached)
        return Curve(found, _matched(reached, self.aim.reference), to_float=False)


def stretch(limits: Sequence[Limits], linked: bool) -> Stretch:
    """The step that makes the limits of every channel black and white."""
    notes = [
        note if linked or len(limits) == 1 else f"channel {number}: {note}"
        for number, one in enumerate(limits[: 1 if linked else None], start=1)
        for note in one.notes
    ]
    return Stretch(tuple(one.low for one in limits), tuple(one.high for one in limits), tuple(notes))


def first_pass(
    aim: Aim, dtype: np.dtype, shape: tuple[int, ...], linked: bool = False
) -> ExactCounts | SignalCounts | Selection | Extremes:
    """Where counting starts for `aim` on an image of `shape` ``(C, Y, X)`` (``(C,)`` without percentiles)."""
    if not isinstance(aim, Stretching):
        return (ExactCounts if is_small(dtype) else Extremes)(aim, dtype, linked)
    if is_small(dtype):
        return SignalCounts(aim, dtype, (shape[1], shape[2]), linked)
    return Selection.start(aim, dtype, shape, linked)


def for_blocks(counting: Pass) -> Pass:
    """A pass without what only `Pass.finish` needs: what is sent along with every block."""
    if isinstance(counting, Selection):
        return replace(counting, signals=())
    if isinstance(counting, ExactCounts | BinCounts | Extremes):
        return replace(counting, aim=Referring())
    return counting


def passes_needed(aim: type, dtype: np.dtype) -> int:
    """How often the image is read, for aims other than CLAHE (three times)."""
    if is_small(dtype):
        return 1
    return 8 * dtype.itemsize // DIGIT if aim is Stretching else 2
