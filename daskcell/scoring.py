"""How good a result is, where the truth is known: found cells, and cells grouped by type.

A found cell is right when it overlaps a true one by an intersection over union (IoU) of at least a
threshold, one to one. From the right (TP), surplus (FP) and missed (FN) cells, pooled over pictures: ``AP =
TP / (TP + FP + FN)``, the average precision of the nucleus segmentation literature (Caicedo et al., Nature
Methods 16 (2019) 1247-1253), and precision, recall and F1.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.config import PreprocessSettings
from daskcell.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

THRESHOLDS = (0.5, 0.75)
SUFFIXES = (".tif", ".tiff", ".png")
Method = Callable[[np.ndarray], Any]
"""From a picture ``(C, Y, X)`` to labels ``(Y, X)``."""


# -- one picture ----------------------------------------------------------------------------------
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
    return _match(overlaps(truth, found), threshold)


def _match(pairs: Overlaps, threshold: float) -> tuple[np.ndarray, np.ndarray]:
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
        right = len(_match(pairs, threshold)[0])
        counts[threshold] = Counts(right, pairs.n_found - right, pairs.n_truth - right)
    return counts


# -- many pictures --------------------------------------------------------------------------------
def score_table(
    scores: Iterable[tuple[str, Mapping[float, Counts]]],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Pool the counts of pictures by category.

    Parameters
    ----------
    scores : pairs of a picture's category and its `score_pair`
    groups : name -> patterns
        Further rows that pool categories, such as ``{"fluorescence": ["fluo*"]}``; None: categories that
        begin with the same letters (``fluo256`` and ``fluo512``). A row ``all`` is always last.

    Returns
    -------
    DataFrame indexed by category: pictures, true_cells, found_cells, and per threshold ap_50, precision_50,
    recall_50, f1_50, ...
    """
    import pandas as pd

    scores = list(scores)
    members: dict[str, list[Mapping[float, Counts]]] = {}
    for category, counts in sorted(scores, key=lambda score: score[0]):
        members.setdefault(category, []).append(counts)
    groups = _families(members) if groups is None else groups
    for name, patterns in groups.items():
        members[name] = [c for category, c in scores if any(fnmatchcase(category, p) for p in patterns)]
    if len(members) > 1:
        members["all"] = [counts for _, counts in scores]
    rows = {}
    for category, parts in members.items():
        row: dict[str, float] = {"pictures": len(parts)}
        for threshold in parts[0] if parts else ():
            pooled = sum((counts[threshold] for counts in parts), Counts())
            row |= {"true_cells": pooled.tp + pooled.fn, "found_cells": pooled.tp + pooled.fp}
            for measure in ("ap", "precision", "recall", "f1"):
                row[f"{measure}_{100 * threshold:g}"] = getattr(pooled, measure)
        rows[category] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("category")


def _families(categories: Iterable[str]) -> dict[str, list[str]]:
    """Patterns for categories that begin with the same letters, where there is more than one."""
    heads = Counter(match.group() for name in categories if (match := re.match("[A-Za-z]+", name)))
    return {f"{head}*": [f"{head}[!A-Za-z]*", head] for head, count in heads.items() if count > 1}


def score_folder(
    found: str | Path | Method,
    truth: str | Path,
    *,
    images: str | Path | None = None,
    index: str | Path | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    groups: Mapping[str, Sequence[str]] | None = None,
    on_picture: Callable[[str, int, int], None] | None = None,
) -> pd.DataFrame:
    """Score label images, or a method, against a folder of true label images.

    Parameters
    ----------
    found : folder or callable
        A folder of label images (``<name>.tif`` or ``.png``) or of OME-Zarr images with ``labels/cells``
        (``images/`` of a study); or a method, from a picture ``(C, Y, X)`` to labels ``(Y, X)``, such as
        `cellpose_method` makes.
    truth : folder
        True label images, by the name of the picture.
    images : folder
        Pictures for a method, by the same names.
    index : CSV file
        Columns ``name`` and ``category``; without it, all pictures are one category.
    thresholds, groups
        As in `score_pair` and `score_table`.
    on_picture : callable
        Told the name of each picture, its number and their count, before it is worked on.

    Raises
    ------
    InputError
        Naming the pictures for which there is no result, and files that cannot be read.
    """
    truths = _by_name(truth)
    if not truths:
        raise InputError(f"There is no label image (.tif or .png) in {truth}.")
    if callable(found):
        if images is None:
            raise InputError("Scoring a method needs the folder of pictures: please give images.")
        sources = _by_name(images)
    else:
        sources = _by_name(found, zarr=True)
    missing = [name for name in truths if name not in sources]
    if missing:
        where = images if callable(found) else found
        raise InputError(
            f"{len(missing)} of {len(truths)} pictures are not in {where}, the first is {missing[0]!r}."
        )
    categories = read_categories(index) if index else {}
    scores = []
    for number, (name, path) in enumerate(truths.items()):
        if on_picture:
            on_picture(name, number, len(truths))
        labels = found(read_picture(sources[name])) if callable(found) else _read_labels(sources[name])
        try:
            counts = score_pair(_read_labels(path), labels, thresholds)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        scores.append((categories.get(name, "all"), counts))
    return score_table(scores, groups)


def read_categories(index: str | Path) -> dict[str, str]:
    """Category by picture name from a CSV file with the columns ``name`` and ``category``."""
    try:
        with Path(index).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the index {index}: {error}.") from None
    if not rows or not {"name", "category"} <= set(rows[0]):
        raise InputError(f"The index {index} needs the columns 'name' and 'category'.")
    return {row["name"]: row["category"] for row in rows}


def _by_name(folder: str | Path, *, zarr: bool = False) -> dict[str, Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    files = sorted(folder.iterdir())
    wanted = [f for f in files if f.suffix.lower() in SUFFIXES or (zarr and f.suffix == ".zarr")]
    return {f.stem: f for f in wanted}


def read_picture(path: Path) -> np.ndarray:
    """A picture as ``(C, Y, X)``."""
    from daskcell.images import open_image

    return np.asarray(open_image(path).data)


def _read_labels(path: Path) -> np.ndarray:
    if path.suffix != ".zarr":
        return read_picture(path)[0]
    from daskcell.geometry import Box
    from daskcell.images import image_info, read_labels

    _, height, width = image_info(path).shape
    return read_labels(path, "cells", Box(0, 0, height, width))


# -- methods --------------------------------------------------------------------------------------
def cellpose_method(
    model: str = "tiny",
    diameter: float | str | None = "auto",
    *,
    preprocess: PreprocessSettings | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    cellprob_threshold: float = 0.0,
    flow_threshold: float = 0.4,
    min_size: int = 15,
    network: Any = None,
) -> Method:
    """Cellpose on the whole picture in memory: its own normalisation, tiles and dynamics, no blocks.

    Parameters
    ----------
    model : name or file of weights, as in `daskcell.load_network`
    diameter : float, None or "auto"
        In pixels; None: no rescaling; ``"auto"``: the median of the cells of a first pass.
    preprocess : settings
        Applied first; None: the picture as it is.
    network : torch module, optional
        Instead of `model`.

    Returns
    -------
    callable from a picture ``(C, Y, X)`` to labels ``(Y, X)`` uint32
    """
    if isinstance(diameter, str) and diameter != "auto":
        raise InputError(f"The diameter {diameter!r} cannot be used: give pixels, 'auto' or nothing.")
    if network is None:
        from daskcell.models import load_network

        network = load_network(model, device)

    def segment(picture: np.ndarray) -> np.ndarray:
        if preprocess is not None:
            from daskcell.preprocess import apply_block, freeze

            picture = apply_block(picture, freeze(picture, preprocess, is_rgb=len(picture) == 3))
        normalised = _normalised(picture)

        def run(size: float | None) -> np.ndarray:
            return _run_cellpose(
                network, normalised, size, batch_size, cellprob_threshold, flow_threshold, min_size
            )

        if diameter != "auto":
            return run(diameter)  # type: ignore[arg-type]
        first = run(None)
        size = median_diameter(first)
        return first if size is None else run(size)

    return segment


def _normalised(picture: np.ndarray) -> np.ndarray:
    """``(1, Y, X, 3)`` float32, each channel by its 1st and 99th percentile, as ``CellposeModel.eval``."""
    from cellpose import transforms

    image = transforms.convert_image(np.moveaxis(picture[:3], 0, -1), channel_axis=-1)
    return transforms.normalize_img(image[None], normalize=True)


def _run_cellpose(
    network: Any,
    picture: np.ndarray,
    diameter: float | None,
    batch_size: int,
    cellprob_threshold: float,
    flow_threshold: float,
    min_size: int,
) -> np.ndarray:
    from cellpose import core, dynamics, transforms

    height, width = picture.shape[1:3]
    scale = 30.0 / diameter if diameter else 1.0
    y, _ = core.run_net(
        network,
        picture,
        batch_size=batch_size,
        bsize=256,
        rsz=None if scale == 1 else scale,
        tile_overlap=0.1,
    )
    if scale != 1:
        y = transforms.resize_image(y, height, width)
    masks = dynamics.resize_and_compute_masks(
        np.moveaxis(y[0, ..., -3:-1], -1, 0),
        y[0, ..., -1],
        niter=int(200 / scale),
        cellprob_threshold=cellprob_threshold,
        flow_threshold=flow_threshold,
        min_size=min_size,
        device=network.device,
    )
    return masks.astype(np.uint32)


def median_diameter(labels: np.ndarray) -> float | None:
    """Median over the cells of the diameter of the disc of equal area, in pixels; None without cells."""
    areas = np.bincount(np.asarray(labels).ravel())[1:]
    areas = areas[areas > 0]
    return float(np.sqrt(np.median(areas) * 4 / np.pi)) if len(areas) else None


# -- groups of cells ------------------------------------------------------------------------------
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
        a, b = _match(pairs, threshold)
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
