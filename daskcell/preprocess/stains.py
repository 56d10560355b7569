"""Stains of a colour slide: separated, or normalised to standard colours.

Light that passes several stains is attenuated by each in turn (Beer and Lambert), so their optical densities
add up, and both operations multiply densities by one matrix. The matrix comes from a histogram of colours of
the whole image: sums of whole numbers, the same however the image is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.dtypes import check_finite, float_dtype, largest, to_dtype
from daskcell.preprocess.steps import _by_table, _Pointwise

LEVELS = 64
"""Levels of red, green and blue that colours are told apart by when they are counted."""
_GLASS = 0.15
"""Mean optical density below which a pixel is glass."""
_WHITE = (240 / 255,) * 3
_TISSUE = 100
"""Least number of stained pixels that stains are found from."""
_BRIGHT = 99.0
"""Percentile of each colour that is the light without tissue."""

Colour = tuple[float, float, float]
Matrix = tuple[Colour, ...]


@dataclass(frozen=True)
class Stains(_Pointwise):
    """``matrix @ density`` of every pixel of a colour image ``(3, h, w)``.

    Back to colours of the same dtype, integers rounded, where a `target` is given; or left as densities of 0
    or more, float32 (float64 for float64).
    """

    kind: ClassVar[str] = "stains"
    matrix: Matrix
    white: Colour
    """The light without tissue, on the 0-1 scale: density 0."""
    least: float
    """Darker values count as this one."""
    target: Colour | None
    """What density 0 becomes; None: densities stay."""

    def dtype(self, dtype: np.dtype) -> np.dtype:
        return float_dtype(dtype) if self.target is None else dtype

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        density = []
        for plane, white in zip(block, self.white, strict=True):
            density.append(_by_table(np.ascontiguousarray(plane), partial(self._density, white=white)))
        out = np.empty(block.shape, self.dtype(block.dtype))
        for channel, row in enumerate(self.matrix):
            # One product at a time: no BLAS, whose last bit depends on the size of the block.
            total = density[0] * row[0]
            for plane, weight in zip(density[1:], row[1:], strict=True):
                total += plane * weight
            if self.target is None:
                out[channel] = np.maximum(total, 0)
            else:
                light = np.exp(-total) * (self.target[channel] * largest(block.dtype))
                out[channel] = to_dtype(light, block.dtype)
        return out

    def _density(self, values: np.ndarray, white: float) -> np.ndarray:
        share = values.astype(np.float64) / largest(values.dtype)
        return -np.log(np.maximum(share, self.least) / white)


def separation() -> Stains:
    """Haematoxylin, eosin and DAB: `skimage.color.rgb2hed`, after Ruifrok and Johnston (2001)."""
    from skimage.color import hed_from_rgb

    # scikit-image's densities are on a scale on which black (1e-6 of the light) is 1.
    matrix = hed_from_rgb.T / -np.log(1e-6)
    return Stains(_matrix(matrix), (1.0, 1.0, 1.0), 1e-6, None)


@dataclass(frozen=True)
class Palette:
    """The light of a slide, and the mean density of its tissue in red, green and blue."""

    white: Colour
    strengths: Colour

    def step_to(self, standard: Palette | None) -> Stains:
        """The step that gives an image the standard's light and densities, or without one white light.

        Each colour's density is multiplied by one number: glass stays glass, dark stays darker than pale, and
        nothing is divided by the difference of two stains that an image may not show.
        """
        if standard is None:
            return Stains(_matrix(np.eye(3)), self.white, 1 / 255, _WHITE)
        gain = np.array(standard.strengths) / np.array(self.strengths)
        return Stains(_matrix(np.diag(gain)), self.white, 1 / 255, standard.white)


@dataclass(frozen=True)
class ColourCounts:
    """A pass that counts colours, in `LEVELS` levels of red, green and blue: ``(LEVELS ** 3,)``."""

    finding: bool = False
    """Whether the image is the standard of others, and not to be changed itself."""
    standard: Palette | None = None

    def count(self, block: np.ndarray, box: Box) -> np.ndarray:
        check_finite(block)
        index = np.zeros(block.shape[1:], np.int64)
        for plane in block:
            level = np.clip(plane * (LEVELS / largest(plane.dtype)), 0, LEVELS - 1).astype(np.int64)
            index = index * LEVELS + level
        return np.bincount(index.ravel(), minlength=LEVELS**3)

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def finish(self, total: np.ndarray) -> Stains | Palette:
        found = find_stains(total)
        if self.finding and found is None:
            raise InputError("The reference shows no stains: give an image with stained tissue.")
        if found is None:
            # Bare glass stays as it is.
            return Stains(_matrix(np.eye(3)), (1.0,) * 3, 1e-6, (1.0,) * 3)
        return found if self.finding else found.step_to(self.standard)


def find_stains(counts: np.ndarray) -> Palette | None:
    """Light and densities of an image, from how many pixels each colour has; None for bare glass.

    As E. Reinhard et al., "Color transfer between images", IEEE CG&A 21 (2001) 34-41, one number a colour;
    but of densities, and of the tissue alone, so that it does not matter how much glass there is.
    """
    which = np.flatnonzero(counts)
    weight = counts[which].astype(np.float64)
    share = (np.stack(np.unravel_index(which, (LEVELS,) * 3), axis=1) + 0.5) / LEVELS
    white = np.array([_percentile(share[:, c], weight, _BRIGHT) for c in range(3)])
    density = -np.log(share / white)
    stained = density.mean(axis=1) > _GLASS
    weight = weight[stained]
    if weight.sum() < _TISSUE:
        return None
    strengths = np.einsum("n,nc->c", weight, density[stained]) / weight.sum()
    return Palette(_colour(white), _colour(np.maximum(strengths, _GLASS / 3)))


def _percentile(values: np.ndarray, weight: np.ndarray, percentile: float) -> float:
    """The value that `percentile` of the weight is not above."""
    order = np.argsort(values, kind="stable")
    until = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(until, percentile / 100 * until[-1])])


def _colour(values: np.ndarray) -> Colour:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _matrix(values: np.ndarray) -> Matrix:
    return tuple(_colour(row) for row in values)
