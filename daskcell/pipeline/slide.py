"""One slide, stage by stage: stages that are done are skipped, and a failure is recorded in the ledger.

The same function works on a small slide as one task on a worker (`workers` is that process) and on a large
one block by block over all workers. See `runner` for many slides.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.compute import Reschedule, Workers, WorkersRef
from daskcell.compute.timeouts import TaskTimeout, reset
from daskcell.config import Config
from daskcell.errors import ComputeError, ConfigError, DaskcellError, StudyError, WeightsError
from daskcell.images.reader_process import open_safely
from daskcell.pipeline.stage import Context, run_stage
from daskcell.pipeline.stages import EARLY, LATE, STAGES, slide_keys
from daskcell.pipeline.steps import SentSteps, Steps
from daskcell.storage.atomic import is_full, remove
from daskcell.storage.paths import printable
from daskcell.study import Ledger, Study, checksums
from daskcell.study.keys import identify, unchanged
from daskcell.study.results import Converted, Segmented

if TYPE_CHECKING:
    from daskcell.images.sources import Source

_NOT_THE_SLIDES_FAULT = (ComputeError, ConfigError, StudyError, WeightsError)


@dataclass(frozen=True)
class Job:
    """A slide to work on: small enough to be sent to a worker."""

    out: str
    source: Source
    config: Config
    weights: Mapping[str, str]
    clusters: str | None = None
    """Content key of the clusters (`Record.clusters_key`), for the stages that follow them. These read
    nothing of the input, which may have gone since."""
    verify: frozenset[str] = frozenset()
    """Stages whose checksums are compared where they are done; of the others, names and sizes."""

    @property
    def slide(self) -> str:
        return self.source.name

    def keys(self, ledger: Ledger) -> dict[str, str]:
        """Content keys of all stages that can be done now."""
        return slide_keys(self.config, ledger.files, self.weights, self.clusters)

    @property
    def stages(self) -> tuple[str, ...]:
        return EARLY if self.clusters is None else LATE


@dataclass(frozen=True)
class Outcome:
    """The result of working on a slide: counts, and why it stopped if it did."""

    slide: str
    pixels: int = 0
    cells: int = 0
    failure: dict[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of the stages that were done now."""
    notes: tuple[str, ...] = ()
    """Sentences about damaged files."""
    too_large: bool = False
    """Not begun, since the slide has more `pixels` than the limit."""
    rescheduled: bool = False
    """Not done, since its worker had to leave."""


def missing_stages(job: Job, study: Study) -> list[str]:
    """Stages of `job` that are still to do, by the ledger and file sizes; all if the input changed."""
    ledger = study.record.ledger(job.slide)
    if job.clusters is None and not unchanged(job.source.all_files, ledger.files, job.source.said):
        return list(job.stages)
    keys = job.keys(ledger)
    found = {stage for stage in job.stages if not ledger.is_done(stage, keys[stage])}
    for stage in damage(ledger, study):
        found |= {stage} | ledger.dependents(stage)
    return [stage for stage in job.stages if stage in found]


def damage(
    ledger: Ledger, study: Study, workers: Workers | None = None, verify: Container[str] = ()
) -> dict[str, list[str]]:
    """Files that are missing or changed since they were written, by stage.

    Names and sizes are compared, and checksums for the stages in `verify`.
    """
    found = {}
    for stage, entry in ledger.stages.items():
        files = checksums.verify(study.out, entry["files"], workers if stage in verify else None)
        if files:
            found[stage] = files
    return found


def process_slide(
    job: Job,
    workers: Workers | None = None,
    *,
    limit: int | None = None,
    progress: Steps | None = None,
) -> Outcome:
    """Do what is missing of `job`.

    Parameters
    ----------
    workers
        Work on the blocks; None: this process.
    limit
        Largest number of pixels to begin with; a larger slide comes back as `too_large`.
    progress
        Is called after every task and stage.

    Raises
    ------
    DaskcellError
        The problem concerns all slides: settings, weights, workers, disk.
    """
    study = Study(job.out)
    ledger = study.record.ledger(job.slide)
    workers = workers or Workers()
    seconds: dict[str, float] = {}
    notes: list[str] = []
    stage = job.stages[0]
    try:
        if limit is not None and (pixels := math.prod(header(job, ledger)[0][1:])) > limit:
            return Outcome(job.slide, pixels, too_large=True)
        if job.clusters is None:
            files = identify(job.source.all_files, ledger.files, job.source.said)
            if files != ledger.files:
                ledger.files = files
                ledger.save()
        notes = _take_out_damaged(job, ledger, study, workers)
        keys = job.keys(ledger)
        context = Context(
            study,
            job.config,
            ledger,
            workers,
            keys=keys,
            weights=job.weights,
            slide=job.slide,
            source=job.source,
        )
        for number, stage in enumerate(job.stages):
            later = (s for s in job.stages[number + 1 :] if not ledger.is_done(s, keys[s]))
            step = None if progress is None else partial(progress.step, job.slide, stage)
            took = run_stage(STAGES[stage], context, keys[stage], next(later, None), step)
            if took is not None:
                seconds[stage] = took
                finished = ledger.read(STAGES[stage].result)
                notes += finished.notes if finished else ()
                if progress is not None:
                    progress.counts(job.slide, *counts(ledger))
                    progress.finished(job.slide, stage, took)
    except _NOT_THE_SLIDES_FAULT:
        raise
    except Exception as error:
        if is_full(error):
            raise no_room(job.out, error) from error
        ledger.fail(stage, sentence(error), trace(error))
    return replace(_outcome(job, ledger, seconds), notes=tuple(notes))


def no_room(out: str | Path, error: BaseException) -> StudyError:
    """What to say when the disk takes no more."""
    why = getattr(error, "strerror", None) or "no space left"
    return StudyError(
        f"{out} cannot be written to ({why}). Please make room; the same command continues the study."
    )


def sentence(error: BaseException) -> str:
    """What went wrong, in one line, with the key of the block."""
    text = str(error) if isinstance(error, DaskcellError) else f"{type(error).__name__}: {error}"
    return printable(" ".join(" ".join([text, *getattr(error, "__notes__", [])]).split()))


def trace(error: BaseException) -> str:
    """The traceback of an unexpected error; empty for one that the user can mend."""
    return "" if isinstance(error, DaskcellError) else "".join(traceback.format_exception(error))


def header(job: Job, ledger: Ledger) -> tuple[tuple[int, int, int], int]:
    """``(C, Y, X)`` of a slide and bytes a pixel, from the ledger where it was opened before."""
    converted = ledger.read(Converted)
    known = job.clusters is not None or unchanged(job.source.all_files, ledger.files, job.source.said)
    if converted is not None and known:
        return converted.shape, np.dtype(converted.dtype or "u1").itemsize
    reader = open_safely(job.source)
    found = (len(reader.channels), *reader.levels[0]), np.dtype(reader.dtype).itemsize
    reader.close()
    return found


def _outcome(job: Job, ledger: Ledger, seconds: Mapping[str, float]) -> Outcome:
    pixels, cells = counts(ledger)
    failure = ledger.failure if ledger.failure and ledger.failure["stage"] in job.stages else None
    return Outcome(job.slide, pixels, cells, failure, dict(seconds))


def counts(ledger: Ledger) -> tuple[int, int]:
    """Pixels of one channel and cells of a slide; 0 while they are not known."""
    converted, segmented = ledger.read(Converted), ledger.read(Segmented)
    return converted.pixels if converted else 0, segmented.cells if segmented else 0


def _take_out_damaged(job: Job, ledger: Ledger, study: Study, workers: Workers) -> list[str]:
    """Remove damaged files, and their stages from the ledger; returns sentences about them."""
    notes = []
    for stage, files in damage(ledger, study, workers, job.verify).items():
        ledger.invalidate(stage)
        remove(*(study.out / file for file in files))
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        notes.append(f"{ledger.slide}: {files[0]}{more} is damaged or missing; {stage} is done again.")
    return notes


def process_batch(jobs: Sequence[Job], limit: int, ref: WorkersRef) -> tuple[list[Outcome], float]:
    """`process_slide` for several slides as one task.

    Blocks are worked on in this process, one after another; network work is sent to workers with a GPU where
    only some have one. Returns the outcome of each slide, and the seconds that all took.
    """
    start = time.perf_counter()
    workers, progress = Workers.of_task(ref), SentSteps(ref.send)
    outcomes = []
    for job in jobs:
        reset(job.slide)
        try:
            outcomes.append(process_slide(job, workers, limit=limit, progress=progress))
        except TaskTimeout as error:
            raise TaskTimeout(str(error), job.slide) from None
        except Reschedule:
            outcomes += [Outcome(left.slide, rescheduled=True) for left in jobs[len(outcomes) :]]
            break
    return outcomes, time.perf_counter() - start
