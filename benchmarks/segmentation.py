"""Segmentation: speed and cells against `CellposeModel.eval` on the whole picture, same network, in one run.

    python benchmarks/segmentation.py [--side 2048] [--workers 2] [--block 1024]

Prints as JSON: seconds and ratios of the whole way and of all that follows the network, the bound that the
network's own time sets, cells and how many of them are the same pixel by pixel.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import serial
import tifffile

from daskcell.compute import Workers, start_workers, threads_limited
from daskcell.config import ComputeSettings, PreprocessSettings, SegmentSettings

ROOT = Path(__file__).resolve().parents[1]


def mosaic(side: int) -> np.ndarray:
    """Fluorescence pictures side by side ``(side, side)`` uint8; generated ones where the real are absent."""
    folder = ROOT.parent / "shared" / "data" / "dsb2018"
    tiles = []
    for file in sorted(folder.glob("*/images/*.png")):
        picture = serial.read_picture([file])
        if len(picture) == 1 and np.median(picture) < 60 and min(picture.shape[1:]) >= 256:
            tiles.append(picture[0, :256, :256])
    if not tiles:
        from daskcell.evaluation.generated import synthesize_field

        field = synthesize_field((side, side), seed=1)
        return field.channels.max(axis=0)
    count = -(-side // 256)
    rows = [
        np.concatenate([tiles[(i * count + j) % len(tiles)] for j in range(count)], 1) for i in range(count)
    ]
    # Off the 256-pixel raster, so that the joins of the mosaic do not lie on the seams of the blocks.
    return np.roll(np.concatenate(rows), (-90, -53), (0, 1))[:side, :side]


class Clock:
    """Seconds spent inside a network."""

    def __init__(self, network: Any):
        self.seconds, self.calls = 0.0, 0
        forward = network.forward

        def timed(x: Any) -> Any:
            start = time.perf_counter()
            result = forward(x)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        network.forward = timed


def same_cells(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Cells of `b` that `a` has pixel by pixel, and at IoU 0.95."""
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    pairs, counts = np.unique(a.ravel().astype(np.int64) * len(size_b) + b.ravel(), return_counts=True)
    i, j = pairs // len(size_b), pairs % len(size_b)
    cell = (i > 0) & (j > 0)
    iou = counts[cell] / (size_a[i[cell]] + size_b[j[cell]] - counts[cell])
    return int((iou == 1).sum()), int((iou >= 0.95).sum())


def run_eval(picture: np.ndarray) -> dict[str, Any]:
    """Cellpose on the whole picture with all cores, in one piece."""
    from daskcell.models import load_network

    network = load_network("tiny")
    clock = Clock(network)
    model = serial.cellpose_model(network)
    model.eval(picture[:256, :256], bsize=256)
    clock.seconds = 0.0
    start = time.perf_counter()
    labels = model.eval(picture, bsize=256, tile_overlap=0.1)[0]
    return {
        "seconds": time.perf_counter() - start,
        "network": clock.seconds,
        "labels": labels.astype(np.uint32),
    }


def run_engine(zarr: Path, workers: Workers, block: int, scratch: Path, name: str) -> dict[str, Any]:
    """`segment_slide`, the engine of `daskcell run`."""
    from daskcell.geometry import Box
    from daskcell.images import image_info, read_labels
    from daskcell.preprocess import fit_slide
    from daskcell.segmentation.engine import segment_slide

    plan = fit_slide(zarr, PreprocessSettings(reconstruct=None, histogram=None), workers)
    settings = SegmentSettings(diameter=None)
    start = time.perf_counter()
    report = segment_slide(zarr, name, settings, plan, workers, block, scratch)
    seconds = time.perf_counter() - start
    labels = read_labels(zarr, name, Box(0, 0, *image_info(zarr).shape[1:]))
    return {"seconds": seconds, "labels": labels, "report": report}


def network_seconds(picture: np.ndarray, tiles: int) -> float:
    """Seconds of one thread for `tiles` tiles through the bare network."""
    import torch

    from daskcell.models import load_network

    network = load_network("tiny")
    with threads_limited(1), torch.no_grad():
        batch = torch.zeros(8, 1, 256, 256) + torch.from_numpy(picture[:256, :256] / 255).float()
        network(batch)
        start = time.perf_counter()
        for _ in range(4):
            network(batch)
        return (time.perf_counter() - start) / 32 * tiles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from daskcell.images import convert

    picture = mosaic(options.side)
    figures: dict[str, Any] = {"side": options.side, "workers": options.workers, "block": options.block}
    whole = run_eval(picture)
    figures["eval"] = {
        "seconds": whole["seconds"],
        "network": whole["network"],
        "cells": int(whole["labels"].max()),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tifffile.imwrite(folder / "picture.tif", picture)
        convert(folder / "picture.tif", folder / "picture.zarr")
        with start_workers(ComputeSettings(workers=options.workers)) as workers:
            run_engine(folder / "picture.zarr", workers, options.block, folder / "warm", "warm")
            ours = run_engine(folder / "picture.zarr", workers, options.block, folder / "scratch", "cells")
        identical, close = same_cells(ours["labels"], whole["labels"])
        network = network_seconds(picture, ours["report"]["tiles"]) / options.workers
        figures["daskcell"] = {
            "seconds": ours["seconds"],
            "network": network,
            "cells": int(ours["labels"].max()),
            "identical": identical,
            "iou_0.95": close,
            "faster": whole["seconds"] / ours["seconds"],
            "faster_after_the_network": (whole["seconds"] - whole["network"]) / (ours["seconds"] - network),
            "bound_by_the_network": whole["seconds"] / network,
            "seams": ours["report"],
        }
    print(json.dumps(figures, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
