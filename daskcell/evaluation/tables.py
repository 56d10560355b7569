"""Scores of many images, pooled by category: label images, or a method, against a folder of true labels."""

from __future__ import annotations

import csv
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import InputError
from daskcell.evaluation.matching import Counts, score_pair
from daskcell.geometry import Box
from daskcell.images.arrays import as_labels

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".tif", ".tiff", ".png")
Method = Callable[[np.ndarray], Any]
"""From an image ``(C, Y, X)`` to labels ``(Y, X)``."""


def score_table(scores: Iterable[tuple[str, Mapping[float, Counts]]]) -> pd.DataFrame:
    """Pool the counts of images by category.

    Parameters
    ----------
    scores : iterable of (str, dict)
        Category and `score_pair` of each image.

    Returns
    -------
    DataFrame
        Indexed by category, with columns pictures, true_cells, found_cells and, for each threshold, ap_50,
        precision_50, recall_50, f1_50, ... Further rows pool categories that begin with the same letters
        (``fluo*`` for ``fluo256`` and ``fluo512``), and the last row, ``all``, everything.
    """
    import pandas as pd

    scores = list(scores)
    members: dict[str, list[Mapping[float, Counts]]] = {}
    for category, counts in sorted(scores, key=lambda score: score[0]):
        members.setdefault(category, []).append(counts)
    for head, count in Counter(map(_head, members)).items():
        if head and count > 1:
            members[f"{head}*"] = [counts for category, counts in scores if _head(category) == head]
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


def _head(category: str) -> str:
    """The letters a category begins with."""
    return re.match("[A-Za-z]*", category)[0]  # type: ignore[index]


def score_folder(
    found: str | Path | Method,
    truth: str | Path,
    *,
    images: str | Path | None = None,
    index: str | Path | None = None,
) -> pd.DataFrame:
    """Score label images, or a method, against a folder of true label images.

    Parameters
    ----------
    found : path or callable
        A folder of label images (``<name>.tif`` or ``.png``) or of OME-Zarr images with ``labels/cells``
        (``images/`` of a study); or a method, from an image ``(C, Y, X)`` to labels ``(Y, X)``.
    truth : path
        Folder of true label images with the same names.
    images : path, optional
        Folder of images for a method, with the same names.
    index : path, optional
        CSV file with the columns ``name`` and ``category``; without it, all images are one category.

    Returns
    -------
    DataFrame
        See `score_table`.

    Raises
    ------
    InputError
        Some images have no result, or a file cannot be read or is not a label image; the message names it.
    """
    truths = _by_name(truth)
    if not truths:
        raise InputError(f"There is no label image (.tif or .png) in {truth}.")
    if callable(found):
        if images is None:
            raise InputError("Scoring a method needs the folder of images: please give images.")
        sources = _by_name(images)
    else:
        sources = _by_name(found, zarr=True)
    missing = [name for name in truths if name not in sources]
    if missing:
        where = images if callable(found) else found
        raise InputError(
            f"{len(missing)} of {len(truths)} images are not in {where}, the first is {missing[0]!r}."
        )
    categories = read_categories(index) if index else {}
    scores = []
    for name, path in truths.items():
        true = read_labels(path)
        labels = found(read_image(sources[name])) if callable(found) else read_labels(sources[name])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                scores.append((categories.get(name, "all"), score_pair(true, labels)))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        for warning in caught:
            warnings.warn(f"{name}: {warning.message}", warning.category, stacklevel=2)
    return score_table(scores)


def read_categories(index: str | Path) -> dict[str, str]:
    """Category by image name, from a CSV file with the columns ``name`` and ``category``."""
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


def read_image(path: Path) -> np.ndarray:
    """An image file as ``(C, Y, X)``."""
    from daskcell.images import open_image

    return np.asarray(open_image(path).data)


def read_labels(path: Path) -> np.ndarray:
    """The labels ``(Y, X)`` in a TIFF or PNG file, or in ``labels/cells`` of an OME-Zarr image.

    Values are returned as they are stored: 64-bit integers, the indices of a palette, or the grey value of a
    colour file whose channels are equal.

    Raises
    ------
    InputError
        The file cannot be read, or its values are not labels.
    """
    if path.suffix == ".zarr":
        from daskcell import images

        _, height, width = images.image_info(path).shape
        return images.read_labels(path, "cells", Box(0, 0, height, width))
    try:
        values = _pixels(path)
    except Exception as error:  # decoders raise many kinds
        raise InputError(f"Cannot read {path}: {' '.join(str(error).split())[:200]}.") from None
    for axis in (0, -1):
        if values.ndim == 3 and 1 <= values.shape[axis] <= 4:
            channels = np.moveaxis(values, axis, 0)
            if axis and len(channels) in (2, 4) and path.suffix.lower() == ".png":
                channels = channels[:-1]  # without alpha
            if (channels == channels[:1]).all():
                values = channels[0]
    return np.asarray(as_labels(values, f"The labels in {path}"))


def _pixels(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image)
    import tifffile

    with tifffile.TiffFile(path) as file:
        return np.asarray(file.series[0].asarray())
