"""Where a slide has tissue, told from a small pyramid level, so that bare glass need not be computed."""

from __future__ import annotations

import numpy as np

from daskcell.geometry import Box
from daskcell.segmentation.tiles import TileGrid

MARGIN = 2
"""Pixels of the small level that tissue is widened by on every side."""


def tissue_mask(picture: np.ndarray, bright_field: bool) -> np.ndarray:
    """Pixels that are not bare background.

    Parameters
    ----------
    picture : (C, y, x)
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

    picture = picture.astype(np.float32)
    if bright_field:
        light = np.percentile(picture, 95, axis=(1, 2), keepdims=True)
        signal = -np.log((picture + 1) / (light + 1)).min(axis=0)
        low, high = 0.02, 0.15
    else:
        dark = np.median(picture, axis=(1, 2), keepdims=True)
        spread = np.median(np.abs(picture - dark), axis=(1, 2), keepdims=True) * 1.4826 + 1e-6
        signal = ((picture - dark) / spread).max(axis=0)
        low, high = 2.0, 5.0
    threshold = float(np.clip(threshold_otsu(signal), low, high)) if np.ptp(signal) > 0 else low
    found = ndimage.median_filter(signal, 3) > threshold
    return np.asarray(ndimage.binary_dilation(found, np.ones((3, 3)), iterations=MARGIN))


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
