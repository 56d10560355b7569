"""How far a run is and how long it takes: times of real runs by a clock of their own, and a true run."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import pytest
import tifffile

import daskcell as dc
from daskcell.compute import Workers
from daskcell.pipeline import progress, runner
from daskcell.pipeline.progress import LATE, STAGE_SHARES, Lines, Progress, Tally, seconds_left, stage_costs
from daskcell.pipeline.status import report

NAMES = ("convert", "fit", "segment", "describe", "export", "assign", "paint")
LARGE = dict(zip(NAMES, (12.0, 3.0, 229.0, 56.0, 0.5, 1.0, 33.0), strict=True))
"""Seconds of the stages of a slide of 8192 pixels a side, half of segment for the diameter."""
SMALL = dict(zip(NAMES, (0.1, 0.05, 1.2, 0.6, 0.01, 0.02, 0.3), strict=True))


def even(count: int) -> list[tuple[float, float]]:
    return [(1 / count, 1 / count)] * count


BLOCKS = {
    "convert": even(16),
    "fit": even(16),
    "segment": [(0.5 / 9, 0.4 / 9)] * 9 + [(0.4 / 16, 0.45 / 16)] * 16 + [(0.1 / 16, 0.15 / 16)] * 16,
    "describe": even(30),
    "paint": even(16),
}
"""Tasks of a stage: how much of its time each takes, and what part of the stage it is counted as."""


@dataclass
class Simulation:
    """A run by a clock of its own."""

    slides: int
    seconds: dict[str, float]
    blocks: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    starts: float = 10.0
    fit: float = 5.0
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def run(self) -> list[tuple[float, float, float | None]]:
        """Seconds since the start, fraction and seconds left after everything that happens."""
        progress = Progress()
        seen: list[tuple[float, float, float | None]] = []

        def pass_(seconds: float) -> None:
            self.now += seconds

        def look() -> None:
            seen.append((self.now, progress.fraction, progress.seconds_left))

        def work(slide: str, stages: list[str]) -> None:
            for stage in stages:
                if not self.blocks:
                    pass_(self.seconds[stage])
                    continue
                progress.step(slide, stage, 0.0)
                for share, part in self.blocks.get(stage, even(1)):
                    pass_(self.seconds[stage] * share)
                    progress.step(slide, stage, part)
                    look()
                progress.finished(slide, stage, self.seconds[stage])
            if not self.blocks:
                for stage in stages:
                    progress.finished(slide, stage, self.seconds[stage])
            look()

        names = [f"slide {i}" for i in range(self.slides)]
        progress.begin(dict.fromkeys(names, 1e6), {name: list(STAGE_SHARES) for name in names})
        pass_(self.starts)
        for name in names:
            work(name, [stage for stage in STAGE_SHARES if stage not in LATE])
        progress.working("cluster")
        for _ in range(10):
            pass_(self.fit / 10)
            progress.step("", "cluster", None)
            look()
        progress.finished("", "cluster")
        for name in names:
            work(name, [stage for stage in STAGE_SHARES if stage in LATE])
        return seen


@pytest.mark.parametrize(
    "run",
    [
        Simulation(1, LARGE, BLOCKS),
        Simulation(3, LARGE, BLOCKS),
        Simulation(1, LARGE | {"segment": 5000.0}, BLOCKS),  # a large network
        Simulation(200, SMALL),
        Simulation(1000, {stage: seconds / 10 for stage, seconds in SMALL.items()}),
    ],
    ids=["one large", "three large", "large network", "many small", "many tiny"],
)
def test_progress_never_goes_back_and_the_time_left_is_right_within_a_factor_of_two(run, monkeypatch):
    monkeypatch.setattr(progress, "time", run)
    seen = run.run()
    fractions = [fraction for _, fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    end = run.now
    later = [(now, left) for now, _, left in seen if now > 0.1 * end and end - now > 5]
    assert len(later) > 40
    for now, left in later:
        assert left is not None
        assert 0.5 < left / (end - now) < 2, (now, end - now, left)


def test_stages_that_were_not_measured_follow_the_others_and_not_the_odd_one():
    shares = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    assert stage_costs({"a": Tally(1.0)}, shares) == shares
    tallies = {"a": Tally(10, 0, 10, 10, 2), "b": Tally(10, 0, 10, 10, 4), "c": Tally(10, 0, 5, 5, 500)}
    expected = {"a": 0.2, "b": 0.4, "c": 100.0, "d": 0.8}
    assert stage_costs(tallies | {"d": Tally(10)}, shares) == pytest.approx(expected)


def test_what_was_told_runs_down_while_nothing_is_heard():
    progress = {"at": 100.0, "fraction": 0.5, "seconds_left": 60.0}
    assert [seconds_left(progress, now) for now in (100, 110, 500)] == [60, 50, 30]
    assert seconds_left(progress | {"seconds_left": None}, 100) is None


def test_parts_of_work_are_told_after_every_task():
    steps: list[float | None] = []
    workers = Workers().metered(steps.append)
    for team, count in ((workers.part(0.5, 2), 2), (workers, 1)):
        window = team.window()
        for i in range(count):
            window.submit(i, abs, i)
        list(window)
    assert steps == [0.25, 0.25, None]


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("progress") / "a.tif"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:300, :520]
    light = np.sin(y / 9.0) * np.sin(x / 9.0) * 90 + 120 + rng.normal(0, 6, y.shape)
    tifffile.imwrite(path, light.astype(np.uint8), tile=(256, 256))
    return path


class Watcher(Progress):
    def __init__(self, out):
        super().__init__()
        self.out, self.steps, self.fractions, self.records = out, [], [], []

    def step(self, slide, stage, part):
        self.steps.append((stage, part))
        super().step(slide, stage, part)
        if part:
            self.records.append((self.estimate, report(dc.open_study(self.out))["running"]["progress"]))

    def changed(self):
        self.fractions.append(self.fraction)


@pytest.mark.slow
def test_long_stages_of_a_slide_tell_of_every_block_and_status_says_the_same(slide, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_TELL_SECONDS", -1)
    monkeypatch.setattr("daskcell.segmentation.diameter.WHOLE_UP_TO", 0)
    monkeypatch.setattr("daskcell.segmentation.diameter.WINDOW", 128)
    out = tmp_path / "out"
    progress = Watcher(out)
    config = {
        "segment": {"model": "tiny", "diameter": "auto"},
        "features": {"encoder": "tiny"},
        "cluster": {"k": 2},
        "preprocess": {"histogram": {"method": "stretch"}},
        "output": {"report": False, "overlays": ["png"]},
        "compute": {"kind": "inline", "block": 256},
    }
    study = dc.run(slide, out, config, progress=progress)
    assert not study.failures
    blocks = 2 * 3
    for stage, least in {
        "convert": 1,
        "segment": 4 + 3 * blocks,
        "describe": 1,  # of so few cells, one task
        "paint": blocks,
    }.items():
        parts = [part for name, part in progress.steps if name == stage and part]
        assert len(parts) >= least, stage
        assert 0.8 <= sum(parts) <= 1.001, stage
        assert max(parts) <= 0.5 or stage in ("convert", "describe")
    assert [part for name, part in progress.steps if name == "cluster"]
    assert progress.fractions == sorted(progress.fractions)
    assert progress.fraction == pytest.approx(1)
    assert len({round(fraction, 3) for fraction in progress.fractions}) > 25
    # What another process reads is the record of the task before.
    for (before, _), (_, status) in zip(progress.records, progress.records[1:], strict=False):
        if status is not None and status["at"] == before["at"]:
            assert status["fraction"] == before["fraction"]
    assert sum(status is not None for _, status in progress.records) > 25


def test_an_ome_zarr_weighs_what_its_pixels_do(slide, tmp_path):
    """Its folder has 4096 bytes, whatever is in it."""
    from daskcell.images import find_images

    dc.convert(slide, tmp_path / "a.zarr")
    (source,) = find_images([tmp_path / "a.zarr"])
    assert runner._weight(source) == 300 * 520


def test_lines_tell_the_same_as_the_record_and_quiet_says_nothing(capsys):
    stream = io.StringIO()
    progress = Lines(1000, stream)
    progress.begin({"a": 1e6}, {"a": list(STAGE_SHARES)})
    progress.step("a", "convert", 0.0)
    progress.step("a", "convert", 0.5)
    assert f"{progress.estimate['fraction']:4.0%}" in progress.line
    Progress().begin({"a": 1e6}, {"a": ["segment"]})
    assert capsys.readouterr() == ("", "")
