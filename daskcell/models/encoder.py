"""The embedded encoder's network: a small ResNet whose feature maps are pooled over parts of the cell.

**Input.** Crops ``(N, 3, H, W)`` float, where 0 is background, 1 about the strongest stain, and pixels of other
cells or outside the cell are exactly 0: light above background for fluorescence, optical density for stained
cells (`signal_above_background` makes either). Made for crops of 64 x 64 pixels fitted to the cell; any
size of at least 16 works.

**Pooling.** Mean and deviation over the cell (pixels above 0), and the means over its brightest part and over
the rest, of the maps of every stage. Region pooling gave most of what separates stained blood cells; a plain mean
over the crop loses it.
"""

from __future__ import annotations

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
        regions = cell_regions(x)
        parts = []
        for maps in self.stages(x):
            weights = F.adaptive_avg_pool2d(regions, maps.shape[-2:]).flatten(2)
            weights = weights / weights.sum(2, keepdim=True).clamp_min(1e-6)
            flat = maps.float().flatten(2)
            means = torch.einsum("nrp,ncp->nrc", weights, flat)
            square = torch.einsum("np,ncp->nc", weights[:, 0], flat * flat)
            deviation = (square - means[:, 0] ** 2).clamp_min(1e-8).sqrt()
            parts.append(torch.cat([means.flatten(1), deviation], 1))
        return torch.cat(parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, dim)``; see the module's text for what the input must be."""
        return (self.pooled(x) - self.centre) / self.scale @ self.axes.T


def cell_regions(x: Tensor) -> Tensor:
    """The cell, its brightest part and the rest ``(N, 3, H, W)``, from crops whose other pixels are 0."""
    light = x.sum(1)
    cell = (light > 0).to(x.dtype)
    area = cell.sum((1, 2), keepdim=True).clamp_min(1)
    mean = light.sum((1, 2), keepdim=True) / area
    deviation = (((light - mean) * cell) ** 2).sum((1, 2), keepdim=True).div(area).clamp_min(1e-8).sqrt()
    core = cell * torch.sigmoid(4 * ((light - mean) / deviation - 0.3))
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


def signal_above_background(picture: np.ndarray, *, dark: bool, low=None, high=None) -> np.ndarray:
    """What the encoder wants to see: 0 at the background, about 1 at the strongest stain.

    Parameters
    ----------
    picture
        ``(C, Y, X)``, any number type.
    dark
        Cells are darker than the background: optical density relative to the background, channel by channel.
        Else light above background.
    low, high
        Background and strong signal of each channel (darkest for `dark`), ``(C,)``; frozen ones from the whole
        image make the result independent of the part given. None: 5th and 99.5th percentile of `picture`
        (95th and 0.5th for `dark`).
    """
    values = np.asarray(picture, np.float32)
    shape = (-1,) + (1,) * (values.ndim - 1)
    axes = tuple(range(1, values.ndim))
    if low is None:
        low = np.percentile(values, 95 if dark else 5, axis=axes)
    if high is None:
        high = np.percentile(values, 0.5 if dark else 99.5, axis=axes)
    low, high = (np.asarray(v, np.float32).reshape(shape) for v in (low, high))
    if dark:
        floor = np.maximum(low, 1e-6) / 255
        ground = np.log(np.maximum(low, floor))
        # The strongest stain of any channel sets the scale: the ratio of densities is the colour.
        span = np.max(ground - np.log(np.maximum(high, floor)))
        signal = (ground - np.log(np.maximum(values, floor))) / max(float(span), 1e-6)
    else:
        span = high - low
        signal = (values - low) / np.where(span > 1e-6, span, np.inf)
    return np.clip(signal, 0, 1.5).astype(np.float32)


@torch.no_grad()
def fit_projection(net: TinyEncoder, crops: np.ndarray, seed: int = 0, batch: int = 128) -> None:
    """Set the encoder's linear map from crops ``(n, 3, H, W)`` in 0..1 (float) or 0..255 (uint8).

    Pooled numbers are standardised and projected onto their first principal axes. These are then turned at random:
    every output carries about the same variance, so standardising the outputs later does not blow up the weakest
    axes (which would be whitening).
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
    """Crops as the network takes them: float32, bytes divided by 170 (255 stands for 1.5)."""
    x = torch.from_numpy(np.ascontiguousarray(crops))
    return x.float() / 170 if x.dtype == torch.uint8 else x.float()
