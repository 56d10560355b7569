"""Which cells there are and which block describes each: boxes, areas, anchors, ownership.

Covers label arithmetic only: numpy in, numpy out; knows neither Dask nor files nor pixel values.

A cell's *anchor* is its first pixel in reading order. The block whose core holds the anchor owns the cell
and describes it from a *read*: a box of pixels that holds the cell whole.

    +-----------+-----------+      a and b are owned by the left block: one read, its core grown to
    |  aa       |           |      hold them; d is large, and gets a read of its own, so that a block
    |  aa     b b b         |      never reads more than its core and a margin for the sake of one cell
    |         b b b         |
    |  d d d d d|d d d d d d|
    +-----------+-----------+
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.segmentation.index import RECORD, block_records, merge_records

_ROWS = 1_000_000
"""A table may always have this many rows."""


def refuse_far_labels(records: np.ndarray) -> None:
    """Raise `InputError` for labels such as 5 and 2 200 000 000: row i of a table is label i + 1."""
    last = int(records["label"].max(initial=0))
    if last > max(_ROWS, 100 * len(records)):
        raise InputError(
            f"Labels go up to {last}, but only {len(records)} are there, and row i of a table is label "
            "i + 1. Please number them anew, as with skimage.segmentation.relabel_sequential(labels)[0]."
        )


def owners(records: np.ndarray, grid: Grid) -> np.ndarray:
    """Number of the block, in reading order, that owns each record's anchor."""
    rows = np.searchsorted(np.asarray(grid.rows), records["anchor_y"], side="right") - 1
    columns = np.searchsorted(np.asarray(grid.columns), records["anchor_x"], side="right") - 1
    return rows * grid.counts[1] + columns


@dataclass(frozen=True)
class ReadPlan:
    """Pixels to read, `box`, and the records of the cells to describe from them (in order of label)."""

    box: Box
    records: np.ndarray


def plan_reads(
    records: np.ndarray, grid: Grid, margin: float = 0.0, window: int | None = None
) -> dict[int, list[ReadPlan]]:
    """What every block has to read to describe its own cells; blocks that own none are left out.

    Parameters
    ----------
    records : (n,) array of `RECORD`
        Whole cells.
    grid : Grid
        Blocks of the image.
    margin, window
        As in `crop_box`: the crops are inside the reads too, cut at the image's border.

    Returns
    -------
    dict
        Block number in reading order -> reads. All but a block's very large cells share one.
    """
    plans: dict[int, list[ReadPlan]] = {}
    if not len(records):
        return plans
    block = owners(records, grid)
    order = np.argsort(block, kind="stable")
    numbers, starts = np.unique(block[order], return_index=True)
    crops = crop_boxes(records, margin, window)
    crops = np.concatenate([np.maximum(crops[:, :2], 0), np.minimum(crops[:, 2:], grid.shape)], axis=1)
    for number, members in zip(numbers, np.split(order, starts[1:]), strict=True):
        core = grid.core(divmod(int(number), grid.counts[1]))
        reach = max(64, max(core.shape) // 4)  # pixels a shared read may go beyond the core
        boxes = crops[members]
        limits = (core.y0 - reach, core.x0 - reach, core.y1 + reach, core.x1 + reach)
        large = (boxes[:, :2] < limits[:2]).any(axis=1) | (boxes[:, 2:] > limits[2:]).any(axis=1)
        reads = []
        if not large.all():
            near = boxes[~large]
            box = Box(*near[:, :2].min(axis=0).tolist(), *near[:, 2:].max(axis=0).tolist())
            reads.append(ReadPlan(box, records[members[~large]]))
        reads += [
            ReadPlan(Box(*boxes[i].tolist()), records[members[i : i + 1]]) for i in np.flatnonzero(large)
        ]
        plans[int(number)] = reads
    return plans


def crop_boxes(records: np.ndarray, margin: float, window: int | None = None) -> np.ndarray:
    """Square around every cell: ``(n, 4)`` of y0, x0, y1, x1, which may reach beyond the image.

    The side is the cell's larger side and `margin` times that on both ends, or `window` pixels where that is
    given; a cell that does not fit its window is widened for.
    """
    height, width = records["y1"] - records["y0"], records["x1"] - records["x0"]
    larger = np.maximum(height, width)
    side = larger + 2 * np.round(margin * larger).astype(np.int64)
    if window is not None:
        side = np.maximum(larger, window)
    y0 = (records["y0"] + records["y1"] - side) // 2
    x0 = (records["x0"] + records["x1"] - side) // 2
    return np.stack([y0, x0, y0 + side, x0 + side], axis=1)


__all__ = [
    "RECORD",
    "ReadPlan",
    "block_records",
    "crop_boxes",
    "merge_records",
    "owners",
    "plan_reads",
    "refuse_far_labels",
]
