"""What a run would do, and why, without doing it (``daskcell run --plan``).

Reads small files only: ledgers, and the heads of images that are not converted yet. Writes nothing.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from daskcell.config import Config
from daskcell.errors import DaskcellError
from daskcell.geometry import Grid
from daskcell.pipeline.progress import clock
from daskcell.pipeline.slide import Job, damage, header
from daskcell.pipeline.stage import Context, Stage
from daskcell.pipeline.stages import (
    CLUSTER,
    CONVERT,
    EARLY,
    LATE,
    SEGMENT,
    SLIDE_STAGES,
    STAGES,
    flows_folder,
    slide_keys,
)
from daskcell.pipeline.worker_pool import networks_bytes
from daskcell.segmentation.memory import needed_memory, settings_halo
from daskcell.study import CLUSTERS, Ledger, Study
from daskcell.study.keys import unchanged
from daskcell.study.results import Converted, Segmented

_PYRAMID = 4 / 3
_LABELS = 5
"""Bytes a pixel of label images, before compression: cells and clusters."""
_SCRATCH = 8
"""Bytes a pixel of temporary files while a slide is segmented."""
_TILE_BYTES = 3 * 256 * 256 * 4
_MOST_LINES = 20


@dataclass(frozen=True)
class SlidePlan:
    """What is to do for one slide."""

    slide: str
    reasons: Mapping[str, str]
    """Stages to do, in order, and why."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """``(C, Y, X)``; zeros where the input cannot be opened."""
    itemsize: int = 1
    """Bytes a pixel of one channel."""
    blocks: int = 0
    tiles: int = 0
    """Tiles that go through the network."""
    error: str = ""
    """Why the input cannot be opened."""

    @property
    def pixels(self) -> int:
        return self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class RunPlan:
    """What is to do for a study."""

    out: Path
    slides: list[SlidePlan]
    clusters: str
    """Why the clusters are made; empty: they are there."""
    disk: int
    """Bytes that images, labels and what waits between tasks take besides at most, before compression."""
    memory: int
    """Bytes that each worker needs."""
    seconds: float | None
    """Estimate from what this study took so far; None: nothing of it is done yet."""

    def __str__(self) -> str:
        found = [plan for plan in self.slides if plan.reasons]
        lines = [f"{len(found)} of {len(self.slides)} slides have work left in {self.out}"]
        groups: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
        for plan in found:
            groups[tuple(plan.reasons.items())].append(plan.slide)
        for reasons, names in list(groups.items())[:_MOST_LINES]:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{shown}:")
            lines += [f"    {stage}: {why}" for stage, why in reasons]
        if len(groups) > _MOST_LINES:
            lines.append(f"and {len(groups) - _MOST_LINES} more kinds of slides")
        if self.clusters:
            lines.append(f"clusters: {self.clusters}")
        lines += [f"{plan.slide} cannot be opened: {plan.error}" for plan in found if plan.error]
        if found:
            folder = next(
                path for path in (self.out.absolute(), *self.out.absolute().parents) if path.exists()
            )
            pixels = sum(plan.pixels for plan in found)
            lines.append(
                f"{pixels / 1e6:,.1f} Mpx in {sum(plan.blocks for plan in found):,} blocks, "
                f"{sum(plan.tiles for plan in found):,} tiles through the network"
            )
            lines.append(
                f"disk: at most {self.disk / 1e9:,.2f} GB before compression, of "
                f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB that are free"
            )
            lines.append(f"memory: {self.memory / 2**30:.2f} GiB for each worker")
            time = "not known yet; it is measured with the first slides of a study"
            if self.seconds is not None:
                time = f"about {clock(self.seconds)}, as the slides took that are done"
            lines.append(f"time: {time}")
        return "\n".join(lines)


def make_plan(study: Study | None, out: Path, jobs: list[Job], config: Config) -> RunPlan:
    """Say what a run of `jobs` would do.

    Parameters
    ----------
    study
        The one in `out`; None: there is none yet.
    jobs
        All slides, with the settings and weights of the run.
    """
    slides = [_slide(study, job, config) for job in jobs]
    clusters = _clusters(study, slides, jobs, config)
    if clusters:
        slides = [_with_late(plan, clusters) for plan in slides]
    todo = [plan for plan in slides if plan.reasons]
    images = sum(
        plan.shape[0] * plan.pixels * plan.itemsize * _PYRAMID
        for plan in todo
        if CONVERT.name in plan.reasons
    )
    labels = sum(plan.pixels * _LABELS * _PYRAMID for plan in todo if SEGMENT.name in plan.reasons)
    scratch = max((plan.pixels * _SCRATCH for plan in todo if SEGMENT.name in plan.reasons), default=0)
    flows = sum(plan.tiles for plan in todo) * _TILE_BYTES if config.segment.keep_flows else 0
    return RunPlan(
        out,
        slides,
        clusters,
        int(images + labels + scratch + flows),
        needed_memory(config.compute.block, networks_bytes(config), settings_halo(config.segment)),
        _seconds(study, todo, config),
    )


def _slide(study: Study | None, job: Job, config: Config) -> SlidePlan:
    name = job.slide
    ledger = study.record.ledger(name) if study else Ledger(Path("nowhere"), name)
    known = unchanged(job.source.all_files, ledger.files, job.source.said)
    keys = slide_keys(config, ledger.files, job.weights, study.record.clusters_key if study else None)
    damaged = damage(ledger, study) if study else {}
    reasons: dict[str, str] = {}
    for stage in (STAGES[stage] for stage in SLIDE_STAGES):
        again = [need.name for need in stage.needs if need.name in reasons]
        if stage is CONVERT and not known:
            reasons[stage.name] = "the input changed" if ledger.files else "new"
        elif again:
            reasons[stage.name] = f"{again[0]} is done again" if ledger.entry(stage.name) else "not done yet"
        elif stage.name in damaged:
            reasons[stage.name] = f"{damaged[stage.name][0]} is damaged or missing"
        elif stage.name in keys and not ledger.is_done(stage.name, keys[stage.name]):
            reasons[stage.name] = _why(stage, ledger, study, config, job.weights)
    try:
        shape, itemsize = header(job, ledger)
    except DaskcellError as error:
        return SlidePlan(name, reasons, error=str(error))
    blocks = len(Grid.regular(shape[1:], config.compute.block)) if set(EARLY) & set(reasons) else 0
    tiles = 0
    if SEGMENT.name in reasons and config.segment.method == "cellpose":
        tiles = _tiles(study, ledger, shape[1:], config)
        if study is not None and known and not set(reasons) & {need.name for need in SEGMENT.needs}:
            context = Context(study, config, ledger, keys=keys, weights=job.weights, slide=name)
            tiles = 0 if (flows_folder(context) / "globals.json").exists() else tiles
    return SlidePlan(name, reasons, shape, itemsize, blocks, tiles)


def _with_late(plan: SlidePlan, why: str) -> SlidePlan:
    """The plan of a slide whose cells get clusters anew."""
    late = dict.fromkeys(LATE, f"{CLUSTER.name} is done again")
    values = {**vars(plan), "reasons": late | dict(plan.reasons)}
    order = {name: values["reasons"][name] for name in SLIDE_STAGES if name in values["reasons"]}
    return SlidePlan(**values | {"reasons": order})


def _why(
    stage: Stage, ledger: Ledger, study: Study | None, config: Config, weights: Mapping[str, str]
) -> str:
    """Why a stage is to do whose input is as it was."""
    entry = ledger.entry(stage.name)
    if entry is None or study is None:
        if ledger.failure is not None and ledger.failure["stage"] == stage.name:
            return f"was set aside: {ledger.failure['error']}"
        return "not done yet"
    if entry.get("version", stage.version) != stage.version:
        return "this version of daskcell gives other results"
    changed = list(_differences(stage.settings(study.config), stage.settings(config), stage.section))
    if changed:
        return ", ".join(changed)
    if study.record.get("weights", {}).get(stage.name, "") != weights.get(stage.name, ""):
        files = stage.files(config)
        return f"another {files.what if files else 'file'}"
    return "made under other settings than these"


def _differences(before: Any, now: Any, name: str) -> Iterator[str]:
    """Settings that changed, each with its values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [key for key in now if key in before]:
            yield from _differences(before[key], now[key], f"{name}.{key}")
    elif before != now:
        yield f"{name} was {before} and is {now}"


def _clusters(study: Study | None, slides: list[SlidePlan], jobs: list[Job], config: Config) -> str:
    """Why the clusters are made; empty: they are there."""
    ledger = study.record.ledger(CLUSTERS) if study else None
    entry = ledger.entry(CLUSTER.name) if ledger else None
    if study is None or ledger is None or entry is None:
        return "not done yet"
    anew = [plan for plan in slides if {need.name for need in CLUSTER.needs} & set(plan.reasons)]
    if anew:
        return f"{len(anew)} slide{'s are' if len(anew) != 1 else ' is'} described again"
    if entry["result"].get("given"):
        return ""
    entries = ((job.slide, study.record.ledger(job.slide).entry("describe")) for job in jobs)
    described = sorted((name, found["key"]) for name, found in entries if found)
    if entry["key"] == CLUSTER.key(described, config):
        return ""
    changed = _differences(CLUSTER.settings(study.config), CLUSTER.settings(config), CLUSTER.section)
    return ", ".join(changed) or "other slides took part"


def _tiles(study: Study | None, ledger: Ledger, shape: tuple[int, int], config: Config) -> int:
    """Tiles of a slide; where the diameter is measured, with that of before, or of other slides."""
    from daskcell.segmentation.core.tiles import TileGrid

    diameter = config.segment.diameter
    if diameter == "auto":
        before = ledger.read(Segmented)
        diameter = before.diameter if before else None
        if diameter is None and study is not None:
            results = (study.record.ledger(name).read(Segmented) for name in study.slides)
            found = [result.diameter for result in results if result and result.diameter]
            diameter = median(found) if found else None
    return len(TileGrid.lay(shape, None if diameter is None else float(diameter)))


def _seconds(study: Study | None, todo: list[SlidePlan], config: Config) -> float | None:
    """Seconds that the stages of `todo` take at the pace of what is done."""
    if study is None:
        return None
    seconds: Counter[str] = Counter()
    pixels: Counter[str] = Counter()
    for name in study.slides:
        ledger = study.record.ledger(name)
        converted = ledger.read(Converted)
        if converted is None:
            continue
        for stage, entry in ledger.stages.items():
            seconds[stage] += entry["seconds"]
            pixels[stage] += converted.pixels
    if not pixels:
        return None
    # A stage that was never done takes as much longer than the others as its share of the work says.
    known = sum(STAGES[stage].share(config) for stage in pixels)
    pace = sum(seconds[stage] / pixels[stage] for stage in pixels) / max(known, 1e-9)
    rates = {
        name: seconds[name] / pixels[name] if name in pixels else pace * STAGES[name].share(config)
        for name in SLIDE_STAGES
    }
    workers = config.compute.workers or 1 if config.compute.kind != "inline" else 1
    total = 0.0
    for plan in todo:
        work = sum(rates[stage] for stage in plan.reasons) * plan.pixels
        total += work / (workers if plan.blocks <= 2 else 1)  # a larger slide was worked on by all of them
    return total
