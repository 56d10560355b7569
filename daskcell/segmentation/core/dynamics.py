"""Pixels follow the flows to their cell: Cellpose's dynamics on a part, with the whole image's bits.

The method is that of Stringer et al., "Cellpose: a generalist algorithm for cellular segmentation", Nature
Methods 18 (2021), as `cellpose.dynamics` 4.2 computes it. Positions are kept there as float32 fractions of
the whole side and sampled with ``grid_sample(align_corners=False)``, which shifts them by up to half a pixel
depending on the side; so a part must use the whole image's sides and its own offset. The arithmetic below
repeats that of torch operation by operation (its kernel multiplies and adds without rounding in between), so
that every pixel ends on the same spot.

A part does not know what lies outside. A pixel that leaves it, or starts so close to its rim that pixels from
outside could have joined its path, is `tainted`, and a caller who needs it must look at a larger part.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from daskcell.geometry import Box

REACH = 7
"""Bins around a final position whose counts matter to the label there: 5 for a seed's growth, 2 its peak."""
MIN_PEAK = 10
"""A seed has more final positions than this."""
MIN_GROWTH = 2
"""A seed grows over neighbouring bins with more final positions than this."""


def follow(
    flows: np.ndarray, grown: Box, shape: tuple[int, int], foreground: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move every foreground pixel along the flows.

    Parameters
    ----------
    flows : (2, h, w) float32
        Flow along y and x over `grown`, as the network gives it (five times the unit vector).
    grown : Box
        Where the part lies in the image.
    shape : (Y, X)
        Size of the whole image.
    foreground : (h, w) bool
        Pixels to move; flows elsewhere count as zero.
    steps : int

    Returns
    -------
    start : (2, n) int32
        Pixels moved, in reading order, from the part's corner.
    end : (2, n) int32
        Bins they end in, from the part's corner. Meaningless for pixels that left the part.
    tainted : (n,) uint8
        0: as in the whole image. 1: starts in the rim. 2: left the part.
    """
    step = (flows * foreground) / np.float32(5)
    start = np.empty((2, np.count_nonzero(foreground)), np.int32)
    np.divmod(np.flatnonzero(foreground), foreground.shape[1], out=(start[0], start[1]), casting="unsafe")
    rim = 2 + math.ceil(float(np.abs(step).max(initial=0.0)))
    # y and x side by side: one pixel's flow is one memory access.
    step = np.ascontiguousarray(step.transpose(1, 2, 0))
    for axis in (0, 1):
        step[..., axis] *= np.float32(2.0 / max(1, shape[axis] - 1))
    end = np.empty_like(start)
    tainted = np.zeros(start.shape[1], np.uint8)
    _follow(step, grown.y0, grown.x0, shape[0], shape[1], start, steps, rim, end, tainted)
    return start, end, tainted


def _fused_multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding, as the vector instruction of torch's kernel does."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


fma: Any = intrinsic(_fused_multiply_add)


@njit(cache=True, nogil=True)
def _follow(step, top, left, height, width, start, steps, rim, end, tainted):  # pragma: no cover - compiled
    one, half, two, zero = np.float32(1), np.float32(0.5), np.float32(2), np.float32(0)
    span_y, span_x = np.float32(max(1, height - 1)), np.float32(max(1, width - 1))
    scale_y, scale_x = np.float32(height / 2), np.float32(width / 2)
    rows, columns = step.shape[0], step.shape[1]
    inner_y0 = rim if top > 0 else 0
    inner_x0 = rim if left > 0 else 0
    inner_y1 = rows - rim if top + rows < height else rows
    inner_x1 = columns - rim if left + columns < width else columns
    for n in range(start.shape[1]):
        py, px = start[0, n], start[1, n]
        if py < inner_y0 or py >= inner_y1 or px < inner_x0 or px >= inner_x1:
            tainted[n] = 1
        y = np.float32(py + top) / span_y * two - one
        x = np.float32(px + left) / span_x * two - one
        before_y, before_x = y, x
        for t in range(steps):
            gy, gx = fma(y + one, scale_y, -half), fma(x + one, scale_x, -half)
            fy, fx = np.float32(np.floor(gy)), np.float32(np.floor(gx))
            south, east = gy - fy, gx - fx
            north, west = one - south, one - east
            nw, ne, sw, se = north * west, north * east, south * west, south * east
            py, px = int(fy) - top, int(fx) - left
            if py >= 0 and py + 1 < rows and px >= 0 and px + 1 < columns:
                a, b, c, d = step[py, px], step[py, px + 1], step[py + 1, px], step[py + 1, px + 1]
                dy = fma(d[0], se, fma(c[0], sw, fma(b[0], ne, a[0] * nw)))
                dx = fma(d[1], se, fma(c[1], sw, fma(b[1], ne, a[1] * nw)))
            else:
                # Beyond the image there is no flow; what lies in the image must lie in the part.
                dy = dx = zero
                for corner in range(4):
                    v, u = py + corner // 2, px + corner % 2
                    if v + top < 0 or v + top >= height or u + left < 0 or u + left >= width:
                        continue
                    if v < 0 or v >= rows or u < 0 or u >= columns:
                        tainted[n] = 2
                        break
                    weight = (nw, ne, sw, se)[corner]
                    dy, dx = fma(step[v, u, 0], weight, dy), fma(step[v, u, 1], weight, dx)
                if tainted[n] == 2:
                    break
            next_y = min(max(y + dy, -one), one)
            next_x = min(max(x + dx, -one), one)
            if next_y == y and next_x == x:
                break  # stands still: so would all further steps
            if t > 0 and next_y == before_y and next_x == before_x:
                # Goes to and fro between two spots: the parity of the steps left says where it ends.
                if (steps - t) % 2 == 1:
                    y, x = next_y, next_x
                break
            before_y, before_x = y, x
            y, x = next_y, next_x
        end[0, n] = int((y + one) * half * span_y) - top
        end[1, n] = int((x + one) * half * span_x) - left
        if end[0, n] < 0 or end[0, n] >= rows or end[1, n] < 0 or end[1, n] >= columns:
            tainted[n] = 2


def gather(
    start: np.ndarray, end: np.ndarray, tainted: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Label the pixels by the peak of final positions they end at.

    The rule of `cellpose.dynamics.get_masks_torch`: a seed is a bin with more than 10 pixels and the most of
    its 5 x 5 neighbourhood; it grows five times by one bin over bins with more than 2; where two seeds grow
    over the same bin, the one with more pixels has it, and of equals the later in reading order.

    Parameters
    ----------
    start, end, tainted
        As `follow` returns them.
    size : (h, w)
        Size of the part.

    Returns
    -------
    labels : (h, w) int32
        Numbered in reading order of each label's first pixel.
    unsafe : (h, w) bool
        Foreground pixels whose label could be another one if the outside were known.
    """
    counts = np.zeros(size, np.int32)
    arrived = tainted < 2
    np.add.at(counts, (end[0, arrived], end[1, arrived]), 1)
    label_of_bin = _grow(counts)
    doubtful = np.zeros(size, bool)
    rim = tainted == 1
    doubtful[end[0, rim], end[1, rim]] = True
    doubtful = _dilate(doubtful, REACH)
    labels = np.zeros(size, np.int32)
    unsafe = np.zeros(size, bool)
    _look_up(start, end, tainted, label_of_bin, doubtful, labels, unsafe)
    renumber(labels)
    return labels, unsafe


@njit(cache=True, nogil=True)
def _look_up(start, end, tainted, label_of_bin, doubtful, labels, unsafe):  # pragma: no cover - compiled
    for n in range(start.shape[1]):
        y, x = start[0, n], start[1, n]
        if tainted[n] == 2:
            unsafe[y, x] = True
        else:
            labels[y, x] = label_of_bin[end[0, n], end[1, n]]
            unsafe[y, x] = doubtful[end[0, n], end[1, n]]


@njit(cache=True, nogil=True)
def _grow(counts):  # pragma: no cover - compiled
    rows, columns = counts.shape
    seeds_y, seeds_x, peaks = [0], [0], [0]
    seeds_y.pop(), seeds_x.pop(), peaks.pop()
    for y in range(rows):
        for x in range(columns):
            peak = counts[y, x]
            if peak <= MIN_PEAK:
                continue
            highest = True
            for v in range(max(0, y - 2), min(rows, y + 3)):
                for u in range(max(0, x - 2), min(columns, x + 3)):
                    if counts[v, u] > peak:
                        highest = False
            if highest:
                seeds_y.append(y)
                seeds_x.append(x)
                peaks.append(peak)
    out = np.zeros((rows, columns), np.int32)
    order = np.argsort(np.array(peaks, dtype=np.int64), kind="mergesort")
    region = np.zeros((11, 11), np.bool_)
    grown = np.zeros((11, 11), np.bool_)
    for rank in range(len(order)):
        sy, sx = seeds_y[order[rank]], seeds_x[order[rank]]
        region[:] = False
        region[5, 5] = True
        for _ in range(5):
            grown[:] = False
            for v in range(11):
                for u in range(11):
                    y, x = sy + v - 5, sx + u - 5
                    if y < 0 or y >= rows or x < 0 or x >= columns or counts[y, x] <= MIN_GROWTH:
                        continue
                    for b in range(max(0, v - 1), min(11, v + 2)):
                        for a in range(max(0, u - 1), min(11, u + 2)):
                            if region[b, a]:
                                grown[v, u] = True
            region[:] = grown
        for v in range(11):
            for u in range(11):
                if region[v, u]:
                    out[sy + v - 5, sx + u - 5] = rank + 1
    return out


@njit(cache=True, nogil=True)
def _dilate(mask, radius):  # pragma: no cover - compiled
    rows, columns = mask.shape
    out = np.zeros_like(mask)
    for y in range(rows):
        for x in range(columns):
            if mask[y, x]:
                out[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = True
    return out


@njit(cache=True, nogil=True)
def renumber(labels):  # pragma: no cover - compiled
    new = np.zeros(labels.max() + 1, np.int32)
    count = 0
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            label = labels[y, x]
            if label > 0:
                if new[label] == 0:
                    count += 1
                    new[label] = count
                labels[y, x] = new[label]
