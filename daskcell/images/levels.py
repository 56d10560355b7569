"""The levels of an image on disk: where the pixels of each come from, and how blocks of them are made.

A task that has written 4096 x 4096 pixels has in hand what 2048, 1024 and 512 of the next levels need. So
their files are that small, and nothing is read again until 1/256 of the pixels are left:

    file's level 0  ->  level 0  --halved in hand-->  levels 1 to 3  --read again-->  level 4 ...
    file's level 1  ->  level 1, instead, where it has half the sides; and so on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcell.geometry import Box, Grid
from daskcell.images import store
from daskcell.images.pyramid import halve_mean, halve_nearest, halvings, level_shapes, source_box
from daskcell.images.shards import write_box

Shape = tuple[int, int]


@dataclass(frozen=True)
class Level:
    """One level of an image to be written."""

    number: int
    shape: Shape
    files: tuple[int, int, int]
    """Shape ``(C, y, x)`` of what is written at once."""
    stored: bool
    """The file that is converted has these pixels, as its level of this number."""
    in_hand: bool = False
    """Written by the tasks that write the level before."""

    @property
    def grid(self) -> Grid:
        sides = zip(self.shape, self.files[1:], strict=True)
        return Grid(*((*range(0, length, side), length) for length, side in sides))


def plan_levels(stored: Sequence[Shape], channels: int, dtype: Any, *, strips: bool = False) -> list[Level]:
    """The levels of an image whose file has `stored` ones; for `strips` see `store.shard_shape`."""
    kept = halvings(stored)
    levels: list[Level] = []
    for number, shape in enumerate(level_shapes(stored[0], stored[1:kept])):
        above = levels[-1] if levels else None
        halved = None
        if above is not None and (above.stored or above.in_hand) and number >= kept:
            halved = _halved_files(above, shape)
        files = store.shard_shape(channels, shape, dtype, strips=strips and number < kept)
        levels.append(Level(number, shape, halved or files, number < kept, in_hand=halved is not None))
    return levels


def _halved_files(above: Level, shape: Shape) -> tuple[int, int, int] | None:
    """Shape of files that hold the halves of one file each of the level before, if it is whole chunks."""
    sides = []
    for side, long, length in zip(above.files[1:], above.shape, shape, strict=True):
        if side >= long:  # a single one
            sides.append(-(-length // store.CHUNK) * store.CHUNK)
        elif side % (2 * store.CHUNK) == 0:
            sides.append(side // 2)
        else:
            return None
    return above.files[0], sides[0], sides[1]


def halved_box(box: Box) -> Box:
    """Where the halves of `box`, whose corner is even, lie on the next level."""
    return Box(box.y0 // 2, box.x0 // 2, (box.y1 + 1) // 2, (box.x1 + 1) // 2)


def downscale_block(group: str, level: int, box: Box, method: str) -> int:
    """Write `box` of a level from the level before, a strip of chunks at a time; returns how many files."""
    halve: Callable[[NDArray], NDArray] = halve_mean if method == "mean" else halve_nearest
    before = store.writable(group, level - 1)
    target = store.writable(group, level)
    shape = (before.shape[-2], before.shape[-1])
    out = np.empty((*target.shape[:-2], *box.shape), target.dtype)
    for y0 in range(box.y0, box.y1, store.CHUNK):
        strip = Box(y0, box.x0, min(y0 + store.CHUNK, box.y1), box.x1)
        out[(..., *strip.within(box))] = halve(np.asarray(before[(..., *source_box(strip, shape).slices)]))
    return write_box(target, box, out)


def downscale_levels(group: str, levels: Sequence[int], method: str) -> int:
    """Write whole levels, one after another, each from the one before; returns how many files."""
    files = 0
    for level in levels:
        height, width = store.writable(group, level).shape[-2:]
        files += downscale_block(group, level, Box(0, 0, height, width), method)
    return files
