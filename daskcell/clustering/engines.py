"""Two ways from first centres to final ones, over rows that are streamed.

`incremental` is dask-ml's ``Incremental(MiniBatchKMeans)``, made safe: it starts from the sample's centres
rather than from whatever comes first, never throws a centre away, and gets rows of all slides in every
portion. As it comes it raises on an empty block and follows the order of the rows.

`rounds` is full k-means (Lloyd): every round all blocks are summed up, by as many workers as there are.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering import _kernels
from daskcell.clustering.rows import Rows, in_order

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

    order = np.random.default_rng(seed).permutation(len(blocks))
    portions = []
    for first in range(0, len(order), _WINDOW):
        chosen = np.sort(order[first : first + _WINDOW])
        step = max(1, round(sum(sizes[i] for i in chosen) / PORTION))
        for start in range(step):
            # Every step-th row of very many blocks: no slide comes by itself.
            n = sum(len(range(start, sizes[i], step)) for i in chosen)
            if n:
                piece = dask.delayed(_portion, pure=False)([blocks[i] for i in chosen], start, step)
                portions.append(da.from_delayed(piece, (n, centers.shape[1]), np.float32))
    estimator = MiniBatchKMeans(
        len(centers),
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


def _portion(blocks: Sequence[Rows], start: int, step: int) -> np.ndarray:
    return np.concatenate([block.read()[start::step] for block in blocks])


def _scheduler(workers: Workers | None) -> Any:
    import dask

    if workers is None or workers.client is None:
        return dask.config.set(scheduler="synchronous")
    return contextlib.ExitStack() if workers.client is None else workers.client.as_current()


def rounds(blocks: Sequence[Rows], centers: np.ndarray, workers: Workers | None = None) -> np.ndarray:
    """Centres ``(k, c)`` after k-means over all rows, until no row changes sides (or 100 rounds)."""
    for _ in range(_ROUNDS):
        sums, counts, _ = tally(blocks, centers, workers)
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers


def tally(
    blocks: Sequence[Rows], centers: np.ndarray, workers: Workers | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Sums ``(k, c)`` and numbers ``(k,)`` of the rows nearest to each centre, and the sum of squared
    distances."""
    columns = np.ascontiguousarray(centers.T)
    sums, counts, inertia = np.zeros(centers.shape), np.zeros(len(centers), np.int64), 0.0
    for block_sums, block_counts, block_inertia in in_order(workers, blocks, _tally_block, columns):
        sums += block_sums
        counts += block_counts
        inertia += block_inertia
    return sums, counts, inertia


def _tally_block(_: int, block: Rows, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    rows = block.read()
    labels, squares = _kernels.nearest(rows, columns)
    sums, counts = _kernels.add_by_label(rows, labels, columns.shape[1])
    return sums, counts, float(squares.sum())
