"""Workers that the user has started: a client, a cluster or an address, checked and set up like our own.

What is set in their processes (threads, logs) is restored on leaving; the workers keep running.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from daskcell._version import __version__
from daskcell.compute.process import quiet_logs
from daskcell.compute.task_queue import Workers
from daskcell.config import ComputeSettings
from daskcell.errors import ComputeError

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 20.0
WAIT_SECONDS = 60.0
_FACTS = "(*__import__('sys').version_info[:2], __import__('daskcell').__version__)"
"""Evaluated where there may be no daskcell."""


@contextlib.contextmanager
def given_workers(
    given: Any, settings: ComputeSettings, notify: Callable[[str], None], name: str = "daskcell"
) -> Iterator[Workers]:
    """The workers of a `distributed.Client`, of a cluster object, or of the scheduler at an address.

    `name` identifies the set-up (see `WorkerSetup`): another one of the same name replaces it.
    """
    with quiet_logs(), contextlib.ExitStack() as stack:
        client = _client_of(given, stack)
        where = given if isinstance(given, str) else "the Dask client"
        try:
            stack.enter_context(_waiting_aside(client))
            _wait_for_a_worker(client, where, settings.wait or WAIT_SECONDS)
            _refuse_other_versions(client, where, notify)
            labels = refuse_missing_gpus(client, where, settings.network_device)
        except (OSError, TimeoutError) as error:  # CommClosedError among them
            raise ComputeError(
                f"The scheduler of {where} does not answer ({first_line(error)}). Please look "
                "whether it runs."
            ) from None
        with workers_set_up(client, settings, labels, name):
            yield Workers(client, labels=labels)


@contextlib.contextmanager
def workers_set_up(
    client: Client, settings: ComputeSettings, labels: frozenset[str], name: str = "daskcell"
) -> Iterator[None]:
    """Set up present and future workers of `client` (see `WorkerSetup`), and restore them on leaving."""
    from daskcell.compute._distributed import WorkerSetup

    needs_gpu = settings.network_device == "cuda"
    client.register_plugin(
        WorkerSetup(settings.threads, needs_gpu=needs_gpu, labelled="GPU" in labels, name=name)
    )
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # closed since, or its scheduler gone
            if client.status == "running":
                client.unregister_worker_plugin(name)


def refuse_missing_gpus(client: Client, where: str, device: str) -> frozenset[str]:
    """Labels of the workers; raises `ComputeError` if one that would run networks finds no GPU for them."""
    from daskcell.compute._distributed import gpu_found

    workers = client.scheduler_info(n_workers=-1)["workers"]
    labels = frozenset(label for worker in workers.values() for label in worker.get("resources") or {})
    if device != "cuda":
        return labels
    labelled = [address for address, worker in workers.items() if "GPU" in (worker.get("resources") or {})]
    found = client.run(gpu_found, workers=labelled or list(workers))
    missing = [address for address, has in found.items() if not has]
    if labelled and missing:
        raise ComputeError(
            f"The worker at {missing[0]} is labelled GPU, but torch finds no CUDA GPU there. Please "
            "check its driver and that the job asks for a GPU, or set compute.device to 'cpu'."
        )
    if missing:
        which = f"torch finds none at {missing[0]}" if len(missing) < len(found) else "torch finds none there"
        raise ComputeError(
            f"A GPU was asked for, but no worker of {where} is labelled for it, and {which}. Please start "
            "workers that have a GPU with: dask worker --resources 'GPU=1' --nthreads 1; or set "
            "compute.device to 'cpu'."
        )
    return labels


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _client_of(given: Any, stack: contextlib.ExitStack) -> Client:
    from distributed import Client
    from distributed.deploy.cluster import Cluster

    def connected(to: Any) -> Client:
        client = Client(to, timeout=CONNECT_SECONDS, set_as_default=False)
        stack.callback(close, client, timeout=5)
        return client

    if isinstance(given, str):
        try:
            _must_answer(given)
            return connected(given)
        except (OSError, ValueError, TimeoutError) as error:
            raise ComputeError(
                f"No Dask scheduler answers at {given} within {CONNECT_SECONDS:.0f} s ({first_line(error)}). "
                "Please look whether it runs and whether this machine can reach it, or set compute.kind to "
                "'local'."
            ) from None
    if not isinstance(given, (Client, Cluster)):
        raise ComputeError(
            f"client must be a Dask client (distributed.Client), a cluster or a scheduler's address, not "
            f"a {type(given).__name__}."
        )
    what = "client" if isinstance(given, Client) else "cluster"
    if given.asynchronous:
        raise ComputeError(
            f"The Dask {what} is asynchronous, and daskcell waits for its results. Please give one that was "
            f"made with asynchronous=False, outside of a coroutine."
        )
    status = given.status if isinstance(given.status, str) else given.status.name
    if status != "running":
        raise ComputeError(f"The Dask {what} is not connected (it is {status}). Please make a new one.")
    return given if isinstance(given, Client) else connected(given)


@contextlib.contextmanager
def _waiting_aside(client: Client) -> Iterator[None]:
    """Inside a task on one of the client's own workers, free its thread for the tasks it waits for."""
    from distributed import get_worker, rejoin, secede
    from distributed.threadpoolexecutor import thread_state

    try:
        worker = get_worker()
    except ValueError:
        yield
        return
    if worker.scheduler.address != client.scheduler_info(n_workers=0)["address"] or not thread_state.proceed:
        yield
        return
    secede()
    try:
        yield
    finally:
        rejoin()


def _wait_for_a_worker(client: Client, where: str, limit: float) -> None:
    if client.scheduler_info(n_workers=1)["workers"]:
        return
    waiting = client.submit(eval, "None", pure=False)  # an adaptive cluster starts none without a task
    try:
        client.wait_for_workers(1, timeout=limit)
    except TimeoutError:
        raise ComputeError(
            f"The scheduler of {where} had no worker within {limit:.0f} s (compute.wait). Please start "
            "workers there."
        ) from None
    finally:
        waiting.cancel()


def _refuse_other_versions(client: Client, where: str, notify: Callable[[str], None]) -> None:
    from daskcell.compute._distributed import versions

    here = (*sys.version_info[:2], __version__)
    for address, found in client.run(eval, _FACTS, on_error="return").items():
        if isinstance(found, ImportError):
            raise ComputeError(
                f"The worker at {address} has no daskcell ({first_line(found)}). Please install daskcell "
                f"{__version__} where the workers of {where} run."
            )
        if isinstance(found, BaseException):
            raise ComputeError(f"The worker at {address} does not work ({first_line(found)}).")
        if difference := version_difference(here, tuple(found)):
            raise ComputeError(
                f"The worker at {address} has {difference[1]}, and this process {difference[0]}. Please "
                "install the same where both run, since results depend on it."
            )
    ours = versions()
    for address, theirs in client.run(versions).items():
        others = [f"{name} {theirs[name]} (here {ours[name]})" for name in ours if ours[name] != theirs[name]]
        if others:
            notify(f"The worker at {address} has {', '.join(others)}: results may differ in their last bits.")
            return


def version_difference(here: tuple[Any, ...], there: tuple[Any, ...]) -> tuple[str, str] | None:
    """What differs between two ``(major, minor, daskcell)``, in words; None: nothing."""
    if here[2] != there[2]:
        return f"daskcell {here[2]}", f"daskcell {there[2]}"
    if here[:2] != there[:2]:
        return "Python {}.{}".format(*here), "Python {}.{}".format(*there)
    return None


def _must_answer(address: str) -> None:
    """Ask a scheduler for its name; a `Client` waits forever for one that accepts it and hangs."""
    from distributed import rpc
    from distributed.security import Security

    async def ask() -> None:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as scheduler:
            await asyncio.wait_for(scheduler.identity(), CONNECT_SECONDS)

    with ThreadPoolExecutor(1) as thread:  # a notebook runs a loop in this one
        thread.submit(asyncio.run, ask()).result()


def close(what: Any, timeout: float) -> None:
    """Close a client or cluster in any state."""
    with contextlib.suppress(Exception):
        what.close(timeout=timeout)
