"""Colours of clusters."""

from __future__ import annotations

import colorsys

import numpy as np

CLUSTER_COLORS = np.array(
    [
        (0, 150, 255),
        (255, 150, 0),
        (0, 200, 80),
        (235, 50, 50),
        (250, 235, 50),
        (90, 60, 255),
        (105, 240, 240),
        (180, 90, 120),
        (195, 0, 150),
        (180, 240, 165),
        (210, 180, 255),
        (225, 0, 225),
        (0, 255, 210),
        (45, 120, 30),
        (180, 240, 90),
        (240, 75, 105),
        (240, 225, 135),
        (75, 90, 195),
        (225, 105, 180),
        (90, 195, 150),
        (195, 105, 210),
        (240, 105, 15),
        (255, 150, 150),
        (240, 150, 75),
    ],
    dtype=np.uint8,
)
"""Colours of the first clusters: seen on black and on white, each as far as can be from those before it, for
people with red-green blindness too (greedy choice in CIELAB, with the vision model of Machado et al.
2009)."""


def colors(k: int) -> np.ndarray:
    """Colours of `k` clusters, ``(k, 3)`` uint8; those of the first clusters do not depend on `k`."""
    more = [
        # Steps of the golden angle never come back to a hue; lightness and strength change with every turn.
        colorsys.hsv_to_rgb(
            (0.1 + i * 0.6180339887) % 1, (0.95, 0.6, 0.8)[i % 3], (1.0, 0.95, 0.7)[i // 3 % 3]
        )
        for i in range(len(CLUSTER_COLORS), k)
    ]
    extra = np.round(np.array(more).reshape(-1, 3) * 255).astype(np.uint8)
    return np.concatenate([CLUSTER_COLORS, extra])[:k]
