"""Tasks: on which workers they run, how many at a time, and their results, in order of completion.

Also orphans: tasks that a killed run left running.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from daskcell.compute.process import thread_limited
from daskcell.compute.timeouts import WorkerLost, paused, timeout_error, with_timeout
from daskcell.errors import ComputeError

if TYPE_CHECKING:
    from distributed import Client

    from daskcell.compute._distributed import Completed

Kind = Literal["cpu", "network"]
LABELS: dict[str, str] = {"network": "GPU", "cpu": "CPU"}
_IN_FLIGHT_PER_WORKER = 4
_MOST_IN_FLIGHT = 1250
"""Tasks of one window; sixteen slides may have one each."""
_RECOUNT_SECONDS = 5.0
_POLL_SECONDS = 0.25
_NOTICE_SECONDS = 5.0
_END = object()
"""In place of a result: there are no more."""


@dataclass(frozen=True)
class Failed:
    """What a window yields in place of a result when it keeps going: the task's exception."""

    error: BaseException


@dataclass(frozen=True)
class WorkersRef:
    """What a task is given to use the workers of its run: `Workers.of_task`, and `send`."""

    labels: frozenset[str] = frozenset()
    owner: str = ""
    task_seconds: float | None = None

    @property
    def topic(self) -> str:
        """Of the messages to the process that drives the run."""
        return f"daskcell-messages-{self.owner}"

    def send(self, message: Any) -> None:
        """Send a small message (msgpack) from within a task; see `Workers.listening`.

        It arrives before the task's result, or never if the worker dies. Outside a task, nothing is sent.
        """
        from distributed import get_worker

        try:
            worker = get_worker()
        except ValueError:  # called outside a task
            return
        worker.loop.add_callback(worker.log_event, self.topic, message)


class Reschedule(ComputeError):
    """A task that waits for other tasks has to stop, since its worker leaves; it should run again."""


class Workers:
    """A Dask client, or this process when `client` is None.

    Parameters
    ----------
    client
        A connected, synchronous `distributed.Client`.
    on_task
        Called in the driving thread after every finished task (for progress and heartbeats).
    labels
        Resources that some worker will declare, where none may be there yet.
    trouble
        Returns the reason why the workers are lost, where it is known.
    task_seconds
        Longest time for a task (see `compute.timeouts`); None: any. In this process there is no limit.

    Attributes
    ----------
    owner : str
        Part of the keys of all tasks, where they are some folder's (see `claim`).
    inline : frozenset of str
        Kinds of tasks that run in this process though there is a client (see `of_task`).
    """

    def __init__(
        self,
        client: Client | None = None,
        *,
        on_task: Callable[[], None] | None = None,
        labels: frozenset[str] = frozenset(),
        trouble: Callable[[], str | None] | None = None,
        task_seconds: float | None = None,
    ):
        self.client = client
        self.on_task = on_task
        self.trouble = trouble
        self.task_seconds = task_seconds
        self.on_step: Callable[[float | None], None] | None = None
        self._step: float | None = None
        self.owner = ""
        self.inline: frozenset[Kind] = frozenset()
        self._counted: tuple[float, int, frozenset[str]] = (float("-inf"), 1, labels)

    def __repr__(self) -> str:
        where = "this process" if self.client is None else self.client.scheduler_info(n_workers=0)["address"]
        return f"Workers({self.count} in {where})"

    @property
    def count(self) -> int:
        """Tasks that can run at the same time: worker threads of the cluster, 1 in this process."""
        return self._look()[0]

    @property
    def labels(self) -> frozenset[str]:
        """Resources that some worker declares, such as ``{"GPU", "CPU"}``."""
        return self._look()[1]

    @property
    def memory(self) -> int | None:
        """Bytes of the worker with the least; None: no limit, none there yet, or this process."""
        if self.client is None:
            return None
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return min((worker["memory_limit"] for worker in workers if worker["memory_limit"]), default=None)

    @property
    def alive(self) -> bool:
        """Whether the scheduler still answers (always True in this process)."""
        return self.client is None or self.client.status == "running"

    def window(self, limit: int | None = None, *, keep_going: bool = False) -> Window:
        """A new window with at most `limit` tasks in flight (None: four per worker).

        With `keep_going` a task's exception is yielded as `Failed` and the other tasks go on.
        """
        return Window(self, limit, keep_going=keep_going)

    def watched(self, on_task: Callable[[], None], task_seconds: float | None = None) -> Workers:
        """The same workers, with another callback and limit of time."""
        workers = copy.copy(self)
        workers.on_task, workers.task_seconds = on_task, task_seconds
        return workers

    def metered(self, on_step: Callable[[float | None], None]) -> Workers:
        """The same workers; `on_step` is called after every task with the part of the whole that it was.

        None: the part is unknown, since no `part` was given.
        """
        workers = copy.copy(self)
        workers.on_step = on_step
        return workers

    def part(self, share: float, tasks: int) -> Workers:
        """The same workers for a `share` (0 to 1) of the whole work, which consists of `tasks` tasks."""
        workers = copy.copy(self)
        workers._step = share / max(tasks, 1)
        return workers

    def finished_task(self) -> None:
        """Call the callbacks after a task."""
        if self.on_step is not None:
            self.on_step(self._step)
        if self.on_task is not None:
            self.on_task()

    def claim(self, folder: str | os.PathLike[str], notify: Callable[[str], None] | None = None) -> Workers:
        """The same workers for tasks that write into `folder`, once no task of a killed run writes there.

        `notify` is called with a sentence now and then meanwhile.
        """
        workers = copy.copy(self)
        workers.owner = owner_of(folder)
        if self.client is not None:
            wait_for_orphans(self.client, workers.owner, notify)
        return workers

    @property
    def ref(self) -> WorkersRef:
        """What a task must know to give work to these workers: it is sent along."""
        return WorkersRef(self.labels, self.owner, self.task_seconds)

    @contextlib.contextmanager
    def listening(self, handler: Callable[[Any], None]) -> Iterator[None]:
        """Call ``handler(message)``, from another thread, for each message that tasks `WorkersRef.send`."""
        client = self.client
        if client is None:
            yield
            return
        client.subscribe_topic(self.ref.topic, lambda event: handler(event[1]))
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # closed since, or its scheduler gone
                client.unsubscribe_topic(self.ref.topic)

    @classmethod
    def of_task(cls, ref: WorkersRef) -> Workers:
        """The workers of a task, within it: its own process, but those with a GPU for networks.

        A worker that has a GPU does all of the work itself: if it waited for another one, both might wait.
        """
        from distributed import get_client, get_worker

        if "GPU" not in ref.labels or "GPU" in get_worker().state.total_resources:
            return cls()
        workers = cls(get_client(), labels=ref.labels, task_seconds=ref.task_seconds)
        workers.owner, workers.inline = ref.owner, frozenset({"cpu"})
        return workers

    def _look(self) -> tuple[int, frozenset[str]]:
        if self.client is None:
            return 1, frozenset()
        if self.inline:
            return 1, self._counted[2]
        seen, count, labels = self._counted
        if time.monotonic() - seen > _RECOUNT_SECONDS:  # workers come and go on an adaptive cluster
            workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
            count = max(1, sum(worker["nthreads"] for worker in workers))
            # A label once seen stays: with all GPU workers gone for a while, network tasks wait for the next.
            labels |= {label for worker in workers for label in worker.get("resources") or {}}
            self._counted = time.monotonic(), count, labels
        return count, labels


class Window:
    """Runs tasks, a bounded number at a time, and yields ``(key, result)`` as they complete.

    More tasks may be submitted while iterating. A task whose worker dies runs again elsewhere, up to Dask's
    ``distributed.scheduler.allowed-failures`` (3) times; so tasks must be safe to repeat. Iterating raises a
    task's exception, with its key as a note, after cancelling the others; see `Workers.window` to go on.
    """

    def __init__(self, workers: Workers, limit: int | None = None, *, keep_going: bool = False):
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self._workers = workers
        self._limit = limit
        self._keep_going = keep_going
        self._queue: deque[tuple[Hashable, Callable[..., Any], tuple[Any, ...], Kind]] = deque()

    def submit(self, key: Hashable, function: Callable[..., Any], *args: Any, kind: Kind = "cpu") -> None:
        """Queue ``function(*args)``; it starts when the window is iterated over."""
        if kind not in LABELS:
            raise ValueError(f"kind must be one of {sorted(LABELS)}, not {kind!r}")
        self._queue.append((key, function, args, kind))

    def __len__(self) -> int:
        """Tasks that were submitted and have not started."""
        return len(self._queue)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        client = self._workers.client
        run = None if client is None else self._run_on(client)
        try:
            while True:
                if run is not None:
                    key, result = next(run, (None, _END))
                    if result is _END:
                        return
                elif self._queue:
                    # Called from here, and not from a method: tracebacks of a run in this process stay short.
                    key, function, args, _ = self._queue.popleft()
                    try:
                        result = function(*args)
                    except Exception as error:
                        result = Failed(error)
                else:
                    return
                self._workers.finished_task()
                if isinstance(result, Failed) and not self._keep_going:
                    result.error.add_note(f"(in task {key!r})")
                    raise result.error
                yield key, result
        finally:
            if run is not None:
                run.close()
            self._queue.clear()

    def _run_on(self, client: Client) -> Generator[tuple[Any, Any], None, None]:
        from daskcell.compute._distributed import Completed

        done = Completed(loop=client.loop, with_results=True, raise_errors=False)
        running: dict[Any, Hashable] = {}
        run = self._workers.owner + uuid.uuid4().hex[:12]
        numbers = itertools.count()
        here: deque[tuple[Hashable, Callable[..., Any], tuple[Any, ...]]] = deque()
        try:
            while True:
                limit = self._limit or min(_IN_FLIGHT_PER_WORKER * self._workers.count, _MOST_IN_FLIGHT)
                while self._queue and len(running) < limit:
                    key, function, args, kind = self._queue.popleft()
                    if kind in self._workers.inline:
                        here.append((key, function, args))
                        continue
                    future = self._send(client, f"{run}-{next(numbers)}", function, args, kind)
                    running[future] = key
                    done.add(future)
                if here and not done.has_ready():
                    key, function, args = here.popleft()
                    yield key, _outcome(function, args)
                    continue
                if not running:
                    return
                with paused():
                    if self._workers.inline:
                        _wait_as_a_task(done)
                    future, result = next(done)
                key = running.pop(future)
                if future.status != "finished":
                    result = Failed(_explain(future, result, self._workers))
                # The scheduler may forget the task at once: a collection's results never pile up there.
                future.release()
                yield key, result
        finally:
            if running:
                with contextlib.suppress(Exception):  # the scheduler may be what failed
                    client.cancel(list(running), force=True)

    def _send(
        self, client: Client, number: str, function: Callable[..., Any], args: tuple[Any, ...], kind: Kind
    ) -> Any:
        label = LABELS[kind]
        return client.submit(
            _run_as_task,
            self._workers.task_seconds,
            function,
            *args,
            key=f"{getattr(function, '__name__', 'task')}-{number}",
            pure=False,
            resources={label: 1} if label in self._workers.labels else None,
            priority=1 if self._workers.inline else 0,  # a task waits for it, and holds a worker
        )


def _run_as_task(seconds: float | None, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` on a worker, with the threads and the time it may take."""
    with thread_limited():
        return function(*args) if seconds is None else with_timeout(seconds, function, *args)


def _wait_as_a_task(done: Completed) -> None:
    """Wait for a result, but not longer than this task's worker may stay: the wait for a GPU may be long."""
    from distributed import Status, get_worker

    worker = get_worker()
    while not done.wait(0.1):
        if worker.status == Status.closing_gracefully:
            raise Reschedule("The worker leaves while its task waits for others.")


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except Exception as error:
        return Failed(error)


def _explain(future: Any, outcome: Any, workers: Workers) -> BaseException:
    """The exception of a future that did not finish; deaths of workers and schedulers in words."""
    from distributed.scheduler import KilledWorker

    if future.status == "error":
        error = outcome[1] if isinstance(outcome, tuple) else outcome
        if isinstance(error, KilledWorker):
            assert workers.client is not None
            late = timeout_error(workers.client, future.key)
            if late is not None:
                return late
            limit = f"compute.memory or compute.block (the last one was {error.last_worker.address})"
            return WorkerLost(
                "A task killed its worker several times, most often for want of memory. Please change "
                + limit
                + "."
            )
        return error
    state = str(outcome) if workers.alive else "its connection to the scheduler is lost"
    trouble = workers.trouble() if workers.trouble is not None else None
    return WorkerLost(f"{trouble or f'A task was cancelled: {state}.'} The same command continues the study.")


def owner_of(folder: str | os.PathLike[str]) -> str:
    """Eight letters for the keys of all tasks that write into `folder`."""
    return hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:8]


def wait_for_orphans(client: Client, owner: str, notify: Callable[[str], None] | None = None) -> None:
    """Wait until no worker runs a task of `owner` that `client` did not submit.

    A scheduler that outlives its client forgets the client's tasks, but no worker can stop a thread: the task
    that is running continues until it finishes, and writes files. If the run were continued at once, two
    tasks would write the same files. So the keys of tasks name their owner, and the next run waits here.
    """
    start = noticed = time.monotonic()
    while True:
        found = client.run(running_tasks, owner, on_error="ignore")
        count = sum(map(len, found.values()))
        if not count:
            return
        now = time.monotonic()
        if notify is not None and now - noticed > _NOTICE_SECONDS:
            noticed = now
            notify(f"Waiting for {count} tasks that an earlier run left running, for {now - start:.0f} s.")
        time.sleep(_POLL_SECONDS)


def running_tasks(owner: str, dask_worker: Any = None) -> list[str]:
    """Keys of the tasks of `owner` that run on a worker, whether or not the scheduler still knows them."""
    with dask_worker.active_threads_lock:
        keys = [str(key) for key in dask_worker.active_threads.values()]
    return [key for key in keys if f"-{owner}" in key]
