"""Groups of cells, compared with known types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from daskcell.errors import InputError
from daskcell.evaluation.matching import match_pairs, overlaps


@dataclass(frozen=True)
class ClusterScore:
    """How well groups agree with known types, over the cells that were found."""

    ari: float
    """Adjusted Rand index: 1 for the same partition, about 0 by chance."""
    nmi: float
    """Normalised mutual information, 0-1."""
    matched: int
    """True cells with a found one: the cells compared."""
    n_truth: int
    """True cells."""


def score_clusters(
    truth_labels: Any, truth_types: Any, labels: Any, clusters: Any, threshold: float = 0.5
) -> ClusterScore:
    """Compare the clusters of found cells with the types of the true cells they match.

    Parameters
    ----------
    truth_labels, labels : integer arrays ``(Y, X)``, or lists of them
        True and found label images of one picture, or of several that share their clusters.
    truth_types, clusters : arrays, or lists of them
        Entry i belongs to label i+1. Types may be numbers or names.
    threshold : float
        Smallest IoU of a match.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    one = not isinstance(truth_labels, list | tuple)
    pictures = [(truth_labels, truth_types, labels, clusters)] if one else None
    if pictures is None:
        if not len(truth_labels) == len(truth_types) == len(labels) == len(clusters):
            raise InputError("Give as many true label images as types, label images and clusters.")
        pictures = list(zip(truth_labels, truth_types, labels, clusters, strict=True))
    types, groups, total = [], [], 0
    for truth, kinds, found, group in pictures:
        kinds, group = np.asarray(kinds), np.asarray(group)
        for image, values, what in ((truth, kinds, "types"), (found, group, "clusters")):
            largest = int(np.max(image, initial=0))
            if largest > len(values):
                raise InputError(f"There are {len(values)} {what}, but labels up to {largest}.")
        pairs = overlaps(truth, found)
        a, b = match_pairs(pairs, threshold)
        types.append(kinds[a.astype(np.intp) - 1])
        groups.append(group[b.astype(np.intp) - 1])
        total += pairs.n_truth
    kinds, group = np.concatenate(types), np.concatenate(groups)
    if not len(kinds):
        return ClusterScore(float("nan"), float("nan"), 0, total)
    return ClusterScore(
        float(adjusted_rand_score(kinds, group)),
        float(normalized_mutual_info_score(kinds, group)),
        len(kinds),
        total,
    )
