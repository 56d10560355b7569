"""Cellpose: a network's flows, followed to their cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from tlz import partition_all

from daskcell.geometry import Box
from daskcell.segmentation.core import dynamics
from daskcell.segmentation.core.ownership import Thresholds
from daskcell.segmentation.image_params import Globals, find_bounds, merge_observed
from daskcell.segmentation.methods.base import Look, Read, refuse_unusable, sample, tiles_of
from daskcell.segmentation.network import (
    CELLPROB,
    blend,
    cut_tiles,
    needed_box,
    run_network,
    tiles_at_once,
)


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
        tiles = tiles_of(part, box) if self.normalize == "signal" else np.zeros(0, np.int64)
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
