"""Cells grouped by their features: fit once, keep the model, give old groups to new cells.

    rows ──> sample ──> scale, project ──> k ──> centres ──> model ──> cluster and distance of every cell
    (streamed)  (chosen by content)        (choose)  (incremental, rounds)

A "cluster" is a group of cells here; a Dask cluster is `compute`. Features are streamed and never all in
memory, and the groups do not depend on the order, the blocks or the number of workers they came in.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
