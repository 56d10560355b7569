"""Compiled inner loops over rows of features.

Results are computed row by row in double precision, with a fixed order of operations: the last bits of a
matrix product depend on the number of rows and threads. `assignment` explains how one is used nevertheless.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def row_hashes(bits, seed):  # pragma: no cover (compiled)
    """Hash of each row of ``(n, d)`` uint32 with a seed (chained splitmix64 steps)."""
    out = np.empty(len(bits), np.uint64)
    for i in range(len(bits)):
        h = np.uint64(seed)
        for j in range(bits.shape[1]):
            h = (h ^ np.uint64(bits[i, j])) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
        out[i] = h
    return out


@njit(cache=True, nogil=True)
def moments(rows):  # pragma: no cover (compiled)
    """Mean of each feature of ``(n, d)`` rows, n > 0, and sum of squared deviations from it: float64 each."""
    n, d = rows.shape
    mean = np.zeros(d, np.float64)
    squares = np.zeros(d, np.float64)
    for i in range(n):
        for j in range(d):
            mean[j] += np.float64(rows[i, j])
    mean /= n
    for i in range(n):
        for j in range(d):
            difference = np.float64(rows[i, j]) - mean[j]
            squares[j] += difference * difference
    return mean, squares


@njit(cache=True, nogil=True)
def project(rows, mean, factor, axes, unit, parts, steps):  # pragma: no cover (compiled)
    """``((rows - mean) * factor) @ axes``, each part to length 1 if asked; ``(n, d)`` float32 to ``(n, c)``
    float32, in whole multiples of `steps` (c,)."""
    n, d = rows.shape
    c = axes.shape[1]
    out = np.empty((n, c), np.float32)
    total = np.empty(c, np.float64)
    for i in range(n):
        total[:] = 0
        for j in range(d):
            value = (rows[i, j] - mean[j]) * factor[j]
            for m in range(c):
                total[m] += value * axes[j, m]
        _store(out, i, total, unit, parts, steps)
    return out


@njit(cache=True, nogil=True)
def scale(rows, mean, factor, unit, parts, steps):  # pragma: no cover (compiled)
    """``(rows - mean) * factor``, each part to length 1 if asked, in whole multiples of `steps` (d,)."""
    n, d = rows.shape
    out = np.empty((n, d), np.float32)
    total = np.empty(d, np.float64)
    for i in range(n):
        for j in range(d):
            total[j] = (rows[i, j] - mean[j]) * factor[j]
        _store(out, i, total, unit, parts, steps)
    return out


@njit(cache=True, nogil=True)
def _store(out, i, values, unit, parts, steps):  # pragma: no cover (compiled)
    for p in range(len(parts) - 1):
        length = 1.0
        if unit:
            squares = 0.0
            for m in range(parts[p], parts[p + 1]):
                squares += values[m] * values[m]
            length = np.sqrt(squares) if squares > 0 else 1.0
        for m in range(parts[p], parts[p + 1]):
            values[m] /= length
    for m in range(len(values)):
        out[i, m] = np.rint(values[m] / steps[m]) * steps[m] if steps[m] > 0 else values[m]


@njit(cache=True, nogil=True)
def nearest_exactly(rows, centers, which, labels):  # pragma: no cover (compiled)
    """Write the nearest centre of the rows `which` to `labels`; of equally near ones, the first.

    `rows` is (n, c) float32, `centers` (c, k) float64: centres in columns, so that the inner loop is over
    centres and runs in the processor's vectors without changing the order of a sum.
    """
    c = rows.shape[1]
    k = centers.shape[1]
    total = np.empty(k, np.float64)
    for i in which:
        total[:] = 0
        for j in range(c):
            value = np.float64(rows[i, j])
            for m in range(k):
                difference = value - centers[j, m]
                total[m] += difference * difference
        best = 0
        for m in range(1, k):
            if total[m] < total[best]:
                best = m
        labels[i] = best


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def lengths(rows, out):  # pragma: no cover (compiled)
    """Length of each row; the last bits may vary, since the order of summation is not fixed."""
    for i in range(len(rows)):
        total = np.float32(0)
        for j in range(rows.shape[1]):
            total += rows[i, j] * rows[i, j]
        out[i] = np.sqrt(total)


@njit(cache=True, nogil=True)
def decide(product, half, length, slope, offset, labels, best, second, ambiguous):  # pragma: no cover
    """Nearest centres of a tile of rows from products ``(k, n)`` of centres and rows.

    The smallest value of ``half - product`` wins, where `half` is half of a centre's squared length. Rows
    whose margin is at most ``slope * length + offset``, or NaN, are listed in `ambiguous`. `best` and
    `second` (n,) are work arrays. Returns the number of ambiguous rows.
    """
    k, n = product.shape
    for i in range(n):
        best[i] = half[0] - product[0, i]
        second[i] = np.inf
        labels[i] = 0
    for m in range(1, k):
        for i in range(n):
            value = half[m] - product[m, i]
            second[i] = value if best[i] <= value < second[i] else second[i]
            second[i] = best[i] if value < best[i] else second[i]
            labels[i] = m if value < best[i] else labels[i]
            best[i] = value if value < best[i] else best[i]
    count = 0
    for i in range(n):
        if not (second[i] - best[i] > slope * length[i] + offset):
            ambiguous[count] = i
            count += 1
    return count


@njit(cache=True, nogil=True)
def squared_distances(rows, centers, labels):  # pragma: no cover (compiled)
    """Squared distance of each row ``(n, c)`` float32 to its centre, of ``(k, c)`` float64."""
    n, c = rows.shape
    out = np.empty(n, np.float64)
    lanes = np.empty(8, np.float64)  # partial sums side by side, in the same order for every row
    for i in range(n):
        lanes[:] = 0
        center = centers[labels[i]]
        whole = c // 8 * 8
        for j in range(0, whole, 8):
            for m in range(8):
                difference = np.float64(rows[i, j + m]) - center[j + m]
                lanes[m] += difference * difference
        for j in range(whole, c):
            difference = np.float64(rows[i, j]) - center[j]
            lanes[j - whole] += difference * difference
        total = 0.0
        for m in range(8):
            total += lanes[m]
        out[i] = total
    return out


@njit(cache=True, nogil=True)
def margins(best, second, length, share, longest, out):  # pragma: no cover (compiled)
    """Lower bound of the difference between the distances to the second nearest and the nearest centre.

    From the work arrays of `decide`: squared distances are ``length**2 + 2 * best``, with an error of at most
    ``2 * share * (length + longest)**2``.
    """
    for i in range(len(out)):
        square = np.float64(length[i]) ** 2
        wrong = 2 * share * (length[i] + longest) ** 2
        near = max(0.0, square + 2 * np.float64(best[i]) + wrong)
        far = max(0.0, square + 2 * np.float64(second[i]) - wrong)
        out[i] = np.sqrt(far) - np.sqrt(near)


@njit(cache=True, nogil=True)
def assign(
    rows, again, single, half, columns, slope, offset, share, longest, tile, labels, ends, sums, counts
):  # pragma: no cover (compiled)
    """Nearest centres of some rows ``(n, c)``, tile by tile, in one call: re-acquiring the GIL is slow.

    Writes the labels of the rows `again` (increasing row numbers) to `labels` (n,). If `ends` (n,) is not
    empty, writes their `margins` to it and moves every row whose label changed (-1: had none) from its old to
    its new centre in `sums` ``(k, c)`` float64 and `counts` ``(k,)``. The other arguments are attributes of
    `NearestCenters`. Returns the number of ambiguous rows.
    """
    k = single.shape[1]
    tile = min(tile, len(again))
    best, second, length = np.empty(tile, np.float32), np.empty(tile, np.float32), np.empty(tile, np.float32)
    ambiguous, found, lead = np.empty(tile, np.int64), np.empty(tile, np.int32), np.empty(tile, np.float64)
    gathered = np.empty((tile, rows.shape[1]), np.float32)
    product, turned = np.empty((tile, k), np.float32), np.empty((k, tile), np.float32)
    rechecked = 0
    for start in range(0, len(again), tile):
        which = again[start : start + tile]
        n = len(which)
        if n < tile:
            turned = np.empty((k, n), np.float32)
        if which[n - 1] - which[0] == n - 1:
            some = rows[which[0] : which[0] + n]
        else:
            for i in range(n):
                gathered[i] = rows[which[i]]
            some = gathered[:n]
        lengths(some, length)  # first: it brings the tile into the cache faster than the product would
        np.dot(some, single, product[:n])  # half the time of centres times rows
        for i in range(n):
            for m in range(k):
                turned[m, i] = product[i, m]
        count = decide(turned, half, length, slope, offset, found[:n], best, second, ambiguous)
        if count:
            rechecked += count
            nearest_exactly(some, columns, ambiguous[:count], found)
        if len(ends):
            margins(best, second, length, share, longest, lead[:n])
            for i in range(n):
                ends[which[i]] = lead[i]
                old, new = labels[which[i]], found[i]
                if old != new:
                    if old >= 0:
                        _add(some[i], -1, sums[old])
                        counts[old] -= 1
                    _add(some[i], 1, sums[new])
                    counts[new] += 1
        for i in range(n):
            labels[which[i]] = found[i]
    return rechecked


@njit(cache=True, nogil=True)
def _add(row, sign, total):  # pragma: no cover (compiled)
    for j in range(len(row)):
        total[j] += sign * np.float64(row[j])
