"""Finished cells: the checks that need the whole image, the numbers, and painting.

own_labels  -> Candidates    with labels around the owned ones, which later steps look at (`ownership`)
check_block -> Cells         only owned ones, after flow check, holes and size
paint       -> labels of any box
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.segmentation.core import flowcheck
from daskcell.segmentation.core.ownership import Candidates, Thresholds, find_hole
from daskcell.storage.atomic import save_npz

MAX_CELLS = 2**32 - 1


@dataclass
class Cells:
    """Finished cells of one block, in whole-image coordinates.

    `boxes` ``(n, 4)`` int64; `anchors` ``(n, 2)`` int64, first pixel of each; `bits` uint8, each box's mask
    flattened, one after another, eight pixels a byte.
    """

    boxes: np.ndarray
    anchors: np.ndarray
    bits: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def reach(self) -> Box:
        """Box around all cells."""
        if not len(self):
            return Box(0, 0, 0, 0)
        low, high = self.boxes[:, :2].min(axis=0), self.boxes[:, 2:].max(axis=0)
        return Box(int(low[0]), int(low[1]), int(high[0]), int(high[1]))


def save_cells(path: str | Path, cells: Cells) -> None:
    """Write as plain arrays (``.npz``, no pickle)."""
    save_npz(path, **vars(cells))


def load_cells(path: str | Path) -> Cells:
    with np.load(path, allow_pickle=False) as arrays:
        return Cells(**arrays)


def check_block(found: Candidates, steps: int, thresholds: Thresholds) -> Cells:
    """Flow check, holes and smallest size: the last word on a block's own cells.

    Holes are filled in reading order of the anchors and what lies in one belongs to the cell around it, as in
    `cellpose.utils.fill_holes_and_remove_small_masks`.

    Parameters
    ----------
    steps : int
        Steps of the diffusion: twice the largest extent over all blocks.
    """
    wanted = found.owned | found.enclosing
    if found.flows.size and thresholds.flow > 0:
        errors = flowcheck.flow_errors(found.labels, found.flows, found.boxes, wanted, steps)
        wanted = wanted & ~(errors > thresholds.flow)
    counts = np.bincount(found.labels.ravel(), minlength=len(wanted) + 1)[1:]
    wanted &= counts >= thresholds.min_size
    labels = found.labels.copy()
    _fill(labels, found.boxes, wanted)
    counts = np.bincount(labels.ravel(), minlength=len(wanted) + 1)[1:]
    kept = np.flatnonzero(wanted & found.owned & (counts >= max(1, thresholds.min_size)))
    y, x = int(found.box[0]), int(found.box[1])
    boxes = found.boxes[kept].astype(np.int64)
    masks, anchors = [], np.zeros((len(kept), 2), np.int64)
    for n, (index, box) in enumerate(zip(kept, boxes, strict=True)):
        mask = labels[box[0] : box[2], box[1] : box[3]] == index + 1
        masks.append(mask.ravel())
        first = int(mask.argmax())
        anchors[n] = box[0] + first // mask.shape[1] + y, box[1] + first % mask.shape[1] + x
    bits = np.packbits(np.concatenate(masks)) if masks else np.zeros(0, np.uint8)
    return Cells(boxes + np.array([y, x, y, x]), anchors, bits)


def refuse_too_many(shape: tuple[int, int], min_size: int) -> None:
    """Raise `InputError` if an image of `shape` ``(Y, X)`` could hold more cells than labels can number."""
    most = shape[0] * shape[1] // max(1, min_size)
    if most > MAX_CELLS:
        raise InputError(
            f"An image of {shape[0]} x {shape[1]} pixels could hold {most} cells of {min_size} pixels, more "
            "than 32-bit labels can number. "
            f"Please raise min_size to {shape[0] * shape[1] // MAX_CELLS + 1} or more."
        )


def number(anchors: list[np.ndarray]) -> list[np.ndarray]:
    """Ids 1..N in reading order over the whole image.

    Parameters
    ----------
    anchors : list of (n,) int
        For each block, the anchors of its cells as pixel numbers ``y * X + x``.

    Returns
    -------
    list of (n,) uint32, in the same order

    Raises
    ------
    InputError
        If there are more cells than 32 bits can number.
    """
    together = np.concatenate(anchors)
    if len(together) > MAX_CELLS:
        raise InputError(
            f"{len(together)} cells are more than 32-bit labels can number. Please cut the slide."
        )
    ids = np.empty(len(together), np.uint32)
    ids[np.argsort(together, kind="stable")] = np.arange(1, len(together) + 1, dtype=np.uint32)
    return np.split(ids, np.cumsum([len(part) for part in anchors])[:-1])


def paint(parts: list[tuple[Cells, np.ndarray]], box: Box) -> tuple[np.ndarray, int]:
    """Labels of `box` from the cells that reach into it.

    Parameters
    ----------
    parts : list of (Cells, ids (n,))
        Any order; every cell once.

    Returns
    -------
    labels : (h, w) uint32
    conflicts : int
        Pixels claimed by two cells; the later in reading order has them. Zero if every block did its duty.
    """
    labels = np.zeros(box.shape, np.uint32)
    conflicts = 0
    for cells, ids in parts:
        if len(cells):
            conflicts += _paint(
                labels, box.y0, box.x0, cells.boxes, np.unpackbits(cells.bits), ids.astype(np.uint32)
            )
    return labels, conflicts


@njit(cache=True, nogil=True)
def _fill(labels, boxes, wanted):  # pragma: no cover - compiled
    """Remove labels not wanted, then fill holes one label after another."""
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            if labels[y, x] > 0 and not wanted[labels[y, x] - 1]:
                labels[y, x] = 0
    for n in range(len(boxes)):
        if not wanted[n]:
            continue
        box = boxes[n]
        part = labels[box[0] : box[2], box[1] : box[3]]
        hole = find_hole(part, n + 1)
        for y in range(part.shape[0]):
            for x in range(part.shape[1]):
                if hole[y, x]:
                    part[y, x] = n + 1


@njit(cache=True, nogil=True)
def _paint(labels, top, left, boxes, bits, ids):  # pragma: no cover - compiled
    conflicts = 0
    offset = 0
    for n in range(len(boxes)):
        y0, x0, y1, x1 = boxes[n]
        width = x1 - x0
        for y in range(max(y0, top), min(y1, top + labels.shape[0])):
            row = offset + (y - y0) * width
            for x in range(max(x0, left), min(x1, left + labels.shape[1])):
                if bits[row + x - x0]:
                    before = labels[y - top, x - left]
                    conflicts += before > 0
                    labels[y - top, x - left] = max(before, ids[n])
        offset += (y1 - y0) * width
    return conflicts
