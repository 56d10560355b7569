"""A prepared image: an image and the plan for it, read box by box as if the whole had been preprocessed.

`PreparedImage.read` is the only place that grows a box by the plan's halo, applies the plan and crops. Every
reader of preprocessed pixels - segmentation, features, overlays, the report, exports - goes through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from daskcell.geometry import Box
from daskcell.preprocess.plan import Plan, apply_block


@dataclass(frozen=True)
class PreparedImage:
    """An OME-Zarr image as `plan` makes it; small, and fit to be sent to a worker."""

    path: str
    plan: Plan

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.plan.shape

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every level of the pyramid, the image first."""
        from daskcell.images import image_info

        return image_info(self.path).levels

    def read(self, box: Box, level: int = 0) -> np.ndarray:
        """Preprocessed pixels of a box of a level, the same for every way to cut the image.

        Parameters
        ----------
        box : Box
            In pixels of the level, inside it.
        level : int
            Of the pyramid. Above 0 every step is what it says it is there (`Step.at_level`), so that the
            pixels are about those of the preprocessed image, made as small.

        Returns
        -------
        array ``(Plan.out_channels, h, w)`` of `Plan.out_dtype`
        """
        return self.read_both(box, level)[1]

    def read_both(self, box: Box, level: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a box as they are, ``(Plan.in_channels, h, w)``, and as `read` gives them."""
        plan = self.plan.at_level(level, self.levels[level]) if level else self.plan
        grown = box.grow(plan.halo).clip(plan.shape)
        raw = self._read_raw(grown, level)
        inner = (slice(None), *box.within(grown))
        return raw[inner], apply_block(raw, plan, grown)[inner]

    def _read_raw(self, box: Box, level: int) -> np.ndarray:
        from daskcell.images import read_block

        return read_block(self.path, box, level)


@dataclass(frozen=True, eq=False)
class PreparedArray(PreparedImage):
    """The same for a numpy array ``(C, Y, X)``, which has no pyramid."""

    array: Any

    @classmethod
    def of(cls, array: np.ndarray, plan: Plan) -> PreparedArray:
        return cls("", plan, array)

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        return (self.shape,)

    def _read_raw(self, box: Box, level: int) -> np.ndarray:
        return self.array[(slice(None), *box.slices)]
