"""The preprocessed image as a ``.tif``, tile by tile: memory does not grow with the slide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from daskcell.geometry import Box
from daskcell.preprocess.prepared import PreparedImage
from daskcell.storage.atomic import atomic_path

TILE = 512
_RUN = 4
"""Tiles of a row that are computed together, so that halos are read less often."""


def write_prepared_tiff(image: PreparedImage, path: str | Path) -> None:
    """Write a prepared image as a tiled TIFF (BigTIFF from 2 GB on).

    Three channels are written as RGB; any other number as one grey page a channel, each computed by itself.
    The pixel size goes along. The file appears under its name only when whole.
    """
    import tifffile

    from daskcell import images
    from daskcell.images.derived import mark

    plan, (height, width) = image.plan, image.shape
    colour = plan.out_channels == 3
    size = images.image_info(image.path).pixel_size
    options: dict[str, Any] = {"tile": (TILE, TILE), "compression": "zlib", "predictor": True}
    if size is not None:
        options |= {"resolution": (1e4 / size[1], 1e4 / size[0]), "resolutionunit": "CENTIMETER"}
    total = plan.out_channels * height * width * plan.out_dtype.itemsize
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=total > 2**31) as writer,
    ):
        for page in [slice(0, 3)] if colour else [slice(c, c + 1) for c in range(plan.out_channels)]:
            writer.write(
                _tiles(image, page),
                shape=(height, width, 3) if colour else (height, width),
                dtype=plan.out_dtype,
                photometric="rgb" if colour else "minisblack",
                metadata=None,
                software=mark("prepared image", Path(image.path).stem),
                **options,
            )


def _tiles(image: PreparedImage, page: slice) -> Iterator[np.ndarray]:
    """Tiles in reading order, ``(h, w, 3)`` or ``(h, w)``, filled up at the border as tifffile wants them."""
    height, width = image.shape
    for y in range(0, height, TILE):
        for start in range(0, width, _RUN * TILE):
            core = Box(y, start, y + TILE, start + _RUN * TILE).clip(image.shape)
            block = np.moveaxis(image.read(core)[page], 0, -1)
            for x in range(0, block.shape[1], TILE):
                tile = block[:, x : x + TILE]
                missing = [(0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)]
                whole = np.ascontiguousarray(np.pad(tile, missing))
                yield whole if whole.shape[2] == 3 else whole[..., 0]
