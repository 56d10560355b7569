"""daskcell: from microscope images to every cell segmented, described and grouped by type.

    import daskcell as dc

    image = dc.open_image("slide.svs")                      # lazy (C, Y, X)
    picture = dc.adjust_histogram(image.data)
    labels = dc.segment(picture)                            # lazy (Y, X), the same cells for any chunks
    cells = dc.measure(labels, picture)                     # a row a cell
    features = dc.embed(picture, labels, encoder="tiny")
    model = dc.fit_clusters(features, k=11)
    colours = dc.overlay(picture, labels, model.predict(features))

or all of it, disk to disk, for one slide or thousands: ``dc.run(inputs, out)``, or ``daskcell run``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from daskcell._version import __version__

if TYPE_CHECKING:
    from daskcell.clustering import ClusterModel, fit_clusters, load_clusters
    from daskcell.config import Config, load_config
    from daskcell.errors import DaskcellError
    from daskcell.export import export_crops
    from daskcell.features import embed, measure
    from daskcell.images import Image, convert, open_image
    from daskcell.models import load_encoder, load_network
    from daskcell.pipeline import assign, open_study, run
    from daskcell.preprocess import (
        adjust_histogram,
        adjust_stains,
        correct_background,
        estimate_flat,
        gaussian,
        prepare,
        reconstruct,
    )
    from daskcell.render import overlay
    from daskcell.segmentation import segment

# Imported when asked for: networks and Dask take seconds, and `daskcell --help` needs neither.
_WHERE = {
    "ClusterModel": "clustering",
    "Config": "config",
    "DaskcellError": "errors",
    "Image": "images",
    "adjust_histogram": "preprocess",
    "adjust_stains": "preprocess",
    "assign": "pipeline",
    "convert": "images",
    "correct_background": "preprocess",
    "embed": "features",
    "estimate_flat": "preprocess",
    "export_crops": "export",
    "fit_clusters": "clustering",
    "gaussian": "preprocess",
    "load_clusters": "clustering",
    "load_config": "config",
    "load_encoder": "models",
    "load_network": "models",
    "measure": "features",
    "open_image": "images",
    "open_study": "pipeline",
    "overlay": "render",
    "prepare": "preprocess",
    "reconstruct": "preprocess",
    "run": "pipeline",
    "segment": "segmentation",
}

__all__ = [
    "ClusterModel",
    "Config",
    "DaskcellError",
    "Image",
    "__version__",
    "adjust_histogram",
    "adjust_stains",
    "assign",
    "convert",
    "correct_background",
    "embed",
    "estimate_flat",
    "export_crops",
    "fit_clusters",
    "gaussian",
    "load_clusters",
    "load_config",
    "load_encoder",
    "load_network",
    "measure",
    "open_image",
    "open_study",
    "overlay",
    "prepare",
    "reconstruct",
    "run",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'daskcell' has no attribute {name!r}")
    value = getattr(import_module(f"daskcell.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
