"""Small images of cells and slides, as JPEG, for pages and galleries."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from daskcell.geometry import Box
from daskcell.images import read_labels
from daskcell.render.overlays import LABELS, cluster_lookup
from daskcell.render.paint import as_rgb, borders, paint, stretch_limits

if TYPE_CHECKING:
    from daskcell.preprocess import PreparedImage

_CELL = 96
"""Side in pixels of the image of a cell, at most; at least half of it."""
_SLIDE = 420
"""Longer side in pixels of the image of a slide."""
_MAX_SIDE = 512
"""Side in pixels of the largest part of a slide shown as one cell."""


class Thumbnails:
    """Draws cells and slides, preprocessed as their cells were found.

    Parameters
    ----------
    prepared : callable
        The prepared image of a slide, with the label image ``cells``.
    """

    def __init__(self, prepared: Callable[[str], PreparedImage]):
        self._image = lru_cache(maxsize=4)(prepared)
        self._limits = lru_cache(maxsize=64)(self._stretch_limits)

    def cell(self, slide: str, label: int, centre: tuple[float, float], side: int, color: str) -> bytes:
        """JPEG of the square of `side` pixels around `centre` (y, x), the cell outlined in `color`."""
        image = self._image(slide)
        y, x = (round(v) - side // 2 for v in centre)
        square = Box(y, x, y + side, x + side)
        visible = square.clip(image.shape)
        low, high = self._limits(slide)
        canvas = np.full((side, side, 3), 0.5, np.float32)
        canvas[visible.within(square)] = as_rgb(image.read(visible), low, high)
        mask = np.zeros((side, side), bool)
        mask[visible.within(square)] = read_labels(image.path, LABELS, visible) == label
        factor = max(1, -(-_CELL // (2 * side)))
        canvas, mask = (np.repeat(np.repeat(a, factor, 0), factor, 1) for a in (canvas, mask))
        # The line lies around the cell, not on it: small cells are all border.
        line = borders(mask.astype(np.uint8), 1) & ~mask
        canvas[line] = np.frombuffer(bytes.fromhex(color[1:]), np.uint8) / np.float32(255)
        return _jpeg(np.rint(canvas * 255).astype(np.uint8), _CELL)

    def slide(self, name: str, clusters_path: str | Path, palette: np.ndarray) -> bytes:
        """JPEG of a slide with its cells coloured by cluster, from the smallest sufficient pyramid level."""
        image = self._image(name)
        levels = image.levels
        level = max((i for i, shape in enumerate(levels) if max(shape) >= _SLIDE), default=0)
        whole = Box(0, 0, *levels[level])
        low, high = self._limits(name)
        rgb = as_rgb(image.read(whole, level), low, high)
        labels = read_labels(image.path, LABELS, whole, level)
        return _jpeg(paint(rgb, labels, cluster_lookup(clusters_path), palette), _SLIDE)

    def _stretch_limits(self, slide: str) -> tuple[np.ndarray, np.ndarray]:
        """Black and white of each channel, from the smallest level: the same for a slide and its cells."""
        image = self._image(slide)
        levels = image.levels
        sample = image.read(Box(0, 0, *levels[-1]), len(levels) - 1)
        return stretch_limits([sample], sample.dtype)


def common_side(sides: Sequence[float]) -> int:
    """Side in pixels of squares that show cells with bounding boxes of these sides, all at one scale."""
    if not sides:
        return _CELL
    return int(min(_MAX_SIDE, max(16, 1.3 * np.percentile(sides, 95))) // 2 * 2)


def _jpeg(rgb: np.ndarray, side: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(rgb)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=85, subsampling=0)  # keeps thin coloured lines sharp
    return buffer.getvalue()
