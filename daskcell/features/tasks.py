"""The block tasks that describe cells; `lazy` runs them on arrays, `engine` on a study.

    labels ──> block_cells ──> all cells ──┬──> plan of reads ──> measure, embed, describe
    image  ──> sample ──> framing, greys ──┘

Every task reads its own boxes from a `PixelSource` and returns arrays: no files, no Dask, no study.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np

from daskcell.features.cell_index import ReadPlan, block_records
from daskcell.features.crops import BackgroundSample, background_sample
from daskcell.features.embedders import Embedder
from daskcell.features.encoders import ahead
from daskcell.features.measurements import measure_block
from daskcell.features.textures import Greys, grey_sample
from daskcell.geometry import Box

FULL_TASK = 512
"""Cells that fill the network's batches, and make a task worth its start: sparse blocks share one."""


class PixelSource(Protocol):
    """An image and its labels, read box by box."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""

    def cells(self, box: Box) -> np.ndarray:
        """Labels ``(h, w)``."""

    def pixels(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Pixels ``(C, h, w)`` to measure, and those to show to a network (preprocessed)."""


def block_cells(source: PixelSource, core: Box) -> np.ndarray:
    """Records of the parts of cells in one block."""
    return block_records(source.cells(core), (core.y0, core.x0))


def sample(source: PixelSource, boxes: Sequence[Box], step: int) -> list[tuple[BackgroundSample, np.ndarray]]:
    """Of each box: what `crops.fit_framing` and what `textures.fit_greys` need to know."""
    found = []
    for box in boxes:
        raw, prepared = source.pixels(box)
        cells = source.cells(box)
        found.append((background_sample(prepared, cells, step), grey_sample(raw, cells, step)))
    return found


def measure(
    source: PixelSource, reads: Sequence[ReadPlan], greys: Greys | None, kinds: Collection[str]
) -> np.ndarray:
    """Measurements of the cells of some reads, in their order."""
    with_pixels = not {"intensity", "texture"}.isdisjoint(kinds)
    rows = []
    for read in reads:
        raw = source.pixels(read.box)[0] if with_pixels else None
        rows.append(
            measure_block(source.cells(read.box), raw, read.box, read.records, source.shape, greys, kinds)
        )
    return np.concatenate(rows)


def embed(source: PixelSource, reads: Sequence[ReadPlan], embedder: Embedder) -> np.ndarray:
    """Vectors of the cells of some reads, in their order."""
    embedding = embedder.start()
    vectors: list[np.ndarray] = []
    for read, cells, _, prepared in ahead(_read(source, reads)):
        vectors += embedding.add(read, cells, prepared)
    return np.concatenate([*vectors, *embedding.finish()])


def describe(
    source: PixelSource,
    reads: Sequence[ReadPlan],
    embedder: Embedder,
    greys: Greys | None,
    kinds: Collection[str],
) -> tuple[np.ndarray, np.ndarray]:
    """`measure` and `embed` at once: pixels are read and preprocessed once."""
    rows: list[np.ndarray] = []
    embedding = embedder.start()
    vectors: list[np.ndarray] = []
    for read, cells, raw, prepared in ahead(_read(source, reads)):
        measured = raw if _needs_pixels(kinds) else None
        rows.append(measure_block(cells, measured, read.box, read.records, source.shape, greys, kinds))
        vectors += embedding.add(read, cells, prepared)
    return np.concatenate(rows), np.concatenate([*vectors, *embedding.finish()])


def _needs_pixels(kinds: Collection[str]) -> bool:
    return not {"intensity", "texture"}.isdisjoint(kinds)


def _read(
    source: PixelSource, reads: Sequence[ReadPlan]
) -> Iterator[tuple[ReadPlan, np.ndarray, np.ndarray, np.ndarray]]:
    for read in reads:
        yield read, source.cells(read.box), *source.pixels(read.box)
