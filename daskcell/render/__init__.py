"""Clusters to see: colours, pictures, and the label image of clusters."""

from daskcell.render.overlays import write_cluster_labels, write_overlay
from daskcell.render.paint import CLUSTER_COLORS, add_legend, colors, overlay, paint

__all__ = [
    "CLUSTER_COLORS",
    "add_legend",
    "colors",
    "overlay",
    "paint",
    "write_cluster_labels",
    "write_overlay",
]
