"""Inner loop of the texture measurements, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def texture_sums(labels, image, ids, boxes, low, high, levels):  # pragma: no cover (compiled)
    """Haralick's measures of the grey-level co-occurrence of every cell's own pixels.

    Pairs of neighbours in all eight directions, both in the cell; each cell by itself, in whole numbers up to
    the last division: so nothing depends on the block.

    Parameters
    ----------
    labels : (h, w) uint32
    image : (C, h, w)
    ids : (n,) int64
    boxes : (n, 4) int64
        y0, x0, y1, x1 in `labels`.
    low, high : (C,) float64
        Values between which lie the `levels` grey levels; values beyond are the darkest and the brightest.

    Returns
    -------
    (n, C, 5) float64
        Contrast, dissimilarity, homogeneity, energy and correlation (as scikit-image's `graycoprops` of the
        sum over the four angles). A cell without a pair of neighbours has those of an even surface.
    """
    channels = image.shape[0]
    out = np.zeros((len(ids), channels, 5), np.float64)
    counts = np.zeros((levels, levels), np.int64)
    for i in range(len(ids)):
        label = ids[i]
        y0, x0, y1, x1 = boxes[i]
        for c in range(channels):
            factor = levels / (high[c] - low[c])
            grey = np.full((y1 - y0 + 1, x1 - x0 + 2), -1, np.int64)  # a border right, left and below
            for y in range(y0, y1):
                for x in range(x0, x1):
                    value = np.float64(image[c, y, x])
                    if labels[y, x] == label and not np.isnan(value):
                        level = np.floor((min(max(value, low[c]), high[c]) - low[c]) * factor)
                        grey[y - y0, x - x0 + 1] = min(np.int64(level), levels - 1)
            counts[:] = 0
            total = 0
            for y in range(y1 - y0):
                for x in range(1, x1 - x0 + 1):
                    a = grey[y, x]
                    if a < 0:
                        continue
                    for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
                        b = grey[y + dy, x + dx]
                        if b >= 0:
                            counts[a, b] += 1
                            counts[b, a] += 1
                            total += 2
            _measures(counts, total, out[i, c])
    return out


@njit(cache=True, nogil=True)
def _measures(counts, total, out):  # pragma: no cover (compiled)
    if not total:
        out[2] = out[3] = out[4] = 1.0
        return
    levels = len(counts)
    contrast, dissimilarity, weighed, squares, cross = 0, 0, 0, 0, 0
    homogeneity, energy = 0.0, 0.0
    for a in range(levels):
        for b in range(levels):
            n = counts[a, b]
            if n:
                gap = abs(a - b)
                contrast += n * gap * gap
                dissimilarity += n * gap
                homogeneity += n / (1.0 + gap * gap)
                energy += (n / total) ** 2
                weighed += n * a
                squares += n * a * a
                cross += n * a * b
    # Symmetric: rows and columns have the same mean and variance. Times total^2, so in whole numbers.
    variance = total * squares - weighed * weighed
    out[0] = contrast / total
    out[1] = dissimilarity / total
    out[2] = homogeneity / total
    out[3] = np.sqrt(energy)
    out[4] = (total * cross - weighed * weighed) / variance if variance else 1.0
