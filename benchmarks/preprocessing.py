"""Preprocessing: disk to disk against dask-image's `map_overlap` and Dask's store, same steps, in one run.

    python benchmarks/preprocessing.py [--side 8192] [--workers 2]

Colour image from four stains, percentile stretch, Gaussian; OME-Zarr to OME-Zarr without a pyramid.
The percentiles are counted once and given to both. Prints as JSON: seconds, ratio, peak memory of a worker,
and whether every pixel is the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from daskcell.compute import Workers, start_workers
from daskcell.config import ComputeSettings, GaussianSettings, PreprocessSettings
from daskcell.geometry import Box, Grid
from daskcell.preprocess import Plan, PreparedImage, fit_slide
from daskcell.preprocess.plan import apply_steps


def draw(path: Path, side: int) -> None:
    """An OME-Zarr image of four generated stains, a field repeated."""
    import zarr

    from daskcell.evaluation.generated import CHANNELS, synthesize_field
    from daskcell.images import metadata, store

    field = synthesize_field((1024, 1024), seed=1).channels
    shape = (side, side)
    group = store.new_group(path)
    shards = store.shard_shape(4, shape, np.uint8)
    array = store.create_level(group, 0, (4, *shape), shards, (1, store.CHUNK, store.CHUNK), np.uint8)
    assert isinstance(array, zarr.Array)
    for y in range(0, side, shards[1]):
        rows = min(shards[1], side - y)
        array[:, y : y + rows] = np.tile(field, (1, -(-rows // 1024), -(-side // 1024)))[:, :rows, :side]
    windows = [(0.0, 255.0, 0.0, 255.0)] * 4
    metadata.write(group, metadata.Header("stains", CHANNELS, None, False), [shape], windows, "", None)


def new_level(target: Path, plan: Plan) -> Any:
    """Room for the result, in files that are written whole."""
    from daskcell.images import store

    files = store.shard_shape(plan.out_channels, plan.shape, plan.out_dtype)
    shape = (plan.out_channels, *plan.shape)
    return store.create_level(
        store.new_group(target), 0, shape, files, (1, store.CHUNK, store.CHUNK), plan.out_dtype
    )


def by_tasks(image: PreparedImage, target: Path, workers: Workers) -> None:
    """A task a file: read through the plan, as every stage does, and written."""
    out = new_level(target, image.plan)
    window = workers.window()
    for index in (grid := Grid.regular(image.shape, out.shards[1])):
        window.submit(index, write_block, image, str(target), grid.core(index))
    for _ in window:
        pass


def write_block(image: PreparedImage, target: str, box: Box) -> None:
    from daskcell.images import store
    from daskcell.images.shards import write_box

    write_box(store.writable(target, 0), box, image.read(box))


def by_dask_image(source: Path, plan: Plan, target: Path) -> None:
    """The same steps as a Dask graph: `map_blocks`, dask-image's filter, store."""
    import dask.array as da
    import zarr
    from dask_image.ndfilters import gaussian_filter

    array = zarr.open_array(str(source), path="0", mode="r")
    out = new_level(target, plan)
    # Chunks that are whole files of both arrays: others would be written by two tasks.
    x = da.from_zarr(array, chunks=(4, *out.shards[1:]))
    *pointwise, smoothing = plan.steps
    chunks = ((plan.out_channels,), *x.chunks[1:])
    x = x.map_blocks(apply_steps, tuple(pointwise), None, chunks=chunks, dtype=plan.out_dtype)
    # In floats: of integers dask-image cuts the fraction off after each axis.
    smooth = gaussian_filter(x.astype(np.float64), (0, smoothing.sigma, smoothing.sigma))
    da.store(da.rint(smooth).astype(plan.out_dtype), out, lock=False)


def timed(workers: Workers, function: Any, *arguments: Any) -> tuple[float, float]:
    """Seconds, and the largest memory of a worker meanwhile in MB."""
    assert workers.client is not None
    workers.client.restart()
    workers.client.run(_warm)
    start = time.perf_counter()
    with workers.client.as_current():
        function(*arguments)
    seconds = time.perf_counter() - start
    return seconds, max(workers.client.run(_peak).values())


def _warm() -> None:
    """Imports and compiled code, which either way is paid for once."""
    import dask_image.ndfilters  # noqa: F401

    import daskcell.images.conversion  # noqa: F401
    from daskcell.preprocess.steps import smooth

    smooth(np.zeros((1, 8, 8), np.uint8), 1.0)


def _peak() -> float:
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = PreprocessSettings(gaussian=GaussianSettings(sigma=options.sigma))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "stains.zarr", options.side)
        with start_workers(ComputeSettings(workers=options.workers)) as workers:
            plan = fit_slide(folder / "stains.zarr", settings, workers)
            image = PreparedImage(str(folder / "stains.zarr"), plan)
            ours = timed(workers, by_tasks, image, folder / "a.zarr", workers)
            theirs = timed(workers, by_dask_image, folder / "stains.zarr", plan, folder / "b.zarr")
        same = compare(folder / "a.zarr", folder / "b.zarr")
    pixels = options.side**2 / 1e6
    figures = {
        "side": options.side,
        "workers": options.workers,
        "daskcell": {"seconds": ours[0], "megapixels_per_second": pixels / ours[0], "peak_mb": ours[1]},
        "dask-image": {
            "seconds": theirs[0],
            "megapixels_per_second": pixels / theirs[0],
            "peak_mb": theirs[1],
        },
        "faster": theirs[0] / ours[0],
        "identical": same,
    }
    print(json.dumps(figures, indent=None if options.json else 1))


def compare(first: Path, second: Path) -> bool:
    """Whether the largest levels of two images are the same in every pixel."""
    import zarr

    a, b = (zarr.open_array(str(path), path="0", mode="r") for path in (first, second))
    rows = range(0, a.shape[1], 2048)
    return all(np.array_equal(a[:, y : y + 2048], b[:, y : y + 2048]) for y in rows)


if __name__ == "__main__":
    main()
