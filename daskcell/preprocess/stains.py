"""Stains of a colour slide: taken apart, or brought to standard colours.

Light that passes stains is weakened by the product of what each leaves (Beer and Lambert), so optical
densities add up, and both are one matrix between densities. Which matrix is counted once over the whole
image, from the numbers of pixels of each colour: sums of whole numbers, the same however the image is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.pixels import check_finite, float_dtype, largest, to_dtype
from daskcell.preprocess.steps import _by_table, _Pointwise

LEVELS = 64
"""Levels of red, green and blue that colours are told apart by when they are counted."""
_GLASS = 0.15
"""Mean optical density below which a pixel is glass."""
_TISSUE = 100
"""Least number of stained pixels that stains are found from."""
_WHITE = 240 / 255
"""What is taken to be the light without tissue."""

Matrix = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Stains(_Pointwise):
    """``matrix @ density`` of every pixel of a colour picture ``(3, h, w)``.

    `back` to colours of the same dtype, integers rounded; or left as densities of 0 or more, float32 (float64
    for float64).
    """

    kind: ClassVar[str] = "stains"
    matrix: Matrix
    white: float
    """The value, on the 0-1 scale, whose density is 0."""
    least: float
    """Darker values count as this one."""
    back: bool

    def dtype(self, dtype: np.dtype) -> np.dtype:
        return dtype if self.back else float_dtype(dtype)

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        density = [_by_table(np.ascontiguousarray(plane), self._density) for plane in block]
        out = np.empty(block.shape, self.dtype(block.dtype))
        for target, row in zip(out, self.matrix, strict=True):
            # One product at a time: no BLAS, whose last bit depends on the size of the block.
            total = density[0] * row[0]
            for plane, weight in zip(density[1:], row[1:], strict=True):
                total += plane * weight
            if self.back:
                value = np.exp(-total) * (self.white * largest(block.dtype))
                target[...] = to_dtype(value, block.dtype)
            else:
                target[...] = np.maximum(total, 0)
        return out

    def _density(self, values: np.ndarray) -> np.ndarray:
        share = values.astype(np.float64) / largest(values.dtype)
        return -np.log(np.maximum(share, self.least) / self.white)

    def to_json(self) -> dict[str, Any]:
        return {
            "matrix": [list(row) for row in self.matrix],
            "white": self.white,
            "least": self.least,
            "back": self.back,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stains:
        matrix = tuple(tuple(row) for row in values["matrix"])
        return cls(matrix, values["white"], values["least"], values["back"])


def separation() -> Stains:
    """Haematoxylin, eosin and DAB: `skimage.color.rgb2hed`, after Ruifrok and Johnston (2001)."""
    from skimage.color import hed_from_rgb

    # scikit-image's densities are on a scale on which black (1e-6 of the light) is 1.
    matrix = hed_from_rgb.T / -np.log(1e-6)
    return Stains(_matrix(matrix), white=1.0, least=1e-6, back=False)


@dataclass(frozen=True)
class Palette:
    """Two stains: the direction of each among densities of red, green, blue, and how strong it gets."""

    directions: tuple[tuple[float, float, float], tuple[float, float, float]]
    strengths: tuple[float, float]

    def step_to(self, standard: Palette) -> Stains:
        """The step that gives a picture of these stains the `standard` ones."""
        own, wanted = np.array(self.directions), np.array(standard.directions)
        scale = np.array(standard.strengths) / np.array(self.strengths)
        matrix = np.einsum("ki,k,kj->ij", wanted, scale, np.linalg.pinv(own).T)
        return Stains(_matrix(matrix), _WHITE, 1 / 255, back=True)


STANDARD = Palette(((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)), (1.9705, 1.0308))
"""Haematoxylin and eosin as usually taken (Macenko et al.)."""


@dataclass(frozen=True)
class ColourCounts:
    """A pass that counts colours, in `LEVELS` levels of red, green and blue: ``(LEVELS ** 3,)``."""

    standard: Palette | None
    """What stains are brought to; None: only find them."""

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
        if self.standard is None:
            if found is None:
                raise InputError("The reference shows no two stains: give a picture with stained tissue.")
            return found
        # Bare glass stays as it is.
        return found.step_to(self.standard) if found else Stains(_matrix(np.eye(3)), 1.0, 1e-6, back=True)


def find_stains(counts: np.ndarray) -> Palette | None:
    """The two stains of a picture, from how many pixels each colour has; None for bare glass.

    M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI (2009)
    1107-1110: the two directions that 1 % of the stained pixels lie beyond, in the plane of most variance.
    """
    which = np.flatnonzero(counts)
    levels = np.stack(np.unravel_index(which, (LEVELS,) * 3), axis=1)
    share = (levels + 0.5) / LEVELS
    density = -np.log(share / _WHITE)
    stained = density.mean(axis=1) > _GLASS
    density, weight = density[stained], counts[which][stained].astype(np.float64)
    if weight.sum() < _TISSUE:
        return None
    centred = density - np.einsum("n,ni->i", weight, density) / weight.sum()
    covariance = np.einsum("n,ni,nj->ij", weight, centred, centred) / weight.sum()
    plane = np.linalg.eigh(covariance)[1][:, :0:-1]
    # Eigenvectors have no sign; densities are positive.
    plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)
    along = np.einsum("ni,ik->nk", density, plane)
    angle = np.arctan2(along[:, 1], along[:, 0])
    ends = [_percentile(angle, weight, p) for p in (1, 99)]
    directions = np.array([plane @ np.array([np.cos(a), np.sin(a)]) for a in ends])
    # Of the two, haematoxylin takes more red light.
    directions = directions[np.argsort(-directions[:, 0], kind="stable")]
    if abs(ends[1] - ends[0]) < 1e-3:
        return None
    amounts = np.einsum("ni,ik->nk", density, np.linalg.pinv(directions))
    strengths = [_percentile(amounts[:, k], weight, 99) for k in (0, 1)]
    if min(strengths) <= 0:
        return None
    first, second = (tuple(map(float, row)) for row in directions)
    return Palette((first, second), (strengths[0], strengths[1]))  # type: ignore[arg-type]


def _percentile(values: np.ndarray, weight: np.ndarray, percentile: float) -> float:
    """The value that `percentile` of the weight is not above."""
    order = np.argsort(values, kind="stable")
    until = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(until, percentile / 100 * until[-1])])


def _matrix(values: np.ndarray) -> Matrix:
    return tuple(tuple(float(v) for v in row) for row in values)  # type: ignore[return-value]
