"""Fitting: statistics of all rows, a sample, initial centres from the sample, final centres from all rows."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from threadpoolctl import threadpool_limits

from daskcell.clustering.assignment import NearestCenters, grid_steps
from daskcell.clustering.feature_blocks import (
    ArrayBlock,
    FeatureBlock,
    FileBlock,
    array_blocks,
    feature_stats,
    finite_rows,
    map_ordered,
    read_sample,
)
from daskcell.clustering.kmeans import inertia, lloyd, minibatch
from daskcell.clustering.model import ClusterModel
from daskcell.clustering.select_k import select_k
from daskcell.config import ClusterSettings
from daskcell.errors import InputError
from daskcell.images.arrays import as_values

if TYPE_CHECKING:
    import dask.array as da

    from daskcell.compute import Workers

SAMPLE = 16384
_STARTS = 10
_IN_MEMORY_BYTES = 1 << 30
_TOLERANCE = 1e-4
"""Relative to the variance of a feature, as in scikit-learn."""
Engine = Literal["incremental", "parallel"]
_DEFAULT = ClusterSettings()


@dataclass(frozen=True)
class FeatureKind:
    """Features of one kind: how many, and whether they are standardised."""

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
    """Cluster cells by their features with k-means.

    Parameters
    ----------
    features : (n, d) numpy or Dask array, or DataFrame
        One row per cell, integers or floats. A Dask array above 1 GiB is not loaded, but read block by block,
        three times. Cells with a missing or infinite feature are left out of the fit (counted in
        ``missing_``).
    k : int or "auto"
        Number of clusters; "auto": the one from 2 to 20 with the best product of silhouette and stability.
    engine : {"parallel", "incremental"}
        ``parallel``: full k-means over all rows until the centres converge, bit-identical for any order and
        chunks of the rows. ``incremental``: one pass of dask-ml's ``Incremental(MiniBatchKMeans)``,
        bit-identical for any chunks.
    standardise : bool
        First scale every feature to mean 0 and standard deviation 1.
    components : int or None
        Then keep this many principal components; None, or at least the number of features or cells: keep all
        features.
    unit_length : bool
        Then scale every cell's vector to length 1: helps if the clusters are of similar size, and hurts if
        they are not.
    seed : int
        Of the sample and the initial centres.
    random_state : int, optional
        Same as `seed`, by scikit-learn's name.
    info : dict, optional
        Describes the features; stored in the model.

    Returns
    -------
    ClusterModel
        Clusters are numbered by size, 0 is the largest.

    Raises
    ------
    InputError
        There are fewer usable cells than `k`, or `features` is not a numeric array ``(n, d)``.

    Examples
    --------
    >>> import numpy as np
    >>> from daskcell import fit_clusters
    >>> rng = np.random.default_rng(0)
    >>> features = np.concatenate([rng.normal(0, 1, (60, 4)), rng.normal(9, 1, (40, 4))])
    >>> model = fit_clusters(features, k=2)
    >>> model.counts_.tolist()
    [60, 40]
    >>> model.predict(features)[[0, 99]].tolist()
    [0, 1]
    """
    import dask.array as da

    seed = seed if random_state is None else random_state
    features = as_values(features, "The array of features")
    if features.ndim != 2 or not features.shape[1]:
        raise InputError(f"features must be an array (cells, features), but its shape is {features.shape}.")
    if isinstance(features, da.Array) and features.nbytes <= _IN_MEMORY_BYTES:
        features = features.compute()
    width = min(features.shape[1], components or features.shape[1])
    small = len(features) * width * 4 <= _IN_MEMORY_BYTES
    with tempfile.TemporaryDirectory(prefix="clusters-") as folder:
        return fit_blocks(
            array_blocks(features),
            k,
            engine=engine,
            standardise=standardise,
            components=components,
            unit_length=unit_length,
            seed=seed,
            info=info,
            reduce_block=_reduce_in_memory if small else reduce_to_file,
            folder=folder,
        )


def _reduce_in_memory(
    _: int, block: FeatureBlock, model: ClusterModel, folder: str
) -> tuple[FeatureBlock, int]:
    rows = reduced_rows(block, model)
    return ArrayBlock(rows, 0, len(rows)), len(rows)


def reduce_to_file(
    i: int, block: FeatureBlock, model: ClusterModel, folder: str
) -> tuple[FeatureBlock | None, int]:
    """Write the scaled and projected rows of a block to a file of their own; the block and its row count."""
    rows = reduced_rows(block, model)
    return FileBlock.write(os.path.join(folder, f"{i}.f4"), rows) if len(rows) else None, len(rows)


def reduced_rows(block: FeatureBlock, model: ClusterModel) -> np.ndarray:
    """Scaled and projected rows of a block, without those with missing features."""
    return model.transform(finite_rows(block.read())[1])


def fit_blocks(
    blocks: Sequence[FeatureBlock],
    k: int | Literal["auto"],
    *,
    engine: Engine,
    standardise: bool,
    components: int | None,
    unit_length: bool,
    seed: int,
    info: dict[str, Any] | None,
    reduce_block: Callable[..., tuple[FeatureBlock | None, int]],
    folder: str,
    workers: Workers | None = None,
    kinds: Sequence[FeatureKind] | None = None,
) -> ClusterModel:
    """`fit_clusters` on blocks of rows.

    Parameters
    ----------
    reduce_block : callable
        Stores the scaled and projected rows of a block: `reduce_to_file`, or in memory.
    folder : str
        Shared by all workers, for files kept from one round to the next.
    kinds : sequence of FeatureKind
        If features of several kinds stand side by side, each kind is scaled and projected separately, and all
        have the same weight.
    """
    _check_options(k, engine, components, seed)
    size = SAMPLE if k == "auto" else max(SAMPLE, 20 * k)
    seen = feature_stats(blocks, size, seed, workers)
    least = 2 if k == "auto" else k
    if seen.count < least:
        left_out = f" ({seen.missing} more have missing features)" if seen.missing else ""
        raise InputError(
            f"k={k} clusters need at least {least} cells, but there are {seen.count}{left_out}. "
            "Choose a smaller k or give more images."
        )
    sample = read_sample(blocks, seen.sample, seed, workers)
    with threadpool_limits(1):  # the last bits of scikit-learn's sums depend on the threads
        kinds = kinds or [FeatureKind(sample.shape[1], standardise)]
        model = _fit_scaling(sample, seen.mean, seen.deviation, kinds, components, unit_length)
        model.steps_ = grid_steps(model.transform(sample))
        reduced_sample = model.transform(sample)
        if k == "auto":
            k, model.curve_ = select_k(reduced_sample, seed)
        centers = _initial_centers(reduced_sample, k, seed)
    reduced: list[FeatureBlock] = []
    sizes: list[int] = []
    for block, n in map_ordered(workers, blocks, reduce_block, model, folder):
        if block is not None and n:
            reduced.append(block)
            sizes.append(n)
    with threadpool_limits(1):  # the last bits of scikit-learn's sums depend on the threads
        if engine == "incremental":
            centers = minibatch(reduced, sizes, centers, seed, workers)
        else:
            tolerance = _TOLERANCE * float(reduced_sample.var(axis=0, dtype=np.float64).mean())
            centers = lloyd(reduced, centers, tolerance, folder, workers)
    counts, total = inertia(reduced, centers, workers)
    order = np.lexsort(
        (*centers.T[::-1], -counts)
    )  # by size, the largest first; ties by the centre's coordinates
    model.reduced_centers_, model.counts_, model.inertia_ = centers[order], counts[order], total
    model.missing_, model.info = seen.missing, dict(info or {})
    nearest = NearestCenters(model.reduced_centers_)
    labels = nearest.labels(reduced_sample)
    far = np.sqrt(nearest.squares(reduced_sample, labels))
    model.spread_ = np.array([_percentiles(far[labels == i]) for i in range(model.k)])
    model.centers_ = _centers_in_feature_units(model, sample, labels)
    return model


def _check_options(k: Any, engine: Any, components: Any, seed: Any) -> None:
    whole = (int, np.integer)
    if k != "auto" and not (isinstance(k, whole) and k >= 1):
        raise InputError(f"k must be 'auto' or a whole number from 1, not {k!r}.")
    if engine not in get_args(Engine):
        raise InputError(f"engine must be {' or '.join(map(repr, get_args(Engine)))}, not {engine!r}.")
    if components is not None and not (isinstance(components, whole) and components >= 1):
        raise InputError(f"components must be None or a whole number from 1, not {components!r}.")
    if not (isinstance(seed, whole) and seed >= 0):
        raise InputError(f"seed must be a whole number from 0, not {seed!r}.")


def _fit_scaling(
    sample: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    kinds: Sequence[FeatureKind],
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
            # A feature that is constant up to rounding carries no information; do not scale its noise up.
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


def _initial_centers(sample: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Best of several k-means runs on the sample, each initialised by k-means++."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct cells than k
        return KMeans(k, n_init=_STARTS, random_state=seed).fit(sample.astype(np.float64)).cluster_centers_


def _percentiles(distances: np.ndarray) -> np.ndarray:
    return np.percentile(distances, (50, 95, 99)) if len(distances) else np.zeros(3)


def _centers_in_feature_units(model: ClusterModel, sample: np.ndarray, labels: np.ndarray) -> np.ndarray:
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
