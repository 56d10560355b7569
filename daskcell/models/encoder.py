"""The embedded encoder's network: a small ResNet whose feature maps are pooled over parts of the cell.

**Input.** Crops ``(N, 3, H, W)`` float from 0 to 1, fitted to the cell, with neighbours and surroundings
blanked out by the background's colour. The background is read from the crop's own border. Light above a dark
background, or optical density relative to a bright one, is what the network sees (`signal_of`), so
fluorescence and stained cells look alike. Made for 64 x 64 pixels; any size of at least 16 works.

**Output.** Two blocks of equal weight: the feature maps of every stage, pooled over the cell (mean and
deviation) and over its stronger and its weaker part (means); and quick measurements of size, shape, stain
and texture. A plain mean over the crop loses most of what region pooling keeps, and either block alone groups
cells worse.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daskcell.models.crop_measurements import MEASUREMENTS, measure_signal
from daskcell.models.crop_signal import as_input, cell_regions, signal_of

KIND = "daskcell-tiny-encoder-2"
SIZE = 64
DIMENSIONS = 96


class TinyEncoder(nn.Module):
    """ResNet of 0.7 million parameters in four stages, and a fixed linear map to `dim` numbers.

    The linear map is fitted after training with `fit_projection`; it is part of the weights.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 112, 176), dim: int = DIMENSIONS):
        super().__init__()
        self.widths, self.dim, self.size = tuple(widths), dim, SIZE
        # Normalisation of the input, as other encoders have it: none.
        self.mean = self.std = None
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        inputs = (widths[0], *widths)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip(inputs, widths, strict=False))
        self.maps = _Axes(4 * sum(widths), dim - dim // 2)
        self.measurements = _Axes(MEASUREMENTS, dim // 2)
        self.turn: Tensor
        self.register_buffer("turn", torch.eye(dim))
        self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.turn.device

    @property
    def dtype(self) -> torch.dtype:
        return self.turn.dtype

    def stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the four stages, at 1/2, 1/4, 1/8 and 1/16 of the input's sides."""
        maps = []
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(F.avg_pool2d(x, 2, ceil_mode=True))
            maps.append(x)
        return maps

    def pooled(self, signal: Tensor) -> Tensor:
        """Region-pooled maps of all stages of what `signal_of` gives: ``(N, 4 * sum(widths))``."""
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
        signal = signal_of(x)
        blocks = [self.maps(self.pooled(signal)), self.measurements(measure_signal(signal))]
        return torch.cat(blocks, 1) @ self.turn


class _Axes(nn.Module):
    """Standardise, project, and even out the lengths of the vectors.

    A vector's length is replaced by its square root: half way to unit length, which separates the types of
    balanced sets better but blurs rare ones.
    """

    centre: Tensor
    scale: Tensor
    axes: Tensor
    length: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.register_buffer("axes", torch.zeros(outputs, inputs))
        self.register_buffer("length", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = ((x - self.centre) / self.scale).clamp(-5, 5) @ self.axes.T
        return y / (y.norm(dim=1, keepdim=True) * self.length).clamp_min(1e-6).sqrt()

    def fit(self, x: Tensor) -> None:
        """Principal axes of ``(n, inputs)``; the mean square of the output's length becomes 1."""
        self.centre.copy_(x.mean(0))
        deviation = x.std(0)
        # A number that hardly varies is noise: it must not be raised to the others' level.
        self.scale.copy_(deviation.clamp_min(max(1e-6, 0.05 * float(deviation.median()))))
        standard = ((x - self.centre) / self.scale).clamp(-5, 5)
        found = torch.linalg.svd(standard - standard.mean(0), full_matrices=False).Vh[: len(self.axes)]
        # The sign of an axis is arbitrary: it is fixed, so that a fit repeats.
        found = found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
        self.axes.zero_()
        self.axes[: len(found)] = found
        self.length.copy_((standard @ self.axes.T).norm(dim=1).mean())


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

    Each block is projected onto its first principal axes and brought to the same mean length. Then all is
    turned at random: every output carries about the same variance, so standardising the outputs later does
    not blow up the weakest axes (which would be whitening).
    """
    net.eval()
    pooled, measured = [], []
    for i in range(0, len(crops), batch):
        signal = signal_of(as_input(crops[i : i + batch]).to(net.device))
        pooled.append(net.pooled(signal))
        measured.append(measure_signal(signal))
    net.maps.fit(torch.cat(pooled))
    net.measurements.fit(torch.cat(measured))
    generator = torch.Generator().manual_seed(seed)
    net.turn.copy_(torch.linalg.qr(torch.randn(net.dim, net.dim, generator=generator, device="cpu")).Q)
