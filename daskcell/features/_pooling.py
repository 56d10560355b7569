"""Inner loop of mask pooling, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def pool_maps(
    maps, stride, regions, corner, scale, origin, bounds, counts, sums, squares
):  # pragma: no cover
    """Add one cell's part of one tile's feature maps to its sums.

    Parameters
    ----------
    maps : (H, W, C) float32
        One stage of the network over one tile.
    stride : int
        Network pixels per pixel of the maps.
    regions : (h, w) uint8
        The cell's box: 0 not the cell, 1 its rim, 2 its core.
    corner : (2,) int64
        Where the box begins in the image.
    scale : float
        Network pixels per pixel of the image.
    origin : (2,) int64
        Where the tile's frame begins, in the network's pixels of the whole image.
    bounds : (4,) float64
        Only the cell's pixels whose middle lies in this half-open box, y0, x0, y1, x1, of network pixels.
    counts : (2,) float64
    sums, squares : (2, C) float64
        Rim and core; added to. Every pixel of the cell counts the map's pixel that it lies in.
    """
    height, width, channels = maps.shape
    h, w = regions.shape
    top = int(np.floor(((corner[0] + 0.5) * scale - origin[0]) / stride))
    left = int(np.floor(((corner[1] + 0.5) * scale - origin[1]) / stride))
    down = int(np.floor(((corner[0] + h - 0.5) * scale - origin[0]) / stride)) - top + 1
    across = int(np.floor(((corner[1] + w - 0.5) * scale - origin[1]) / stride)) - left + 1
    shares = np.zeros((2, down, across), np.int64)
    for y in range(h):
        ny = (corner[0] + y + 0.5) * scale
        if not (bounds[0] <= ny < bounds[2]):
            continue
        a = int(np.floor((ny - origin[0]) / stride)) - top
        for x in range(w):
            nx = (corner[1] + x + 0.5) * scale
            if regions[y, x] and bounds[1] <= nx < bounds[3]:
                shares[regions[y, x] - 1, a, int(np.floor((nx - origin[1]) / stride)) - left] += 1
    for r in range(2):
        for a in range(down):
            for b in range(across):
                if not shares[r, a, b]:
                    continue
                share = np.float64(shares[r, a, b])
                counts[r] += share
                y, x = min(max(a + top, 0), height - 1), min(max(b + left, 0), width - 1)
                for c in range(channels):
                    value = np.float64(maps[y, x, c])
                    sums[r, c] += share * value
                    squares[r, c] += share * value * value
