"""Many pictures: label images or a method against a folder of the truth, by category."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from daskcell.errors import InputError
from daskcell.evaluation.matching import THRESHOLDS, Counts, score_pair
from daskcell.evaluation.methods import Method

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".tif", ".tiff", ".png")


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
        Naming the images for which there is no result, and files that cannot be read.
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
