"""One slide, stage by stage: what is done already is left, what is not is done, a failure is written down.

The same function drives a small slide as one task on a worker (`workers` in its own process) and a large one
block by block over all workers. Knows no other slides; `collection` does.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from daskcell.compute import Permit, Postponed, Workers
from daskcell.compute.overtime import Overtime, renew
from daskcell.disk import is_full, remove
from daskcell.errors import ComputeError, ConfigError, DaskcellError, StudyError, WeightsError
from daskcell.images.sandbox import open_safely
from daskcell.pipeline.stages import STAGES, Job, outputs, rewritten
from daskcell.places import printable
from daskcell.study import Ledger, Study
from daskcell.study.checksums import damaged, sums
from daskcell.study.keys import (
    UPSTREAM,
    descendants,
    identify,
    unchanged,
)

_NOT_THE_SLIDES_FAULT = (ComputeError, ConfigError, StudyError, WeightsError)


@dataclass(frozen=True)
class Outcome:
    """How far a slide came: counts, and why it stopped if it did."""

    slide: str
    pixels: int = 0
    cells: int = 0
    failure: dict[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of the stages that were done now."""
    notes: tuple[str, ...] = ()
    """What was found damaged, in sentences."""
    too_large: bool = False
    """Not begun: the slide has more `pixels` than the limit."""
    postponed: bool = False
    """Not done, for no fault of the slide's."""


def missing_stages(job: Job, study: Study) -> list[str]:
    """Stages of `job` that are still to do, told by small files alone; all of them if the input changed."""
    ledger = study.ledger(job.slide)
    if job.cluster_key is None and not unchanged(job.source.files, ledger.files, job.source.said):
        return list(job.stages)
    keys = job.keys(ledger)
    found = {stage for stage in job.stages if not ledger.is_done(stage, keys[stage])}
    for stage in damage(ledger, study):
        found |= {stage} | descendants(stage)
    return [stage for stage in job.stages if stage in found]


def damage(
    ledger: Ledger, study: Study, workers: Workers | None = None, verify: Container[str] = ()
) -> dict[str, list[str]]:
    """Files that are not as they were left, by the first stage that writes them: by their names and sizes,
    and of the stages `verify` by their checksums."""
    found: dict[str, list[str]] = {}
    for stage, entry in ledger.stages.items():
        for file in damaged(study.out, entry.get("files", {}), workers if stage in verify else None):
            first = next(s for s in UPSTREAM if file in ledger.stages.get(s, {}).get("files", {}))
            found.setdefault(first, []).append(file)
    return found


def process_slide(
    job: Job,
    workers: Workers | None = None,
    *,
    limit: int | None = None,
    on_stage: Callable[[str, str, Outcome], None] | None = None,
    on_step: Callable[[str, str, float | None], None] | None = None,
) -> Outcome:
    """Do what is missing of `job`.

    Parameters
    ----------
    workers
        Who works on the blocks; None: this process.
    limit
        Largest number of pixels to begin with; a larger slide comes back as `too_large`.
    on_stage
        Called with slide, stage and counts after each stage.
    on_step
        Called with slide, stage and what part of it is done besides, when it begins (0) and after every task;
        None: an unknown part.

    Raises
    ------
    DaskcellError
        What is wrong concerns all slides: settings, weights, workers, disk.
    """
    study = Study(job.out)
    ledger = study.ledger(job.slide)
    workers = workers or Workers()
    seconds: dict[str, float] = {}
    notes: list[str] = []
    stage = job.stages[0]
    try:
        if limit is not None and (pixels := _pixels(job, ledger)) > limit:
            return Outcome(job.slide, pixels, too_large=True)
        if job.cluster_key is None:
            files = identify(job.source.files, ledger.files, job.source.said)
            if files != ledger.files:
                ledger.files = files
                ledger.save()
        notes = _take_out_damaged(job, ledger, study, workers)
        keys = job.keys(ledger)
        for number, stage in enumerate(job.stages):
            if ledger.is_done(stage, keys[stage]):
                continue
            start = time.perf_counter()
            rewrites = [str(file.relative_to(study.out)) for file in rewritten(stage, study, job.slide)]
            ledger.begin(stage, rewrites)
            team = workers
            if on_step is not None:
                on_step(job.slide, stage, 0.0)
                team = workers.metered(partial(on_step, job.slide, stage))
            result = STAGES[stage](job, study, ledger, keys, team)
            notes += result.get("notes", ()) if isinstance(result, dict) else ()
            written = sums(study.out, outputs(stage, result, study, job.slide), workers)
            seconds[stage] = time.perf_counter() - start
            later = (s for s in job.stages[number + 1 :] if not ledger.is_done(s, keys[s]))
            ledger.finish(stage, keys[stage], result, seconds[stage], next(later, None), written)
            if on_stage is not None:
                on_stage(job.slide, stage, _outcome(job, ledger, seconds))
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
    """What went wrong, in one line; a block's key is told too."""
    text = str(error) if isinstance(error, DaskcellError) else f"{type(error).__name__}: {error}"
    return printable(" ".join(" ".join([text, *getattr(error, "__notes__", [])]).split()))


def trace(error: BaseException) -> str:
    """The traceback of an error that is not the user's; empty for one that is."""
    return "" if isinstance(error, DaskcellError) else "".join(traceback.format_exception(error))


def _pixels(job: Job, ledger: Ledger) -> int:
    """Pixels of one channel, from the ledger where the slide was opened before."""
    shape = ledger.result("convert").get("shape")
    known = job.cluster_key is not None or unchanged(job.source.files, ledger.files, job.source.said)
    if shape is None or not known:
        reader = open_safely(job.source)
        shape = (0, *reader.levels[0])
        reader.close()
    return shape[1] * shape[2]


def _outcome(job: Job, ledger: Ledger, seconds: Mapping[str, float]) -> Outcome:
    shape = ledger.result("convert").get("shape") or (0, 0, 0)
    cells = ledger.result("segment").get("cells", 0)
    failure = ledger.failure if ledger.failure and ledger.failure["stage"] in job.stages else None
    return Outcome(job.slide, shape[1] * shape[2], cells, failure, dict(seconds))


def _take_out_damaged(job: Job, ledger: Ledger, study: Study, workers: Workers) -> list[str]:
    """Take stages whose files are damaged out of the ledger, and the files away; returns what to tell."""
    notes = []
    for stage, files in damage(ledger, study, workers, job.verify).items():
        ledger.lose(stage)
        remove(*(study.out / file for file in files))
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        notes.append(f"{ledger.slide}: {files[0]}{more} is damaged or missing; {stage} is done again.")
    return notes


def process_batch(jobs: Sequence[Job], limit: int, permit: Permit) -> tuple[list[Outcome], float]:
    """`process_slide` of several as one task: their blocks are worked on in this process, one after another,
    but for their network work where only some workers have a GPU.

    Returns what came of each, and the seconds it took.
    """
    start = time.perf_counter()
    workers = Workers.of_task(permit)
    outcomes = []
    for job in jobs:
        renew(job.slide)
        try:
            outcomes.append(process_slide(job, workers, limit=limit))
        except Overtime as error:
            raise Overtime(str(error), job.slide) from None
        except Postponed:
            outcomes += [Outcome(left.slide, postponed=True) for left in jobs[len(outcomes) :]]
            break
    return outcomes, time.perf_counter() - start
