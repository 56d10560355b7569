"""Inner loops over rows of features, compiled.

Each row is worked out by itself, in a fixed order of operations, in double precision. A matrix product would
give other last bits for other numbers of rows or threads, and a cell between two groups would then change
sides.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def row_hashes(bits, seed):  # pragma: no cover (compiled)
    """One number per row of ``(n, d)`` uint32, from its content and a seed (a chain of splitmix64 steps)."""
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
def project(rows, mean, factor, axes, unit, parts):  # pragma: no cover (compiled)
    """``((rows - mean) * factor) @ axes``, each part to length 1 if asked; ``(n, d)`` float32 to ``(n, c)``
    float32."""
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
        _store(out, i, total, unit, parts)
    return out


@njit(cache=True, nogil=True)
def scale(rows, mean, factor, unit, parts):  # pragma: no cover (compiled)
    """``(rows - mean) * factor``, each part to length 1 if asked."""
    n, d = rows.shape
    out = np.empty((n, d), np.float32)
    total = np.empty(d, np.float64)
    for i in range(n):
        for j in range(d):
            total[j] = (rows[i, j] - mean[j]) * factor[j]
        _store(out, i, total, unit, parts)
    return out


@njit(cache=True, nogil=True)
def _store(out, i, values, unit, parts):  # pragma: no cover (compiled)
    for p in range(len(parts) - 1):
        length = 1.0
        if unit:
            squares = 0.0
            for m in range(parts[p], parts[p + 1]):
                squares += values[m] * values[m]
            length = np.sqrt(squares) if squares > 0 else 1.0
        for m in range(parts[p], parts[p + 1]):
            out[i, m] = values[m] / length


@njit(cache=True, nogil=True)
def nearest(rows, centers):  # pragma: no cover (compiled)
    """Nearest centre of every row, and the squared distance to it; of equally near ones the first.

    `rows` is (n, c) float32, `centers` (c, k) float64: centres in columns, so that the inner loop is over
    centres and runs in the processor's vectors without changing the order of a sum.
    """
    n, c = rows.shape
    k = centers.shape[1]
    labels = np.empty(n, np.int32)
    squares = np.empty(n, np.float64)
    total = np.empty(k, np.float64)
    for i in range(n):
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
        squares[i] = total[best]
    return labels, squares


@njit(cache=True, nogil=True)
def add_by_label(rows, labels, k):  # pragma: no cover (compiled)
    """Sums ``(k, c)`` float64 and numbers ``(k,)`` of the rows of every label, in the order of the rows."""
    sums = np.zeros((k, rows.shape[1]), np.float64)
    counts = np.zeros(k, np.int64)
    for i in range(len(rows)):
        counts[labels[i]] += 1
        for j in range(rows.shape[1]):
            sums[labels[i], j] += rows[i, j]
    return sums, counts
