"""Inner loops over the pixels of cells, compiled.

Each cell is summed by itself, its pixels in reading order inside its own box: so its numbers cannot depend,
in any bit, on which block it was read with.
"""

from __future__ import annotations

import numpy as np
from numba import njit

N, SUM_Y, SUM_X, SUM_YY, SUM_XX, SUM_YX, STRAIGHT, DIAGONAL, CORNER, CONVEX = range(10)
EMPTY = 1 << 40


@njit(cache=True, nogil=True)
def shape_sums(labels, ids, boxes):  # pragma: no cover (compiled)
    """Whole-number sums of every cell's mask.

    Parameters
    ----------
    labels : (h, w) uint32
    ids : (n,) int64
    boxes : (n, 4) int64
        y0, x0, y1, x1 in `labels`.

    Returns
    -------
    (n, 10) int64
        Area; sums of y, x, yy, xx and yx from the box's corner; border pixels whose step along the outline is
        1, sqrt(2) and the mean of both (Benkrid & Crookes' estimator, as scikit-image's `perimeter`);
        area of the convex hull (as scikit-image's `convex_hull_image`: pixels as diamonds, border included).
    """
    out = np.zeros((len(ids), 10), np.int64)
    for i in range(len(ids)):
        label = ids[i]
        y0, x0, y1, x1 = boxes[i]
        h, w = y1 - y0, x1 - x0
        # left and right ends of the diamonds' corners in half pixels, by half-pixel row from -1 to 2h - 1
        left = np.full(2 * h + 1, EMPTY, np.int64)
        right = np.full(2 * h + 1, -EMPTY, np.int64)
        border = np.zeros((h + 2, w + 2), np.uint8)
        for y in range(h):
            for x in range(w):
                yy, xx = y + y0, x + x0
                if labels[yy, xx] != label:
                    continue
                out[i, N] += 1
                out[i, SUM_Y] += y
                out[i, SUM_X] += x
                out[i, SUM_YY] += y * y
                out[i, SUM_XX] += x * x
                out[i, SUM_YX] += y * x
                inner = (
                    y > 0
                    and x > 0
                    and y < h - 1
                    and x < w - 1
                    and labels[yy - 1, xx] == label
                    and labels[yy + 1, xx] == label
                    and labels[yy, xx - 1] == label
                    and labels[yy, xx + 1] == label
                )
                if inner:
                    continue
                border[y + 1, x + 1] = 1
                row = 2 * y + 1
                left[row] = min(left[row], 2 * x - 1)
                right[row] = max(right[row], 2 * x + 1)
                for r in (row - 1, row + 1):
                    left[r] = min(left[r], 2 * x)
                    right[r] = max(right[r], 2 * x)
        for y in range(1, h + 1):
            for x in range(1, w + 1):
                if border[y, x]:
                    code = (
                        1
                        + 2 * (border[y - 1, x] + border[y + 1, x] + border[y, x - 1] + border[y, x + 1])
                        + 10
                        * (
                            border[y - 1, x - 1]
                            + border[y - 1, x + 1]
                            + border[y + 1, x - 1]
                            + border[y + 1, x + 1]
                        )
                    )
                    if code in (5, 7, 15, 17, 25, 27):
                        out[i, STRAIGHT] += 1
                    elif code in (21, 33):
                        out[i, DIAGONAL] += 1
                    elif code in (13, 23):
                        out[i, CORNER] += 1
        out[i, CONVEX] = _convex_area(left, right, h)
    return out


@njit(cache=True, nogil=True)
def _convex_area(left, right, h):  # pragma: no cover (compiled)
    """Pixel centres in the hull of the half-pixel rows' ends, in whole-number arithmetic."""
    right = -right
    low, high = _envelope(left), _envelope(right)
    area = 0
    for y in range(h):
        row = 2 * y + 1
        # ceil(hull's left end / 2) .. floor(hull's right end / 2)
        above, below = _on_envelope(left, low, row)
        first = -((-above) // (2 * below))
        above, below = _on_envelope(right, high, row)
        last = (-above) // (2 * below)
        if last >= first:
            area += last - first + 1
    return area


@njit(cache=True, nogil=True)
def _envelope(values):  # pragma: no cover (compiled)
    """Rows that are corners of the lower convex envelope of `values` (Andrew's monotone chain)."""
    kept = np.empty(len(values), np.int64)
    n = 0
    for row in range(len(values)):
        if values[row] == EMPTY:
            continue
        while n >= 2:
            a, b = kept[n - 2], kept[n - 1]
            if (values[b] - values[a]) * (row - a) < (values[row] - values[a]) * (b - a):
                break
            n -= 1
        kept[n] = row
        n += 1
    return kept[:n]


@njit(cache=True, nogil=True)
def _on_envelope(values, corners, row):  # pragma: no cover (compiled)
    """Height of the envelope at `row`, as numerator and (positive) denominator."""
    j = np.searchsorted(corners, row)
    if corners[j] == row:
        return values[row], np.int64(1)
    a, b = corners[j - 1], corners[j]
    return values[a] * (b - row) + values[b] * (row - a), b - a


@njit(cache=True, nogil=True)
def intensity_sums(labels, image, ids, boxes):  # pragma: no cover (compiled)
    """Mean, deviation, least and largest value of every cell in every channel: ``(n, C, 4)`` float64.

    `labels` is (h, w) uint32, `image` (C, h, w); `ids` and `boxes` as in `shape_sums`. The deviation is that
    of the population, from a second pass over the cell, so that bright images lose no digits.
    """
    channels = image.shape[0]
    out = np.zeros((len(ids), channels, 4), np.float64)
    for i in range(len(ids)):
        y0, x0, y1, x1 = boxes[i]
        for c in range(channels):
            total, n, low, high = 0.0, 0, np.inf, -np.inf
            missing = False
            for y in range(y0, y1):
                for x in range(x0, x1):
                    if labels[y, x] == ids[i]:
                        value = np.float64(image[c, y, x])
                        missing |= np.isnan(value)
                        total += value
                        n += 1
                        low = min(low, value)
                        high = max(high, value)
            mean = total / n if n else np.nan
            squares = 0.0
            for y in range(y0, y1):
                for x in range(x0, x1):
                    if labels[y, x] == ids[i]:
                        squares += (np.float64(image[c, y, x]) - mean) ** 2
            out[i, c, 0] = mean
            out[i, c, 1] = np.sqrt(squares / n) if n else np.nan
            out[i, c, 2] = np.nan if missing or not n else low
            out[i, c, 3] = np.nan if missing or not n else high
    return out
