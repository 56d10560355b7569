"""CZI, ND2, LIF and what else bioio has a plugin for (extra ``bioio``): the scenes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box, check_inside
from daskcell.images.filename_channels import name_channels
from daskcell.images.readers import ZChoice
from daskcell.storage import paths


class BioioReader:
    """An image of axes T, C, Z, Y, X, and S for the samples of a colour image."""

    def __init__(self, path: str, t: int = 0, z: ZChoice = "max", scene: int = 0) -> None:
        from bioio import BioImage

        self.image: Any = BioImage(path)
        self.scenes = tuple(str(name) for name in self.image.scenes)
        stored, of_one_size = _scenes_of_czi(path)
        if stored > len(self.scenes):
            self._number_scenes(path, stored, of_one_size)
        if not 0 <= scene < len(self.scenes):
            raise InputError(f"{path} holds {len(self.scenes)} images; there is none with number {scene}.")
        self.image.set_scene(scene)
        self.path, self.name = path, Path(path).stem
        dims = self.image.dims
        self.axes = str(dims.order)
        self.sizes = {"t": int(dims.T), "z": int(dims.Z)}
        if not 0 <= t < self.sizes["t"]:
            raise InputError(f"{path} has {self.sizes['t']} time points; there is none with number {t}.")
        if z != "max" and not 0 <= z < self.sizes["z"]:
            raise InputError(f"{path} has {self.sizes['z']} planes; there is none with number {z}.")
        self.t, self.z = t, z
        samples = int(dims.S) if "S" in self.axes else 1
        if samples not in (1, 3) or (samples == 3 and dims.C > 1):
            raise ImageError(f"Cannot read {path}: {dims.C} channels of {samples} samples are not supported.")
        self.is_rgb = samples == 3
        self.dtype = np.dtype(self.image.dtype).newbyteorder("=")
        given = [str(name) for name in self.image.channel_names or ()]
        names = name_channels(given, dims.C) if any(given) or dims.C > 1 else ("grey",)
        self.channels = ("red", "green", "blue") if self.is_rgb else names
        self.levels = self._levels()
        sizes = self.image.physical_pixel_sizes
        self.pixel_size = (float(sizes.Y), float(sizes.X)) if sizes.Y and sizes.X else None
        self.files = (paths.realpath(path),)
        chunks = self.image.dask_data.chunksize
        self.piece = (int(chunks[self.axes.index("Y")]), int(chunks[self.axes.index("X")]))

    def _number_scenes(self, path: str, count: int, of_one_size: bool) -> None:
        """Let bioio read all scenes of a file whose metadata name fewer, which it does by their position.

        Raises `ImageError` for scenes of different sizes: aicspylibczi crashes on those.
        """
        reader = getattr(self.image.reader, "_implementation", self.image.reader)
        if not of_one_size or not hasattr(reader, "_scenes"):
            raise ImageError(
                f"Cannot read {path}: it holds {count} scenes, of which its metadata name "
                f"{len(self.scenes)}. Please name the scenes in ZEN, or export it as OME-TIFF."
            )
        reader._scenes = tuple(map(str, range(count)))
        self.scenes = ("",) * count

    def _levels(self) -> tuple[tuple[int, int], ...]:
        dims = self.image.resolution_level_dims
        y, x = self.axes.index("Y"), self.axes.index("X")
        return tuple((int(dims[level][y]), int(dims[level][x])) for level in sorted(dims))

    def read(self, level: int, box: Box) -> NDArray:
        check_inside(box, self.levels[level], self.path)
        self.image.set_resolution_level(level)
        rows, columns = box.slices
        planes = slice(None) if self.z == "max" else slice(self.z, self.z + 1)
        pick = {"T": self.t, "C": slice(None), "Z": planes, "Y": rows, "X": columns, "S": slice(None)}
        lazy = self.image.dask_data[tuple(pick[axis] for axis in self.axes)]
        # One plane at a time, so that a deep stack takes little memory.
        at = self.axes.replace("T", "").index("Z")
        pixels: NDArray | None = None
        for plane in range(lazy.shape[at]):
            index = [slice(None)] * lazy.ndim
            one = np.asarray(lazy[(*index[:at], plane)].compute(scheduler="synchronous"))
            pixels = one if pixels is None else np.maximum(pixels, one)
        assert pixels is not None
        if self.is_rgb:  # C, Y, X, S with a single C
            pixels = np.moveaxis(pixels[0], -1, 0)
        return np.ascontiguousarray(pixels.astype(self.dtype, copy=False))

    def close(self) -> None:
        self.image = None


def _scenes_of_czi(path: str) -> tuple[int, bool]:
    """Number of scenes in the pixel data of a CZI file, and whether they have one size; bioio goes by the
    metadata, which may name fewer."""
    if not path.lower().endswith(".czi"):
        return 0, True
    try:
        from aicspylibczi import CziFile
    except ImportError:
        return 0, True
    shapes = CziFile(path).get_dims_shape()
    return max((shape.get("S", (0, 1))[1] for shape in shapes), default=0), len(shapes) == 1


def open(path: str, *, t: int = 0, z: ZChoice = "max", scene: int = 0) -> BioioReader:
    return BioioReader(path, t, z, scene)
