"""From disk to disk: a model from the features of many slides, and tables of the cluster of each cell."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.feature_blocks import BLOCK, Rows
from daskcell.clustering.fit import Kind, fit_blocks, reduce_to_file
from daskcell.clustering.model import ClusterModel, load_clusters
from daskcell.clustering.tables import check_table, cut_slide, shared_columns
from daskcell.config import ClusterSettings
from daskcell.errors import InputError
from daskcell.storage.atomic import replacing

if TYPE_CHECKING:
    from daskcell.compute import Workers


def features_info(path: str | Path) -> tuple[int, int, dict[str, Any]]:
    """Cells, features per cell and how they were made, of a slide's features (a Zarr array ``(n, d)``)."""
    import zarr

    try:
        array = zarr.open_array(Path(path), mode="r")
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
            reduce_block=reduce_to_file,
            folder=str(folder),
            workers=workers,
            kinds=kinds,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def predict_slide(
    features_path: str | Path,
    table_path: str | Path,
    model: ClusterModel | str | Path,
    clusters_path: str | Path,
) -> dict[str, Any]:
    """Write every cell's cluster into a table of its own, a row for each row of the cells table.

    Columns ``cluster`` (int32; -1: none; joined clusters go by the first of them), ``cluster_name`` (text)
    and ``distance`` (float32, to the centre of the cluster of the fit). The table is replaced whole.

    Parameters
    ----------
    features_path : Zarr array ``(n, d)``
    table_path : cells table of n rows
        Its measurements are read where the model goes by them.
    clusters_path : path
        Parquet file to write.

    Returns
    -------
    dict
        ``counts`` of each cluster, ``names`` of those that have one, ``unassigned`` cells, and ``drift``: see
        `ClusterModel.drift`.

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
    check_table(table_path, n, features_path, columns)
    groups, distances = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for block in cut_slide(features_path, table_path, with_encoder, columns):
        labels, far = model.assign(block.read())
        groups.append(labels)
        distances.append(far)
    fitted, far = np.concatenate(groups), np.concatenate(distances)
    shown = model.display_ids(fitted)
    titles = model.naming.titles(model.k)
    values = {
        "cluster": pa.array(shown),
        "cluster_name": pa.DictionaryArray.from_arrays(
            pa.array(shown, mask=shown < 0), pa.array([title or "" for title in titles])
        ).cast(pa.string()),
        "distance": pa.array(far),
    }
    Path(clusters_path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(clusters_path) as temporary:
        pq.write_table(pa.table(values), temporary, row_group_size=BLOCK)
    return {
        "counts": np.bincount(shown[shown >= 0], minlength=model.k).tolist(),
        "names": {str(i): title for i, title in enumerate(titles) if i in model.naming.names and title},
        "unassigned": int((fitted < 0).sum()),
        "drift": model.drift(fitted, far),
    }
