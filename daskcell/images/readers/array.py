"""Plain arrays, ``.npy`` files and Zarr arrays, read in parts; for their axes see `images.axes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box, check_inside
from daskcell.images.axes import axes_of_names, choose_axes, dimension_names, note_of, to_cyx
from daskcell.images.readers import ZChoice
from daskcell.images.readers.omezarr import is_array, is_zarr
from daskcell.storage import paths

SUFFIXES = (".npy",)
TAKES_AXES = True


def matches(path: str, head: bytes) -> bool:
    return head.startswith(b"\x93NUMPY") or (not head and is_zarr(path) and is_array(path))


class ArrayReader:
    """An array on disk, or in memory, at one time point.

    Parameters
    ----------
    array : NumPy or Zarr array
    axes : str, optional
        Order of its axes; None: chosen by the shape.
    """

    def __init__(
        self, array: Any, path: str, axes: str | None = None, t: int = 0, z: ZChoice = "max"
    ) -> None:
        self.path = path
        self.name = Path(path).stem
        shape = tuple(array.shape)
        dtype = np.dtype(array.dtype)
        if dtype.kind not in "buif" or (dtype.kind in "iu" and dtype.itemsize > 4):
            raise ImageError(f"Cannot read {path}: values of type {dtype} are not intensities.")
        try:
            self.axes = choose_axes(shape, path, axes)
        except InputError as error:
            raise ImageError(f"Cannot read {path}: {error}") from None
        if 0 in shape:
            raise ImageError(f"Cannot read {path}: an array of shape {shape} is no image.")
        note = note_of(shape, self.axes, path) if axes is None else None
        self.notes = (note,) if note else ()
        self.array = array
        side = dict(zip(self.axes, shape, strict=True))
        self.is_rgb = side.get("S") in (3, 4) and dtype in (np.uint8, np.uint16)
        count = 3 if self.is_rgb else side.get("C", side.get("S", 1))  # without alpha
        self.levels = ((side["Y"], side["X"]),)
        self.channels = tuple(f"channel {i + 1}" for i in range(count)) if count > 1 else ("grey",)
        if self.is_rgb:
            self.channels = ("red", "green", "blue")
        self.pixel_size: tuple[float, float] | None = None
        self.dtype = np.dtype({"?": np.uint8, "e": np.float32}.get(dtype.char, dtype.newbyteorder("=")))
        self.sizes = {"t": side.get("T", 1), "z": side.get("Z", 1)}
        if not 0 <= t < self.sizes["t"]:
            raise InputError(f"{path} has {self.sizes['t']} time points; there is none with number {t}.")
        if z != "max" and not 0 <= z < self.sizes["z"]:
            raise InputError(f"{path} has {self.sizes['z']} planes; there is none with number {z}.")
        self.t, self.planes = t, range(self.sizes["z"]) if z == "max" else range(z, z + 1)
        self.scenes: tuple[str, ...] = ("",)
        self.files = (paths.realpath(path),)
        chunks = getattr(array, "shards", None) or getattr(array, "chunks", None)
        piece = dict(zip(self.axes, chunks or shape, strict=True))
        self.piece = (piece["Y"] if chunks else min(64, side["Y"]), piece["X"])

    def read(self, level: int, box: Box) -> NDArray:
        check_inside(box, self.levels[level], self.path)
        rows, columns = box.slices
        out: NDArray | None = None
        for plane in self.planes:
            pick = {"T": self.t, "Z": plane, "Y": rows, "X": columns, "C": slice(None), "S": slice(None)}
            pixels = np.asarray(self.array[tuple(pick[axis] for axis in self.axes)])
            left = "".join(axis for axis in self.axes if axis not in "TZ")
            pixels = to_cyx(pixels, left, self.path)[: len(self.channels)].astype(self.dtype)
            out = pixels if out is None else np.maximum(out, pixels)
        assert out is not None
        return out

    def close(self) -> None:
        self.array = np.empty((0, 0, 0), self.dtype)


def open(path: str, *, t: int = 0, z: ZChoice = "max", axes: str | None = None) -> ArrayReader:
    if not path.lower().endswith(SUFFIXES) and paths.is_folder(path):
        import zarr

        array = zarr.open_array(paths.store(path), mode="r")
        own = axes_of_names(dimension_names(array), path)
        return ArrayReader(array, path, own or axes, t, z)
    if paths.is_remote(path):
        raise ImageError(
            f"Cannot read {path}: .npy is read from disk only; please copy it, or save it as Zarr."
        )
    return ArrayReader(np.load(path, mmap_mode="r", allow_pickle=False), path, axes, t, z)
