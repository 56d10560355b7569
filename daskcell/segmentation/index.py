"""The index of a label image: first pixel, bounding box and area of every label.

Label arithmetic only, but for the two functions that write and read the index as a Parquet file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from daskcell.errors import InputError
from daskcell.storage.atomic import atomic_path

RECORD = np.dtype(
    [
        ("label", np.int64),
        ("anchor_y", np.int64),
        ("anchor_x", np.int64),
        ("y0", np.int64),
        ("x0", np.int64),
        ("y1", np.int64),
        ("x1", np.int64),
        ("area", np.int64),
    ]
)
"""One cell, or its part in one block: anchor, half-open bounding box, area; pixels of the whole image."""


def block_records(labels: np.ndarray, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Records of the labels in one block, in increasing order of label.

    Parameters
    ----------
    labels : (h, w) array of integers
        0 is background.
    origin : (y, x)
        Where the block begins in the whole image.

    Returns
    -------
    (n,) array of `RECORD`
    """
    import fastremap
    from scipy import ndimage

    if labels.ndim != 2:
        raise InputError(f"labels must have the axes (Y, X), but have the shape {labels.shape}.")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels must be whole numbers, but are {labels.dtype}.")
    labels = np.ascontiguousarray(labels.astype(labels.dtype.newbyteorder("="), copy=False))
    values = fastremap.unique(labels)
    if values.size and values[0] < 0:
        raise InputError(f"labels must not be negative, but {values[0]} is among them.")
    if values.size and values[-1] > np.iinfo(np.uint32).max:
        raise InputError(
            f"labels go up to {values[-1]}, but must fit 32 bits. Please number them anew, "
            "as with skimage.segmentation.relabel_sequential(labels)[0]."
        )
    values = values[values > 0]
    records = np.zeros(len(values), RECORD)
    if not len(values):
        return records
    dense, _ = fastremap.renumber(
        labels, in_place=False
    )  # first seen, first numbered: not the order of `values`
    dense = dense.ravel()
    inside = np.flatnonzero(dense)
    first = np.empty(len(values) + 1, np.int64)
    first[dense[inside[::-1]]] = inside[::-1]  # of repeated indices the last wins: here, the first pixel
    boxes = ndimage.find_objects(dense.reshape(labels.shape))
    area = np.bincount(dense, minlength=len(values) + 1)
    y, x = np.divmod(first[1:], labels.shape[1])
    records["label"] = labels.ravel()[first[1:]]
    records["anchor_y"], records["anchor_x"] = y + origin[0], x + origin[1]
    bounds = np.array([(ys.start, xs.start, ys.stop, xs.stop) for ys, xs in boxes])
    for name, column, shift in zip(("y0", "x0", "y1", "x1"), bounds.T, origin * 2, strict=True):
        records[name] = column + shift
    records["area"] = area[1:]
    return records[np.argsort(records["label"])]


def merge_records(parts: Iterable[np.ndarray]) -> np.ndarray:
    """One record per label from the records of its parts, in increasing order of label.

    Associative and commutative, so parts may be merged in any order and any grouping.
    """
    parts = list(parts)
    records = np.concatenate(parts) if parts else np.zeros(0, RECORD)
    if not len(records):
        return records
    # Reading order within a label: the first of its parts holds the anchor.
    records = records[np.lexsort((records["anchor_x"], records["anchor_y"], records["label"]))]
    starts = np.flatnonzero(np.r_[True, records["label"][1:] != records["label"][:-1]])
    merged = records[starts]
    for name in ("y0", "x0"):
        merged[name] = np.minimum.reduceat(records[name], starts)
    for name in ("y1", "x1"):
        merged[name] = np.maximum.reduceat(records[name], starts)
    merged["area"] = np.add.reduceat(records["area"], starts)
    return merged


_COLUMNS = {
    "label": "label",
    "anchor-0": "anchor_y",
    "anchor-1": "anchor_x",
    "bbox-0": "y0",
    "bbox-1": "x0",
    "bbox-2": "y1",
    "bbox-3": "x1",
    "area": "area",
}


def write_index(path: str | Path, records: np.ndarray) -> None:
    """Write `RECORD`s, one a label, as a Parquet file: ``label``, ``anchor-0/1`` (first pixel in reading
    order), ``bbox-0`` to ``bbox-3`` and ``area``, in pixels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        table = pa.table({column: np.ascontiguousarray(records[name]) for column, name in _COLUMNS.items()})
        pq.write_table(table, temporary)


def read_index(path: str | Path) -> np.ndarray:
    """`RECORD`s that `write_index` has written."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    records = np.zeros(table.num_rows, RECORD)
    for column, name in _COLUMNS.items():
        records[name] = table[column].to_numpy()
    return records
