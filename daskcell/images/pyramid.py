"""Smaller and smaller copies of an image: their shapes, and the two ways of halving.

Pure arrays and integers. Every level has half the side of the one before, rounded up, so that no pixel of an
odd side is lost; pixel ``(i, j)`` of a level covers pixels ``2i..2i+1, 2j..2j+1`` of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from daskcell.geometry import Box

SMALLEST = 1024
"""Levels are added until both sides are below this."""


def level_shapes(shape: tuple[int, int], stored: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Height and width of every level: the image's own, then the `stored` ones, then halves."""
    shapes = [shape]
    while max(shapes[-1]) >= SMALLEST:
        y, x = shapes[-1]
        number = len(shapes) - 1
        shapes.append(stored[number] if number < len(stored) else ((y + 1) // 2, (x + 1) // 2))
    return shapes


def halvings(levels: Sequence[tuple[int, int]]) -> int:
    """How many of the levels of a file follow each other in steps of two, the first counted.

    Sides are half as long, rounded up or down: both are found in slides.
    """
    for number, (above, below) in enumerate(pairwise(levels), 1):
        if not all(long // 2 <= short <= (long + 1) // 2 for long, short in zip(above, below, strict=True)):
            return number
    return len(levels)


def source_box(box: Box, shape: tuple[int, int]) -> Box:
    """The part of a level of `shape` that becomes `box` of the next."""
    return Box(2 * box.y0, 2 * box.x0, 2 * box.y1, 2 * box.x1).clip(shape)


def halve_mean(array: NDArray) -> NDArray:
    """Mean of every 2 x 2 pixels of ``(..., Y, X)``; of 2 or 1 pixels at an odd border.

    Integers are rounded half up, so that the result depends on nothing but the four pixels. Same dtype.
    """
    y, x = array.shape[-2:]
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 4:
        from daskcell.images._kernels import halve_integers

        out = np.empty((*array.shape[:-2], (y + 1) // 2, (x + 1) // 2), array.dtype)
        halve_integers(np.ascontiguousarray(array).reshape(-1, y, x), out.reshape(-1, *out.shape[-2:]))
        return out
    if y % 2 or x % 2:
        # Repeating the last row leaves the mean of the pixels that are there.
        array = np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, y % 2), (0, x % 2)], mode="edge")
    total = array[..., 0::2, 0::2] + array[..., 0::2, 1::2]
    total += array[..., 1::2, 0::2]
    total += array[..., 1::2, 1::2]
    total *= total.dtype.type(0.25)
    return total


def halve_nearest(array: NDArray) -> NDArray:
    """The first pixel of every 2 x 2 of ``(..., Y, X)``: labels keep their values."""
    return np.ascontiguousarray(array[..., ::2, ::2])
