"""Microscope files to OME-Zarr 0.5: one task writes one whole file of the result, once.

While pixels pass by, their histograms and a fingerprint are made, so that later stages need no second
reading. The image is written beside its target and renamed when whole: what has the final name is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from daskcell.config import InputSettings
from daskcell.errors import DaskcellError, ImageError
from daskcell.geometry import Box, Grid
from daskcell.images import labels, metadata, store
from daskcell.images.pyramid import level_shapes
from daskcell.images.readers import Reader
from daskcell.images.sandbox import open_safely
from daskcell.images.sources import Source
from daskcell.images.summary import Part, Summary, describe

Task = tuple[Any, Callable[..., Any], tuple[Any, ...]]


def convert_slide(
    source: Source,
    target: str | Path,
    workers: Any = None,
    settings: InputSettings | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `source` as an OME-Zarr 0.5 image at `target`.

    Parameters
    ----------
    workers
        `compute.Workers`, or None for this process.
    overwrite
        Replace an image that is already at `target`; otherwise it is an error.

    Returns
    -------
    dict
        ``shape``, ``dtype``, ``channels``, ``pixel_size``, ``is_rgb``, ``files`` (how many hold pixels)
        and ``fingerprint`` (hash of all pixels, the same whatever file they came from).

    Raises
    ------
    ImageError
        If the source cannot be read, or holds NaN or infinite pixels; nothing is left at `target` then.
    """
    target = Path(target).absolute()  # workers may run elsewhere
    if target.exists() and not overwrite:
        raise ImageError(f"{target} exists already; please remove it or choose another name.")
    identity = source.identity()
    reader = open_safely(source)
    try:
        shape = reader.levels[0]
        count, dtype = len(reader.channels), reader.dtype
        strips = reader.piece[1] >= shape[1] and reader.piece[0] < shape[0]
        header = metadata.Header(source.name, reader.channels, reader.pixel_size, reader.is_rgb)
    finally:
        reader.close()
    partial = target.parent / f".{target.name}.partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shapes = level_shapes(shape)
        group = store.new_group(partial)
        for level, (y, x) in enumerate(shapes):
            shards = store.shard_shape(count, (y, x), dtype, strips=strips and not level)
            store.create_level(group, level, (count, y, x), shards, (1, store.CHUNK, store.CHUNK), dtype)
        summary = Summary(count, dtype)
        grid = _grid(group["0"])
        files = len(grid)
        runs = _runs(grid, count * dtype.itemsize) if strips else [(grid.core(i),) for i in grid]
        tasks: Iterable[Task] = (
            (("convert", k), _convert_run, (source, identity, str(partial), run))
            for k, run in enumerate(runs)
        )
        for _, part in run_tasks(workers, tasks):
            summary.add(part)
        summary.check(source, header.channels)
        for level in range(1, len(shapes)):
            grid = _grid(group[str(level)])
            tasks = (
                (("pyramid", level, *i), labels.downscale_shard, (str(partial), level, grid.core(i), "mean"))
                for i in grid
            )
            for _ in run_tasks(workers, tasks):
                files += 1
        fingerprint = summary.fingerprint(header.channels, dtype)
        windows = summary.windows(lambda: np.asarray(store.level_of(group, -1)))
        if summary.histograms is not None:
            store.write_histograms(group, summary.histograms, summary.first)
        metadata.write(group, header, shapes, windows, fingerprint)
        _replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {
        "shape": (count, *shape),
        "dtype": str(dtype),
        "channels": list(header.channels),
        "pixel_size": header.pixel_size,
        "is_rgb": header.is_rgb,
        "files": files,
        "fingerprint": fingerprint,
    }


def run_tasks(workers: Any, tasks: Iterable[Task]) -> Iterator[tuple[Any, Any]]:
    """Run tasks on workers (a few at a time) or, without, here; yields key and result as they come."""
    if workers is None:
        for key, function, arguments in tasks:
            yield key, function(*arguments)
        return
    window = workers.window()
    for key, function, arguments in tasks:
        window.submit(key, function, *arguments, kind="cpu")
    yield from window


def _convert_run(source: Source, identity: str, path: str, boxes: tuple[Box, ...]) -> Part:
    """Read a run of blocks that lie side by side at once, and write each as one file."""
    array = _array(path, store.stamp(os.path.join(path, "0")))
    for box in boxes:
        store.assert_aligned(box, array)
    run = Box(boxes[0].y0, boxes[0].x0, boxes[-1].y1, boxes[-1].x1)
    pixels = cached_reader(source, identity).read(0, run)
    for box in boxes:
        array[(slice(None), *box.slices)] = pixels[(slice(None), *box.within(run))]
    return describe(pixels, run)


@lru_cache(maxsize=2)
def cached_reader(source: Source, identity: str) -> Reader:
    """The source, opened once per process, and again when its files changed."""
    return open_safely(source)


@lru_cache(maxsize=4)
def _array(path: str, stamp: tuple[int, ...]) -> zarr.Array:
    return store.writable(path, 0)


def _runs(grid: Grid, pixel_bytes: int) -> list[tuple[Box, ...]]:
    """Blocks that one task reads together, so that a strip as wide as the picture is decoded once."""
    down, across = grid.counts
    height, width = grid.core((0, 0)).shape
    most = max(1, store.SHARD_BYTES // (height * width * pixel_bytes))
    return [
        tuple(grid.core((i, j)) for j in range(first, min(first + most, across)))
        for i in range(down)
        for first in range(0, across, most)
    ]


def _grid(array: Any) -> Grid:
    y, x = array.shards[-2:]
    return Grid(labels._edges(array.shape[-2], y), labels._edges(array.shape[-1], x))


def _replace(partial: Path, target: Path) -> None:
    """Give `partial` its final name; what had it before is removed after, so it is never lost."""
    if target.exists():
        old = target.parent / f".{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, target)


__all__ = ["DaskcellError", "convert_slide"]
