"""Steps of the work on a slide, from where it is done to where the run's progress is counted.

process_slide ── Steps ──> Progress                  in the process that drives the run
process_slide ── Steps ──> SentSteps ── messages ──> replay ──> Progress        in a task on a worker
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

_SEND_SECONDS = 0.5
"""Shortest time between messages of a task: not every stage of thousands of small slides matters."""
_UNKNOWN = 0.02
"""Part of what is left of a stage that a task with an unknown share counts for."""
_MOST = 0.99
"""Part of a stage that steps alone may reach: the rest is its end."""


class Steps(Protocol):
    """Receives what is finished of the work on slides."""

    def step(self, slide: str, stage: str, part: float | None) -> None:
        """A task of a stage is done, which is `part` (0 to 1) of it; 0: it begins; None: an unknown part."""

    def finished(self, slide: str, stage: str, seconds: float | None = None) -> None:
        """A stage is done, in `seconds`."""

    def counts(self, slide: str, pixels: int, cells: int) -> None:
        """Pixels of one channel and cells of a slide, as far as they are known."""


class StageClock:
    """Since when stages are under way, and what part of each is done."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, str], float] = {}
        self._parts: dict[tuple[str, str], float] = {}
        self._guessed: set[tuple[str, str]] = set()

    def step(self, slide: str, stage: str, part: float | None) -> tuple[float, float | None]:
        """The part that is done after a step (see `Steps.step`), and the seconds since the stage began.

        None in place of the seconds: the part is a guess, which does not tell how long the stage takes.
        """
        key, now = (slide, stage), time.monotonic()
        if part is None:
            self._guessed.add(key)
        begun, done = self._begun.setdefault(key, now), self._parts.get(key, 0.0)
        self._parts[key] = done = min(done + (_UNKNOWN * (1 - done) if part is None else part), _MOST)
        return done, None if key in self._guessed else now - begun

    def forget(self, slide: str, stage: str) -> None:
        self._begun.pop((slide, stage), None)
        self._parts.pop((slide, stage), None)
        self._guessed.discard((slide, stage))


class SentSteps:
    """`Steps` of a task, sent in messages for `replay`; each holds the latest values, not differences.

    Nothing is sent at the end, as the task's result says the rest.
    """

    def __init__(self, send: Callable[[Any], None]):
        self._send = send
        self._clock = StageClock()
        self._sent = time.monotonic()
        self._waiting: dict[tuple[str, ...], list[Any]] = {}

    def step(self, slide: str, stage: str, part: float | None) -> None:
        self._add("reached", [slide, stage], *self._clock.step(slide, stage, part))

    def finished(self, slide: str, stage: str, seconds: float | None = None) -> None:
        self._clock.forget(slide, stage)
        self._add("finished", [slide, stage], seconds)

    def counts(self, slide: str, pixels: int, cells: int) -> None:
        self._add("counts", [slide], pixels, cells)

    def _add(self, method: str, about: list[str], *values: Any) -> None:
        self._waiting[(method, *about)] = [method, *about, *values]  # the last of its kind counts
        if time.monotonic() - self._sent >= _SEND_SECONDS:
            self._sent = time.monotonic()
            self._send(list(self._waiting.values()))
            self._waiting.clear()


def replay(message: list[list[Any]], progress: Any) -> None:
    """Apply a message of `SentSteps` to `progress`."""
    for method, *values in message:
        assert method in ("reached", "finished", "counts")
        getattr(progress, method)(*values)
