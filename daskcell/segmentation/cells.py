"""Cells of one block: which are its own, are they whole, do they pass, where are they painted.

A block labels its core and a halo around it. It owns the cells whose anchor, their first pixel in reading
order, lies in its core; its neighbours see the same cells with the same pixels, so every cell has exactly one
owner and nothing is stitched. What makes that true is checked, not assumed: a cell that could look different
if more were known makes the block ask for a larger halo.

    own_labels  -> Candidates    with the halo's labels, as later steps look at neighbours
    check_block -> Cells         only owned ones, after flow check, holes and size
    paint       -> labels of any box
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numba import njit

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.segmentation import dynamics, flowcheck

MAX_CELLS = 2**32 - 1


@dataclass(frozen=True)
class Thresholds:
    """What turns network outputs into cells; changing these needs no network."""

    cellprob: float = 0.0
    flow: float = 0.4
    min_size: int = 15
    max_size_fraction: float = 0.4


@dataclass
class Candidates:
    """Labels around one block, before the checks that need the whole picture.

    `labels` ``(h, w)`` int32 and `flows` ``(2, h, w)`` float32 cover the box `held` ``(4,)``; `boxes` ``(n,
    4)`` are ``y0, x0, y1, x1`` of each label within it. `owned` and `mates` ``(n,)`` say which labels are the
    block's own and which foreign ones may swallow pixels of those. `flows` is empty when there is no flow
    check to come.
    """

    held: np.ndarray
    labels: np.ndarray
    flows: np.ndarray
    boxes: np.ndarray
    owned: np.ndarray
    mates: np.ndarray

    @property
    def extent(self) -> int:
        """Largest extent of an owned label, for the diffusion's global number of steps."""
        return flowcheck.extent(self.boxes, self.owned)


@dataclass
class Cells:
    """Finished cells of one block, in whole-picture coordinates.

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


def save(path: str | Path, arrays: Candidates | Cells) -> None:
    """Write as plain arrays (``.npz``, no pickle)."""
    np.savez(path, **{field.name: getattr(arrays, field.name) for field in fields(arrays)})


def load_candidates(path: str | Path) -> Candidates:
    with np.load(path, allow_pickle=False) as arrays:
        return Candidates(**arrays)


def load_cells(path: str | Path) -> Cells:
    with np.load(path, allow_pickle=False) as arrays:
        return Cells(**arrays)


def own_labels(
    core: Box,
    halo: int,
    shape: tuple[int, int],
    look: Callable[[Box], tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    thresholds: Thresholds,
) -> tuple[Candidates, int]:
    """Labels that the block `core` owns, looking as far beyond it as that takes.

    Parameters
    ----------
    halo : int
        Pixels around the core to look at first; doubled until every owned cell is certain.
    shape : (Y, X)
        Size of the whole picture.
    look
        Box -> labels ``(h, w)`` int32 in reading order, doubtful pixels ``(h, w)`` bool, flows or None.

    Returns
    -------
    Candidates, and how often the halo was doubled
    """
    for doublings in itertools.count():
        held = core.grow(halo << doublings).clip(shape)
        labels, unsafe, flows = look(held)
        found = choose_owned(labels, unsafe, flows, held, core, shape, thresholds)
        if found is not None:
            return found, doublings
        assert held != Box(0, 0, *shape), "nothing lies outside the whole picture"
    raise AssertionError


def choose_owned(
    labels: np.ndarray,
    unsafe: np.ndarray,
    flows: np.ndarray | None,
    held: Box,
    core: Box,
    shape: tuple[int, int],
    thresholds: Thresholds,
) -> Candidates | None:
    """Choose the owned labels, if nothing beyond `held` can change them; else None.

    `labels` are numbered in reading order; `unsafe` marks pixels whose label depends on what lies outside.
    `flows` None: no flow check is wanted.
    """
    limit = thresholds.max_size_fraction * shape[0] * shape[1]
    counts = np.bincount(labels.ravel())
    # A label above the limit is dropped however much of it lies outside.
    too_large = counts > limit
    too_large[0] = False
    if too_large.any():
        unsafe = unsafe & ~too_large[labels]
        labels = np.where(too_large[labels], 0, labels).astype(np.int32)
        dynamics.renumber(labels)
    inner = core.within(held)
    if (unsafe[inner] & (labels[inner] == 0)).any():
        return None
    boxes, anchors = _locate(labels)
    doubtful, in_core = np.zeros((2, len(boxes) + 1), bool)
    doubtful[labels[unsafe]] = True
    in_core[labels[inner]] = True
    doubtful, in_core = doubtful[1:], in_core[1:]
    if (doubtful & in_core).any():
        return None
    low, high = (core.y0 - held.y0, core.x0 - held.x0), (core.y1 - held.y0, core.x1 - held.x0)
    owned = ((anchors >= low) & (anchors < high)).all(axis=1)
    mates = _outer_cells(labels, boxes, owned)
    wanted = owned | mates
    near = wanted if flows is None else wanted | flowcheck.touching(labels, wanted)
    if doubtful[near].any():
        return None
    if not near.any():
        empty = np.zeros((0, 4), np.int64)
        none = np.zeros(0, bool)
        crop = Box(core.y0, core.x0, core.y0, core.x0)
        return Candidates(
            _array(crop), np.zeros((0, 0), np.int32), np.zeros((2, 0, 0), np.float32), empty, none, none
        )
    low, high = boxes[near, :2].min(axis=0), boxes[near, 2:].max(axis=0)
    crop = Box(int(low[0]), int(low[1]), int(high[0]), int(high[1]))
    keep = np.concatenate([[0], np.cumsum(near) * near]).astype(np.int32)
    return Candidates(
        held=_array(Box(crop.y0 + held.y0, crop.x0 + held.x0, crop.y1 + held.y0, crop.x1 + held.x0)),
        labels=keep[labels[crop.slices]],
        flows=np.zeros((2, 0, 0), np.float32) if flows is None else flows[(slice(None), *crop.slices)],
        boxes=boxes[near] - [crop.y0, crop.x0, crop.y0, crop.x0],
        owned=owned[near],
        mates=mates[near],
    )


def check_block(found: Candidates, steps: int, thresholds: Thresholds) -> Cells:
    """Flow check, holes and smallest size: the last word on a block's own cells.

    Holes are filled in reading order of the anchors and what lies in one belongs to the cell around it, as in
    `cellpose.utils.fill_holes_and_remove_small_masks`.

    Parameters
    ----------
    steps : int
        Steps of the diffusion: twice the largest extent over all blocks.
    """
    wanted = found.owned | found.mates
    if found.flows.size and thresholds.flow > 0:
        errors = flowcheck.flow_errors(found.labels, found.flows, found.boxes, wanted, steps)
        wanted = wanted & ~(errors > thresholds.flow)
    counts = np.bincount(found.labels.ravel(), minlength=len(wanted) + 1)[1:]
    wanted &= counts >= thresholds.min_size
    labels = found.labels.copy()
    _fill(labels, found.boxes, wanted)
    counts = np.bincount(labels.ravel(), minlength=len(wanted) + 1)[1:]
    kept = np.flatnonzero(wanted & found.owned & (counts >= max(1, thresholds.min_size)))
    y, x = int(found.held[0]), int(found.held[1])
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
    """Raise `InputError` if a picture of `shape` ``(Y, X)`` could hold more cells than labels can number."""
    most = shape[0] * shape[1] // max(1, min_size)
    if most > MAX_CELLS:
        raise InputError(
            f"A picture of {shape[0]} x {shape[1]} pixels could hold {most} cells of {min_size} pixels, more "
            "than 32-bit labels can number. "
            f"Please raise min_size to {shape[0] * shape[1] // MAX_CELLS + 1} or more."
        )


def number(places: list[np.ndarray]) -> list[np.ndarray]:
    """Ids 1..N in reading order over the whole picture.

    Parameters
    ----------
    places : list of (n,) int
        For each block, the anchors of its cells as pixel numbers ``y * X + x``.

    Returns
    -------
    list of (n,) uint32, in the same order

    Raises
    ------
    InputError
        If there are more cells than 32 bits can number.
    """
    together = np.concatenate(places)
    if len(together) > MAX_CELLS:
        raise InputError(
            f"{len(together)} cells are more than 32-bit labels can number. Please cut the slide."
        )
    ids = np.empty(len(together), np.uint32)
    ids[np.argsort(together, kind="stable")] = np.arange(1, len(together) + 1, dtype=np.uint32)
    return np.split(ids, np.cumsum([len(part) for part in places])[:-1])


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


def _array(box: Box) -> np.ndarray:
    return np.array([box.y0, box.x0, box.y1, box.x1], np.int64)


@njit(cache=True, nogil=True)
def _locate(labels):  # pragma: no cover - compiled
    count = labels.max() if labels.size else 0
    boxes = np.zeros((count, 4), np.int64)
    anchors = np.full((count, 2), -1, np.int64)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            n = labels[y, x] - 1
            if n < 0:
                continue
            if anchors[n, 0] < 0:
                anchors[n, 0], anchors[n, 1] = y, x
                boxes[n, 0], boxes[n, 1] = y, x
            boxes[n, 1] = min(boxes[n, 1], x)
            boxes[n, 2], boxes[n, 3] = y + 1, max(boxes[n, 3], x + 1)
    return boxes, anchors


def _outer_cells(labels: np.ndarray, boxes: np.ndarray, owned: np.ndarray) -> np.ndarray:
    """Foreign labels with an owned one in a hole of theirs, and those around these in turn."""
    pairs = _holes_with_others(labels, boxes)
    wanted = owned.copy()
    while True:
        outer = pairs[wanted[pairs[:, 1]], 0]
        if wanted[outer].all():
            return wanted & ~owned
        wanted[outer] = True


@njit(cache=True, nogil=True)
def _holes_with_others(labels, boxes):  # pragma: no cover - compiled
    """Pairs (outer, inner) of label indices where a pixel of `inner` lies in a hole of `outer`."""
    pairs = []
    for n in range(len(boxes)):
        box = boxes[n]
        part = labels[box[0] : box[2], box[1] : box[3]]
        hole = _hole(part, n + 1)
        last = 0
        for y in range(part.shape[0]):
            for x in range(part.shape[1]):
                other = part[y, x]
                if hole[y, x] and other > 0 and other != last:
                    pairs.append((n, other - 1))
                    last = other
    out = np.zeros((len(pairs), 2), np.int64)
    for n, (outer, inner) in enumerate(pairs):
        out[n, 0], out[n, 1] = outer, inner
    return out


@njit(cache=True, nogil=True)
def _hole(part, label):  # pragma: no cover - compiled
    """Pixels of a label's box that are not the label and not joined to the box's rim side by side."""
    rows, columns = part.shape
    hole = np.ones((rows, columns), np.bool_)
    stack = np.empty((rows * columns, 2), np.int32)
    top = 0
    for y in range(rows):
        for x in range(columns):
            if part[y, x] == label:
                hole[y, x] = False
            elif y in (0, rows - 1) or x in (0, columns - 1):
                hole[y, x] = False
                stack[top, 0], stack[top, 1] = y, x
                top += 1
    while top > 0:
        top -= 1
        b, a = np.int64(stack[top, 0]), np.int64(stack[top, 1])
        for v, u in ((b - 1, a), (b + 1, a), (b, a - 1), (b, a + 1)):
            if v >= 0 and v < rows and u >= 0 and u < columns and hole[v, u]:
                hole[v, u] = False
                stack[top, 0], stack[top, 1] = v, u
                top += 1
    return hole


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
        hole = _hole(part, n + 1)
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
