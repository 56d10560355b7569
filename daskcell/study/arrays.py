"""The arrays of a study as lazy Dask arrays; a task reads one block from disk when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.geometry import Box

if TYPE_CHECKING:
    import dask.array as da

_SIDE = 2048
_ROWS = 65536


def lazy_image(path: Path, level: int) -> da.Array:
    """Pixels ``(C, Y, X)`` of a level of an OME-Zarr image."""
    from daskcell.images import image_info

    info = image_info(path)
    return _blocks(_image_block, path, (level,), (info.shape[0], *info.levels[level]), info.dtype)


def lazy_labels(path: Path, level: int) -> da.Array:
    """Labels ``(Y, X)`` of a level of a label image, in the dtype it is stored in."""
    from daskcell.images import image_info

    info = image_info(path)
    return _blocks(_labels_block, path, (level,), info.levels[level], info.dtype)


def lazy_rows(path: Path) -> da.Array:
    """Rows ``(n, d)`` of a Zarr array."""
    import zarr

    array = zarr.open_array(path, mode="r")
    return _blocks(_rows_block, path, (), array.shape, array.dtype, (_ROWS, array.shape[1]))


def _blocks(
    read: Any, path: Path, args: tuple[Any, ...], shape: tuple[int, ...], dtype: Any, chunks: Any = None
) -> da.Array:
    import dask.array as da
    from dask.base import tokenize

    from daskcell.images.store import stamp

    path = path.absolute()  # workers may run elsewhere
    chunks = (*shape[:-2], _SIDE, _SIDE) if chunks is None else chunks
    chunks = da.core.normalize_chunks(
        tuple(min(size, side) for size, side in zip(chunks, shape, strict=True)), shape=shape, dtype=dtype
    )
    name = f"study-{tokenize(str(path), stamp(str(path)), args, chunks)}"
    return da.map_blocks(
        read,
        str(path),
        *args,
        chunks=chunks,
        dtype=dtype,
        meta=np.empty((0,) * len(shape), dtype),
        name=name,
    )


def _image_block(path: str, level: int, block_info: Any = None) -> np.ndarray:
    from daskcell.images import read_block

    return read_block(path, _box(block_info), level)


def _labels_block(path: str, level: int, block_info: Any = None) -> np.ndarray:
    from daskcell.images import read_block

    return read_block(path, _box(block_info), level)[0]


def _rows_block(path: str, block_info: Any = None) -> np.ndarray:
    import zarr

    start, stop = block_info[None]["array-location"][0]
    return np.asarray(zarr.open_array(path, mode="r")[start:stop])


def _box(block_info: Any) -> Box:
    (y0, y1), (x0, x1) = block_info[None]["array-location"][-2:]
    return Box(y0, x0, y1, x1)
