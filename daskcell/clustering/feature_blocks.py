"""Rows of features, a block at a time: where they are, what they add up to, and a sample of them.

Blocks are cut every `BLOCK` rows of a source (an array, or the file of a slide), whatever its chunks are, and
results are put together in the order of the blocks: so sums have the same bits for any chunks and any number
of workers. The sample is chosen by the rows' content, so it does not depend on their order either.
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
_GROUP = 16
_LARGEST_SHARE = 64


class Rows(Protocol):
    """A block of rows; picklable where tasks run in other processes."""

    def read(self) -> np.ndarray:
        """``(m, d)`` float32."""


@dataclass(frozen=True)
class ArrayRows:
    """Rows of a numpy or Dask array."""

    array: Any
    start: int
    stop: int

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(self.array[self.start : self.stop]), np.float32)


@dataclass(frozen=True)
class ZarrRows:
    """Rows of a Zarr array on disk."""

    path: str
    start: int
    stop: int

    def read(self) -> np.ndarray:
        import zarr

        array = zarr.open_array(Path(self.path), mode="r")
        return np.ascontiguousarray(array[self.start : self.stop], np.float32)


@dataclass(frozen=True)
class FileRows:
    """Rows in a file of their own, as in memory; mapped, so that reading them again copies nothing."""

    path: str
    shape: tuple[int, int]

    def read(self) -> np.ndarray:
        return np.memmap(self.path, np.float32, "r", shape=self.shape)

    @classmethod
    def write(cls, path: str, rows: np.ndarray) -> FileRows:
        """Put rows, at least one, ``(m, d)`` float32 into a new file."""
        write_atomic(path, np.ascontiguousarray(rows).data)
        return cls(path, (rows.shape[0], rows.shape[1]))


def cut(array: Any) -> list[Rows]:
    """Blocks of an array ``(n, d)``."""
    return [ArrayRows(array, i, min(i + BLOCK, len(array))) for i in range(0, len(array), BLOCK)]


def cut_file(path: str | Path) -> list[ZarrRows]:
    """Blocks of a Zarr array ``(n, d)``."""
    import zarr

    n = zarr.open_array(Path(path), mode="r").shape[0]
    return [ZarrRows(str(path), i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def in_order(
    workers: Workers | None, blocks: Sequence[Rows], function: Callable[..., Any], *args: Any
) -> Iterable[Any]:
    """``function(i, block, *args)`` for every block, several blocks a task, results in the order of the
    blocks."""
    from daskcell.compute import Workers

    window = (workers or Workers()).window()
    starts = range(0, len(blocks), _GROUP)
    for start in starts:
        window.submit(start, _group, start, blocks[start : start + _GROUP], function, args)
    waiting: dict[int, list[Any]] = {}
    due = 0
    for start, results in window:
        waiting[start] = results
        while due in waiting:
            yield from waiting.pop(due)
            due += _GROUP


def _group(
    start: int, blocks: Sequence[Rows], function: Callable[..., Any], args: tuple[Any, ...]
) -> list[Any]:
    return [function(start + i, block, *args) for i, block in enumerate(blocks)]


def shares(workers: Workers | None, blocks: Sequence[Any]) -> list[Sequence[Any]]:
    """Blocks in groups, two for each worker unless that makes long ones: a task costs milliseconds."""
    from daskcell.compute import Workers

    size = min(_LARGEST_SHARE, -(-len(blocks) // (2 * (workers or Workers()).count)))
    return [blocks[start : start + size] for start in range(0, len(blocks), size)] if size else []


def in_any_order(
    workers: Workers | None, items: Sequence[Any], function: Callable[..., Any], *args: Any
) -> Iterable[Any]:
    """``function(item, *args)``, a task for each item: for what can be added up exactly."""
    from daskcell.compute import Workers

    window = (workers or Workers()).window()
    for i, item in enumerate(items):
        window.submit(i, function, item, *args)
    for _, result in window:
        yield result


@dataclass(frozen=True)
class Survey:
    """Of all usable rows: number, mean and deviation of each feature, and where the sampled ones are."""

    count: int
    missing: int
    mean: np.ndarray
    deviation: np.ndarray
    sample: list[tuple[int, np.ndarray]]
    """Block and row numbers within it."""


def survey(blocks: Sequence[Rows], size: int, seed: int, workers: Workers | None = None) -> Survey:
    """Look at all rows once; rows with a NaN or infinity are counted and left out."""
    count, missing = 0, 0
    mean = square = None
    chosen = np.zeros(0, np.dtype([("hash", np.uint64), ("block", np.int64), ("row", np.int64)]))
    for i, (n, bad, block_mean, block_square, hashes, rows) in enumerate(
        in_order(workers, blocks, _survey_block, size, seed)
    ):
        missing += bad
        if not n:
            continue
        if mean is None or square is None:
            mean, square = block_mean, block_square
        else:  # Chan, Golub & LeVeque 1979: two parts' means and squares make those of both
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
    # The last bits hang on the order of the rows: in single precision it does not show.
    mean, deviation = (v.astype(np.float32).astype(float) for v in (mean, np.sqrt(square / max(count, 1))))
    return Survey(count, missing, mean, deviation, sample)


def _survey_block(
    _: int, block: Rows, size: int, seed: int
) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows = block.read()
    good, usable = finite(rows)
    hashes = content_hashes(usable, seed)
    smallest = np.argsort(hashes, kind="stable")[:size]
    mean, squares = _kernels.moments(usable) if len(good) else np.zeros((2, rows.shape[1]))
    return len(good), len(rows) - len(good), mean, squares, hashes[smallest], good[smallest]


def finite(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows without NaN and infinity, and these rows; no copy if it is all."""
    good = np.flatnonzero(np.isfinite(rows).all(axis=1))
    return good, rows if len(good) == len(rows) else np.ascontiguousarray(rows[good])


def content_hashes(rows: np.ndarray, seed: int) -> np.ndarray:
    """A uint64 per row that depends on its values and the seed only."""
    bits = np.ascontiguousarray(rows + np.float32(0)).view(
        np.uint32
    )  # -0.0 + 0 is 0.0: equal rows, equal bits
    return _kernels.row_hashes(bits, np.uint64(seed))


def gather(
    blocks: Sequence[Rows], sample: list[tuple[int, np.ndarray]], seed: int, workers: Workers | None = None
) -> np.ndarray:
    """The sampled rows, ordered by content hash: as good as shuffled, and the same for any order of the
    rows."""
    picked = [_Picked(blocks[block], tuple(rows.tolist())) for block, rows in sample]
    parts = list(in_order(workers, picked, _read_block))
    rows = np.concatenate(parts)
    return np.ascontiguousarray(rows[np.argsort(content_hashes(rows, seed), kind="stable")])


@dataclass(frozen=True)
class _Picked:
    block: Rows
    rows: tuple[int, ...]

    def read(self) -> np.ndarray:
        return self.block.read()[list(self.rows)]


def _read_block(_: int, block: Rows) -> np.ndarray:
    return block.read()
