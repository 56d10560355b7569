"""Groups of a study or model by other names, or joined; a study's tables, labels and pictures follow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daskcell.clustering.names import ClusterNames
from daskcell.errors import InputError
from daskcell.images.sources import Source
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.reporting import bring_report_up_to_date
from daskcell.pipeline.reuse_model import find_model
from daskcell.pipeline.runner import Run
from daskcell.pipeline.slide import missing_stages
from daskcell.pipeline.upgrade import upgrade
from daskcell.pipeline.worker_pool import WorkerPool
from daskcell.storage.lock import Lock
from daskcell.study import Study, read_record
from daskcell.study.record import FORMAT


def edit_clusters(
    path: str | os.PathLike[str],
    change: Callable[[ClusterNames, int], ClusterNames],
    progress: Progress | None = None,
) -> None:
    """Name, merge or split groups of a study or of a saved model.

    Parameters
    ----------
    path
        A study, whose tables, labels and pictures are brought up to date, or a model's folder.
    change
        From the present `ClusterNames` and the number of fitted groups to the new one.

    Raises
    ------
    DaskcellError
        There are no groups or none of that name, or another run works on the study.
    """
    folder = find_model(path)
    if folder == Path(path) or read_record(Path(path)) is None:
        change(ClusterNames.load(folder), _size(folder)).save(folder)
        return
    study = Study(Path(path))
    progress = progress or Progress()
    with Lock(study.out) as lock:
        upgrade(study.out)
        study.record.update(format=FORMAT)
        change(ClusterNames.load(folder), _size(folder)).save(folder)
        update_slides(study, lock, progress)
        bring_report_up_to_date(study)


def update_slides(study: Study, lock: Lock, progress: Progress) -> None:
    """Bring every slide's table, labels and pictures to the present names, under the settings of the last
    run; slides that are not described yet wait for `run`."""
    weights = study.record.get("weights", {})
    ledgers = {name: study.record.ledger(name) for name in study.slides}
    sources = [
        Source(name, tuple(file["path"] for file in ledger.files))
        for name, ledger in ledgers.items()
        if ledger.entry("describe")
    ]
    run = Run(study, sources, study.config, weights, lock, progress, False)
    jobs = [run.job(source.name, study.record.clusters_key) for source in sources]
    jobs = [job for job in jobs if missing_stages(job, study)]
    progress.begin(dict.fromkeys(run.sources, 1.0), {job.slide: list(job.stages) for job in jobs})
    with contextlib.ExitStack() as stack:
        run.process(jobs, WorkerPool(study.out, None, study.config, stack, run.on_task))
    run.write_failures()
    run.sweep_scratch()


def cluster_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The groups that are shown: number, name, cells of the fit, their share, and the fitted groups in it."""
    from daskcell.clustering import load_clusters

    model = load_clusters(find_model(path))
    shown = model.naming.display_ids(model.k)
    total = max(int(model.counts_.sum()), 1)
    rows = []
    for i, title in enumerate(model.naming.titles(model.k)):
        if title is not None:
            parts = [j for j in range(model.k) if shown[j] == i]
            cells = int(model.counts_[parts].sum())
            rows.append({"group": i, "name": title, "cells": cells, "share": cells / total, "parts": parts})
    return rows


def _size(folder: Path) -> int:
    import json

    try:
        return int(json.loads((folder / "model.json").read_text())["k"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} holds no cluster model ({type(error).__name__}: {error}).") from None
