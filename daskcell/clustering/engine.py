"""From disk to disk: fit a model to the features of many slides, and write tables of each cell's cluster."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.feature_blocks import BLOCK, FeatureBlock
from daskcell.clustering.fit import FeatureKind, fit_blocks, reduce_to_file
from daskcell.clustering.model import ClusterModel, load_clusters
from daskcell.clustering.tables import check_table, shared_columns, slide_blocks
from daskcell.config import ClusterSettings
from daskcell.errors import InputError
from daskcell.storage.atomic import replacing

if TYPE_CHECKING:
    from daskcell.compute import Workers


def features_info(path: str | Path) -> tuple[int, int, dict[str, Any]]:
    """Number of cells and features of a slide's Zarr array ``(n, d)``, and how the features were made."""
    import zarr

    try:
        array = zarr.open_array(Path(path), mode="r")
    except Exception as error:
        raise InputError(
            f"{path} holds no features ({type(error).__name__}). Run the features again."
        ) from None
    if array.ndim != 2:
        raise InputError(f"{path} must hold an array (cells, features), but its shape is {array.shape}.")
    info: Any = dict(array.attrs).get("daskcell", {})
    return array.shape[0], array.shape[1], dict(info)


def fit_features(
    feature_paths: Sequence[str | Path],
    settings: ClusterSettings | None = None,
    workers: Workers | None = None,
    scratch: str | Path | None = None,
    table_paths: Sequence[str | Path] | None = None,
) -> ClusterModel:
    """Fit clusters to the cells of many slides, whose features are streamed.

    Parameters
    ----------
    feature_paths : sequence of paths
        Zarr arrays ``(n, d)``, in any order: they are sorted by name.
    settings : ClusterSettings, optional
    workers : Workers, optional
        None: this process.
    scratch : path, optional
        Folder shared by all workers for the scaled and projected rows, which are removed afterwards; None:
        beside the features.
    table_paths : sequence of paths, optional
        Cells tables in the order of `feature_paths`; needed if `settings.use` includes the measurements.

    Returns
    -------
    ClusterModel

    Raises
    ------
    InputError
        The features of some slides were made differently, or there are fewer cells than clusters.
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
    blocks: list[FeatureBlock] = []
    for path, table in pairs:
        n, other_width, other_info = features_info(path)
        if n and width and (other_width, other_info) != (width, info):
            raise InputError(
                f"{path} was made differently from {first} ({other_width} features {other_info}, not {width} "
                f"{info}). Run the features of both again with the same settings."
            )
        blocks += slide_blocks(path, table, bool(width), columns)
    kinds = [FeatureKind(width, settings.standardise)] if width else []
    if columns:
        kinds.append(FeatureKind(len(columns), True))  # in different units: always standardised
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
    """Write the cluster of every cell of a slide, one row for each row of its cells table.

    The columns are ``cluster`` (int32; -1: none; merged clusters have the lowest of their numbers),
    ``cluster_name`` (text) and ``distance`` (float32, to the centre of the fitted cluster). The file is
    replaced atomically.

    Parameters
    ----------
    features_path : path
        Zarr array ``(n, d)``.
    table_path : path
        Cells table of n rows; its measurements are read if the model uses them.
    model : ClusterModel, or path of a saved one
    clusters_path : path
        Parquet file to write.

    Returns
    -------
    dict
        ``counts``: cells of each cluster; ``names`` of those that have one; ``unassigned``: number of cells
        without a cluster; ``drift``: see `ClusterModel.drift`.

    Raises
    ------
    InputError
        The model was fitted on other features, or table and features have different numbers of cells.
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
    clusters, distances = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for block in slide_blocks(features_path, table_path, with_encoder, columns):
        labels, far = model.assign(block.read())
        clusters.append(labels)
        distances.append(far)
    fitted, far = np.concatenate(clusters), np.concatenate(distances)
    ids = model.display_ids(fitted)
    titles = model.naming.titles(model.k)
    values = {
        "cluster": pa.array(ids),
        "cluster_name": pa.DictionaryArray.from_arrays(
            pa.array(ids, mask=ids < 0), pa.array([title or "" for title in titles])
        ).cast(pa.string()),
        "distance": pa.array(far),
    }
    Path(clusters_path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(clusters_path) as temporary:
        pq.write_table(pa.table(values), temporary, row_group_size=BLOCK)
    return {
        "counts": np.bincount(ids[ids >= 0], minlength=model.k).tolist(),
        "names": {str(i): title for i, title in enumerate(titles) if i in model.naming.names and title},
        "unassigned": int((fitted < 0).sum()),
        "drift": model.drift(fitted, far),
    }
