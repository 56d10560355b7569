"""From an image to a feature vector for each cell: by encoding crops, or by pooling feature maps over cells.

An embedder says which pixels to read (`plan`) and computes vectors from them (`start`); it is small and
picklable, so that a task can carry it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from daskcell.features.cell_index import ReadPlan, plan_reads
from daskcell.features.crops import BackgroundSample, Framing, cut_cells, fit_framing, resize
from daskcell.features.encoders import Batches, Encoder, EncoderSpec, load
from daskcell.features.feature_maps import FeatureMaps, load_feature_maps
from daskcell.features.tiles import NetworkTiling
from daskcell.geometry import Grid
from daskcell.models.registry import encoder_kind

Network = EncoderSpec | Encoder | FeatureMaps
_CELL = {"own": 48.0}  # diameters at which networks are shown cells; ImageNet's: as small as they bear
_OTHER_CELL = 32.0


class Embedder(Protocol):
    """Common interface of `CropEmbedder` and `MaskEmbedder`."""

    def plan(self, records: np.ndarray, grid: Grid) -> dict[int, list[ReadPlan]]:
        """What each block, or group of tiles, has to read; together every cell once."""

    def start(self) -> Embedding:
        """Begin to embed the cells of some reads."""

    @property
    def width(self) -> int:
        """Numbers a cell; loads the network."""


class Embedding(Protocol):
    """Takes one read after another and gives vectors ``(m, d)`` float32 in the order of the cells."""

    def add(self, read: ReadPlan, labels: np.ndarray, image: np.ndarray) -> Iterable[np.ndarray]:
        """Vectors that are ready once the pixels of `read` are known: ``(h, w)`` and ``(C, h, w)``."""

    def finish(self) -> Iterable[np.ndarray]:
        """The vectors that are left."""


@dataclass(frozen=True)
class CropEmbedder:
    """Every cell cropped, resized and encoded by itself."""

    network: EncoderSpec | Encoder
    framing: Framing

    def plan(self, records: np.ndarray, grid: Grid) -> dict[int, list[ReadPlan]]:
        return plan_reads(records, grid, self.framing.margin, self.framing.window)

    def start(self) -> Embedding:
        return _CropEmbedding(Batches(self._encoder), self.framing)

    @property
    def width(self) -> int:
        return self._encoder.width

    @property
    def _encoder(self) -> Encoder:
        return self.network if isinstance(self.network, Encoder) else load(self.network)


@dataclass(frozen=True)
class _CropEmbedding:
    """Batches are filled across reads."""

    batches: Batches
    framing: Framing

    def add(self, read: ReadPlan, labels: np.ndarray, image: np.ndarray) -> Iterable[np.ndarray]:
        encoder = self.batches.encoder
        cut = cut_cells(image, labels, read.box, read.records, self.framing)
        return self.batches.add(
            crop if encoder.device != "cpu" else resize(crop, encoder.size) for crop in cut
        )

    def finish(self) -> Iterable[np.ndarray]:
        return self.batches.finish()


@dataclass(frozen=True)
class MaskEmbedder:
    """The network's feature maps of the whole image, pooled over every cell."""

    network: EncoderSpec | FeatureMaps
    framing: Framing
    tiling: NetworkTiling

    def plan(self, records: np.ndarray, grid: Grid) -> dict[int, list[ReadPlan]]:
        block = max((side for sides in grid.chunks for side in sides), default=1)
        return self.tiling.plan(records, block)

    def start(self) -> Embedding:
        return self  # nothing is kept between reads

    def add(self, read: ReadPlan, labels: np.ndarray, image: np.ndarray) -> Iterable[np.ndarray]:
        from daskcell.features.pooling import pool_cells

        return [
            pool_cells(image, labels, read.box, read.records, self.framing, self.tiling, self._feature_maps)
        ]

    def finish(self) -> Iterable[np.ndarray]:
        return []

    @property
    def width(self) -> int:
        from daskcell.features.pooling import REGIONS

        return 2 * REGIONS * self._feature_maps.width

    @property
    def _feature_maps(self) -> FeatureMaps:
        return self.network if isinstance(self.network, FeatureMaps) else load_feature_maps(self.network)


def make_embedder(
    network: Network,
    samples: Sequence[BackgroundSample],
    records: np.ndarray,
    shape: tuple[int, int],
    *,
    size: int | None = None,
    pooling: Literal["crop", "mask"] = "crop",
    scale: float | Literal["auto"] = 1.0,
    margin: float = 0.1,
    window: int | None = None,
    mask: bool = True,
    channels: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
) -> Embedder:
    """The embedder for a pooling method, fitted to one image.

    Parameters
    ----------
    samples, mask, channels, limits, margin, window
        As in `fit_framing`.
    records
        All cells of the image: their median diameter sets the automatic scale.
    shape : (Y, X)
        Of the image.
    size
        Side of the crops, where there are crops.
    """
    framing = fit_framing(
        samples, size=size or 0, margin=margin, window=window, mask=mask, channels=channels, limits=limits
    )
    if pooling == "crop":
        assert not isinstance(network, FeatureMaps)
        return CropEmbedder(network, framing)
    assert not isinstance(network, Encoder)
    if scale == "auto":
        from daskcell.features.pooling import natural_scale

        cell = (
            network.cell
            if isinstance(network, FeatureMaps)
            else _CELL.get(encoder_kind(network.name), _OTHER_CELL)
        )
        scale = natural_scale(records, cell)
    return MaskEmbedder(network, framing, NetworkTiling(shape, scale))


@dataclass(frozen=True)
class Task:
    """Reads that are processed together, so that the network's batches are full."""

    number: int
    reads: tuple[ReadPlan, ...]

    @property
    def count(self) -> int:
        return sum(len(read.records) for read in self.reads)


def make_tasks(plans: dict[int, list[ReadPlan]], cells: int) -> list[Task]:
    """Tasks of at least `cells` cells each, but the last: sparse blocks share one."""
    tasks: list[Task] = []
    pending: list[ReadPlan] = []
    for number in sorted(plans):
        pending += plans[number]
        if sum(len(read.records) for read in pending) >= cells:
            tasks.append(Task(len(tasks), tuple(pending)))
            pending = []
    if pending:
        tasks.append(Task(len(tasks), tuple(pending)))
    return tasks
