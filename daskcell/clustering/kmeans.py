"""Two k-means algorithms over streamed rows, both from given initial centres.

`minibatch` is dask-ml's ``Incremental(MiniBatchKMeans)`` made robust: it starts from the centres of the
sample instead of the first rows, never reassigns a centre, and mixes rows of all slides in every portion.
Used directly, it raises on an empty block and its result follows the order of the rows.

`lloyd` is full k-means (Lloyd's algorithm): every round sums up all blocks, on all workers. Its sums are
exact (see `assignment`), so the centres are bit-identical for any order, blocks and workers.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.assignment import NearestCenters, one_thread
from daskcell.clustering.feature_blocks import FeatureBlock, map_ordered, map_unordered, partition
from daskcell.storage.atomic import save_arrays

if TYPE_CHECKING:
    from daskcell.compute import Workers

PORTION = 16384
_WINDOW = 256
_ROUNDS = 100


def minibatch(
    blocks: Sequence[FeatureBlock],
    sizes: Sequence[int],
    centers: np.ndarray,
    seed: int,
    workers: Workers | None = None,
) -> np.ndarray:
    """Centres ``(k, c)`` after one pass of ``Incremental(MiniBatchKMeans)`` from `centers`."""
    import dask
    import dask.array as da
    from dask_ml.wrappers import Incremental
    from sklearn.cluster import MiniBatchKMeans

    k = len(centers)
    portions = []
    for chosen in _block_windows(np.random.default_rng(seed).permutation(len(blocks)).tolist(), sizes, k):
        step = max(1, round(sum(sizes[i] for i in chosen) / max(PORTION, 2 * k)))
        for start in range(step):
            # Every step-th row of many blocks, so that no portion is of one slide alone.
            n = sum(len(range(start, sizes[i], step)) for i in chosen)
            if n:
                piece = dask.delayed(_portion, pure=False)([blocks[i] for i in chosen], start, step)
                portions.append(da.from_delayed(piece, (n, centers.shape[1]), np.float32))
    estimator = MiniBatchKMeans(
        k,
        init=centers.astype(np.float32),
        n_init=1,
        batch_size=PORTION,
        reassignment_ratio=0,
        random_state=seed,
    )
    with _scheduler(workers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = Incremental(estimator, shuffle_blocks=False, random_state=seed).fit(da.concatenate(portions))
    return fitted.estimator_.cluster_centers_.astype(np.float64)


def _block_windows(order: Sequence[int], sizes: Sequence[int], least: int) -> Iterator[list[int]]:
    """Blocks to take portions from: `_WINDOW` at a time, or more until they have `least` rows."""
    window: list[int] = []
    for i in order:
        window.append(i)
        if len(window) >= _WINDOW and sum(sizes[j] for j in window) >= least:
            yield sorted(window)
            window = []
    if window:
        yield sorted(window)


def _portion(blocks: Sequence[FeatureBlock], start: int, step: int) -> np.ndarray:
    return np.concatenate([block.read()[start::step] for block in blocks])


def _scheduler(workers: Workers | None) -> Any:
    import dask

    if workers is None or workers.client is None:
        return dask.config.set(scheduler="synchronous")
    return contextlib.ExitStack() if workers.client is None else workers.client.as_current()


def lloyd(
    blocks: Sequence[FeatureBlock],
    centers: np.ndarray,
    tolerance: float,
    folder: str,
    workers: Workers | None = None,
) -> np.ndarray:
    """Centres ``(k, c)`` after k-means over all rows, iterated until they converge.

    They have converged when their squared displacements sum up to at most `tolerance` (or after 100 rounds).
    Only rows that may have changed their centre are computed again: a row whose second nearest centre was
    farther by more than all displacements since keeps its own (Hamerly 2010). `folder`, shared by all
    workers, takes two numbers per row; a repeated task gives the same result.
    """
    sums, counts = np.zeros(centers.shape), np.zeros(len(centers), np.int64)
    spent = np.zeros(
        len(centers)
    )  # by how much a margin in each cluster has shrunk, at most, since the first round
    parts = list(enumerate(partition(workers, blocks)))
    for number in range(_ROUNDS):
        for more, cells in map_unordered(workers, parts, _update_sums, centers, spent, folder, number):
            sums += more
            counts += cells
        updated = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
        steps = np.sqrt(((updated - centers) ** 2).sum(axis=1))
        centers = updated
        if float((steps**2).sum()) <= tolerance:
            break
        others = [np.delete(steps, i).max(initial=0.0) for i in range(len(steps))]
        spent = spent + (steps + others) * (1 + 1e-9)
    return centers


def _update_sums(
    part: tuple[int, Sequence[FeatureBlock]], centers: np.ndarray, spent: np.ndarray, folder: str, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Changes of one round in the sums ``(k, c)`` and counts ``(k,)`` of all centres, for some blocks."""
    i, blocks = part

    def path(number: int) -> str:
        return os.path.join(folder, f"{i}.{number}.margins")

    sums, counts = np.zeros(centers.shape), np.zeros(len(centers), np.int64)
    nearest = NearestCenters(centers)
    with one_thread():
        if number == 0:
            found = [nearest.add(block.read(), sums, counts) for block in blocks]
            stops = np.cumsum([len(labels) for labels, _ in found])
            labels, ends = (np.concatenate(values) for values in zip(*found, strict=True))
        else:
            stops, labels, ends = _read(path(number - 1))
            # A margin is used up once the centres have moved that far; NaN is no margin.
            again = np.flatnonzero(~(ends > spent[labels]))
            firsts = np.searchsorted(again, [0, *stops])
            for j, block in enumerate(blocks):
                which, start = again[firsts[j] : firsts[j + 1]], stops[j - 1] if j else 0
                if len(which):
                    own = slice(start, stops[j])
                    nearest.update(block.read(), which - start, labels[own], ends[own], sums, counts)
            ends[again] += spent[labels[again]]
    save_arrays(path(number), stops, labels, ends)
    if number > 1:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path(number - 2))
    return sums, counts


def _read(path: str) -> list[np.ndarray]:
    """Row numbers where blocks end, and for every row its label and when its margin is used up."""
    with open(path, "rb") as file:
        return [np.load(file) for _ in range(3)]


def inertia(
    blocks: Sequence[FeatureBlock], centers: np.ndarray, workers: Workers | None = None
) -> tuple[np.ndarray, float]:
    """Rows of each centre, ``(k,)``, and the sum of squared distances, rounded to ten digits."""
    counts, total = np.zeros(len(centers), np.int64), 0.0
    for some_counts, squares in map_ordered(workers, blocks, _block_inertia, centers):
        counts += some_counts
        total += squares
    return counts, float(f"{total:.9e}")


def _block_inertia(_: int, block: FeatureBlock, centers: np.ndarray) -> tuple[np.ndarray, float]:
    rows = block.read()
    nearest = NearestCenters(centers)
    with one_thread():
        labels = nearest.labels(rows)
    return np.bincount(labels, minlength=len(centers)), float(nearest.squares(rows, labels).sum())
