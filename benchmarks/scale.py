"""Many slides and many workers, with sleeps in place of work: what the machinery itself costs.

    tasks      overhead of a task in a `Window`, beside a no-op ``client.map`` of the same run
    resume     a finished study of many slides, started again
    memory     client, scheduler and workers in one process, by number of slides
    slide      100 000 x 80 000 pixels through the engine's own scheduling; durations of real blocks
    slides     1000 slides through `Run`, likewise

Scheduler, client and workers share one process, and its interpreter lock, so efficiencies are lower bounds;
durations are divided by ``--faster``, so overheads weigh that many times more than in a real run.

    python benchmarks/scale.py tasks resume
    python benchmarks/scale.py slide slides --workers 1 4 16 64
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from daskcell import collection, pipeline, slide
from daskcell.compute import Workers
from daskcell.config import SegmentSettings
from daskcell.images.sources import Source

SIDES = (100_000, 80_000)
BLOCK = 2048
FILES = 24
"""That a stand-in slide writes, as a field of 520 x 696 pixels does."""


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    quiet = {"distributed.worker.memory.target": False, "distributed.worker.memory.spill": False}
    quiet |= {"distributed.worker.memory.pause": False, "distributed.worker.memory.terminate": False}
    quiet |= {"distributed.worker.http.routes": [], "distributed.scheduler.http.routes": []}
    with (
        dask.config.set(quiet),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit=0
        ) as local,
        Client(local) as client,
    ):
        yield client


def nothing(*args: Any, **options: Any) -> None:
    """A task without work."""


# -- tasks ------------------------------------------------------------------------------------------------
def tasks(count: int = 4000, workers: int = 2) -> dict[str, Any]:
    """Seconds a task, above the ideal, of a window and of ``client.map``."""
    found: dict[str, Any] = {}
    with cluster(workers) as client:
        team = Workers(client, task_seconds=3600)

        def mapped(seconds: float, number: int) -> float:
            start = time.perf_counter()
            futures = client.map(time.sleep if seconds else nothing, [seconds] * number, pure=False)
            client.gather(futures)
            return time.perf_counter() - start

        def windowed(seconds: float, number: int) -> float:
            start = time.perf_counter()
            window = team.window()
            for key in range(number):
                window.submit(key, time.sleep if seconds else nothing, seconds)
            for _ in window:
                pass
            return time.perf_counter() - start

        for name, seconds, number in (("no-op", 0.0, count), ("50 ms", 0.05, count // 20)):
            ideal = seconds * number / workers
            pairs = [(mapped(seconds, number), windowed(seconds, number)) for _ in range(3)]
            plain, ours = (min(times) - ideal for times in zip(*pairs, strict=True))
            found[name] = {"map_us": 1e6 * plain / number, "window_us": 1e6 * ours / number}
        found["ratio"] = found["50 ms"]["window_us"] / found["no-op"]["map_us"]
        found["ratio_noop"] = found["no-op"]["window_us"] / found["no-op"]["map_us"]
    return found


# -- slides that do nothing -------------------------------------------------------------------------------
@contextlib.contextmanager
def standins(seconds: dict[str, float]) -> Iterator[None]:
    """Stages that sleep, and write as many files as real ones, but small."""

    def stage(name: str) -> Callable[..., dict[str, Any]]:
        def work(job: Any, study: Any, ledger: Any, keys: Any, workers: Any) -> dict[str, Any]:
            time.sleep(seconds.get(name, 0.0))
            image = study.image(job.slide)
            write = {
                "convert": [image / "0" / "c" / str(n) for n in range(FILES // 2)],
                "segment": [image / "labels" / "cells" / str(n) for n in range(FILES // 4)],
                "describe": [study.table(job.slide), study.features(job.slide) / "zarr.json"],
                "paint": [image / "labels" / "clusters" / "0"],
            }
            for path in write.get(name, []):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"daskcell")
            results: dict[str, Any] = {"convert": {"shape": (1, 520, 696)}, "segment": {"cells": 100}}
            return results.get(name, {"plan": {}} if name == "freeze" else {})

        return work

    def fit(names: list[str], study: Any, config: Any, workers: Any) -> dict[str, Any]:
        study.clusters.mkdir(exist_ok=True)
        return {"k": 2, "counts": [1, 1]}

    before = dict(slide.STAGES), collection.fit, pipeline.fingerprints, Source.open
    try:
        slide.STAGES.update({name: stage(name) for name in slide.STAGES})
        collection.fit = fit
        pipeline.fingerprints = lambda config: {"segment": "a", "describe": "b"}
        yield
    finally:
        slide.STAGES.update(before[0])
        collection.fit, pipeline.fingerprints = before[1:3]


def fields(folder: Path, count: int) -> Path:
    """So many small pictures, of a pixel each."""
    folder.mkdir()
    tifffile.imwrite(folder / "f00000.tif", np.zeros((16, 16), np.uint8))
    data = (folder / "f00000.tif").read_bytes()
    for number in range(1, count):
        (folder / f"f{number:05d}.tif").write_bytes(data)
    return folder


def resume(count: int = 1000) -> dict[str, Any]:
    """Seconds to find out that nothing is left to do: names and sizes, and all checksums."""
    with tempfile.TemporaryDirectory() as name, standins({}):
        scratch = Path(name)
        inputs = fields(scratch / "in", count)
        settings = {"compute": {"kind": "inline"}}
        times = {}
        for what, options in (("first", {}), ("again", {}), ("verify", {"verify": True})):
            start = time.perf_counter()
            study = pipeline.run(inputs, scratch / "out", settings, **options)
            times[what] = time.perf_counter() - start
            assert not study.failures, study.failures[0]
    return {"slides": count, **times, "bound": 5 + 0.002 * count}


def memory(counts: tuple[int, ...] = (200, 2000, 10_000), workers: int = 4) -> dict[str, Any]:
    """Peak memory of a process that holds client, scheduler and workers, in a child for each count."""
    found = {}
    for count in counts:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            with tempfile.TemporaryDirectory() as name, standins({}), cluster(workers) as client:
                scratch = Path(name)
                inputs = fields(scratch / "in", count)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                start = time.perf_counter()
                study = pipeline.run(inputs, scratch / "out", {}, client)
                assert not study.failures, study.failures[0]
                wall = time.perf_counter() - start
                after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writer, json.dumps([before / 1024, after / 1024, wall]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        before, after, wall = json.loads(os.read(reader, 4096))
        found[str(count)] = {"start_mb": before, "peak_mb": after, "ms_a_slide": 1000 * wall / count}
    return found


# -- simulations ------------------------------------------------------------------------------------------
def record(side: int = 1024) -> dict[str, float]:
    """Seconds of each task on a real block, brought to `BLOCK`."""
    from daskcell.images import convert_slide
    from daskcell.preprocess import freeze_slide
    from daskcell.segmentation import engine
    from daskcell.synthetic import CHANNELS, synthesize_field

    seconds: dict[str, float] = {}
    kept = {}
    names = ("run_tiles", "label_block", "check_blocks", "paint_block")

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[name] = time.perf_counter() - start

        return call

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        field = synthesize_field((side, side), seed=0)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(scratch / f"x_{channel}.tif", pixels)
        from daskcell.config import Config
        from daskcell.images import find_images

        (source,) = find_images(scratch)
        image = scratch / "x.zarr"
        convert_slide(source, image)
        plan = freeze_slide(image, Config().preprocess, Workers())
        for function in names:
            kept[function] = getattr(engine, function)
            setattr(engine, function, timed(function, kept[function]))
        try:
            for turn in range(2):  # the first compiles
                engine.segment_slide(
                    image, "cells", SegmentSettings(), plan, Workers(), side, scratch / f"s{turn}"
                )
        finally:
            for function, original in kept.items():
                setattr(engine, function, original)
    return {function: value * (BLOCK / side) ** 2 for function, value in seconds.items()}


def simulate_slide(client: Any, seconds: dict[str, float], workers: int, blocks: int) -> dict[str, float]:
    """The engine's own scheduling of a slide as wide as `SIDES`, at least so many blocks."""
    from daskcell.preprocess.plan import Plan
    from daskcell.segmentation import engine
    from daskcell.segmentation.globals import Globals
    from daskcell.segmentation.seams import SeamReport

    rows = max(1, min(-(-SIDES[0] // BLOCK), -(-blocks // -(-SIDES[1] // BLOCK))))
    shape = (min(SIDES[0], rows * BLOCK), SIDES[1])

    def stub(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        def work(job: Any, at: Any, *args: Any) -> Any:
            time.sleep(seconds[name] * (len(at) if name == "check_blocks" else 1))
            return result(job, at, *args)

        work.__name__ = name
        return work

    stubs = {
        "run_tiles": stub("run_tiles", lambda job, at, tiles: len(tiles)),
        "label_block": stub("label_block", lambda job, at, halo, sources: (SeamReport(), 30)),
        "check_blocks": stub(
            "check_blocks",
            lambda job, group, steps: [(np.zeros(0, np.int64), job.grid.core(at)) for at in group],
        ),
        "paint_block": stub("paint_block", lambda job, at, sources: SeamReport()),
        "create_labels": nothing,
        "build_label_pyramid": nothing,
    }
    kept = {name: getattr(engine, name) for name in stubs}
    with tempfile.TemporaryDirectory() as name:
        plan = Plan.__new__(Plan)
        object.__setattr__(plan, "shape", shape)
        job = engine.Job("none", "cells", SegmentSettings(), plan, BLOCK, name, name, "cpu")
        (Path(name) / "ids").mkdir()
        job.globals_file.write_text(json.dumps(Globals(shape, ((0.0, 1.0),), 30.0).to_json()))
        for function, replacement in stubs.items():
            setattr(engine, function, replacement)
        try:
            start, cpu = time.perf_counter(), time.process_time()
            team = Workers(client)
            engine._label(job, team, keep=True)
            engine._check_and_paint(job, team, 60)
            wall = time.perf_counter() - start
            count = len(job.grid)
            work = sum(seconds.values()) * count
        finally:
            for function, original in kept.items():
                setattr(engine, function, original)
    return figures(wall, time.process_time() - cpu, work, 3 * count, workers)


def simulate_slides(client: Any, seconds: float, workers: int, count: int) -> dict[str, float]:
    """`count` slides of one block each through `Run`."""
    shares = {"convert": 0.1, "segment": 0.5, "describe": 0.3, "paint": 0.1}
    with tempfile.TemporaryDirectory() as name, standins({k: seconds * v for k, v in shares.items()}):
        scratch = Path(name)
        inputs = fields(scratch / "in", count)
        start, cpu = time.perf_counter(), time.process_time()
        study = pipeline.run(inputs, scratch / "out", {}, client)
        assert not study.failures, study.failures[0]
        wall = time.perf_counter() - start
    return figures(wall, time.process_time() - cpu, seconds * count, count, workers)


def figures(wall: float, cpu: float, work: float, count: int, workers: int) -> dict[str, float]:
    return {
        "workers": workers,
        "tasks": count,
        "wall": wall,
        "efficiency": work / workers / wall,
        "cpu_ms_a_task": 1000 * cpu / count,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def simulate(what: str, teams: list[int], faster: float, wall: float) -> list[dict[str, float]]:
    seconds = record()
    print("recorded seconds:", {name: round(value, 2) for name, value in seconds.items()}, flush=True)
    quick = {name: value / faster for name, value in seconds.items()}
    whole = sum(quick.values())
    found = []
    for workers in teams:
        with cluster(workers) as client:
            most = int(wall * workers / whole)
            if what == "slide":
                found.append(simulate_slide(client, quick, workers, most))
            else:
                found.append(simulate_slides(client, whole, workers, min(1000, most)))
        print({name: round(value, 3) for name, value in found[-1].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["tasks", "resume", "memory", "slide", "slides"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--faster", type=float, default=10.0, help="durations are divided by this")
    parser.add_argument("--wall", type=float, default=40.0, help="seconds of a simulation: fewer blocks fit")
    parser.add_argument("--slides", type=int, nargs="+", default=[200, 2000, 10_000])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for what in options.what:
        if what == "tasks":
            found[what] = tasks()
        elif what == "resume":
            found[what] = resume()
        elif what == "memory":
            found[what] = memory(tuple(options.slides))
        else:
            found[what] = simulate(what, options.workers, options.faster, options.wall)
        print(what, json.dumps(found[what], indent=None if options.json else 1), flush=True)


if __name__ == "__main__":
    main()
