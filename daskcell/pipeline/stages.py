"""The stages of one slide: what each does, which files it writes, and under which keys it is done.

A stage reads what the one before has written, and returns what the ledger keeps. Whether it is to be done is
decided in `slide`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daskcell.compute import Workers
from daskcell.config import Config
from daskcell.disk import remove
from daskcell.images.sources import Source
from daskcell.study import CLUSTERS, Ledger, Study
from daskcell.study.keys import SLIDE_STAGES, flows_key, late_keys, slide_keys

LABELS = "cells"


@dataclass(frozen=True)
class Job:
    """A slide to work on: small, and fit to be sent to a worker."""

    out: str
    source: Source
    config: Config
    weights: Mapping[str, str]
    cluster_key: str | None = None
    """Content key of the groups (`Study.grouping`), for the stages that follow them. These read nothing of
    the input, which may have gone since."""
    verify: frozenset[str] = frozenset()
    """Stages whose checksums are compared where they are done; of the others, names and sizes."""

    @property
    def slide(self) -> str:
        return self.source.name

    def keys(self, ledger: Ledger) -> dict[str, str]:
        """Content keys of all stages that can be done now."""
        keys = slide_keys(self.config, ledger.files, self.weights)
        if self.cluster_key is not None:
            keys |= late_keys(self.config, keys["describe"], self.cluster_key)
        return keys

    @property
    def stages(self) -> tuple[str, ...]:
        return SLIDE_STAGES if self.cluster_key is None else ("assign", "paint")


def _convert(job: Job, study: Study, ledger: Ledger, keys: Mapping[str, str], workers: Workers) -> Any:
    from daskcell.images import convert_slide

    image = study.image(job.slide)
    labels, kept = image / "labels", study.scratch(job.slide, "labels", 0)
    if ledger.held and labels.is_dir():
        # The picture was damaged, not they: they stay if it becomes the same again.
        remove(kept)
        kept.parent.mkdir(exist_ok=True)
        labels.rename(kept)
    report = convert_slide(job.source, image, workers, job.config.input, overwrite=True)
    if kept.is_dir():
        kept.rename(labels)
    return report


def _freeze(job: Job, study: Study, ledger: Ledger, keys: Mapping[str, str], workers: Workers) -> Any:
    from daskcell.preprocess import freeze_slide

    return {"plan": freeze_slide(study.image(job.slide), job.config.preprocess, workers).to_json()}


def _plan(ledger: Ledger) -> Any:
    from daskcell.preprocess import Plan

    return Plan.from_json(ledger.result("freeze")["plan"])


def _segment(job: Job, study: Study, ledger: Ledger, keys: Mapping[str, str], workers: Workers) -> Any:
    from daskcell.segmentation.engine import segment_slide

    settings, block = job.config.segment, job.config.compute.block
    if not any(path.exists() for path in rewritten("paint", study, job.slide)):
        remove(study.image(job.slide) / "labels")  # its list was damaged: no Zarr group without
    scratch = study.scratch(job.slide, keys["segment"], block)
    flows = study.flows(job.slide) / flows_key(job.config, ledger.files, job.weights)[:16]
    if study.flows(job.slide).is_dir():
        # Of another image or under other settings: they are large, and seldom come back.
        remove(*(kept for kept in study.flows(job.slide).iterdir() if kept != flows))
    report = segment_slide(
        study.image(job.slide),
        LABELS,
        settings,
        _plan(ledger),
        workers,
        block,
        scratch,
        flows=flows if settings.keep_flows else None,
        device=job.config.compute.network_device,
    )
    remove(scratch)
    return report


def _describe(job: Job, study: Study, ledger: Ledger, keys: Mapping[str, str], workers: Workers) -> Any:
    from daskcell.features.engine import describe_slide

    block = job.config.compute.block
    scratch = study.scratch(job.slide, keys["describe"], block)
    table, features = study.table(job.slide), study.features(job.slide)
    remove(table, features)
    for path in (table, features):
        path.parent.mkdir(parents=True, exist_ok=True)
    report = describe_slide(
        study.image(job.slide),
        table,
        features,
        job.config.features,
        _plan(ledger),
        workers,
        block,
        scratch,
        device=job.config.compute.network_device,
    )
    remove(scratch)
    return report


def _export(job: Job, study: Study, ledger: Ledger, keys: Mapping[str, str], workers: Workers) -> Any:
    from daskcell.images.split import split_channels
    from daskcell.preprocess import preprocess_slide_to_tiff

    files = []
    if job.config.output.channels:
        # Under the slide's own folder: two slides may have channels of one name.
        files += split_channels(study.image(job.slide), study.channels / job.slide)
    if job.config.output.preprocessed:
        target = study.preprocessed / f"{job.slide}.tif"
        target.parent.mkdir(parents=True, exist_ok=True)
        preprocess_slide_to_tiff(study.image(job.slide), _plan(ledger), target)
        files.append(target)
    return {"files": [str(file.relative_to(study.out)) for file in files]}


def _assign(job: Job, study: Study, ledger: Ledger, keys: Mapping[str, str], workers: Workers) -> Any:
    from daskcell.clustering import predict_slide

    return predict_slide(study.features(job.slide), study.table(job.slide), study.clusters)


def _paint(job: Job, study: Study, ledger: Ledger, keys: Mapping[str, str], workers: Workers) -> Any:
    from daskcell.clustering.naming import Naming
    from daskcell.overlays import write_cluster_labels, write_overlay

    image, table = study.image(job.slide), study.table(job.slide)
    k = study.ledger(CLUSTERS).result("cluster")["k"]
    names = Naming.load(study.clusters).titles(k)
    counts = write_cluster_labels(image, table, k, workers, job.config.compute.block, names=names)
    output = job.config.output
    files = write_overlay(
        image,
        table,
        study.overlays,
        job.slide,
        k,
        workers,
        formats=output.overlays,
        side=output.overlay_side,
        plan=_plan(ledger),
        names=names,
    )
    return {"counts": counts, "files": [str(file.relative_to(study.out)) for file in files]}


Stage = Callable[[Job, Study, Ledger, Mapping[str, str], Workers], Any]
STAGES: dict[str, Stage] = {
    "convert": _convert,
    "freeze": _freeze,
    "segment": _segment,
    "describe": _describe,
    "export": _export,
    "assign": _assign,
    "paint": _paint,
}
"""What each stage does; it returns what the ledger keeps (JSON-able)."""


def outputs(stage: str, result: Mapping[str, Any], study: Study, slide: str) -> list[Path]:
    """Files and folders that `stage` has written."""
    image = study.image(slide)
    if stage == "convert":
        # Not the labels below it, which later stages write (and a repair keeps).
        return [path for path in image.iterdir() if path.name != "labels"] if image.is_dir() else []
    if stage == "segment":
        return [image / "labels" / LABELS, *rewritten("paint", study, slide), study.flows(slide)]
    if stage == "describe":
        return [study.table(slide), study.features(slide)]
    if stage == "assign":
        return [study.table(slide)]
    files = [study.out / name for name in result.get("files", [])]
    if stage == "paint":
        return [image / "labels" / "clusters", *rewritten("paint", study, slide), *files]
    return files


def rewritten(stage: str, study: Study, slide: str) -> list[Path]:
    """Files of earlier stages that `stage` adds something to."""
    if stage == "assign":
        return [study.table(slide)]
    names = ("zarr.json", ".zattrs", ".zgroup")  # of OME-Zarr 0.5 or 0.4
    return [study.image(slide) / "labels" / name for name in names] if stage == "paint" else []
