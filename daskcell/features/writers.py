"""Rows that many tasks left in many files, put in order: a slide's cells table and its features.

Knows neither pixels nor networks. What is written appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daskcell.features.embedders import Task
from daskcell.features.measurements import to_table
from daskcell.storage.atomic import atomic_path, save_arrays

CHUNK = 8192
"""Cells in a chunk of the features and in a row group of the table."""
SHARD = 8 * CHUNK


def locate(records: np.ndarray, tasks: list[Task], n: int, folder: Path) -> str:
    """File of where each label's row is: ``(n, 2)`` of task and row in its file; -1 where there is none."""
    where = np.full((n, 2), -1, np.int64)
    for task in tasks:
        ids = np.concatenate([read.records["label"] for read in task.reads])
        where[ids - 1, 0] = task.number
        where[ids - 1, 1] = np.arange(len(ids))
    path = str(folder / "where.npy")
    save_arrays(path, where)
    return path


def _gathered(files: Sequence[str], where: np.ndarray, width: int, dtype: Any) -> np.ndarray:
    """Rows for a stretch of labels from all the files that hold some; NaN where there is none."""
    out = np.full((len(where), width), np.nan, dtype)
    for number in np.unique(where[:, 0]):
        if number >= 0:
            some = where[:, 0] == number
            out[some] = np.load(files[number], mmap_mode="r")[where[some, 1]]
    return out


def write_table(
    target: str,
    parts: list[tuple[str, str]],
    where_path: str,
    n: int,
    columns: list[str],
    pixel_size: tuple[float, float] | None,
) -> None:
    """The cells table, a row group for every `CHUNK` labels, from the files of measurements."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = np.load(where_path, mmap_mode="r")
    files = [measured for measured, _ in parts]
    empty = to_table(np.zeros(0, int), np.zeros((0, len(columns))), columns, pixel_size, microns=True)
    schema = pa.Schema.from_pandas(empty, preserve_index=False)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, n, CHUNK):
            some = np.asarray(where[start : start + CHUNK])
            there = np.flatnonzero(some[:, 0] >= 0)
            values = _gathered(files, some[there], len(columns), np.float64)
            table = to_table(
                start + 1 + there,
                values,
                columns,
                pixel_size,
                n=len(some),
                first=start + 1,
                microns=True,
            )
            writer.write_table(pa.Table.from_pandas(table, schema, preserve_index=False))


def write_features(
    target: str,
    parts: list[tuple[str, str]],
    where_path: str,
    n: int,
    width: int,
    made_of: dict[str, Any],
) -> None:
    """The Zarr array of the features, from the files of vectors; `made_of` goes into its attributes."""
    import zarr

    where = np.load(where_path, mmap_mode="r")
    files = [vectors for _, vectors in parts]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        array = zarr.create_array(
            temporary,
            shape=(n, width),
            chunks=(CHUNK, width),
            shards=(SHARD, width) if n > CHUNK else None,
            dtype=np.float32,
            fill_value=float("nan"),
            dimension_names=["cell", "feature"],
            attributes={"daskcell": made_of},
        )
        for start in range(0, n, SHARD):
            array[start : start + SHARD] = _gathered(
                files, np.asarray(where[start : start + SHARD]), width, np.float32
            )
