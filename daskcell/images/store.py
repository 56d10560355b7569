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

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box, Grid, check_inside
from daskcell.images.codecs import read_fast
from daskcell.images.filename_channels import name_channels
from daskcell.storage import paths

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
    """A colour image of three channels, such as a stained slide; not three stains in three channels."""
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

    For an image stored in `strips` as wide as itself, a row of files is bounded: it is read at once.
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
    """An OME-Zarr image (0.1 to 0.5), opened for reading; small, and kept once per process.

    Metadata that the pixels do not need (names, colours, sizes, smaller levels) may be missing or broken.
    """

    def __init__(self, path: str, scene: int = 0) -> None:
        self.path = path
        try:
            # Consolidated metadata may be older than what they are a copy of.
            self.group = zarr.open_group(paths.store(path), mode="r", use_consolidated=False)
        except Exception as error:
            raise ImageError(f"{path} is not an OME-Zarr image: {type(error).__name__}.") from error
        self.attributes: dict[str, Any] = dict(self.group.attrs)
        ome = ome_attributes(self.group)
        scales = ome.get("multiscales")
        if not isinstance(scales, list) or not scales:
            raise ImageError(
                f"{path} holds no OME-Zarr image: its metadata has no 'multiscales', which OME-Zarr "
                f"{VERSIONS} has."
            )
        self.ome = ome
        self.scenes = tuple(str(s.get("name") or "") if isinstance(s, dict) else "" for s in scales)
        """Names of the images that the group holds; mostly one, without a name."""
        if not 0 <= scene < len(scales):
            raise InputError(f"{path} holds {len(scales)} images; there is none with number {scene}.")
        try:
            self._read_metadata(scales[scene])
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise ImageError(
                f"{path} has broken OME-Zarr metadata: {type(error).__name__} {error}."
            ) from error

    def _read_metadata(self, scale: dict[str, Any]) -> None:
        self.name = str(scale.get("name") or Path(self.path).name.removesuffix(".zarr").removesuffix(".ome"))
        datasets = scale["datasets"]
        first = self._array(str(datasets[0]["path"]))
        self.axes = axis_letters(scale.get("axes"), first.shape, self.path)
        """A letter an axis, in the order of the arrays: of t, c, z, y, x, and ``-`` for one of length 1."""
        self.arrays: list[zarr.Array] = [first]
        y, x = self.axes.index("y"), self.axes.index("x")
        if 0 in first.shape:
            raise ImageError(f"{self.path} has no pixels: its shape is {first.shape}.")
        for dataset in datasets[1:]:
            try:
                array = self._array(str(dataset["path"]))
            except (ImageError, KeyError, TypeError):
                continue  # a smaller copy that is not there: the pixels are
            if is_smaller_copy(array, self.arrays[-1], {y, x}) and _lies_over(
                scale, dataset, first.shape, array.shape, (y, x)
            ):
                self.arrays.append(array)
        self.pixel_size = _pixel_size(scale, (y, x))
        count = first.shape[self.axes.index("c")] if "c" in self.axes else 1
        self.shape = (count, first.shape[y], first.shape[x])
        self.dtype = pixel_dtype(np.dtype(first.dtype), self.path)
        self.levels = tuple((a.shape[y], a.shape[x]) for a in self.arrays)
        """Height and width of every level."""
        files = first.shards or first.chunks
        self.piece = (int(files[y]), int(files[x]))
        """Height and width of a file."""
        self.channels = self._channel_names(count)
        own = self.attributes.get("daskcell")
        if isinstance(own, dict) and "is_rgb" in own:
            self.is_rgb = bool(own["is_rgb"])
        else:
            colours = tuple(c.lower() for c in self.channels)
            self.is_rgb = self.dtype == np.uint8 and colours in (("r", "g", "b"), ("red", "green", "blue"))

    def _array(self, name: str) -> zarr.Array:
        try:
            array = self.group[name]
        except Exception as error:
            if paths.is_remote(self.path) and paths.is_transport_error(error):
                with paths.remote_errors(self.path):
                    raise
            reason = "is not there" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise ImageError(f"{self.path} is incomplete: its array '{name}' {reason}.") from error
        if not isinstance(array, zarr.Array):
            raise ImageError(f"{self.path} is incomplete: its '{name}' is no array.")
        return read_fast(array, self.path)

    def _channel_names(self, count: int) -> tuple[str, ...]:
        try:
            given = [str(c.get("label") or "") for c in self.ome["omero"]["channels"]]
        except (KeyError, TypeError, AttributeError):
            given = []
        return name_channels(given, count)

    def size(self, axis: str) -> int:
        """Length of an axis, 1 where there is none."""
        return self.arrays[0].shape[self.axes.index(axis)] if axis in self.axes else 1

    def read(self, level: int, box: Box, *, t: int = 0, z: int = 0) -> NDArray:
        """Pixels ``(C, h, w)`` of `box`, which must lie inside the level, at one time point and plane."""
        check_inside(box, self.levels[level], f"level {level} of {self.path}")
        rows, columns = box.slices
        chosen: dict[str, Any] = {"t": t, "z": z, "-": 0, "c": slice(None), "y": rows, "x": columns}
        pixels = np.asarray(self.arrays[level][tuple(chosen[axis] for axis in self.axes)])
        left = [axis for axis in self.axes if axis in "cyx"]
        pixels = pixels.transpose([left.index(axis) for axis in "cyx" if axis in left])
        if pixels.dtype.kind in "iu" and self.dtype.kind == "f" and (abs(pixels.astype(float)) > 2**53).any():
            raise ImageError(f"{self.path} holds numbers beyond 2**53, which daskcell cannot keep exactly.")
        pixels = np.ascontiguousarray(pixels, self.dtype)
        return pixels if "c" in left else pixels[None]

    def close(self) -> None:
        """Nothing is held open."""


VERSIONS = "0.1 to 0.5"
"""Of OME-Zarr, that are read."""
_TYPES = {"time": "t", "channel": "c"}


def axis_letters(axes: Any, shape: tuple[int, ...], path: str) -> str:
    """The axes of an image as letters t, c, z, y, x, whatever their order; ``-`` for another of length 1.

    OME-Zarr 0.1 and 0.2 name none: theirs are t, c, z, y, x. 0.3 gives names; from 0.4 on there is a type
    too, and the names are free. An axis of a type of its own, such as an angle, is taken for channels where
    there are none.

    Raises
    ------
    ImageError
        If two axes are one and the same, or one has no meaning here.
    """
    if not axes:
        axes = list("tczyx"[-len(shape) :])
    if len(axes) != len(shape):
        raise ImageError(f"{path} has {len(axes)} axes, but its pixels have the shape {shape}.")
    names = [str(axis.get("name", "") if isinstance(axis, dict) else axis) for axis in axes]
    types = [str(axis.get("type") or "") if isinstance(axis, dict) else "" for axis in axes]
    letters = [
        name.lower() if name.lower() in tuple("tczyx") else _TYPES.get(kind, "")
        for name, kind in zip(names, types, strict=True)
    ]
    # Axes of space with names of their own are planes, rows and columns, in this order.
    space = [i for i, kind in enumerate(types) if kind == "space" and not letters[i]]
    free = [letter for letter in "zyx" if letter not in letters]
    for i, letter in zip(space, free[-len(space) :] if space else (), strict=False):
        letters[i] = letter
    rest = [i for i, letter in enumerate(letters) if not letter]
    if len(rest) == 1 and "c" not in letters:
        letters[rest[0]] = "c"
    for i in rest:
        if not letters[i] and shape[i] == 1:
            letters[i] = "-"
    known = [letter for letter in letters if letter != "-"]
    if "" in letters or len(set(known)) < len(known) or not {"y", "x"} <= set(known):
        raise ImageError(
            f"{path} has axes {', '.join(names)} of shape {shape}; OME-Zarr {VERSIONS} is read with y, x and "
            "at most one each of t, c and z."
        )
    return "".join(letters)


def pixel_dtype(stored: np.dtype, path: str) -> np.dtype:
    """What pixels of a type become in memory: native order of bytes, and a type that all stages take.

    Raises
    ------
    ImageError
        If the values are not intensities.
    """
    if stored.kind not in "buif":
        raise ImageError(f"Cannot read {path}: values of type {stored} are not intensities.")
    native = stored.newbyteorder("=")
    if stored.kind in "iu" and stored.itemsize > 4:
        return np.dtype(np.float64)
    return np.dtype({"?": np.uint8, "e": np.float32}.get(stored.char, native))


def is_smaller_copy(array: zarr.Array, above: zarr.Array, sides: set[int]) -> bool:
    """Whether a level is as the one before, but for the lengths of the axes `sides`, which may be less."""
    pairs = enumerate(zip(above.shape, array.shape, strict=False))
    return (
        array.ndim == above.ndim
        and array.dtype == above.dtype
        and 0 not in array.shape
        and all(short <= long if axis in sides else short == long for axis, (long, short) in pairs)
    )


def _lies_over(
    scale: dict[str, Any],
    dataset: dict[str, Any],
    shape: tuple[int, ...],
    smaller: tuple[int, ...],
    sides: tuple[int, int],
) -> bool:
    """Whether a level covers what the first does: its scale fits its sides, and its shift is within a pixel.

    True where the metadata do not say.
    """
    first, own = _transform(scale["datasets"][0]), _transform(dataset)
    for axis in sides:
        try:
            step = own["scale"][axis] / first["scale"][axis]
            shift = (own["translation"][axis] - first["translation"][axis]) / first["scale"][axis]
        except (KeyError, IndexError, TypeError, ZeroDivisionError):
            continue
        if abs(step * smaller[axis] - shape[axis]) > max(2 * step, 0.02 * shape[axis]) or abs(shift) > step:
            return False
    return True


def _transform(dataset: dict[str, Any]) -> dict[str, list[float]]:
    """Scale and translation of a level, as far as they are given as numbers."""
    found: dict[str, list[float]] = {}
    for step in dataset.get("coordinateTransformations") or []:
        if isinstance(step, dict) and isinstance(values := step.get(str(step.get("type"))), list):
            found[step["type"]] = [float(value) for value in values]
    if "scale" in found:
        found.setdefault("translation", [0.0] * len(found["scale"]))
    return found


def image_info(path: str | Path) -> ImageInfo:
    """Shape, channels, pixel size and levels of an OME-Zarr image; raises `ImageError` if it is none."""
    image = opened(path)
    finished: Any = ()
    labels = paths.join(str(path), "labels")
    if {"zarr.json", ".zgroup"} & paths.children(labels):  # none where the list of labels was damaged
        group = zarr.open_group(paths.store(labels), mode="r")
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
            if paths.is_remote(path):
                return paths.version(paths.join(path, name))
            status = os.stat(os.path.join(path, name))
        except OSError:
            continue
        return status.st_ino, status.st_mtime_ns, status.st_size
    return ()


_POWERS = {
    "kilo": 9,
    "": 6,
    "deci": 5,
    "centi": 4,
    "milli": 3,
    "micro": 0,
    "nano": -3,
    "pico": -6,
    "femto": -9,
}
_UNITS = {f"{prefix}meter": float(f"1e{power}") for prefix, power in _POWERS.items()}
_UNITS |= {"angstrom": 1e-4, "inch": 25400.0, "foot": 304800.0, "yard": 914400.0}
_UNITS |= {"micrometre": 1.0, "micron": 1.0, "um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "nm": 1e-3, "mm": 1e3}
"""Micrometres in a unit, and in the abbreviations that some writers use."""


def _pixel_size(scale: dict[str, Any], sides: tuple[int, int]) -> tuple[float, float] | None:
    """``(y, x)`` in micrometres; None where the metadata do not say, or not in a unit of length."""
    sizes = []
    try:
        own, common = _transform(scale["datasets"][0]), _transform(scale)
        for side in sides:
            axis = scale["axes"][side]
            factor = _UNITS[str(axis.get("unit") or axis.get("units")).lower()]
            sizes.append(own["scale"][side] * common.get("scale", [1.0] * (side + 1))[side] * factor)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    return (sizes[0], sizes[1]) if all(0 < size < np.inf for size in sizes) else None


def ome_attributes(group: zarr.Group) -> dict[str, Any]:
    """The OME metadata of a group, which 0.5 keeps under a name of its own."""
    attributes: dict[str, Any] = dict(group.attrs)
    own = attributes.get("ome")
    return own if isinstance(own, dict) else attributes


def new_group(path: str | Path, version: str = "0.5") -> zarr.Group:
    """An empty group for OME-Zarr of a version, where there must be none yet."""
    return zarr.open_group(paths.store(path), mode="w-", zarr_format=2 if version == "0.4" else 3)


def version_of(group: zarr.Group) -> str:
    """The version of OME-Zarr that a group of this format of Zarr holds: 0.4 or 0.5."""
    return "0.4" if group.metadata.zarr_format == 2 else "0.5"


def grid_of(array: zarr.Array) -> Grid:
    """Blocks of whole files, one for each task; of an array without shards, as large as shards could be."""
    sides = array.shards or [max(SHARD // side, 1) * side for side in array.chunks]
    return Grid(*((*range(0, n, step), n) for n, step in zip(array.shape[-2:], sides[-2:], strict=True)))


def writable(path: str | Path, level: int) -> zarr.Array:
    """One level, opened for writing."""
    return read_fast(zarr.open_array(paths.store(path), path=str(level), mode="r+"), str(path))


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
