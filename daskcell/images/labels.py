"""Label images inside an OME-Zarr: created empty, written block by block, finished with their pyramid.

A label image is listed for viewers (``labels/zarr.json``) only when it is finished, so a half-written one
never looks whole; `read_labels` reads its blocks before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images import metadata, store
from daskcell.images.levels import downscale_block, downscale_levels
from daskcell.images.pyramid import level_shapes
from daskcell.images.shards import write_box
from daskcell.storage.staging import remove_cut_writes, remove_zarr

CHUNK = store.CHUNK


def create_labels(
    path: str | Path,
    name: str,
    *,
    block: int,
    dtype: Any,
    colors: Mapping[int, Sequence[int]] | None = None,
    properties: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """An empty label image ``labels/<name>`` of the OME-Zarr image at `path`, with all its levels.

    Parameters
    ----------
    block
        Side in pixels of the files of every level: the blocks that `write_labels_block` takes.
    dtype
        An integer type; not of 64 bits, which viewers cannot show.
    colors
        Colour ``(r, g, b)`` or ``(r, g, b, a)`` of label values, 0 to 255.
    properties
        One mapping a label value, each with ``label-value``; with `colors`, for the same values.

    A label image of that name that is already there is replaced.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "iu" or dtype.itemsize > 4:
        raise InputError(f"Labels cannot be {dtype}; please use an integer type of at most 32 bits.")
    info = store.image_info(path)
    shapes = level_shapes(info.shape[1:])
    entry: dict[str, Any] = {"source": {"image": "../../"}}
    if colors:
        entry["colors"] = [
            {"label-value": int(value), "rgba": [*(int(v) for v in rgb), 255][:4]}
            for value, rgb in colors.items()
        ]
    if properties:
        entry["properties"] = [dict(p) for p in properties]
    version = store.version_of(store.opened(path).group)
    ome = metadata.multiscales(name, shapes, info.pixel_size, "yx", "nearest") | {"image-label": entry}
    ome = metadata.checked("image_label.ImageLabelAttrs", ome, version)
    labels = Path(path, "labels")
    _list(labels, name, version, listed=False)
    target = labels / name
    if target.exists():
        remove_zarr(target)
    group = store.new_group(target, version)
    chunk = _chunk(block)
    for level, shape in enumerate(shapes):
        files = tuple(min(block, -(-side // chunk) * chunk) for side in shape)
        store.create_level(group, level, shape, files, (chunk, chunk), dtype)
    group.attrs.update(metadata.enveloped(ome, version))


def write_labels_block(path: str | Path, name: str, box: Box, array: NDArray) -> None:
    """Write ``(h, w)`` labels into `box` of level 0, which must be whole files of it.

    Raises
    ------
    InputError
        If the box is not aligned, the array has another shape, or a value does not fit the dtype.
    """
    target = _opened_for_writing(path, name, 0)
    store.assert_aligned(box, target)
    if array.shape != box.shape:
        raise InputError(f"Labels of shape {array.shape} do not fill {box}, which has {box.shape}.")
    if array.dtype != target.dtype:
        if array.dtype.kind not in "iub":
            raise InputError(f"Labels must be integers, not {array.dtype}.")
        limits = np.iinfo(target.dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise InputError(
                f"Label {high if high > limits.max else low} does not fit into {target.dtype} of '{name}'."
            )
        array = array.astype(target.dtype)
    write_box(target, box, array)


def read_labels(path: str | Path, name: str, box: Box, level: int = 0) -> NDArray:
    """Labels ``(h, w)`` of `box`, which must lie inside the level."""
    return _opened_labels(path, name).read(level, box)[0]


def build_label_pyramid(path: str | Path, name: str, workers: Any = None) -> None:
    """Write the smaller levels of a label image (nearest pixel) and list it as finished.

    Each file is written once, by one task, and all levels of a single file by one together;
    `workers` as `compute.Workers`, or None for this process.
    """
    from daskcell.images.conversion import run_tasks

    group = Path(path, "labels", name).absolute()  # workers may run elsewhere
    image = _opened_labels(path, name)
    grids = [store.grid_of(array) for array in image.arrays]
    several = [level for level in range(1, len(grids)) if len(grids[level]) > 1]
    rest = range(len(several) + 1, len(grids))
    for level in several:
        grid = grids[level]
        tasks = (((level, *i), downscale_block, (str(group), level, grid.core(i), "nearest")) for i in grid)
        for _ in run_tasks(workers, tasks):
            pass
    if rest:
        for _ in run_tasks(workers, [(("rest",), downscale_levels, (str(group), rest, "nearest"))]):
            pass
    remove_cut_writes(group)
    _list(Path(path, "labels"), name, store.version_of(image.group), listed=True)


def _chunk(block: int) -> int:
    """The largest divisor of `block` up to `CHUNK`; a block without a good one is a single chunk."""
    chunk = next(block // n for n in range(1, block + 1) if block % n == 0 and block // n <= CHUNK)
    return chunk if chunk >= 64 else block


def _opened_labels(path: str | Path, name: str) -> store.OmeZarr:
    group = Path(path, "labels", name)
    if not group.is_dir():
        raise ImageError(f"{path} holds no labels '{name}'.")
    return store.opened(group)


def _opened_for_writing(path: str | Path, name: str, level: int) -> zarr.Array:
    group = str(Path(path, "labels", name))
    if not Path(group).is_dir():
        raise ImageError(f"{path} holds no labels '{name}'.")
    return _writable(group, level, store.stamp(group))


@lru_cache(maxsize=8)
def _writable(group: str, level: int, stamp: tuple[int, ...]) -> zarr.Array:
    return store.writable(group, level)


def list_labels(path: str | Path, name: str) -> None:
    """Enter a finished label image into the image's list of them, if it is not there."""
    _list(Path(path, "labels"), name, store.version_of(store.opened(path).group), listed=True)


def _list(labels: Path, name: str, version: str, *, listed: bool) -> None:
    """Enter a name into, or take it out of, the list of finished label images."""
    group = zarr.open_group(labels, mode="a", zarr_format=2 if version == "0.4" else 3)
    names = [n for n in store.ome_attributes(group).get("labels", []) if n != name]
    # In order of name: the list is the same whichever was finished last.
    names = sorted([*names, name]) if listed else names
    group.attrs.update(metadata.enveloped({"labels": names}, version))
