"""Statistics of the pixels, gathered while an image is written: histograms, a fingerprint, non-finite values.

They are the same however the image is divided into blocks, and in whatever order these come.
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
class BlockStats:
    """Statistics of one block, small enough to be sent from a worker."""

    files: int
    """Number of files written."""
    hashes: Mapping[Position, bytes] = field(default_factory=dict)
    """Of the chunks, by their position."""
    non_finite: Sequence[int] = ()
    """Number of NaN and infinite pixels of each channel."""
    histograms: Sequence[tuple[NDArray, NDArray] | None] = ()


def record_hash(hashes: dict[Position, bytes], position: Position, chunk: NDArray) -> None:
    """Enter the hash of a chunk; with `hashes` given, a `shards.ChunkCallback`."""
    hashes[position] = hashlib.sha256(chunk.data).digest()[:16]


def block_stats(
    pixels: NDArray, hashes: Mapping[Position, bytes] | None = None, files: int = 0
) -> BlockStats:
    """Statistics of a block ``(C, h, w)``."""
    non_finite = [int(c.size - np.isfinite(c).sum()) if c.dtype.kind == "f" else 0 for c in pixels]
    return BlockStats(files, hashes or {}, non_finite, [_histogram(channel) for channel in pixels])


class PixelStats:
    """Statistics of an image ``(C, Y, X)``, gathered from those of its blocks in any order."""

    def __init__(self, channels: int, dtype: np.dtype) -> None:
        self.files = 0
        self.hashes: dict[Position, bytes] = {}
        self.non_finite = [0] * channels
        self.first = 0
        """Pixel value that the first column of the histograms counts."""
        self.histograms: NDArray | None = None
        """Number of pixels ``(C, values)`` of each value, for integers of at most 16 bits."""
        if dtype.kind in "iu" and dtype.itemsize <= 2:
            self.first = int(np.iinfo(dtype).min)
            self.histograms = np.zeros((channels, 2 ** (8 * dtype.itemsize)), np.int64)

    def add(self, block: BlockStats) -> None:
        self.files += block.files
        self.hashes.update(block.hashes)
        for k, non_finite in enumerate(block.non_finite):
            self.non_finite[k] += non_finite
        for k, histogram in enumerate(block.histograms):
            if histogram is not None and self.histograms is not None:
                values, counts = histogram
                self.histograms[k, values.astype(np.int64) - self.first] += counts

    def check(self, source: Source, channels: Sequence[str]) -> None:
        """Raise `ImageError` for NaN and infinite pixels, which would spread through filters and features."""
        for channel, non_finite in zip(channels, self.non_finite, strict=True):
            if non_finite:
                raise ImageError(
                    f"{source.file_of(channel)} holds {non_finite} pixels that are NaN or infinite. Please "
                    "replace them first."
                )

    def fingerprint(self, channels: Sequence[str], dtype: np.dtype, shape: tuple[int, int]) -> str:
        """Hash of all pixels and of the names of the channels."""
        total = hashlib.sha256(repr((tuple(channels), dtype.str, shape)).encode())
        for key in sorted(self.hashes):
            total.update(repr(key).encode() + self.hashes[key])
        return total.hexdigest()

    def windows(self, smallest: Callable[[], NDArray]) -> list[tuple[float, float, float, float]]:
        """Display windows ``(min, max, low, high)`` of the channels: extremes, 0.1 and 99.9 percentiles.

        Exact for integers of at most 16 bits, which have histograms; of the `smallest` level for others.
        """
        windows = []
        for k in range(len(self.non_finite)):
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
    """Values that occur and their numbers of pixels; None unless integers of at most 16 bits."""
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
