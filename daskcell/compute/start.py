"""Starting and ending workers: this process, processes of this machine, jobs, or those of a scheduler."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell.compute.autoscaler import Autoscaler, JobAutoscaler
from daskcell.compute.given import (
    WAIT_SECONDS,
    close,
    first_line,
    given_workers,
    refuse_missing_gpus,
    workers_set_up,
)
from daskcell.compute.jobqueue import SUBMIT, job_cluster, job_specs, reason
from daskcell.compute.local import SCRIPT_MARK, changed_settings, local_cluster, local_settings, visible_gpus
from daskcell.compute.process import quiet_logs, threads_limited
from daskcell.compute.task_queue import Workers
from daskcell.config import HERE, QUEUES, ComputeSettings
from daskcell.errors import ComputeError, ConfigError, DaskcellError

if TYPE_CHECKING:
    from distributed import Client

_WAIT_SECONDS_JOBS = 3600.0
_TELL_SECONDS = 30.0


@contextlib.contextmanager
def start_workers(
    settings: ComputeSettings | None = None,
    notify: Callable[[str], None] | None = None,
    memory: int = 0,
    client: Any = None,
    name: str = "daskcell",
) -> Iterator[Workers]:
    """Workers as the settings ask, stopped on leaving; or those of a given client, which stay.

    ``local`` and ``auto`` start one single-task process per core, ``gpu`` one per visible GPU besides,
    ``inline`` uses this process, ``slurm``, ``pbs``, ``lsf`` and ``sge`` submit jobs, and an address connects
    to a running scheduler, whose workers stay.

    Parameters
    ----------
    settings
        None: the defaults.
    notify
        Called with a sentence now and then while jobs wait in the queue.
    memory
        Bytes that a worker should have. Where the settings do not give the number of workers on this machine,
        no more are started than get as much.
    client
        A `distributed.Client`, a cluster object or a scheduler's address, whose workers to use whatever
        ``compute.kind`` says. They are checked and set up like our own, and put back on leaving.
    name
        Identifies that set-up: one that a killed run left behind is replaced by the next of the same name.

    Raises
    ------
    ComputeError
        The machine asked for is not there: no GPU, no queue, no scheduler, no worker in time; worker
        processes cannot start; or a client is asynchronous or closed, or its workers lack daskcell or have
        another version of it.
    ConfigError
        The settings do not say enough to ask a queue for jobs.
    """
    settings = settings or ComputeSettings()
    notify = notify or (lambda sentence: None)
    _refuse_while_spawning()
    if client is not None:
        with given_workers(client, settings, notify, name) as workers:
            yield workers
    elif settings.kind == "inline":
        with threads_limited(settings.threads):
            if settings.network_device == "cuda":
                visible_gpus()
            yield Workers()
    elif settings.kind in ("auto", "local", "gpu"):
        with _local_workers(settings, memory) as workers:
            yield workers
    elif settings.kind in QUEUES:
        with _job_workers(settings, notify) as workers:
            yield workers
    elif "://" in settings.kind or settings.kind.rpartition(":")[2].isdigit():
        with given_workers(settings.kind, settings, notify, name) as workers:
            yield workers
    else:
        raise ConfigError(
            f"compute.kind is {settings.kind!r}; please give {', '.join((*HERE, *QUEUES))}, or the "
            "address of a Dask scheduler, such as tcp://host:8786."
        )


@contextlib.contextmanager
def _local_workers(settings: ComputeSettings, memory: int) -> Iterator[Workers]:
    gpus = visible_gpus() if settings.network_device == "cuda" else []
    with quiet_logs(), local_settings(settings.threads), contextlib.ExitStack() as stack:
        try:
            cluster = local_cluster(settings, gpus, memory)
            stack.callback(close, cluster, timeout=20)
            client = _client_of(cluster, stack)
            client.wait_for_workers(len(cluster.worker_spec), timeout=settings.wait or WAIT_SECONDS)
        except ConfigError:
            raise
        except Exception as error:
            raise ComputeError(_why_none_started(error)) from error
        stack.enter_context(Autoscaler(cluster))
        labels = frozenset({"GPU", "CPU"}) if gpus else frozenset()
        refuse_missing_gpus(client, "this machine", settings.network_device)
        stack.enter_context(workers_set_up(client, settings, labels))
        yield Workers(client, labels=labels)


@contextlib.contextmanager
def _job_workers(settings: ComputeSettings, notify: Callable[[str], None]) -> Iterator[Workers]:
    with quiet_logs(), _patience(), contextlib.ExitStack() as stack:
        try:
            cluster = job_cluster(settings)
            stack.callback(close, cluster, timeout=60)
            specs = job_specs(settings, cluster)
            kept = {"cpu": settings.jobs, "gpu": settings.gpu_jobs or settings.jobs}
            fewest = {label: kept[label].minimum or kept[label].count for label in specs}
            autoscaler = JobAutoscaler(cluster, settings.kind, specs, fewest, notify)
            autoscaler.ask()
        except DaskcellError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            raise ComputeError(
                f"{settings.kind} did not take the job: {reason(error)}. Please check compute.jobs, and "
                f"what {SUBMIT[settings.kind]} takes here."
            ) from error
        client = _client_of(cluster, stack)
        stack.enter_context(autoscaler)
        labels = frozenset({"GPU", "CPU"}) if settings.gpu_jobs else frozenset()
        _wait_for_jobs(client, autoscaler, settings, labels, notify)
        autoscaler.give_up = lambda: close(
            client, timeout=5
        )  # ends the wait for tasks that cannot run any more
        refuse_missing_gpus(client, settings.kind, settings.network_device)
        stack.enter_context(workers_set_up(client, settings, labels))
        yield Workers(client, labels=labels, trouble=lambda: autoscaler.trouble)


def _wait_for_jobs(
    client: Client,
    autoscaler: JobAutoscaler,
    settings: ComputeSettings,
    labels: frozenset[str],
    notify: Callable[[str], None],
) -> None:
    """Until there is a worker of every kind that was asked for."""
    logs = autoscaler.cluster.new_spec["options"].get("log_directory")
    look = f"Please look at the queue, and at what the jobs printed in {logs}."
    limit = settings.wait or _WAIT_SECONDS_JOBS
    start = noticed = time.monotonic()
    while True:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        found = {label for worker in workers for label in worker.get("resources") or {}}
        if labels <= found if labels else workers:
            return
        now = time.monotonic()
        missing = f"{' and '.join(sorted(labels - found))} worker".strip()
        if autoscaler.trouble:
            raise ComputeError(f"{autoscaler.trouble} {look}")
        if now - start > limit:
            raise ComputeError(
                f"There was no {missing} on {settings.kind} within {limit:.0f} s (compute.wait); jobs: "
                f"{autoscaler.state}. {look}"
            )
        if now - noticed > _TELL_SECONDS:
            noticed = now
            notify(f"Waiting for a {missing} for {now - start:.0f} s; jobs: {autoscaler.state}.")
        time.sleep(0.2)


def _client_of(cluster: Any, stack: contextlib.ExitStack) -> Client:
    from distributed import Client

    client = Client(cluster, timeout=60, set_as_default=False)
    stack.callback(close, client, timeout=5)
    return client


def _why_none_started(error: BaseException) -> str:
    """The error that Dask wrapped, and what to do about it."""
    if os.path.exists(os.environ.get(SCRIPT_MARK, "")):
        return (
            "The worker processes did not start, since each imports the script that starts them, and that "
            "calls daskcell at once. Please call it under `if __name__ == '__main__':`."
        )
    while (cause := error.__cause__ or error.__context__) is not None and str(cause):
        error = cause
    text = f"The worker processes did not start ({type(error).__name__}: {first_line(error)})."
    if changed := changed_settings():
        text += f" Dask is configured here, with {', '.join(changed)}: please check these settings."
    return text


def _refuse_while_spawning() -> None:
    # Set by multiprocessing while a child imports its parent's script: workers started there would start
    # workers of their own.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        if mark := os.environ.get(SCRIPT_MARK):
            Path(mark).touch()  # for the parent, which only learns that a child died
        raise ComputeError(
            "Workers import the script that starts them, so a script must call daskcell under "
            "`if __name__ == '__main__':`. Please put the call there."
        )


def _patience() -> Any:
    import dask

    # A process that starts again imports torch first, which takes long on a busy machine.
    return dask.config.set({"distributed.deploy.lost-worker-timeout": "2 minutes"})
