"""Cells grouped by their features: fit once, keep the model, give old groups to new cells.

    rows ──> sample ──> scale, project ──> k ──> centres ──> model ──> cluster and distance of every cell
    (streamed)  (chosen by content)        (choose)  (incremental, rounds)

A "cluster" is a group of cells here; a Dask cluster is `compute`. Features are streamed and never all in
memory, and the groups do not depend on the order, the blocks or the number of workers they came in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskcell.clustering.engine import fit_features, predict_slide
    from daskcell.clustering.fit import fit_clusters
    from daskcell.clustering.model import ClusterModel, load_clusters

_WHERE = {
    "ClusterModel": "model",
    "fit_clusters": "fit",
    "fit_features": "engine",
    "load_clusters": "model",
    "predict_slide": "engine",
}
__all__ = ["ClusterModel", "fit_clusters", "fit_features", "load_clusters", "predict_slide"]


def __getattr__(name: str) -> Any:
    # scikit-learn and numba are slow to import: only when asked for.
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
