"""What workers do for `segment_slide`: a function for each kind of task, from files to one file.

Every file appears whole or not at all, so a task may run twice, and a run that was killed goes on where it
was. What is done to a block is said in `blocks`; which tasks there are, and when, is the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from daskcell.config import SegmentSettings
from daskcell.geometry import Box, Grid
from daskcell.images import image_info, read_block, write_labels_block
from daskcell.preprocess import PreparedImage
from daskcell.segmentation import blocks
from daskcell.segmentation.core.cells import check_block, load_cells, save_cells
from daskcell.segmentation.core.ownership import load_candidates, save_candidates
from daskcell.segmentation.core.seams import SeamReport, paint_core
from daskcell.segmentation.core.tiles import TILE, TileGrid
from daskcell.segmentation.diameter import cell_areas, first_pass_windows
from daskcell.segmentation.index import block_records, merge_records, write_index
from daskcell.segmentation.methods import Method, make_method
from daskcell.segmentation.tissue import tissue_mask
from daskcell.storage.atomic import save_arrays, save_npz, saving_parts, write_json

Index = tuple[int, int]
Kind = Literal["samples", "tiles", "extra_tiles", "candidates", "cells", "ids", "records"]
_OF_ARRAYS = ("tiles", "ids", "records")


@dataclass(frozen=True)
class SlideBlocks:
    """What all tasks of one slide share; small, and fit to be sent to a worker."""

    image: PreparedImage
    name: str
    settings: SegmentSettings
    block: int
    scratch: str
    flows: str
    device: str

    @property
    def path(self) -> str:
        return self.image.path

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.shape

    @property
    def grid(self) -> Grid:
        return Grid.regular(self.shape, self.block)

    def file(self, kind: Kind, at: Index) -> Path:
        folder = self.flows if kind == "tiles" else self.scratch
        return Path(folder, kind, f"{at[0]}_{at[1]}.{'npy' if kind in _OF_ARRAYS else 'npz'}")

    def extra_tiles_file(self, at: Index, number: int) -> Path:
        """Tiles of other blocks that a block needs besides those within its halo."""
        return Path(self.scratch, "extra_tiles", f"{at[0]}_{at[1]}_{number}.npy")

    @property
    def params_file(self) -> Path:
        return Path(self.flows, "globals.json")

    def read(self, box: Box) -> np.ndarray:
        """Preprocessed pixels ``(C, h, w)`` of `box`."""
        part = self.image.read(box)
        return part if self.settings.channels is None else part[list(self.settings.channels)]

    @property
    def method(self) -> Method:
        return make_method(self.settings.method, self.settings, device=self.device)

    @property
    def params(self) -> Any:
        """Facts of the whole image, once `fit_params` has written them."""
        return self.method.load_params(_read_json(str(self.params_file)))

    def owned_tiles(self, at: Index, grid: TileGrid, skipped: frozenset[int]) -> list[int]:
        """Tiles that go through the network with a block."""
        return [tile for tile in grid.owned(self.grid.core(at)) if tile not in skipped]


@lru_cache(maxsize=8)
def _read_json(path: str) -> Any:
    return json.loads(Path(path).read_text())


# -- facts of the whole image --------------------------------------------------------------------------
def observe_blocks(slide: SlideBlocks, group: tuple[Index, ...]) -> None:
    """Some blocks, one after another: what is kept of each is small, and so is the time."""
    cores = [slide.grid.core(at) for at in group]
    save_npz(slide.file("samples", group[0]), *blocks.observe(slide.method, slide.read, cores, slide.shape))


def choose_windows(slide: SlideBlocks) -> list[tuple[Box, Any]]:
    """What the first pass for the diameter looks at, and how it is normalised."""
    return first_pass_windows(slide.method, slide.read, slide.shape)


def measure_window(slide: SlideBlocks, box: Box, params: Any) -> list[int]:
    """Areas of the cells that the first pass finds in a window."""
    return cell_areas(slide.method, slide.read(box), params)


def fit_params(slide: SlideBlocks, groups: list[tuple[Index, ...]], diameter: float | None) -> None:
    """Write the facts of the whole image; `diameter` is the measured one, None where none was asked for."""
    method = slide.method
    observed = []
    for group in groups:
        if not slide.file("samples", group[0]).exists():
            observe_blocks(slide, group)
        with np.load(slide.file("samples", group[0]), allow_pickle=False) as arrays:
            observed.append([arrays[name] for name in arrays.files])
    if method.measures_diameter:
        method = method.with_diameter(diameter)
    tissue = None
    if slide.settings.tissue_mask and method.uses_network:
        info = image_info(slide.path)
        small = read_block(slide.path, Box(0, 0, *info.levels[-1]), len(info.levels) - 1)
        tissue = tissue_mask(small, info.is_rgb)
    params = blocks.fit(method, observed, slide.shape, tissue)
    write_json(slide.params_file, method.dump_params(params))


# -- network and labels --------------------------------------------------------------------------------
def run_tiles(slide: SlideBlocks, at: Index, tiles: list[int], file: Path | None = None) -> int:
    """Network outputs of `tiles`, into the file of the block that owns them, or another."""
    # One after another: for small cells all together are larger than a worker's memory.
    with saving_parts(file or slide.file("tiles", at), (len(tiles), 3, TILE, TILE), np.float32) as write:
        for output in slide.method.run_tiles(slide.read, slide.params, tiles):
            write(output)
    return len(tiles)


class StoredTiles(Mapping[int, np.ndarray]):
    """Network outputs by tile, read from disk each time they are asked for, and not kept."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Path, int]] = {}

    def add(self, file: Path, tiles: list[int]) -> None:
        """`file` holds the outputs of `tiles`, in this order."""
        self._places |= {tile: (file, n) for n, tile in enumerate(tiles)}

    def __getitem__(self, tile: int) -> np.ndarray:
        file, n = self._places[tile]
        return np.array(np.load(file, mmap_mode="r")[n])

    def __contains__(self, tile: object) -> bool:
        return tile in self._places

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class LabelledBlock(NamedTuple):
    """What became of `label_block`."""

    missing_tiles: list[int]
    """Tiles it needs besides; there are labels only if there are none."""
    halo_retries: int
    extent: int
    """Largest extent of a cell, see `Candidates.extent`."""


def label_block(
    slide: SlideBlocks, at: Index, halo: int, sources: list[Index], extra_tiles: Mapping[Path, list[int]]
) -> LabelledBlock:
    """Candidates of a block, from the tiles of the blocks `sources` and of the files `extra_tiles`."""
    method, params = slide.method, slide.params
    grid, skipped = method.adapt(params).tile_grid(slide.shape), method.skipped_tiles(params)
    outputs = StoredTiles()
    if grid is not None:
        for source in sources:
            outputs.add(slide.file("tiles", source), slide.owned_tiles(source, grid, skipped))
    for file, tiles in extra_tiles.items():
        outputs.add(file, tiles)
    core = slide.grid.core(at)
    labelled = blocks.label_block(
        method, params, slide.read, core, halo, slide.shape, outputs, run_network=False
    )
    if labelled.found is None:
        return LabelledBlock(labelled.extra_tiles, 0, 0)
    save_candidates(slide.file("candidates", at), labelled.found)
    return LabelledBlock([], labelled.halo_retries, labelled.found.extent)


def largest_extent(slide: SlideBlocks, at: Index) -> int:
    return load_candidates(slide.file("candidates", at)).extent


# -- checks and painting -------------------------------------------------------------------------------
def check_blocks(slide: SlideBlocks, group: tuple[Index, ...], steps: int) -> list[tuple[np.ndarray, Box]]:
    """Finished cells of some blocks; returns the pixel numbers of their anchors, and a box around them."""
    found, thresholds = [], slide.method.thresholds
    for at in group:
        cells = check_block(load_candidates(slide.file("candidates", at)), steps, thresholds)
        save_cells(slide.file("cells", at), cells)
        found.append((cells.anchors[:, 0] * slide.shape[1] + cells.anchors[:, 1], cells.reach))
    return found


def paint_block(slide: SlideBlocks, at: Index, sources: list[Index]) -> SeamReport:
    """Write the labels of a block, and the records of what lies in it."""
    core = slide.grid.core(at)
    parts = [
        (load_cells(slide.file("cells", source)), np.load(slide.file("ids", source))) for source in sources
    ]
    labels, report = paint_core(parts, core, slide.shape)
    write_labels_block(slide.path, slide.name, core, labels)
    save_arrays(slide.file("records", at), block_records(labels, (core.y0, core.x0)))
    return report


def index_labels(slide: SlideBlocks, path: str) -> None:
    """Write the index of all labels, from the records of the blocks."""
    write_index(path, merge_records(np.load(slide.file("records", at)) for at in slide.grid))
