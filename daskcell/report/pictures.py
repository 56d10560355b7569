"""Pictures on the page: cells as people see them, and slides made small; each as the bytes of a JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from daskcell.geometry import Box
from daskcell.images import read_labels
from daskcell.render.overlays import LABELS, cluster_lookup
from daskcell.render.paint import as_rgb, borders, paint, stretch_limits
from daskcell.report.facts import Cell
from daskcell.study import Study

_SIDE = 96
"""Pixels that a cell's picture has at most, and at least half of."""
_SLIDE = 420
_MOST = 512
"""Side in pixels of the largest part of a slide shown as one cell."""


class Pictures:
    """Draws from one study, preprocessed as its cells were found."""

    def __init__(self, study: Study):
        self._study = study
        self._limits = lru_cache(maxsize=64)(self._measure)
        self._image = lru_cache(maxsize=4)(study.prepared)

    def cell(self, cell: Cell, side: int, color: str) -> bytes:
        """JPEG of the square of `side` pixels around a cell, its outline in `color` (``#rrggbb``)."""
        image = self._image(cell.slide)
        y, x = (round(v) - side // 2 for v in cell.centre)
        square = Box(y, x, y + side, x + side)
        there = square.clip(image.shape)
        low, high = self._limits(cell.slide)
        picture = as_rgb(image.read(there), low, high)
        labels = read_labels(image.path, LABELS, there)
        canvas = np.full((side, side, 3), 0.5, np.float32)
        canvas[there.within(square)] = picture
        mask = np.zeros((side, side), bool)
        mask[there.within(square)] = labels == cell.label
        factor = max(1, -(-_SIDE // (2 * side)))
        canvas, mask = (np.repeat(np.repeat(a, factor, 0), factor, 1) for a in (canvas, mask))
        # The line lies around the cell, not on it: small cells are all border.
        canvas[borders(mask.astype(np.uint8), 1) & ~mask] = _rgb(color)
        return _jpeg(np.rint(canvas * 255).astype(np.uint8), _SIDE)

    def slide(self, name: str, palette: np.ndarray) -> bytes:
        """JPEG of a slide with its cells coloured by cluster, from the smallest sufficient pyramid level."""
        image = self._image(name)
        levels = image.levels
        level = max((i for i, shape in enumerate(levels) if max(shape) >= _SLIDE), default=0)
        whole = Box(0, 0, *levels[level])
        low, high = self._limits(name)
        assigned = self._study.record.assigned_table(name)
        assert assigned is not None
        painted = paint(
            as_rgb(image.read(whole, level), low, high),
            read_labels(image.path, LABELS, whole, level),
            cluster_lookup(assigned),
            palette,
        )
        return _jpeg(painted, _SLIDE)

    def _measure(self, slide: str) -> tuple[np.ndarray, np.ndarray]:
        """What becomes black and white, from the smallest level: the same for a slide and its cells."""
        image = self._image(slide)
        levels = image.levels
        sample = image.read(Box(0, 0, *levels[-1]), len(levels) - 1)
        return stretch_limits([sample], sample.dtype)


def common_side(cells: Sequence[Cell]) -> int:
    """Side in pixels of the squares that show `cells`, one for all, so that large cells look large."""
    if not cells:
        return _SIDE
    return int(min(_MOST, max(16, 1.3 * np.percentile([cell.side for cell in cells], 95))) // 2 * 2)


def _rgb(color: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(color[1:]), np.uint8).astype(np.float32) / 255


def _jpeg(picture: np.ndarray, side: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=85, subsampling=0)  # thin coloured lines stay sharp
    return buffer.getvalue()


__all__ = ["Pictures", "common_side"]
