"""Inner loops over all pixels of an image, compiled: one look at each pixel, and no copies on the way."""

from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True)
def count_values(values, counts):  # pragma: no cover (compiled)
    """Add how often each of the `values` ``(n,)`` occurs to ``(4, 2**bits)`` `counts`, whose sum is meant.

    Four tables, since equal neighbours would wait for each other at one.
    """
    whole = len(values) // 4 * 4
    for i in range(0, whole, 4):
        counts[0, values[i]] += 1
        counts[1, values[i + 1]] += 1
        counts[2, values[i + 2]] += 1
        counts[3, values[i + 3]] += 1
    for i in range(whole, len(values)):
        counts[0, values[i]] += 1


@njit(cache=True, nogil=True)
def halve_integers(pixels, out):  # pragma: no cover (compiled)
    """Means of 2 x 2 of ``(n, h, w)`` `pixels`, halves up, into `out` ``(n, (h + 1) // 2, (w + 1) // 2)``."""
    height, width = pixels.shape[1:]
    for k in range(pixels.shape[0]):
        for i in range(out.shape[1]):
            upper = pixels[k, 2 * i]
            lower = pixels[k, min(2 * i + 1, height - 1)]
            row = out[k, i]
            for j in range(width // 2):
                total = int(upper[2 * j]) + int(upper[2 * j + 1]) + int(lower[2 * j]) + int(lower[2 * j + 1])
                row[j] = (total + 2) >> 2
            if width % 2:
                row[width // 2] = (int(upper[width - 1]) + int(lower[width - 1]) + 1) >> 1
