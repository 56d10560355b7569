"""Plain arrays: ``.npy`` files and Zarr arrays of shape ``(Y, X)`` or ``(C, Y, X)``, read in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcell import places
from daskcell.errors import ImageError
from daskcell.geometry import Box, check_inside
from daskcell.images.readers import ZChoice
from daskcell.images.readers.omezarr import is_array, is_zarr

SUFFIXES = (".npy",)


def matches(path: str, head: bytes) -> bool:
    return head.startswith(b"\x93NUMPY") or (not head and is_zarr(path) and is_array(path))


class ArrayReader:
    """An array on disk; there is nothing to say what its channels are."""

    def __init__(self, array: Any, path: str) -> None:
        if array.ndim not in (2, 3) or 0 in array.shape:
            raise ImageError(
                f"Cannot read {path}: an array of shape {array.shape} is no picture of (Y, X) or (C, Y, X)."
            )
        dtype = np.dtype(array.dtype)
        if dtype.kind not in "buif" or (dtype.kind in "iu" and dtype.itemsize > 4):
            raise ImageError(f"Cannot read {path}: values of type {dtype} are not intensities.")
        self.array = array
        self.path = path
        self.name = Path(path).stem
        self.axes = "CYX"[3 - array.ndim :]
        count = array.shape[0] if array.ndim == 3 else 1
        self.levels = ((array.shape[-2], array.shape[-1]),)
        self.channels = tuple(f"channel {i + 1}" for i in range(count)) if count > 1 else ("grey",)
        self.pixel_size: tuple[float, float] | None = None
        self.dtype = np.dtype({"?": np.uint8, "e": np.float32}.get(dtype.char, dtype.newbyteorder("=")))
        self.is_rgb = False
        self.sizes = {"t": 1, "z": 1}
        self.scenes = ("",)
        self.files = (places.real(path),)
        chunks = getattr(array, "shards", None) or getattr(array, "chunks", None)
        self.piece = (chunks[-2], chunks[-1]) if chunks else (min(64, array.shape[-2]), array.shape[-1])

    def read(self, level: int, box: Box) -> NDArray:
        check_inside(box, self.levels[level], self.path)
        pixels = np.asarray(self.array[(..., *box.slices)]).astype(self.dtype)
        return pixels if pixels.ndim == 3 else pixels[None]

    def close(self) -> None:
        self.array = np.empty((0, 0, 0), self.dtype)


def open(path: str, *, t: int = 0, z: ZChoice = "max") -> ArrayReader:
    if not path.lower().endswith(SUFFIXES) and places.is_folder(path):
        import zarr

        return ArrayReader(zarr.open_array(path, mode="r"), path)
    if places.is_remote(path):
        raise ImageError(
            f"Cannot read {path}: .npy is read from disk only; please copy it, or save it as Zarr."
        )
    return ArrayReader(np.load(path, mmap_mode="r", allow_pickle=False), path)
