"""Ways to find cells, each as the three questions the drivers ask.

    observe(part)           what one block contributes to the facts of the whole picture
    freeze(observations)    those facts, once, before any block is segmented
    look(frozen, read)      labels of any box, and where they depend on what lies outside it

A method knows neither Dask nor files: `read` is handed in. Ownership, checks, ids and painting are the same
for all (`ownership`, `cells`), so any function from a block to labels becomes a method without seams
(`BlockMethod`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.signal import TILE, count_tiles
from daskcell.segmentation.core.ownership import Thresholds
from daskcell.segmentation.image_params import sampling_step

Read = Callable[[Box], np.ndarray]
Look = Callable[[Box], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


class Method(Protocol):
    """What a driver needs of a way to find cells."""

    thresholds: Thresholds

    @property
    def halo(self) -> int:
        """Pixels around a block to look at first."""

    def observe(self, part: np.ndarray, box: Box, shape: tuple[int, int]) -> Any:
        """Contribution of the block `part` ``(C, h, w)`` that lies at `box`."""

    def freeze(self, observed: list[Any], shape: tuple[int, int]) -> Any:
        """Facts of the whole picture; does not depend on the order or size of the blocks."""

    def look(self, frozen: Any, read: Read, outputs: dict[int, np.ndarray]) -> Look:
        """A function from a box to ``(labels int32 in reading order, doubtful bool, flows or None)``."""


def sample(part: np.ndarray, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
    """Pixels of each channel of the block at `box` that Cellpose's percentiles are taken of."""
    step = sampling_step(shape)
    return [plane[-box.y0 % step[0] :: step[0], -box.x0 % step[1] :: step[1]].ravel() for plane in part]


def tiles_of(part: np.ndarray, box: Box) -> np.ndarray:
    """Counts of the tiles of the block at `box`, which must begin at multiples of `TILE` pixels."""
    assert box.y0 % TILE == box.x0 % TILE == 0, f"tiles are cut by the block at {box}"
    return count_tiles(part.astype(np.uint8) if part.dtype.kind == "b" else part)


def refuse_unusable(part: np.ndarray, box: Box) -> None:
    """Raise `InputError` for pixels that are NaN, infinite or complex."""
    if part.dtype.kind not in "buif":
        raise InputError(f"Cannot segment pixels of type {part.dtype}. Please give integers or floats.")
    if part.dtype.kind == "f" and not np.isfinite(part).all():
        count = int((~np.isfinite(part)).sum())
        raise InputError(
            f"The image has {count} NaN or infinite pixels in rows {box.y0}-{box.y1}, "
            f"columns {box.x0}-{box.x1}. Please replace them first."
        )
