"""A time limit per task: the worker process of a task that hangs is ended, and the task runs elsewhere.

Nothing less ends a thread that waits for a disk or loops in a decoder. The nanny replaces the process;
without a nanny (threads of this process, ``--no-nanny``), there is no limit.

    task thread      with_timeout(seconds, function, ...)  ── reset("slide 7") ── reset("slide 8") ──
    watching thread        too long? tell the scheduler which one, then leave with the process
    faulthandler           the same, later, where a decoder holds the interpreter's lock
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from daskcell.errors import ComputeError

if TYPE_CHECKING:
    from distributed import Client, Worker

TOPIC = "daskcell-timeout"
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 60.0
_FLUSH_SECONDS = 0.25


class WorkerLost(ComputeError):
    """A task was lost with its worker; other tasks are not affected."""


class TaskTimeout(WorkerLost):
    """A task took too long, every time it was tried."""

    def __init__(self, text: str, item: str | None = None):
        super().__init__(text)
        self.item = item
        """The item that was being worked on, where a task has several (see `reset`)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TaskTimeout, (str(self), self.item)


@dataclass
class _Running:
    worker: Worker
    key: str
    seconds: float
    since: float
    item: str | None = None


_running: dict[int, _Running] = {}
_lock = threading.Lock()


def with_timeout(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` as a task on a worker; the process ends if it takes longer than `seconds`."""
    from distributed import get_worker

    worker, me = get_worker(), threading.get_ident()
    if not worker.nanny:
        return function(*args)
    with _lock:
        if not any(thread.name == TOPIC for thread in threading.enumerate()):
            threading.Thread(target=_watch, name=TOPIC, daemon=True).start()
        _running[me] = _Running(worker, str(worker.get_current_task()), seconds, time.monotonic())
    _rearm()
    try:
        return function(*args)
    finally:
        with _lock:
            del _running[me]
        _rearm()


def reset(item: str) -> None:
    """Restart the clock of this thread's task for the next of its items; outside a task, do nothing."""
    with _lock:
        task = _running.get(threading.get_ident())
        if task is not None:
            task.since, task.item = time.monotonic(), item
    if task is not None:
        _rearm()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Stop the clock of this thread's task while it waits for other tasks, which have limits of their own."""
    with _lock:
        task = _running.get(threading.get_ident())
        if task is not None:
            task.since, used = math.inf, time.monotonic() - task.since
    if task is None:
        yield
        return
    _rearm()
    try:
        yield
    finally:
        with _lock:
            task.since = time.monotonic() - used
        _rearm()


def timeout_error(client: Client, key: str) -> TaskTimeout | None:
    """The error of a task whose workers were ended because it took too long; None for other causes."""
    messages = [message for _, message in client.get_events(TOPIC) or () if message["key"] == key]
    if not messages:
        return None
    times = f", {len(messages)} times over" if len(messages) > 1 else ""
    return TaskTimeout(
        f"It took longer than compute.task_seconds ({messages[-1]['seconds']:g} s){times}. Please look at "
        "the file and the disk it is on, or allow more time.",
        messages[-1]["item"],
    )


def _rearm() -> None:
    with _lock:
        ends = [task.since + task.seconds for task in _running.values() if task.since < math.inf]
        if ends:
            left = max(0.1, min(ends) - time.monotonic())
            faulthandler.dump_traceback_later(left + _GRACE_SECONDS, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()


def _watch() -> None:
    while True:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        with _lock:
            late = [task for task in _running.values() if now > task.since + task.seconds]
        for task in late:
            _send({"key": task.key, "seconds": task.seconds, "item": task.item}, task.worker)
        if late:
            os._exit(1)


def _send(message: dict[str, Any], worker: Worker) -> None:
    """Send a message about a worker that is about to end, and wait until it has left.

    The worker's loop may be busy, as while it imports what a task needs.
    """
    left = threading.Event()

    def send() -> None:
        worker.log_event(TOPIC, message)
        worker.loop.call_later(_FLUSH_SECONDS, left.set)  # Dask sends messages in batches

    worker.loop.add_callback(send)
    left.wait(_GRACE_SECONDS / 2)
