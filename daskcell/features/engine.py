"""From disk to disk: the cells table and the features of one slide.

    index of labels/cells ──> reads ──> one file a task ──> table.parquet, features.zarr
                             (tasks of several blocks)    (rows put in order of label)

Every task reads its own pixels from the OME-Zarr and writes what it found to the scratch folder; only counts
travel. What a killed run left there whole is used again, so the folder must belong to one set of settings and
labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.config import FeatureSettings
from daskcell.features.cell_index import merge_records
from daskcell.features.crops import sample_boxes
from daskcell.features.embedders import Embedder, Task, make_embedder, make_tasks
from daskcell.features.encoders import EncoderSpec, encoder_spec, load
from daskcell.features.measurements import measurement_columns
from daskcell.features.tasks import FULL_TASK, block_cells, describe, embed, measure, sample
from daskcell.features.textures import Greys, fit_greys
from daskcell.features.writers import locate, write_features, write_table
from daskcell.geometry import Box, Grid
from daskcell.segmentation.index import read_index
from daskcell.storage.atomic import remove, save_arrays

if TYPE_CHECKING:
    from daskcell.compute import Workers
    from daskcell.preprocess import Plan, PreparedImage

_SAMPLE_GROUP = 16


@dataclass(frozen=True)
class Slide:
    """Where a slide's pixels are and how they become features; carried by every task."""

    image: PreparedImage
    labels: str
    spec: EncoderSpec
    settings: FeatureSettings

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.shape

    def cells(self, box: Box) -> np.ndarray:
        from daskcell.images import read_labels

        return read_labels(self.image.path, self.labels, box)

    def pixels(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of `box` as they are, and as they are in the preprocessed whole image."""
        return self.image.read_both(box)


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
    device: str = "cpu",
    index: str | Path | None = None,
) -> dict[str, Any]:
    """Measure and encode all cells of a slide.

    Parameters
    ----------
    zarr_path
        OME-Zarr image with the label image ``cells``.
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
    device
        ``cpu``, or ``cuda`` on the workers that have it.
    index
        What `segmentation.index` has written of the labels. None, or no such file: the labels are looked
        through, a task a block.

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
    from daskcell.preprocess import PreparedImage

    spec = settings_spec(settings, device)
    info = image_info(zarr_path)
    slide = Slide(PreparedImage(str(zarr_path), plan.kept_in(scratch)), "cells", spec, settings)
    folder = Path(scratch, str(block))  # blocks of another size are other files
    folder.mkdir(parents=True, exist_ok=True)
    grid = Grid.regular(slide.shape, block)
    records = find_cells(slide, grid, workers, folder, index)
    n = int(records["label"].max()) if len(records) else 0
    embedder, greys = fit_embedder(slide, records, workers)
    tasks = make_tasks(embedder.plan(records, grid), FULL_TASK)
    parts, width = _describe(slide, tasks, embedder, greys, workers, folder)
    if width is None:
        width = _ask(workers, _width, embedder)
    columns = measurement_columns(info.channels, settings.measured)
    where = locate(records, tasks, n, folder)
    # One task, so that the rows do not travel through this process.
    window = workers.window()
    made_of = {"fingerprint": spec.fingerprint} | {
        name: value for name, value in settings.model_dump(mode="json").items() if name not in _NOT_MADE_OF
    }
    window.submit("table", write_table, str(table_path), parts, where, n, columns, info.pixel_size)
    window.submit("features", write_features, str(features_path), parts, where, n, width, made_of)
    for _ in window:
        pass
    remove(Path(scratch))
    return {"cells": len(records), "features": width, "missing": n - len(records)}


_NOT_MADE_OF = ("batch_size", "measurements")


def settings_spec(settings: FeatureSettings, device: str = "cpu") -> EncoderSpec:
    """`encoder_spec` of the settings; raises what it raises."""
    return encoder_spec(
        settings.encoder,
        layer=settings.layer,
        size=settings.size,
        batch_size=settings.batch_size,
        device=device,
        precision=settings.precision,
        pooling=settings.pooling,
    )


# -- where the cells are ------------------------------------------------------------------------------


def find_cells(
    slide: Slide, grid: Grid, workers: Workers, folder: Path, index: str | Path | None = None
) -> np.ndarray:
    """Records of all cells of the slide, from its index where there is one."""
    if index is not None and os.path.exists(index):
        return read_index(index)
    window = workers.part(0.0, len(grid)).window()
    for i, j in grid:
        path = folder / f"records-{i}-{j}.npy"
        if not path.exists():
            window.submit((i, j), _records_task, slide, grid.core((i, j)), str(path))
    for _ in window:
        pass
    return merge_records(np.load(folder / f"records-{i}-{j}.npy") for i, j in grid)


def _records_task(slide: Slide, core: Box, path: str) -> None:
    save_arrays(path, block_cells(slide, core))


def fit_embedder(slide: Slide, records: np.ndarray, workers: Workers) -> tuple[Embedder, Greys]:
    """What every block must know of the whole slide: how vectors are made, and what is dark and bright."""
    boxes, step = sample_boxes(slide.shape)
    window = workers.window()
    for start in range(0, len(boxes), _SAMPLE_GROUP):
        window.submit(start, sample, slide, boxes[start : start + _SAMPLE_GROUP], step)
    found = dict(window)
    samples = [sample for start in sorted(found) for sample in found[start]]
    settings = slide.settings
    embedder = make_embedder(
        slide.spec,
        [prepared for prepared, _ in samples],
        records,
        slide.shape,
        size=_ask(workers, _crop_size, slide.spec) if settings.pooling == "crop" else None,
        pooling=settings.pooling,
        scale=settings.scale,
        margin=settings.margin,
        window=settings.window,
        mask=settings.mask,
        channels=settings.channels,
    )
    return embedder, fit_greys([raw for _, raw in samples])


def _ask(workers: Workers, question: Callable[[Any], int], about: Any) -> int:
    """Something about the network, from a process that has to load it anyway."""
    window = workers.window()
    window.submit("ask", question, about, kind="network")
    ((_, answer),) = window
    return answer


def _crop_size(spec: EncoderSpec) -> int:
    return load(spec).size


def _width(embedder: Embedder) -> int:
    return embedder.width


# -- describing them ----------------------------------------------------------------------------------


def _describe(
    slide: Slide,
    tasks: list[Task],
    embedder: Embedder,
    greys: Greys,
    workers: Workers,
    folder: Path,
) -> tuple[list[tuple[str, str]], int | None]:
    """Names of the files of measurements and vectors of every task, and the number of features."""
    parts = [
        (str(folder / f"measured-{task.number}.npy"), str(folder / f"vectors-{task.number}.npy"))
        for task in tasks
    ]
    # Measuring is no work for a GPU; where both are done by the same workers, pixels are read once.
    apart = "GPU" in workers.labels
    window = workers.part(0.9, len(tasks) * (2 if apart else 1)).window()
    for task, (measured, vectors) in zip(tasks, parts, strict=True):
        if not os.path.exists(measured) and (apart or os.path.exists(vectors)):
            window.submit(task.number, _measure, slide, task, greys, measured)
        if os.path.exists(vectors):
            continue
        if apart or os.path.exists(measured):
            window.submit(task.number, _encode, slide, task, embedder, vectors, kind="network")
        else:
            window.submit(task.number, _task, slide, task, embedder, greys, measured, vectors, kind="network")
    for _ in window:
        pass
    if not parts:
        return parts, None
    return parts, np.load(parts[0][1], mmap_mode="r").shape[1]


def _task(slide: Slide, task: Task, embedder: Embedder, greys: Greys, measured: str, vectors: str) -> None:
    rows, found = describe(slide, task.reads, embedder, greys, slide.settings.measured)
    save_arrays(measured, rows)
    save_arrays(vectors, found)


def _measure(slide: Slide, task: Task, greys: Greys, measured: str) -> None:
    save_arrays(measured, measure(slide, task.reads, greys, slide.settings.measured))


def _encode(slide: Slide, task: Task, embedder: Embedder, vectors: str) -> None:
    save_arrays(vectors, embed(slide, task.reads, embedder))
