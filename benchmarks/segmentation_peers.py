"""Segmentation in blocks: daskcell against Cellpose's `distributed_eval` and against patchworks, one network.

    pip install patchworks psutil
    python benchmarks/segmentation_peers.py [--side 2048] [--block 1024]

The truth of each block-wise run is `CellposeModel.eval` on the whole picture. Prints as JSON, for each: the
seconds of the second of two runs, how many times daskcell is faster, cells, and how many of the whole
picture's cells come out wrong: not pixel by pixel, and below IoU 0.95. patchworks is GPL-3 and no part of
daskcell: it is left out unless it is installed.

Both peers run as they are, on two worker processes or threads. `distributed_eval` builds its model inside its
workers, so these are given one that takes the small network; and it passes `zarr.open` the mode by position,
which zarr 3.1 refuses.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import serial
import tifffile
import zarr
from distributed import Client, LocalCluster, WorkerPlugin
from segmentation import mosaic, run_engine, run_eval, same_cells

from daskcell.compute import start_workers, threads_limited
from daskcell.config import ComputeSettings


class SmallModel(WorkerPlugin):
    """In a worker of `distributed_eval`: `CellposeModel` with the embedded network, loaded once."""

    def setup(self, worker: Any) -> None:
        import cellpose.models
        import torch

        from daskcell.models import load_network

        torch.set_num_threads(1)
        network = load_network("tiny")
        small = serial.cellpose_model(network)
        cellpose.models.CellposeModel = lambda **_: small


def mode_by_name() -> None:
    """Let ``zarr.open(path, "w", ...)`` mean what it did before zarr 3.1."""
    opened = zarr.open

    def tolerant(store: Any, *mode: str, **options: Any) -> Any:
        return opened(store, **(dict(zip(["mode"], mode, strict=False)) | options))

    zarr.open = tolerant


Run = Callable[[], np.ndarray]


def with_distributed_eval(picture: np.ndarray, block: int, folder: Path, stack: ExitStack) -> Run:
    from cellpose.contrib.distributed_segmentation import distributed_eval

    mode_by_name()
    source = zarr.open(folder / "peer.zarr", mode="w", shape=picture.shape, chunks=(block, block), dtype="u1")
    source[:] = picture
    source = zarr.open(folder / "peer.zarr", mode="r")
    cluster = stack.enter_context(LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None))
    client = stack.enter_context(Client(cluster))
    client.register_plugin(SmallModel())
    os.chdir(folder)  # it writes its logs where it is

    def run() -> np.ndarray:
        time.sleep(1.1)  # its log folder is named by the second, and must not be there
        labels, _ = distributed_eval(
            source,
            (block, block),
            str(folder / "peer-labels.zarr"),
            model_kwargs={},
            eval_kwargs={"diameter": 30, "bsize": 256},
            cluster=SimpleNamespace(client=client),
        )
        return np.asarray(labels[:])

    return run


def with_patchworks(picture: np.ndarray, block: int, folder: Path, stack: ExitStack) -> Run:
    import dask.array as da
    import patchworks

    from daskcell.models import load_network

    model = serial.cellpose_model(load_network("tiny"))

    def segment(tile: np.ndarray) -> np.ndarray:
        return model.eval(tile, bsize=256, tile_overlap=0.1)[0].astype(np.int32)

    def run() -> np.ndarray:
        target = folder / f"patchworks-{time.monotonic_ns()}.zarr"
        with threads_limited(1):
            result = patchworks.tile_process(
                da.from_array(picture, chunks=block),
                segment,
                tile_shape=(block, block),
                overlap=60,
                channel=None,
                max_workers=2,
                progress=False,
                write_to=target,
                pyramid_levels=1,
                stitch="iou",
            )
        return np.asarray(result).reshape(picture.shape)

    return run


def with_daskcell(picture: np.ndarray, block: int, folder: Path, stack: ExitStack) -> Run:
    from daskcell.images import convert

    workers = stack.enter_context(start_workers(ComputeSettings(workers=2)))
    tifffile.imwrite(folder / "picture.tif", picture)
    convert(folder / "picture.tif", folder / "picture.zarr")

    def run() -> np.ndarray:
        name = f"run-{time.monotonic_ns()}"
        return run_engine(folder / "picture.zarr", workers, block, folder / name, name)["labels"]

    return run


def second_run(run: Run) -> tuple[float, np.ndarray]:
    run()
    start = time.perf_counter()
    labels = run()
    return time.perf_counter() - start, labels


PEERS = {
    "daskcell": with_daskcell,
    "distributed_eval": with_distributed_eval,
    "patchworks": with_patchworks,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    picture = mosaic(options.side)
    whole = run_eval(picture)["labels"]
    figures: dict[str, Any] = {"side": options.side, "block": options.block, "whole": int(whole.max())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {}
        for peer, prepare in PEERS.items():
            try:
                with ExitStack() as stack:
                    runs[peer] = second_run(prepare(picture, options.block, folder, stack))
            except ImportError as error:
                figures[peer] = f"not installed: {error}"
        os.chdir("/")
    for peer, (seconds, labels) in runs.items():
        identical, close = same_cells(labels, whole)
        figures[peer] = {
            "seconds": seconds,
            "daskcell_is_faster": seconds / runs["daskcell"][0],
            "cells": len(np.unique(labels)) - 1,
            "not_identical": int(whole.max()) - identical,
            "below_iou_0.95": int(whole.max()) - close,
        }
    print(json.dumps(figures, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
