"""A fitted model: how features are scaled and projected, and the centres; kept as arrays and JSON."""

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
    """Groups of cells, numbered by size: 0 is the largest.

    Attributes
    ----------
    centers_ : (k, d) float64
        Each group in the units of the features: its centre where features are used as they are, else the mean
        of its cells.
    reduced_centers_ : (k, c) float64
        Centres among the scaled and projected features: what `predict` goes by.
    counts_ : (k,) int64
        Cells of each group in the fit.
    spread_ : (k, 3) float64
        Median, 95th and 99th percentile of the distance of each group's cells to its centre (in the sample).
    inertia_ : float
        Sum of squared distances to the centres over all cells of the fit.
    mean_, scale_ : (d,) float64
        Features are ``(f - mean_) / scale_`` before projection.
    components_ : (c, d) float64 or None
        Principal axes of the scaled features; with several kinds of features, of each kind by itself,
        weighted.
    unit_length : bool
        Vectors are scaled to length 1 after that; with several kinds of features, the part of each kind.
    parts_ : (kinds + 1,) int64
        Where the part of each kind begins and ends among the c scaled and projected features.
    steps_ : (c,) float64 or None
        Power of two of which each scaled and projected feature is a multiple, about a millionth of its size:
        so sums of them are exact.
    missing_ : int
        Cells left out of the fit, since a feature was missing or infinite.
    curve_ : list of dict
        For ``k="auto"``: the scores of each k tried.
    info : dict
        What the features are (encoder, settings); `check` compares it.
    origin : dict
        How the cells of the fit were found and described: ``config``, ``weights`` (hashes), ``stages``
        (versions of the code of each) and ``versions`` of packages; empty if the features were made
        elsewhere.
    naming : ClusterNames
        Names of groups, and groups that count as one.
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
        return len(self.reduced_centers_)

    def transform(self, features: np.ndarray) -> np.ndarray:
        """Scaled and projected features ``(n, c)`` float32; the same in every bit for any blocks."""
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
        """Group of each cell, ``(n, d)`` to ``(n,)`` int32; -1 where a feature is missing or infinite.

        Of groups that were joined, the number of the first.
        """
        return self._map(features, lambda rows: self.display_ids(self.assign(rows)[0]), np.int32)

    def display_ids(self, groups: np.ndarray) -> np.ndarray:
        """Fitted groups (-1: none) by the numbers under which they are shown."""
        return np.append(self.naming.display_ids(self.k), np.int32(-1))[groups]

    def distance(self, features: np.ndarray | da.Array) -> np.ndarray | da.Array:
        """Distance to the centre of the cell's group, ``(n,)`` float32, among the scaled and projected
        features."""
        return self._map(features, lambda rows: self.assign(rows)[1], np.float32)

    def assign(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fitted group and distance to its centre of each cell of a numpy array, before any joining."""
        from daskcell.clustering.assignment import Nearest

        rows = self._checked(features)
        good = np.isfinite(rows).all(axis=1)
        labels, distances = np.full(len(rows), -1, np.int32), np.full(len(rows), np.nan, np.float32)
        reduced = self.transform(rows[good])
        centers = Nearest(self.reduced_centers_)
        labels[good] = found = centers.labels(reduced)
        distances[good] = np.sqrt(centers.squares(reduced, found))
        return labels, distances

    def drift(self, clusters: np.ndarray, distances: np.ndarray) -> dict[str, Any]:
        """How far new cells lie, against the cells of the fit.

        Parameters
        ----------
        clusters, distances
            As `assign` gives them.

        Returns
        -------
        dict
            ``cells``; ``far``, the share of them beyond the 99th percentile of their group in the fit;
            ``expected``, what that is for cells like those of the fit: 0.01, and more where groups were so
            small that their farthest cell is the percentile; ``far_by_cluster``, the share for each group
            (None: no cell); ``median_ratio`` of the distances to the median of their group in the fit.
        """
        inside = clusters >= 0
        groups, distances = clusters[inside], distances[inside]
        cells = np.bincount(groups, minlength=self.k)
        beyond = np.bincount(groups, distances > self.spread_[groups, 2], minlength=self.k)
        ratios = distances / np.maximum(self.spread_[groups, 0], np.finfo(np.float32).tiny)
        usual = np.maximum(0.01, 1 / (self.counts_ + 1))[groups]
        return {
            "cells": len(groups),
            "far": float(beyond.sum() / max(len(groups), 1)),
            "expected": float(usual.mean()) if len(groups) else 0.01,
            "far_by_cluster": [
                round(float(b / n), 4) if n else None for b, n in zip(beyond, cells, strict=True)
            ],
            "median_ratio": float(np.median(ratios)) if len(groups) else 1.0,
        }

    def check(self, width: int, info: dict[str, Any] | None = None) -> None:
        """Raise `InputError` unless features of `width` numbers, described by `info`, are of the model's
        kind."""
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
        """Write the model as a folder of ``arrays.npz``, ``model.json`` and, if groups have names,
        ``names.json``; it appears whole or not at all.

        A model that is there is replaced. Raises `InputError` if there is anything else.
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
        if features.ndim != 2:
            raise InputError(f"features must be (cells, numbers), but have the shape {features.shape}.")
        self.check(features.shape[1])
        return np.ascontiguousarray(features, np.float32)

    def _map(self, features: Any, function: Any, dtype: Any) -> Any:
        import dask.array as da

        if not isinstance(features, da.Array):
            return function(np.asarray(as_values(features, "The array of features")))
        self.check(features.shape[1])
        whole = features.rechunk({1: -1})
        return whole.map_blocks(function, dtype=dtype, drop_axis=1)


def _refuse_other(path: Path) -> None:
    """Raise `InputError` if there is something at `path` that is not a saved model, or more than that."""
    refuse_impossible(path)
    if path.is_dir():
        others = sorted(set(os.listdir(path)) - {"arrays.npz", "model.json", NAMES})
        if not others:
            return
        path = path / others[0]
    elif not os.path.lexists(path):
        return
    raise InputError(
        f"{path} is no part of a model, and would be lost. Please move it, or choose another folder."
    )


def load_clusters(path: str | Path) -> ClusterModel:
    """Read a model that `ClusterModel.save` wrote.

    Raises
    ------
    InputError
        `path` holds no model, or one of a newer format.
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
