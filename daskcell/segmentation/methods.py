"""Ways to find cells, each as the three questions the drivers ask.

    observe(part)           what one block contributes to the facts of the whole picture
    freeze(observations)    those facts, once, before any block is segmented
    look(frozen, read)      labels of any box, and where they depend on what lies outside it

A method knows neither Dask nor files: `read` is handed in. Ownership, checks, ids and painting are the same
for all (`ownership`, `cells`), so any function from a block to labels becomes a method without seams
(`BlockMethod`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from tlz import partition_all

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.signal import count_tiles
from daskcell.segmentation import dynamics
from daskcell.segmentation.image_params import Globals, find_bounds, merge_observed, sampling_step
from daskcell.segmentation.network import (
    CELLPROB,
    blend,
    cut_tiles,
    needed_box,
    run_network,
    tiles_at_once,
)
from daskcell.segmentation.ownership import Thresholds

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


@dataclass
class CellposeMethod:
    """Cellpose: a network's flows, followed to their cells.

    Attributes
    ----------
    network : torch.nn.Module or callable returning one
        As `cellpose.core.run_net` accepts it. A callable is asked on the worker.
    """

    network: Any
    thresholds: Thresholds = field(default_factory=Thresholds)
    diameter: float | None = None
    batch_size: int | None = None
    steps: int | None = None
    normalize: Literal["signal", "cellpose"] = "signal"

    @property
    def halo(self) -> int:
        """Two cells of the expected size, and room for paths and rims."""
        return max(96, int(3 * (self.diameter or 0)) + 32)

    def observe(self, part: np.ndarray, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
        refuse_unusable(part, box)
        tiles = tiles_of(part, box, shape) if self.normalize == "signal" else np.zeros(0, np.int64)
        return [*sample(part, box, shape), tiles]

    def freeze(self, observed: list[list[np.ndarray]], shape: tuple[int, int]) -> Globals:
        *samples, tiles = merge_observed(observed)
        return Globals(shape, find_bounds(samples, tiles if tiles.size else None), self.diameter)

    def run(self, read: Read, frozen: Globals, tiles: list[int]) -> Iterator[np.ndarray]:
        """Network outputs of `tiles`, each ``(3, 256, 256)`` float32, one after another."""
        held = needed_box(frozen, tiles)
        if held is None:
            return
        network = self.network if hasattr(self.network, "forward") else self.network()
        size = self.batch_size or tiles_at_once(network)
        part = frozen.normalise(read(held))
        for batch in partition_all(size, tiles):
            yield from run_network(network, cut_tiles(part, held, frozen, batch), size)

    def look(self, frozen: Globals, read: Read, outputs: dict[int, np.ndarray]) -> Look:
        def at(held: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
            tiles = frozen.tiles.touching(frozen.tiles.to_scaled(held))
            missing = [tile for tile in tiles if tile not in outputs and tile not in frozen.skipped]
            outputs.update(zip(missing, self.run(read, frozen, missing), strict=True))
            return self._label(blend(outputs, frozen, held), held, frozen)

        return at

    def _label(
        self, output: np.ndarray, held: Box, frozen: Globals
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        foreground = output[CELLPROB] > self.thresholds.cellprob
        steps = self.steps or frozen.steps
        start, end, tainted = dynamics.follow(output[:2], held, frozen.shape, foreground, steps)
        labels, unsafe = dynamics.gather(start, end, tainted, held.shape)
        return labels, unsafe, output[:2] if self.thresholds.flow > 0 else None


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


def sample(part: np.ndarray, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
    """Pixels of each channel of the block at `box` that Cellpose's percentiles are taken of."""
    step = sampling_step(shape)
    return [plane[-box.y0 % step[0] :: step[0], -box.x0 % step[1] :: step[1]].ravel() for plane in part]


def tiles_of(part: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Counts of the tiles of the block at `box`, which must begin at multiples of `signal.SPAN` pixels."""
    return count_tiles(part.astype(np.uint8) if part.dtype.kind == "b" else part, box, shape)


def network_source(model: Any, device: str, precision: str | None = None) -> Any:
    """A module as it is; a name or file as a function that loads it once per process.

    A file that is missing is refused here. Whether the device is there is asked where it is loaded: this
    process, and workers for other tasks, may have none.
    """
    if not isinstance(model, str):
        return model
    import torch

    from daskcell.models import find_network, load_network

    find_network(model)
    return partial(load_network, model, device, precision and getattr(torch, precision))


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
