"""From disk to disk: a model from the features of many slides, and its groups written into their tables."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.fit import Kind, fit_blocks, usable
from daskcell.clustering.model import ClusterModel, load_clusters
from daskcell.clustering.rows import BLOCK, FileRows, Rows
from daskcell.clustering.tables import cut_slide, shared_columns
from daskcell.config import ClusterSettings
from daskcell.errors import InputError

if TYPE_CHECKING:
    from daskcell.compute import Workers


def features_info(path: str | Path) -> tuple[int, int, dict[str, Any]]:
    """Cells, features per cell and how they were made, of a slide's features (a Zarr array ``(n, d)``)."""
    import zarr

    try:
        array = zarr.open_array(str(path), mode="r")
    except Exception as error:
        raise InputError(
            f"{path} holds no features ({type(error).__name__}). Run the features again."
        ) from None
    if array.ndim != 2:
        raise InputError(f"{path} must hold features (cells, numbers), but has the shape {array.shape}.")
    info: Any = dict(array.attrs).get("daskcell", {})
    return array.shape[0], array.shape[1], dict(info)


def fit_features(
    feature_paths: Sequence[str | Path],
    settings: ClusterSettings | None = None,
    workers: Workers | None = None,
    scratch: str | Path | None = None,
    table_paths: Sequence[str | Path] | None = None,
) -> ClusterModel:
    """Fit groups to the cells of many slides, streamed.

    Parameters
    ----------
    feature_paths : paths of Zarr arrays ``(n, d)``
        In any order: they are taken by name.
    settings : ClusterSettings
    workers : Workers
        None: this process.
    scratch : path
        Folder, seen by all workers, for the scaled and projected rows; None: beside the features. Emptied
        afterwards.

    table_paths : paths of cells tables, in the order of `feature_paths`
        Needed where `settings.use` names the measurements.

    Raises
    ------
    InputError
        Slides whose features were made differently, or fewer cells than k.
    """
    settings = settings or ClusterSettings()
    if not feature_paths:
        raise InputError("There are no features to cluster: no slide has any yet.")
    if "measurements" in settings.use and table_paths is None:
        raise InputError("cluster.use names the measurements, so the cells tables are needed too.")
    tables: list[str | Path | None] = list(table_paths) if table_paths else [None] * len(feature_paths)
    pairs = list(zip(map(Path, feature_paths), tables, strict=True))
    pairs.sort(key=lambda pair: (pair[0].name, str(pair[0])))
    first = pairs[0][0]
    _, width, info = features_info(first)
    if "encoder" not in settings.use:
        width = 0
    columns = shared_columns([table for _, table in pairs if table]) if "measurements" in settings.use else []
    blocks: list[Rows] = []
    for path, table in pairs:
        n, other_width, other_info = features_info(path)
        if n and width and (other_width, other_info) != (width, info):
            raise InputError(
                f"{path} was not made as {first} was ({other_width} features {other_info}, not {width} "
                f"{info}). Run the features of both again with the same settings."
            )
        blocks += cut_slide(path, table, bool(width), columns)
    kinds = [Kind(width, settings.standardise)] if width else []
    if columns:
        kinds.append(Kind(len(columns), True))  # they have units: the area would drown the rest
        info = info | {"measurements": columns}
    folder = Path(scratch) if scratch is not None else first.parent
    folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".clusters-", dir=folder))
    try:
        return fit_blocks(
            blocks,
            settings.k,
            engine=settings.engine,
            standardise=settings.standardise,
            components=settings.components,
            unit_length=settings.unit_length,
            seed=settings.seed,
            info=info,
            reduce_block=_reduce_to_file,
            reduce_args=(str(folder),),
            workers=workers,
            kinds=kinds,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reduce_to_file(i: int, block: Rows, model: ClusterModel, folder: str) -> tuple[Rows, int]:
    rows = usable(block, model)
    path = os.path.join(folder, f"{i}.npy")
    np.save(path, rows)
    return FileRows(path), len(rows)


def predict_slide(
    features_path: str | Path, table_path: str | Path, model: ClusterModel | str | Path
) -> dict[str, Any]:
    """Write every cell's ``cluster`` (int32, -1: none) and ``distance`` (float32) into a slide's table.

    The table is replaced whole; one that was clustered before gets new values.

    Returns
    -------
    dict
        ``counts`` of each cluster, ``unassigned`` cells, and ``drift``: see `ClusterModel.drift`.

    Raises
    ------
    InputError
        The model is of other features, or table and features have different numbers of cells.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(model, ClusterModel):
        model = load_clusters(model)
    n, width, info = features_info(features_path)
    columns = list(model.info.get("measurements", []))
    with_encoder = len(model.mean_) > len(columns)
    if with_encoder:
        model.check(width + len(columns), info)
    table_path = Path(table_path)
    temporary = table_path.with_name(f".{table_path.name}.{uuid.uuid4().hex[:8]}.tmp")
    clusters, distances = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    try:
        with pq.ParquetFile(table_path) as table:
            if table.metadata.num_rows != n:
                raise InputError(
                    f"{table_path} has {table.metadata.num_rows} cells, but {features_path} has {n}. "
                    "Run the features of this slide again."
                )
            missing = sorted(set(columns) - set(table.schema_arrow.names))
            if missing:
                raise InputError(
                    f"The model goes by the measurements {', '.join(missing[:4])}, which {table_path} "
                    "does not have. Give the channels the names they had in the fit."
                )
            kept = [
                i for i, name in enumerate(table.schema_arrow.names) if name not in {"cluster", "distance"}
            ]
            schema = pa.schema([table.schema_arrow.field(i) for i in kept])
            schema = schema.append(pa.field("cluster", pa.int32())).append(pa.field("distance", pa.float32()))
            for block in cut_slide(features_path, table_path, with_encoder, columns):
                labels, far = model.assign(block.read())
                clusters.append(labels)
                distances.append(far)
            every, far = np.concatenate(clusters), np.concatenate(distances)
            start = 0
            with pq.ParquetWriter(temporary, schema) as writer:
                for batch in table.iter_batches(BLOCK, columns=schema.names[:-2]):
                    some = slice(start, start + len(batch))
                    start += len(batch)
                    filled = [*batch.columns, pa.array(every[some]), pa.array(far[some])]
                    writer.write_table(pa.Table.from_arrays(filled, schema=schema))
        os.replace(temporary, table_path)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "counts": np.bincount(every[every >= 0], minlength=model.k).tolist(),
        "unassigned": int((every < 0).sum()),
        "drift": model.drift(every, far),
    }
