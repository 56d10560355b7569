"""OME-Zarr 0.4 and 0.5: images, and plates by their single fields."""

from __future__ import annotations

import json
import os

import numpy as np
from numpy.typing import NDArray

from daskcell import places
from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images.readers import ZChoice
from daskcell.images.store import OmeZarr, ome_attributes

SUFFIXES: tuple[str, ...] = ()  # folders, found by what is in them


def matches(path: str, head: bytes) -> bool:
    return not head and is_zarr(path) and not is_array(path)


def is_zarr(path: str) -> bool:
    """Whether `path` is a folder that Zarr wrote."""
    names = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
    if places.is_remote(path):
        return not places.children(path).isdisjoint(names)
    return os.path.isdir(path) and any(os.path.isfile(os.path.join(path, name)) for name in names)


def is_array(path: str) -> bool:
    """Whether a Zarr folder is a plain array, without the metadata of an image."""
    names = places.children(path)
    if "zarr.json" not in names:
        return ".zarray" in names
    try:
        return bool(json.loads(places.read(places.join(path, "zarr.json"))).get("node_type") == "array")
    except (OSError, ValueError, AttributeError):
        return False


def images_within(path: str) -> list[str]:
    """Paths of the images inside a plate, or inside the output of bioformats2raw; none for a single image."""
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
        ome = ome_attributes(group)
        if "plate" in ome:
            wells = [str(well["path"]) for well in ome["plate"]["wells"]]
            found = []
            for well in wells:
                entry = ome_attributes(zarr.open_group(places.join(path, well), mode="r"))["well"]
                found += [f"{well}/{field['path']}" for field in entry["images"]]
            return found
        if "bioformats2raw.layout" in ome and "multiscales" not in ome:
            return sorted((name for name, _ in group.groups() if name.isdigit()), key=int)
    except Exception:  # broken metadata are reported where the image is opened
        return []
    return []


class OmeZarrReader:
    """An OME-Zarr image at one time point."""

    def __init__(self, path: str, t: int = 0, z: ZChoice = "max") -> None:
        self.image = OmeZarr(path)
        self.name = self.image.name
        self.axes = self.image.axes.upper()
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
        self.image.t = t
        self.planes = range(self.sizes["z"]) if z == "max" else [z]
        first = self.image.arrays[0]
        shape = first.shards or first.chunks
        self.piece = (shape[-2], shape[-1])
        self.files = (places.real(path),)

    def read(self, level: int, box: Box) -> NDArray:
        pixels: NDArray | None = None
        for plane in self.planes:
            self.image.z = plane
            one = self.image.read(level, box)
            pixels = one if pixels is None else np.maximum(pixels, one)
        assert pixels is not None
        return pixels

    def close(self) -> None:
        self.image.close()


def open(path: str, *, t: int = 0, z: ZChoice = "max") -> OmeZarrReader:
    if not places.is_folder(path):
        raise ImageError(f"{path} is not an OME-Zarr folder.")
    return OmeZarrReader(path, t, z)
