"""What is learnt about the pixels while they pass by: histograms, a fingerprint, and what is no number.

Made from the pieces in any order, and the same whatever the pieces are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError
from daskcell.images.shards import Position
from daskcell.images.sources import Source


@dataclass(frozen=True)
class Part:
    """What is known of one piece: small, to be sent from a worker."""

    files: int
    """How many were written."""
    hashes: Mapping[Position, bytes] = field(default_factory=dict)
    """Of chunks, by their place."""
    bad: Sequence[int] = ()
    """Pixels of each channel that are no numbers."""
    histograms: Sequence[tuple[NDArray, NDArray] | None] = ()


def remember(hashes: dict[Position, bytes], position: Position, chunk: NDArray) -> None:
    """Enter the hash of a chunk; a `shards.Look`, when the first argument is given."""
    hashes[position] = hashlib.sha256(chunk.data).digest()[:16]


def describe(pixels: NDArray, hashes: Mapping[Position, bytes] | None = None, files: int = 0) -> Part:
    """Look at ``(C, h, w)`` pixels."""
    bad = [int(c.size - np.isfinite(c).sum()) if c.dtype.kind == "f" else 0 for c in pixels]
    return Part(files, hashes or {}, bad, [_histogram(channel) for channel in pixels])


class Summary:
    """What is learnt about the pixels while they are written, gathered from all pieces in any order."""

    def __init__(self, channels: int, dtype: np.dtype) -> None:
        self.files = 0
        self.hashes: dict[Position, bytes] = {}
        self.bad = [0] * channels
        self.first = 0
        """Value of the first column of the histograms."""
        self.histograms: NDArray | None = None
        """Number of pixels ``(C, values)`` of each value, for integers of at most 16 bits."""
        if dtype.kind in "iu" and dtype.itemsize <= 2:
            self.first = int(np.iinfo(dtype).min)
            self.histograms = np.zeros((channels, 2 ** (8 * dtype.itemsize)), np.int64)

    def add(self, part: Part) -> None:
        self.files += part.files
        self.hashes.update(part.hashes)
        for k, bad in enumerate(part.bad):
            self.bad[k] += bad
        for k, histogram in enumerate(part.histograms):
            if histogram is not None and self.histograms is not None:
                values, counts = histogram
                self.histograms[k, values.astype(np.int64) - self.first] += counts

    def check(self, source: Source, channels: Sequence[str]) -> None:
        """Refuse pixels that are no numbers: they would spread through filters, percentiles and features."""
        for channel, bad in zip(channels, self.bad, strict=True):
            if bad:
                raise ImageError(
                    f"{source.file_of(channel)} holds {bad} pixels that are not finite numbers (NaN or "
                    "infinite); please replace them first."
                )

    def fingerprint(self, channels: Sequence[str], dtype: np.dtype, shape: tuple[int, int]) -> str:
        """Hash of all pixels and the channels' names."""
        total = hashlib.sha256(repr((tuple(channels), dtype.str, shape)).encode())
        for key in sorted(self.hashes):
            total.update(repr(key).encode() + self.hashes[key])
        return total.hexdigest()

    def windows(self, smallest: Callable[[], NDArray]) -> list[tuple[float, float, float, float]]:
        """``(min, max, low, high)`` of each channel: extremes and the 0.1 and 99.9 percentiles.

        Exact for integers of at most 16 bits, by their histograms; from the `smallest` level for others.
        """
        windows = []
        for k in range(len(self.bad)):
            if self.histograms is None:
                values: NDArray = np.sort(smallest()[k].ravel())
                counts = np.ones(len(values), np.int64)
            else:
                values = np.flatnonzero(self.histograms[k])
                counts = self.histograms[k, values]
                values = values + self.first
            below = np.cumsum(counts) / counts.sum()
            low, high = np.searchsorted(below, (0.001, 0.999)).clip(max=len(values) - 1)
            windows.append((float(values[0]), float(values[-1]), float(values[low]), float(values[high])))
        return windows


def _histogram(channel: NDArray) -> tuple[NDArray, NDArray] | None:
    """Values that occur and how often, for integers of at most 16 bits."""
    if channel.dtype.kind not in "iu" or channel.dtype.itemsize > 2:
        return None
    bits = 8 * channel.dtype.itemsize
    unsigned = np.ascontiguousarray(channel).ravel().view(f"u{channel.dtype.itemsize}")
    if unsigned.size < 2**20:  # not worth compiling
        counts = np.bincount(unsigned)
    else:
        from daskcell.images._kernels import count_values

        tables = np.zeros((4, 2**bits), np.int64)
        count_values(unsigned, tables)
        counts = tables.sum(axis=0)
    values = np.flatnonzero(counts)
    counts = counts[values]
    if channel.dtype.kind == "i":
        values = np.where(values >= 2 ** (bits - 1), values - 2**bits, values)
        order = np.argsort(values)
        values, counts = values[order], counts[order]
    return values, counts
