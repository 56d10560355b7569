"""Cellpose: a network's flows, followed to their cells.

Stringer et al., "Cellpose: a generalist algorithm for cellular segmentation", Nature Methods 18 (2021);
Pachitariu, Rariden, Stringer, "Cellpose-SAM" (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from tlz import partition_all

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.signal import bin_values, find_signal
from daskcell.segmentation.core import dynamics
from daskcell.segmentation.core.ownership import Thresholds
from daskcell.segmentation.core.tiles import MEAN_DIAMETER, TileGrid
from daskcell.segmentation.image_params import ImageParams, find_bounds, merge_observed
from daskcell.segmentation.methods.base import BoxLabels, Method, Read, count_values, sample
from daskcell.segmentation.network import CELLPROB, blend, cut_tiles, needed_box, run_network, tiles_at_once
from daskcell.segmentation.tissue import tiles_without


@dataclass
class CellposeMethod(Method):
    """Tiles through a network; pixels along its flows; a cell is what ends at one place.

    Attributes
    ----------
    network : torch.nn.Module or callable returning one
        As `cellpose.core.run_net` accepts it. A callable is asked on the worker.
    diameter : float, "auto" or None
        In pixels; auto: to be measured first; None: the image is not rescaled.
    batch_size : int or None
        Tiles per network call; None: what suits the device.
    steps : int or None
        Steps along the flows; None: as Cellpose chooses.
    normalize : "signal" or "cellpose"
        See `daskcell.segment`.
    """

    network: Any
    thresholds: Thresholds = field(default_factory=Thresholds)
    diameter: float | Literal["auto"] | None = None
    batch_size: int | None = None
    steps: int | None = None
    normalize: Literal["signal", "cellpose"] = "signal"

    uses_network: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.diameter, str) and self.diameter != "auto":
            raise InputError(f"diameter cannot be {self.diameter!r}. Please give pixels, 'auto' or None.")
        if isinstance(self.diameter, (int, float)) and not self.diameter > 0:
            raise InputError(
                f"diameter cannot be {self.diameter}. Please give a size in pixels above 0, or None."
            )
        if self.normalize not in ("signal", "cellpose"):
            raise InputError(f"normalize cannot be {self.normalize!r}. Please give 'signal' or 'cellpose'.")

    @property
    def halo(self) -> int:  # type: ignore[override]
        """Two cells of the expected size, and room for paths and rims."""
        diameter = MEAN_DIAMETER if self.diameter == "auto" else self.diameter
        return max(96, int(3 * (diameter or 0)) + 32)

    @property
    def measures_diameter(self) -> bool:
        return self.diameter == "auto"

    def first_pass(self) -> CellposeMethod:
        # The thresholds do not matter here: they can be changed without the network being run again.
        return replace(self, diameter=None, thresholds=Thresholds(), steps=None)

    def contrast(self, windows: Sequence[np.ndarray]) -> list[float]:
        """The deviation of each window; of a nearly empty image, the signal in it.

        There, a hot pixel has more deviation than a cell.
        """
        if self.normalize == "signal":
            counts = [count_values(window, Box(0, 0, *window.shape[1:])) for window in windows]
            cores = np.zeros(len(windows))
            for channel, total in enumerate(np.sum(counts, axis=0)):
                signal = find_signal(total, bin_values(windows[0].dtype))
                if signal is not None and signal.is_sparse:
                    cores += [signal.count_cores(part[channel]) for part in counts]
            if cores.any():
                return list(cores)
        return super().contrast(windows)

    def with_diameter(self, diameter: float | None) -> CellposeMethod:
        return replace(self, diameter=diameter)

    def adapt(self, params: ImageParams) -> CellposeMethod:
        return replace(self, diameter=params.diameter)

    def tile_grid(self, shape: tuple[int, int]) -> TileGrid:
        assert self.diameter != "auto", "the diameter is not measured yet"
        return TileGrid.lay(shape, self.diameter)

    def observe(self, block: np.ndarray, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
        counts = count_values(block, box) if self.normalize == "signal" else np.zeros(0, np.int64)
        return [*sample(block, box, shape), counts]

    def merge(self, observed: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        return merge_observed(observed)

    def fit(self, observed: list[np.ndarray], shape: tuple[int, int]) -> ImageParams:
        assert self.diameter != "auto", "the diameter is not measured yet"
        *samples, counts = observed
        return ImageParams(shape, find_bounds(samples, counts if counts.size else None), self.diameter)

    def dump_params(self, params: ImageParams) -> dict[str, Any]:
        return params.to_json()

    def load_params(self, values: dict[str, Any]) -> ImageParams:
        return ImageParams.from_json(values)

    def describe(self, params: ImageParams) -> dict[str, Any]:
        return {
            "diameter": params.diameter,
            "skipped_fraction": len(params.skipped) / len(params.tiles),
        }

    def without_tissue(self, params: ImageParams, tissue: np.ndarray) -> ImageParams:
        return replace(params, skipped=tiles_without(tissue, params.tiles))

    def skipped_tiles(self, params: ImageParams) -> frozenset[int]:
        return params.skipped

    def run_tiles(self, read: Read, params: ImageParams, tiles: Sequence[int]) -> Iterator[np.ndarray]:
        needed = needed_box(params, tiles)
        if needed is None:
            return
        network = self.network if hasattr(self.network, "forward") else self.network()
        size = self.batch_size or tiles_at_once(network)
        part = params.normalise(read(needed))
        for batch in partition_all(size, tiles):
            yield from run_network(network, cut_tiles(part, needed, params, batch), size)

    def segment_box(
        self,
        box: Box,
        read: Read,
        params: ImageParams,
        shape: tuple[int, int],
        outputs: Mapping[int, np.ndarray],
    ) -> BoxLabels:
        return self.follow(blend(outputs, params, box), box, params)

    def follow(self, output: np.ndarray, box: Box, params: ImageParams) -> BoxLabels:
        """Labels of a box from the network's output ``(3, h, w)`` over it."""
        foreground = output[CELLPROB] > self.thresholds.cellprob
        steps = self.steps or params.steps
        start, end, tainted = dynamics.follow(output[:2], box, params.shape, foreground, steps)
        labels, unsafe = dynamics.gather(start, end, tainted, box.shape)
        return BoxLabels(labels, unsafe, output[:2] if self.thresholds.flow > 0 else None)


def network_source(model: Any, device: str, precision: str | None = None) -> Any:
    """A module as it is; a name or file as a function that loads it once per process.

    A file that is missing is refused here. Whether the device is there is asked where it is loaded: this
    process, and workers for other tasks, may have none.
    """
    if not isinstance(model, str):
        return model
    from daskcell.models import find_network

    find_network(model)
    return partial(_load, model, device, precision)


def _load(model: str, device: str, precision: str | None) -> Callable[..., Any]:
    import torch

    from daskcell.models import load_network

    return load_network(model, device, precision and getattr(torch, precision))
