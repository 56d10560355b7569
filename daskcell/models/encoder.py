"""The embedded encoder's network: a small ResNet whose feature maps are pooled over parts of the cell.

**Input.** Crops ``(N, 3, H, W)`` float from 0 to 1, fitted to the cell, with neighbours and surroundings
blanked out by the background's colour. The background is read from the crop's own border. Light above a dark
background, or optical density relative to a bright one, is what the network sees (`signal_of`), so
fluorescence and stained cells look alike. Made for 64 x 64 pixels; any size of at least 16 works.

**Pooling.** Mean and deviation over the cell, and the means over its stronger and its weaker part, of the
maps of every stage. Region pooling gave most of what separates stained blood cells; a plain mean over the
crop loses it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

KIND = "daskcell-tiny-encoder-1"
SIZE = 64
DIMENSIONS = 192


class TinyEncoder(nn.Module):
    """ResNet of 0.7 million parameters in four stages, and a fixed linear map to `dim` numbers.

    The linear map (principal axes, turned so that all numbers weigh about the same) is fitted after training
    with `fit_projection`; it is part of the weights.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 112, 176), dim: int = DIMENSIONS):
        super().__init__()
        self.widths, self.dim, self.size = tuple(widths), dim, SIZE
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        inputs = (widths[0], *widths)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip(inputs, widths, strict=False))
        pooled = 4 * sum(widths)
        self.centre: Tensor
        self.scale: Tensor
        self.axes: Tensor
        # Normalisation of the input, as for other encoders: none.
        self.mean = self.std = None
        self.register_buffer("centre", torch.zeros(pooled))
        self.register_buffer("scale", torch.ones(pooled))
        self.register_buffer("axes", torch.eye(pooled)[:dim].clone())
        self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.axes.device

    @property
    def dtype(self) -> torch.dtype:
        return self.axes.dtype

    def stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the four stages, at 1/2, 1/4, 1/8 and 1/16 of the input's sides."""
        maps = []
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(F.avg_pool2d(x, 2, ceil_mode=True))
            maps.append(x)
        return maps

    def pooled(self, x: Tensor) -> Tensor:
        """Region-pooled maps of all stages, ``(N, 4 * sum(widths))``: the vector before the linear map."""
        return self.pooled_signal(signal_of(x))

    def pooled_signal(self, signal: Tensor) -> Tensor:
        """`pooled` of what `signal_of` gives."""
        regions = cell_regions(signal)
        parts = []
        for maps in self.stages(signal):
            weights = F.adaptive_avg_pool2d(regions, (maps.shape[-2], maps.shape[-1])).flatten(2)
            weights = weights / weights.sum(2, keepdim=True).clamp_min(1e-6)
            flat = maps.float().flatten(2)
            means = torch.einsum("nrp,ncp->nrc", weights, flat)
            square = torch.einsum("np,ncp->nc", weights[:, 0], flat * flat)
            deviation = (square - means[:, 0] ** 2).clamp_min(1e-8).sqrt()
            parts.append(torch.cat([means.flatten(1), deviation], 1))
        return torch.cat(parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, dim)``; see the module's text for what the input must be."""
        standard = ((self.pooled(x) - self.centre) / self.scale).clamp(-8, 8)
        return standard @ self.axes.T


def signal_of(x: Tensor) -> Tensor:
    """Crops 0..1 to signal: 0 at the background's colour, about 1 for a strong stain, from -0.5 to 1.5.

    The background is the median of the border. Where it is bright (stained cells), the signal is the optical
    density, 1 where a fifth of the light is left; where it is dark, the light above it.
    """
    height, width = x.shape[-2:]
    ring = torch.ones(height, width, dtype=torch.bool, device=x.device)
    ring[2:-2, 2:-2] = False
    ground = x[:, :, ring].median(2).values[..., None, None]
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


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.skip(x) + self.second_norm(self.second(y)))


@torch.no_grad()
def fit_projection(net: TinyEncoder, crops: np.ndarray, seed: int = 0, batch: int = 128) -> None:
    """Set the encoder's linear map from crops ``(n, 3, H, W)``, float 0..1 or uint8.

    Pooled numbers are standardised and projected onto their first principal axes. These are then turned at
    random: every output carries about the same variance, so standardising the outputs later does not blow up
    the weakest axes (which would be whitening).
    """
    net.eval()
    pooled = torch.cat([net.pooled(as_input(crops[i : i + batch])) for i in range(0, len(crops), batch)])
    centre, scale = pooled.mean(0), pooled.std(0)
    # A number that hardly varies is noise: it must not be raised to the others' level.
    scale = scale.clamp_min(0.05 * float(scale.median()))
    standard = ((pooled - centre) / scale).clamp(-8, 8)
    axes = torch.linalg.svd(standard, full_matrices=False).Vh[: net.dim]
    if len(axes) < net.dim:
        axes = torch.cat([axes, axes.new_zeros(net.dim - len(axes), axes.shape[1])])
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(net.dim, net.dim, generator=generator)).Q
    net.centre.copy_(centre)
    net.scale.copy_(scale)
    net.axes.copy_(turn @ axes)


def as_input(crops: np.ndarray) -> Tensor:
    """Crops as the network takes them: float32; bytes are divided by 255."""
    x = torch.from_numpy(np.ascontiguousarray(crops))
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()
