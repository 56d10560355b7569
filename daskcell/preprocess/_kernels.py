"""Inner loops of filters, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def correlate_symmetric(plane, weights, between, out, rounded):  # pragma: no cover (compiled)
    """Correlate rows and columns with symmetric weights, reflected at the border (``d c b a | a b c d``).

    Sums run from the outermost weights inwards, in double precision and without contraction: those of
    `scipy.ndimage.correlate1d` one axis after the other, in every bit.

    Parameters
    ----------
    plane : (h, w) array of numbers
    weights : (r + 1,) float64
        From the middle outwards.
    between : (w + 2 r,) float32 or float64
        Room for a row; its type is what the first axis' sums are kept in.
    out : (h, w), written
    rounded : bool
        Round to nearest, for integers.
    """
    height, width = plane.shape
    reach = len(weights) - 1
    total = np.empty(width, np.float64)
    rows = np.empty(
        (2 * reach + 1, width), np.float64
    )  # of the plane, the one that is row y at y % (2 r + 1)
    count = 2 * reach + 1
    for y in range(-reach, height + reach):
        source, target = plane[_reflect(y, height)], rows[y % count]
        for x in range(width):
            target[x] = source[x]
        if y < reach:
            continue
        middle = y - reach
        row = rows[middle % count]
        for x in range(width):
            total[x] = row[x] * weights[0]
        for k in range(reach, 0, -1):
            above, below, weight = rows[(middle - k) % count], rows[(middle + k) % count], weights[k]
            for x in range(width):
                total[x] += (above[x] + below[x]) * weight
        for x in range(width):
            between[reach + x] = total[x]
        for k in range(reach):
            between[k] = between[reach + _reflect(k - reach, width)]
            between[reach + width + k] = between[reach + _reflect(width + k, width)]
        for x in range(width):
            total[x] = between[reach + x] * weights[0]
        for k in range(reach, 0, -1):
            weight = weights[k]
            for x in range(width):
                total[x] += (np.float64(between[reach + x - k]) + np.float64(between[reach + x + k])) * weight
        if rounded:
            for x in range(width):
                out[middle, x] = np.rint(total[x])
        else:
            for x in range(width):
                out[middle, x] = total[x]


@njit(inline="always")
def _reflect(i, side):  # pragma: no cover (compiled)
    i = i % (2 * side)
    return i if i < side else 2 * side - 1 - i


@njit(cache=True, nogil=True)
def cell_means(plane, rows, columns):  # pragma: no cover (compiled)
    """Mean of every cell of a coarse grid, each summed in reading order.

    Parameters
    ----------
    plane : (h, w) array of numbers
    rows, columns : (m + 1,), (n + 1,) int64
        Edges of the cells.

    Returns
    -------
    (m, n) float64
    """
    out = np.zeros((len(rows) - 1, len(columns) - 1), np.float64)
    for i in range(len(rows) - 1):
        for y in range(rows[i], rows[i + 1]):
            for j in range(len(columns) - 1):
                total = 0.0
                for x in range(columns[j], columns[j + 1]):
                    total += plane[y, x]
                out[i, j] += total
        for j in range(len(columns) - 1):
            out[i, j] /= (rows[i + 1] - rows[i]) * (columns[j + 1] - columns[j])
    return out
