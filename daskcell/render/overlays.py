"""From disk to disk: the label image of clusters, and overlay images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.render.paint import add_legend, as_rgb, cluster_values, colors, paint, stretch_limits, titled
from daskcell.storage.atomic import atomic_path

if TYPE_CHECKING:
    from daskcell.compute import Workers
    from daskcell.preprocess import PreparedImage

LABELS, CLUSTERS = "cells", "clusters"
_STRIP = 1024


def write_cluster_labels(
    zarr_path: str | Path,
    clusters_path: str | Path,
    k: int,
    workers: Workers,
    block: int,
    names: Sequence[str | None] | None = None,
) -> list[int]:
    """Write the label image ``labels/clusters`` (value = cluster + 1), with its colours and pyramid.

    Parameters
    ----------
    zarr_path : path
        OME-Zarr image with the label image ``cells``.
    clusters_path : path
        Table with the column ``cluster``, row i for label i + 1.
    k : int
        Number of clusters of the model; a slide need not have cells of each.
    workers : Workers
    block : int
        Side in pixels of files and tasks.
    names : sequence of str or None, optional
        Of the clusters, for viewers; those named None are shown as another. None: their numbers.

    Returns
    -------
    list of int
        Number of cells of each cluster, as in the properties of the label image.

    Raises
    ------
    InputError
        The table has no column ``cluster``.
    """
    from daskcell import images

    lookup = cluster_lookup(clusters_path)
    counts = np.bincount(lookup[1:], minlength=k + 1)[1:].tolist()
    palette = colors(k)
    titles = titled(names, k)
    images.create_labels(
        zarr_path,
        CLUSTERS,
        block=block,
        dtype=np.uint8 if k < 255 else np.uint16,
        colors={i + 1: palette[i].tolist() for i, _ in titles},
        properties=[{"label-value": i + 1, "name": title, "count": counts[i]} for i, title in titles],
    )
    grid = Grid.regular(images.image_info(zarr_path).shape[1:], block)
    window = workers.part(0.4, len(grid)).window()
    for index in grid:
        window.submit(index, _cluster_labels_task, str(zarr_path), str(clusters_path), k, grid.core(index))
    for _ in window:
        pass
    images.build_label_pyramid(zarr_path, CLUSTERS, workers)
    return counts


def _cluster_labels_task(zarr_path: str, clusters_path: str, k: int, box: Box) -> None:
    from daskcell import images

    values = cluster_lookup(clusters_path)[images.read_labels(zarr_path, LABELS, box)]
    images.write_labels_block(zarr_path, CLUSTERS, box, values.astype(np.uint8 if k < 255 else np.uint16))


def cluster_lookup(clusters_path: str | Path) -> np.ndarray:
    """Cluster + 1 of every label, ``(n + 1,)``, from a table; 0: background, or a cell without a cluster."""
    clusters_path = str(clusters_path)
    return _read_lookup(clusters_path, os.stat(clusters_path).st_mtime_ns)


@lru_cache(maxsize=2)
def _read_lookup(clusters_path: str, _: int) -> np.ndarray:
    import pyarrow.parquet as pq

    try:
        column = pq.read_table(clusters_path, columns=["cluster"])["cluster"]
    except (KeyError, ValueError) as error:
        raise InputError(f"{clusters_path} has no column 'cluster'. Assign clusters first.") from error
    return cluster_values(column.to_numpy())


def write_overlay(
    image: PreparedImage,
    table_path: str | Path,
    clusters_path: str | Path,
    folder: str | Path,
    name: str,
    k: int,
    workers: Workers,
    *,
    formats: Iterable[Literal["tif", "png"]] = ("tif", "png"),
    side: int = 8192,
    names: Sequence[str | None] | None = None,
) -> list[Path]:
    """Write ``<name>.tif`` and ``<name>.png``: cells coloured by cluster over the image they were found in.

    Parameters
    ----------
    image : PreparedImage
        With the label image ``cells``.
    table_path : path
        The slide's cells table, with the column ``area``.
    clusters_path, k, workers, names
        As in `write_cluster_labels`.
    folder : path
        Where to write. Files are written atomically.
    name : str
        Of the files, without suffix.
    formats : iterable of {"tif", "png"}
    side : int
        Longest side in pixels; of a larger image, the first smaller level of its pyramid is drawn.

    Returns
    -------
    list of Path
        The files. The ``.tif`` is tiled and compressed, with the pixel size if it is known; the ``.png`` has
        a legend.

    Raises
    ------
    InputError
        The table has no column ``cluster``.
    """
    formats = list(formats)
    if not formats:
        return []
    window = workers.part(0.5, 1).window()
    files = [Path(folder, f"{name}.{ending}") for ending in formats]
    window.submit("overlay", _overlay_task, image, str(table_path), str(clusters_path), files, k, side, names)
    for _ in window:
        pass
    return files


def _overlay_task(
    image: PreparedImage,
    table_path: str,
    clusters_path: str,
    files: Sequence[Path],
    k: int,
    side: int,
    names: Sequence[str | None] | None,
) -> None:
    from daskcell import images
    from daskcell.features.crops import sample_boxes

    levels = image.levels
    level = next((i for i, shape in enumerate(levels) if max(shape) <= side), len(levels) - 1)
    shape = levels[level]
    lookup, palette = cluster_lookup(clusters_path), colors(k)
    # Sampled from the full image, so that colours are the same at every level.
    boxes, step = sample_boxes(image.shape)
    samples = [image.read(box)[:, ::step, ::step] for box in boxes]
    low, high = stretch_limits(samples, samples[0].dtype)
    outline = 1 if level or _typical_diameter(table_path) < 24 else 2
    rgb = np.empty((*shape, 3), np.uint8)
    for y0 in range(0, shape[0], _STRIP):
        strip = Box(y0, 0, min(y0 + _STRIP, shape[0]), shape[1])
        grown = strip.grow(outline).clip(shape)
        cells = images.read_labels(image.path, LABELS, grown, level)
        painted = paint(as_rgb(image.read(grown, level), low, high), cells, lookup, palette, outline=outline)
        rgb[strip.slices] = painted[strip.within(grown)]
    counts = np.bincount(lookup[1:], minlength=k + 1)[1:]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            if path.suffix == ".png":
                _write_png(temporary, add_legend(rgb, palette, counts, names))
            else:
                size = images.image_info(image.path).pixel_size
                _write_tif(temporary, rgb, None if size is None else tuple(v * 2**level for v in size))


def _typical_diameter(table_path: str) -> float:
    import pyarrow.parquet as pq

    area = pq.read_table(table_path, columns=["area"])["area"].to_numpy()
    area = area[area > 0]
    return float(np.sqrt(np.median(area) * 4 / np.pi)) if len(area) else 0.0


def _write_tif(path: Path, rgb: np.ndarray, pixel_size: Any) -> None:
    import tifffile

    from daskcell.images.derived import mark

    # Pixels per centimetre, (x, y): the unit that every program reads.
    known = pixel_size is not None
    tifffile.imwrite(
        path,
        rgb,
        photometric="rgb",
        tile=(256, 256),
        compression="deflate",
        predictor=True,
        resolution=(1e4 / pixel_size[1], 1e4 / pixel_size[0]) if known else None,
        resolutionunit="CENTIMETER" if known else None,
        software=mark("overlay"),
    )


def _write_png(path: Path, rgb: np.ndarray) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from daskcell.images.derived import mark

    Image.MAX_IMAGE_PIXELS = None
    info = PngInfo()
    info.add_text("Software", mark("overlay"))
    with open(path, "wb") as file:
        Image.fromarray(rgb).save(file, format="png", pnginfo=info)
