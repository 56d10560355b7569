"""Subclasses of Dask's classes; a module of their own, since it must import `distributed`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import Any

from distributed import Status, Worker, WorkerPlugin, as_completed

from daskcell._version import __version__
from daskcell.allocator import keep_freed_memory
from daskcell.compute.process import NEEDS_GPU, hold_threads, quiet_logs, release_threads
from daskcell.errors import ComputeError

_RETRY_SECONDS = 0.5


class WorkerSetup(WorkerPlugin):
    """Sets up every present and future worker: threads, memory, quiet logs, and a clean end.

    Parameters
    ----------
    threads
        For the numerical libraries; restored when the plugin is removed.
    needs_gpu
        Whether workers must find a GPU: those labelled for it, or all where `labelled` is False.
    """

    def __init__(
        self, threads: int, *, needs_gpu: bool = False, labelled: bool = False, name: str = "daskcell"
    ):
        self.threads, self.needs_gpu, self.labelled, self.name = threads, needs_gpu, labelled, name
        self.version = __version__

    def setup(self, worker: Worker) -> None:
        self.undo = contextlib.ExitStack()
        hold_threads(self.threads)
        self.undo.callback(release_threads, self.threads)
        if worker.nanny:  # otherwise the process, and its log, belong to the user
            self.undo.enter_context(quiet_logs())
        keep_freed_memory()
        if self.unfit(worker):
            worker.loop.add_callback(worker.close, reason="daskcell-unfit")

    def unfit(self, worker: Worker) -> bool:
        """Whether a worker that joined later would give other results, or none."""
        if self.version != __version__:
            return True
        resources = worker.state.total_resources
        return self.needs_gpu and ("GPU" in resources or not self.labelled) and not gpu_found()

    def teardown(self, worker: Worker) -> None:
        # A worker that leaves lets its running task continue for up to 30 s, while the scheduler gives it to
        # another worker: both would write the same files. So a nanny's child ends at once.
        leaving = worker.status not in (Status.running, Status.paused, Status.init)
        if worker.nanny and leaving and worker.state.executing:
            os._exit(0)
        self.undo.close()


class JobWorker(Worker):
    """A worker that finishes its running task when its lifetime is over.

    Dask's own worker leaves at once, and the task starts again elsewhere. With the variable `NEEDS_GPU`, the
    worker refuses to start where torch finds no GPU: every slide would fail on it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        if os.environ.get(NEEDS_GPU) and not gpu_found():
            raise ComputeError(f"torch finds no CUDA GPU on {socket.gethostname()}, which should have one.")
        super().__init__(*args, **kwargs)

    async def close_gracefully(
        self, restart: bool | None = None, reason: str = "worker-close-gracefully"
    ) -> None:
        if self.status not in (Status.running, Status.paused):
            await super().close_gracefully(restart=restart, reason=reason)
            return
        self.status = Status.closing_gracefully  # no new tasks, from here or from the scheduler
        while self.state.executing:
            await asyncio.sleep(0.1)
        # What `super` does next; called here, it would take the new status for a second call and return.
        await self.scheduler.retire_workers(
            workers=[self.address],
            close_workers=False,
            remove=True,
            stimulus_id=f"lifetime-over-{time.time()}",
        )
        restart = self.lifetime_restart if restart is None else restart
        await self.close(nanny=not restart, reason=reason)


class Completed(as_completed):
    """`distributed.as_completed` that never waits forever.

    There, a task is dropped when its result cannot be fetched, as from a scheduler that is killed at that
    moment, and the caller waits forever. Here the fetch is repeated until the scheduler answers, or until the
    client gives up, which cancels its tasks.
    """

    def wait(self, seconds: float) -> bool:
        """Whether there is a result, after waiting for at most `seconds`."""
        with self.thread_condition:
            if not self.has_ready():
                self.thread_condition.wait(timeout=seconds)
        return self.has_ready()

    async def _track_future(self, future: Any) -> None:
        while True:
            try:
                return await super()._track_future(future)
            except OSError:
                await asyncio.sleep(_RETRY_SECONDS)


def gpu_found(dask_worker: Any = None) -> bool:
    """Whether torch can use a GPU in this process."""
    import torch

    return torch.cuda.is_available()


def versions(dask_worker: Any = None) -> dict[str, str]:
    """Versions of the packages on which the last bits of a result depend."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "numpy", "scipy", "scikit-image", "cellpose")}
