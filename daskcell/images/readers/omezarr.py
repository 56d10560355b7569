"""OME-Zarr 0.1 to 0.5: images, and the images inside of plates and of other collections."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images.readers import ZChoice
from daskcell.images.store import OmeZarr, ome_attributes
from daskcell.storage import paths

SUFFIXES: tuple[str, ...] = ()  # folders, found by what is in them


def matches(path: str, head: bytes) -> bool:
    return not head and is_zarr(path) and not is_array(path)


def is_zarr(path: str) -> bool:
    """Whether `path` is a folder that Zarr wrote."""
    if paths.is_remote(path):
        return bool(paths.holding(path, paths.ZARR_NAMES, most=1))
    return any(os.path.isfile(os.path.join(path, name)) for name in paths.ZARR_NAMES)


def is_array(path: str) -> bool:
    """Whether a Zarr folder is a plain array, without the metadata of an image."""
    names = paths.holding(path, paths.ZARR_NAMES)
    if "zarr.json" not in names:
        return ".zarray" in names
    try:
        return bool(json.loads(paths.read(paths.join(path, "zarr.json"))).get("node_type") == "array")
    except (OSError, ValueError, AttributeError):
        return False


def images_within(path: str) -> list[str]:
    """Paths of the images inside a plate, a well, a collection or what bioformats2raw wrote, in their order.

    None for a single image.

    A well that cannot be read stands for its fields, so that it is missed where it is opened.
    """
    group, ome = _metadata(path)
    if isinstance(plate := ome.get("plate"), dict):
        found: list[str] = []
        for well in _paths(plate.get("wells")):
            _, inner = _metadata(paths.join(path, well))
            fields = inner.get("well")
            images = _paths(fields.get("images")) if isinstance(fields, dict) else []
            found += [f"{well}/{image}" for image in images] or [well]
        return found
    if isinstance(fields := ome.get("well"), dict):
        return _paths(fields.get("images"))
    if "multiscales" in ome:
        return []
    if "bioformats2raw.layout" in ome:
        _, listed = _metadata(paths.join(path, "OME"))
        if isinstance(series := listed.get("series"), list) and series:
            return [str(name) for name in series]
        return sorted(_numbered(path, group), key=int)
    return _paths(ome.get("items"))


MOST_SERIES = 10_000


def _numbered(path: str, group: Any) -> set[str]:
    """Series of bioformats2raw that no list names: they are called 0, 1, 2 ..."""
    names = {name for name in paths.children(path) if name.isdigit()}
    if not names and paths.is_remote(path) and group is not None:  # a web server that lists nothing
        for number in range(MOST_SERIES):
            if not is_zarr(paths.join(path, str(number))):
                break
            names.add(str(number))
    return names


def _metadata(path: str) -> tuple[Any, dict[str, Any]]:
    """A group and its OME metadata; nothing where it cannot be read, which is said when it is opened."""
    import zarr

    try:
        group = zarr.open_group(paths.store(path), mode="r", use_consolidated=False)
        return group, ome_attributes(group)
    except Exception:
        return None, {}


def _paths(entries: Any) -> list[str]:
    return [str(entry["path"]) for entry in entries or [] if isinstance(entry, dict) and "path" in entry]


class OmeZarrReader:
    """An OME-Zarr image at one time point."""

    def __init__(self, path: str, t: int = 0, z: ZChoice = "max", scene: int = 0) -> None:
        self.image = OmeZarr(path, scene=scene)
        self.scenes = self.image.scenes
        self.name = self.image.name
        self.axes = self.image.axes.replace("-", "").upper()
        self.levels = self.image.levels
        self.channels = self.image.channels
        self.pixel_size = self.image.pixel_size
        self.dtype = self.image.dtype
        self.is_rgb = self.image.is_rgb
        self.sizes = {axis: self.image.size(axis) for axis in "tz"}
        if not 0 <= t < self.sizes["t"]:
            raise InputError(f"{path} has {self.sizes['t']} time points; there is none with number {t}.")
        if z != "max" and not 0 <= z < self.sizes["z"]:
            raise InputError(f"{path} has {self.sizes['z']} planes; there is none with number {z}.")
        self.t = t
        self.planes = range(self.sizes["z"]) if z == "max" else [z]
        self.piece = self.image.piece
        self.files = (paths.realpath(path),)

    def read(self, level: int, box: Box) -> NDArray:
        pixels: NDArray | None = None
        for plane in self.planes:
            one = self.image.read(level, box, t=self.t, z=plane)
            pixels = one if pixels is None else np.maximum(pixels, one)
        assert pixels is not None
        return pixels

    def close(self) -> None:
        self.image.close()


def open(path: str, *, t: int = 0, z: ZChoice = "max", scene: int = 0) -> OmeZarrReader:
    if not paths.is_folder(path):
        raise ImageError(f"{path} is not an OME-Zarr folder.")
    return OmeZarrReader(path, t, z, scene)
