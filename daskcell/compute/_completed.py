"""Tasks as they complete, none lost; apart, since it must import `distributed`."""

from __future__ import annotations

import asyncio
from typing import Any

from distributed import as_completed

_AGAIN_SECONDS = 0.5


class Completed(as_completed):
    """`distributed.as_completed` that never waits for ever.

    There a task drops out where its result cannot be fetched, as from a scheduler that is killed at that
    moment, and whoever waits for it does so for good. Here it is fetched again: from a scheduler that is
    there after all, or until the client gives up, which cancels its tasks.
    """

    def wait(self, seconds: float) -> bool:
        """Whether there is a result, after at most so many seconds."""
        with self.thread_condition:
            if not self.has_ready():
                self.thread_condition.wait(timeout=seconds)
        return self.has_ready()

    async def _track_future(self, future: Any) -> None:
        while True:
            try:
                return await super()._track_future(future)
            except OSError:
                await asyncio.sleep(_AGAIN_SECONDS)
