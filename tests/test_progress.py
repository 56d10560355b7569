"""How far a run is and how long it takes: times of real runs by a clock of their own, and a true run."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import tifffile
from distributed import Client, LocalCluster

import daskcell as dc
from daskcell.compute import Workers
from daskcell.config import parse_config
from daskcell.pipeline import progress, runner, steps
from daskcell.pipeline.progress import (
    LATE,
    SHARES,
    STAGE_SHARES,
    Lines,
    Progress,
    Tally,
    seconds_left,
    stage_costs,
)
from daskcell.pipeline.stages import STAGES
from daskcell.pipeline.status import report

NAMES = ("convert", "fit", "segment", "describe", "export", "assign", "paint")
LARGE = dict(zip(NAMES, (12.0, 3.0, 229.0, 56.0, 0.5, 1.0, 33.0), strict=True))
"""Seconds of the stages of a slide of 8192 pixels a side, half of segment for the diameter."""
SMALL = dict(zip(NAMES, (0.1, 0.05, 1.2, 0.6, 0.01, 0.02, 0.3), strict=True))
WATERSHED = {"segment": 20.0}
"""Instead of the network's."""
OME_ZARR = {"convert": 0.2}
"""Chunks of an OME-Zarr are linked, not encoded anew."""


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
class Slides:
    """Slides of one size; those with `blocks` are worked on block by block."""

    count: int
    seconds: dict[str, float]
    blocks: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    bytes: float = 1e6
    done: bool = False
    """By an earlier run, in twice the time."""


@dataclass
class Simulation:
    """A run by a clock of its own."""

    slides: list[Slides]
    shares: dict[str, float] = field(default_factory=lambda: SHARES)
    starts: float = 10.0
    fit: float = 5.0
    now: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
    """When the first task of each stage was done."""

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def run(self) -> list[tuple[float, float, float | None]]:
        """Seconds since the start, fraction and seconds left after everything that happens."""
        progress = Progress()
        seen: list[tuple[float, float, float | None]] = []
        named = {f"{i} {j}": kind for i, kind in enumerate(self.slides) for j in range(kind.count)}

        def work(slide: str, stages: list[str]) -> None:
            for stage in stages:
                seconds = named[slide].seconds[stage]
                progress.step(slide, stage, 0.0)
                for share, part in named[slide].blocks.get(stage, even(1)):
                    self.now += seconds * share
                    progress.step(slide, stage, part)
                    look()
                    self.measured.setdefault(stage, self.now)
                progress.finished(slide, stage, seconds)
            look()

        def look() -> None:
            seen.append((self.now, progress.fraction, progress.seconds_left))

        early = [stage for stage in STAGE_SHARES if stage not in LATE]
        missing = {name: list(LATE) if kind.done else [*early, *LATE] for name, kind in named.items()}
        took = {
            name: {stage: 2 * kind.seconds[stage] for stage in NAMES}
            for name, kind in named.items()
            if kind.done
        }
        progress.begin({name: kind.bytes for name, kind in named.items()}, missing, took, self.shares)
        self.now += self.starts
        for name, kind in named.items():
            work(name, [] if kind.done else early)
        progress.working("cluster")
        for _ in range(10):
            self.now += self.fit / 10
            progress.step("", "cluster", None)
            look()
        progress.finished("", "cluster")
        for name in named:
            work(name, list(LATE))
        return seen


def slower(seconds: dict[str, float], stage: str) -> dict[str, float]:
    return seconds | {stage: 10 * seconds[stage]}


WEIGHED_BY = {
    "one large": [Slides(1, LARGE, BLOCKS)],
    "three large": [Slides(3, LARGE, BLOCKS)],
    "large network": [Slides(1, LARGE | {"segment": 5000.0}, BLOCKS)],
    "many small": [Slides(200, SMALL)],
    "many tiny": [Slides(1000, {stage: seconds / 10 for stage, seconds in SMALL.items()})],
}
"""Runs that the shares of stages were chosen by."""
OTHERS = {
    "watershed": [Slides(1, LARGE | WATERSHED, BLOCKS)],
    "watershed of many": [Slides(200, SMALL | {"segment": 0.1})],
    "one large and many small": [Slides(200, SMALL, bytes=2.6e5), Slides(1, LARGE, BLOCKS, bytes=6.7e7)],
    "two large and few small": [Slides(10, SMALL, bytes=2.6e5), Slides(2, LARGE, BLOCKS, bytes=6.7e7)],
    "OME-Zarr": [Slides(3, LARGE | OME_ZARR, BLOCKS)],
    "OME-Zarr beside compressed TIFF": [
        Slides(2, LARGE, BLOCKS, bytes=4e7),
        Slides(2, LARGE | OME_ZARR, BLOCKS, bytes=6.7e7),
    ],
    "resumed": [Slides(100, SMALL, done=True), Slides(100, SMALL)],
    "resumed, large": [Slides(2, LARGE, BLOCKS, done=True), Slides(1, LARGE, BLOCKS)],
    "resumed, another network": [
        Slides(2, LARGE, BLOCKS, done=True),
        Slides(2, slower(LARGE, "segment"), BLOCKS),
    ],
    **{f"slow {stage}": [Slides(2, slower(LARGE, stage), BLOCKS)] for stage in NAMES},
    **{f"slow {stage} of many": [Slides(100, slower(SMALL, stage))] for stage in NAMES},
}
"""Runs that they were not chosen by."""


WATERSHED_SHARES = SHARES | {
    "segment": STAGES["segment"].share(parse_config({"segment": {"method": "watershed"}}))
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WEIGHED_BY, *OTHERS])
def test_progress_never_goes_back_and_the_time_left_is_right_within_a_factor_of_two(name, monkeypatch):
    """But for what nobody can know: a stage that takes far longer than its share, before it was measured."""
    run = Simulation((WEIGHED_BY | OTHERS)[name], WATERSHED_SHARES if "watershed" in name else SHARES)
    monkeypatch.setattr(progress, "time", run)
    monkeypatch.setattr(steps, "time", run)
    seen = run.run()
    fractions = [fraction for _, fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    end = run.now
    known = 0.1 * end
    if name.startswith("slow"):
        known = max(known, run.measured[name.split()[1]])
    later = [(now, left) for now, _, left in seen if now > known and end - now > 5]
    said = [(now, left) for now, left in later if left is not None]
    assert len(said) > 20
    assert all(0.5 < left / (end - now) < 2 for now, left in said), [
        (round(now), round(end - now), round(left)) for now, left in said
    ]
    assert said[0][0] < max(0.36 * end, 1.05 * known)


def test_stages_that_were_not_measured_follow_the_others_and_not_the_odd_one():
    shares = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    assert stage_costs({"a": Tally(1.0)}, shares) == shares
    tallies = {"a": Tally(10, 0, 10, 10, 2), "b": Tally(10, 0, 10, 10, 4), "c": Tally(10, 0, 5, 5, 500)}
    expected = {"a": 0.2, "b": 0.4, "c": 100.0, "d": 0.8}
    assert stage_costs(tallies | {"d": Tally(10)}, shares) == pytest.approx(expected)


def test_nothing_is_learned_from_parts_that_are_guessed(monkeypatch):
    clock = Simulation([])
    monkeypatch.setattr(steps, "time", clock)
    counted = steps.StageClock()
    assert counted.step("", "cluster", 0.0) == (0.0, 0.0)
    clock.now += 60
    part, seconds = counted.step("", "cluster", None)
    assert 0 < part < 0.1
    assert seconds is None
    counted.forget("", "cluster")
    counted.step("", "cluster", 0.0)
    clock.now += 5
    assert counted.step("", "cluster", 0.5) == (0.5, 5.0)


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
    monkeypatch.setattr(runner, "_WRITE_SECONDS", -1)
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
    assert len({round(fraction, 3) for fraction in progress.fractions}) > 10  # as the rates allow
    # What another process reads is the record of the task before.
    for (before, _), (_, status) in zip(progress.records, progress.records[1:], strict=False):
        if status is not None and status["at"] == before["at"]:
            assert status["fraction"] == before["fraction"]
    assert sum(status is not None for _, status in progress.records) > 25


def test_steps_of_a_task_are_sent_now_and_then_and_say_how_far_it_is(monkeypatch):
    clock = Simulation([])
    monkeypatch.setattr(steps, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    messages = []
    sent = steps.SentSteps(messages.append)
    here, there = Progress(), Progress()
    for told in (here, there):
        told.begin({"a": 1e6, "b": 1e6}, {"a": list(STAGE_SHARES), "b": list(STAGE_SHARES)})
    for told in (here, sent):
        told.step("a", "convert", 0.0)
        told.step("a", "convert", 0.5)
    assert messages == []  # too soon
    clock.now += 1
    for told in (here, sent):
        told.finished("a", "convert", 1.0)
        told.counts("a", 1000, 10)
        told.step("a", "segment", 0.25)
    clock.now += 1
    for told in (here, sent):
        told.step("a", "segment", 0.25)
    assert [len(message) for message in messages] == [2, 2]
    for message in json.loads(json.dumps(messages)):
        steps.replay(message, there)
    assert there.fraction == here.fraction > 0
    before = there.fraction
    steps.replay(messages[0], there)  # a task that runs again, since its worker died
    assert there.fraction == before


@pytest.mark.parametrize("kind", ["inline", pytest.param("workers", marks=pytest.mark.cluster)])
@pytest.mark.slow
def test_a_slide_that_is_one_task_tells_of_its_stages_and_status_too(kind, slide, tmp_path, monkeypatch):
    """The bar moves while the task lasts, and not only when it is done."""
    monkeypatch.setattr(runner, "_WRITE_SECONDS", -1)
    monkeypatch.setattr(steps, "_SEND_SECONDS", 0)
    config = {
        "segment": {"method": "watershed"},
        "features": {"encoder": "tiny"},
        "cluster": {"k": 2},
        "output": {"report": False},
        "compute": {"kind": "inline"},
    }
    seen = []

    class OneTask(Progress):
        def changed(self):
            seen.append(
                (self.fraction, self.slides_done, dc.open_study(tmp_path / "out").record.read_progress())
            )

    if kind == "inline":
        dc.run(slide, tmp_path / "out", config, progress=OneTask())
    else:
        with (
            LocalCluster(1, processes=False, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            dc.run(slide, tmp_path / "out", config, client, progress=OneTask())
    during = [(fraction, record) for fraction, done, record in seen if not done and 0 < fraction < 1]
    assert len({fraction for fraction, _ in during}) >= 3
    assert len({record["fraction"] for _, record in during if record}) >= 3
    fractions = [fraction for fraction, _, _ in seen]
    assert fractions == sorted(fractions)


def test_an_ome_zarr_weighs_what_its_pixels_do(slide, tmp_path):
    """Its folder has 4096 bytes, whatever is in it."""
    from daskcell.images import find_images

    dc.convert(slide, tmp_path / "a.zarr")
    (source,) = find_images([tmp_path / "a.zarr"])
    assert runner._input_bytes(source) == 300 * 520


def test_lines_tell_the_same_as_the_record_and_quiet_says_nothing(capsys):
    stream = io.StringIO()
    progress = Lines(1000, stream)
    progress.begin({"a": 1e6}, {"a": list(STAGE_SHARES)})
    progress.step("a", "convert", 0.0)
    progress.step("a", "convert", 0.5)
    assert f"{progress.estimate['fraction']:4.0%}" in progress.line
    Progress().begin({"a": 1e6}, {"a": ["segment"]})
    assert capsys.readouterr() == ("", "")
