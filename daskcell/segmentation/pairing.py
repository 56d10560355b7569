"""Nuclei and cells under one id: matched by overlap, the same for any blocks.

Which nucleus belongs to which cell is decided by the numbers of pixels that they share over the whole image,
which add up over blocks of any size. What a pixel becomes follows from that table, from the pixel itself and,
where cells are divided or nuclei grown, from a margin of known width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from daskcell.errors import InputError
from daskcell.segmentation.expansion import check_distance, expand_block, margin

Several = Literal["keep", "largest", "split", "drop"]
Unmatched = Literal["keep", "drop"]


def pair(
    nuclei: Any,
    cells: Any,
    *,
    unmatched: Unmatched = "keep",
    several: Several = "keep",
    grow: float = 0,
) -> tuple[Any, Any]:
    """Match nuclei with cells, and give both the same ids.

    A nucleus belongs to the cell that it shares most pixels with; of equals, to the one with the smaller id.

    Parameters
    ----------
    nuclei, cells : (Y, X) array of integers, dask or numpy
        Label images of the same shape; 0 is background.
    unmatched : {"keep", "drop"}
        What happens to cells without a nucleus, and to nuclei that touch no cell. keep: the cell stays
        without a nucleus, the nucleus becomes a cell of its own, grown by `grow`. drop: only pairs stay.
    several : {"keep", "largest", "split", "drop"}
        What happens to a cell with several nuclei. keep: all get the id of the cell. largest: only the
        nucleus with most pixels in the cell stays. split: the cell is divided, each pixel goes to the
        nearest of its nuclei. drop: the cell and its nuclei are left out.
    grow : float
        Pixels by which a nucleus that touches no cell grows to become one, without overlap.

    Returns
    -------
    nuclei, cells : (Y, X) dask arrays of uint32
        Ids 1..N, in the order of the ids of `cells` (the parts of a divided cell in that of their nuclei),
        then those of nuclei that became cells. A nucleus lies in its cell: its pixels in background are
        added to the cell, its pixels in another cell are no longer nucleus.

    Raises
    ------
    InputError
        Not label images, different shapes, ids below 0 or above 2**32 - 1 (when computed), an unknown choice.

    Notes
    -----
    The pixels that nuclei and cells share are counted at once, in one pass over both; the label images are
    lazy. No count, and so no id, depends on the chunks.

    Examples
    --------
    >>> import numpy as np
    >>> import daskcell as dc
    >>> nuclei = np.array([[0, 7, 0, 0, 4, 0]])
    >>> cells = np.array([[3, 3, 3, 9, 0, 0]])
    >>> nucleus, cell = dc.pair(nuclei, cells)
    >>> nucleus.compute()
    array([[0, 1, 0, 0, 3, 0]], dtype=uint32)
    >>> cell.compute()
    array([[1, 1, 1, 2, 3, 0]], dtype=uint32)
    """
    import dask
    import dask.array as da

    from daskcell.images.arrays import as_labels

    for name, value, choices in (("unmatched", unmatched, Unmatched), ("several", several, Several)):
        if value not in get_args(choices):
            raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}.")
    grow = check_distance(grow, "The distance to grow nuclei by")
    nuclei, cells = da.asarray(as_labels(nuclei, "nuclei")), da.asarray(as_labels(cells, "cells"))
    if nuclei.shape != cells.shape:
        raise InputError(f"nuclei {nuclei.shape} and cells {cells.shape} must have the same shape.")
    nuclei = nuclei.rechunk(cells.chunks)
    corners = [np.cumsum((0, *sizes))[:-1].tolist() for sizes in cells.chunks]
    blocks = [
        dask.delayed(count_shared)(n, c, (y, x))
        for y, *row in zip(corners[0], nuclei.to_delayed(), cells.to_delayed(), strict=True)
        for x, n, c in zip(corners[1], *row, strict=True)
    ]
    pairing = match(dask.compute(*blocks), unmatched, several)
    both = da.map_overlap(
        relabel_block,
        nuclei,
        cells,
        pairing=dask.delayed(pairing),
        grow=grow,
        depth=margin(max(pairing.margin, grow if pairing.lone else 0), cells.shape),
        boundary="none",
        dtype=np.uint64,
        meta=np.empty((0, 0), np.uint64),
    )
    return (both >> _SHIFT).astype(np.uint32), both.astype(np.uint32)


_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class Shared:
    """Pixels that nuclei and cells share, in a part of the image."""

    pixels: np.ndarray
    """Rows (nucleus, cell, pixels) of int64; 0 for background, but never both."""
    boxes: np.ndarray
    """Rows (cell, first y, first x, last y, last x) of int64: what the part has of each cell."""


def count_shared(nuclei: np.ndarray, cells: np.ndarray, corner: tuple[int, int]) -> Shared:
    """Count the pixels of a block ``(h, w)`` whose first pixel is at `corner` (y, x) of the image."""
    for name, labels in (("nuclei", nuclei), ("cells", cells)):
        if labels.size and not (labels.min() >= 0 and labels.max() < 1 << 32):
            raise InputError(f"Ids of {name} must be from 0 to {(1 << 32) - 1}. Please renumber them.")
    y, x = np.nonzero((nuclei != 0) | (cells != 0))
    n, c = nuclei[y, x].astype(np.uint64), cells[y, x].astype(np.uint64)
    keys, pixels = np.unique((n << _SHIFT) | c, return_counts=True)
    rows = np.column_stack([keys >> _SHIFT, keys & np.uint64(0xFFFFFFFF), pixels]).astype(np.int64)
    order = np.argsort(c, kind="stable")[np.count_nonzero(c == 0) :]
    ids, first = np.unique(c[order], return_index=True)
    boxes = np.empty((len(ids), 5), np.int64)
    boxes[:, 0] = ids
    if len(ids):
        for axis, at in enumerate((y[order] + corner[0], x[order] + corner[1])):
            boxes[:, 1 + axis] = np.minimum.reduceat(at, first)
            boxes[:, 3 + axis] = np.maximum.reduceat(at, first)
    return Shared(rows, boxes)


@dataclass(frozen=True)
class Pairing:
    """Who belongs to whom over the whole image, and under which id."""

    nuclei: np.ndarray
    """0 for background, then the ids of nuclei, ascending."""
    owner: np.ndarray
    """The cell each belongs to; 0: it touches none."""
    nucleus_ids: np.ndarray
    """Their new ids; 0: left out."""
    cells: np.ndarray
    """0 for background, then the ids of cells, ascending."""
    cell_ids: np.ndarray
    """Their new ids, of a divided cell that of its first part; 0: left out."""
    divided: np.ndarray
    """Pixels of the cells that are divided; 0 for all others."""
    lone: int
    """How many nuclei became cells; they have the last ids."""
    count: int
    """Number of cells in the end."""
    margin: int
    """Pixels around a block that hold all of every divided cell that is partly in it."""


def match(parts: Sequence[Shared], unmatched: Unmatched, several: Several) -> Pairing:
    """From the counts of all blocks to the ids of the whole image; see `pair`."""
    rows = np.concatenate([part.pixels for part in parts] or [np.empty((0, 3), np.int64)])
    pairs, where = np.unique(rows[:, :2], axis=0, return_inverse=True)
    pixels = np.bincount(where.ravel(), rows[:, 2], len(pairs)).astype(np.int64)
    nuclei, cells = (np.unique(pairs[:, side][pairs[:, side] > 0]) for side in (0, 1))

    owner = np.zeros(len(nuclei), np.int64)
    inside = np.zeros(len(nuclei), np.int64)
    touching = np.flatnonzero((pairs > 0).all(axis=1))
    # The best pair of each nucleus comes last, and so stays.
    order = touching[np.lexsort((-pairs[touching, 1], pixels[touching], pairs[touching, 0]))]
    at = np.searchsorted(nuclei, pairs[order, 0])
    owner[at], inside[at] = pairs[order, 1], pixels[order]

    of = np.searchsorted(cells, owner)
    owned = owner > 0
    nuclei_of = np.bincount(of[owned], minlength=len(cells))
    kept = owned.copy()
    parts_of = np.ones(len(cells), np.int64)
    if several == "largest":
        order = np.flatnonzero(owned)
        order = order[np.lexsort((-nuclei[order], inside[order], of[order]))]
        kept[:] = False
        kept[order[np.append(of[order][1:] != of[order][:-1], True)[: len(order)]]] = True
    elif several == "split":
        parts_of = np.maximum(nuclei_of, 1)
    elif several == "drop":
        parts_of[nuclei_of > 1] = 0
    if unmatched == "drop":
        parts_of[nuclei_of == 0] = 0

    cell_ids = np.where(parts_of > 0, np.cumsum(parts_of) - parts_of + 1, 0)
    total = int(parts_of.sum())
    nucleus_ids = np.zeros(len(nuclei), np.int64)
    nucleus_ids[kept] = cell_ids[of[kept]]
    divided = np.zeros(len(cells), np.int64)
    extent = 0
    if several == "split" and (parts_of > 1).any():
        has = pairs[:, 1] > 0
        sizes = np.bincount(np.searchsorted(cells, pairs[has, 1]), pixels[has], len(cells))
        divided[parts_of > 1] = sizes[parts_of > 1]
        order = np.flatnonzero(owned)
        order = order[np.argsort(of[order], kind="stable")]
        rank = np.arange(len(order)) - np.searchsorted(of[order], of[order])
        nucleus_ids[order] += rank
        extent = _extent(parts, cells[parts_of > 1])
    lone = np.flatnonzero(~owned) if unmatched == "keep" else np.empty(0, np.int64)
    nucleus_ids[lone] = total + 1 + np.arange(len(lone))
    total += len(lone)
    if total >= 1 << 32:
        raise InputError(f"{total} cells are more than 32 bits can number.")
    return Pairing(
        nuclei=np.append(0, nuclei),
        owner=np.append(0, owner),
        nucleus_ids=np.append(0, nucleus_ids),
        cells=np.append(0, cells),
        cell_ids=np.append(0, cell_ids),
        divided=np.append(0, divided),
        lone=len(lone),
        count=total,
        margin=extent,
    )


def _extent(parts: Sequence[Shared], chosen: np.ndarray) -> int:
    """The longest side of the boxes around the chosen cells."""
    boxes = np.concatenate([part.boxes[np.isin(part.boxes[:, 0], chosen)] for part in parts])
    boxes = boxes[np.argsort(boxes[:, 0], kind="stable")]
    _, first = np.unique(boxes[:, 0], return_index=True)
    low = np.minimum.reduceat(boxes[:, 1:3], first)
    high = np.maximum.reduceat(boxes[:, 3:5], first)
    return int((high - low).max())


def relabel_block(nuclei: np.ndarray, cells: np.ndarray, pairing: Pairing, grow: float) -> np.ndarray:
    """New ids of a block ``(h, w)``: uint64, the nucleus in the upper half, the cell in the lower."""
    n, c = (np.searchsorted(*x) for x in ((pairing.nuclei, nuclei), (pairing.cells, cells)))
    in_cell = c > 0
    nucleus, cell = pairing.nucleus_ids[n], pairing.cell_ids[c]
    nucleus[in_cell & (pairing.cells[c] != pairing.owner[n])] = 0
    if pairing.divided.any():
        _divide(cell, nucleus, np.where(pairing.divided[c] > 0, c, 0), pairing)
    beyond = ~in_cell & (nucleus > 0)
    cell[beyond] = nucleus[beyond]
    if grow and pairing.lone:
        grown = expand_block(cell, grow)
        taken = (cell == 0) & (grown > pairing.count - pairing.lone)
        cell[taken] = grown[taken]
    return (nucleus.astype(np.uint64) << _SHIFT) | cell.astype(np.uint64)


def _divide(cell: np.ndarray, nucleus: np.ndarray, which: np.ndarray, pairing: Pairing) -> None:
    """Give each pixel of the divided cells that are wholly in the block to the nearest nucleus."""
    from scipy import ndimage

    chosen = np.flatnonzero(pairing.divided)
    boxes = ndimage.find_objects(np.searchsorted(chosen, which) + (which > 0))
    for index, box in zip(chosen, boxes, strict=False):
        if box is None:
            continue
        mine = which[box] == index
        if np.count_nonzero(mine) < pairing.divided[index]:
            continue  # cut at the margin's rim: the block's core has none of it
        seeds = mine & (nucleus[box] > 0)
        nearest = ndimage.distance_transform_edt(~seeds, return_distances=False, return_indices=True)
        cell[box][mine] = nucleus[box][tuple(nearest)][mine]
