"""The cells of a study as a data set of single-cell images: Parquet shards, or PNG files by cluster.

Every task cuts the crops of its cells in the same way as for the features and writes its own files; no crop
passes through this process.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from daskcell.errors import InputError
from daskcell.export.folder import SCRATCH, begin, choose
from daskcell.storage.atomic import write_atomic

if TYPE_CHECKING:
    from daskcell.compute import Workers
    from daskcell.features.crops import Framing
    from daskcell.features.embedders import Task
    from daskcell.features.engine import Slide
    from daskcell.study import Study

_SHARD = 4096  # minimum number of cells in a shard
_LIST = ".daskcell-"  # prefix of the list of a task's images
_COLUMNS = ["centroid-0", "centroid-1"]


def export_crops(
    study: Study | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "parquet",
    size: int | None = None,
    slides: list[str] | None = None,
    workers: Workers | None = None,
) -> int:
    """Write every cell of a study as a small image of its own.

    Parameters
    ----------
    study : Study or path
        Its cells must have been described; clusters are included if there are any.
    out : path
        New or empty folder, or that of the same export, interrupted, which is continued.
    format : {"parquet", "png"}
        ``parquet``: shards ``<slide>-00000.parquet`` with one row per cell and the columns ``slide``,
        ``label``, ``centroid-0`` and ``centroid-1`` (y and x in pixels), ``cluster`` (-1: none) and ``image``
        (a PNG file as bytes). ``png``, for small studies: files ``cluster-<c>/<slide>-<label>.png``, and
        ``cells.csv`` with the same columns and the name of the file.
    size : int, optional
        Side of the images in pixels; None: that of the encoder, so that the images are those the features
        were made from (rounded to 8 bits).
    slides : list of str, optional
        Only these slides.
    workers : Workers, optional
        None: this process.

    Returns
    -------
    int
        Number of cells written.

    Raises
    ------
    StudyError
        A slide has not been described yet.
    InputError
        `study` is no study, `out` holds anything else, or there is no such slide, format or size.

    Examples
    --------
    >>> study = dc.open_study("study")
    >>> dc.export_crops(study, "crops", format="png")
    32
    """
    from daskcell.study import Study

    for name, value in (("study", study), ("out", out)):
        if not isinstance(value, Study | str | os.PathLike):
            kind = type(value).__name__
            raise InputError(f"{name} must be a folder{' or a Study' * (name == 'study')}, not a {kind}.")
    if format not in ("parquet", "png"):
        raise InputError(f"format must be 'parquet' or 'png', not {format!r}.")
    if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
        raise InputError(f"size must be a number of pixels from 1 on, not {size!r}.")
    study = study if isinstance(study, Study) else Study(Path(study))
    out = Path(out)
    chosen = choose(study, slides)
    unfinished = begin(out, study, {"format": format, "size": size, "slides": chosen})
    count = sum(_export_slide(study, name, out, format, size, workers) for name in chosen)
    if format == "png":
        _gather_lists(out)
    unfinished.unlink()
    return count


def _export_slide(
    study: Study,
    name: str,
    out: Path,
    format: str,
    size: int | None,
    workers: Workers | None,
) -> int:
    import dataclasses

    from daskcell.compute import Workers
    from daskcell.features.embedders import CropEmbedder, make_tasks
    from daskcell.features.engine import Slide, find_cells, fit_embedder, settings_spec
    from daskcell.geometry import Grid

    workers = workers or Workers()
    config = study.config
    settings = config.features
    if settings.pooling == "mask":
        settings = settings.model_copy(update={"pooling": "crop"})
    slide = Slide(study.prepared(name), "cells", settings_spec(settings), settings)
    grid = Grid.regular(slide.shape, config.compute.block)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=out))
    try:
        records = find_cells(slide, grid, workers, scratch, study.paths.index(name))
        embedder, _ = fit_embedder(slide, records, workers)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    assert isinstance(embedder, CropEmbedder)
    framing = embedder.framing if size is None else dataclasses.replace(embedder.framing, size=size)
    table = _read(study.paths.table(name), _COLUMNS)
    assigned = study.record.assigned_table(name)
    if assigned is None:
        table["cluster"] = np.full(len(table["centroid-0"]), -1, np.int32)
    else:
        table |= _read(assigned, ["cluster"])
    window, done = workers.window(), 0
    for task in make_tasks(embedder.plan(records, grid), _SHARD):
        if _last_file(out, name, task, format).exists():  # by an interrupted call
            done += task.count
            continue
        labels = np.concatenate([read.records["label"] for read in task.reads])
        rows = {column: values[labels - 1] for column, values in table.items()}
        window.submit(task.count, _write_task, slide, name, task, framing, rows, str(out), format)
    return done + sum(count for count, _ in window)


def _read(path: Path, columns: list[str]) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=columns)
    return {column: table[column].to_numpy() for column in columns}


def _write_task(
    slide: Slide, name: str, task: Task, framing: Framing, rows: dict[str, np.ndarray], out: str, format: str
) -> None:
    import pandas as pd

    from daskcell.features.crops import cut_cells, resize

    labels, images = [], []
    for read in task.reads:
        cells = slide.cells(read.box)
        _, prepared = slide.pixels(read.box)
        labels += read.records["label"].tolist()
        for crop in cut_cells(prepared, cells, read.box, read.records, framing):
            images.append(_png(resize(crop, framing.size)))
    table = pd.DataFrame({"slide": name, "label": labels, **rows})
    if format == "parquet":
        table["image"] = images
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        write_atomic(_last_file(Path(out), name, task, format), buffer.getvalue())
        return
    folders = [f"cluster-{cluster}" if cluster >= 0 else "no-cluster" for cluster in rows["cluster"]]
    table["file"] = [f"{folder}/{name}-{label}.png" for folder, label in zip(folders, labels, strict=True)]
    for file, image in zip(table["file"], images, strict=True):
        target = Path(out, file)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(image)
    write_atomic(_last_file(Path(out), name, task, format), table.to_csv(index=False).encode())


def _last_file(out: Path, name: str, task: Task, format: str) -> Path:
    """The file that a task writes last: the shard, or the list of its images."""
    stem = f"{name}-{task.number:05d}"
    return out / (f"{stem}.parquet" if format == "parquet" else f"{_LIST}{stem}.csv")


def _png(crop: np.ndarray) -> bytes:
    """``(3, size, size)`` from 0 to 1 as an 8-bit PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.rint(crop.transpose(1, 2, 0) * 255).clip(0, 255).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _gather_lists(out: Path) -> None:
    """Merge the lists of the tasks into one, which is written last: it exists only once all files do."""
    import pandas as pd

    lists = sorted(out.glob(f"{_LIST}*-[0-9][0-9][0-9][0-9][0-9].csv"))
    tables = [pd.read_csv(path) for path in lists]
    if tables:
        every = pd.concat(tables).sort_values(["slide", "label"])
        write_atomic(out / "cells.csv", every.to_csv(index=False).encode())
    for path in lists:
        path.unlink()
