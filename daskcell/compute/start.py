"""Starting and ending workers: this process, processes of this machine, or those of a scheduler."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from daskcell.compute.threads import THREAD_VARIABLES, threads_limited
from daskcell.compute.window import Workers
from daskcell.config import ComputeSettings
from daskcell.errors import ComputeError

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_SECONDS = 20.0
_WORKER_WAIT_SECONDS = 60.0
_REPLACE_SECONDS = 2.0


@contextlib.contextmanager
def start_workers(settings: ComputeSettings | None = None) -> Iterator[Workers]:
    """Workers as the settings ask, stopped on leaving.

    ``local`` starts one single-task process per core (with ``device: cuda`` one per visible GPU besides),
    ``inline`` uses this process, and an address connects to a running scheduler, whose workers stay.

    Raises
    ------
    ComputeError
        The machine asked for is not there: no GPU, no scheduler, no worker; or worker processes cannot start.
    """
    settings = settings or ComputeSettings()
    _refuse_while_spawning()
    if settings.kind == "inline":
        with threads_limited(settings.threads):
            if settings.device == "cuda":
                visible_gpus()
            yield Workers()
    elif settings.kind == "local":
        with _local_client(settings) as client:
            yield Workers(client)
    elif "://" in settings.kind or settings.kind.rpartition(":")[2].isdigit():
        with _remote_client(settings) as client:
            yield Workers(client)
    else:
        raise ComputeError(
            f"compute.kind is {settings.kind!r}; please give 'local', 'inline' or the address of a Dask "
            "scheduler, such as tcp://host:8786."
        )


def visible_gpus() -> list[str]:
    """Names for ``CUDA_VISIBLE_DEVICES`` of the GPUs this process may use; raises `ComputeError` for none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ComputeError(
            "compute.device is 'cuda', but no GPU is visible here. Please run where there is one, "
            "or set compute.device to 'cpu'."
        )
    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return listed[:count] if len(listed) >= count else [str(number) for number in range(count)]


@contextlib.contextmanager
def _local_client(settings: ComputeSettings) -> Iterator[Client]:
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, SpecCluster
    from distributed.system import MEMORY_LIMIT

    from daskcell.compute._worker_plugin import ThreadLimit

    gpus = visible_gpus() if settings.device == "cuda" else []
    count = settings.workers or max(1, CPU_COUNT // settings.threads)
    memory = settings.memory
    if memory == "auto":
        memory = str(int(MEMORY_LIMIT * 0.95) // (count + len(gpus)))
    quiet = {
        # Set in the parent before the process starts: libraries read these once, when they load.
        "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},
        "distributed.worker.daemon": False,
        # A process that starts again imports torch first, which takes long on a busy machine.
        "distributed.deploy.lost-worker-timeout": "2 minutes",
    }
    with _quiet_logs(), dask.config.set(quiet):
        cluster = None
        try:
            cluster = SpecCluster(
                workers=_local_spec(settings, count, gpus, memory),
                scheduler=_scheduler_spec(),
                name=f"daskcell-{os.getpid()}",
            )
            client = Client(cluster, timeout="60s", set_as_default=False)
            client.wait_for_workers(count + len(gpus), timeout=_WORKER_WAIT_SECONDS)
        except Exception as error:
            if cluster is not None:
                with contextlib.suppress(Exception):
                    cluster.close()
            raise ComputeError(
                f"The worker processes did not start ({type(error).__name__}: {_first_line(error)}). In a "
                "script of your own, please call daskcell under `if __name__ == '__main__':`, since each "
                "worker imports the script."
            ) from error
        ended = threading.Event()
        watch = threading.Thread(target=_replace_dead, args=(cluster, ended), name="workers", daemon=True)
        watch.start()
        try:
            client.register_plugin(ThreadLimit(settings.threads))
            yield client
        finally:
            ended.set()
            watch.join(timeout=10)
            with contextlib.suppress(Exception):
                client.close(timeout=5)
            with contextlib.suppress(Exception):
                cluster.close(timeout=20)


def _replace_dead(cluster: Any, ended: threading.Event) -> None:
    """Start a new worker in place of one whose nanny gave up.

    A nanny restarts a process that dies, but closes itself when the process dies while it starts, as one does
    that is handed a deadly task at once. With its last worker gone, a run would wait for ever.
    """

    async def correct() -> None:
        dead = [name for name, nanny in cluster.workers.items() if nanny.status.name in ("closed", "failed")]
        for name in dead:
            del cluster.workers[name]
        # The cluster itself drops a worker whose process is slow to come back.
        if set(cluster.worker_spec) - set(cluster.workers):
            await cluster._correct_state()

    while not ended.wait(_REPLACE_SECONDS):
        with contextlib.suppress(Exception):
            cluster.sync(correct)


def _local_spec(
    settings: ComputeSettings, count: int, gpus: list[str], memory: str
) -> dict[str, dict[str, Any]]:
    """What `SpecCluster` starts: `count` CPU workers, and one worker per GPU."""
    from distributed import Nanny

    threads = dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
    common: dict[str, Any] = {
        "host": "127.0.0.1",
        "nthreads": 1,
        "memory_limit": memory,
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }
    spec: dict[str, dict[str, Any]] = {}
    for number in range(count):
        # Hidden from CPU workers, so that none takes GPU memory by accident.
        env = threads | ({"CUDA_VISIBLE_DEVICES": ""} if gpus else {})
        labels = {"resources": {"CPU": 1}} if gpus else {}
        spec[f"cpu-{number}"] = {"cls": Nanny, "options": common | labels | {"env": env}}
    for number, gpu in enumerate(gpus):
        env = threads | {"CUDA_VISIBLE_DEVICES": gpu}
        spec[f"gpu-{number}"] = {"cls": Nanny, "options": common | {"resources": {"GPU": 1}, "env": env}}
    return spec


def _scheduler_spec() -> dict[str, Any]:
    from distributed import Scheduler

    # No dashboard, which asks for no password: who wants one runs `dask scheduler` and gives its address.
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    return {"cls": Scheduler, "options": options}


@contextlib.contextmanager
def _remote_client(settings: ComputeSettings) -> Iterator[Client]:
    from distributed import Client

    from daskcell.compute._worker_plugin import ThreadLimit

    with _quiet_logs():
        try:
            client = Client(settings.kind, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise ComputeError(
                f"No Dask scheduler answers at {settings.kind} ({_first_line(error)}). Please start one, or "
                "set compute.kind to 'local'."
            ) from None
        try:
            try:
                client.wait_for_workers(1, timeout=_WORKER_WAIT_SECONDS)
            except TimeoutError:
                raise ComputeError(
                    f"The scheduler at {settings.kind} had no worker within {_WORKER_WAIT_SECONDS:.0f} s. "
                    "Please start workers there."
                ) from None
            if settings.device == "cuda" and "GPU" not in Workers(client).labels:
                raise ComputeError(
                    f"compute.device is 'cuda', but no worker of {settings.kind} is labelled for it. "
                    "Please start those that have a GPU with: dask worker --resources 'GPU=1' --nthreads 1."
                )
            client.register_plugin(ThreadLimit(settings.threads))
            yield client
        finally:
            with contextlib.suppress(Exception):
                client.close(timeout=5)


def _refuse_while_spawning() -> None:
    # Set by multiprocessing while a child imports its parent's script: starting workers there would start
    # workers that start workers.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ComputeError(
            "Workers import the script that starts them, so a script must call daskcell under "
            "`if __name__ == '__main__':`. Please put the call there."
        )


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Dask's own log lines off while we run: what a user should know is said by daskcell."""
    names = ("distributed", "tornado", "asyncio")
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
