"""Clusters of a study against a table of cells of known types.

The table gives a cell by its label, or by a point inside it. A point outside of all cells counts as a missed
cell, and so do all but one of several points in the same cell.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.names import ClusterNames
from daskcell.errors import InputError
from daskcell.storage.atomic import write_json
from daskcell.study import CLUSTERS, Study
from daskcell.study.results import Clustered
from daskcell.text import table

if TYPE_CHECKING:
    import pandas as pd

FILE = "scores.json"
_ALIASES = {
    "slide": ("slide", "file", "image"),
    "type": ("type", "class"),
    "label": ("label", "cell", "cell_id"),
}
_TILE = 1024


def read_truth(path: str | os.PathLike[str], slides: Iterable[str]) -> pd.DataFrame:
    """Read cells of known types from a CSV file.

    Parameters
    ----------
    path : path
        Columns ``slide`` (or file; a slide's name, with or without suffix), ``type`` (or class), and
        ``label`` (or cell), or ``y`` and ``x`` in pixels of the slide. Case does not matter; other columns
        are ignored.
    slides : iterable of str
        Names of a study's slides.

    Returns
    -------
    DataFrame
        Columns slide, type (text), and label, or y and x.

    Raises
    ------
    InputError
        Columns or values are missing, no row is of these slides, or the file cannot be read.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read the truth {path}: {error}.") from None
    found = {str(name).strip().lower(): name for name in table.columns}
    chosen = {want: found[name] for want, names in _ALIASES.items() for name in names[::-1] if name in found}
    place = ["label"] if "label" in chosen else ["y", "x"]
    chosen |= {name: found[name] for name in place if name in found}
    missing = [name for name in ("slide", "type", *place) if name not in chosen]
    if missing:
        raise InputError(
            f"The truth {path} needs the columns slide, type, and label or y and x, but has "
            f"{', '.join(map(str, table.columns))}."
        )
    table = table[[chosen[name] for name in ("slide", "type", *place)]].set_axis(
        ["slide", "type", *place], axis=1
    )
    numbers = table[place].apply(pd.to_numeric, errors="coerce")
    bad = table.isna().any(axis=1) | ~np.isfinite(numbers).all(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        values = ", ".join(str(value) for value in table.iloc[row])
        raise InputError(f"Row {row + 2} of the truth {path} is not complete: {values}.")
    table[place] = numbers
    known = set(slides)
    table["slide"] = [name if name in known else Path(name).stem for name in table["slide"]]
    strange = sorted(set(table["slide"]) - known)
    if len(strange) == table["slide"].nunique():
        raise InputError(
            f"The truth {path} names no slide of the study: it has {', '.join(map(repr, strange[:3]))}, the "
            f"study {', '.join(map(repr, sorted(known)[:3]))}."
        )
    return table[table["slide"].isin(known)].reset_index(drop=True)


def score_study(study: Study, truth: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare a study's clusters with known types, and write the result to its ``scores.json``.

    Parameters
    ----------
    study : Study
    truth : path
        See `read_truth`.

    Returns
    -------
    dict
        ``ari`` (adjusted Rand index), ``nmi`` (normalised mutual information), ``matched`` and ``cells`` (of
        the truth) over all slides; ``slides``: the same for each slide; ``types``, ``groups`` (titles of the
        clusters) and ``contingency`` (number of cells of each type, in rows, in each cluster); ``grouping``
        and ``assigned``: which clusters and cells were compared (`Record.clusters_key`,
        `Record.assigned_key`).

    Raises
    ------
    InputError
        As `read_truth`, or the study has no clusters yet.
    """
    table = read_truth(truth, study.slides)
    if study.record.clusters_key is None:
        raise InputError(f"{study.out} has no clusters yet. Please run it first.")
    types, clusters, slides = [], [], {}
    for slide, known in table.groupby("slide", sort=True):
        kinds, found = _of_slide(study, str(slide), known)
        slides[str(slide)] = agreement(kinds, found) | {"cells": len(known)}
        types.append(kinds)
        clusters.append(found)
    kinds, found = np.concatenate(types), np.concatenate(clusters)
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    assert clustered is not None
    titles = ClusterNames.load(study.paths.clusters).titles(clustered.k)
    rows, row = np.unique(kinds, return_inverse=True)
    columns, column = np.unique(found.astype(np.int64), return_inverse=True)
    counts = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(counts, (row, column), 1)
    result = agreement(kinds, found) | {
        "cells": len(table),
        "slides": slides,
        "types": rows.tolist(),
        "groups": [titles[i] for i in columns],
        "contingency": counts.tolist(),
        "truth": str(truth),
        "grouping": study.record.clusters_key,
        "assigned": study.record.assigned_key,
    }
    write_json(study.record.own(FILE), result)
    return result


def _of_slide(study: Study, slide: str, known: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Types and clusters of the cells of one slide that were found and have a cluster."""
    cells = study.cells(slide) if study.record.ledger(slide).entry("describe") else None
    if cells is None or "cluster" not in cells:
        return np.zeros(0, object), np.zeros(0, np.int64)
    labels = known["label"].to_numpy(np.int64) if "label" in known else _labels_at(study, slide, known, cells)
    at = labels - 1  # row i of the table is label i + 1
    good = (at >= 0) & (at < len(cells))
    # One to one: of several rows for one cell, the first.
    good[good] = np.isin(
        np.flatnonzero(good), np.flatnonzero(good)[np.unique(at[good], return_index=True)[1]]
    )
    good[good] = cells["cluster"].to_numpy()[at[good]] >= 0
    return known["type"].to_numpy(object)[good], cells["cluster"].to_numpy()[at[good]]


def _labels_at(study: Study, slide: str, known: pd.DataFrame, cells: pd.DataFrame) -> np.ndarray:
    """The label under each point; 0 if there is none, or if another point is nearer to the cell's centre."""
    from daskcell.geometry import Box
    from daskcell.images import image_info, read_labels

    shape = image_info(study.paths.image(slide)).shape[1:]
    y, x = (np.floor(known[axis].to_numpy(float) + 0.5).astype(np.int64) for axis in ("y", "x"))
    labels = np.zeros(len(known), np.int64)
    inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    tiles = np.stack([y // _TILE, x // _TILE], axis=1)
    for ty, tx in np.unique(tiles[inside], axis=0).tolist():
        box = Box(ty * _TILE, tx * _TILE, min((ty + 1) * _TILE, shape[0]), min((tx + 1) * _TILE, shape[1]))
        here = inside & (tiles == (ty, tx)).all(axis=1)
        labels[here] = read_labels(study.paths.image(slide), "cells", box)[y[here] - box.y0, x[here] - box.x0]
    found = np.flatnonzero(labels)
    centers = cells[["centroid-0", "centroid-1"]].to_numpy()[labels[found] - 1]
    far = np.hypot(known["y"].to_numpy()[found] - centers[:, 0], known["x"].to_numpy()[found] - centers[:, 1])
    by_cell = found[np.lexsort((far, labels[found]))]
    nearest = by_cell[np.unique(labels[by_cell], return_index=True)[1]]
    alone = np.zeros_like(labels)
    alone[nearest] = labels[nearest]
    return alone


def agreement(types: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Adjusted Rand index (``ari``) and normalised mutual information (``nmi``) of the types ``(n,)`` and the
    clusters ``(n,)`` of the same cells, and ``matched``, their number n; None for no cells."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    if not len(types):
        return {"ari": None, "nmi": None, "matched": 0}
    return {
        "ari": float(adjusted_rand_score(types, clusters)),
        "nmi": float(normalized_mutual_info_score(types, clusters)),
        "matched": len(types),
    }


def tell(result: dict[str, Any]) -> str:
    """A result of `score_study` as text: ARI and NMI, and a table of types by clusters."""
    head = f"{result['matched']:,} of {result['cells']:,} cells with a known type were found"
    if result["ari"] is None:
        return head
    rows = [["", *result["groups"]]]
    rows += [
        [kind, *map(str, counts)] for kind, counts in zip(result["types"], result["contingency"], strict=True)
    ]
    return f"{head}: ARI {result['ari']:.3f}, NMI {result['nmi']:.3f}\n{table(rows)}"
