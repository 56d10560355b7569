"""Outlines of whole cells in stained blood smears, by watershed: masks to train on where nobody drew any.

The stain tells nuclei, cytoplasm and red cells apart, and the glass between them is nearly empty, so a
watershed in optical density outlines white cells nearly as a person does. A network that learns from such
masks smooths their blunders and carries over to other stains.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.measure import label
from skimage.morphology import remove_small_holes
from skimage.segmentation import watershed

VERSION = 1
"""Rises whenever the outlines of an image change."""
WHITE_CELL = 130.0
"""Diameter of a white cell in pixels at which the lengths below are given."""
_CLIP = np.array([0.25, 0.35, 0.35])
"""Density per colour above which contrast is left out: outlines of nuclei would hold the flood back."""


def outline_smear(image: np.ndarray, white_cell: float = WHITE_CELL) -> tuple[np.ndarray, np.ndarray]:
    """Whole cells, red and white, of a smear with Giemsa's or a like stain.

    Parameters
    ----------
    image : (Y, X, 3) uint8
        Bright field, red, green, blue.
    white_cell
        Diameter of a white cell in pixels; about twice that of a red one.

    Returns
    -------
    cells : (Y, X) int32
        Labels of whole cells, 0 background.
    nuclei : (Y, X) int32
        Labels of the white cells' nuclei, with the numbers of their cells.
    """
    s = white_cell / WHITE_CELL
    density = optical_density(image)
    smooth = ndimage.gaussian_filter(density, (1.0 * s, 1.0 * s, 0))
    cells = _foreground(density, s)
    nuclei = _nuclei(smooth, cells, s)
    from_nucleus = ndimage.distance_transform_edt(nuclei == 0) if nuclei.any() else np.full(cells.shape, 1e3)
    markers = nuclei + np.where(nuclei > 0, 0, _red_cores(smooth, cells, nuclei, from_nucleus, s))
    clipped = np.minimum(smooth, _CLIP)
    slope = np.sqrt(sum(ndimage.sobel(clipped, axis) ** 2 for axis in (0, 1)).max(axis=-1)) / 8
    landscape = slope + 0.0008 * np.minimum(from_nucleus, 40 * s) / s
    return _tidy(watershed(landscape, markers, mask=cells | (nuclei > 0)), nuclei, s), nuclei


def optical_density(image: np.ndarray) -> np.ndarray:
    """Density ``(Y, X, 3)`` float32 over the image's own background, which may bend across it."""
    darkest = ndimage.gaussian_filter(image.min(axis=-1).astype(np.float32), 1.5)
    counts, edges = np.histogram(darkest, 128, (0, 256))
    counts = ndimage.gaussian_filter1d(counts.astype(float), 1.5)
    peaks = [
        i
        for i in range(128)
        if counts[i] >= 0.12 * counts.max() and counts[i] == counts[max(0, i - 2) : i + 3].max()
    ]
    peak = peaks[-1]
    beyond = np.flatnonzero(counts[peak:] < counts[peak] / 2)
    half = 2.0 * (beyond[0] if len(beyond) else 1)  # two grey levels a bin
    ground = darkest > edges[peak] + 1 - 2.2 * max(half, 2.0)
    return -np.log10((image + 1.0) / (_background(image, ground) + 1)).astype(np.float32)


def _background(image: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """A quadratic surface through the empty glass, its median in small images."""
    if min(ground.shape) < 300:
        return np.median(image[ground], axis=0)
    y, x = (np.linspace(-1, 1, n) for n in ground.shape)
    y, x = np.broadcast_arrays(y[:, None], x)
    terms = np.stack([np.ones_like(y), y, x, y * x, y * y, x * x], -1)
    rows = np.flatnonzero(ground)[:: max(1, int(ground.sum()) // 20_000)]
    known, values = terms.reshape(-1, 6)[rows], image.reshape(-1, 3)[rows].astype(float)
    for _ in range(3):  # debris on the glass does not pull at the surface
        found = np.linalg.lstsq(known, values, rcond=None)[0]
        far = np.abs(known @ found - values).max(axis=1)
        near = far <= 3 * np.median(far) + 1
        known, values = known[near], values[near]
    return terms @ found


def _foreground(density: np.ndarray, s: float) -> np.ndarray:
    strongest = ndimage.gaussian_filter(density, (1.5 * s, 1.5 * s, 0)).max(axis=-1)
    limit = np.clip(0.85 * threshold_otsu(np.clip(strongest, 0, 0.2)), 0.035, 0.09)
    cells = _opened(strongest > limit, 2 * s)
    return remove_small_holes(cells, max_size=int(1800 * s * s))  # the pallor of red cells


def _nuclei(density: np.ndarray, cells: np.ndarray, s: float) -> np.ndarray:
    stain = density[..., 0] + density[..., 1] - density[..., 2]
    dense = stain[cells]
    limit = max(0.2, threshold_otsu(dense)) if dense.size and np.ptp(dense) > 0 else np.inf
    parts = ndimage.binary_fill_holes(_opened(stain > limit, 2 * s))
    names = label(parts)
    sizes = np.bincount(names.ravel())
    sizes[0] = 0
    parts = (sizes > 120 * s * s)[names]
    # Lobes of one nucleus lie closer together than nuclei of neighbours.
    near = ndimage.distance_transform_edt(~parts) <= 12 * s if parts.any() else parts
    joined = label(near) * parts
    sizes = np.bincount(joined.ravel())
    kept = sizes >= 350 * s * s
    kept[0] = False
    return (np.cumsum(kept) * kept)[joined].astype(np.int32)


def _red_cores(
    density: np.ndarray, cells: np.ndarray, nuclei: np.ndarray, from_nucleus: np.ndarray, s: float
) -> np.ndarray:
    """Middles of cells without a nucleus, numbered after the nuclei."""
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(np.pad(cells, 1))[1:-1, 1:-1], 2 * s)
    peaks = peak_local_max(
        depth, min_distance=max(2, round(12 * s)), labels=cells.astype(int), exclude_border=False
    )
    seeds = np.zeros(cells.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    basins = watershed(-depth, seeds, mask=cells)
    nucleus_sizes = np.bincount(nuclei.ravel(), minlength=1)
    ring = (from_nucleus > 3 * s) & (from_nucleus <= 12 * s) & cells
    far = (from_nucleus > 45 * s) & cells
    plasma, others = (np.median(density[part], axis=0) if part.any() else None for part in (ring, far))
    cores = np.zeros_like(nuclei)
    count = int(nuclei.max())
    for i, box in enumerate(ndimage.find_objects(basins), start=1):
        if box is None:
            continue
        inside = basins[box] == i
        shared = np.bincount(nuclei[box][inside], minlength=len(nucleus_sizes))[1:]
        if (shared >= 0.15 * nucleus_sizes[1:]).any() and shared.any():
            continue
        if plasma is not None and others is not None and from_nucleus[box][inside].min() <= 12 * s:
            own = np.median(density[box][inside], axis=0)
            if np.abs(own - plasma).sum() < np.abs(own - others).sum():
                continue
        count += 1
        cores[box][inside & (depth[box] > 0.7 * depth[box][inside].max())] = count
    return cores


def _tidy(cells: np.ndarray, nuclei: np.ndarray, s: float) -> np.ndarray:
    """Outlines without threads and crumbs, and every cell with its nucleus."""
    tidy = np.zeros(cells.shape, np.int32)
    reach = int(np.ceil(6 * s)) + 1
    for i, box in enumerate(ndimage.find_objects(cells), start=1):
        if box is None:
            continue
        grown = tuple(
            slice(max(0, b.start - reach), min(n, b.stop + reach))
            for b, n in zip(box, cells.shape, strict=True)
        )
        mask = _opened(cells[grown] == i, 5.5 * s) | (nuclei[grown] == i)
        names = label(mask, connectivity=1)
        if not names.any():
            continue
        sizes = np.bincount(names.ravel())
        sizes[0] = 0
        mask = ndimage.binary_fill_holes(names == sizes.argmax())
        if mask.sum() >= 350 * s * s:
            tidy[grown][mask & (tidy[grown] == 0)] = i
    return tidy


def _opened(mask: np.ndarray, radius: float) -> np.ndarray:
    """Opening by a disc; the image goes on beyond its border."""
    if not mask.any():
        return mask
    width = int(np.ceil(radius)) + 1
    padded = np.pad(mask, width, mode="edge")
    eroded = ndimage.distance_transform_edt(padded) > radius
    if not eroded.any():
        return np.zeros_like(mask)
    opened = ndimage.distance_transform_edt(~eroded) <= radius
    return opened[width:-width, width:-width]
