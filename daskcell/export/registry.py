"""Formats that a study can be exported to: those here, and those of other packages.

Another package adds one with an entry point of the group ``daskcell.exporters`` that names an `Exporter`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from daskcell.errors import InputError

if TYPE_CHECKING:
    from daskcell.study import Study

GROUP = "daskcell.exporters"


@dataclass(frozen=True)
class Exporter:
    """A format: how the cells of a slide, or of a whole study, become a file."""

    suffix: str
    """Ending of the file, such as ``.geojson.gz``; the rest of its name is that of the slide."""
    write: Callable[[Study, list[str], Path], int]
    """Writes the cells of some slides of a study to a path, and returns how many cells they have."""
    together: bool = False
    """Whether one file, ``cells<suffix>``, holds all slides; else each slide has a file of its own."""


_OWN = {
    "anndata": "cells, features and places as one .h5ad file, for scanpy and squidpy.",
    "csv": "tables with one row per cell, for spreadsheets, R and pandas.",
    "geojson": "outlines, clusters with their colours and measurements, for QuPath and GIS programs.",
    "masks": "label images (TIFF), each pixel with the number of its cell, for ImageJ and CellProfiler.",
    "rois": "outlines as ZIP files of regions of interest, for ImageJ's ROI manager.",
    "seg": "label images as Cellpose's _seg.npy, for its window and for training.",
}


def exporters() -> dict[str, str]:
    """Names of the formats, each with a sentence that says what it is."""
    others = {point.name: f"what {point.value} writes." for point in entry_points(group=GROUP)}
    return others | _OWN


def find_exporter(name: str) -> Exporter:
    """The `Exporter` of a format.

    Raises
    ------
    InputError
        There is none of that name, or it cannot be imported.
    """
    found = exporters()
    if name not in found:
        raise InputError(f"There is no format {name!r} to export to. There are: {', '.join(sorted(found))}.")
    if name in _OWN:
        return import_module(f"daskcell.export.{name}").EXPORTER
    (point,) = (point for point in entry_points(group=GROUP) if point.name == name)
    try:
        exporter = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"The format {name!r} cannot be loaded from {point.value}: {error}.") from error
    if not isinstance(exporter, Exporter):
        raise InputError(f"The format {name!r} is no daskcell.export.Exporter, but {exporter!r}.")
    return exporter


def export_study(
    study: Study | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    slides: Sequence[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> int:
    """Write the cells of a study in the format of other programs.

    Parameters
    ----------
    study : Study or path
        Cells must have been described; clusters are written where there are any.
    out : path
        New or empty folder, or one with the same export that was cut off, which is continued.
    format : str
        One of `exporters`, such as ``"geojson"``.
    slides : list of str, optional
        Only these.
    progress : callable, optional
        Called with the name of each file and its number of cells.

    Returns
    -------
    int
        Cells written.

    Raises
    ------
    StudyError
        A slide has not been described yet.
    InputError
        `out` holds something else, or there is no such slide or format.
    """
    from daskcell.export.folder import begin, choose
    from daskcell.storage.atomic import atomic_path
    from daskcell.study import Study

    exporter = find_exporter(format)
    study = study if isinstance(study, Study) else Study(study)
    out = Path(out)
    chosen = choose(study, slides)
    files = {"cells": chosen} if exporter.together else {name: [name] for name in chosen}
    unfinished = begin(out, study, {"format": format, "slides": chosen})
    total = 0
    for name, own in files.items():
        path = out / f"{name}{exporter.suffix}"
        if path.exists():  # of a call that was cut off
            continue
        with atomic_path(path) as temporary:
            count = exporter.write(study, own, temporary)
        total += count
        if progress is not None:
            progress(path.name, count)
    unfinished.unlink()
    return total
