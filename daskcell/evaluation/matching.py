"""Cells of two label images: which overlap, which belong together, how many are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from daskcell.errors import InputError

THRESHOLDS = (0.5, 0.75)


@dataclass(frozen=True)
class Counts:
    """Right, surplus and missed cells; counts of several pictures add up."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def ap(self) -> float:
        """``TP / (TP + FP + FN)``; NaN where there are no cells, true or found."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """Share of found cells that are right."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of true cells that were found."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


@dataclass(frozen=True)
class Overlaps:
    """All pairs of a true and a found cell that share a pixel."""

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
    """Pairs of overlapping cells of two label images ``(Y, X)``; 0 is background, labels need not be
    consecutive.

    Raises
    ------
    InputError
        For label images of different sizes, or that hold no labels.
    """
    truth, found = _labels(truth, "truth"), _labels(found, "found")
    if truth.shape != found.shape:
        raise InputError(f"The truth has {truth.shape} pixels, but the labels have {found.shape}.")
    a_names, a = _renumber(truth)
    b_names, b = _renumber(found)
    both = (a > 0) & (b > 0)
    # Overlaps are few: counted by pair, never as a table of all true times all found cells.
    keys, shared = np.unique(a[both] * np.int64(len(b_names) + 1) + b[both], return_counts=True)
    i, j = np.divmod(keys, len(b_names) + 1)
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    iou = shared / (size_a[i] + size_b[j] - shared) if len(keys) else np.zeros(0)
    return Overlaps(a_names[i - 1], b_names[j - 1], iou, len(a_names), len(b_names))


def _labels(labels: Any, what: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or (labels.size and labels.min() < 0):
        raise InputError(
            f"The {what} must be a label image (Y, X) of integers from 0, but has shape {labels.shape} "
            f"and type {labels.dtype}."
        )
    return labels


def _renumber(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels in increasing order, and the image with 1..n for them (int64)."""
    names = np.unique(labels)
    names = names[names > 0]
    return names, np.searchsorted(names, labels, side="right") * (labels > 0)


def match_cells(truth: Any, found: Any, threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels of true and found cells that belong together, one to one, by increasing true label."""
    return match_pairs(overlaps(truth, found), threshold)


def match_pairs(pairs: Overlaps, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels of true and found cells that belong together, as `match_cells`."""
    if not 0 < threshold <= 1:
        raise InputError(f"The threshold {threshold!r} cannot be used: an IoU lies above 0 and at most at 1.")
    good = np.flatnonzero(pairs.iou >= threshold)
    truth, found = pairs.truth[good], pairs.found[good]
    if threshold >= 0.5:
        # No assignment problem: an IoU above one half means more than half of either cell, so neither has a
        # second such partner. At exactly one half a cell may consist of two found halves: the first is taken.
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
    """Counts of right, surplus and missed cells of one picture, by IoU threshold.

    Parameters
    ----------
    truth, found : integer arrays ``(Y, X)``
        Label images; 0 is background.
    """
    pairs = overlaps(truth, found)
    counts = {}
    for threshold in thresholds:
        right = len(match_pairs(pairs, threshold)[0])
        counts[threshold] = Counts(right, pairs.n_found - right, pairs.n_truth - right)
    return counts
