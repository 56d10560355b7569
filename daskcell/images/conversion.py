"""Conversion of microscope files to OME-Zarr: each task writes whole files of the result, each once.

Histograms and a fingerprint are made of the pixels meanwhile, so that later stages need not read them again.
The result gets its name when it is complete (`daskcell.storage.staging`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import zarr

from daskcell.config import InputSettings
from daskcell.errors import MemoryWarning, warn
from daskcell.geometry import Box, Grid
from daskcell.images import metadata, store
from daskcell.images.levels import Level, downscale_block, halved_box, plan_levels
from daskcell.images.pixel_stats import BlockStats, PixelStats, block_stats, record_hash
from daskcell.images.pyramid import halve_mean
from daskcell.images.reader_process import MEMORY_BYTES, open_safely
from daskcell.images.readers import Reader
from daskcell.images.shards import Position, write_box
from daskcell.images.sources import Source
from daskcell.storage import paths
from daskcell.storage.staging import begin, refuse_existing

Task = tuple[Any, Callable[..., Any], tuple[Any, ...]]

THREADS = 4
"""Number of blocks at the same time, if there are no workers."""
_reading = Lock()
"""Readers are not thread-safe, and the reader process answers one request at a time."""


def convert_slide(
    source: Source,
    target: str | Path,
    workers: Any = None,
    settings: InputSettings | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `source` as an OME-Zarr image at `target`, 0.5 unless `settings` say 0.4.

    Parameters
    ----------
    workers
        `compute.Workers`, or None for this process.
    overwrite
        Replace an image that is already at `target`; otherwise it is an error.

    Returns
    -------
    dict
        ``shape``, ``dtype``, ``channels``, ``pixel_size``, ``is_rgb``, ``files`` (how many hold pixels),
        ``fingerprint`` (hash of all pixels, the same whatever file they came from), and ``notes``, where
        something was assumed that no file says (which axis is what).

    Raises
    ------
    ImageError
        If the source cannot be read, or holds NaN or infinite pixels; nothing is left at `target` then.
    """
    settings = settings or InputSettings()
    if not overwrite:
        refuse_existing(target)
    identity = source.identity()
    reader = open_safely(source)
    try:
        count, dtype = len(reader.channels), reader.dtype
        height, width = reader.levels[0]
        strips = reader.piece[1] >= width and reader.piece[0] < height
        levels = plan_levels(reader.levels, count, dtype, strips=strips)
        notes = getattr(reader, "notes", ())
        _announce(source, reader)
        header = metadata.Header(source.name, reader.channels, reader.pixel_size, reader.is_rgb)
    finally:
        reader.close()
    staging = begin(target, overwrite=overwrite)
    try:
        group = store.new_group(staging.work, settings.ome_zarr)
        chunks = (1, store.CHUNK, store.CHUNK)
        for level in levels:
            store.create_level(group, level.number, (count, *level.shape), level.files, chunks, dtype)
        stats = PixelStats(count, dtype)
        pixels = sum(math.prod(level.shape) for level in levels if level.stored or not level.in_hand)
        stages = _stages(source, identity, staging.work, levels, strips, count * dtype.itemsize)
        for tasks in map(list, stages):
            share = math.prod(levels[tasks[0][0][0]].shape) / pixels  # of one level each
            for _, part in run_tasks(workers and workers.part(share, len(tasks)), tasks):
                stats.add(part)
        stats.check(source, header.channels)
        fingerprint = stats.fingerprint(header.channels, dtype, (height, width))
        windows = stats.windows(lambda: np.asarray(store.level_of(group, -1)))
        if stats.histograms is not None:
            store.write_histograms(group, stats.histograms, stats.first)
        method = None if any(level.stored for level in levels[1:]) else "mean"
        metadata.write(group, header, [level.shape for level in levels], windows, fingerprint, method)
        staging.commit()
    except BaseException:
        staging.rollback()
        raise
    return {
        "shape": (count, height, width),
        "dtype": str(dtype),
        "channels": list(header.channels),
        "pixel_size": header.pixel_size,
        "is_rgb": header.is_rgb,
        "files": stats.files,
        "fingerprint": fingerprint,
    } | ({"notes": list(notes)} if notes else {})


def _announce(source: Source, reader: Reader) -> None:
    """Warn of a file that is one large compressed piece, which a worker must decode whole for any block."""
    height, width = reader.piece
    size = height * width * len(reader.channels) * reader.dtype.itemsize
    whole = height >= reader.levels[0][0] and width >= reader.levels[0][1]
    if whole and size > MEMORY_BYTES // 8 and size > sum(paths.version(f)[0] for f in source.files):
        warn(
            f"{', '.join(source.files)} is one compressed piece, which every task must read as a whole: that "
            f"takes {2 * size / 1e9:.1f} GB and time, and would not if it were saved in tiles or strips.",
            MemoryWarning,
        )


def _stages(
    source: Source, identity: str, path: str, levels: list[Level], strips: bool, pixel_bytes: int
) -> Iterator[Iterable[Task]]:
    """The tasks of each level, largest first: those of a level may read the previous one."""
    for level in levels:
        grid, number = level.grid, level.number
        if level.stored:
            last = number + len([*takewhile(lambda after: after.in_hand, levels[number + 1 :])])
            runs = _runs(grid, pixel_bytes) if strips else [(grid.core(i),) for i in grid]
            yield (
                ((number, k), _convert_run, (source, identity, path, number, last, run))
                for k, run in enumerate(runs)
            )
        elif not level.in_hand:
            yield (((number, *i), _downscale, (path, number, grid.core(i))) for i in grid)


def run_tasks(workers: Any, tasks: Iterable[Task]) -> Iterator[tuple[Any, Any]]:
    """Run tasks on workers, a few at a time, or else in threads; yields key and result as they complete."""
    if workers is None:
        yield from _run_here(tasks)
        return
    window = workers.window()
    for key, function, arguments in tasks:
        window.submit(key, function, *arguments, kind="cpu")
    yield from window


def _run_here(tasks: Iterable[Task]) -> Iterator[tuple[Any, Any]]:
    """Run tasks in a thread for each core, up to `THREADS`: while one reads, another encodes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = iter(tasks)
    running: dict[Future[Any], Any] = {}
    with ThreadPoolExecutor(min(cores, THREADS)) as pool:
        while True:
            for key, function, arguments in islice(waiting, THREADS - len(running)):
                running[pool.submit(function, *arguments)] = key
            if not running:
                return
            try:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _convert_run(
    source: Source, identity: str, path: str, level: int, last: int, boxes: tuple[Box, ...]
) -> BlockStats:
    """Read a row of adjacent blocks; write each as one file of every level up to `last`."""
    run = Box(boxes[0].y0, boxes[0].x0, boxes[-1].y1, boxes[-1].x1)
    with _reading:
        pixels = cached_reader(source, identity).read(level, run)
    hashes: dict[Position, bytes] = {}
    on_chunk = partial(record_hash, hashes) if level == 0 else None
    files = 0
    for box in boxes:
        part = pixels[(slice(None), *box.within(run))]
        files += write_box(_array(path, level), box, part, on_chunk)
        for smaller in range(level + 1, last + 1):
            part, box = halve_mean(part), halved_box(box)
            files += write_box(_array(path, smaller), box, part)
    return block_stats(pixels, hashes, files) if level == 0 else BlockStats(files)


def _downscale(path: str, level: int, box: Box) -> BlockStats:
    return BlockStats(downscale_block(path, level, box, "mean"))


@lru_cache(maxsize=2)
def cached_reader(source: Source, identity: str) -> Reader:
    """The source, opened once per process, and again when its files changed."""
    return open_safely(source)


def _array(path: str, level: int) -> zarr.Array:
    return _opened(path, level, store.stamp(f"{path}/{level}"))


@lru_cache(maxsize=8)
def _opened(path: str, level: int, stamp: tuple[int | str, ...]) -> zarr.Array:
    return store.writable(path, level)


def _runs(grid: Grid, pixel_bytes: int) -> list[tuple[Box, ...]]:
    """Adjacent blocks that one task reads together, so that strips as wide as the image are decoded once."""
    down, across = grid.counts
    height, width = grid.core((0, 0)).shape
    most = max(1, store.SHARD_BYTES // (height * width * pixel_bytes))
    return [
        tuple(grid.core((i, j)) for j in range(first, min(first + most, across)))
        for i in range(down)
        for first in range(0, across, most)
    ]
