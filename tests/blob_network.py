"""A network that needs no training to find blobs; see `blobs.BlobNetwork`, which imports torch when asked."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class BlobNetwork(nn.Module):
    """Flows uphill on a blurred image: Cellpose's inputs and outputs, fixed weights, any channels."""

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
