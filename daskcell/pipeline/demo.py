"""A complete run on generated images whose truth is known: draw, run, compare.

demo/
  pictures/setA_red.tif ...      four data sets of stained cells, one file per channel
  truth/setA.tif, setA.csv       label image of the cells, and their types
  study/                         the result of `daskcell run`
  scores.json
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daskcell.config import parse_config
from daskcell.errors import StudyError
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.status import open_first
from daskcell.storage.atomic import write_atomic, write_json
from daskcell.study import Study

SETTINGS: dict[str, Any] = {
    "preprocess": {
        "reconstruct": {"colors": ["red", "green", "blue", "cyan"]},
        "histogram": {"method": "stretch"},
    },
    "segment": {"model": "tiny"},
    "features": {"encoder": "tiny"},
    "cluster": {"k": 11},
    "output": {"preprocessed": True},
}
_FIRST_SEED = 20


@dataclass(frozen=True)
class Demo:
    """Results of a demo."""

    study: Study
    scores: dict[str, dict[str, float]]
    """By data set, and ``all``: cells, found, precision, recall, f1 (IoU 0.5), ari of the matched cells."""
    text: str


def demo(
    out: str | Path,
    *,
    fields: int = 4,
    size: int = 1024,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Demo:
    """Draw data sets of stained cells of 11 types, run all stages, and compare with the truth.

    The same call on the same folder continues.

    Parameters
    ----------
    out : path
        New or empty folder, or that of the same demo.
    fields : int
        Number of data sets.
    size : int
        Side of each in pixels.
    workers : int, optional
        As in the settings: ``compute.workers``.
    progress : Progress, optional

    Raises
    ------
    StudyError
        `out` holds anything else.
    """
    from daskcell.pipeline import run

    out = Path(out)
    draw(out, fields, size)
    settings = parse_config(SETTINGS | {"compute": {"workers": workers}}, "demo")
    study = run(out / "pictures", out / "study", settings, progress=progress)
    scores = compare(study, out / "truth")
    write_json(out / "scores.json", scores)
    return Demo(study, scores, tell(study, scores))


def names(fields: int) -> list[str]:
    """``setA``, ``setB``, ..., ``setZ``, ``set27``, ..."""
    letters = string.ascii_uppercase
    return [f"set{letters[i] if i < len(letters) else i + 1}" for i in range(fields)]


def draw(out: Path, fields: int, size: int) -> None:
    """Write the images and their truth, unless they exist."""
    from daskcell.evaluation.generated import CELL_TYPES, CHANNELS, synthesize_field

    plan = {"demo": 1, "fields": fields, "size": size}
    mark = out / "demo.json"
    if mark.exists():
        if _read(mark) != plan:
            raise StudyError(
                f"{out} holds a demo of another size. Please remove it or choose another folder."
            )
    elif out.exists() and any(out.iterdir()):
        raise StudyError(f"{out} holds something else. Please choose a new or empty folder.")
    else:
        write_json(mark, plan)  # from now on, files of these names are ours
    for number, name in enumerate(names(fields)):
        types = out / "truth" / f"{name}.csv"  # written last: if it exists, so do the others
        if types.exists():
            continue
        field = synthesize_field((size, size), seed=_FIRST_SEED + number)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            _write_tiff(out / "pictures" / f"{name}_{channel}.tif", pixels)
        _write_tiff(out / "truth" / f"{name}.tif", field.labels)
        rows = [f"{i + 1},{kind},{CELL_TYPES[kind].name}" for i, kind in enumerate(field.types)]
        write_atomic(types, ("\n".join(["label,type,name", *rows]) + "\n").encode())


def compare(study: Study, truth: Path) -> dict[str, dict[str, float]]:
    """Score a study's cells and clusters against the truth, by slide and over all."""
    import numpy as np
    import pandas as pd
    import tifffile

    from daskcell.evaluation import Counts, match_cells
    from daskcell.geometry import Box
    from daskcell.images import read_labels

    scores: dict[str, dict[str, float]] = {}
    total, all_types, all_clusters = Counts(), [], []
    for name in study.slides:
        if study.record.ledger(name).entry("describe") is None:
            continue
        true = tifffile.imread(truth / f"{name}.tif")
        found = read_labels(study.paths.image(name), "cells", Box(0, 0, *true.shape))
        a, b = match_cells(true, found, 0.5)
        types = pd.read_csv(truth / f"{name}.csv")["type"].to_numpy()
        counts = Counts(len(a), int(found.max()) - len(a), len(types) - len(a))
        cells = study.cells(name)
        # Row i of the table is label i + 1.
        clusters = cells["cluster"].to_numpy()[b - 1] if "cluster" in cells else np.zeros(len(b), int)
        scores[name] = _row(counts, types[a - 1], clusters)
        total += counts
        all_types.append(types[a - 1])
        all_clusters.append(clusters)
    if scores:
        scores["all"] = _row(total, np.concatenate(all_types), np.concatenate(all_clusters))
    return scores


def _row(counts: Any, types: Any, clusters: Any) -> dict[str, float]:
    from daskcell.evaluation.truth import agreement

    return {
        "cells": counts.tp + counts.fn,
        "found": counts.tp + counts.fp,
        "precision": round(counts.precision, 4),
        "recall": round(counts.recall, 4),
        "f1": round(counts.f1, 4),
        "ari": round(agreement(types, clusters)["ari"] or 0.0, 4),
    }


def tell(study: Study, scores: dict[str, dict[str, float]]) -> str:
    """The scores as text, and which files to open."""
    header = f"{'':8}{'cells':>7}{'found':>7}{'precision':>11}{'recall':>8}{'F1':>7}{'ARI':>7}"
    lines = [header] + [
        f"{name:8}{row['cells']:>7}{row['found']:>7}{row['precision']:>11.3f}{row['recall']:>8.3f}"
        f"{row['f1']:>7.3f}{row['ari']:>7.3f}"
        for name, row in scores.items()
    ]
    lines += [
        "(cells found at IoU 0.5; ARI: clusters of the matched cells against their 11 types; 0 is chance)",
        *open_first(study),
        f"tables: {study.out / 'tables' / 'cells'}",
        f"napari or any OME-Zarr viewer: {study.out / 'images'}",
    ]
    lines += [f"set aside: {f['slide'] or 'all'} ({f['stage']}): {f['error']}" for f in study.failures]
    return "\n".join(lines)


def _write_tiff(path: Path, pixels: Any) -> None:
    import io

    import tifffile

    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, compression="zlib", photometric="minisblack", metadata=None)
    write_atomic(path, stream.getvalue())


def _read(path: Path) -> Any:
    import json

    try:
        return json.loads(path.read_text())
    except ValueError:
        return None
