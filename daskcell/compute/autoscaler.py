"""Restarts workers that are gone, and submits jobs as they are needed, while a run lasts."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from daskcell.compute.jobqueue import listed_jobs, reason

_LOOK_SECONDS = 2.0
_ASK_SECONDS = 5.0
_LOST_SECONDS = 120.0
"""Where the queue does not answer, a job whose workers have been away for so long is taken for gone."""
_IDLE_SECONDS = 60.0
_AGAIN_SECONDS = 2.0
"""Wait before a job is asked for again that failed; twice as long every time."""
_MOST_FAILURES = 3
_TELL_SECONDS = 60.0


class Autoscaler:
    """Watches a `distributed.SpecCluster` from a thread of its own; ``with`` starts and stops it.

    A nanny restarts a process that dies, but closes itself when the process dies during start-up, as happens
    when it is given a deadly task at once. With the last worker gone, a run would wait forever.
    """

    def __init__(self, cluster: Any):
        self.cluster = cluster
        self.trouble: str | None = None
        """Why there will be no more workers."""
        self.give_up: Callable[[], None] = lambda: None
        """Called then, from the autoscaler's thread."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def look(self) -> None:
        """Replace what is gone."""
        self.cluster.sync(self._replace)

    async def _replace(self) -> None:
        cluster = self.cluster
        for name in [n for n, nanny in cluster.workers.items() if nanny.status.name in ("closed", "failed")]:
            del cluster.workers[name]
        await self._follow()

    async def _follow(self) -> None:
        """Start the workers that the specification has and close those that it has not."""
        # The cluster itself drops a worker whose process is slow to come back.
        if set(self.cluster.worker_spec) != set(self.cluster.workers):
            await self.cluster

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            with contextlib.suppress(Exception):  # the cluster may be closing
                self.look()


class JobAutoscaler(Autoscaler):
    """The same for jobs: the queue is asked which of them still exist.

    Parameters
    ----------
    cluster
        A dask-jobqueue cluster.
    kind
        Its queue, ``slurm`` for one.
    specs
        All jobs there may be, as `job_specs` gives them.
    minimum
        For ``cpu`` and ``gpu``, how many jobs are kept while there is little to do.
    notify
        Called with a sentence when there is no worker of a kind.
    """

    def __init__(
        self,
        cluster: Any,
        kind: str,
        specs: dict[str, list[tuple[str, dict[str, Any]]]],
        minimum: dict[str, int],
        notify: Callable[[str], None],
    ):
        super().__init__(cluster)
        self.kind, self.specs, self.minimum, self.notify = kind, specs, minimum, notify
        self._seen: dict[str, float] = {}
        """Job numbers that had workers, and when last."""
        self._needed_since: dict[str, float] = {}
        self._refusal: str | None = None
        self._failures = dict.fromkeys(specs, 0)
        self._not_before = dict.fromkeys(specs, 0.0)
        self._noticed = self._ask_after = time.monotonic()

    def ask(self) -> None:
        """Ask for the first jobs; raises what the queue's command raised."""
        for label, jobs in self.specs.items():
            self.cluster.worker_spec.update(jobs[: self.minimum[label]])
        self.cluster.sync(self._follow)

    @property
    def state(self) -> str:
        """What the queue says of our jobs, such as ``2 PENDING Resources``."""
        own = {job.job_id for job in list(self.cluster.workers.values())}
        listed = listed_jobs(self.kind)
        if listed is None:
            return "the queue does not answer"
        said = sorted(text or "listed" for number, text in listed.items() if number in own)
        counted = [f"{len(list(same))} {text}" for text, same in itertools.groupby(said)]
        return ", ".join(counted) or "none of them is in the queue any more"

    def look(self) -> None:
        here, tasks, busy = self.cluster.sync(self._present)
        now = time.monotonic()
        jobs = {name: job.job_id for name, job in self.cluster.workers.items()}
        self._seen |= {number: now for name, number in jobs.items() if name in here}
        gone = self._gone({name: number for name, number in jobs.items() if name not in here}, now)
        for name in gone:
            del self.cluster.worker_spec[name]
        self.cluster.sync(self._follow)
        for label, possible in self.specs.items():
            names = [name for name, _ in possible]
            self._count_failures(label, [jobs[name] for name in names if name in gone], now)
            self._fit(label, tasks[label], busy, now)
            if not here.intersection(names):
                self._none_here(label, now)
        try:
            self.cluster.sync(self._follow)
            self._refusal = None
        except (RuntimeError, OSError, ValueError) as error:
            self._refusal = reason(error)

    async def _present(self) -> tuple[set[str], dict[str, int], set[str]]:
        """Jobs with workers; number of waiting and running tasks, by kind of job; jobs with running tasks."""
        scheduler = self.cluster.scheduler
        at_work = {str(worker.name): bool(worker.processing) for worker in scheduler.workers.values()}
        here, busy = set(), set()
        for name, spec in self.cluster.worker_spec.items():
            workers = [f"{name}{suffix}" for suffix in spec.get("group", [""])]
            if any(worker in at_work for worker in workers):
                here.add(name)
            if any(at_work.get(worker) for worker in workers):
                busy.add(name)
        tasks = dict.fromkeys(self.specs, 0)
        running = (task for worker in scheduler.workers.values() for task in worker.processing)
        for task in itertools.chain(running, scheduler.unrunnable, scheduler.queued):
            tasks["gpu" if "GPU" in (task.resource_restrictions or ()) and "gpu" in tasks else "cpu"] += 1
        return here, tasks, busy

    def _gone(self, absent: dict[str, str | None], now: float) -> list[str]:
        """Those of the jobs without workers that have ended."""
        if not absent or now < self._ask_after:
            return []
        self._ask_after = now + _ASK_SECONDS
        listed = listed_jobs(self.kind)
        if listed is None:
            return [n for n, i in absent.items() if i is None or now - self._seen.get(i, now) > _LOST_SECONDS]
        return [name for name, number in absent.items() if number not in listed]

    def _count_failures(self, label: str, gone: list[str | None], now: float) -> None:
        for number in gone:
            if number in self._seen:
                self._failures[label] = 0
            else:
                self._failures[label] += 1
                wait = _AGAIN_SECONDS * 2 ** (self._failures[label] - 1)
                self._not_before[label] = now + min(300.0, wait)

    def _fit(self, label: str, tasks: int, busy: set[str], now: float) -> None:
        """Ask for as many jobs as there is work for, from the minimum to all; fewer only after a while."""
        spec = self.cluster.worker_spec
        jobs = self.specs[label]
        asked = [name for name, _ in jobs if name in spec]
        per_job = len(jobs[0][1].get("group", [""]))
        wanted = min(len(jobs), max(self.minimum[label], math.ceil(tasks / per_job)))
        if wanted >= len(asked):
            self._needed_since[label] = now
            if now >= self._not_before[label]:
                free = [job for job in jobs if job[0] not in spec]
                spec.update(free[: wanted - len(asked)])
        elif now - self._needed_since.get(label, now) > _IDLE_SECONDS:
            idle = [name for name in asked if name not in busy]
            for name in idle[: len(asked) - wanted]:
                del spec[name]

    def _none_here(self, label: str, now: float) -> None:
        if self._failures[label] >= _MOST_FAILURES:
            what = self._refusal or "they ended before a worker came up"
            self.trouble = (
                f"{_MOST_FAILURES} {label.upper()} jobs of {self.kind} failed one after the other: {what}."
            )
            self._ended.set()
            self.give_up()
        elif now - self._noticed > _TELL_SECONDS:
            self._noticed = now
            self.notify(f"No {label.upper()} worker at present; jobs: {self.state}.")
