"""Images of blobs, and a network that needs no training to find them."""

from __future__ import annotations

from typing import Any

import numpy as np


def BlobNetwork(sigma: float = 4.0, level: float = 0.25) -> Any:
    """A `blob_network.BlobNetwork`; torch is imported when it is called, and not with the test file."""
    import blob_network

    return blob_network.BlobNetwork(sigma, level)


def blobs(
    shape: tuple[int, int], seed: int = 0, radius: float = 8.0, density: float = 0.004, noise: float = 0.03
):
    """Bright discs of varying size, many touching, on a noisy ground: ``(Y, X)`` float32."""
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, np.float32)
    for _ in range(max(1, int(density * shape[0] * shape[1] * 64 / radius**2))):
        y, x = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        r = radius * rng.uniform(0.6, 1.4)
        top, left = max(0, int(y - 3 * r)), max(0, int(x - 3 * r))
        yy, xx = np.mgrid[top : min(shape[0], int(y + 3 * r) + 1), left : min(shape[1], int(x + 3 * r) + 1)]
        bump = rng.uniform(0.6, 1.0) / (1 + np.exp((np.hypot(yy - y, xx - x) - r) / 1.2))
        part = image[top : top + yy.shape[0], left : left + yy.shape[1]]
        np.maximum(part, bump, out=part)
    return image + rng.normal(0, noise, shape).astype(np.float32)


def same_cells(a: np.ndarray, b: np.ndarray) -> tuple[int, int, int]:
    """Pixel-identical cells of two label images, and how many each has."""
    pairs, counts = np.unique(np.stack([a.ravel(), b.ravel()]).astype(np.int64), axis=1, return_counts=True)
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    same = (pairs > 0).all(axis=0) & (size_a[pairs[0]] == counts) & (size_b[pairs[1]] == counts)
    return int(same.sum()), int((size_a[1:] > 0).sum()), int((size_b[1:] > 0).sum())


def cell_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each cell of `b` the best IoU with a cell of `a`; above 0.5 no other has the same partner."""
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    pairs, counts = np.unique(np.stack([a.ravel(), b.ravel()]).astype(np.int64), axis=1, return_counts=True)
    pairs, counts = pairs[:, (pairs > 0).all(axis=0)], counts[(pairs > 0).all(axis=0)]
    best = np.zeros(len(size_b))
    np.maximum.at(best, pairs[1], counts / (size_a[pairs[0]] + size_b[pairs[1]] - counts))
    return best[1:][size_b[1:] > 0]
