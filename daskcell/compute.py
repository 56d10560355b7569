"""Where the work runs: this process, this machine's cores and GPUs, or a Dask scheduler somewhere.

`start_workers` turns settings into `Workers`; a `Window` of it runs tasks, a bounded number at a time.
Covers processes, threads, labels and windows. Knows nothing of images, studies or networks: a task is an
importable function with small arguments and a small result, and pixels go through files.

Labels. Where some worker declares the resource ``GPU``, tasks of kind ``network`` run on such workers only;
where some worker declares ``CPU``, all other tasks run on those. Without labels everything runs anywhere.
Resources are asked for at `submit`, which holds; `dask.annotate` is lost when arrays fuse (dask/dask#7036).
The scheduler does not queue tasks that ask for resources, so the window does.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from daskcell.config import ComputeSettings
from daskcell.errors import ComputeError

if TYPE_CHECKING:
    from distributed import Client

Kind = Literal["cpu", "network"]
LABELS: dict[str, str] = {"network": "GPU", "cpu": "CPU"}
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
_IN_FLIGHT_PER_WORKER = 4
_RECOUNT_SECONDS = 5.0
_CONNECT_SECONDS = 20.0
_WORKER_WAIT_SECONDS = 60.0
_REPLACE_SECONDS = 2.0


@dataclass(frozen=True)
class Failed:
    """What a window yields in place of a result when it keeps going: the task's exception."""

    error: BaseException


class Workers:
    """A Dask client, or this process when `client` is None.

    Parameters
    ----------
    client
        A connected, synchronous `distributed.Client`.
    on_task
        Called in the driving thread after every finished task (for progress and heartbeats).
    """

    def __init__(self, client: Client | None = None, *, on_task: Callable[[], None] | None = None):
        self.client = client
        self.on_task = on_task
        self._counted: tuple[float, int, frozenset[str]] = (float("-inf"), 1, frozenset())

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
    def alive(self) -> bool:
        """Whether the scheduler still answers (always True in this process)."""
        return self.client is None or self.client.status == "running"

    def window(self, limit: int | None = None, *, keep_going: bool = False) -> Window:
        """A new window with at most `limit` tasks in flight (None: four per worker).

        With `keep_going` a task's exception is yielded as `Failed` and the other tasks go on.
        """
        return Window(self, limit, keep_going=keep_going)

    def watched(self, on_task: Callable[[], None]) -> Workers:
        """The same workers, with another callback."""
        return Workers(self.client, on_task=on_task)

    def _look(self) -> tuple[int, frozenset[str]]:
        if self.client is None:
            return 1, frozenset()
        seen, count, labels = self._counted
        if time.monotonic() - seen > _RECOUNT_SECONDS:  # workers come and go on an adaptive cluster
            workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
            count = max(1, sum(worker["nthreads"] for worker in workers))
            # A label once seen stays: with all GPU workers gone for a while, network tasks wait for the next.
            labels |= {label for worker in workers for label in worker.get("resources") or {}}
            self._counted = time.monotonic(), count, labels
        return count, labels


class Window:
    """Runs tasks, at most so many in flight, and yields ``(key, result)`` as they complete.

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
        """Queue ``function(*args)``; it starts once somebody iterates."""
        if kind not in LABELS:
            raise ValueError(f"kind must be one of {sorted(LABELS)}, not {kind!r}")
        self._queue.append((key, function, args, kind))

    def __len__(self) -> int:
        """Tasks that were submitted and have not started."""
        return len(self._queue)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        run = self._run_here() if self._workers.client is None else self._run_on(self._workers.client)
        try:
            for key, result in run:
                if self._workers.on_task is not None:
                    self._workers.on_task()
                if isinstance(result, Failed) and not self._keep_going:
                    result.error.add_note(f"(in task {key!r})")
                    raise result.error
                yield key, result
        finally:
            run.close()
            self._queue.clear()

    def _run_here(self) -> Generator[tuple[Any, Any], None, None]:
        while self._queue:
            key, function, args, _ = self._queue.popleft()
            try:
                result: Any = function(*args)
            except Exception as error:
                result = Failed(error)
            yield key, result

    def _run_on(self, client: Client) -> Generator[tuple[Any, Any], None, None]:
        from distributed import as_completed

        done = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        running: dict[Any, Hashable] = {}
        run = uuid.uuid4().hex[:12]
        numbers = itertools.count()
        try:
            while True:
                limit = self._limit or _IN_FLIGHT_PER_WORKER * self._workers.count
                while self._queue and len(running) < limit:
                    key, function, args, kind = self._queue.popleft()
                    label = LABELS[kind]
                    name = getattr(function, "__name__", "task")
                    future = client.submit(
                        function,
                        *args,
                        key=f"{name}-{run}-{next(numbers)}",
                        pure=False,
                        resources={label: 1} if label in self._workers.labels else None,
                    )
                    running[future] = key
                    done.add(future)
                if not running:
                    return
                future, result = next(done)
                key = running.pop(future)
                if future.status != "finished":
                    result = Failed(_explain(future, result, client))
                # The scheduler may forget the task at once: a collection's results never pile up there.
                future.release()
                yield key, result
        finally:
            if running:
                with contextlib.suppress(Exception):  # the scheduler may be what failed
                    client.cancel(list(running), force=True)


def _explain(future: Any, outcome: Any, client: Client) -> BaseException:
    """The exception of a future that did not finish; deaths of workers and schedulers in words."""
    from distributed.scheduler import KilledWorker

    if future.status == "error":
        error = outcome[1] if isinstance(outcome, tuple) else outcome
        if isinstance(error, KilledWorker):
            limit = f"compute.memory or compute.block (the last one was {error.last_worker.address})"
            return ComputeError(
                "A task killed its worker several times, most often for want of memory. Please change "
                + limit
                + "."
            )
        return error
    state = "its connection to the scheduler is lost" if client.status != "running" else str(outcome)
    return ComputeError(f"A task was cancelled: {state}. The same command continues the study.")


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
def threads_limited(threads: int) -> Iterator[None]:
    """This process's BLAS, OpenMP, numba and torch held to `threads` threads, and put back on leaving."""
    from threadpoolctl import threadpool_limits

    variables = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    torch = sys.modules.get("torch")
    torch_before = torch.get_num_threads() if torch else None
    with threadpool_limits(limits=threads):
        limit_threads(threads)
        try:
            yield
        finally:
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if torch_before is not None:
                sys.modules["torch"].set_num_threads(torch_before)


def limit_threads(threads: int) -> None:
    """Hold this process's numerical libraries to `threads` threads, those that load later too."""
    from threadpoolctl import threadpool_limits

    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    threadpool_limits(limits=threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "numba" in sys.modules:
        numba = sys.modules["numba"]
        with contextlib.suppress(ValueError):  # numba refuses more threads than it started with
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))


@contextlib.contextmanager
def _local_client(settings: ComputeSettings) -> Iterator[Client]:
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, SpecCluster
    from distributed.system import MEMORY_LIMIT

    from daskcell._worker_plugin import ThreadLimit

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

    from daskcell._worker_plugin import ThreadLimit

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
