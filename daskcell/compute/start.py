"""Starting and ending workers: this process, processes of this machine, jobs, or those of a scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from daskcell.compute.jobqueue import SUBMIT, job_cluster, job_specs, reason
from daskcell.compute.keeper import JobKeeper, Keeper
from daskcell.compute.local import local_cluster, local_settings, visible_gpus
from daskcell.compute.threads import threads_limited
from daskcell.compute.window import Workers
from daskcell.config import QUEUES, ComputeSettings
from daskcell.errors import ComputeError, ConfigError, DaskcellError

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_SECONDS = 20.0
_WAIT_SECONDS = 60.0
_WAIT_SECONDS_JOBS = 3600.0
_TELL_SECONDS = 30.0


@contextlib.contextmanager
def start_workers(
    settings: ComputeSettings | None = None,
    tell: Callable[[str], None] | None = None,
    memory: int = 0,
) -> Iterator[Workers]:
    """Workers as the settings ask, stopped on leaving.

    ``local`` starts one single-task process per core, ``gpu`` one per visible GPU besides, ``inline`` uses
    this process, ``slurm``, ``pbs``, ``lsf`` and ``sge`` submit jobs, and an address connects to a running
    scheduler, whose workers stay.

    Parameters
    ----------
    settings
        None: the defaults.
    tell
        Called with a sentence now and then while jobs wait in the queue; None: nobody is told.
    memory
        Bytes that a worker should have. Where the settings do not say how many workers this machine is to
        start, it starts no more than get as much.

    Raises
    ------
    ComputeError
        The machine asked for is not there: no GPU, no queue, no scheduler, no worker in time; or worker
        processes cannot start.
    ConfigError
        The settings do not say enough to ask a queue for jobs.
    """
    settings = settings or ComputeSettings()
    tell = tell or (lambda sentence: None)
    _refuse_while_spawning()
    if settings.kind == "inline":
        with threads_limited(settings.threads):
            if settings.network_device == "cuda":
                visible_gpus()
            yield Workers()
    elif settings.kind in ("local", "gpu"):
        with _local_workers(settings, memory) as workers:
            yield workers
    elif settings.kind in QUEUES:
        with _job_workers(settings, tell) as workers:
            yield workers
    elif "://" in settings.kind or settings.kind.rpartition(":")[2].isdigit():
        with _remote_workers(settings) as workers:
            yield workers
    else:
        raise ConfigError(
            f"compute.kind is {settings.kind!r}; please give local, gpu, inline, {', '.join(QUEUES)}, or the "
            "address of a Dask scheduler, such as tcp://host:8786."
        )


@contextlib.contextmanager
def _local_workers(settings: ComputeSettings, memory: int) -> Iterator[Workers]:
    gpus = visible_gpus() if settings.network_device == "cuda" else []
    with _quiet_logs(), local_settings(settings.threads), contextlib.ExitStack() as stack:
        try:
            cluster = local_cluster(settings, gpus, memory)
            stack.callback(_close, cluster, timeout=20)
            client = _client_of(cluster, stack)
            client.wait_for_workers(len(cluster.worker_spec), timeout=settings.wait or _WAIT_SECONDS)
        except ConfigError:
            raise
        except Exception as error:
            raise ComputeError(
                f"The worker processes did not start ({type(error).__name__}: {_first_line(error)}). In a "
                "script of your own, please call daskcell under `if __name__ == '__main__':`, since each "
                "worker imports the script."
            ) from error
        stack.enter_context(Keeper(cluster))
        labels = frozenset({"GPU", "CPU"}) if gpus else frozenset()
        yield _ready(client, settings, labels)


@contextlib.contextmanager
def _job_workers(settings: ComputeSettings, tell: Callable[[str], None]) -> Iterator[Workers]:
    with _quiet_logs(), _patience(), contextlib.ExitStack() as stack:
        try:
            cluster = job_cluster(settings)
            stack.callback(_close, cluster, timeout=60)
            specs = job_specs(settings, cluster)
            kept = {"cpu": settings.jobs, "gpu": settings.gpu_jobs or settings.jobs}
            fewest = {label: kept[label].minimum or kept[label].count for label in specs}
            keeper = JobKeeper(cluster, settings.kind, specs, fewest, tell)
            keeper.ask()
        except DaskcellError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            raise ComputeError(
                f"{settings.kind} did not take the job: {reason(error)}. Please check compute.jobs, and "
                f"what {SUBMIT[settings.kind]} takes here."
            ) from error
        client = _client_of(cluster, stack)
        stack.enter_context(keeper)
        labels = frozenset({"GPU", "CPU"}) if settings.gpu_jobs else frozenset()
        _wait_for_jobs(client, keeper, settings, labels, tell)
        keeper.give_up = lambda: _close(client, timeout=5)  # ends the wait for tasks that cannot run any more
        yield _ready(client, settings, labels, lambda: keeper.trouble)


def _wait_for_jobs(
    client: Client,
    keeper: JobKeeper,
    settings: ComputeSettings,
    labels: frozenset[str],
    tell: Callable[[str], None],
) -> None:
    """Until there is a worker of every kind that was asked for."""
    logs = keeper.cluster.new_spec["options"].get("log_directory")
    look = f"Please look at the queue, and at what the jobs printed in {logs}."
    limit = settings.wait or _WAIT_SECONDS_JOBS
    start = told = time.monotonic()
    while True:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        found = {label for worker in workers for label in worker.get("resources") or {}}
        if labels <= found if labels else workers:
            return
        now = time.monotonic()
        missing = f"{' and '.join(sorted(labels - found))} worker".strip()
        if keeper.trouble:
            raise ComputeError(f"{keeper.trouble} {look}")
        if now - start > limit:
            raise ComputeError(
                f"There was no {missing} on {settings.kind} within {limit:.0f} s (compute.wait); jobs: "
                f"{keeper.state}. {look}"
            )
        if now - told > _TELL_SECONDS:
            told = now
            tell(f"Waiting for a {missing} for {now - start:.0f} s; jobs: {keeper.state}.")
        time.sleep(0.2)


@contextlib.contextmanager
def _remote_workers(settings: ComputeSettings) -> Iterator[Workers]:
    from distributed import Client

    limit = settings.wait or _WAIT_SECONDS
    with _quiet_logs(), contextlib.ExitStack() as stack:
        try:
            _must_answer(settings.kind)
            client = Client(settings.kind, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            why = f" ({_first_line(error)})" if _first_line(error) else ""
            raise ComputeError(
                f"No Dask scheduler answers at {settings.kind} within {_CONNECT_SECONDS:.0f} s{why}. Please "
                "look whether it runs and whether this machine can reach it, or set compute.kind to 'local'."
            ) from None
        stack.callback(_close, client, timeout=5)
        try:
            client.wait_for_workers(1, timeout=limit)
        except TimeoutError:
            raise ComputeError(
                f"The scheduler at {settings.kind} had no worker within {limit:.0f} s (compute.wait). "
                "Please start workers there."
            ) from None
        workers = _ready(client, settings)
        if settings.network_device == "cuda" and "GPU" not in workers.labels:
            raise ComputeError(
                f"A GPU was asked for, but no worker of {settings.kind} is labelled for it. Please start "
                "those that have a GPU with: dask worker --resources 'GPU=1' --nthreads 1."
            )
        yield workers


def _must_answer(address: str) -> None:
    """Ask a scheduler for its name; a `Client` would wait for ever for one that takes the call and hangs."""
    from distributed import rpc
    from distributed.security import Security

    async def ask() -> None:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as scheduler:
            await asyncio.wait_for(scheduler.identity(), _CONNECT_SECONDS)

    with ThreadPoolExecutor(1) as thread:  # a notebook runs a loop in this one
        thread.submit(asyncio.run, ask()).result()


def _client_of(cluster: Any, stack: contextlib.ExitStack) -> Client:
    from distributed import Client

    client = Client(cluster, timeout=60, set_as_default=False)
    stack.callback(_close, client, timeout=5)
    return client


def _ready(
    client: Client,
    settings: ComputeSettings,
    labels: frozenset[str] = frozenset(),
    trouble: Callable[[], str | None] | None = None,
) -> Workers:
    """Workers that were looked at: threads held, and the GPUs that were promised are there."""
    from daskcell.compute._worker import Care, gpu_found

    if settings.network_device == "cuda":
        workers = client.scheduler_info(n_workers=-1)["workers"]
        promised = [address for address, worker in workers.items() if "GPU" in (worker["resources"] or {})]
        found = client.run(gpu_found, workers=promised) if promised else {}
        for address in promised:
            if not found[address]:
                raise ComputeError(
                    f"The worker at {address} is labelled GPU, but torch finds no CUDA GPU there. Please "
                    "check its driver and that the job asks for a GPU, or set compute.device to 'cpu'."
                )
    client.register_plugin(Care(settings.threads))
    return Workers(client, labels=labels, trouble=trouble)


def _close(what: Any, timeout: float) -> None:
    with contextlib.suppress(Exception):
        what.close(timeout=timeout)


def _refuse_while_spawning() -> None:
    # Set by multiprocessing while a child imports its parent's script: starting workers there would start
    # workers that start workers.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ComputeError(
            "Workers import the script that starts them, so a script must call daskcell under "
            "`if __name__ == '__main__':`. Please put the call there."
        )


def _patience() -> Any:
    import dask

    # A process that starts again imports torch first, which takes long on a busy machine.
    return dask.config.set({"distributed.deploy.lost-worker-timeout": "2 minutes"})


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Dask's own log lines off while we run: what a user should know is said by daskcell."""
    import distributed  # noqa: F401  (sets its own levels when it is imported)

    # Those below the first have levels of their own in Dask's settings.
    names = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
