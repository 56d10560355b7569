"""Rename, merge and split clusters of a study or model, and update the study's tables, labels and images."""

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
    """Rename, merge or split clusters of a study or of a saved model.

    Parameters
    ----------
    path : path
        A study, whose tables, labels and images are updated, or the folder of a saved model.
    change : callable
        From the present `ClusterNames` and the number of fitted clusters to the new `ClusterNames`.
    progress : Progress, optional

    Raises
    ------
    DaskcellError
        There are no clusters, there is none of that name, or another run is working on the study.
    """
    folder = find_model(path)
    if folder == Path(path) or read_record(Path(path)) is None:
        change(ClusterNames.load(folder), _size(folder)).save(folder)
        return
    study = Study(Path(path))
    progress = progress or Progress()
    with Lock(study.out) as lock:
        study.record.own_outputs()
        upgrade(study.out)
        study.record.update(format=FORMAT)
        change(ClusterNames.load(folder), _size(folder)).save(folder)
        update_slides(study, lock, progress)
        bring_report_up_to_date(study)


def update_slides(study: Study, lock: Lock, progress: Progress) -> None:
    """Update every slide's table, labels and images to the present names, with the settings of the last run.

    Slides that are not described yet are left to `run`.
    """
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
    """A dict for each cluster that is shown: ``cluster`` (number), ``name``, ``cells`` of the fit, their
    ``share``, and ``parts`` (the fitted clusters merged into it)."""
    from daskcell.clustering import load_clusters

    model = load_clusters(find_model(path))
    ids = model.naming.display_ids(model.k)
    total = max(int(model.counts_.sum()), 1)
    rows = []
    for i, title in enumerate(model.naming.titles(model.k)):
        if title is not None:
            parts = [j for j in range(model.k) if ids[j] == i]
            cells = int(model.counts_[parts].sum())
            rows.append({"cluster": i, "name": title, "cells": cells, "share": cells / total, "parts": parts})
    return rows


def _size(folder: Path) -> int:
    import json

    try:
        return int(json.loads((folder / "model.json").read_text())["k"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} holds no cluster model ({type(error).__name__}: {error}).") from None
