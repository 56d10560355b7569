"""Label images as TIFF, for ImageJ, CellProfiler, Cellpose's window and most other programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.export.registry import Exporter
from daskcell.geometry import Box

if TYPE_CHECKING:
    from daskcell.study import Study

_TILE = 512


def write_masks(study: Study, slides: list[str], path: Path) -> int:
    """Write the cells of a slide as a tiled TIFF ``(Y, X)``: each pixel has the label of its cell; 0: none.

    16 bits while they are enough (65 535 cells), else 32. ``label`` of `Study.cells` is the value.
    """
    import tifffile

    from daskcell.images import image_info, read_labels
    from daskcell.segmentation.index import read_index

    (slide,) = slides
    image = study.paths.image(slide)
    info = image_info(image)
    height, width = info.shape[-2:]
    labels = read_index(study.paths.index(slide))["label"]
    dtype = np.uint16 if labels.max(initial=0) < 1 << 16 else np.uint32

    def tiles() -> Iterator[np.ndarray]:
        for y in range(0, height, _TILE):
            row = read_labels(image, "cells", Box(y, 0, min(y + _TILE, height), width)).astype(dtype)
            row = np.pad(row, ((0, _TILE - len(row)), (0, -width % _TILE)))
            yield from (row[:, x : x + _TILE] for x in range(0, width, _TILE))

    resolution: dict[str, Any] = {}
    if info.pixel_size is not None:
        y, x = info.pixel_size
        resolution = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=height * width * np.dtype(dtype).itemsize > 1 << 31) as file:
        file.write(
            tiles(),
            shape=(height, width),
            dtype=dtype,
            tile=(_TILE, _TILE),
            compression="zlib",
            photometric="minisblack",
            metadata=None,
            **resolution,
        )
    return len(labels)


EXPORTER = Exporter(".tif", write_masks)
