"""Clusters to see: colours, pictures, and the label image of clusters."""

from daskcell.overlays.files import write_cluster_labels, write_overlay
from daskcell.overlays.legend import add_legend
from daskcell.overlays.paint import overlay, paint
from daskcell.overlays.palette import CLUSTER_COLORS, colors

__all__ = [
    "CLUSTER_COLORS",
    "add_legend",
    "colors",
    "overlay",
    "paint",
    "write_cluster_labels",
    "write_overlay",
]
