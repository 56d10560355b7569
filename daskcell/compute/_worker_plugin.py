"""The Dask plugin that holds workers to their threads; apart, since it must import `distributed`."""

from __future__ import annotations

from typing import Any

from distributed import WorkerPlugin

from daskcell.compute.threads import limit_threads


class ThreadLimit(WorkerPlugin):
    """Calls `limit_threads` on every worker there is and every one that comes."""

    name = "daskcell-threads"

    def __init__(self, threads: int):
        self.threads = threads

    def setup(self, worker: Any) -> None:
        limit_threads(self.threads)
