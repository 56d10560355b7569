"""Correction of uneven illumination: by a flat field, or by the background below the cells.

A camera sees ``pixel = dark + light * (cells + background)``. `Flat` divides by the light, as an image of
the empty field shows it; `Background` subtracts what varies more slowly than structures of a given size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.coarse_grid import CoarseGrid
from daskcell.preprocess.dtypes import is_small, largest, to_dtype
from daskcell.preprocess.steps import _Placed, _Same
from daskcell.storage.atomic import digest

_CELLS = 6
"""Cells of the coarse grid in a disc's radius: more follow the background closer, and cost more."""
_LEAST_RADIUS = 4.0
"""Least radius of the disc at a coarser level: the background that comes closest to the image's own."""


@dataclass(frozen=True)
class Background(_Same):
    """The image less the background that a disc of `radius` pixels rolls under.

    The background is the morphological opening, by the disc, of the means of small square cells (a sixth of
    the radius), interpolated linearly: what is narrower than the disc is no background. Where the background
    is `light` it is the closing, and the image is divided by it, so that the background becomes white. Same
    dtype; integers are rounded and clipped, so that none is below 0.

    At a coarser level the disc covers the same part of the image, but never less than `_LEAST_RADIUS` pixels:
    under a smaller one every pixel, a mean of many, would be background.

    S. R. Sternberg, "Biomedical image processing", Computer 16 (1983) 22-34.
    """

    kind: ClassVar[str] = "background"
    placed: ClassVar[bool] = True
    shape: tuple[int, int]
    """Height and width of the whole image."""
    radius: float
    light: bool = False

    @property
    def grid(self) -> CoarseGrid:
        return CoarseGrid(self.shape, max(1, int(self.radius / _CELLS)))

    @property
    def reach(self) -> int:
        """Radius of the disc in cells of the coarse grid."""
        return math.ceil(self.radius / self.grid.cell)

    @property
    def disc(self) -> np.ndarray:
        """The cells ``(2 reach + 1, 2 reach + 1)`` that the disc covers."""
        y, x = np.ogrid[-self.reach : self.reach + 1, -self.reach : self.reach + 1]
        return (y * y + x * x) * self.grid.cell**2 <= self.radius**2

    def at_level(self, level: int, shape: tuple[int, int]) -> Background:
        return Background(shape, max(_LEAST_RADIUS, self.radius / 2**level), self.light)

    @property
    def halo(self) -> int:
        # Opening reads twice its reach, spreading a cell more, and of the outermost cell a part may be cut.
        return self.grid.cell * (2 * self.reach + 2)

    def means(self, block: np.ndarray, box: Box) -> np.ndarray:
        """Mean (float64) of every cell of the coarse grid in each channel of a block at `box`."""
        return np.stack([self.grid.means(plane, box) for plane in block])

    def clear(self, block: np.ndarray, ground: np.ndarray, cells: Box, box: Box) -> np.ndarray:
        """A block at `box` less the `ground` of the `cells` below it (`light`: divided by it)."""
        out = np.empty_like(block)
        white = largest(block.dtype)
        for target, plane, values in zip(out, block, ground, strict=True):
            below = self.grid.spread(values, cells, box)
            if self.light:
                with np.errstate(divide="ignore", invalid="ignore"):
                    cleared = np.where(below > 0, plane / below * white, 0)
            else:
                cleared = plane - below
            target[...] = to_dtype(cleared, block.dtype)
        return out

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        from scipy import ndimage

        turn = ndimage.grey_closing if self.light else ndimage.grey_opening
        ground = turn(self.means(block, box), footprint=self.disc[None], mode="reflect")
        return self.clear(block, ground, self.grid.inside(box), box)


@dataclass(frozen=True, eq=False)
class Flat(_Placed):
    """``(pixel - dark) * gain``, the gain of a camera field repeated over the image; same dtype.

    At a coarser level the gain is the mean over each pixel.
    """

    gain: np.ndarray
    """``(1 or C, h, w)`` float32 or float64, its mean light per channel over the light of each pixel."""
    dark: float = 0.0

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        exact = np.float32 if block.dtype == np.float32 or is_small(block.dtype) else np.float64
        height, width = self.gain.shape[1:]
        rows = self.places(box.y0, box.y1) % height
        columns = self.places(box.x0, box.x1) % width
        out = np.empty_like(block)
        for channel, (target, plane) in enumerate(zip(out, block, strict=True)):
            gain = self.gain[channel if len(self.gain) > 1 else 0][rows[:, None], columns]
            target[...] = to_dtype((plane - exact(self.dark)) * gain.astype(exact, copy=False), block.dtype)
        return out

    def at_level(self, level: int, shape: tuple[int, int]) -> Flat:
        from scipy import ndimage

        # A window of 2 ** level pixels around `places` is a pixel of the level.
        size = 1 << level
        return replace(
            self, gain=ndimage.uniform_filter(self.gain, (0, size, size), mode="wrap"), level=level
        )

    @staticmethod
    def check(field: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Refuse a flat field of a shape that does not fit the image's, both ``(C, Y, X)``."""
        if field[0] not in (1, shape[0]):
            raise InputError(
                f"The flat field has {field[0]} channels and the image {shape[0]}: give one plane, or one a "
                "channel."
            )
        if 0 in field or shape[1] % field[1] or shape[2] % field[2]:
            raise InputError(
                f"The flat field of {field[1]} x {field[2]} pixels does not fit an image of "
                f"{shape[1]} x {shape[2]}: it must be as large, or repeat a whole number of times."
            )

    @classmethod
    def of(cls, field: np.ndarray, dark: float, shape: tuple[int, ...], dtype: np.dtype) -> Flat:
        """The step from an image ``(1 or C, h, w)`` of the empty field, for an image of `shape`.

        Raises
        ------
        InputError
            The field does not fit the image, or is somewhere as dark as no light.
        """
        cls.check(field.shape, shape)
        field = np.ascontiguousarray(field)
        light = field.astype(np.float64) - dark
        bad = int(np.count_nonzero(~(light > 0)))
        if bad:
            raise InputError(
                f"The flat field has {bad} pixel(s) of no light (not above dark = {dark:g}): "
                "give an image of the evenly lit, empty field."
            )
        gain = light.mean(axis=(1, 2), keepdims=True) / light
        return cls(gain.astype(np.float32 if is_small(dtype) or dtype == np.float32 else np.float64), dark)


@dataclass(frozen=True)
class FlatFile(_Placed):
    """`Flat` from a file, read once per process: a plan names the image and does not hold it."""

    kind: ClassVar[str] = "flat"
    path: str
    digest: str
    dark: float
    shape: tuple[int, int, int]
    """``(C, Y, X)`` of the image."""

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        return _flat(self, block.dtype).apply(block, box)

    @classmethod
    def open(cls, path: str, dark: float, shape: tuple[int, int, int], dtype: np.dtype) -> FlatFile:
        """Check that the file fits, and note what it holds."""
        where = Path(path).expanduser().absolute()  # workers may run elsewhere
        step = cls(str(where), _digest(where), float(dark), shape)
        _flat(step, dtype)
        return step


@lru_cache(maxsize=4)
def _flat(step: FlatFile, dtype: np.dtype) -> Flat:
    from daskcell import images

    if step.level:
        return _flat(replace(step, level=0), dtype).at_level(step.level, step.shape[1:])
    if _digest(Path(step.path)) != step.digest:
        raise InputError(f"The flat field {step.path} has changed since it was first read: run anew.")
    return Flat.of(np.asarray(images.open_image(step.path).data), step.dark, step.shape, dtype)


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise InputError(f"The flat field {path} cannot be read: {error.strerror}.") from None
