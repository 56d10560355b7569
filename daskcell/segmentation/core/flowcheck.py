"""Cellpose's check of each mask: do its own flows agree with the network's?

Heat is spread from each mask's centre inside the mask; its gradient is the flow that the mask would have; the
mean squared difference to the network's flow is the mask's error (`cellpose.dynamics.remove_bad_flow_masks`).

Cellpose spreads heat in all masks of the image at once, for twice the largest extent of any of them: that
number is one of the whole image's and is handed in. At a border between two touching masks its gradient
mixes the heat of both, so the heat of neighbours is made too. Each mask is spread in its own box, which stays
in the cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit


def extent(boxes: np.ndarray, wanted: np.ndarray) -> int:
    """Largest height + width + 2 of the `wanted` labels; half the steps of the diffusion."""
    sides = (boxes[:, 2] - boxes[:, 0]) + (boxes[:, 3] - boxes[:, 1]) + 2
    return int(sides[wanted].max(initial=0))


def flow_errors(
    labels: np.ndarray, flows: np.ndarray, boxes: np.ndarray, wanted: np.ndarray, steps: int
) -> np.ndarray:
    """Flow error of the `wanted` labels.

    Parameters
    ----------
    labels : (h, w) int32
        Must hold all labels that touch a wanted one, whole.
    flows : (2, h, w) float32
        The network's flows (five times the unit vector).
    boxes : (n, 4) int
        ``y0, x0, y1, x1`` of label ``i + 1``.
    wanted : (n,) bool
    steps : int
        Steps of the diffusion: twice the largest `extent` in the whole image.

    Returns
    -------
    (n,) float64, NaN for labels not wanted
    """
    heat = np.zeros((labels.shape[0] + 2, labels.shape[1] + 2))
    near = wanted | touching(labels, wanted)
    _spread(labels, boxes, near, steps, heat)
    return np.asarray(_errors(labels, flows, boxes, wanted, heat))


@njit(cache=True, nogil=True)
def touching(labels, wanted):  # pragma: no cover - compiled
    out = np.zeros_like(wanted)
    rows, columns = labels.shape
    for y in range(rows):
        for x in range(columns):
            a = labels[y, x]
            if a == 0:
                continue
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < rows and u < columns:
                    b = labels[v, u]
                    if b > 0 and b != a:
                        if wanted[a - 1]:
                            out[b - 1] = True
                        if wanted[b - 1]:
                            out[a - 1] = True
    return out


@njit(cache=True, nogil=True)
def _centre(labels, label, box):  # pragma: no cover - compiled
    """The mask's pixel nearest to its rounded centre of mass; of equals the first in reading order."""
    total_y = total_x = count = 0
    for y in range(box[0], box[2]):
        for x in range(box[1], box[3]):
            if labels[y, x] == label:
                total_y += y - box[0]
                total_x += x - box[1]
                count += 1
    middle_y, middle_x = int(np.round(total_y / count)) + box[0], int(np.round(total_x / count)) + box[1]
    best, best_y, best_x = np.int64(2**62), 0, 0
    for y in range(box[0], box[2]):
        for x in range(box[1], box[3]):
            if labels[y, x] == label:
                distance = (y - middle_y) ** 2 + (x - middle_x) ** 2
                if distance < best:
                    best, best_y, best_x = distance, y, x
    return best_y, best_x


@njit(cache=True, nogil=True)
def _spread(labels, boxes, near, steps, heat):  # pragma: no cover - compiled
    for index in range(len(boxes)):
        if not near[index]:
            continue
        box = boxes[index]
        rows, columns = box[2] - box[0], box[3] - box[1]
        share = np.zeros((rows, columns))
        for y in range(rows):
            for x in range(columns):
                if labels[box[0] + y, box[1] + x] == index + 1:
                    share[y, x] = 1.0 / 9.0
        centre_y, centre_x = _centre(labels, index + 1, box)
        centre_y, centre_x = centre_y - box[0], centre_x - box[1]
        # One spare row and column all round are always cold, so the inner loops need no test and vectorise.
        now = np.zeros((rows + 2, columns + 2))
        across = np.zeros((rows + 2, columns))
        for _ in range(steps):
            now[centre_y + 1, centre_x + 1] += 1
            for y in range(1, rows + 1):
                for x in range(columns):
                    across[y, x] = now[y, x] + now[y, x + 1] + now[y, x + 2]
            for y in range(rows):
                for x in range(columns):
                    now[y + 1, x + 1] = (across[y, x] + across[y + 1, x] + across[y + 2, x]) * share[y, x]
        for y in range(rows):
            for x in range(columns):
                if share[y, x] > 0:
                    heat[box[0] + y + 1, box[1] + x + 1] = now[y + 1, x + 1]


@njit(cache=True, nogil=True)
def _errors(labels, flows, boxes, wanted, heat):  # pragma: no cover - compiled
    out = np.full(len(boxes), np.nan)
    for index in range(len(boxes)):
        if not wanted[index]:
            continue
        box = boxes[index]
        total, count = 0.0, 0
        for y in range(box[0], box[2]):
            for x in range(box[1], box[3]):
                if labels[y, x] != index + 1:
                    continue
                dy = heat[y + 2, x + 1] - heat[y, x + 1]
                dx = heat[y + 1, x + 2] - heat[y + 1, x]
                norm = 1e-60 + np.sqrt(dy * dy + dx * dx)
                dy = dy / norm - np.float64(flows[0, y, x] / np.float32(5))
                dx = dx / norm - np.float64(flows[1, y, x] / np.float32(5))
                total += dy * dy + dx * dx
                count += 1
        out[index] = total / count
    return out
