"""Matching of the cells of two label images by overlap, and counts of right, surplus and missed cells."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from daskcell.errors import InputError, InputWarning
from daskcell.images.arrays import as_labels

THRESHOLDS = (0.5, 0.75)


@dataclass(frozen=True)
class Counts:
    """True positives, false positives and false negatives; counts of several images can be added."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def ap(self) -> float:
        """Average precision ``TP / (TP + FP + FN)``; NaN if there are no cells, true or found."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """``TP / (TP + FP)``: share of found cells that match a true one."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """``TP / (TP + FN)``: share of true cells that were found."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


@dataclass(frozen=True)
class Overlaps:
    """All pairs of a true and a found cell that share a pixel, as arrays of equal length."""

    truth: np.ndarray
    """Label of the true cell of each pair."""
    found: np.ndarray
    """Label of the found cell of each pair."""
    iou: np.ndarray
    """Intersection over union of each pair, float64."""
    n_truth: int
    """True cells, with or without a pair."""
    n_found: int


def overlaps(truth: Any, found: Any) -> Overlaps:
    """Find the pairs of overlapping cells of two label images.

    Parameters
    ----------
    truth, found : (Y, X) arrays of whole numbers
        0 is background. Labels may be of any size and have gaps; memory grows with their number only.

    Raises
    ------
    InputError
        The shapes differ, or one of them is not a label image.
    """
    truth, found = _labels(truth, "The labels of the truth"), _labels(found, "The labels found")
    if truth.shape != found.shape:
        raise InputError(f"The truth has {truth.shape} pixels, but the labels have {found.shape}.")
    a_ids, a = _renumber(truth, "The labels of the truth")
    b_ids, b = _renumber(found, "The labels found")
    both = (a > 0) & (b > 0)
    # Counted by pair: a table of all true times all found cells would be nearly empty, and large.
    keys, shared = np.unique(a[both] * np.int64(len(b_ids) + 1) + b[both], return_counts=True)
    i, j = np.divmod(keys, len(b_ids) + 1)
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    iou = shared / (size_a[i] + size_b[j] - shared) if len(keys) else np.zeros(0)
    return Overlaps(a_ids[i - 1], b_ids[j - 1], iou, len(a_ids), len(b_ids))


def _labels(labels: Any, what: str) -> np.ndarray:
    labels = np.asarray(as_labels(labels, what))
    return np.asarray(as_labels(labels, what))  # values of a Dask array are known only now


def _renumber(labels: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels in increasing order, and the image with 1..n in their place (int64)."""
    ids = np.unique(labels)
    ids = ids[ids > 0]
    if len(ids) == 1:
        pieces = ndimage.label(labels)[1]
        if pieces > 1:
            warnings.warn(
                f"{what} are one label in {pieces} pieces. If it is a mask of many cells, please number "
                "them, as with skimage.measure.label(mask).",
                InputWarning,
                stacklevel=4,
            )
    return ids, np.searchsorted(ids, labels, side="right") * (labels > 0)


def match_cells(truth: Any, found: Any, threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Match true and found cells one to one.

    Parameters
    ----------
    truth, found : (Y, X) arrays of whole numbers
        As in `overlaps`.
    threshold : float
        Smallest intersection over union (IoU) of a match, above 0 and at most 1.

    Returns
    -------
    truth, found : (matches,) arrays
        Labels of the matched cells, by increasing true label.
    """
    return match_pairs(overlaps(truth, found), threshold)


def match_pairs(pairs: Overlaps, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """`match_cells` from the overlaps."""
    if not 0 < threshold <= 1:
        raise InputError(f"The threshold {threshold!r} cannot be used: an IoU lies above 0 and at most at 1.")
    good = np.flatnonzero(pairs.iou >= threshold)
    truth, found = pairs.truth[good], pairs.found[good]
    if threshold >= 0.5:
        # No assignment problem: above an IoU of one half, the overlap is more than half of either cell, so
        # neither has a second such partner. At exactly one half it may have two: the first is taken.
        order = np.lexsort((found, truth))
        good = order[np.unique(truth[order], return_index=True)[1]]
        good = good[np.unique(found[good], return_index=True)[1]]
    else:
        good = _largest_matching(truth, found)
    good = good[np.argsort(truth[good])]
    return truth[good], found[good]


def _largest_matching(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Pairs (indices) of a matching of as many cells as possible."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    _, i = np.unique(truth, return_inverse=True)
    _, j = np.unique(found, return_inverse=True)
    if not len(i):
        return np.zeros(0, np.intp)
    graph = csr_array((np.ones(len(i), np.int8), (i, j)))
    partner = maximum_bipartite_matching(graph, perm_type="column")
    return np.flatnonzero(partner[i] == j)


def score_pair(truth: Any, found: Any, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, Counts]:
    """Count right, surplus and missed cells of one image.

    Parameters
    ----------
    truth, found : (Y, X) arrays of whole numbers
        As in `overlaps`.
    thresholds : sequence of float
        Smallest IoU of a match.

    Returns
    -------
    dict
        `Counts` by threshold: those of ``cellpose.metrics.average_precision``, in sparse memory.

    Raises
    ------
    InputError
        As `overlaps`, or a threshold is not above 0 and at most 1.

    Examples
    --------
    >>> from daskcell.evaluation import score_pair
    >>> score_pair([[7, 7, 0, 9]], [[2, 2, 0, 0]], [0.5])
    {0.5: Counts(tp=1, fp=0, fn=1)}
    """
    pairs = overlaps(truth, found)
    counts = {}
    for threshold in thresholds:
        right = len(match_pairs(pairs, threshold)[0])
        counts[threshold] = Counts(right, pairs.n_found - right, pairs.n_truth - right)
    return counts
