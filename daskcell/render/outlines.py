"""Outlines of cells: polygons along the edges of pixels, exact, with their holes.

Each outline is traced from the one reading that holds its cell whole, so that nothing is cut or dissolved at
the borders of blocks. Follows the edges between pixels with the cell on the right hand; at a point where two
of its pixels meet only by their corners it turns right, so that parts which touch in a point stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit


@dataclass(frozen=True)
class Outlines:
    """Rings of cells: closed polygons that neither cross nor touch themselves."""

    points: np.ndarray
    """``(n, 2)`` int32: corners (y, x) of the pixel grid, pixel (0, 0) reaching from (0, 0) to (1, 1). The
    rings one after the other, each without its first point again at the end."""
    starts: np.ndarray
    """``(rings + 1,)`` int64: where each ring begins in `points`."""
    cell: np.ndarray
    """``(rings,)`` int64: place of the ring's cell among those that were asked for, ascending."""
    part: np.ndarray
    """``(rings,)`` int64: number of the part of its cell, from 0: pixels that share edges are one part."""
    hole: np.ndarray
    """``(rings,)`` bool: whether it goes round a hole. The first ring of a part is its outer one."""

    def polygons(self, cell: int) -> list[list[np.ndarray]]:
        """Parts of a cell, each as its outer ring followed by those of its holes: ``(n, 2)`` (y, x)."""
        rings = range(*np.searchsorted(self.cell, [cell, cell + 1]))
        parts: list[list[np.ndarray]] = []
        for ring in rings:
            if not self.hole[ring]:
                parts.append([])
            parts[-1].append(self.points[self.starts[ring] : self.starts[ring + 1]])
        return parts


def trace(
    labels: np.ndarray, ids: np.ndarray, boxes: np.ndarray, origin: tuple[int, int] = (0, 0)
) -> Outlines:
    """Outlines of the cells in a part of a label image.

    Parameters
    ----------
    labels : (h, w) array of integers
        Holds the cells whole.
    ids : (n,) int
        Labels of the cells.
    boxes : (n, 4) int
        Half-open boxes y0, x0, y1, x1 around the cells, in `labels`.
    origin : (y, x)
        Where `labels` begins in the whole image, whose coordinates the outlines have.

    Returns
    -------
    Outlines
        Outer rings run clockwise as seen on the screen, holes counter-clockwise.
    """
    ids, boxes = np.asarray(ids, np.int64), np.asarray(boxes, np.int64).reshape(-1, 4)
    points, starts, cell, part, hole = _trace(np.ascontiguousarray(labels), ids, boxes)
    points += np.array(origin, np.int32)
    return Outlines(points, starts, cell, part, hole)


def trace_all(labels: np.ndarray) -> tuple[np.ndarray, Outlines]:
    """Labels of a whole label image ``(Y, X)``, ascending, and their outlines."""
    from daskcell.segmentation.index import block_records

    records = block_records(labels)
    boxes = np.column_stack([records[name] for name in ("y0", "x0", "y1", "x1")])
    return records["label"], trace(labels, records["label"], boxes)


# Directions: 0 right, 1 down, 2 left, 3 up. The cell lies on the right hand.
_DY = np.array([0, 1, 0, -1])
_DX = np.array([1, 0, -1, 0])


@njit(cache=True, nogil=True)
def _trace(labels, ids, boxes):  # pragma: no cover (compiled)
    room = 1024
    points = np.empty((room, 2), np.int32)
    count = 0
    rings_room = 256
    starts = np.zeros(rings_room + 1, np.int64)
    cell = np.empty(rings_room, np.int64)
    part = np.empty(rings_room, np.int64)
    hole = np.empty(rings_room, np.bool_)
    rings = 0
    high, wide = 0, 0
    for i in range(len(ids)):
        high, wide = max(high, boxes[i, 2] - boxes[i, 0]), max(wide, boxes[i, 3] - boxes[i, 1])
    mask = np.zeros((high + 2, wide + 2), np.bool_)  # the cell, with a rim of background
    seen = np.zeros((high + 2, wide + 2), np.bool_)  # pixels whose upper edge has been followed
    last = np.full((high + 2, wide + 2), -1, np.int64)  # where a corner stands in the ring that is followed
    line = np.empty((4 * (high + 1) * (wide + 1), 2), np.int32)
    for i in range(len(ids)):
        y0, x0, y1, x1 = boxes[i]
        h, w = y1 - y0, x1 - x0
        mask[h + 1, : w + 2] = False
        for y in range(h):
            for x in range(w):
                mask[y + 1, x + 1] = labels[y0 + y, x0 + x] == ids[i]
                seen[y + 1, x + 1] = False
            mask[y + 1, w + 1] = False
        first_ring = rings
        first_point = count
        pixel = np.empty((64, 2), np.int64)  # of each ring a pixel that it goes along
        for y in range(1, h + 1):
            for x in range(1, w + 1):
                if not mask[y, x] or mask[y - 1, x] or seen[y, x]:
                    continue
                # Follow the ring from the upper left corner of this pixel, along its upper edge.
                length = 0
                cy, cx, direction = y, x, 0
                while True:
                    if direction == 0:
                        seen[cy, cx] = True
                    cy += _DY[direction]
                    cx += _DX[direction]
                    # Pixels ahead of the corner, on the right and the left hand.
                    if direction == 0:
                        right, left = mask[cy, cx], mask[cy - 1, cx]
                    elif direction == 1:
                        right, left = mask[cy, cx - 1], mask[cy, cx]
                    elif direction == 2:
                        right, left = mask[cy - 1, cx - 1], mask[cy, cx - 1]
                    else:
                        right, left = mask[cy - 1, cx], mask[cy - 1, cx - 1]
                    if right and not left:
                        ahead = direction
                    elif right:
                        ahead = (direction + 3) % 4
                    else:
                        ahead = (direction + 1) % 4
                    if ahead != direction:
                        line[length, 0], line[length, 1] = cy, cx
                        length += 1
                    direction = ahead
                    if cy == y and cx == x and direction == 0:
                        break
                # A corner that comes again closes a loop of its own.
                at = 0
                stack = 0
                while at < length or stack > 0:
                    begin, kept = 0, 0
                    if at < length:
                        ly, lx = line[at, 0], line[at, 1]
                        at += 1
                        begin, kept = last[ly, lx], 1  # the corner stays in the ring that goes on
                        if begin < 0:
                            last[ly, lx] = stack
                            line[stack, 0], line[stack, 1] = ly, lx
                            stack += 1
                            continue
                    size = stack - begin
                    if count + size > room:
                        room = 2 * max(room, size)
                        wider = np.empty((room, 2), np.int32)
                        wider[:count] = points[:count]
                        points = wider
                    area = 0
                    for k in range(size):
                        py, px = line[begin + k]
                        ny, nx = line[begin + (k + 1) % size]
                        area += px * ny - nx * py
                        points[count + k, 0] = py
                        points[count + k, 1] = px
                        if k >= kept:
                            last[py, px] = -1
                    stack = begin + kept
                    if rings == rings_room:
                        rings_room *= 2
                        more = np.zeros(rings_room + 1, np.int64)
                        more[: rings + 1] = starts[: rings + 1]
                        starts = more
                        other = np.empty(rings_room, np.int64)
                        other[:rings] = cell[:rings]
                        cell = other
                        other = np.empty(rings_room, np.int64)
                        other[:rings] = part[:rings]
                        part = other
                        flags = np.empty(rings_room, np.bool_)
                        flags[:rings] = hole[:rings]
                        hole = flags
                    own = rings - first_ring
                    if own == len(pixel):
                        longer = np.empty((2 * own, 2), np.int64)
                        longer[:own] = pixel
                        pixel = longer
                    pixel[own, 0], pixel[own, 1] = y, x
                    cell[rings] = i
                    part[rings] = 0
                    hole[rings] = area < 0
                    count += size
                    rings += 1
                    starts[rings] = count
        if rings - first_ring > 1:
            _arrange(mask, pixel, points, starts, part, hole, first_ring, rings)
        for k in range(first_point, count):
            points[k, 0] += y0 - 1
            points[k, 1] += x0 - 1
    return (
        points[:count].copy(),
        starts[: rings + 1].copy(),
        cell[:rings].copy(),
        part[:rings].copy(),
        hole[:rings].copy(),
    )


@njit(cache=True, nogil=True)
def _arrange(mask, pixel, points, starts, part, hole, first, stop):  # pragma: no cover (compiled)
    """Number the parts of a cell, and put each one's outer ring before those of its holes."""
    number = np.full(mask.shape, -1, np.int64)
    todo = np.empty((mask.size, 2), np.int64)
    count = stop - first
    parts = 0
    for ring in range(count):
        y, x = pixel[ring]
        if number[y, x] < 0:
            number[y, x] = parts
            todo[0, 0], todo[0, 1] = y, x
            waiting = 1
            while waiting:
                waiting -= 1
                ty, tx = todo[waiting]
                for direction in range(4):
                    ny, nx = ty + _DY[direction], tx + _DX[direction]
                    if mask[ny, nx] and number[ny, nx] < 0:
                        number[ny, nx] = parts
                        todo[waiting, 0], todo[waiting, 1] = ny, nx
                        waiting += 1
            parts += 1
        part[first + ring] = number[y, x]
    order = np.empty(count, np.int64)
    filled = 0
    for which in range(parts):
        for inner in range(2):
            for ring in range(count):
                if part[first + ring] == which and hole[first + ring] == (inner == 1):
                    order[filled] = ring
                    filled += 1
    begin = starts[first]
    old_points = points[begin : starts[stop]].copy()
    old_starts = starts[first : stop + 1] - begin
    old_starts = old_starts.copy()
    old_part = part[first:stop].copy()
    old_hole = hole[first:stop].copy()
    at = begin
    for place in range(count):
        ring = order[place]
        for k in range(old_starts[ring], old_starts[ring + 1]):
            points[at, 0] = old_points[k, 0]
            points[at, 1] = old_points[k, 1]
            at += 1
        starts[first + place + 1] = at
        part[first + place] = old_part[ring]
        hole[first + place] = old_hole[ring]
