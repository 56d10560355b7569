"""Every channel of an image as a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from daskcell.geometry import Box
from daskcell.images.derived import mark
from daskcell.images.filename_channels import safe_name, stem, unique_names
from daskcell.images.image import find_image
from daskcell.images.reader_process import open_safely
from daskcell.images.readers import Reader
from daskcell.images.sources import Source
from daskcell.storage.atomic import atomic_path
from daskcell.storage.staging import refuse_existing

TILE = 512


def split_channels(image: str | Path | Source, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write each channel of an image as ``<image>_<channel>.tif``.

    The files are tiled, compressed without loss, have the pixel size, and are BigTIFF beyond 4 GB. One row of
    tiles is in memory at a time. They are marked: `find_images` leaves them out beside the image.

    Parameters
    ----------
    image : path or Source
        Any readable image.
    folder : path
        Where to write, made where it does not exist.
    overwrite : bool
        Replace files of these names.

    Returns
    -------
    list of pathlib.Path
        The files, in the order of the channels.

    Raises
    ------
    ImageError
        If the image cannot be read, or a file exists and may not be replaced.
    """
    import tifffile

    source = find_image(image)
    files = channel_files(source, folder)
    if not overwrite:
        for file in files:
            refuse_existing(file)
    reader = open_safely(source)
    height, width = reader.levels[0]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for channel, target in enumerate(files):
        resolution = None
        if reader.pixel_size is not None:
            y, x = reader.pixel_size
            resolution = 1e4 / x, 1e4 / y
        with atomic_path(target) as part:
            tifffile.imwrite(
                part,
                _tiles(reader, channel),
                shape=(height, width),
                dtype=reader.dtype,
                tile=(TILE, TILE),
                compression="zlib",
                predictor=reader.dtype.kind != "f",
                photometric="minisblack",
                resolution=resolution,
                resolutionunit="CENTIMETER" if resolution else None,
                description=reader.channels[channel].encode("ascii", "replace").decode(),
                metadata=None,
                software=mark("channel", _file_name(source)),
                bigtiff=height * width * reader.dtype.itemsize > 2**32 - 2**25,
            )
    reader.close()
    return files


def channel_files(source: Source, folder: str | Path) -> list[Path]:
    """The files that `split_channels` writes, one for each channel."""
    reader = open_safely(source)
    reader.close()
    names = unique_names(f"{safe_name(source.name)}_{channel}" for channel in reader.channels)
    return [Path(folder, f"{name}.tif") for name in names]


def _file_name(source: Source) -> str:
    """Name of the file, or of the OME-Zarr that holds the image, by which a search finds it."""
    file = source.files[0]
    return stem(next((part for part in PurePath(file).parts if part.endswith(".zarr")), file))


def _tiles(reader: Reader, channel: int) -> Iterator[NDArray]:
    """Tiles of one channel in reading order, padded with zeros at the border."""
    height, width = reader.levels[0]
    for y in range(0, height, TILE):
        strip = reader.read(0, Box(y, 0, min(y + TILE, height), width))[channel]
        for x in range(0, width, TILE):
            tile = np.zeros((TILE, TILE), strip.dtype)
            part = strip[:, x : x + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile
