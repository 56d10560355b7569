"""How far a run is: bars on a terminal, a line now and then elsewhere, nothing in a library call.

The time left is estimated from input bytes, the one size that is known of every slide before it is opened.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

from daskcell.pipeline.stages import LATE, SLIDE_STAGES, STAGES

STAGE_SHARES = {name: STAGES[name].weight for name in SLIDE_STAGES}


class Progress:
    """Counts; says nothing. Methods may be called from several threads."""

    def __init__(self) -> None:
        self.slides = self.slides_done = self.cells = self.failed = 0
        self.pixels = 0
        self.stage = ""
        self._total = self._done = self._at_start = 0.0
        self._weights: dict[str, float] = {}
        self._left: dict[str, set[str]] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._started = time.monotonic()
        self._lock = threading.RLock()

    def begin(self, slides: dict[str, float], missing: dict[str, list[str]]) -> None:
        """Say which slides there are, with their weights, and which stages of each are to do."""
        with self._lock:
            self.slides = len(slides)
            self._weights = {slide: max(weight, 1.0) for slide, weight in slides.items()}
            self._left = {slide: set(missing.get(slide, ())) for slide in slides}
            self._total = sum(self._weights.values())
            self._done = self._at_start = sum(
                self._weights[s] * (1 - sum(STAGE_SHARES[stage] for stage in self._left[s])) for s in slides
            )
            self.slides_done = sum(not left.difference(LATE) for left in self._left.values())
            self._started = time.monotonic()
        self.changed()

    def counts(self, slide: str, pixels: int, cells: int) -> None:
        """Megapixels and cells of a slide, as far as they are known."""
        with self._lock:
            before = self._counted.get(slide, (0, 0))
            self.pixels += pixels - before[0]
            self.cells += cells - before[1]
            self._counted[slide] = pixels, cells
        self.changed()

    def finished(self, slide: str, stage: str) -> None:
        """A stage of a slide is done."""
        with self._lock:
            left = self._left.get(slide, set())
            if stage in left:
                early = bool(left.difference(LATE))
                left.discard(stage)
                self._done += self._weights[slide] * STAGE_SHARES[stage]
                self.slides_done += early and not left.difference(LATE)
            self.stage = stage
        self.changed()

    def set_aside(self, slide: str, sentence: str) -> None:
        """A slide cannot go on."""
        with self._lock:
            self.failed += 1
            left = self._left.get(slide, set())
            self._done += self._weights.get(slide, 0.0) * sum(STAGE_SHARES[stage] for stage in left)
            left.clear()
        self.say(f"Set aside: {slide}: {sentence}")

    def working(self, stage: str) -> None:
        """What is being done for all slides together."""
        self.stage = stage
        self.changed()

    @property
    def fraction(self) -> float:
        """Part of the work that is done, 0 to 1."""
        return max(0.0, min(1.0, self._done / self._total)) if self._total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate, None while nothing was done yet in this run."""
        done = self._done - self._at_start
        if done <= 0:
            return None
        return (time.monotonic() - self._started) * (self._total - self._done) / done

    @property
    def line(self) -> str:
        """All of it on one line."""
        left = self.seconds_left
        parts = [
            f"{self.fraction:4.0%}",
            f"{self.slides_done}/{self.slides} slides",
            f"{self.pixels / 1e6:.1f} Mpx",
            f"{self.cells:,} cells",
        ]
        if self.failed:
            parts.append(f"{self.failed} set aside")
        if left is not None and self.fraction < 1:
            parts.append(f"{clock(left)} left")
        return ", ".join(parts)

    # What the subclasses do.

    def changed(self) -> None:
        """Counts have changed."""

    def say(self, text: str) -> None:
        """Tell the user something that should stay on the screen."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Lines(Progress):
    """One line per interval, for log files; also when nothing was finished in it."""

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

        self._rich = RichProgress(
            TextColumn("{task.fields[stage]:<8}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            console=Console(file=stream or sys.stderr),
            transient=True,
        )
        self._task = self._rich.add_task("", total=1.0, stage="", counts="")

    def changed(self) -> None:
        self._rich.update(self._task, completed=self.fraction, stage=self.stage, counts=self.line)

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
