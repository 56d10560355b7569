"""Clusters of cells with similar features: fit once, save the model, assign new cells to its clusters.

    feature blocks ──> sample ──> scale, project ──> k ──> centres ──> model ──> cluster and distance per cell
    (streamed)         (by content)                  (select_k)  (kmeans)       (assignment)

Features are streamed and never all in memory; the clusters depend neither on the order of the cells, nor on
the blocks, nor on the number of workers. "Cluster" never means a Dask cluster here: for that see `compute`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
