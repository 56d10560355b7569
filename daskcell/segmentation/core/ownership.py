"""Which labels around a block are its own, and whether they are certain.

A block labels its core and a halo around it. It owns the cells whose anchor, their first pixel in reading
order, lies in its core; its neighbours see the same cells with the same pixels, so every cell has exactly one
owner and nothing is stitched. What makes that true is checked, not assumed: a cell that could look different
if more were seen makes the block ask for a larger halo.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from daskcell.geometry import Box
from daskcell.segmentation.core import dynamics, flowcheck
from daskcell.storage.atomic import save_npz


@dataclass(frozen=True)
class Thresholds:
    """What turns network outputs into cells; changing these needs no network."""

    cellprob: float = 0.0
    flow: float = 0.4
    min_size: int = 15
    max_size_fraction: float = 0.4


@dataclass
class Candidates:
    """Labels around one block, before the checks that need the whole image.

    Attributes
    ----------
    box : (4,) int64
        ``y0, x0, y1, x1`` of what the arrays cover.
    labels : (h, w) int32
    flows : (2, h, w) float32
        Empty when there is no flow check to come.
    boxes : (n, 4) int64
        ``y0, x0, y1, x1`` of each label, from the corner of `box`.
    owned : (n,) bool
        Labels that are the block's own.
    enclosing : (n,) bool
        Labels of other blocks that have an owned one in a hole, and may swallow its pixels.
    """

    box: np.ndarray
    labels: np.ndarray
    flows: np.ndarray
    boxes: np.ndarray
    owned: np.ndarray
    enclosing: np.ndarray

    @property
    def extent(self) -> int:
        """Largest extent of an owned label, for the diffusion's global number of steps."""
        return flowcheck.extent(self.boxes, self.owned)


def save_candidates(path: str | Path, found: Candidates) -> None:
    """Write as ``.npz`` without pickle, small: labels compressed, and flows of labelled pixels alone.

    These files of all blocks lie on the disk at the same time.
    """
    from numcodecs import zstd

    values = vars(found) | {"shape": np.array(found.labels.shape)}
    values["labels"] = np.frombuffer(zstd.compress(np.ascontiguousarray(found.labels), 1), np.uint8)
    values["flows"] = found.flows[:, found.labels > 0] if found.flows.size else found.flows
    save_npz(path, **values)


def load_candidates(path: str | Path) -> Candidates:
    """What `save_candidates` wrote; flows are zero where no label is, which no check looks at."""
    from numcodecs import zstd

    with np.load(path, allow_pickle=False) as arrays:
        values = dict(arrays)
    shape = values.pop("shape")
    packed = zstd.decompress(values["labels"]) if shape.all() else b""  # it does not unpack nothing
    labels = np.frombuffer(bytearray(packed), np.int32).reshape(shape)
    if values["flows"].size:
        flows = np.zeros((2, *shape), np.float32)
        flows[:, labels > 0] = values["flows"]
        values["flows"] = flows
    return Candidates(**values | {"labels": labels})


def own_labels(
    core: Box,
    halo: int,
    shape: tuple[int, int],
    segment_box: Callable[[Box], tuple[np.ndarray, np.ndarray, np.ndarray | None] | None],
    thresholds: Thresholds,
) -> tuple[Candidates | None, int]:
    """Labels that the block `core` owns, looking as far around it as that takes.

    Parameters
    ----------
    halo : int
        Pixels around the core to look at first; doubled until every owned cell is certain.
    shape : (Y, X)
        Size of the whole image.
    segment_box : callable
        Box -> labels ``(h, w)`` int32 in reading order, unsafe pixels ``(h, w)`` bool, flows or None. None in
        the place of all: what is needed for this box is not there.

    Returns
    -------
    Candidates, or None if `segment_box` gave None
    int
        How often the halo was doubled.
    """
    for doublings in itertools.count():
        grown = core.grow(halo << doublings).clip(shape)
        part = segment_box(grown)
        if part is None:
            return None, doublings
        found = choose_owned(*part, grown, core, shape, thresholds)
        if found is not None:
            return found, doublings
        del part  # or a worker would hold both parts
        assert grown != Box(0, 0, *shape), "nothing lies outside the whole image"
    raise AssertionError


def choose_owned(
    labels: np.ndarray,
    unsafe: np.ndarray,
    flows: np.ndarray | None,
    grown: Box,
    core: Box,
    shape: tuple[int, int],
    thresholds: Thresholds,
) -> Candidates | None:
    """Choose the owned labels, if nothing beyond `grown` can change them; else None.

    `labels` are numbered in reading order; `unsafe` marks pixels whose label depends on what lies outside.
    `flows` None: no flow check is wanted.
    """
    # A label above the limit is dropped however much of it lies outside.
    limit = thresholds.max_size_fraction * shape[0] * shape[1]
    too_large = np.bincount(labels.ravel()) > limit
    too_large[0] = False
    if too_large.any():
        unsafe = unsafe & ~too_large[labels]
        labels = np.where(too_large[labels], 0, labels).astype(np.int32)
        dynamics.renumber(labels)

    # Background in the core that may be a cell: its first pixel could be here, and the cell would be ours.
    inner = core.within(grown)
    if (unsafe[inner] & (labels[inner] == 0)).any():
        return None

    # A label that reaches into the core and may look different: its first pixel may come to lie here, or not.
    boxes, anchors = _locate(labels)
    doubtful, in_core = np.zeros((2, len(boxes) + 1), bool)
    doubtful[labels[unsafe]] = True
    in_core[labels[inner]] = True
    doubtful, in_core = doubtful[1:], in_core[1:]
    if (doubtful & in_core).any():
        return None

    # Owned is what has its first pixel in the core.
    low, high = (core.y0 - grown.y0, core.x0 - grown.x0), (core.y1 - grown.y0, core.x1 - grown.x0)
    owned = ((anchors >= low) & (anchors < high)).all(axis=1)

    # Later steps look at more: holes are filled with what lies in them, and the flow check mixes the heat of
    # labels that touch. All of these must be certain too, and are kept beside the owned ones.
    enclosing = _outer_cells(labels, boxes, owned)
    wanted = owned | enclosing
    kept = wanted if flows is None else wanted | flowcheck.touching(labels, wanted)
    if doubtful[kept].any():
        return None
    if not kept.any():
        empty = np.zeros((0, 4), np.int64)
        none = np.zeros(0, bool)
        crop = Box(core.y0, core.x0, core.y0, core.x0)
        return Candidates(
            _array(crop), np.zeros((0, 0), np.int32), np.zeros((2, 0, 0), np.float32), empty, none, none
        )

    # Everything else is cut away, so that the candidates are as small as their cells.
    low, high = boxes[kept, :2].min(axis=0), boxes[kept, 2:].max(axis=0)
    crop = Box(int(low[0]), int(low[1]), int(high[0]), int(high[1]))
    new = np.concatenate([[0], np.cumsum(kept) * kept]).astype(np.int32)
    return Candidates(
        box=_array(Box(crop.y0 + grown.y0, crop.x0 + grown.x0, crop.y1 + grown.y0, crop.x1 + grown.x0)),
        labels=new[labels[crop.slices]],
        flows=np.zeros((2, 0, 0), np.float32) if flows is None else flows[(slice(None), *crop.slices)],
        boxes=boxes[kept] - [crop.y0, crop.x0, crop.y0, crop.x0],
        owned=owned[kept],
        enclosing=enclosing[kept],
    )


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
        hole = find_hole(part, n + 1)
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
def find_hole(part, label):  # pragma: no cover - compiled
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
