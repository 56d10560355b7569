"""Sleeps in place of work, and a cluster to sleep on: a scheduler and workers in processes of their own.

`SECONDS` holds the durations of each kind of task, one after another for its blocks in turn. Workers of
`processes` get them with their environment, so that they need no pictures, networks or results.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

SECONDS: dict[str, list[float]] = json.loads(os.environ.get("STANDIN_SECONDS", "{}"))
FILES = 24
"""That a stand-in slide writes, as a field of 520 x 696 pixels does."""
_THREADS_A_PROCESS = 16
_QUIET = {
    "distributed.worker.http.routes": [],
    "distributed.scheduler.http.routes": [],
    "distributed.worker.profile.enabled": False,  # a hundred looks a second by each of 64 workers
}


def nothing(*args: Any) -> None:
    """A task without work."""


def sleep(name: str, *blocks: tuple[int, int]) -> None:
    """As long as `name` took for `blocks`."""
    took = SECONDS[name]
    time.sleep(sum(took[(5 * i + j) % len(took)] for i, j in blocks))


# -- tasks of `segmentation.engine`, by its names ---------------------------------------------------------
def observe_blocks(slide: Any, group: Any) -> None:
    sleep("observe_blocks", *group)


def choose_windows(slide: Any) -> list[tuple[Any, Any]]:
    return [(None, None)]


def measure_window(slide: Any, box: Any, params: Any) -> list[int]:
    sleep("measure_window", (0, 0))
    return [707]


def fit_params(slide: Any, groups: Any, diameter: float) -> None:
    from daskcell.segmentation.image_params import ImageParams

    sleep("fit_params", (0, 0))
    slide.params_file.write_text(json.dumps(ImageParams(slide.shape, ((0.0, 1.0),), diameter).to_json()))


def run_tiles(slide: Any, at: Any, tiles: list[int]) -> int:
    sleep("run_tiles", at)
    return len(tiles)


def label_block(slide: Any, at: Any, halo: int, sources: Any, extra_tiles: Any) -> Any:
    from daskcell.segmentation.tasks import LabelledBlock

    sleep("label_block", at)
    return LabelledBlock([], 0, 30)


def check_blocks(slide: Any, group: Any, steps: int) -> Any:
    sleep("check_blocks", *group)
    return [(np.zeros(0, np.int64), slide.grid.core(at)) for at in group]


def paint_block(slide: Any, at: Any, sources: Any) -> Any:
    from daskcell.segmentation.core.seams import SeamReport

    sleep("paint_block", at)
    return SeamReport()


def downscale_block(at: Any) -> None:
    sleep("downscale_block", at)


def create_labels(*args: Any, **options: Any) -> None:
    """The driver writes nothing."""


def build_label_pyramid(path: Any, name: str, workers: Any) -> None:
    """The tasks of the smaller levels, level after level."""
    from daskcell.geometry import Grid

    shape, block = json.loads(Path(path, "shape.json").read_text())
    while max(shape) > block:
        shape = [-(-side // 2) for side in shape]
        window = workers.window()
        for at in Grid.regular(tuple(shape), block):
            window.submit(at, downscale_block, at)
        for _ in window:
            pass


# -- stages of a slide ------------------------------------------------------------------------------------
def stage(name: str) -> Callable[[Any], Any]:
    """A stage that sleeps, and writes as many files as the real one, but small."""
    from daskcell.pipeline.stages import STAGES

    found: dict[str, Any] = {"shape": (1, 520, 696), "cells": 100, "plan": {}, "k": 2, "counts": [1, 1]}
    result = STAGES[name].result.model_validate(found)

    def work(context: Any) -> Any:
        time.sleep(sum(SECONDS.get(name, ())))
        study, slide, image = context.study, context.slide, context.image
        write = {
            "convert": [image / "0" / "c" / str(n) for n in range(FILES // 2)],
            "segment": [image / "labels" / "cells" / str(n) for n in range(FILES // 4)],
            "describe": [study.paths.table(slide), study.paths.features(slide) / "zarr.json"],
            "cluster": [study.paths.clusters / "model.json"],
            "assign": [study.paths.clusters_table(slide)],
            "paint": [image / "labels" / "clusters" / "0"],
            "report": [study.paths.report],
        }
        for path in write.get(name, []):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"daskcell")
        return result

    return work


@contextlib.contextmanager
def stages() -> Iterator[None]:
    """Stand-ins for all stages of this process."""
    from unittest import mock

    from daskcell.pipeline import api
    from daskcell.pipeline.stages import STAGES

    fakes = {name: dataclasses.replace(real, run=stage(name)) for name, real in STAGES.items()}
    with (
        mock.patch.dict(STAGES, fakes),
        mock.patch.object(api, "fingerprints", return_value={"segment": "a", "describe": "b"}),
    ):
        yield


def fields(folder: Path, count: int) -> Path:
    """So many small pictures."""
    folder.mkdir()
    tifffile.imwrite(folder / "f00000.tif", np.zeros((16, 16), np.uint8))
    data = (folder / "f00000.tif").read_bytes()
    for number in range(1, count):
        (folder / f"f{number:05d}.tif").write_bytes(data)
    return folder


# -- a cluster --------------------------------------------------------------------------------------------
def usage() -> tuple[int, float, float]:
    """Process, seconds of CPU, and MB at most, of whoever is asked."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # `ru_maxrss` would begin with that of the process that started this one.
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return os.getpid(), used.ru_utime + used.ru_stime, int(peak) / 1024


def schedule() -> None:
    """A scheduler's process: prints its address and goes on until its input ends."""
    import dask
    from distributed import Scheduler

    async def run() -> None:
        async with Scheduler(
            host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0"
        ) as scheduler:
            print(scheduler.address, flush=True)
            await asyncio.to_thread(sys.stdin.read)

    with dask.config.set(_QUIET):
        asyncio.run(run())


def work(address: str, count: int) -> None:
    """A process of `count` workers of one thread each; ends with its input."""
    import dask
    from distributed import Worker

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(count):
                worker = Worker(address, nthreads=1, memory_limit=0, dashboard=False, host="127.0.0.1")
                await stack.enter_async_context(worker)
            await asyncio.to_thread(sys.stdin.read)

    with dask.config.set(_QUIET), stages():
        asyncio.run(run())


@contextlib.contextmanager
def processes(workers: int, seconds: dict[str, list[float]]) -> Iterator[Any]:
    """A client of a scheduler and `workers` in processes of their own."""
    from distributed import Client

    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    environment = (
        os.environ | here | {"STANDIN_SECONDS": json.dumps(seconds), "DASK_LOGGING__DISTRIBUTED": "error"}
    )

    def start(call: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", f"import standins; standins.{call}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    with contextlib.ExitStack() as stack:

        def started(call: str) -> subprocess.Popen[str]:
            process = stack.enter_context(start(call))
            stack.callback(process.stdin.close)
            return process

        address = started("schedule()").stdout.readline().strip()
        shares = [_THREADS_A_PROCESS] * (workers // _THREADS_A_PROCESS) + [workers % _THREADS_A_PROCESS]
        for share in filter(None, shares):
            started(f"work({address!r}, {share})")
        client = stack.enter_context(Client(address))
        client.wait_for_workers(workers, timeout=120)
        yield client


def used(client: Any) -> dict[str, tuple[float, float]]:
    """CPU seconds and peak MB of the scheduler, the driver, and all worker processes together."""
    team = {pid: (cpu, most) for pid, cpu, most in client.run(usage).values()}
    totals = tuple(map(sum, zip(*team.values(), strict=True)))
    return {"scheduler": client.run_on_scheduler(usage)[1:], "driver": usage()[1:], "workers": totals}
