"""Progress of a run: bars on a terminal, a line now and then elsewhere, nothing in a library call.

Pure functions (`stage_costs`, `work_done`) compute it from the parts of stages that are done and the seconds
they took. Slides are weighed by input bytes, the only size that is known of every slide before it is opened;
every block and tile counts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from daskcell.pipeline.stages import LATE, SLIDE_STAGES, STAGES
from daskcell.pipeline.steps import StageClock

STAGE_SHARES = {name: STAGES[name].weight for name in SLIDE_STAGES}
SHARES = {name: stage.weight for name, stage in STAGES.items() if stage.weight}
_WIDE = 60
"""Columns of a terminal with room for a bar beside the counts."""
_BESIDE = 8 + 1 + 10 + 1 + 1 + 8
"""Columns of the stage, a short bar, the seconds, and the gaps."""
_GROWTH = 0.9
"""Time grows with this power of a slide's bytes: part of the work on a slide is the same for any size."""
_LEARN_FROM = 0.05
"""Part of a stage that must be done before it says how long all of it takes."""
_KNOWN = 0.4
"""Part of what is left that must be of measured stages before the time left is said."""


@dataclass
class Tally:
    """One stage of all slides, in units of work (see `_GROWTH`) that take time in proportion."""

    weight: float = 0.0
    """Of all slides."""
    before: float = 0.0
    """Of what was done before this run, or never will be."""
    done: float = 0.0
    """Of what was done in this run."""
    measured: float = 0.0
    """Of what took `seconds` in this run."""
    seconds: float = 0.0
    measured_before: float = 0.0
    """Of what took `seconds_before` in earlier runs."""
    seconds_before: float = 0.0

    @property
    def left(self) -> float:
        """Of what is still to do."""
        return max(0.0, self.weight - self.before - self.done)

    @property
    def cost(self) -> float | None:
        """Seconds per weight in this run; None: not measured."""
        return self.seconds / self.measured if self.measured > 0 and self.seconds > 0 else None

    @property
    def cost_before(self) -> float | None:
        """Seconds per weight in earlier runs."""
        if self.measured_before > 0 and self.seconds_before > 0:
            return self.seconds_before / self.measured_before
        return None


def stage_costs(tallies: Mapping[str, Tally], shares: Mapping[str, float]) -> dict[str, float]:
    """Seconds per weight of every stage: as measured in this run, else in earlier ones, else by its share.

    `shares` say how long stages take beside each other, where nothing was measured.
    """
    before = {stage: tally.cost_before for stage, tally in tallies.items()}
    pace = _median([cost / shares[stage] for stage, cost in before.items() if cost])
    expected = {stage: before.get(stage) or pace * share for stage, share in shares.items()}
    costs = {stage: tally.cost for stage, tally in tallies.items()}
    # Stages not measured yet take as much longer or shorter than expected as the others mostly do: the
    # median, as one stage (a large network, say) may be far off.
    pace = _median([cost / expected[stage] for stage, cost in costs.items() if cost])
    return {stage: costs.get(stage) or pace * expected[stage] for stage in shares}


def _median(ratios: list[float]) -> float:
    return float(np.exp(np.median(np.log(ratios)))) if ratios else 1.0


def work_done(tallies: Mapping[str, Tally], shares: Mapping[str, float]) -> tuple[float, float, float]:
    """Work that was done before this run, in it, and all of it; in seconds, once some are known."""
    costs = stage_costs(tallies, shares)
    before, done, total = (
        sum(costs[stage] * getattr(tally, name) for stage, tally in tallies.items())
        for name in ("before", "done", "weight")
    )
    return before, done, total


def is_known(tallies: Mapping[str, Tally], shares: Mapping[str, float]) -> bool:
    """Whether most of what is left to do is of stages whose time was measured."""
    costs = stage_costs(tallies, shares)
    left = {stage: costs[stage] * tally.left for stage, tally in tallies.items()}
    known = sum(left[stage] for stage, tally in tallies.items() if tally.cost or tally.cost_before)
    return known >= _KNOWN * sum(left.values())


def seconds_left(estimate: Mapping[str, Any], now: float) -> float | None:
    """Seconds left ``now`` by an estimate (``seconds_left``, made ``at`` a time); None: there was none.

    Between estimates it runs down, but not below half.
    """
    left = estimate["seconds_left"]
    return None if left is None else max(left - max(0.0, now - estimate["at"]), left / 2)


@dataclass
class _UnderWay:
    """What the tally of a stage has counted for a slide at this stage."""

    part: float = 0.0
    measured: float = 0.0
    seconds: float = 0.0


class Progress:
    """Counts, and shows nothing. Methods may be called from several threads."""

    def __init__(self) -> None:
        self.slides = self.slides_done = self.cells = self.failed = 0
        self.pixels = 0
        self.stage = ""
        self._weights: dict[str, float] = {}
        self._tallies: dict[str, Tally] = {}
        self._shares: Mapping[str, float] = SHARES
        self._under_way: dict[tuple[str, str], _UnderWay] = {}
        self._clock = StageClock()
        self._left: dict[str, set[str]] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._first: tuple[float, float] | None = None
        self._estimate: dict[str, Any] = {"at": time.time(), "fraction": 0.0, "seconds_left": None}
        self._lock = threading.RLock()

    def begin(
        self,
        slides: Mapping[str, float],
        missing: Mapping[str, Sequence[str]],
        took: Mapping[str, Mapping[str, float]] | None = None,
        shares: Mapping[str, float] = SHARES,
    ) -> None:
        """Say what is to do.

        Parameters
        ----------
        slides
            All slides, and the bytes of each input.
        missing
            Names of the stages that are to do, by slide; of others, none.
        took
            Seconds of the stages that earlier runs have done, by slide.
        shares
            How long stages take beside each other, until they are measured.
        """
        with self._lock:
            self.slides = len(slides)
            self._left = {slide: set(missing.get(slide, ())) for slide in slides}
            self._weights = {slide: max(size, 1.0) ** _GROWTH for slide, size in slides.items()}
            total = self._weights[""] = sum(self._weights.values())  # of all slides together
            self._shares = shares
            self._tallies = {stage: Tally(total) for stage in shares}
            for slide, left in self._left.items():
                for stage in STAGE_SHARES.keys() - left:
                    self._tallies[stage].before += self._weights[slide]
                for stage, seconds in (took or {}).get(slide, {}).items():
                    if stage in STAGE_SHARES:
                        self._tallies[stage].measured_before += self._weights[slide]
                        self._tallies[stage].seconds_before += seconds
            if not any(self._left.values()):
                self._tallies["cluster"].before = total
            self.slides_done = sum(not left.difference(LATE) for left in self._left.values())
            self._first = None
        self._update()

    def counts(self, slide: str, pixels: int, cells: int) -> None:
        """Megapixels and cells of a slide, as far as they are known."""
        with self._lock:
            before = self._counted.get(slide, (0, 0))
            self.pixels += pixels - before[0]
            self.cells += cells - before[1]
            self._counted[slide] = pixels, cells
        self.changed()

    def step(self, slide: str, stage: str, part: float | None) -> None:
        """See `Steps.step`."""
        with self._lock:
            self.reached(slide, stage, *self._clock.step(slide, stage, part))

    def reached(self, slide: str, stage: str, part: float, seconds: float | None) -> None:
        """A `part` of a stage (0 to 1) is done in all, `seconds` after it began; None: `part` is a guess."""
        with self._lock:
            if stage in self._left.get(slide, (stage,)) and stage in self._tallies:
                now = self._under_way.setdefault((slide, stage), _UnderWay())
                # A task that runs a second time, since its worker died, begins the stage anew.
                self._advance(slide, stage, max(now.part, part), seconds)
            self.stage = stage
        self._update()

    def finished(self, slide: str, stage: str, seconds: float | None = None) -> None:
        """A stage of a slide is done, in `seconds` where that is known."""
        with self._lock:
            left = self._left.get(slide, set() if slide else {stage})
            if stage in left:
                self._advance(slide, stage, 1.0, seconds)
                self._under_way.pop((slide, stage), None)
                self._clock.forget(slide, stage)
                early = bool(left.difference(LATE))
                left.discard(stage)
                self.slides_done += bool(slide) and early and not left.difference(LATE)
            self.stage = stage
        self._update()

    def _advance(self, slide: str, stage: str, part: float, seconds: float | None) -> None:
        """Count a stage of a slide up to `part`, which took `seconds` since it began."""
        weight, tally = self._weights.get(slide, 0.0), self._tallies[stage]
        now = self._under_way.get((slide, stage), _UnderWay())
        tally.done += weight * (part - now.part)
        now.part = part
        if seconds is not None and seconds > 0 and part >= _LEARN_FROM:
            tally.measured += weight * part - now.measured
            tally.seconds += seconds - now.seconds
            now.measured, now.seconds = weight * part, seconds

    def set_aside(self, slide: str, sentence: str) -> None:
        """A slide cannot go on."""
        with self._lock:
            self.failed += 1
            left = self._left.get(slide, set())
            for stage in left:
                now = self._under_way.pop((slide, stage), _UnderWay())
                self._tallies[stage].before += self._weights[slide] * (1 - now.part)
            left.clear()
        self._update()
        self.say(f"Set aside: {slide}: {sentence}")

    def working(self, stage: str) -> None:
        """What is being done for all slides together."""
        self.step("", stage, 0.0)

    def _update(self) -> None:
        """Update the fraction and the time left, which are shown here and by `status`."""
        with self._lock:
            before, done, total = work_done(self._tallies, self._shares)
            fraction = min(1.0, (before + done) / total) if total else 0.0
            now, left = time.monotonic(), None
            if done > 0:
                # Counted from the first finished task on: workers take a while to start.
                if self._first is None:
                    self._first = now, done / total
                elapsed, since = now - self._first[0], done / total - self._first[1]
                if since > 0 and is_known(self._tallies, self._shares):
                    left = elapsed * (1 - fraction) / since
            fraction = max(fraction, self._estimate["fraction"])
            self._estimate = {"at": time.time(), "fraction": fraction, "seconds_left": left}
        self.changed()

    @property
    def estimate(self) -> dict[str, Any]:
        """The last estimate: ``fraction`` 0 to 1, ``seconds_left`` and ``at`` (seconds since 1970)."""
        return dict(self._estimate)

    @property
    def fraction(self) -> float:
        """Part of the work that is done, 0 to 1; never less than before."""
        return float(self._estimate["fraction"])

    @property
    def seconds_left(self) -> float | None:
        """Estimate, None while nothing was done yet in this run."""
        return seconds_left(self._estimate, time.time())

    @property
    def line(self) -> str:
        """All of it on one line."""
        return self.text()

    def text(self, width: int | None = None) -> str:
        """All of it on one line, or of at most `width` characters what matters most."""
        left = self.seconds_left
        parts = {
            "fraction": f"{self.fraction:4.0%}",
            "slides": f"{self.slides_done}/{self.slides} slides",
            "pixels": f"{self.pixels / 1e6:.1f} Mpx",
            "cells": f"{self.cells:,} cells",
        }
        if self.failed:
            parts["failed"] = f"{self.failed} set aside"
        if left is not None and self.fraction < 1:
            parts["left"] = f"{clock(left)} left"
        for name in ("pixels", "cells", "failed", "slides", "left"):
            if width is not None and len(", ".join(parts.values())) > width:
                parts.pop(name, None)
        return ", ".join(parts.values())

    # For subclasses.

    def changed(self) -> None:
        """Counts have changed."""

    def say(self, text: str) -> None:
        """Print a line that stays on the screen."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Lines(Progress):
    """One line per interval, for log files, even when nothing was finished in it."""

    def __init__(self, interval: float = 30.0, stream: TextIO | None = None):
        super().__init__()
        self.interval, self.stream = interval, stream or sys.stderr
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def __enter__(self) -> Progress:
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _tell(self) -> None:
        while not self._end.wait(self.interval):
            if self.slides:
                self.say(f"{time.strftime('%H:%M:%S')} {self.line}")


class Bars(Progress):
    """A bar that counts slides, megapixels and cells, for a terminal."""

    def __init__(self, stream: TextIO | None = None):
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        console = Console(file=stream or sys.stderr)
        counts = TextColumn("{task.fields[counts]}", table_column=Column(no_wrap=True))
        self._rich = RichProgress(
            *((TextColumn("{task.fields[stage]:<8}"), BarColumn()) if console.width >= _WIDE else ()),
            counts,
            *((TimeElapsedColumn(),) if console.width >= _WIDE else ()),
            console=console,
            transient=True,
        )
        self._task = self._rich.add_task("", total=1.0, stage="", counts="")

    def changed(self) -> None:
        width = self._rich.console.width
        counts = self.text(width - _BESIDE if width >= _WIDE else width)
        self._rich.update(self._task, completed=self.fraction, stage=self.stage, counts=counts)

    def say(self, text: str) -> None:
        self._rich.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Progress:
        self._rich.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._rich.stop()


def clock(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 10 s``, ``8 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
