"""OME-Zarr on disk: creating its arrays, its metadata, and reading parts of it.

The meeting point of all stages. Knows neither microscope files (`readers`) nor labels (`labels`).
An image is a Zarr group with one ``(C, Y, X)`` array a level, ``0`` the largest, sharded: a shard is the unit
of work, written whole and once by one task (zarr has no locks: two tasks in one shard lose data,
zarr-python#3682).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, ZstdCodec

from daskcell import places
from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box, Grid, check_inside
from daskcell.images.channels import name_channels
from daskcell.images.codecs import read_fast

CHUNK = 512
"""Side in pixels of the pieces a viewer reads."""
SHARD = 4096
"""Largest side in pixels of a file."""
HISTOGRAMS = "daskcell/histograms"
"""Where in the group the number of pixels of each value is kept."""
SHARD_BYTES = 256 * 2**20
"""Largest file before compression: with many channels, files have shorter sides."""


@dataclass(frozen=True)
class ImageInfo:
    """What an OME-Zarr image is, without its pixels."""

    shape: tuple[int, int, int]
    """``(C, Y, X)``."""
    dtype: np.dtype
    channels: tuple[str, ...]
    pixel_size: tuple[float, float] | None
    """``(y, x)`` in micrometres."""
    is_rgb: bool
    """A colour picture of three channels, such as a stained slide; not three stains in three channels."""
    levels: tuple[tuple[int, int], ...]
    """Height and width of every level, the largest first."""
    labels: tuple[str, ...] = ()
    """Finished label images."""

    def __repr__(self) -> str:
        c, y, x = self.shape
        return f"<ImageInfo {c} x {y} x {x} {self.dtype}, channels {', '.join(self.channels)}>"


def shard_shape(
    channels: int, shape: tuple[int, int], dtype: Any, *, strips: bool = False
) -> tuple[int, int, int]:
    """Sides of one file ``(C, Y, X)``: as large as the image and `SHARD_BYTES` allow, in whole chunks.

    For a picture stored in `strips` as wide as itself, a row of files is bounded: it is read at once.
    """
    pixel = channels * np.dtype(dtype).itemsize
    y, x = (min(SHARD, -(-length // CHUNK) * CHUNK) for length in shape)
    while max(x, y) > CHUNK and pixel * y * x > SHARD_BYTES:
        y, x = (max(CHUNK, side // 2 // CHUNK * CHUNK) for side in (y, x))
    while strips and y > CHUNK and pixel * y * shape[1] > SHARD_BYTES:
        y = max(CHUNK, y // 2 // CHUNK * CHUNK)
    return channels, y, x


def create_level(
    group: zarr.Group,
    level: int,
    shape: Sequence[int],
    files: Sequence[int],
    chunks: Sequence[int],
    dtype: Any,
) -> zarr.Array:
    """An empty array for one level; axes are ``c, y, x`` or ``y, x``.

    Parameters
    ----------
    files
        Shape of a file of `chunks`; in a group of Zarr 2, which has no shards, every chunk is a file.
    """
    name = str(level)
    common: dict[str, Any] = {"shape": tuple(shape), "chunks": tuple(chunks), "dtype": dtype, "fill_value": 0}
    if group.metadata.zarr_format == 2:
        squeeze = numcodecs.Blosc("zstd", 1, numcodecs.Blosc.BITSHUFFLE)
        separator: Any = {"name": "v2", "separator": "/"}
        return group.create_array(name, compressors=squeeze, chunk_key_encoding=separator, **common)
    axes = ["c", "y", "x"][-len(shape) :]
    squeezed = _codec(np.dtype(dtype), "c" not in axes)
    return group.create_array(name, shards=tuple(files), compressors=squeezed, dimension_names=axes, **common)


def _codec(dtype: np.dtype, labels: bool) -> ZstdCodec | BloscCodec:
    """How pixels are compressed: fast first, and small.

    Noise fills the low bits of wide pixels: with bits sorted, the high ones shrink at once. Pixels of 8 bits
    need an entropy coder; labels are runs of equal numbers, for both.
    """
    if dtype.itemsize == 1 and not labels:
        return ZstdCodec(level=1)
    return BloscCodec(cname="zstd" if labels else "lz4", clevel=1 if labels else 5, shuffle="bitshuffle")


class OmeZarr:
    """An OME-Zarr image (0.4 or 0.5), opened for reading; a small thing that is kept once per process.

    Of a ``t`` or ``z`` axis the first point is read unless another is chosen.
    """

    def __init__(self, path: str, t: int = 0, z: int = 0) -> None:
        self.path = path
        try:
            self.group = zarr.open_group(path, mode="r")
        except Exception as error:
            raise ImageError(f"{path} is not an OME-Zarr image: {type(error).__name__}.") from error
        self.attributes: dict[str, Any] = dict(self.group.attrs)
        ome = ome_attributes(self.group)
        scales = ome.get("multiscales")
        if not scales:
            raise ImageError(f"{path} holds no OME-Zarr image (its metadata has no 'multiscales').")
        self.ome = ome
        try:
            self._read_metadata(scales[0])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ImageError(
                f"{path} has broken OME-Zarr metadata: {type(error).__name__} {error}."
            ) from error
        self.t, self.z = t, z

    def _read_metadata(self, scale: dict[str, Any]) -> None:
        self.name = str(scale.get("name") or Path(self.path).name.removesuffix(".zarr").removesuffix(".ome"))
        self.axes = "".join(a["name"] if isinstance(a, dict) else a for a in scale["axes"])
        if not self.axes.endswith("yx") or set(self.axes) - set("tczyx"):
            raise ImageError(f"{self.path} has axes {self.axes}, of which daskcell reads only t, c, z, y, x.")
        self.arrays: list[zarr.Array] = []
        for dataset in scale["datasets"]:
            array = self.group[dataset["path"]]
            assert isinstance(array, zarr.Array)
            read_fast(array, self.path)
            if array.ndim != len(self.axes) or 0 in array.shape:
                raise ImageError(f"{self.path} has a level of shape {array.shape} with axes {self.axes}.")
            self.arrays.append(array)
        self.pixel_size = _pixel_size(scale, self.axes)
        first = self.arrays[0]
        count = first.shape[self.axes.index("c")] if "c" in self.axes else 1
        self.shape = (count, first.shape[-2], first.shape[-1])
        self.dtype = np.dtype(first.dtype)
        self.levels = tuple((a.shape[-2], a.shape[-1]) for a in self.arrays)
        given = [str(c.get("label") or "") for c in (self.ome.get("omero") or {}).get("channels") or []]
        self.channels = name_channels(given, count)
        own = self.attributes.get("daskcell")
        if isinstance(own, dict) and "is_rgb" in own:
            self.is_rgb = bool(own["is_rgb"])
        else:
            colours = tuple(c.lower() for c in self.channels)
            self.is_rgb = self.dtype == np.uint8 and colours in (("r", "g", "b"), ("red", "green", "blue"))

    def size(self, axis: str) -> int:
        """Length of an axis, 1 where there is none."""
        return self.arrays[0].shape[self.axes.index(axis)] if axis in self.axes else 1

    def read(self, level: int, box: Box) -> NDArray:
        """Pixels ``(C, h, w)`` of `box`, which must lie inside the level."""
        array = self.arrays[level]
        check_inside(box, self.levels[level], f"level {level} of {self.path}")
        chosen: dict[str, Any] = {"t": self.t, "z": self.z, "c": slice(None)}
        index = tuple(chosen[axis] for axis in self.axes[:-2]) + box.slices
        pixels = np.asarray(array[index])
        return pixels if "c" in self.axes else pixels[None]

    def close(self) -> None:
        """Nothing is held open."""


def image_info(path: str | Path) -> ImageInfo:
    """Shape, channels, pixel size and levels of an OME-Zarr image; raises `ImageError` if it is none."""
    image = opened(path)
    finished: Any = ()
    labels = places.join(str(path), "labels")
    if places.is_folder(labels):
        group = zarr.open_group(labels, mode="r")
        finished = ome_attributes(group).get("labels", ())
    return ImageInfo(
        shape=image.shape,
        dtype=image.dtype,
        channels=image.channels,
        pixel_size=image.pixel_size,
        is_rgb=image.is_rgb,
        levels=image.levels,
        labels=tuple(finished),
    )


def read_block(path: str | Path, box: Box, level: int = 0) -> NDArray:
    """Pixels ``(C, h, w)`` of `box` of an OME-Zarr image; the box must lie inside the level."""
    return opened(path).read(level, box)


def write_histograms(group: zarr.Group, counts: NDArray, first: int) -> None:
    """Keep the histograms ``(C, values)`` of level 0 with the image; column 0 counts the value `first`."""
    array = group.create_array(
        HISTOGRAMS, shape=counts.shape, chunks=(1, counts.shape[1]), dtype=counts.dtype, fill_value=0
    )
    array[:] = counts
    array.attrs["first"] = first


def read_histograms(path: str | Path) -> list[tuple[NDArray, NDArray]] | None:
    """Values that occur in each channel and how often, made while converting, for all pixels of level 0.

    None for floats and integers of more than 16 bits, and for images that daskcell did not write.
    """
    group = opened(path).group
    try:
        array = group[HISTOGRAMS]
    except KeyError:
        return None
    assert isinstance(array, zarr.Array)
    table, first = np.asarray(array[:]), int(array.attrs["first"])  # type: ignore[arg-type]
    return [(np.flatnonzero(counts) + first, counts[np.flatnonzero(counts)]) for counts in table]


def opened(path: str | Path) -> OmeZarr:
    """The image at `path`, opened once per process (and again after it was replaced)."""
    path = os.fspath(path)
    return _opened(path, stamp(path))


@lru_cache(maxsize=32)
def _opened(path: str, stamped: tuple[int | str, ...]) -> OmeZarr:
    return OmeZarr(path)


def stamp(path: str) -> tuple[int | str, ...]:
    """Changes when the group or array at `path` is replaced; part of the keys of caches."""
    for name in ("zarr.json", ".zattrs", ".zarray"):
        try:
            if places.is_remote(path):
                return places.version(places.join(path, name))
            status = os.stat(os.path.join(path, name))
        except OSError:
            continue
        return status.st_ino, status.st_mtime_ns, status.st_size
    return ()


_UNITS = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "inch": 25400.0,
}


def _pixel_size(scale: dict[str, Any], axes: str) -> tuple[float, float] | None:
    factors = []
    for axis in scale["axes"][-2:]:
        unit = axis.get("unit") if isinstance(axis, dict) else None
        if unit not in _UNITS:
            return None
        factors.append(_UNITS[unit])
    sizes = [1.0, 1.0]
    for steps in (
        scale["datasets"][0]["coordinateTransformations"],
        scale.get("coordinateTransformations") or [],
    ):
        for step in steps:
            if step["type"] == "scale":
                sizes = [size * float(f) for size, f in zip(sizes, step["scale"][-2:], strict=True)]
    return sizes[0] * factors[0], sizes[1] * factors[1]


def ome_attributes(group: zarr.Group) -> dict[str, Any]:
    """The OME metadata of a group, which 0.5 keeps under a name of its own."""
    attributes: dict[str, Any] = dict(group.attrs)
    return attributes.get("ome", attributes)


def new_group(path: str | Path, version: str = "0.5") -> zarr.Group:
    """An empty group for OME-Zarr of a version, where there must be none yet."""
    return zarr.open_group(str(path), mode="w-", zarr_format=2 if version == "0.4" else 3)


def version_of(group: zarr.Group) -> str:
    """The version of OME-Zarr that a group of this format of Zarr holds: 0.4 or 0.5."""
    return "0.4" if group.metadata.zarr_format == 2 else "0.5"


def grid_of(array: zarr.Array) -> Grid:
    """Blocks of whole files, one for each task; of an array without shards, as large as shards could be."""
    sides = array.shards or [max(SHARD // side, 1) * side for side in array.chunks]
    return Grid(*((*range(0, n, step), n) for n, step in zip(array.shape[-2:], sides[-2:], strict=True)))


def writable(path: str | Path, level: int) -> zarr.Array:
    """One level, opened for writing."""
    return read_fast(zarr.open_array(str(path), path=str(level), mode="r+"), str(path))


def level_of(group: zarr.Group, level: int) -> zarr.Array:
    """One level of an image that is being written; -1 is the smallest."""
    names = sorted(group.array_keys(), key=int)
    array = group[names[level]]
    assert isinstance(array, zarr.Array)
    return array


def assert_aligned(box: Box, array: zarr.Array) -> None:
    """Raise `InputError` unless `box` begins and ends at borders of files of `array` (or the image's)."""
    shape, shard = array.shape[-2:], (array.shards or array.chunks)[-2:]
    for low, high, length, step in zip((box.y0, box.x0), (box.y1, box.x1), shape, shard, strict=True):
        if not 0 <= low < high <= length or low % step or (high % step and high != length):
            raise InputError(
                f"{box} does not fit the files of {shard[0]} x {shard[1]} pixels of an image of "
                f"{shape[0]} x {shape[1]}: two tasks would write one file, and one would be lost."
            )


__all__ = ["ImageInfo", "image_info", "read_block"]
