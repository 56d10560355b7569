"""How good a result is, where the truth is known: found cells, and cells grouped by type.

A found cell is right when it overlaps a true one by an intersection over union (IoU) of at least a
threshold, one to one. From the right (TP), surplus (FP) and missed (FN) cells, pooled over pictures: ``AP =
TP / (TP + FP + FN)``, the average precision of the nucleus segmentation literature (Caicedo et al., Nature
Methods 16 (2019) 1247-1253), and precision, recall and F1.
"""

from daskcell.evaluation.clusters import ClusterScore, score_clusters
from daskcell.evaluation.matching import (
    THRESHOLDS,
    Counts,
    Overlaps,
    match_cells,
    overlaps,
    score_pair,
)
from daskcell.evaluation.methods import Method, cellpose_method, median_diameter
from daskcell.evaluation.tables import SUFFIXES, read_categories, read_picture, score_folder, score_table
from daskcell.evaluation.truth import read_truth, score_study

__all__ = [
    "SUFFIXES",
    "THRESHOLDS",
    "ClusterScore",
    "Counts",
    "Method",
    "Overlaps",
    "cellpose_method",
    "match_cells",
    "median_diameter",
    "overlaps",
    "read_categories",
    "read_picture",
    "read_truth",
    "score_clusters",
    "score_folder",
    "score_pair",
    "score_study",
    "score_table",
]
