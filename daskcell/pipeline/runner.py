"""Many slides: work on all that is missing, set failing slides aside, continue where a run stopped.

    stages of each slide -> clusters of all -> stages of each slide that follow them

A slide of at most two blocks is one task on one worker, which sends network work on where others have the
GPU; a larger one is driven from here, block by block, over all workers. Without workers, slides are processed
here, one after another.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from daskcell.compute import Failed, Workers
from daskcell.compute.timeouts import TaskTimeout, WorkerLost
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
    header,
    missing_stages,
    process_batch,
    process_slide,
    sentence,
    trace,
)
from daskcell.pipeline.stages import CONVERT, EXPORT, FIT, LATE, SLIDE_STAGES, STAGES
from daskcell.pipeline.steps import replay
from daskcell.pipeline.worker_pool import WorkerPool, slides_at_once
from daskcell.storage import paths
from daskcell.storage.atomic import remove
from daskcell.storage.lock import Lock
from daskcell.study import Study

if TYPE_CHECKING:
    from distributed import Client

_READ_LATE = frozenset(SLIDE_STAGES) - {CONVERT.name, FIT.name, EXPORT.name}
"""Stages whose output the fit and the stages after it read whole; the image is much larger, and read in
part."""
_WRITE_SECONDS = 5.0
_BLOCKS_AT_ONCE = 2
"""A slide of at most this many blocks is one task."""
_TOGETHER = 64
"""Most slides in one task."""
_SECONDS = 5.0
"""How long a task of several slides should take: far longer than its overhead, and little work to lose."""
_TASKS_PER_WORKER = 3
_MOST_TASKS = 20_000
"""Most tasks that the scheduler is given at a time."""
_USED_BY_SLIDES = ("ome_zarr_models", "pandas", "pyarrow.parquet", "skimage.measure", "torch")
"""Packages with circular imports: threads that import one at the same time may see it half initialised."""
_MOST_SMALL = 8
"""More slides are not opened to find out whether they are small."""
_CHANGED = "Its input or its results changed while the run lasted. Please run again."


@dataclass(frozen=True)
class LostSlide:
    """A slide that was lost with the worker that ran its task."""

    job: Job
    error: BaseException
    shared: bool
    """Whether there were other slides in the same task."""

    @property
    def is_at_fault(self) -> bool:
        """Whether it is the slide that was worked on when the time of its task ran out."""
        return getattr(self.error, "item", None) in (self.job.slide, None)


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
        self.verified: set[str] = set()
        """Slides whose checksums were compared in this run."""
        self.stop = threading.Event()
        self._writing = threading.Lock()
        self._written = time.monotonic()

    def job(
        self, slide: str, clusters: str | None = None, stages: frozenset[str] = frozenset(SLIDE_STAGES)
    ) -> Job:
        """What is to do for a slide: its early stages, or with the key of the `clusters` its late ones.

        Checksums of `stages` are compared, unless they were in this run.
        """
        verify = frozenset() if slide in self.verified else stages
        return Job(str(self.study.out), self.sources[slide], self.config, self.weights, clusters, verify)

    def execute(self, client: Client | None) -> None:
        """Do all that is missing: early stages of each slide, clusters of all, late stages of each slide."""
        slides = sorted(self.sources)
        missing = {name: missing_stages(self.job(name), self.study) for name in slides}
        if self.retry_failed:
            self.refuse_new_work(missing)
        self.begin_progress(missing)
        with contextlib.ExitStack() as stack:
            pool = WorkerPool(
                self.study.out, client, self.config, stack, self.on_task, self.progress.say, self.is_small
            )
            try:
                self.process([self.job(name) for name in slides if missing[name] or self.verify], pool)
                if not self.clusters.are_there(slides):  # the fit would take damaged features for good ones
                    rest = [name for name in slides if name not in self.verified]
                    self.process([self.job(name, stages=_READ_LATE) for name in rest], pool)
                incomplete = self.set_aside_incomplete(
                    [name for name in slides if missing[name] or name in self.verified]
                )
                described = [name for name in slides if name not in incomplete]
                if self.clusters.make(described, pool):
                    key = self.study.record.clusters_key
                    jobs = [self.job(name, key) for name in (*described, *self.left())]
                    self.process([job for job in jobs if missing_stages(job, self.study)], pool)
            except DaskcellError as error:
                error.after_start = pool.started  # type: ignore[attr-defined]
                raise
            finally:
                with self._writing:
                    self.stop.set()
                    self.study.record.write_progress(None)
                if pool.started:
                    self.write_failures()
        self.write_failures()
        self.sweep_scratch()

    def refuse_new_work(self, missing: Mapping[str, Sequence[str]]) -> None:
        """Raise `InputError` if slides have work left that were not set aside by an earlier run."""
        others = [
            name for name, stages in missing.items() if stages and not self.study.record.ledger(name).failure
        ]
        if others:
            raise InputError(
                f"{len(others)} slides ({others[0]} ...) were not set aside, but are not done under "
                "these settings either. Please run without --retry-failed."
            )

    def begin_progress(self, missing: Mapping[str, Sequence[str]]) -> None:
        sizes = {name: _input_bytes(source) for name, source in self.sources.items()}
        left = {name: [*stages, *LATE] for name, stages in missing.items() if stages}
        ledgers = {name: self.study.record.ledger(name) for name in sizes}
        took = {
            name: {stage: entry["seconds"] for stage, entry in ledger.stages.items()}
            for name, ledger in ledgers.items()
        }
        shares = {name: stage.share(self.config) for name, stage in STAGES.items() if stage.weight}
        self.progress.begin(sizes, left, took, shares)
        for name, ledger in ledgers.items():
            self.progress.counts(name, *counts(ledger))

    def is_small(self) -> bool:
        """Whether all slides together have fewer pixels than one block."""
        if len(self.sources) > _MOST_SMALL:
            return False
        pixels = 0
        for name in self.sources:
            with contextlib.suppress(Exception):  # it will be set aside, with the reason
                pixels += math.prod(header(self.job(name), self.study.record.ledger(name))[0][1:])
        return pixels < self.config.compute.block**2

    def set_aside_incomplete(self, slides: Iterable[str]) -> set[str]:
        """Those of `slides` whose early stages are not all done; each gets a reason."""
        incomplete = {name for name in slides if missing_stages(self.job(name), self.study)}
        for name in sorted(incomplete):
            if self.study.record.ledger(name).failure is None:
                self.set_aside(self.job(name), InputError(_CHANGED))
        return incomplete

    def left(self) -> list[str]:
        """Slides that are no longer among the inputs and get their clusters all the same: those that are
        described, and whole."""
        found = []
        for name in self.study.left:
            ledger = self.study.record.ledger(name)
            if ledger.entry("describe") and not damage(ledger, self.study):
                self.sources[name] = Source(name, tuple(file["path"] for file in ledger.files))
                found.append(name)
        return found

    def on_task(self) -> None:
        """After every task: stop if the lock is lost or another thread failed; write progress."""
        self.lock.check()
        self.write_progress()
        if self.stop.is_set():
            raise ComputeError("The run was stopped; the same command continues it.")

    def on_message(self, message: list[list[Any]]) -> None:
        """Steps within a task on a worker (called from another thread)."""
        replay(message, self.progress)
        self.write_progress()

    def write_progress(self) -> None:
        """Write progress for `status`, now and then."""
        with self._writing:
            late = time.monotonic() - self._written > _WRITE_SECONDS
            if late and not self.stop.is_set() and not self.lock.lost:
                self._written = time.monotonic()
                self.study.record.write_progress(**self.progress.estimate)

    # ------------------------------------------------------------------ slides

    def process(self, jobs: list[Job], pool: WorkerPool) -> None:
        """Process `jobs`: one after another in this process, or over workers, small ones as tasks.

        When a worker dies, Dask counts that against every task it held. So a slide that was lost with its
        worker is only suspected, and is set aside if it is lost again while it runs alone.
        """
        if not jobs:
            return
        workers = pool.get()
        self.verified.update(job.slide for job in jobs)
        if workers.client is None:
            for job in jobs:
                self.account(job, process_slide(job, workers, progress=self.progress))
            return
        # With fewer slides than workers, a slide's blocks are what keeps all of them busy.
        blocks = _BLOCKS_AT_ONCE if len(jobs) >= 2 * workers.count else 1
        with workers.listening(self.on_message):
            lost = self.run_batches(jobs, workers, blocks)
            # A slide whose own time ran out is not tried again: its task was tried several times.
            late = [one for one in lost if isinstance(one.error, TaskTimeout) and one.is_at_fault]
            for one in late:
                self.set_aside(one.job, one.error)
            lost = [one for one in lost if one not in late]
            # Slides that shared a task are tried one by one, at the same time, before each is tried alone.
            shared = [one.job for one in lost if one.shared]
            suspects = [one.job for one in lost if not one.shared]
            suspects += [one.job for one in self.run_batches(shared, workers, blocks, together=1)]
            for suspect in suspects:
                for one in self.run_batches([suspect], workers, blocks):
                    self.set_aside(one.job, one.error)

    def run_batches(
        self, jobs: list[Job], workers: Workers, blocks: int, together: int = _TOGETHER
    ) -> list[LostSlide]:
        """Process `jobs` once, at most `together` in a task; returns those that were lost with a worker.

        A slide of more than `blocks` blocks is driven from here after the others.
        """
        if not jobs:
            return []
        lost: list[LostSlide] = []
        large: list[Job] = []
        again: list[Job] = []
        pixels = 0
        limit = blocks * self.config.compute.block**2
        for batch, result in self.batch_results(jobs, workers, limit, together):
            if isinstance(result, Failed):
                error = self.worker_death(result.error, workers)
                lost += [LostSlide(job, error, shared=len(batch) > 1) for job in batch]
                continue
            for job, outcome in zip(batch, result, strict=True):
                if outcome.too_large:  # only its header was read
                    large.append(job)
                    pixels += outcome.pixels
                elif outcome.rescheduled:  # its worker had to leave while the task waited for a GPU
                    again.append(job)
                else:
                    self.account(job, outcome)
        if large:
            mean_blocks = max(1, pixels // self.config.compute.block**2 // len(large))
            for job, found in self.run_large(large, workers, slides_at_once(workers, mean_blocks)):
                if isinstance(found, BaseException):
                    lost.append(LostSlide(job, self.worker_death(found, workers), shared=False))
                else:
                    self.account(job, found)
        return lost + self.run_batches(again, workers, blocks, together)

    def batch_results(
        self, jobs: list[Job], workers: Workers, limit: int, together: int
    ) -> Iterator[tuple[list[Job], list[Outcome] | Failed]]:
        """Slides as tasks of some seconds each: many small ones in one, as soon as their pace is known."""
        at_once = min(_TASKS_PER_WORKER * workers.count, _MOST_TASKS)
        window = workers.window(at_once, keep_going=True)
        waiting = deque(jobs)
        flying: dict[int, list[Job]] = {}
        pace = _SECONDS

        def refill() -> None:
            while waiting and len(flying) < at_once:
                fair = len(waiting) // (2 * workers.count)  # at the end, every worker has something to do
                length = max(1, min(int(_SECONDS / pace), together, fair))
                batch = [waiting.popleft() for _ in range(length)]
                flying[len(waiting)] = batch
                window.submit(len(waiting), process_batch, batch, limit, workers.ref)

        refill()
        for number, result in window:
            batch = flying.pop(number)
            if isinstance(result, Failed):
                yield batch, result
            else:
                outcomes, seconds = result
                # Smoothed over the last three tasks or so: slides differ.
                pace += 0.3 * (max(seconds / len(batch), 1e-3) - pace)
                yield batch, outcomes
            refill()

    def run_large(
        self, jobs: Iterable[Job], workers: Workers, at_once: int
    ) -> Iterator[tuple[Job, Outcome | ComputeError]]:
        """Process slides block by block, `at_once` of them at the same time."""

        def one(job: Job) -> Outcome | ComputeError:
            try:
                return process_slide(job, workers, progress=self.progress)
            except ComputeError as error:
                return error

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

    def worker_death(self, error: BaseException, workers: Workers) -> BaseException:
        """The error of a task that was lost with its worker; any other is the end of the run."""
        if not isinstance(error, WorkerLost) or not workers.alive or self.stop.is_set() or self.lock.lost:
            raise error
        return error

    def set_aside(self, job: Job, error: BaseException) -> None:
        ledger = self.study.record.ledger(job.slide)
        stage = ledger.in_progress or (missing_stages(job, self.study) or list(job.stages))[0]
        ledger.fail(stage, sentence(error), trace(error))
        self.account(job, Outcome(job.slide, failure=ledger.failure))

    def account(self, job: Job, outcome: Outcome) -> None:
        """Report how a slide ended."""
        self.progress.counts(outcome.slide, outcome.pixels, outcome.cells)
        for note in outcome.notes:
            self.progress.say(note)
        if outcome.failure is not None:
            self.progress.set_aside(outcome.slide, outcome.failure["error"])
        else:
            for stage in job.stages:
                self.progress.finished(outcome.slide, stage, outcome.seconds.get(stage))

    def sweep_scratch(self) -> None:
        """Remove what stages kept between their tasks, except for slides that were set aside: the next run
        continues from there."""
        scratch = self.study.out / "scratch"
        unfinished = (name for name in self.sources if self.study.record.ledger(name).failure)
        kept = {folder for name in unfinished for folder in self.study.paths.scratches(name)}
        if scratch.is_dir():
            remove(*(set(scratch.iterdir()) - kept))
            if not kept:
                scratch.rmdir()

    def write_failures(self) -> None:
        failures = [self.study.record.ledger(name).failure for name in sorted(self.sources)]
        self.study.record.write_failures(
            [failure for failure in failures if failure] + self.clusters.failures
        )


def _input_bytes(source: Source) -> float:
    """Bytes of the input, as far as they can be known without reading it."""
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
