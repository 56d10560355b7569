"""What the encoder sees of a crop: signal above the background, and the parts of the cell."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def signal_of(x: Tensor) -> Tensor:
    """Crops 0..1 to signal: 0 at the background's colour, about 1 for a strong stain, from -0.5 to 1.5.

    The background is the median of the border. Where it is bright (stained cells), the signal is the optical
    density, 1 where a fifth of the light is left; where it is dark, the light above it.
    """
    height, width = x.shape[-2:]
    ring = torch.ones(height, width, dtype=torch.bool, device=x.device)
    ring[2:-2, 2:-2] = False
    return signal_above(x, x[:, :, ring].median(2).values[..., None, None])


def signal_above(x: Tensor, ground: Tensor) -> Tensor:
    """`signal_of` above a known background: ``(N, 3, H, W)`` and ``(N, 3, 1, 1)``, both 0..1."""
    light = (x - ground) / (1 - ground).clamp_min(0.2)
    density = torch.log(ground.clamp_min(0.05) / x.clamp_min(0.02)) / math.log(5)
    bright = ground.mean(1, keepdim=True) > 0.5
    return torch.where(bright, density, light).clamp(-0.5, 1.5)


def cell_regions(signal: Tensor) -> Tensor:
    """The cell, its stronger part and its weaker part ``(N, 3, H, W)``; the cell is what differs from 0."""
    cell = (signal.abs().amax(1) > 0.004).to(signal.dtype)
    total = signal.sum(1)
    area = cell.sum((1, 2), keepdim=True).clamp_min(1)
    mean = (total * cell).sum((1, 2), keepdim=True) / area
    deviation = (((total - mean) * cell) ** 2).sum((1, 2), keepdim=True).div(area).clamp_min(1e-6).sqrt()
    core = cell * torch.sigmoid(4 * ((total - mean) / deviation - 0.3))
    return torch.stack([cell, core, cell - core], 1)


def as_input(crops: np.ndarray) -> Tensor:
    """Crops as the network takes them: float32; bytes are divided by 255."""
    x = torch.from_numpy(np.require(crops, requirements=["C", "W"]))  # mapped files cannot be written to
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()
