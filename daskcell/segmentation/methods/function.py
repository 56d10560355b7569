"""Any function of a block as a method without seams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.segmentation.core import dynamics
from daskcell.segmentation.core.ownership import Thresholds
from daskcell.segmentation.methods.base import Look, Read, refuse_unusable


@dataclass
class BlockMethod:
    """Any function from a block of pixels to labels, without seams.

    The function sees a block and its halo; a cell is taken from the block that holds its first pixel, and
    from a larger halo if it touches the rim of this one. The result equals the function on the whole picture
    as far as the function itself looks no further than `halo` pixels around a cell.

    Attributes
    ----------
    function : callable
        ``(C, h, w) array -> (h, w) labels``, 0 for background.
    """

    function: Callable[[np.ndarray], np.ndarray]
    thresholds: Thresholds = field(default_factory=lambda: Thresholds(flow=0.0))
    halo: int = 64

    def observe(self, part: np.ndarray, box: Box, shape: tuple[int, int]) -> None:
        refuse_unusable(part, box)

    def freeze(self, observed: list[None], shape: tuple[int, int]) -> tuple[int, int]:
        return shape

    def look(self, frozen: tuple[int, int], read: Read, outputs: Mapping[int, np.ndarray]) -> Look:
        def at(held: Box) -> tuple[np.ndarray, np.ndarray, None]:
            labels = as_labels(self.function(read(held)), held.shape)
            return labels, touches_rim(labels, held, frozen), None

        return at


def as_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Any integer labels as int32, numbered in reading order."""
    labels = np.asarray(labels)
    if labels.shape != shape or labels.dtype.kind not in "bui":
        raise InputError(
            f"A segmentation method must return whole-number labels of shape {shape}, but returned "
            f"{labels.dtype} of shape {labels.shape}."
        )
    _, dense = np.unique(labels, return_inverse=True)
    dense = dense.reshape(shape).astype(np.int32)
    if labels.size and labels.min() > 0:
        dense += 1  # no background here: the smallest label is a cell too
    dynamics.renumber(dense)
    return dense


def touches_rim(labels: np.ndarray, held: Box, shape: tuple[int, int]) -> np.ndarray:
    """Pixels of labels that touch a side of `held` with more picture beyond it."""
    rim = np.zeros(labels.max(initial=0) + 1, bool)
    sides = [
        (held.y0 > 0, labels[:1]),
        (held.x0 > 0, labels[:, :1]),
        (held.y1 < shape[0], labels[-1:]),
        (held.x1 < shape[1], labels[:, -1:]),
    ]
    for inside, side in sides:
        if inside:
            rim[side] = True
    rim[0] = False
    return rim[labels]
