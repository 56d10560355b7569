"""One pass over an image: every block counted, the counts merged; of an array, a slide, a set of images.

A pass (`statistics.Pass`) may count what steps before it made of the pixels; blocks are then read with the
halo of those steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.preprocess.background import Background
from daskcell.preprocess.dask_graph import count_lazily
from daskcell.preprocess.dtypes import all_values
from daskcell.preprocess.plan import Plan
from daskcell.preprocess.prepared import PreparedArray, PreparedImage
from daskcell.preprocess.statistics import ExactCounts, Extremes, Pass, SignalCounts, for_blocks
from daskcell.preprocess.steps import Step

if TYPE_CHECKING:
    from daskcell.compute import Workers

COUNT_BLOCK = 2048

RunPass = Callable[[Pass, tuple[Step, ...]], Any]
"""One pass over the image: merged counts of all blocks after the given steps."""


def run_passes(state: Any, run_pass: Callable[[Pass], Any]) -> Any:
    """Count, merge and finish until a step (or reference) is reached."""
    while hasattr(state, "count"):
        state = state.finish(run_pass(state))
    return state


def as_set(reference: Any) -> list[Any]:
    """References as a list: one image is a set of one."""
    images = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not images:
        raise InputError("Matching histograms needs a reference image, but the set is empty.")
    return images


def count_set(images: Sequence[Any], counting: Pass, steps: tuple[Step, ...]) -> Any:
    """Counts of all images of a set together."""
    total = None
    for image in images:
        placed = tuple(_on(step, image.shape) for step in steps)
        part = count_array(image, counting, placed)
        total = part if total is None else counting.merge(total, part)
    return total


def _on(step: Step, shape: tuple[int, ...]) -> Step:
    """The same step for an image of another shape."""
    return replace(step, shape=(shape[1], shape[2])) if isinstance(step, Background) else step


def count_array(array: Any, counting: Pass, steps: tuple[Step, ...]) -> Any:
    """Counts of an array: numpy in blocks, dask chunk by chunk, so that no pass holds more than blocks."""
    if isinstance(array, np.ndarray):
        plan = Plan((array.shape[1], array.shape[2]), array.shape[0], array.dtype, steps)
        return _count(PreparedArray.of(array, plan), counting, None)
    return count_lazily(array, counting, steps).compute()


def count_slide(
    zarr_path: str | Path, counting: Pass, steps: tuple[Step, ...], workers: Workers | None
) -> Any:
    """Counts of an OME-Zarr image, one task a block; those kept with it save the reading."""
    from daskcell import images

    kept = None if steps else _kept_counts(zarr_path, counting)
    if kept is not None:
        return kept
    info = images.image_info(zarr_path)
    plan = Plan((info.shape[1], info.shape[2]), info.shape[0], info.dtype, steps)
    return _count(PreparedImage(str(zarr_path), plan), counting, workers)


def _count(image: PreparedImage, counting: Pass, workers: Workers | None) -> Any:
    grid, counter = Grid.regular(image.shape, COUNT_BLOCK), for_blocks(counting)
    if workers is None:
        parts = (_count_block(image, grid.core(index), counter) for index in grid)
    else:
        window = workers.part(0.5, len(grid)).window()  # there may be two
        for index in grid:
            window.submit(index, _count_block, image, grid.core(index), counter)
        parts = (part for _, part in window)
    return reduce(counting.merge, parts)


def _count_block(image: PreparedImage, core: Box, counting: Pass) -> Any:
    return counting.count(image.read(core), core)


def _kept_counts(zarr_path: str | Path, counting: Pass) -> Any:
    """The counts kept with the image when it was converted, where they answer the question."""
    from daskcell import images

    if not isinstance(counting, ExactCounts | Extremes | SignalCounts):
        return None
    histograms = images.read_histograms(zarr_path)
    if histograms is None:
        return None
    if isinstance(counting, Extremes):
        ends = [[values[i] for values, _ in histograms] for i in (0, -1)]
        return np.array(ends, counting.dtype)
    first = int(all_values(counting.dtype)[0])
    counts = np.zeros((len(histograms), len(all_values(counting.dtype))), np.int64)
    for row, (values, numbers) in zip(counts, histograms, strict=True):
        row[values - first] = numbers
    return counting.of_pixels(counts) if isinstance(counting, SignalCounts) else counts
