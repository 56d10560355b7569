"""From disk to disk: the cells table and the features of one slide.

    labels/cells ──> records ──> readings ──> one file a task ──> table.parquet, features.zarr
                     (a task a block)  (tasks of several blocks)    (rows put in order of label)

Every task reads its own pixels from the OME-Zarr and writes what it found to the scratch folder; only counts
travel. What a killed run left there whole is used again, so the folder must belong to one set of settings and
labels.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.config import FeatureSettings
from daskcell.disk import remove
from daskcell.features.crops import (
    Framing,
    Sample,
    background_sample,
    crop_batches,
    freeze_framing,
    sample_boxes,
)
from daskcell.features.encoders import EncoderSpec, encoder_spec, load
from daskcell.features.measurements import (
    PLACE_COLUMNS,
    SHAPE_COLUMNS,
    measure_block,
    measurement_columns,
    to_table,
)
from daskcell.features.objects import Reading, block_records, merge_records, plan_readings
from daskcell.geometry import Box, Grid

if TYPE_CHECKING:
    from daskcell.compute import Workers
    from daskcell.preprocess import Plan

CHUNK = 8192
"""Cells in a chunk of the features and in a row group of the table."""
SHARD = 8 * CHUNK
_SAMPLE_GROUP = 16
_FULL_TASK = 512  # cells that make a task worth its start, so that sparse blocks share one


@dataclass(frozen=True)
class Slide:
    """Where a slide's pixels are and how they become features; carried by every task."""

    path: str
    labels: str
    plan: Plan
    spec: EncoderSpec
    settings: FeatureSettings
    shape: tuple[int, int]

    def cells(self, box: Box) -> np.ndarray:
        from daskcell.images import read_labels

        return read_labels(self.path, self.labels, box)

    def pixels(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of `box` as they are, and as they are in the preprocessed whole image."""
        from daskcell.images import read_block
        from daskcell.preprocess import apply_block

        grown = box.grow(self.plan.halo).clip(self.shape)
        raw = read_block(self.path, grown)
        inner = (slice(None), *box.within(grown))
        return raw[inner], apply_block(raw, self.plan, grown)[inner]


def describe_slide(
    zarr_path: str | Path,
    table_path: str | Path,
    features_path: str | Path,
    settings: FeatureSettings,
    plan: Plan,
    workers: Workers,
    block: int,
    scratch: str | Path,
    *,
    labels: str = "cells",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure and encode all cells of a slide.

    Parameters
    ----------
    zarr_path
        OME-Zarr image with the label image `labels`.
    table_path, features_path
        Parquet file and Zarr array ``(n, d)`` float32 to write, row i for label i + 1; each appears whole or
        not at all, and replaces what was there.
    settings, plan
        Crops are made from the preprocessed image; brightness is measured in the raw channels.
    workers
        Where tasks run.
    block
        Side in pixels of the blocks. It changes no result.
    scratch
        Folder that all workers see; removed at the end.
    labels
        Name of the label image.
    device
        ``cpu``, or ``cuda`` on the workers that have it.
    progress
        Called with the number of cells done and of all cells.

    Returns
    -------
    dict
        ``cells``, ``features`` (per cell), ``missing`` (labels up to the largest that no pixel has).

    Raises
    ------
    WeightsError
        The encoder's weights are not on this machine; before any work.
    """
    from daskcell.images import image_info

    spec = encoder_spec(
        settings.encoder,
        layer=settings.layer,
        size=settings.size,
        batch_size=settings.batch_size,
        device=device,
    )
    info = image_info(zarr_path)
    slide = Slide(str(zarr_path), labels, plan, spec, settings, (info.shape[1], info.shape[2]))
    folder = Path(scratch, str(block))  # blocks of another size are other files
    folder.mkdir(parents=True, exist_ok=True)
    grid = Grid.regular(slide.shape, block)
    records = _find_cells(slide, grid, workers, folder)
    n = int(records["label"].max()) if len(records) else 0
    framing = _freeze(slide, workers)
    tasks = _share_out(plan_readings(records, grid, settings.margin, settings.window))
    parts, width = _describe(slide, tasks, framing, workers, folder, progress, len(records))
    if width is None:
        width = _ask(workers, _width, spec)
    columns = measurement_columns(info.channels) if settings.measurements else list(PLACE_COLUMNS)
    where = _locate(records, tasks, n, folder)
    # One task, so that the rows do not travel through this process.
    window = workers.window()
    made_of = {"encoder": settings.encoder, "layer": settings.layer, "fingerprint": spec.fingerprint} | {
        name: getattr(settings, name) for name in ("size", "margin", "window", "mask", "channels")
    }
    window.submit("table", _write_table, str(table_path), parts, where, n, columns, info.pixel_size)
    window.submit("features", _write_features, str(features_path), parts, where, n, width, made_of)
    for _ in window:
        pass
    remove(Path(scratch))
    return {"cells": len(records), "features": width, "missing": n - len(records)}


# -- where the cells are ------------------------------------------------------------------------------


def _find_cells(slide: Slide, grid: Grid, workers: Workers, folder: Path) -> np.ndarray:
    window = workers.window()
    for i, j in grid:
        path = folder / f"records-{i}-{j}.npy"
        if not path.exists():
            window.submit((i, j), _records_task, slide, grid.core((i, j)), str(path))
    for _ in window:
        pass
    return merge_records(np.load(folder / f"records-{i}-{j}.npy") for i, j in grid)


def _records_task(slide: Slide, core: Box, path: str) -> None:
    _save(path, block_records(slide.cells(core), (core.y0, core.x0)))


def _freeze(slide: Slide, workers: Workers) -> Framing:
    boxes, step = sample_boxes(slide.shape)
    window = workers.window()
    for start in range(0, len(boxes), _SAMPLE_GROUP):
        window.submit(start, _sample_task, slide, boxes[start : start + _SAMPLE_GROUP], step)
    found = dict(window)
    settings = slide.settings
    return freeze_framing(
        [sample for start in sorted(found) for sample in found[start]],
        size=_ask(workers, _crop_size, slide.spec),
        margin=settings.margin,
        window=settings.window,
        mask=settings.mask,
        channels=settings.channels,
    )


def _sample_task(slide: Slide, boxes: Sequence[Box], step: int) -> list[Sample]:
    return [background_sample(slide.pixels(box)[1], slide.cells(box), step) for box in boxes]


def _ask(workers: Workers, question: Callable[[EncoderSpec], int], spec: EncoderSpec) -> int:
    """Something about the network, from a process that has to load it anyway."""
    window = workers.window()
    window.submit("ask", question, spec, kind="network")
    ((_, answer),) = window
    return answer


def _crop_size(spec: EncoderSpec) -> int:
    return load(spec).size


def _width(spec: EncoderSpec) -> int:
    return load(spec).width


# -- describing them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Readings that are worked on together, so that the network's batches are full."""

    number: int
    readings: tuple[Reading, ...]

    @property
    def count(self) -> int:
        return sum(len(reading.records) for reading in self.readings)


def _share_out(plans: dict[int, list[Reading]]) -> list[Task]:
    tasks: list[Task] = []
    waiting: list[Reading] = []
    for number in sorted(plans):
        waiting += plans[number]
        if sum(len(reading.records) for reading in waiting) >= _FULL_TASK:
            tasks.append(Task(len(tasks), tuple(waiting)))
            waiting = []
    if waiting:
        tasks.append(Task(len(tasks), tuple(waiting)))
    return tasks


def _describe(
    slide: Slide,
    tasks: list[Task],
    framing: Framing,
    workers: Workers,
    folder: Path,
    progress: Callable[[int, int], None] | None,
    total: int,
) -> tuple[list[tuple[str, str]], int | None]:
    """Names of the files of measurements and vectors of every task, and the number of features."""
    parts = [
        (str(folder / f"measured-{task.number}.npy"), str(folder / f"vectors-{task.number}.npy"))
        for task in tasks
    ]
    done = 0
    window = workers.window()
    for task, (measured, vectors) in zip(tasks, parts, strict=True):
        if os.path.exists(measured) and os.path.exists(vectors):
            done += task.count
        else:
            window.submit(task.count, _task, slide, task, framing, measured, vectors, kind="network")
    for count, _ in window:
        done += count
        if progress is not None:
            progress(done, total)
    if not parts:
        return parts, None
    return parts, np.load(parts[0][1], mmap_mode="r").shape[1]


def _task(slide: Slide, task: Task, framing: Framing, measured: str, vectors: str) -> None:
    encoder = load(slide.spec)
    rows: list[np.ndarray] = []
    found = list(encoder.stream(_crops(slide, task, framing, rows, encoder.batch_size)))
    _save(measured, np.concatenate(rows))
    _save(vectors, np.concatenate(found))


def _crops(
    slide: Slide, task: Task, framing: Framing, rows: list[np.ndarray], batch: int
) -> Iterator[np.ndarray]:
    """Crops of a task's cells, one reading in memory at a time; their measurements are put into `rows`."""
    for reading in task.readings:
        cells = slide.cells(reading.box)
        raw, prepared = slide.pixels(reading.box)
        everything = slide.settings.measurements
        found = measure_block(cells, raw if everything else None, reading.box, reading.records, slide.shape)
        rows.append(found if everything else found[:, [SHAPE_COLUMNS.index(name) for name in PLACE_COLUMNS]])
        yield from crop_batches(prepared, cells, reading.box, reading.records, framing, batch)


# -- putting them in order ----------------------------------------------------------------------------


def _locate(records: np.ndarray, tasks: list[Task], n: int, folder: Path) -> str:
    """File of where each label's row is: ``(n, 2)`` of task and row in its file; -1 where there is none."""
    where = np.full((n, 2), -1, np.int64)
    for task in tasks:
        ids = np.concatenate([reading.records["label"] for reading in task.readings])
        where[ids - 1, 0] = task.number
        where[ids - 1, 1] = np.arange(len(ids))
    path = str(folder / "where.npy")
    _save(path, where)
    return path


def _gathered(files: Sequence[str], where: np.ndarray, width: int, dtype: Any) -> np.ndarray:
    """Rows for a stretch of labels from all the files that hold some; NaN where there is none."""
    out = np.full((len(where), width), np.nan, dtype)
    for number in np.unique(where[:, 0]):
        if number >= 0:
            some = where[:, 0] == number
            out[some] = np.load(files[number], mmap_mode="r")[where[some, 1]]
    return out


def _write_table(
    target: str,
    parts: list[tuple[str, str]],
    where_path: str,
    n: int,
    columns: list[str],
    pixel_size: tuple[float, float] | None,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = np.load(where_path, mmap_mode="r")
    files = [measured for measured, _ in parts]
    empty = to_table(np.zeros(0, int), np.zeros((0, len(columns))), columns, pixel_size, microns=True)
    schema = pa.Schema.from_pandas(empty, preserve_index=False)
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, n, CHUNK):
                some = np.asarray(where[start : start + CHUNK])
                there = np.flatnonzero(some[:, 0] >= 0)
                values = _gathered(files, some[there], len(columns), np.float64)
                table = to_table(
                    start + 1 + there,
                    values,
                    columns,
                    pixel_size,
                    n=len(some),
                    first=start + 1,
                    microns=True,
                )
                writer.write_table(pa.Table.from_pandas(table, schema, preserve_index=False))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_features(
    target: str,
    parts: list[tuple[str, str]],
    where_path: str,
    n: int,
    width: int,
    made_of: dict[str, Any],
) -> None:
    import zarr

    where = np.load(where_path, mmap_mode="r")
    files = [vectors for _, vectors in parts]
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        array = zarr.create_array(
            str(temporary),
            shape=(n, width),
            chunks=(CHUNK, width),
            shards=(SHARD, width) if n > CHUNK else None,
            dtype=np.float32,
            fill_value=float("nan"),
            dimension_names=["cell", "feature"],
            attributes={"daskcell": made_of},
        )
        for start in range(0, n, SHARD):
            array[start : start + SHARD] = _gathered(
                files, np.asarray(where[start : start + SHARD]), width, np.float32
            )
        remove(path)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def _save(path: str, array: np.ndarray) -> None:
    """Write an array so that it appears whole or not at all."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)
