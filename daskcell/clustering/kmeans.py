"""Two ways from first centres to final ones, over rows that are streamed.

`incremental` is dask-ml's ``Incremental(MiniBatchKMeans)``, made safe: it starts from the sample's centres
rather than from whatever comes first, never throws a centre away, and gets rows of all slides in every
portion. As it comes it raises on an empty block and follows the order of the rows.

`rounds` is full k-means (Lloyd): every round all blocks are summed up, by as many workers as there are. Sums
are exact (see `nearest`), so its centres have the same bits for any order, blocks and workers.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.assignment import Nearest, one_thread
from daskcell.clustering.feature_blocks import Rows, in_any_order, in_order, shares
from daskcell.storage.atomic import save_arrays

if TYPE_CHECKING:
    from daskcell.compute import Workers

PORTION = 16384
_WINDOW = 256
_ROUNDS = 100


def incremental(
    blocks: Sequence[Rows],
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
    for chosen in _windows(np.random.default_rng(seed).permutation(len(blocks)).tolist(), sizes, k):
        step = max(1, round(sum(sizes[i] for i in chosen) / max(PORTION, 2 * k)))
        for start in range(step):
            # Every step-th row of very many blocks: no slide comes by itself.
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


def _windows(order: Sequence[int], sizes: Sequence[int], least: int) -> Iterator[list[int]]:
    """Blocks that portions are made of: `_WINDOW` of them, and more until they have `least` rows."""
    window: list[int] = []
    for i in order:
        window.append(i)
        if len(window) >= _WINDOW and sum(sizes[j] for j in window) >= least:
            yield sorted(window)
            window = []
    if window:
        yield sorted(window)


def _portion(blocks: Sequence[Rows], start: int, step: int) -> np.ndarray:
    return np.concatenate([block.read()[start::step] for block in blocks])


def _scheduler(workers: Workers | None) -> Any:
    import dask

    if workers is None or workers.client is None:
        return dask.config.set(scheduler="synchronous")
    return contextlib.ExitStack() if workers.client is None else workers.client.as_current()


def rounds(
    blocks: Sequence[Rows],
    centers: np.ndarray,
    tolerance: float,
    folder: str,
    workers: Workers | None = None,
) -> np.ndarray:
    """Centres ``(k, c)`` after k-means over all rows, until they stand.

    That is, until the squares of their steps come to no more than `tolerance` in all (or 100 rounds). Only
    rows that may have come nearer to another centre are looked at again: a row whose second nearest centre
    is farther by more than all steps since (Hamerly 2010) keeps its own. `folder`, seen by all workers, takes
    two numbers a row; a task that is repeated finds what it found before.
    """
    sums, counts = np.zeros(centers.shape), np.zeros(len(centers), np.int64)
    spent = np.zeros(
        len(centers)
    )  # by how much a lead in each group has shrunk, at most, since the first round
    parts = list(enumerate(shares(workers, blocks)))
    for number in range(_ROUNDS):
        for more, cells in in_any_order(workers, parts, _follow, centers, spent, folder, number):
            sums += more
            counts += cells
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
        steps = np.sqrt(((moved - centers) ** 2).sum(axis=1))
        centers = moved
        if float((steps**2).sum()) <= tolerance:
            break
        others = [np.delete(steps, i).max(initial=0.0) for i in range(len(steps))]
        spent = spent + (steps + others) * (1 + 1e-9)
    return centers


def _follow(
    part: tuple[int, Sequence[Rows]], centers: np.ndarray, spent: np.ndarray, folder: str, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a round changes in the sums ``(k, c)`` and numbers ``(k,)`` of the rows of all centres."""
    i, blocks = part

    def path(number: int) -> str:
        return os.path.join(folder, f"{i}.{number}.leads")

    sums, counts = np.zeros(centers.shape), np.zeros(len(centers), np.int64)
    nearest = Nearest(centers)
    with one_thread():
        if number == 0:
            found = [nearest.add(block.read(), sums, counts) for block in blocks]
            stops = np.cumsum([len(labels) for labels, _ in found])
            labels, ends = (np.concatenate(values) for values in zip(*found, strict=True))
        else:
            stops, labels, ends = _read(path(number - 1))
            # A lead ends when as much is spent; what is not a number has none.
            again = np.flatnonzero(~(ends > spent[labels]))
            firsts = np.searchsorted(again, [0, *stops])
            for j, block in enumerate(blocks):
                which, start = again[firsts[j] : firsts[j + 1]], stops[j - 1] if j else 0
                if len(which):
                    own = slice(start, stops[j])
                    nearest.look(block.read(), which - start, labels[own], ends[own], sums, counts)
            ends[again] += spent[labels[again]]
    save_arrays(path(number), stops, labels, ends)
    if number > 1:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path(number - 2))
    return sums, counts


def _read(path: str) -> list[np.ndarray]:
    """Where blocks end, and the label and the end of the lead of every row."""
    with open(path, "rb") as file:
        return [np.load(file) for _ in range(3)]


def inertia(
    blocks: Sequence[Rows], centers: np.ndarray, workers: Workers | None = None
) -> tuple[np.ndarray, float]:
    """Numbers ``(k,)`` of the rows of each centre, and the sum of squared distances, to ten digits."""
    counts, total = np.zeros(len(centers), np.int64), 0.0
    for some_counts, squares in in_order(workers, blocks, _measure, centers):
        counts += some_counts
        total += squares
    return counts, float(f"{total:.9e}")


def _measure(_: int, block: Rows, centers: np.ndarray) -> tuple[np.ndarray, float]:
    rows = block.read()
    nearest = Nearest(centers)
    with one_thread():
        labels = nearest.labels(rows)
    return np.bincount(labels, minlength=len(centers)), float(nearest.squares(rows, labels).sum())
