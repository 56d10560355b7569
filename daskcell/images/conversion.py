"""Microscope files to OME-Zarr 0.5: one task writes one whole file of the result, once.

While pixels pass by, their histograms and a fingerprint are made, so that later stages need no second
reading. The image is written beside its target and renamed when whole: what has the final name is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from daskcell.config import InputSettings
from daskcell.errors import DaskcellError, ImageError
from daskcell.geometry import Box, Grid
from daskcell.images import labels, metadata, store
from daskcell.images.pyramid import level_shapes
from daskcell.images.readers import Reader
from daskcell.images.sandbox import open_safely
from daskcell.images.sources import Source

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
    target = Path(target)
    if target.exists() and not overwrite:
        raise ImageError(f"{target} exists already; please remove it or choose another name.")
    identity = source.identity()
    reader = open_safely(source)
    try:
        shape = reader.levels[0]
        count, dtype = len(reader.channels), reader.dtype
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
            shards = store.shard_shape(count, (y, x), dtype)
            store.create_level(group, level, (count, y, x), shards, (1, store.CHUNK, store.CHUNK), dtype)
        files = 0
        summary = Summary(count)
        grid = _grid(group["0"])
        tasks: Iterable[Task] = (
            (("convert", *i), _convert_shard, (source, identity, str(partial), grid.core(i))) for i in grid
        )
        for key, part in run_tasks(workers, tasks):
            summary.add(key[1:], part)
            files += 1
        summary.check(source, header.channels)
        for level in range(1, len(shapes)):
            grid = _grid(group[str(level)])
            tasks = (
                (("pyramid", level, *i), labels.downscale_shard, (str(partial), level, grid.core(i), "mean"))
                for i in grid
            )
            for _ in run_tasks(workers, tasks):
                files += 1
        fingerprint = summary.fingerprint(header)
        metadata.write(group, header, shapes, summary.windows(group, dtype), fingerprint)
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


class Summary:
    """What is learnt about the pixels while they are written, gathered from all blocks in any order."""

    def __init__(self, channels: int) -> None:
        self.histograms: list[dict[int, int] | None] = [{} for _ in range(channels)]
        self.hashes: dict[tuple[int, ...], str] = {}
        self.bad = [0] * channels

    def add(self, key: tuple[int, ...], part: dict[str, Any]) -> None:
        self.hashes[key] = part["hash"]
        self.bad = [a + b for a, b in zip(self.bad, part["bad"], strict=True)]
        for k, histogram in enumerate(part["histograms"]):
            mine = self.histograms[k]
            if histogram is None or mine is None:
                self.histograms[k] = None
                continue
            for value, number in zip(*histogram, strict=True):
                mine[int(value)] = mine.get(int(value), 0) + int(number)

    def check(self, source: Source, channels: Sequence[str]) -> None:
        """Refuse pixels that are no numbers: they would spread through filters, percentiles and features."""
        for channel, bad in zip(channels, self.bad, strict=True):
            if bad:
                raise ImageError(
                    f"{source.file_of(channel)} holds {bad} pixels that are not finite numbers (NaN or "
                    "infinite); please replace them first."
                )

    def fingerprint(self, header: metadata.Header) -> str:
        parts = [repr(header.channels), *(self.hashes[key] for key in sorted(self.hashes))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def windows(self, group: zarr.Group, dtype: np.dtype) -> list[tuple[float, float, float, float]]:
        """``(min, max, low, high)`` of each channel: extremes and the 0.1 and 99.9 percentiles.

        Exact for integers of at most 16 bits, whose histograms are known; from the smallest level for others.
        """
        smallest: NDArray | None = None
        if dtype.itemsize > 2:
            smallest = np.asarray(store.level_of(group, -1))
        windows = []
        for k, histogram in enumerate(self.histograms):
            if histogram is None or not histogram:
                assert smallest is not None
                values: NDArray = np.sort(smallest[k].ravel())
                counts = np.ones(len(values), np.int64)
            else:
                values = np.array(sorted(histogram))
                counts = np.array([histogram[int(v)] for v in values])
            below = np.cumsum(counts) / counts.sum()
            low, high = np.searchsorted(below, (0.001, 0.999)).clip(max=len(values) - 1)
            windows.append((float(values[0]), float(values[-1]), float(values[low]), float(values[high])))
        return windows


def _convert_shard(source: Source, identity: str, path: str, box: Box) -> dict[str, Any]:
    """Read one block, write it as one file, and describe it."""
    pixels = cached_reader(source, identity).read(0, box)
    array = _array(path, store.stamp(os.path.join(path, "0")))
    store.assert_aligned(box, array)
    array[(slice(None), *box.slices)] = pixels
    return {
        "hash": hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).hexdigest(),
        "bad": [int(c.size - np.isfinite(c).sum()) if c.dtype.kind == "f" else 0 for c in pixels],
        "histograms": [_histogram(channel) for channel in pixels],
    }


def _histogram(channel: NDArray) -> tuple[NDArray, NDArray] | None:
    """Values that occur and how often, for integers of at most 16 bits."""
    if channel.dtype.kind not in "iu" or channel.dtype.itemsize > 2:
        return None
    low = int(np.iinfo(channel.dtype).min)
    counts = np.bincount(channel.ravel().astype(np.int64) - low if low else channel.ravel())
    values = np.flatnonzero(counts)
    return values + low, counts[values]


@lru_cache(maxsize=2)
def cached_reader(source: Source, identity: str) -> Reader:
    """The source, opened once per process, and again when its files changed."""
    return open_safely(source)


@lru_cache(maxsize=4)
def _array(path: str, stamp: tuple[int, ...]) -> zarr.Array:
    return store.writable(path, 0)


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
