"""The cell diameter, estimated from a first pass of the network without one.

Cellpose's networks work best on cells of 30 pixels. The first pass finds enough cells at the image's own
scale to tell how large they are; the second, on the rescaled image, finds the rest. A small image is
looked at whole, a slide in windows at fixed places, so the estimate depends neither on blocks nor on workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from daskcell.geometry import Box
from daskcell.segmentation.core.cells import check_block
from daskcell.segmentation.core.ownership import own_labels
from daskcell.segmentation.methods.base import BoxLabels, Method, Read, refuse_unusable

WHOLE_UP_TO = 2048 * 2048
"""Pixels up to which the first pass sees the whole image."""
WINDOW, LATTICE, WINDOWS = 768, 6, 9
"""Of a lattice of windows over a larger image, the first pass sees those with most contrast."""
SMALLEST = 7.5
"""Diameters below this are not followed: the image would grow more than fourfold along each side."""


def estimate_diameter(method: Method, read: Read, shape: tuple[int, int]) -> float | None:
    """Median diameter in pixels of the cells of a first pass; None if there are none.

    Parameters
    ----------
    method : Method
        With a network. Its own diameter and thresholds are not used.
    read
        Box -> pixels ``(C, h, w)``.
    shape : (Y, X)
        Size of the image.
    """
    windows = first_pass_windows(method, read, shape)
    return diameter_of(cell_areas(method, read(box), params) for box, params in windows)


def first_pass_windows(method: Method, read: Read, shape: tuple[int, int]) -> list[tuple[Box, Any]]:
    """The windows that the first pass looks at, and how each is normalised."""
    method = method.first_pass()
    windows = [(box, read(box)) for box in sample_windows(shape)]
    for box, part in windows:
        refuse_unusable(part, box)
    if len(windows) > WINDOWS:
        # Glass has no cells to measure; of equals the first in reading order.
        contrast = method.contrast([part for _, part in windows])
        order = np.argsort(-np.array(contrast), kind="stable")[:WINDOWS]
        windows = [windows[n] for n in order]
    # Every window is an image of its own.
    samples = [method.observe(part, Box(0, 0, *box.shape), box.shape) for box, part in windows]
    return [(box, method.fit(method.merge(samples), box.shape)) for box, _ in windows]


def cell_areas(method: Method, part: np.ndarray, params: Any) -> list[int]:
    """Areas in pixels of the cells of a window ``(C, h, w)``."""
    method = method.first_pass()
    shape = (part.shape[1], part.shape[2])
    image = Box(0, 0, *shape)
    grid = method.tile_grid(shape)
    assert grid is not None
    tiles = [*range(len(grid))]
    outputs = dict(zip(tiles, method.run_tiles(partial(_crop, part), params, tiles), strict=True))

    def segment_box(box: Box) -> BoxLabels:
        return method.segment_box(box, partial(_crop, part), params, shape, outputs)

    found, _ = own_labels(image, 0, shape, segment_box, method.thresholds)
    assert found is not None
    cells = check_block(found, 2 * found.extent, method.thresholds)
    boxes = cells.boxes
    first = np.cumsum([0, *((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))])
    bits = np.unpackbits(cells.bits)
    return [int(bits[a:b].sum()) for a, b in pairwise(first)]


def diameter_of(areas: Iterable[list[int]]) -> float | None:
    """Median diameter in pixels of cells of such areas; None if there are none."""
    found = [area for window in areas for area in window]
    return max(SMALLEST, float(np.sqrt(np.median(found) * 4 / np.pi))) if found else None


def _crop(part: np.ndarray, box: Box) -> np.ndarray:
    return part[(slice(None), *box.slices)]


def sample_windows(shape: tuple[int, int]) -> list[Box]:
    """Boxes the first pass may look at, in reading order."""
    if shape[0] * shape[1] <= WHOLE_UP_TO:
        return [Box(0, 0, *shape)]
    sides = [min(WINDOW, side) for side in shape]
    rows, columns = (
        np.unique(np.linspace(0, side - size, LATTICE).astype(int))
        for side, size in zip(shape, sides, strict=True)
    )
    return [Box(int(y), int(x), int(y) + sides[0], int(x) + sides[1]) for y in rows for x in columns]
