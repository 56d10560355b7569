"""Image parameters of Cellpose: what must be known of the whole image before any block of it is computed.

Percentiles, the tile grid and the number of steps are measured once, written into the study, and handed to
every block. A block that measured them by itself would segment another image than its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from daskcell.errors import InputError
from daskcell.preprocess.signal import bin_values, find_signal
from daskcell.segmentation.core.tiles import MEAN_DIAMETER, TileGrid

EXACT_UP_TO = 224**3
"""Values of a channel up to which Cellpose takes percentiles of all of them; above, of a strided sample."""


def sampling_step(shape: tuple[int, int]) -> tuple[int, int]:
    """Stride along y and x at which Cellpose samples an image for its percentiles.

    The rule of `cellpose.transforms.normalize99`, so that slides far above memory get the very numbers that
    Cellpose would take from them.
    """
    if shape[0] * shape[1] <= EXACT_UP_TO:
        return 1, 1
    return max(1, shape[0] // 224), max(1, shape[1] // 224)


def find_bounds(
    samples: list[np.ndarray], tiles: np.ndarray | None = None
) -> tuple[tuple[float, float] | None, ...]:
    """Intensities of each channel that become 0 and 1; None for a channel without contrast.

    The 1st and 99th percentile of its sample, as Cellpose takes them; with counts of `tiles`, those of the
    signal (see `daskcell.preprocess.signal`), and a channel of noise beside one that holds something is one
    without contrast.
    """
    limits = [_percentiles(values) for values in samples]
    if tiles is not None:
        signals = [find_signal(t, bin_values(s.dtype)) for t, s in zip(tiles, samples, strict=True)]
        empty = [signal is None or signal.is_empty for signal in signals]
        for c, signal in enumerate(signals):
            if signal is None:
                continue
            if signal.padding.any():
                limits[c] = _percentiles(signal.without_padding(samples[c]))
            limits[c] = signal.widen(*limits[c])
            if empty[c] and not all(empty):
                limits[c] = (0.0, 0.0)
    return tuple((low, high) if high - low > 1e-3 else None for low, high in limits)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """1st and 99th percentile.

    Raises
    ------
    InputError
        If a value is NaN or infinite.
    """
    values = np.asarray(values, np.float32).ravel()
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InputError(
            f"The image has {bad} NaN or infinite pixels, so no percentiles can be taken. Replace them first."
        )
    if not len(values):
        return 0.0, 0.0
    return float(np.percentile(values, 1)), float(np.percentile(values, 99))


def merge_observed(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """What was observed of several blocks: samples one after the other, and the sum of the counts."""
    *samples, tiles = zip(*parts, strict=True)
    return [*(np.concatenate(channel) for channel in samples), np.sum(tiles, axis=0)]


@dataclass(frozen=True)
class ImageParams:
    """Facts of one image, the same for all its blocks.

    Attributes
    ----------
    shape : (Y, X)
        Size of the image in pixels.
    bounds : tuple of (low, high) or None, one per channel
        Intensities that become 0 and 1; None: the channel has no contrast and becomes 0.
    diameter : float or None
        Cell diameter in pixels; None: no rescaling.
    skipped : frozenset of int
        Tiles without tissue, which the network does not see.
    """

    shape: tuple[int, int]
    bounds: tuple[tuple[float, float] | None, ...]
    diameter: float | None = None
    skipped: frozenset[int] = frozenset()

    @cached_property
    def tiles(self) -> TileGrid:
        return TileGrid.lay(self.shape, self.diameter)

    @property
    def steps(self) -> int:
        """Steps a pixel is moved along the flows: 200 at the network's own scale."""
        return int(200 / (MEAN_DIAMETER / self.diameter)) if self.diameter else 200

    def normalise(self, part: np.ndarray) -> np.ndarray:
        """``(C, h, w)`` pixels of any type to float32, percentile 1 to 0 and percentile 99 to 1."""
        out = np.zeros(part.shape, np.float32)
        for plane, values, bounds in zip(out, part, self.bounds, strict=True):
            if bounds is not None:
                low, high = np.float32(bounds[0]), np.float32(bounds[1])
                np.subtract(values.astype(np.float32), low, out=plane)
                plane /= high - low
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "bounds": self.bounds,
            "diameter": self.diameter,
            "skipped": sorted(self.skipped),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ImageParams:
        bounds = tuple(
            None if pair is None else (float(pair[0]), float(pair[1])) for pair in values["bounds"]
        )
        shape = (values["shape"][0], values["shape"][1])
        return cls(shape, bounds, values["diameter"], frozenset(values["skipped"]))
