"""The embedded segmenter's network: a small U-Net with Cellpose's inputs and outputs.

Three channels in, flow down, flow across and cell probability (a logit) out, and the style vector of zeros
that `cellpose.core.run_net` expects. Flows are Cellpose's (Stringer et al., Nature Methods 18, 2021).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

KIND = "daskcell-tiny-segmenter-1"
STYLE = 256


class TinyUNet(nn.Module):
    """U-Net of 1.7 million parameters.

    Parameters
    ----------
    widths
        Channels at full, half, quarter ... resolution.
    blocks
        Residual blocks on the way down, one number for each resolution below full.

    Notes
    -----
    `forward` takes ``(N, 3, H, W)`` (one channel is repeated, as in training; for two, the third is empty)
    with sides that are multiples of ``2 ** (len(widths) - 1)``, values normalised as Cellpose does (1st to
    99th percentile of the whole image to 0..1), and returns ``(N, 3, H, W)`` (flow y, flow x, cell
    probability; flows are 5 x unit length, as Cellpose's) and ``(N, 256)``.
    """

    def __init__(
        self, widths: tuple[int, ...] = (16, 32, 64, 128, 192), blocks: tuple[int, ...] = (1, 2, 2, 1)
    ):
        super().__init__()
        self.widths, self.blocks = tuple(widths), tuple(blocks)
        self.stem = _conv(3, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(_Residual(a, b), *(_Residual(b, b) for _ in range(count - 1)))
            for a, b, count in zip(widths, widths[1:], blocks, strict=False)
        )
        self.rise = nn.ModuleList(nn.Conv2d(b, a, 1, bias=False) for a, b in pairwise(widths))
        self.up = nn.ModuleList([_conv(widths[0], widths[0]), *(_Residual(a, a) for a in widths[1:-1])])
        self.out = nn.Conv2d(widths[0], 3, 1)
        self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where the weights are; `cellpose.core.run_net` sends its tiles there."""
        return self.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights; `cellpose.core.run_net` sends tiles of that type."""
        return self.out.weight.dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        elif x.shape[1] == 2:
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for stage in self.down:
            skips.append(x)
            x = stage(F.max_pool2d(x, 2))
        for rise, up, skip in zip(reversed(self.rise), reversed(self.up), reversed(skips), strict=True):
            x = up(skip + F.interpolate(rise(x), scale_factor=2, mode="nearest"))
        return self.out(x), x.new_zeros((len(x), STYLE))


def fold_batch_norms(net: TinyUNet) -> TinyUNet:
    """Put every batch normalisation into the convolution before it: the same function in less time.

    For inference only, in place; returns `net`.
    """
    for part in net.eval().modules():
        if not isinstance(part, nn.Sequential):
            continue
        for index, (first, second) in enumerate(pairwise(part)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                part[index], part[index + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
    return net


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = _conv(inputs, outputs)
        self.second = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.second(self.first(x)))
