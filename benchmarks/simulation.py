"""A slide of 100 000 x 80 000 pixels, and 1000 slides, on 1 to 64 workers that sleep in place of work.

    python benchmarks/simulation.py slide slides --workers 1 4 16 64 --faster 3

Scheduler, driver and workers are processes of their own (see `standins`). A task sleeps for as long as it
took on a real block, divided by `--faster`. Overheads are not divided, so they weigh that much more than
they would; what is lost to the shape of the graph (tails, steps that wait for all) weighs what it would. With
two values of `--faster`, ``wall = a / faster + b`` gives the efficiency at full length. A team that takes
longer than `--wall` gets as many rows of blocks, or slides, as fit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import standins
import tifffile

from daskcell.compute import Workers
from daskcell.config import Config, SegmentSettings
from daskcell.geometry import Grid
from daskcell.segmentation import engine, tasks

SIDES = (100_000, 80_000)
BLOCK = 2048
BLOCKS = ("observe_blocks", "run_tiles", "label_block", "check_blocks", "paint_block")
ONCE = ("measure_window", "fit_params")
TASKS = (*BLOCKS, *ONCE)
SHARES = {"convert": 0.1, "segment": 0.5, "describe": 0.3, "paint": 0.1}
"""Of a slide's seconds; only their sum matters here."""
Durations = dict[str, list[float]]


def record(side: int = 1024, blocks: int = 2) -> Durations:
    """Seconds of the engine's tasks on real blocks, brought to `BLOCK`."""
    from daskcell.evaluation.generated import CHANNELS, synthesize_field
    from daskcell.images import convert_slide, find_images, levels
    from daskcell.preprocess import freeze_slide

    took: Durations = {}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(job: Any, *args: Any) -> Any:
            start = time.perf_counter()
            result = function(job, *args)
            seconds = (time.perf_counter() - start) * (1 if name in ONCE else (BLOCK / side) ** 2)
            many = len(args[0]) if name in ("observe_blocks", "check_blocks") else 1
            took.setdefault(name, []).append(seconds / many)
            return result

        name = function.__name__
        return call

    field = synthesize_field((side * blocks, side * blocks), seed=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(scratch / f"x_{channel}.tif", pixels)
        (source,) = find_images(scratch)
        convert_slide(source, scratch / "x.zarr")
        plan = freeze_slide(scratch / "x.zarr", Config().preprocess, Workers())
        # A small picture is observed where it is frozen.
        places = [(tasks, "observe_blocks"), (levels, "downscale_block"), *((engine, name) for name in TASKS)]
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, timed(getattr(module, name))))
        for turn in ("first", "second"):  # the first compiles
            took.clear()
            engine.segment_slide(
                scratch / "x.zarr", "cells", SegmentSettings(), plan, Workers(), side, scratch / turn
            )
    return took


def simulate_slide(client: Any, seconds: Durations, rows: int) -> dict[str, float]:
    """`segment_slide` of so many rows of blocks of a slide as wide as `SIDES`."""
    shape = (min(SIDES[0], rows * BLOCK), SIDES[1])
    plan: Any = SimpleNamespace(shape=shape, out_channels=1, key="")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name in (*TASKS, "create_labels", "build_label_pyramid"):
            stack.enter_context(mock.patch.object(engine, name, getattr(standins, name)))
        Path(folder, "shape.json").write_text(json.dumps([shape, BLOCK]))
        settings, scratch = SegmentSettings(), Path(folder, "scratch")
        start = time.perf_counter()
        engine.segment_slide(folder, "cells", settings, plan, Workers(client), BLOCK, scratch)
        wall = time.perf_counter() - start
    blocks = len(Grid.regular(shape, BLOCK))
    work = blocks * sum(sum(seconds[name]) / len(seconds[name]) for name in BLOCKS)
    work += sum(seconds[name][0] for name in ONCE)  # the smaller levels count as overhead
    return {"blocks": blocks, "wall": wall, "work": work}


def simulate_slides(client: Any, seconds: float, count: int) -> dict[str, float]:
    """`count` slides of one block each through `Run`."""
    from daskcell.pipeline import api

    with tempfile.TemporaryDirectory() as name, standins.stages():
        scratch = Path(name)
        inputs = standins.fields(scratch / "in", count)
        start = time.perf_counter()
        study = api.run(inputs, scratch / "out", {}, client)
        wall = time.perf_counter() - start
        assert not study.failures, study.failures[0]
    return {"slides": count, "wall": wall, "work": seconds * count}


def simulate(what: str, workers: int, took: Durations, faster: float, wall: float) -> dict[str, float]:
    """Efficiency, and what scheduler, driver and workers used."""
    seconds = {name: [value / faster for value in values] for name, values in took.items()}
    slide = sum(sum(took) / len(took) for name, took in seconds.items() if name in BLOCKS)
    most = int(wall * workers / slide)
    if what == "slides":
        seconds = {stage: [slide * share] for stage, share in SHARES.items()}
    with standins.processes(workers, seconds) as client:
        before = standins.used(client)
        if what == "slide":
            found = simulate_slide(client, seconds, max(1, min(most, 1960) // 40))
        else:
            found = simulate_slides(client, slide, min(most, 1000))
        after = standins.used(client)
    found |= {"workers": workers, "faster": faster}
    found["efficiency"] = found["work"] / workers / found["wall"]
    for who, (cpu, most) in after.items():
        found |= {f"{who}_cpu_s": cpu - before[who][0], f"{who}_mb": most}
    return found


def whole(runs: list[dict[str, float]]) -> float:
    """Efficiency at full length, from runs at different speeds: ``wall = a / faster + b``."""
    slow, fast = min(runs, key=lambda run: run["faster"]), max(runs, key=lambda run: run["faster"])
    f, g = slow["faster"], fast["faster"]
    a = (slow["wall"] - fast["wall"]) / (1 / f - 1 / g)
    b = max(0.0, slow["wall"] - a / f)
    return slow["work"] * f / slow["workers"] / (a + b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["slide", "slides"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--faster", type=float, nargs="+", default=[3.0], help="durations are divided by this"
    )
    parser.add_argument("--wall", type=float, default=90.0, help="seconds of a simulation: fewer blocks fit")
    parser.add_argument("--seconds", type=Path, help="durations: read from this file, or recorded into it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.seconds is not None and options.seconds.exists():
        took = json.loads(options.seconds.read_text())
    else:
        took = record()
        if options.seconds is not None:
            options.seconds.write_text(json.dumps(took))
    print("seconds", json.dumps({name: [round(v, 3) for v in values] for name, values in took.items()}))
    for what in options.what:
        for workers in options.workers:
            runs = [simulate(what, workers, took, faster, options.wall) for faster in options.faster]
            if len(runs) > 1:
                runs[-1]["efficiency_at_full_length"] = whole(runs)
            for run in runs:
                rounded = {name: round(value, 3) for name, value in run.items()}
                print(what, json.dumps(rounded, indent=None if options.json else 1), flush=True)


if __name__ == "__main__":
    main()
