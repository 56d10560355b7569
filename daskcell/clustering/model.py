"""A fitted model: scaling and projection of the features, and the centres; saved as arrays and JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.names import FILE as NAMES
from daskcell.clustering.names import ClusterNames
from daskcell.errors import InputError
from daskcell.images.arrays import as_values
from daskcell.storage.atomic import refuse_impossible, replacing

if TYPE_CHECKING:
    import dask.array as da

FORMAT = 1
_ARRAYS = (
    "mean_",
    "scale_",
    "components_",
    "parts_",
    "steps_",
    "reduced_centers_",
    "centers_",
    "counts_",
    "spread_",
)


@dataclass
class ClusterModel:
    """Clusters of cells, numbered by size: 0 is the largest.

    Made by `fit_clusters` or read by `load_clusters`, saved by `save`.

    Attributes
    ----------
    centers_ : (k, d) float64
        Each cluster in the units of the features: its centre or, with `unit_length`, the mean of its cells in
        the sample.
    reduced_centers_ : (k, c) float64
        Centres in the space of the scaled and projected features, which `predict` uses.
    counts_ : (k,) int64
        Number of cells of each cluster in the fit.
    spread_ : (k, 3) float64
        Median, 95th and 99th percentile of the distances of each cluster's cells to its centre (in the
        sample).
    inertia_ : float
        Sum of squared distances to the centres over all cells of the fit.
    mean_, scale_ : (d,) float64
        Features are ``(f - mean_) / scale_`` before projection.
    components_ : (c, d) float64 or None
        Principal axes of the scaled features; with several kinds of features, of each kind separately, and
        weighted.
    unit_length : bool
        Whether projected vectors are scaled to length 1; with several kinds of features, the part of each
        kind.
    parts_ : (kinds + 1,) int64
        Where the part of each kind begins and ends in the c scaled and projected features.
    steps_ : (c,) float64 or None
        Each scaled and projected feature is rounded to a multiple of this power of two, about a millionth of
        its size, so that sums are exact.
    missing_ : int
        Number of cells left out of the fit because a feature was missing or infinite.
    curve_ : list of dict
        For ``k="auto"``: the scores of each k tried.
    info : dict
        Describes the features (encoder, settings); `check` compares it.
    origin : dict
        How the cells of the fit were found and described: ``config``, ``weights`` (hashes), ``stages``
        (version of the code of each) and ``versions`` of packages; empty if the features were made elsewhere.
    naming : ClusterNames
        Names of clusters, and clusters that are merged.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from daskcell import fit_clusters, load_clusters
    >>> features = np.repeat([[0.0, 1.0], [5.0, 4.0]], [3, 2], axis=0)
    >>> model = fit_clusters(features, k=2)
    >>> model
    ClusterModel(k=2, features=2, cells=5)
    >>> model.centers_.round(2).tolist()
    [[0.0, 1.0], [5.0, 4.0]]
    >>> folder = tempfile.mkdtemp()
    >>> model.save(folder)
    >>> load_clusters(folder).predict([[4.9, 4.2], [float("nan"), 0]]).tolist()
    [1, -1]
    """

    centers_: np.ndarray
    reduced_centers_: np.ndarray
    counts_: np.ndarray
    spread_: np.ndarray
    mean_: np.ndarray
    scale_: np.ndarray
    components_: np.ndarray | None = None
    parts_: np.ndarray | None = None
    steps_: np.ndarray | None = None
    unit_length: bool = False
    inertia_: float = 0.0
    missing_: int = 0
    curve_: list[dict[str, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    naming: ClusterNames = field(default_factory=ClusterNames)

    def __repr__(self) -> str:
        return f"ClusterModel(k={self.k}, features={len(self.mean_)}, cells={int(self.counts_.sum())})"

    @property
    def k(self) -> int:
        """Number of fitted clusters."""
        return len(self.reduced_centers_)

    def transform(self, features: np.ndarray) -> np.ndarray:
        """Scaled and projected features, ``(n, d)`` to ``(n, c)`` float32; bit-identical for any blocks."""
        from daskcell.clustering import _kernels

        rows = self._checked(features)
        factor = 1 / self.scale_
        width = len(self.mean_) if self.components_ is None else len(self.components_)
        parts = np.array([0, width]) if self.parts_ is None else self.parts_
        steps = np.zeros(width) if self.steps_ is None else self.steps_
        if self.components_ is None:
            return _kernels.scale(rows, self.mean_, factor, self.unit_length, parts, steps)
        axes = np.ascontiguousarray(self.components_.T)
        return _kernels.project(rows, self.mean_, factor, axes, self.unit_length, parts, steps)

    def predict(self, features: np.ndarray | da.Array) -> np.ndarray | da.Array:
        """Cluster of each cell.

        Parameters
        ----------
        features : (n, d) numpy or Dask array, or DataFrame
            As in the fit.

        Returns
        -------
        (n,) int32
            Dask if `features` is. -1 if a feature of the cell is missing or infinite. Merged clusters have
            the lowest of their numbers.

        Raises
        ------
        InputError
            The number of features is not that of the fit.
        """
        return self._map(features, lambda rows: self.display_ids(self.assign(rows)[0]), np.int32)

    def display_ids(self, clusters: np.ndarray) -> np.ndarray:
        """Numbers under which fitted clusters (-1: none) are shown after merges."""
        return np.append(self.naming.display_ids(self.k), np.int32(-1))[clusters]

    def distance(self, features: np.ndarray | da.Array) -> np.ndarray | da.Array:
        """Distance of each cell to the centre of its cluster, ``(n,)`` float32; NaN if it has none.

        Euclidean, in the space of the scaled and projected features.
        """
        return self._map(features, lambda rows: self.assign(rows)[1], np.float32)

    def assign(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fitted cluster (int32, before merges) of each row, and distance (float32) to its centre."""
        from daskcell.clustering.assignment import NearestCenters

        rows = self._checked(features)
        good = np.isfinite(rows).all(axis=1)
        labels, distances = np.full(len(rows), -1, np.int32), np.full(len(rows), np.nan, np.float32)
        reduced = self.transform(rows[good])
        centers = NearestCenters(self.reduced_centers_)
        labels[good] = found = centers.labels(reduced)
        distances[good] = np.sqrt(centers.squares(reduced, found))
        return labels, distances

    def drift(self, clusters: np.ndarray, distances: np.ndarray) -> dict[str, Any]:
        """Compare the distances of new cells to their centres with those of the cells of the fit.

        Parameters
        ----------
        clusters, distances : (n,) int32, (n,) float32
            As returned by `assign`.

        Returns
        -------
        dict
            ``cells``: number of cells with a cluster; ``far``: share of them beyond the 99th percentile of
            their cluster in the fit; ``expected``: that share for cells like those of the fit, 0.01, or more
            if clusters are so small that the percentile is their farthest cell; ``far_by_cluster``: the share
            for each cluster (None: no cells); ``median_ratio``: median of the distances, each divided by the
            median of its cluster in the fit.
        """
        inside = clusters >= 0
        clusters, distances = clusters[inside], distances[inside]
        cells = np.bincount(clusters, minlength=self.k)
        beyond = np.bincount(clusters, distances > self.spread_[clusters, 2], minlength=self.k)
        ratios = distances / np.maximum(self.spread_[clusters, 0], np.finfo(np.float32).tiny)
        usual = np.maximum(0.01, 1 / (self.counts_ + 1))[clusters]
        return {
            "cells": len(clusters),
            "far": float(beyond.sum() / max(len(clusters), 1)),
            "expected": float(usual.mean()) if len(clusters) else 0.01,
            "far_by_cluster": [
                round(float(b / n), 4) if n else None for b, n in zip(beyond, cells, strict=True)
            ],
            "median_ratio": float(np.median(ratios)) if len(clusters) else 1.0,
        }

    def check(self, width: int, info: dict[str, Any] | None = None) -> None:
        """Raise `InputError` unless rows of `width` features, described by `info`, fit the model."""
        if width != len(self.mean_):
            raise InputError(
                f"The model was fitted on {len(self.mean_)} features per cell, but these cells have {width}. "
                "Use the encoder it was fitted with."
            )
        for key, value in (info or {}).items():
            if key in self.info and self.info[key] != value:
                raise InputError(
                    f"The model was fitted on features with {key} {self.info[key]!r}, but these have "
                    f"{value!r}. "
                    "Make them the same way, or fit a new model."
                )

    def save(self, path: str | Path) -> None:
        """Write the model as a folder, atomically; a saved model at `path` is replaced.

        The folder holds ``arrays.npz``, ``model.json`` and, if clusters are named or merged, ``names.json``.

        Raises
        ------
        InputError
            `path` holds anything other than a saved model.
        """
        path = Path(path)
        _refuse_other(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.mkdir()
            arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
            np.savez(temporary / "arrays.npz", **arrays)
            values = {
                "format": FORMAT,
                "k": self.k,
                "features": len(self.mean_),
                "unit_length": self.unit_length,
                "inertia": self.inertia_,
                "missing": self.missing_,
                "curve": self.curve_,
                "info": self.info,
                "origin": self.origin,
            }
            (temporary / "model.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
            self.naming.save(temporary)

    def _checked(self, features: np.ndarray) -> np.ndarray:
        self._check_shape(features)
        return np.ascontiguousarray(features, np.float32)

    def _check_shape(self, features: Any) -> None:
        if features.ndim != 2:
            raise InputError(f"features must be an array (cells, features), not of shape {features.shape}.")
        self.check(features.shape[1])

    def _map(self, features: Any, function: Any, dtype: Any) -> Any:
        import dask.array as da

        what = "The array of features"
        if not isinstance(features, da.Array):
            return function(np.asarray(as_values(features, what)))
        as_values(features._meta, what)  # not the array: its number of rows may be unknown
        self._check_shape(features)
        whole = features.rechunk({1: -1})
        return whole.map_blocks(function, dtype=dtype, drop_axis=1)


def _refuse_other(path: Path) -> None:
    """Raise `InputError` if `path` holds anything other than a saved model."""
    refuse_impossible(path)
    if path.is_dir():
        others = sorted(set(os.listdir(path)) - {"arrays.npz", "model.json", NAMES})
        if not others:
            return
        path = path / others[0]
    elif not os.path.lexists(path):
        return
    raise InputError(
        f"{path} is not part of a saved model, and would be lost. Please move it, or choose another folder."
    )


def load_clusters(path: str | Path) -> ClusterModel:
    """Read a model written by `ClusterModel.save`.

    Parameters
    ----------
    path : path
        Folder of a saved model, such as ``clusters/`` of a study.

    Returns
    -------
    ClusterModel

    Raises
    ------
    InputError
        `path` holds no model, or one of a newer format.

    Examples
    --------
    >>> import tempfile
    >>> from daskcell import fit_clusters, load_clusters
    >>> folder = tempfile.mkdtemp()
    >>> fit_clusters([[0.0], [1.0], [9.0]], k=2).save(folder)
    >>> load_clusters(folder)
    ClusterModel(k=2, features=1, cells=3)
    """
    path = Path(path)
    try:
        values = json.loads((path / "model.json").read_text())
        with np.load(path / "arrays.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if values["format"] > FORMAT:
            raise InputError(f"{path} was written by a newer daskcell (format {values['format']}).")
        return ClusterModel(
            **{"components_": None, **arrays},
            unit_length=values["unit_length"],
            inertia_=values["inertia"],
            missing_=values["missing"],
            curve_=values["curve"],
            info=values["info"],
            origin=values.get("origin", {}),
            naming=ClusterNames.load(path),
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no cluster model ({type(error).__name__}: {error}).") from None
