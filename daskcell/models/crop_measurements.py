"""Quick measurements of cell crops: size, shape, stain, texture, arrangement.

They are a part of the embedded encoder's output, and say which cells are neighbours when it is trained. The
measurements users get, with names and units, are in `daskcell.features`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from daskcell.models.crop_signal import cell_regions

MEASUREMENTS = 69


def measure_signal(signal: Tensor) -> Tensor:
    """``(N, 3, H, W)`` from `signal_of` to ``(N, MEASUREMENTS)``."""
    regions = cell_regions(signal)
    weights = regions.flatten(2)
    area = weights.sum(2).clamp_min(1)
    weights = weights / area[..., None]
    flat = signal.flatten(2)
    means = torch.einsum("nrp,ncp->nrc", weights, flat)
    spread = (torch.einsum("nrp,ncp->nrc", weights, flat**2) - means**2).clamp_min(0).sqrt()
    cell = weights[:, 0]
    out = [area.sqrt() / signal.shape[-1], (area[:, 1:] / area[:, :1]), means.flatten(1), spread.flatten(1)]
    out += [_correlations(flat, cell), _histogram(flat, cell)]
    for sigma in (1.0, 2.0, 4.0):
        detail = (signal - _blur(signal, sigma)).abs().flatten(2)
        out.append(torch.einsum("np,ncp->nc", cell, detail))
    out += [_shape(regions[:, :2])]
    # How a stain lies between middle and rim: its correlation with the depth below the outline.
    depth = _blur(regions[:, :1], 6.0).flatten(2)
    both = torch.cat([flat, depth], 1)
    out.append(_correlations(both, cell)[:, -3:])
    return torch.cat([part.flatten(1).float() for part in out], 1)


def _correlations(flat: Tensor, weights: Tensor) -> Tensor:
    centred = flat - torch.einsum("np,ncp->nc", weights, flat)[..., None]
    covariance = torch.einsum("np,nap,nbp->nab", weights, centred, centred)
    deviation = covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-6).sqrt()
    matrix = covariance / deviation[:, :, None] / deviation[:, None, :]
    # Pairs with the last channel come last.
    pairs = [(a, b) for b in range(matrix.shape[1]) for a in range(b)]
    return torch.stack([matrix[:, a, b] for a, b in pairs], 1)


def _histogram(flat: Tensor, weights: Tensor, bins: int = 8) -> Tensor:
    centres = torch.linspace(0.0, 1.2, bins, device=flat.device)
    near = torch.exp(-(((flat[..., None] - centres) / 0.12) ** 2))
    near = near / near.sum(-1, keepdim=True).clamp_min(1e-6)
    return torch.einsum("np,ncpb->ncb", weights, near).flatten(1)


def _shape(regions: Tensor) -> Tensor:
    """Axes, compactness, outline of cell and core, and how far the core lies off the cell's centre."""
    height, width = regions.shape[-2:]
    sides = (torch.arange(side, device=regions.device) / side for side in (height, width))
    y, x = torch.meshgrid(*sides, indexing="ij")
    area = regions.sum((2, 3)).clamp_min(1)
    centre = torch.stack([(regions * p).sum((2, 3)) / area for p in (y, x)], -1)
    dy, dx = y - centre[..., 0, None, None], x - centre[..., 1, None, None]
    yy, xx, yx = (((regions * p).sum((2, 3)) / area) for p in (dy * dy, dx * dx, dy * dx))
    gap = ((yy - xx) ** 2 + 4 * yx**2).clamp_min(1e-12).sqrt()
    long, short = (yy + xx + gap) / 2, ((yy + xx - gap) / 2).clamp_min(1e-6)
    share = area / (height * width)
    rows = (regions[:, :, 1:] - regions[:, :, :-1]).abs().sum((2, 3))
    columns = (regions[:, :, :, 1:] - regions[:, :, :, :-1]).abs().sum((2, 3))
    offset = (centre[:, 0] - centre[:, 1]).norm(dim=-1, keepdim=True)
    return torch.cat(
        [(short / long).sqrt(), (long * short).sqrt() / share, (rows + columns) / area.sqrt(), offset], 1
    )


def _blur(x: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    count = x.shape[1]
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0)), kernel.expand(count, 1, 1, -1), groups=count)
    return F.conv2d(F.pad(x, (0, 0, reach, reach)), kernel[:, None].expand(count, 1, -1, 1), groups=count)
