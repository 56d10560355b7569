"""Where a slide has tissue, told from a small pyramid level, so that bare glass need not be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from daskcell.geometry import Box
from daskcell.images.pyramid import halve_mean, level_shapes
from daskcell.segmentation.core.tiles import TileGrid

if TYPE_CHECKING:
    import dask.array as da

MARGIN = 2
"""Pixels of the small level that tissue is widened by on every side."""


def tissue_mask(image: np.ndarray, bright_field: bool) -> np.ndarray:
    """Pixels that are not bare background.

    Parameters
    ----------
    image : (C, y, x)
        A whole slide at a small pyramid level.
    bright_field : bool
        Light background (stained slides) instead of dark (fluorescence).

    Returns
    -------
    (y, x) bool

    Notes
    -----
    Distance from the background colour in the channel that differs most; in bright field as optical density,
    where the background is each channel's 95th percentile, else above the median. Otsu's threshold, held to a
    range so that a slide full of tissue is not cut in two.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    image = image.astype(np.float32)
    if bright_field:
        light = np.percentile(image, 95, axis=(1, 2), keepdims=True)
        signal = -np.log((image + 1) / (light + 1)).min(axis=0)
        low, high = 0.02, 0.15
    else:
        dark = np.median(image, axis=(1, 2), keepdims=True)
        spread = np.median(np.abs(image - dark), axis=(1, 2), keepdims=True) * 1.4826 + 1e-6
        signal = ((image - dark) / spread).max(axis=0)
        low, high = 2.0, 5.0
    threshold = float(np.clip(threshold_otsu(signal), low, high)) if np.ptp(signal) > 0 else low
    found = ndimage.median_filter(signal, 3) > threshold
    return np.asarray(ndimage.binary_dilation(found, np.ones((3, 3)), iterations=MARGIN))


def is_bright(image: np.ndarray) -> bool:
    """Whether the ground of a image ``(C, y, x)`` is bright: most pixels lie above the middle."""
    low, middle, high = np.percentile(image, (0.1, 50, 99.9))
    return bool(middle > (low + high) / 2)


def smallest_level(image: da.Array) -> da.Array:
    """The level of an array ``(C, Y, X)`` that a converted image has last, lazily, as one chunk."""
    small = image
    for height, width in level_shapes((image.shape[1], image.shape[2]))[1:]:
        # Halved chunk by chunk, so each begins at an even pixel; odd sides are at the end alone.
        small = small.rechunk((-1, 2048, 2048))
        chunks = ((image.shape[0],), *(tuple((n + 1) // 2 for n in sides) for sides in small.chunks[1:]))
        small = small.map_blocks(halve_mean, dtype=image.dtype, chunks=chunks, meta=small._meta)
        assert small.shape[1:] == (height, width)
    return small.rechunk(-1)


def tiles_without(mask: np.ndarray, grid: TileGrid) -> frozenset[int]:
    """Tiles that hold no pixel of tissue, so that no pixel of tissue has another value without them."""
    down, across = mask.shape[0] / grid.image[0], mask.shape[1] / grid.image[1]
    empty = []
    for tile in range(len(grid)):
        box = grid.to_image(grid.box(tile))
        small = Box(
            int(box.y0 * down), int(box.x0 * across),
            int(np.ceil(box.y1 * down)), int(np.ceil(box.x1 * across)),
        )  # fmt: skip
        if not mask[small.slices].any():
            empty.append(tile)
    return frozenset(empty)
