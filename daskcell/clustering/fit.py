"""Fitting: one look at all rows, a sample that stands for them, centres from the sample, centres from all
rows."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from threadpoolctl import threadpool_limits

from daskcell.clustering.assignment import Nearest, steps
from daskcell.clustering.feature_blocks import (
    ArrayRows,
    FileRows,
    Rows,
    cut,
    finite,
    gather,
    in_order,
    survey,
)
from daskcell.clustering.kmeans import incremental, inertia, rounds
from daskcell.clustering.model import ClusterModel
from daskcell.clustering.select_k import choose_k
from daskcell.config import ClusterSettings
from daskcell.errors import InputError
from daskcell.images.arrays import as_values

if TYPE_CHECKING:
    import dask.array as da

    from daskcell.compute import Workers

SAMPLE = 16384
_STARTS = 10
_SMALL = 1 << 30
_TOLERANCE = 1e-4
"""Of the variance of a feature, as in scikit-learn."""
Engine = Literal["incremental", "parallel"]
_DEFAULT = ClusterSettings()


@dataclass(frozen=True)
class Kind:
    """Features of one kind: how many, and whether each is brought to mean 0 and deviation 1."""

    width: int
    standardise: bool


def fit_clusters(
    features: np.ndarray | da.Array,
    k: int | Literal["auto"] = _DEFAULT.k,
    *,
    engine: Engine = _DEFAULT.engine,
    standardise: bool = _DEFAULT.standardise,
    components: int | None = _DEFAULT.components,
    unit_length: bool = _DEFAULT.unit_length,
    seed: int = _DEFAULT.seed,
    random_state: int | None = None,
    info: dict[str, Any] | None = None,
) -> ClusterModel:
    """Group cells by their features with k-means.

    Parameters
    ----------
    features : (n, d) numpy or Dask array
        A row a cell. A Dask array above 1 GiB stays where it is, and is read block by block, three times.
        Cells with a missing or infinite feature are left out of the fit (counted in ``missing_``).
    k : int or "auto"
        Number of groups; "auto": the one from 2 to 20 with the best silhouette and stability.
    engine : {"parallel", "incremental"}
        Rounds of full k-means over all rows until the centres stand, the same in every bit for any order
        and chunks of the rows; or one pass of dask-ml's ``Incremental(MiniBatchKMeans)``, the same for any
        chunks.
    standardise : bool
        Bring every feature to mean 0 and deviation 1 first.
    components : int or None
        Then keep so many principal axes; None, or as many as there are features or cells: all features.
    unit_length : bool
        Then scale every cell's vector to length 1: helps groups of about the same size, hurts unequal ones.
    seed : int
    random_state : int, optional
        scikit-learn's word for `seed`.
    info : dict
        Kept in the model: what the features are.

    Returns
    -------
    ClusterModel
        Groups numbered by size, the largest 0.

    Raises
    ------
    InputError
        Fewer usable cells than k, or not an array of numbers ``(n, d)``.
    """
    import dask.array as da

    if random_state is not None:
        seed = random_state
    features = as_values(features, "The array of features")
    if features.ndim != 2:
        raise InputError(
            f"features must be numbers (cells, d), but have the shape {features.shape} and type "
            f"{features.dtype}."
        )
    if np.isnan(features.shape[0]):
        raise InputError("features must have a known number of rows. Call compute_chunk_sizes() first.")

    if isinstance(features, da.Array) and features.nbytes <= _SMALL:
        features = features.compute()
    width = min(features.shape[1], components or features.shape[1])
    small = len(features) * width * 4 <= _SMALL
    with tempfile.TemporaryDirectory(prefix="clusters-") as folder:
        return fit_blocks(
            cut(features),
            k,
            engine=engine,
            standardise=standardise,
            components=components,
            unit_length=unit_length,
            seed=seed,
            info=info,
            reduce_block=_reduce_here if small else reduce_to_file,
            folder=folder,
        )


def _reduce_here(_: int, block: Rows, model: ClusterModel, folder: str) -> tuple[Rows, int]:
    rows = usable(block, model)
    return ArrayRows(rows, 0, len(rows)), len(rows)


def reduce_to_file(i: int, block: Rows, model: ClusterModel, folder: str) -> tuple[Rows | None, int]:
    """Scaled and projected rows of a block, in a file of their own, and how many."""
    rows = usable(block, model)
    return FileRows.write(os.path.join(folder, f"{i}.f4"), rows) if len(rows) else None, len(rows)


def usable(block: Rows, model: ClusterModel) -> np.ndarray:
    """Scaled and projected rows of a block, without those with missing features."""
    return model.transform(finite(block.read())[1])


def fit_blocks(
    blocks: Sequence[Rows],
    k: int | Literal["auto"],
    *,
    engine: Engine,
    standardise: bool,
    components: int | None,
    unit_length: bool,
    seed: int,
    info: dict[str, Any] | None,
    reduce_block: Callable[..., tuple[Rows | None, int]],
    folder: str,
    workers: Workers | None = None,
    kinds: Sequence[Kind] | None = None,
) -> ClusterModel:
    """`fit_clusters` on blocks of rows; `reduce_block` puts the scaled and projected rows somewhere.

    `folder`, which all workers see, takes what is kept from one round to the next.

    With several `kinds` of features side by side, each is scaled and projected by itself, and all count the
    same.
    """
    if k != "auto" and k < 1:
        raise InputError(f"k must be at least 1, not {k}.")
    size = SAMPLE if k == "auto" else max(SAMPLE, 20 * k)
    seen = survey(blocks, size, seed, workers)
    least = 2 if k == "auto" else k
    if seen.count < least:
        left_out = f" ({seen.missing} more have missing features)" if seen.missing else ""
        raise InputError(
            f"k={k} groups need at least {least} cells, but there are {seen.count}{left_out}. "
            "Choose a smaller k or give more images."
        )
    sample = gather(blocks, seen.sample, seed, workers)
    with threadpool_limits(1):  # more threads give scikit-learn's sums other last bits
        kinds = kinds or [Kind(sample.shape[1], standardise)]
        model = _prepare(sample, seen.mean, seen.deviation, kinds, components, unit_length)
        model.steps_ = steps(model.transform(sample))
        reduced_sample = model.transform(sample)
        if k == "auto":
            k, model.curve_ = choose_k(reduced_sample, seed)
        centers = _start(reduced_sample, k, seed)
    reduced: list[Rows] = []
    sizes: list[int] = []
    for block, n in in_order(workers, blocks, reduce_block, model, folder):
        if block is not None and n:
            reduced.append(block)
            sizes.append(n)
    with threadpool_limits(1):  # more threads give scikit-learn's sums other last bits
        if engine == "incremental":
            centers = incremental(reduced, sizes, centers, seed, workers)
        else:
            tolerance = _TOLERANCE * float(reduced_sample.var(axis=0, dtype=np.float64).mean())
            centers = rounds(reduced, centers, tolerance, folder, workers)
    counts, total = inertia(reduced, centers, workers)
    order = np.lexsort(
        (*centers.T[::-1], -counts)
    )  # by size, the largest first; ties by the centre's coordinates
    model.reduced_centers_, model.counts_, model.inertia_ = centers[order], counts[order], total
    model.missing_, model.info = seen.missing, dict(info or {})
    nearest = Nearest(model.reduced_centers_)
    labels = nearest.labels(reduced_sample)
    far = np.sqrt(nearest.squares(reduced_sample, labels))
    model.spread_ = np.array([_percentiles(far[labels == i]) for i in range(model.k)])
    model.centers_ = _map_back(model, sample, labels)
    return model


def _prepare(
    sample: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    kinds: Sequence[Kind],
    components: int | None,
    unit_length: bool,
) -> ClusterModel:
    """The model without centres."""
    from scipy.linalg import block_diag

    mean, scale, axes, start = mean.copy(), np.ones(len(mean)), [], 0
    for kind in kinds:
        part = slice(start, start + kind.width)
        start += kind.width
        if kind.standardise:
            # A feature that is constant but for rounding says nothing: it must not be blown up to deviation
            # 1.
            scale[part] = np.where(deviation[part] > 1e-6 * np.abs(mean[part]), deviation[part], 1.0)
        else:
            mean[part] = 0.0
        scaled = (sample[:, part] - mean[part]) / scale[part]
        own = None
        if components is not None and components < min(scaled.shape):
            own, middle = _principal_axes(scaled, components)
            mean[part] += middle * scale[part]
            scaled = (scaled - middle) @ own.T
        if len(kinds) > 1 and not unit_length:
            size = float(np.sqrt((scaled**2).sum(axis=1).mean())) or 1.0
            if own is None:
                scale[part] *= size
            else:
                own = own / size
        axes.append(own)
    none = np.zeros((0, len(mean)))
    model = ClusterModel(none, none, np.zeros(0, np.int64), none, mean, scale, unit_length=unit_length)
    if any(own is not None for own in axes):
        filled = [np.eye(k.width) if own is None else own for own, k in zip(axes, kinds, strict=True)]
        model.components_ = block_diag(*filled)
    widths = [k.width if own is None else len(own) for own, k in zip(axes, kinds, strict=True)]
    model.parts_ = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
    return model


def _principal_axes(scaled: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(components, batch_size=max(2048, 5 * components)).fit(scaled)
    return pca.components_, pca.mean_


def _start(sample: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Best of several k-means of the sample, each from a k-means++ start."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different cells than k
        return KMeans(k, n_init=_STARTS, random_state=seed).fit(sample.astype(np.float64)).cluster_centers_


def _percentiles(distances: np.ndarray) -> np.ndarray:
    return np.percentile(distances, (50, 95, 99)) if len(distances) else np.zeros(3)


def _map_back(model: ClusterModel, sample: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Centres in the units of the features."""
    centers = model.reduced_centers_
    if not model.unit_length:
        scaled = centers if model.components_ is None else centers @ np.linalg.pinv(model.components_).T
        return scaled * model.scale_ + model.mean_
    return np.array(
        [
            sample[labels == i].mean(axis=0, dtype=np.float64) if (labels == i).any() else model.mean_
            for i in range(model.k)
        ]
    )
