"""Any function of a block as a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from daskcell.segmentation.methods.base import Method


@dataclass
class FunctionMethod(Method):
    """A function ``(C, h, w) array -> (h, w) labels``, 0 for background.

    Equal to the function on the whole image as far as a label depends on no pixel farther from its cell than
    `reach`.
    """

    function: Callable[[np.ndarray], np.ndarray]
    halo: int = 64
    reach: int = 0

    def segment(self, block: np.ndarray, params: Any) -> np.ndarray:
        return self.function(block)
