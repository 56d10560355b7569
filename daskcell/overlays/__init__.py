"""Clusters to see: colours, pictures, and the label image of clusters."""

from daskcell.overlay.files import write_cluster_labels, write_overlay
from daskcell.overlay.legend import add_legend
from daskcell.overlay.paint import overlay, paint
from daskcell.overlay.palette import CLUSTER_COLORS, colors

__all__ = [
    "CLUSTER_COLORS",
    "add_legend",
    "colors",
    "overlay",
    "paint",
    "write_cluster_labels",
    "write_overlay",
]
