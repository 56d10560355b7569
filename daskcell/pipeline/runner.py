"""Many slides: work through a window, set bad ones aside, continue where a run stopped.

    stages of each slide -> clusters of all -> stages of each slide that follow them

A slide of at most two blocks is one task on one worker, which sends network work on where others have the
GPU; a larger one is driven from here, block by block, over all workers.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from daskcell.compute import Failed, Workers
from daskcell.compute.timeouts import Overtime, WorkerLost
from daskcell.config import Config
from daskcell.errors import ComputeError, DaskcellError, InputError
from daskcell.images import image_info
from daskcell.images.sources import Source
from daskcell.pipeline.cluster_stage import ClusterStage
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.reuse_model import PretrainedModel
from daskcell.pipeline.slide import (
    Job,
    Outcome,
    counts,
    damage,
    missing_stages,
    process_batch,
    process_slide,
    sentence,
    trace,
)
from daskcell.pipeline.stages import CONVERT, EXPORT, FIT, LATE, SLIDE_STAGES
from daskcell.pipeline.worker_pool import LazyWorkers, slides_at_once
from daskcell.storage import paths
from daskcell.storage.atomic import remove
from daskcell.storage.lock import Lock
from daskcell.study import Study

if TYPE_CHECKING:
    from distributed import Client

_READ_LATE = frozenset(SLIDE_STAGES) - {CONVERT.name, FIT.name, EXPORT.name}
"""Stages whose output the fit and the stages after it read whole; the image is much larger, and read in
part."""
_TELL_SECONDS = 5.0
_BLOCKS_AT_ONCE = 2
"""A slide of so many blocks or fewer is one task."""
_TOGETHER = 64
"""Most slides in one task."""
_SECONDS = 5.0
"""How long a task of several slides should take: far above what a task costs, and little to lose."""
_TASKS_PER_WORKER = 3
_MOST_TASKS = 20_000
"""That the scheduler is given at a time."""
_USED_BY_SLIDES = ("ome_zarr_models", "pandas", "pyarrow.parquet", "skimage.measure", "torch")
"""Their modules import each other in circles: threads that import one at once may see it half made."""
_CHANGED = "Its input or its results changed while the run lasted. Please run again."


class Run:
    """One call of `run`, while it lasts."""

    def __init__(
        self,
        study: Study,
        sources: Sequence[Source],
        config: Config,
        weights: Mapping[str, str],
        lock: Lock,
        progress: Progress,
        retry_failed: bool,
        given: PretrainedModel | None = None,
        verify: bool = False,
    ):
        self.study, self.config, self.lock, self.progress = study, config, lock, progress
        self.sources = {source.name: source for source in sources}
        self.weights = dict(weights)
        self.retry_failed = retry_failed
        self.verify = verify
        self.clusters = ClusterStage(study, config, progress, given, verify)
        self.told = time.monotonic()
        self.looked: set[str] = set()
        """Slides whose checksums were compared in this run."""
        self.stop = threading.Event()

    def job(
        self, slide: str, clusters: str | None = None, stages: frozenset[str] = frozenset(SLIDE_STAGES)
    ) -> Job:
        verify = frozenset() if slide in self.looked else stages
        return Job(str(self.study.out), self.sources[slide], self.config, self.weights, clusters, verify)

    def go(self, client: Client | None) -> None:
        slides = sorted(self.sources)
        before = {name: self.study.ledger(name).failure for name in slides}
        missing = {name: missing_stages(self.job(name), self.study) for name in slides}
        if self.retry_failed:
            others = [name for name in slides if missing[name] and not before[name]]
            if others:
                raise InputError(
                    f"{len(others)} slides ({others[0]} ...) were not set aside, but are not done under "
                    "these settings either. Please run without --retry-failed."
                )
        left = {name: [*stages, *LATE] for name, stages in missing.items() if stages}
        self.progress.begin({name: _weight(self.sources[name]) for name in slides}, left)
        for name in slides:
            self.progress.counts(name, *counts(self.study.ledger(name)))
        with contextlib.ExitStack() as stack:
            workers = LazyWorkers(self.study.out, client, self.config, stack, self.tick, self.progress.say)
            try:
                self.work([self.job(name) for name in slides if missing[name] or self.verify], workers)
                if not self.clusters.are_there(slides):  # the fit would take damaged features for good ones
                    rest = [name for name in slides if name not in self.looked]
                    self.work([self.job(name, stages=_READ_LATE) for name in rest], workers)
                # Slides with nothing missing at the start need no second look.
                late = [name for name in slides if missing[name] or name in self.looked]
                lost = {name for name in late if missing_stages(self.job(name), self.study)}
                for name in sorted(lost):
                    if self.study.ledger(name).failure is None:
                        self.set_aside(self.job(name), InputError(_CHANGED))
                described = [name for name in slides if name not in lost]
                if self.clusters.make(described, workers):
                    key = self.study.clusters_key
                    jobs = [self.job(name, key) for name in (*described, *self.left())]
                    self.work([job for job in jobs if missing_stages(job, self.study)], workers)
            except DaskcellError as error:
                error.after_start = workers.started  # type: ignore[attr-defined]
                raise
            finally:
                self.stop.set()
                self.study.tell(None)
                if workers.started:
                    self.write_failures()
        self.write_failures()
        self.sweep_scratch()

    def left(self) -> list[str]:
        """Slides that are no longer among the inputs and get their clusters all the same: those that are
        described, and whole."""
        found = []
        for name in self.study.left:
            ledger = self.study.ledger(name)
            if ledger.entry("describe") and not damage(ledger, self.study):
                self.sources[name] = Source(name, tuple(file["path"] for file in ledger.files))
                found.append(name)
        return found

    def tick(self) -> None:
        """After every task: stop if we must; leave word for `status` now and then."""
        self.lock.check()
        if time.monotonic() - self.told > _TELL_SECONDS:
            self.told = time.monotonic()
            self.study.tell(**self.progress.told)
        if self.stop.is_set():
            raise ComputeError("The run was stopped; the same command continues it.")

    # ------------------------------------------------------------------ slides

    def work(self, jobs: list[Job], workers: LazyWorkers) -> None:
        """Process `jobs`, small ones as tasks, large ones from here.

        When a worker dies, Dask counts that against every task it held. So a slide that was lost with its
        worker is only suspected, and is set aside if it is lost again while it runs alone.
        """
        if not jobs:
            return
        team = workers.get()
        # With fewer slides than workers, blocks are what keeps all of them busy.
        blocks = _BLOCKS_AT_ONCE if len(jobs) >= 2 * team.count else 1
        self.looked.update(job.slide for job in jobs)
        together: list[Job] = []
        suspects: list[Job] = []
        for job, error, others in self.round(jobs, team, blocks):
            if isinstance(error, Overtime) and error.item in (job.slide, None):
                self.set_aside(job, error)
            else:
                (together if others else suspects).append(job)
        # Slides that were in one task are tried one by one, at the same time, before each is tried alone.
        suspects += [job for job, _, _ in self.round(together, team, blocks, together=1)]
        for suspect in suspects:
            for job, error, _ in self.round([suspect], team, blocks):
                self.set_aside(job, error)

    def round(
        self, jobs: list[Job], team: Workers, blocks: int, together: int = _TOGETHER
    ) -> list[tuple[Job, BaseException, bool]]:
        """Process `jobs` once, at most so many `together` in a task; returns those that were lost with a
        worker, why, and whether others were in the same task."""
        lost: list[tuple[Job, BaseException, bool]] = []
        large: list[Job] = []
        postponed: list[Job] = []
        pixels = 0
        limit = blocks * self.config.compute.block**2
        for batch, result in self.batches(jobs, team, limit, together):
            if isinstance(result, Failed):
                error = self.worker_death(result.error, team)
                lost += [(job, error, len(batch) > 1) for job in batch]
                continue
            for job, outcome in zip(batch, result, strict=True):
                if outcome.too_large:
                    large.append(job)
                    pixels += outcome.pixels
                elif outcome.postponed:
                    postponed.append(job)
                else:
                    self.account(job, outcome)
        each = max(1, pixels // self.config.compute.block**2 // max(1, len(large)))
        for job, found in self.drive(large, team, slides_at_once(team, each)):
            if isinstance(found, BaseException):
                lost.append((job, self.worker_death(found, team), False))
            else:
                self.account(job, found)
        return lost + (self.round(postponed, team, blocks, together) if postponed else [])

    def batches(
        self, jobs: list[Job], team: Workers, limit: int, together: int
    ) -> Iterator[tuple[list[Job], list[Outcome] | Failed]]:
        """Slides as tasks of some seconds each: many small ones in one, as soon as their pace is known."""
        at_once = min(_TASKS_PER_WORKER * team.count, _MOST_TASKS)
        window = team.window(at_once, keep_going=True)
        waiting = deque(jobs)
        flying: dict[int, list[Job]] = {}
        pace = _SECONDS

        def refill() -> None:
            while waiting and len(flying) < at_once:
                fair = len(waiting) // (2 * team.count)  # at the end, every worker has something to do
                length = max(1, min(int(_SECONDS / pace), together, fair))
                batch = [waiting.popleft() for _ in range(length)]
                flying[len(waiting)] = batch
                window.submit(len(waiting), process_batch, batch, limit, team.permit)

        refill()
        for number, result in window:
            batch = flying.pop(number)
            if isinstance(result, Failed):
                yield batch, result
            else:
                outcomes, seconds = result
                pace += 0.3 * (max(seconds / len(batch), 1e-3) - pace)
                yield batch, outcomes
            refill()

    def drive(
        self, jobs: Iterable[Job], team: Workers, at_once: int
    ) -> Iterator[tuple[Job, Outcome | ComputeError]]:
        """Process slides block by block, some at the same time."""

        def one(job: Job) -> Outcome | ComputeError:
            try:
                return process_slide(job, team, on_stage=self.on_stage, on_step=self.progress.step)
            except ComputeError as error:
                return error

        if at_once == 1:
            for job in jobs:
                yield job, one(job)
            return
        for name in _USED_BY_SLIDES:
            importlib.import_module(name)
        waiting = iter(jobs)
        with ThreadPoolExecutor(at_once, thread_name_prefix="slide") as pool:
            running = {pool.submit(one, job): job for job in _take(waiting, at_once)}
            try:
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        job = running.pop(future)
                        yield job, future.result()
                        running |= {pool.submit(one, job): job for job in _take(waiting, 1)}
            except BaseException:
                self.stop.set()  # the other threads end with their next finished task
                raise

    def worker_death(self, error: BaseException, team: Workers) -> BaseException:
        """The error of a task that was lost with its worker; any other is the end of the run."""
        if not isinstance(error, WorkerLost) or not team.alive or self.stop.is_set() or self.lock.lost:
            raise error
        return error

    def set_aside(self, job: Job, error: BaseException) -> None:
        ledger = self.study.ledger(job.slide)
        stage = ledger.began or (missing_stages(job, self.study) or list(job.stages))[0]
        ledger.fail(stage, sentence(error), trace(error))
        self.account(job, Outcome(job.slide, failure=ledger.failure))

    def on_stage(self, slide: str, stage: str, outcome: Outcome) -> None:
        self.progress.counts(slide, outcome.pixels, outcome.cells)
        self.progress.finished(slide, stage, outcome.seconds.get(stage))

    def account(self, job: Job, outcome: Outcome) -> None:
        """Tell how a slide ended."""
        self.progress.counts(outcome.slide, outcome.pixels, outcome.cells)
        for note in outcome.notes:
            self.progress.say(note)
        if outcome.failure is not None:
            self.progress.set_aside(outcome.slide, outcome.failure["error"])
        else:
            for stage in job.stages:
                self.progress.finished(outcome.slide, stage, outcome.seconds.get(stage))

    def sweep_scratch(self) -> None:
        """Remove what stages kept between their tasks, but that of slides that were set aside: the next run
        goes on from there."""
        scratch = self.study.out / "scratch"
        unfinished = (name for name in self.sources if self.study.ledger(name).failure)
        kept = {folder for name in unfinished for folder in self.study.scratches(name)}
        if scratch.is_dir():
            remove(*(set(scratch.iterdir()) - kept))
            if not kept:
                scratch.rmdir()

    def write_failures(self) -> None:
        failures = [self.study.ledger(name).failure for name in sorted(self.sources)]
        self.study.write_failures([failure for failure in failures if failure] + self.clusters.failures)


def _weight(source: Source) -> float:
    """Bytes of the input, as far as they are known before it is opened."""
    total = 0.0
    for file in source.files:
        with contextlib.suppress(OSError, DaskcellError):
            if paths.is_folder(file):  # an OME-Zarr: its own size says nothing
                info = image_info(file)
                total += math.prod(info.shape) * info.dtype.itemsize
            else:
                total += paths.version(file)[0]
    return total


def _take(jobs: Iterator[Job], count: int) -> list[Job]:
    return [job for _, job in zip(range(count), jobs, strict=False)]
