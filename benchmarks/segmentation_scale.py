"""Segmentation of pictures of growing size: what the engine adds to its science, what a worker holds.

    python benchmarks/segmentation_scale.py [--sides 4096 8192 24576] [--block 2048] [--workers 2]
                                             [--stand-in]

Prints as JSON, for each side: seconds; seconds of network and dynamics in all workers, by clocks inside them;
`overhead`, wall time over those seconds per worker (1: nothing but science); tiles through the network and
tiles of the grid; tasks per block; and the largest resident memory of a worker process. Every side gets fresh
worker processes, warmed by a small picture, since a process never gives its high-water mark back.

With ``--stand-in`` the slopes of a blurred picture take the network's place once the workers are warm: memory
and counts, which need no quiet machine, in a fraction of the time. `overhead` then says nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from distributed import WorkerPlugin
from scipy.ndimage import gaussian_filter
from segmentation import mosaic

from daskcell.compute import Workers, start_workers
from daskcell.config import ComputeSettings, PreprocessSettings, SegmentSettings


class Clocks(WorkerPlugin):
    """In a worker: seconds of the network, and of dynamics, which are paths, seeds, ownership and checks.

    Reading, cutting tiles and blending them are the engine's.
    """

    name = "clocks"

    def setup(self, worker: Any) -> None:
        from daskcell.segmentation import tasks
        from daskcell.segmentation.core import ownership
        from daskcell.segmentation.methods import cellpose

        self.seconds = Counter[str]()
        self.clock(cellpose, "run_network", "network")
        self.clock(cellpose.CellposeMethod, "follow", "dynamics")
        self.clock(ownership, "choose_owned", "dynamics")
        self.clock(tasks, "check_block", "dynamics")

    def clock(self, place: Any, name: str, kind: str) -> None:
        """Let ``place.name`` add up the seconds it takes."""
        function = getattr(place, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[kind] += time.perf_counter() - start

        setattr(place, name, timed)


class StandIn(WorkerPlugin):
    """In a worker: flows uphill on the blurred picture instead of the network's."""

    name = "stand-in"

    def setup(self, worker: Any) -> None:
        from daskcell.segmentation.methods import cellpose

        cellpose.run_network = uphill


def uphill(network: Any, inputs: np.ndarray, batch_size: int) -> np.ndarray:
    """As `daskcell.segmentation.network.run_network`."""
    blurred = gaussian_filter(inputs.mean(axis=1), (0, 4, 4))
    flows = np.stack(np.gradient(blurred, axis=(1, 2)), axis=1)
    flows *= 5 / (np.linalg.norm(flows, axis=1, keepdims=True) + 1e-3)
    return np.concatenate([flows, 20 * (blurred[:, None] - 0.25)], axis=1).astype(np.float32)


def read_clocks(dask_worker: Any) -> tuple[dict[str, float], float]:
    """In a worker: seconds so far, and the most memory it ever held, in MB."""
    seconds = dict(dask_worker.plugins["clocks"].seconds)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_picture(path: Path, side: int) -> None:
    """The mosaic again and again, as a tiled TIFF."""
    tile = mosaic(4096)
    repeats = math.ceil(side / 4096)

    def parts() -> Any:
        for y in range(0, side, 512):
            row = np.tile(tile[y % 4096 : y % 4096 + min(512, side - y)], (1, repeats))[:, :side]
            for x in range(0, side, 512):
                part = row[:, x : x + 512]
                yield np.pad(part, [(0, 512 - part.shape[0]), (0, 512 - part.shape[1])])

    tifffile.imwrite(path, parts(), shape=(side, side), dtype=np.uint8, tile=(512, 512), bigtiff=True)


def segment(zarr: Path, workers: Workers, block: int, scratch: Path) -> dict[str, Any]:
    from daskcell.preprocess import freeze_slide
    from daskcell.segmentation.engine import segment_slide

    plan = freeze_slide(zarr, PreprocessSettings(reconstruct=None, histogram=None), workers)
    return segment_slide(zarr, "cells", SegmentSettings(diameter=None), plan, workers, block, scratch)


def measure(side: int, count: int, block: int, stand_in: bool, folder: Path) -> dict[str, Any]:
    from daskcell.images import convert
    from daskcell.segmentation.core.tiles import TileGrid

    for name, size in (("warm", 512), ("picture", side)):
        write_picture(folder / f"{name}.tif", size)
        convert(folder / f"{name}.tif", folder / f"{name}.zarr")
    tasks = Counter[str]()
    with start_workers(ComputeSettings(workers=count)) as workers:
        assert workers.client is not None
        segment(folder / "warm.zarr", workers, 128, folder / "warm")  # blocks enough for every worker
        if stand_in:
            workers.client.register_plugin(StandIn())
        workers.client.register_plugin(Clocks())
        start = time.perf_counter()
        report = segment(
            folder / "picture.zarr",
            workers.watched(lambda: tasks.update(all=1)),
            block,
            folder / "scratch",
        )
        wall = time.perf_counter() - start
        clocks = workers.client.run(read_clocks).values()
    science = Counter[str]()
    for seconds, _ in clocks:
        science.update(seconds)
    blocks = report["blocks"]
    return {
        "side": side,
        "stand_in": stand_in,
        "cells": report["cells"],
        "seconds": wall,
        "network": science["network"],
        "dynamics": science["dynamics"],
        "overhead": wall / (science.total() / count),
        "tiles": report["tiles"],
        "tiles_of_the_grid": len(TileGrid.lay((side, side))),
        "blocks": blocks,
        "tasks_per_block": tasks["all"] / blocks,
        "worker_megabytes": max(memory for _, memory in clocks),
        "redone": report["redone"],
        "conflicts": report["conflicts"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for side in options.sides:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(side, options.workers, options.block, options.stand_in, Path(folder))
        print(json.dumps(figures, indent=None if options.json else 1), flush=True)


if __name__ == "__main__":
    main()
