"""Features of a slide: vectors of the encoder, measurements of the cells table, or both side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from daskcell.clustering import feature_blocks
from daskcell.clustering.feature_blocks import FeatureBlock, ZarrBlock
from daskcell.errors import InputError

_NOT_FEATURES = ("label", "centroid", "bbox", "orientation", "touches_edge", "cluster", "distance")
"""The last two were in the cells table in studies of format 1."""


@dataclass(frozen=True)
class SlideBlock:
    """Rows with vectors and measurements, or measurements alone."""

    vectors: ZarrBlock | None
    table: str
    columns: tuple[str, ...]
    start: int
    stop: int

    def read(self) -> np.ndarray:
        measured = read_columns(self.table, self.columns, self.start, self.stop)
        return measured if self.vectors is None else np.concatenate([self.vectors.read(), measured], axis=1)


def slide_blocks(
    features_path: str | Path, table_path: str | Path | None, with_encoder: bool, columns: Sequence[str]
) -> list[FeatureBlock]:
    """Blocks of one slide's rows."""
    vectors: list[ZarrBlock] = feature_blocks.zarr_blocks(features_path)
    if not columns:
        return list(vectors)
    return [
        SlideBlock(block if with_encoder else None, str(table_path), tuple(columns), block.start, block.stop)
        for block in vectors
    ]


def shared_columns(table_paths: Sequence[str | Path]) -> list[str]:
    """Columns that describe a cell, in pixels, as opposed to its position.

    Raises
    ------
    InputError
        Tables with different columns, or without measurements.
    """
    import pyarrow.parquet as pq

    found: list[str] | None = None
    for path in table_paths:
        names = [
            name
            for name in pq.read_schema(path).names
            if not name.startswith(_NOT_FEATURES) and not name.endswith(("_um", "_um2"))
        ]
        if found is not None and names != found:
            differing = sorted(set(names) ^ set(found))
            raise InputError(
                f"{path} and {table_paths[0]} do not have the same measurements "
                f"({', '.join(differing[:4])}). "
                "Give the channels the same names, or cluster by the encoder alone."
            )
        found = names
    if not found or found == ["area"]:
        raise InputError("The cells tables have no measurements. Switch features.measurements on.")
    return found


def read_columns(path: str, columns: Sequence[str], start: int, stop: int) -> np.ndarray:
    """Rows ``start`` to ``stop`` of some columns as ``(m, columns)`` float32; reads only their row groups."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
        ends = np.cumsum([0, *sizes])
        row_groups = [i for i in range(len(sizes)) if ends[i] < stop and ends[i + 1] > start]
        if not row_groups:
            return np.zeros((0, len(columns)), np.float32)
        values = table.read_row_groups(row_groups, columns=list(columns))
        values = values.slice(start - ends[row_groups[0]], stop - start)
        # By name: Parquet returns columns in the order of the file.
        return np.stack([values[name].to_numpy() for name in columns], axis=1).astype(np.float32)


def check_table(table_path: str | Path, n: int, features_path: str | Path, columns: Sequence[str]) -> None:
    """Raise `InputError` unless a cells table has `n` rows and the measurements `columns`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(table_path) as table:
        rows, names = table.metadata.num_rows, set(table.schema_arrow.names)
    if rows != n:
        raise InputError(
            f"{table_path} has {rows} cells, but {features_path} has {n}. "
            "Run the features of this slide again."
        )
    missing = sorted(set(columns) - names)
    if missing:
        raise InputError(
            f"The model uses the measurements {', '.join(missing[:4])}, which {table_path} "
            "does not have. Give the channels the names they had in the fit."
        )
