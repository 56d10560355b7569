"""Pictures of blobs, and a network that needs no training to find them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class BlobNetwork(nn.Module):
    """Flows uphill on a blurred picture: Cellpose's inputs and outputs, fixed weights, any channels."""

    def __init__(self, sigma: float = 4.0, level: float = 0.25):
        super().__init__()
        radius = int(3 * sigma)
        x = torch.arange(-radius, radius + 1, dtype=torch.float32)
        kernel = torch.exp(-(x**2) / (2 * sigma**2))
        self.register_buffer("kernel", kernel / kernel.sum())
        self.level = level
        self.tiles = 0

    @property
    def device(self) -> torch.device:
        return self.kernel.device

    @property
    def dtype(self) -> torch.dtype:
        return self.kernel.dtype

    def forward(self, x):
        self.tiles += len(x)
        x = x.mean(dim=1, keepdim=True)
        pad = len(self.kernel) // 2
        x = F.conv2d(x, self.kernel[None, None, :, None], padding=(pad, 0))
        x = F.conv2d(x, self.kernel[None, None, None, :], padding=(0, pad))
        dy = F.pad(x, (0, 0, 1, 1), mode="replicate")
        dy = dy[:, :, 2:] - dy[:, :, :-2]
        dx = F.pad(x, (1, 1, 0, 0), mode="replicate")
        dx = dx[..., 2:] - dx[..., :-2]
        norm = torch.sqrt(dy**2 + dx**2) + 1e-3
        y = torch.cat([5 * dy / norm, 5 * dx / norm, 20 * (x - self.level)], dim=1)
        return y, torch.zeros(len(x), 256)


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
