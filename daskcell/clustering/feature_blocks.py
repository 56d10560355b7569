"""Features in blocks of rows: where the rows are, their statistics, and a sample of them.

A source (an array, or the file of a slide) is cut every `BLOCK` rows regardless of its chunks, and results
are combined in the order of the blocks, so sums are bit-identical for any chunks and number of workers. Rows
are sampled by a hash of their content, so the sample does not depend on their order either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from daskcell.clustering import _kernels
from daskcell.storage.atomic import write_atomic

if TYPE_CHECKING:
    from daskcell.compute import Workers

BLOCK = 8192
_BLOCKS_PER_TASK = 16
_MAX_BLOCKS_PER_PART = 64


class FeatureBlock(Protocol):
    """A block of rows; picklable if tasks run in other processes."""

    def read(self) -> np.ndarray:
        """``(m, d)`` float32."""


@dataclass(frozen=True)
class ArrayBlock:
    """Rows of a numpy or Dask array."""

    array: Any
    start: int
    stop: int

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(self.array[self.start : self.stop]), np.float32)


@dataclass(frozen=True)
class ZarrBlock:
    """Rows of a Zarr array on disk."""

    path: str
    start: int
    stop: int

    def read(self) -> np.ndarray:
        import zarr

        array = zarr.open_array(Path(self.path), mode="r")
        return np.ascontiguousarray(array[self.start : self.stop], np.float32)


@dataclass(frozen=True)
class FileBlock:
    """Rows in a raw file of their own, read as a memory map."""

    path: str
    shape: tuple[int, int]

    def read(self) -> np.ndarray:
        return np.memmap(self.path, np.float32, "r", shape=self.shape)

    @classmethod
    def write(cls, path: str, rows: np.ndarray) -> FileBlock:
        """Write rows ``(m, d)`` float32, at least one, to a new file."""
        write_atomic(path, np.ascontiguousarray(rows).data)
        return cls(path, (rows.shape[0], rows.shape[1]))


def array_blocks(array: Any) -> list[FeatureBlock]:
    """Blocks of an array ``(n, d)``."""
    return [ArrayBlock(array, i, min(i + BLOCK, len(array))) for i in range(0, len(array), BLOCK)]


def zarr_blocks(path: str | Path) -> list[ZarrBlock]:
    """Blocks of a Zarr array ``(n, d)``."""
    import zarr

    n = zarr.open_array(Path(path), mode="r").shape[0]
    return [ZarrBlock(str(path), i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def map_ordered(
    workers: Workers | None, blocks: Sequence[FeatureBlock], function: Callable[..., Any], *args: Any
) -> Iterable[Any]:
    """Results of ``function(i, block, *args)`` in the order of the blocks; a task takes several blocks."""
    from daskcell.compute import Workers

    window = (workers or Workers()).window()
    starts = range(0, len(blocks), _BLOCKS_PER_TASK)
    for start in starts:
        window.submit(start, _map_batch, start, blocks[start : start + _BLOCKS_PER_TASK], function, args)
    waiting: dict[int, list[Any]] = {}
    due = 0
    for start, results in window:
        waiting[start] = results
        while due in waiting:
            yield from waiting.pop(due)
            due += _BLOCKS_PER_TASK


def _map_batch(
    start: int, blocks: Sequence[FeatureBlock], function: Callable[..., Any], args: tuple[Any, ...]
) -> list[Any]:
    return [function(start + i, block, *args) for i, block in enumerate(blocks)]


def partition(workers: Workers | None, blocks: Sequence[Any]) -> list[Sequence[Any]]:
    """Blocks in parts for one task each: two parts for each worker, or more if they would become long."""
    from daskcell.compute import Workers

    size = min(_MAX_BLOCKS_PER_PART, -(-len(blocks) // (2 * (workers or Workers()).count)))
    return [blocks[start : start + size] for start in range(0, len(blocks), size)] if size else []


def map_unordered(
    workers: Workers | None, items: Sequence[Any], function: Callable[..., Any], *args: Any
) -> Iterable[Any]:
    """Results of ``function(item, *args)`` as they finish, for sums that are the same in any order."""
    from daskcell.compute import Workers

    window = (workers or Workers()).window()
    for i, item in enumerate(items):
        window.submit(i, function, item, *args)
    for _, result in window:
        yield result


@dataclass(frozen=True)
class FeatureStats:
    """Number of usable rows, mean and standard deviation of each feature, and which rows are sampled."""

    count: int
    missing: int
    mean: np.ndarray
    deviation: np.ndarray
    sample: list[tuple[int, np.ndarray]]
    """Number of a block, and row numbers within it."""


def feature_stats(
    blocks: Sequence[FeatureBlock], size: int, seed: int, workers: Workers | None = None
) -> FeatureStats:
    """One pass over all rows; those with a NaN or infinity are counted and left out."""
    count, missing = 0, 0
    mean = square = None
    chosen = np.zeros(0, np.dtype([("hash", np.uint64), ("block", np.int64), ("row", np.int64)]))
    for i, (n, bad, block_mean, block_square, hashes, rows) in enumerate(
        map_ordered(workers, blocks, _block_stats, size, seed)
    ):
        missing += bad
        if not n:
            continue
        if mean is None or square is None:
            mean, square = block_mean, block_square
        else:  # Chan, Golub & LeVeque 1979: merge the means and squared deviations of two parts
            step = block_mean - mean
            square = square + block_square + step * step * (count * n / (count + n))
            mean = mean + step * (n / (count + n))
        count += n
        more = np.zeros(len(hashes), chosen.dtype)
        more["hash"], more["block"], more["row"] = hashes, i, rows
        chosen = np.sort(np.concatenate([chosen, more]), order="hash", kind="stable")[:size]
    sample = [
        (int(block), np.sort(chosen["row"][chosen["block"] == block])) for block in np.unique(chosen["block"])
    ]
    if mean is None or square is None:
        mean = square = np.zeros(0)
    # The last bits depend on the order of the rows; rounding to single precision removes them.
    mean, deviation = (v.astype(np.float32).astype(float) for v in (mean, np.sqrt(square / max(count, 1))))
    return FeatureStats(count, missing, mean, deviation, sample)


def _block_stats(
    _: int, block: FeatureBlock, size: int, seed: int
) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows = block.read()
    good, usable = finite_rows(rows)
    hashes = content_hashes(usable, seed)
    smallest = np.argsort(hashes, kind="stable")[:size]
    mean, squares = _kernels.moments(usable) if len(good) else np.zeros((2, rows.shape[1]))
    return len(good), len(rows) - len(good), mean, squares, hashes[smallest], good[smallest]


def finite_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows without NaN and infinity, and these rows; no copy if all are."""
    good = np.flatnonzero(np.isfinite(rows).all(axis=1))
    return good, rows if len(good) == len(rows) else np.ascontiguousarray(rows[good])


def content_hashes(rows: np.ndarray, seed: int) -> np.ndarray:
    """A uint64 per row that depends only on its values and the seed."""
    bits = np.ascontiguousarray(rows + np.float32(0)).view(
        np.uint32
    )  # -0.0 + 0 is 0.0: equal rows, equal bits
    return _kernels.row_hashes(bits, np.uint64(seed))


def read_sample(
    blocks: Sequence[FeatureBlock],
    sample: list[tuple[int, np.ndarray]],
    seed: int,
    workers: Workers | None = None,
) -> np.ndarray:
    """The sampled rows in the order of their hashes: shuffled, but the same for any order of the rows."""
    picked = [_SampledRows(blocks[block], tuple(rows.tolist())) for block, rows in sample]
    parts = list(map_ordered(workers, picked, _read_block))
    rows = np.concatenate(parts)
    return np.ascontiguousarray(rows[np.argsort(content_hashes(rows, seed), kind="stable")])


@dataclass(frozen=True)
class _SampledRows:
    block: FeatureBlock
    rows: tuple[int, ...]

    def read(self) -> np.ndarray:
        return self.block.read()[list(self.rows)]


def _read_block(_: int, block: FeatureBlock) -> np.ndarray:
    return block.read()
