"""Watershed without seams: one threshold, basins by steepest ascent, and two cures for over-segmentation.

Flooding from markers in the order of a queue, as the usual implementations do, lets far pixels decide ties.
Here every pixel climbs the distance transform by itself, to the neighbour that is highest (of equals the
first in reading order), until it stands on a peak; a peak with a higher one within `min_distance` in line of
sight climbs on to that. So a label depends only on what lies along its climb, and a block can tell whether
all of that was in sight.

Cures (the names are from the method's first report): morphological opening before; and joining similar
sub-regions after, by single-linkage clustering of neighbouring basins whose shared border is nearly as high,
and nearly as bright, as they are themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numba import njit

from daskcell.config import WatershedSettings
from daskcell.geometry import Box
from daskcell.preprocess.signal import SIGMAS, Signal, bin_values, find_signal
from daskcell.segmentation.core import dynamics
from daskcell.segmentation.image_params import merge_observed
from daskcell.segmentation.methods.base import BoxLabels, Method, Read, count_values, sample


@dataclass(frozen=True)
class WatershedParams:
    """Facts of one image: intensity range, polarity and threshold (on the 0-1 scale)."""

    shape: tuple[int, int]
    low: float
    high: float
    dark: bool
    threshold: float

    def foreground(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cell pixels ``(h, w)`` bool, and brightness (cells bright) ``(h, w)`` float32."""
        scaled = (gray(part) - np.float32(self.low)) / np.float32(max(self.high - self.low, 1e-12))
        scaled = np.clip(1 - scaled if self.dark else scaled, 0, 1)
        return scaled > np.float32(self.threshold), scaled


@dataclass
class WatershedMethod(Method):
    """Threshold, opening, distance transform, basins, joining."""

    settings: WatershedSettings = field(default_factory=WatershedSettings)
    halo: int = 96

    def observe(self, block: np.ndarray, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
        grey = gray(block)[None]
        return [*sample(grey, box, shape), count_values(grey, box)]

    def merge(self, observed: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        return merge_observed(observed)

    def fit(self, observed: list[np.ndarray], shape: tuple[int, int]) -> WatershedParams:
        """Range, polarity and Otsu's threshold of the whole image (of a strided sample, if it is large).

        Of the signal alone (see `daskcell.preprocess.signal`): without padding, and where nearly all is
        background, which Otsu would cut in two, half way from there to the cells.
        """
        from skimage.filters import threshold_otsu

        values, counts = observed
        signal = find_signal(counts[0], bin_values(values.dtype))
        if signal is not None:
            values = signal.without_padding(values)
        low, middle, high = (float(v) for v in np.percentile(values, (0.1, 50, 99.9)))
        sparse = False
        if signal is not None:
            usual, (low, high) = (low, high), signal.widen(low, high)
            sparse = usual != (low, high)
        dark = self.settings.dark if self.settings.dark != "auto" else middle > (low + high) / 2
        if high <= low:
            return WatershedParams(shape, low, high, bool(dark), 1.0)
        scaled = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
        threshold = self.settings.threshold
        if threshold is None:
            threshold = float(threshold_otsu(1 - scaled if dark else scaled))
            if signal is not None:
                level = low + (1 - threshold if dark else threshold) * (high - low)
                if sparse or (signal.even and abs(level - signal.ground) < SIGMAS * signal.noise):
                    threshold = _half_way(signal, low, high, bool(dark))
        return WatershedParams(shape, low, high, bool(dark), threshold)

    def dump_params(self, params: WatershedParams) -> dict[str, Any]:
        return asdict(params)

    def load_params(self, values: dict[str, Any]) -> WatershedParams:
        return WatershedParams(**values | {"shape": (values["shape"][0], values["shape"][1])})

    def segment_box(
        self,
        box: Box,
        read: Read,
        params: WatershedParams,
        shape: tuple[int, int],
        outputs: Mapping[int, np.ndarray],
    ) -> BoxLabels:
        return BoxLabels(*basins(*params.foreground(read(box)), box, params.shape, self.settings))


def _half_way(signal: Signal, low: float, high: float, dark: bool) -> float:
    """Threshold on the 0-1 scale between the ground and the cells; 1 where there are none."""
    core = signal.core(50, dark=dark)
    if core is None:
        return 1.0
    level = ((signal.ground + core) / 2 - low) / (high - low)
    return float(np.clip(1 - level if dark else level, 0, 1))


def gray(part: np.ndarray) -> np.ndarray:
    """Mean of the channels ``(h, w)`` float32, summed in their order."""
    total = part[0].astype(np.float32)
    for plane in part[1:]:
        total += plane.astype(np.float32)
    return total / np.float32(len(part))


def basins(
    cells: np.ndarray, bright: np.ndarray, box: Box, shape: tuple[int, int], settings: WatershedSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Label the cells of a part of an image.

    Parameters
    ----------
    cells : (h, w) bool
        Pixels above the threshold.
    bright : (h, w) float32
        Their brightness, 0 to 1.
    box : Box
        Where the part lies.
    shape : (Y, X)
        Size of the whole image.

    Returns
    -------
    labels : (h, w) int32, in reading order
    unsafe : (h, w) bool, where the label depends on what lies outside the part
    """
    from scipy import ndimage
    from skimage.morphology import disk

    radius = settings.opening
    if radius:
        # Beyond the image counts as cell for the erosion, so that cells at its border stay whole.
        eroded = ndimage.binary_erosion(cells, disk(radius), border_value=1)
        cells = ndimage.binary_dilation(eroded, disk(radius))
    unknown = _distance_to_outside(box, shape) - 2 * radius
    padded = np.pad(cells, 1, constant_values=True)
    height = ndimage.distance_transform_edt(padded)[1:-1, 1:-1].astype(np.float32)
    if not cells.any():
        return np.zeros(box.shape, np.int32), cells & (unknown <= 0)
    # Seen with more around it, a pixel could be nearer to the background than it seems.
    doubtful = cells & (height > unknown)
    root, tainted = _climb(height, cells, doubtful, settings.min_distance)
    labels = (root + 1).astype(np.int32)
    dynamics.renumber(labels)
    unsafe_label = np.zeros(labels.max() + 1, bool)
    unsafe_label[labels[tainted]] = True
    if settings.merge:
        joined = _join(labels, height, bright, settings.merge_similarity)
        beside = np.zeros_like(unsafe_label)
        _mark_beside(labels, unsafe_label, beside)
        basin_unsafe = np.zeros_like(unsafe_label)
        np.logical_or.at(basin_unsafe, joined, unsafe_label | beside)
        labels = joined[labels]
        unsafe_label = basin_unsafe
        unsafe = unsafe_label[labels] & (labels > 0)
        dynamics.renumber(labels)
    else:
        unsafe = unsafe_label[labels] & (labels > 0)
    return labels, unsafe | ((unknown <= 0) & (labels == 0))


def _distance_to_outside(box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Distance of each pixel to the nearest pixel of the image that is not box."""
    far = float(sum(shape))
    sides = []
    for start, stop, side in ((box.y0, box.y1, shape[0]), (box.x0, box.x1, shape[1])):
        place = np.arange(stop - start, dtype=np.float64)
        before = place + 1 if start > 0 else np.full(len(place), far)
        after = place[::-1] + 1 if stop < side else np.full(len(place), far)
        sides.append(np.minimum(before, after))
    return np.minimum(sides[0][:, None], sides[1][None, :])


@njit(cache=True, nogil=True)
def _climb(height, cells, doubtful, reach):  # pragma: no cover - compiled
    """Index of the peak each cell pixel climbs to (-1: background); whether a doubtful pixel had a say."""
    rows, columns = height.shape
    up = np.full(rows * columns, -1, np.int64)
    taint = np.zeros(rows * columns, np.bool_)
    for y in range(rows):
        for x in range(columns):
            if not cells[y, x]:
                continue
            best, best_y, best_x = height[y, x], y, x
            for v in range(max(0, y - 1), min(rows, y + 2)):
                for u in range(max(0, x - 1), min(columns, x + 2)):
                    if cells[v, u]:
                        taint[y * columns + x] |= doubtful[v, u]
                        if height[v, u] > best or (
                            height[v, u] == best and (v < best_y or (v == best_y and u < best_x))
                        ):
                            best, best_y, best_x = height[v, u], v, u
            up[y * columns + x] = best_y * columns + best_x
    for place in range(rows * columns):
        if up[place] != place:
            continue
        y, x = place // columns, place % columns
        best, best_y, best_x = height[y, x], y, x
        for v in range(max(0, y - reach), min(rows, y + reach + 1)):
            for u in range(max(0, x - reach), min(columns, x + reach + 1)):
                if not cells[v, u]:
                    continue
                taint[place] |= doubtful[v, u]
                higher = height[v, u] > best or (
                    height[v, u] == best and (v < best_y or (v == best_y and u < best_x))
                )
                if higher and _in_sight(cells, y, x, v, u):
                    best, best_y, best_x = height[v, u], v, u
        up[place] = best_y * columns + best_x
    root = np.full((rows, columns), -1, np.int64)
    tainted = np.zeros((rows, columns), np.bool_)
    for y in range(rows):
        for x in range(columns):
            if not cells[y, x]:
                continue
            place = y * columns + x
            bad = taint[place]
            while up[place] != place:
                place = up[place]
                bad |= taint[place]
            root[y, x] = place
            tainted[y, x] = bad
    return root, tainted


@njit(cache=True, nogil=True)
def _in_sight(cells, y, x, v, u):  # pragma: no cover - compiled
    steps = max(abs(v - y), abs(u - x))
    for n in range(1, steps):  # noqa: SIM110 - numba has no all()
        if not cells[y + (v - y) * n // steps, x + (u - x) * n // steps]:
            return False
    return True


@njit(cache=True, nogil=True)
def _join(labels, height, bright, similarity):  # pragma: no cover - compiled
    """Representative of each label after joining similar neighbours (single linkage)."""
    rows, columns = labels.shape
    count = labels.max() + 1
    peak = np.zeros(count, np.float32)
    inner = np.zeros(count, np.float32)
    for y in range(rows):
        for x in range(columns):
            label = labels[y, x]
            if label > 0 and height[y, x] > peak[label]:
                peak[label], inner[label] = height[y, x], bright[y, x]
    saddle = {}
    glow = {}
    for y in range(rows):
        for x in range(columns):
            a = labels[y, x]
            if a == 0:
                continue
            for v, u in ((y, x + 1), (y + 1, x - 1), (y + 1, x), (y + 1, x + 1)):
                if v < rows and u >= 0 and u < columns:
                    b = labels[v, u]
                    if b > 0 and b != a:
                        pair = (min(a, b), max(a, b))
                        low = min(height[y, x], height[v, u])
                        light = min(bright[y, x], bright[v, u])
                        if pair not in saddle:
                            saddle[pair], glow[pair] = low, light
                        else:
                            saddle[pair] = max(saddle[pair], low)
                            glow[pair] = max(glow[pair], light)
    parent = np.arange(count).astype(np.int32)
    for pair in saddle:
        a, b = pair
        if saddle[pair] >= similarity * min(peak[a], peak[b]) and glow[pair] >= similarity * min(
            inner[a], inner[b]
        ):
            while parent[a] != a:
                a = parent[a]
            while parent[b] != b:
                b = parent[b]
            parent[max(a, b)] = min(a, b)
    for label in range(count):
        root = label
        while parent[root] != root:
            root = parent[root]
        parent[label] = root
    return parent


@njit(cache=True, nogil=True)
def _mark_beside(labels, marked, beside):  # pragma: no cover - compiled
    rows, columns = labels.shape
    for y in range(rows):
        for x in range(columns):
            a = labels[y, x]
            if a == 0:
                continue
            for v, u in ((y, x + 1), (y + 1, x - 1), (y + 1, x), (y + 1, x + 1)):
                if v < rows and u >= 0 and u < columns:
                    b = labels[v, u]
                    if b > 0 and b != a:
                        beside[a] |= marked[b]
                        beside[b] |= marked[a]
