"""Tasks that a run left at work when it was killed.

A scheduler that outlives its client drops the client's tasks, but no worker can stop a thread: what it is at
goes on to its end, and writes files. Were the run continued at once, two tasks would write the same ones. So
keys of tasks say whose they are, and the next run waits until no worker is at one of them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

_LOOK_SECONDS = 0.25
_TELL_SECONDS = 5.0


def owner_of(folder: str | os.PathLike[str]) -> str:
    """Eight letters for the keys of all tasks that write into `folder`."""
    return hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:8]


def wait_for_orphans(client: Client, owner: str, tell: Callable[[str], None] | None = None) -> None:
    """Return once no worker is at a task of `owner`; none of them may have been submitted by `client`."""
    start = told = time.monotonic()
    while True:
        found = client.run(running_tasks, owner, on_error="ignore")
        count = sum(map(len, found.values()))
        if not count:
            return
        now = time.monotonic()
        if tell is not None and now - told > _TELL_SECONDS:
            told = now
            tell(f"Waiting for {count} tasks that an earlier run has left at work, for {now - start:.0f} s.")
        time.sleep(_LOOK_SECONDS)


def running_tasks(owner: str, dask_worker: Any = None) -> list[str]:
    """Keys of the tasks of `owner` that a worker is at, whether anybody still wants them or not."""
    with dask_worker.active_threads_lock:
        keys = [str(key) for key in dask_worker.active_threads.values()]
    return [key for key in keys if f"-{owner}" in key]
