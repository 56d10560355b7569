"""The public functions `open_image` and `convert`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from daskcell.config import InputSettings
from daskcell.errors import ImageError, InputError, warn
from daskcell.geometry import Box
from daskcell.images.discovery import find_images
from daskcell.images.reader_process import open_safely
from daskcell.images.scenes import list_scenes
from daskcell.images.sources import Source

if TYPE_CHECKING:
    import dask.array as da

BLOCK = 2048
"""Side in pixels of the chunks of a lazily read file, rounded down to whole tiles."""
BLOCK_BYTES = 64 * 2**20
"""Size of the largest chunk of a file that is stored in strips."""


@dataclass(frozen=True)
class Image:
    """An image whose pixels are read when they are computed."""

    data: da.Array
    """``(C, Y, X)``."""
    channels: tuple[str, ...]
    pixel_size: tuple[float, float] | None
    """``(y, x)`` in micrometres, or None where the file does not say."""
    name: str
    path: str
    is_rgb: bool
    """Whether it is a colour image, as of a stained slide, rather than three fluorescence channels."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, Y, X)``."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def __repr__(self) -> str:
        c, y, x = self.shape
        return f"<Image {self.name}: {c} x {y} x {x} {self.dtype}, channels {', '.join(self.channels)}>"


def open_image(
    path: str | Path | Sequence[str | Path] | Source,
    settings: InputSettings | None = None,
    *,
    scene: str | int | None = None,
) -> Image:
    """Open any readable file, OME-Zarr image, or folder with one file per channel; pixels are read lazily.

    Parameters
    ----------
    path : path or sequence of paths
        A file, folder, pattern or URL.
    settings : InputSettings, optional
        Which channels, time point and plane to take, and what the file does not say.
    scene : str or int, optional
        Name, or number counted from 0, of the image in a file that holds several (scenes, positions, series,
        fields of a plate).

    Returns
    -------
    Image
        ``.data`` is a Dask array ``(C, Y, X)``; ``.pixel_size`` is ``(y, x)`` in micrometres, or None.

    Raises
    ------
    ImageError
        If it cannot be read, or holds several images, which the message names.
    """
    source = find_image(path, settings, scene)
    reader = open_safely(source)
    for note in getattr(reader, "notes", ()):
        warn(note)
    try:
        image = _lazy(source, reader)
    finally:
        reader.close()
    return image


def convert(
    src: str | Path | Sequence[str | Path] | Source,
    dst: str | Path,
    client: Any = None,
    *,
    version: Literal["0.5", "0.4"] = "0.5",
    scene: str | int | None = None,
) -> Image:
    """Write any readable image as OME-Zarr, with channel names, pixel size and pyramid.

    Parameters
    ----------
    src : path or sequence of paths
        As for `open_image`.
    dst : path
        Folder to write, such as ``slide.zarr`` or ``s3://bucket/slide.zarr``.
    client : distributed.Client, cluster or str, optional
        Dask client, cluster or address of a scheduler to use; by default this process does the work.
    version : {"0.5", "0.4"}
        Of OME-Zarr. 0.4 is for older viewers, and has a file for every 512 x 512 pixels of a channel.
    scene : str or int, optional
        As for `open_image`.

    Returns
    -------
    Image
        What ``open_image(dst)`` returns.

    Raises
    ------
    ImageError
        If `src` cannot be read or holds several images, or `dst` exists.
    InputError
        For any other version.
    """
    from daskcell.images.conversion import convert_slide

    if version not in ("0.4", "0.5"):
        raise InputError(f"OME-Zarr {version} cannot be written; please choose 0.5 or 0.4.")
    source, settings = find_image(src, None, scene), InputSettings(ome_zarr=version)
    if client is None:
        report = convert_slide(source, dst, None, settings)
    else:
        from daskcell.compute import start_workers

        with start_workers(client=client) as workers:
            report = convert_slide(source, dst, workers, settings)
    for note in report.get("notes", ()):
        warn(note)
    return open_image(dst)


def find_image(
    path: str | Path | Sequence[str | Path] | Source,
    settings: InputSettings | None = None,
    scene: str | int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Source:
    """The only image among `path`, or that of one `scene`; raises `ImageError` where there are several."""
    if isinstance(path, Source):
        return path
    if scene is not None:
        settings = (settings or InputSettings()).model_copy(update={"scenes": [scene]})
    sources = find_images(path, settings, tell)
    if len(sources) == 1:
        return sources[0]
    scenes = list(dict.fromkeys(source.part for source in sources if source.part))
    if len(scenes) > 1:
        raise ImageError(
            f"{path} holds {len(scenes)} images: {list_scenes(scenes)}. Please choose one, such as "
            f"scene={scenes[0]!r} (input.scenes), or use 'daskcell run' for all."
        )
    found = list_scenes([source.name for source in sources])
    raise ImageError(
        f"{path} holds {len(sources)} images ({found}). Please choose one of them (a file, a time point t, a "
        "plane z), or use 'daskcell run' for all."
    )


def _lazy(source: Source, reader: Any) -> Image:
    import dask.array as da
    from dask.base import tokenize

    identity = source.identity()
    height, width = reader.levels[0]
    count, size = len(reader.channels), reader.dtype.itemsize
    rows, columns = (max(BLOCK // piece, 1) * piece if piece <= BLOCK else BLOCK for piece in reader.piece)
    if reader.piece[1] >= width and reader.piece[0] < height:
        # Strips: a block as wide as the image decodes each of them once, and is lower for that.
        columns = width
        rows = max(min(rows, BLOCK_BYTES // (count * width * size)), 1)
    chunks = da.core.normalize_chunks(
        (count, min(rows, height), min(columns, width)), shape=(count, height, width), dtype=reader.dtype
    )
    data = da.map_blocks(
        _read_chunk,
        source,
        identity,
        chunks=chunks,
        dtype=reader.dtype,
        meta=np.empty((0, 0, 0), reader.dtype),
        name="image-" + tokenize(source, identity, chunks),
    )
    path = source.files[0] if len(source.files) == 1 else os.path.dirname(source.files[0])
    return Image(data, reader.channels, reader.pixel_size, source.name, path, reader.is_rgb)


def _read_chunk(source: Source, identity: str, block_info: Any = None) -> Any:
    from daskcell.images.conversion import cached_reader

    (y0, y1), (x0, x1) = block_info[None]["array-location"][-2:]
    return cached_reader(source, identity).read(0, Box(y0, x0, y1, x1))
