"""The cell diameter, estimated from a first pass of the network without one.

Cellpose's networks work best on cells of 30 pixels. The first pass finds enough cells at the picture's own
scale to tell how large they are; the second, on the rescaled picture, finds the rest. A small picture is
looked at whole, a slide in windows at fixed places, so the estimate depends neither on blocks nor on workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import numpy as np

from daskcell.geometry import Box
from daskcell.preprocess.signal import bin_values, find_signal
from daskcell.segmentation.cells import check_block
from daskcell.segmentation.image_params import Globals
from daskcell.segmentation.methods import CellposeMethod, Read, tiles_of
from daskcell.segmentation.ownership import Thresholds, own_labels

WHOLE_UP_TO = 2048 * 2048
"""Pixels up to which the first pass sees the whole picture."""
WINDOW, LATTICE, WINDOWS = 768, 6, 9
"""Of a lattice of windows over a larger picture, the first pass sees those with most contrast."""
SMALLEST = 7.5
"""Diameters below this are not followed: the picture would grow more than fourfold along each side."""


def estimate_diameter(method: CellposeMethod, read: Read, shape: tuple[int, int]) -> float | None:
    """Median diameter in pixels of the cells of a first pass; None if there are none.

    Parameters
    ----------
    method : CellposeMethod
        Its own diameter and thresholds are not used.
    read
        Box -> pixels ``(C, h, w)``.
    shape : (Y, X)
        Size of the picture.
    """
    windows = first_pass_windows(method, read, shape)
    return diameter_of(cell_areas(method, read(box), frozen) for box, frozen in windows)


def first_pass_windows(
    method: CellposeMethod, read: Read, shape: tuple[int, int]
) -> list[tuple[Box, Globals]]:
    """The windows that the first pass looks at, and how each is normalised."""
    method = _first_pass(method)
    windows = [(box, read(box)) for box in sample_windows(shape)]
    if len(windows) > WINDOWS:
        # Glass has no cells to measure; of equals the first in reading order.
        contrast = _contrast(method, [part for _, part in windows])
        order = np.argsort(-np.array(contrast), kind="stable")[:WINDOWS]
        windows = [windows[n] for n in order]
    # Every window is an image of its own.
    samples = [method.observe(part, Box(0, 0, *box.shape), box.shape) for box, part in windows]
    return [(box, method.freeze(samples, box.shape)) for box, _ in windows]


def cell_areas(method: CellposeMethod, part: np.ndarray, frozen: Globals) -> list[int]:
    """Areas in pixels of the cells of a window ``(C, h, w)``."""
    method = _first_pass(method)
    shape = (part.shape[1], part.shape[2])
    look = method.look(frozen, partial(_crop, part), {})
    found, _ = own_labels(Box(0, 0, *shape), 0, shape, look, method.thresholds)
    cells = check_block(found, 2 * found.extent, method.thresholds)
    boxes = cells.boxes
    first = np.cumsum([0, *((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))])
    bits = np.unpackbits(cells.bits)
    return [int(bits[a:b].sum()) for a, b in pairwise(first)]


def diameter_of(areas: Iterable[list[int]]) -> float | None:
    """Median diameter in pixels of cells of such areas; None if there are none."""
    found = [area for window in areas for area in window]
    return max(SMALLEST, float(np.sqrt(np.median(found) * 4 / np.pi))) if found else None


def _first_pass(method: CellposeMethod) -> CellposeMethod:
    # The thresholds of the run do not matter here: they can be changed without the network being run again.
    return dataclasses.replace(method, diameter=None, thresholds=Thresholds(), steps=None)


def _contrast(method: CellposeMethod, parts: list[np.ndarray]) -> list[float]:
    """How much each window seems to hold: its deviation; of a nearly empty image, the signal in it.

    There, a hot pixel has more deviation than a cell.
    """
    deviation = [float(np.std(part.astype(np.float32))) for part in parts]
    if method.normalize != "signal":
        return deviation
    counts = [tiles_of(part, Box(0, 0, *part.shape[1:]), part.shape[1:]) for part in parts]
    cores = np.zeros(len(parts))
    for channel, total in enumerate(np.sum(counts, axis=0)):
        signal = find_signal(total, bin_values(parts[0].dtype))
        if signal is not None and signal.is_sparse:
            cores += [signal.count_cell_tiles(part[channel]) for part in counts]
    return list(cores) if cores.any() else deviation


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
