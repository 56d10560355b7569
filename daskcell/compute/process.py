"""What is set in a whole process while a run uses it: threads of the numerical libraries, Dask's log level.

Several runs, and workers that are threads of one process, may overlap; the last one to end puts back what was
there before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "ZARR_THREADING__MAX_WORKERS",
    "NUMBA_NUM_THREADS",
)
# Numba reads its variable again at every compilation and refuses a value other than the first; our compiled
# functions run in one thread anyway.
CHANGEABLE = THREAD_VARIABLES[:-1]


NEEDS_GPU = "DASKCELL_NEEDS_GPU"
"""Variable of a job that has to find a GPU."""


_before = contextlib.ExitStack()
"""Puts this process's threads back."""
_limits: list[int] = []
"""One for each `hold_threads` that is not released yet; the last one is in force."""
_lock = threading.Lock()


@contextlib.contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    """Limit this process's BLAS, OpenMP and torch to `threads` threads; restored on leaving."""
    hold_threads(threads)
    try:
        with thread_limited():
            yield
    finally:
        release_threads(threads)


def hold_threads(threads: int) -> None:
    """As `limit_threads`, until `release_threads` is called as often: workers may share a process."""
    from threadpoolctl import threadpool_limits

    with _lock:
        if not _limits:
            _before.enter_context(threadpool_limits(limits=threads))
            _before.callback(_restore, {name: os.environ.get(name) for name in CHANGEABLE}, _torch_threads())
        _limits.append(threads)
        limit_threads(threads)


def release_threads(threads: int) -> None:
    """Undo one `hold_threads` of the same number; the last one restores what was set before."""
    with _lock:
        if threads in _limits:
            _limits.remove(threads)
            if _limits:
                limit_threads(_limits[-1])
            else:
                _before.close()


@contextlib.contextmanager
def thread_limited() -> Iterator[None]:
    """Limit torch in the calling thread too: torch keeps a number for each thread that has used it, which no
    other thread can change."""
    if not _limits:
        yield
        return
    threads, before = _limits[-1], _torch_threads()
    _set_torch_threads(threads)
    try:
        yield
    finally:
        _set_torch_threads(before)


def _restore(variables: dict[str, str | None], torch_threads: int | None) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if torch_threads is None:  # it may have loaded since, and has read the limit then
        said = os.environ.get("OMP_NUM_THREADS", "")
        torch_threads = int(said) if said.isdigit() else os.cpu_count()
    _set_torch_threads(torch_threads)


def _torch_threads() -> int | None:
    """Of this thread; None while torch is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None and hasattr(torch, "get_num_threads") else None


def _set_torch_threads(threads: int | None) -> None:
    torch = sys.modules.get("torch")
    if threads is not None and torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(threads)


def limit_threads(threads: int) -> None:
    """Hold this process's numerical libraries to `threads` threads, those that load later too."""
    from threadpoolctl import threadpool_limits

    os.environ.update(dict.fromkeys(CHANGEABLE, str(threads)))
    threadpool_limits(limits=threads)
    _set_torch_threads(threads)


_NAMES = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
"""All but the first have levels of their own in Dask's settings."""
_levels: dict[str, int] = {}
_users = 0
_log_lock = threading.Lock()


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Dask's log lines off in this process, and back as they were when the last caller leaves."""
    import distributed  # noqa: F401  (sets its own levels when it is imported)

    global _users
    with _log_lock:
        if not _users:
            _levels.update({name: logging.getLogger(name).level for name in _NAMES})
        _users += 1
        for name in _NAMES:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _log_lock:
            _users -= 1
            for name, level in () if _users else _levels.items():
                logging.getLogger(name).setLevel(level)
