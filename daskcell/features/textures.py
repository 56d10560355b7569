"""How even or grainy a cell is: grey-level co-occurrence, with scikit-image's names.

What becomes the darkest and the brightest of the `LEVELS` grey levels is measured once over the whole image
(`fit_greys`), so a texture means the same in every block.

Reference: Haralick, Shanmugam, Dinstein, IEEE Trans. SMC 3 (1973) 610-621.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TEXTURE_COLUMNS = tuple(
    f"texture_{name}" for name in ("contrast", "dissimilarity", "homogeneity", "energy", "correlation")
)
LEVELS = 32
_PERCENTILES = (1, 99)


@dataclass(frozen=True)
class Greys:
    """Values of each channel between which the grey levels lie."""

    low: tuple[float, ...]
    high: tuple[float, ...]


def grey_sample(image: np.ndarray, labels: np.ndarray, step: int) -> np.ndarray:
    """Values ``(C, m)`` inside cells of one sampled box: `image` ``(C, h, w)``, `labels` ``(h, w)``."""
    return image[:, ::step, ::step][:, labels[::step, ::step] > 0]


def fit_greys(samples: Sequence[np.ndarray]) -> Greys:
    """Grey levels from samples of all of an image: from the 1st to the 99th percentile of the cells' pixels.

    `samples` as `grey_sample` gives them, at least one.
    """
    low, high = [], []
    for channel in range(len(samples[0])):
        values = np.concatenate([sample[channel] for sample in samples]).astype(np.float64)
        values = values[np.isfinite(values)]
        first, last = np.percentile(values, _PERCENTILES).tolist() if len(values) else (0.0, 1.0)
        low.append(first)
        high.append(last if last > first else max(first + 1.0, float(np.nextafter(first, np.inf))))
    return Greys(tuple(low), tuple(high))


def textures(
    labels: np.ndarray, image: np.ndarray, ids: np.ndarray, boxes: np.ndarray, greys: Greys
) -> np.ndarray:
    """`TEXTURE_COLUMNS` of cells in every channel: ``(n, C, 5)`` float64; see `_textures.texture_sums`."""
    from daskcell.features._textures import texture_sums

    return texture_sums(labels, image, ids, boxes, np.array(greys.low), np.array(greys.high), LEVELS)
