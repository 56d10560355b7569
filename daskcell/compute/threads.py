"""How many threads the numerical libraries of a process use."""

from __future__ import annotations

import contextlib
import os
import sys
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
# Numba looks its variable up again at every compilation and refuses another value than it began with; our
# compiled functions run in one thread anyway.
CHANGEABLE = THREAD_VARIABLES[:-1]


NEEDS_GPU = "DASKCELL_NEEDS_GPU"
"""Variable of a job that has to find a GPU."""


@contextlib.contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    """This process's BLAS, OpenMP and torch held to `threads` threads, and put back on leaving."""
    from threadpoolctl import threadpool_limits

    variables = {name: os.environ.get(name) for name in CHANGEABLE}
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

    os.environ.update(dict.fromkeys(CHANGEABLE, str(threads)))
    threadpool_limits(limits=threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
