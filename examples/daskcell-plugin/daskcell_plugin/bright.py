"""`bright`: cells are what is brighter than a level, after the whole image's intensities are normalised.

A stand-in for StarDist, InstanSeg and their like: a function from a block to labels, for pixels that were
normalised by percentiles. Taken block by block, percentiles would differ from block to block, and with them
the cells. So they are taken once, of the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.measure import label

from daskcell.geometry import Box
from daskcell.segmentation.methods import Method, sample


@dataclass
class Bright(Method):
    """Connected pixels brighter than `level`.

    The fields are the method's options: ``segment.options`` of a study, keyword arguments of `dc.segment`.
    """

    level: float = 0.4
    """Between the 1st (0) and the 99.8th (1) percentile of the image."""
    sigma: float = 1.0
    """Of the Gaussian filter, in pixels."""

    version = "1"  # raised when the same image and options give other labels: studies redo them

    @property
    def reach(self) -> int:
        """A label depends on pixels this far from it: the radius of the filter."""
        return int(4 * self.sigma + 0.5)

    def observe(self, block: np.ndarray, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
        """Some pixels of each channel, the same for any blocks."""
        return sample(block, box, shape)

    def fit(self, observed: list[np.ndarray], shape: tuple[int, int]) -> dict[str, Any]:
        """The percentiles; every block gets them."""
        return {"limits": [np.percentile(values, (1, 99.8)).tolist() for values in observed]}

    def segment(self, block: np.ndarray, params: dict[str, Any]) -> np.ndarray:
        """Labels ``(h, w)`` of a block ``(C, h, w)``."""
        total = np.zeros(block.shape[1:], np.float32)
        for plane, (low, high) in zip(block, params["limits"], strict=True):
            total += (plane.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))
        smooth = ndimage.gaussian_filter(total / len(block), self.sigma, radius=self.reach)
        return label(smooth > self.level)
