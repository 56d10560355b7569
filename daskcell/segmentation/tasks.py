"""What workers do for `segment_slide`: a function for each kind of task, from files to one file.

Every file appears whole or not at all, so a task may run twice, and a run that was killed goes on
where it was. Which tasks there are, and when, is the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from daskcell.config import SegmentSettings
from daskcell.geometry import Box, Grid
from daskcell.images import image_info, read_block, write_labels_block
from daskcell.preprocess import PreparedImage
from daskcell.segmentation.core.cells import check_block, load_cells, save_cells
from daskcell.segmentation.core.ownership import Thresholds, load_candidates, own_labels, save_candidates
from daskcell.segmentation.core.seams import SeamReport, paint_core
from daskcell.segmentation.core.tiles import TILE
from daskcell.segmentation.diameter import cell_areas, first_pass_windows
from daskcell.segmentation.image_params import Globals, merge_observed
from daskcell.segmentation.index import block_records, merge_records, write_index
from daskcell.segmentation.methods.base import Method, Read
from daskcell.segmentation.methods.cellpose import CellposeMethod, network_source
from daskcell.segmentation.methods.watershed import WatershedMethod
from daskcell.segmentation.tissue import tiles_without, tissue_mask
from daskcell.storage.atomic import save_arrays, save_npz, save_parts, write_json

Index = tuple[int, int]


@dataclass(frozen=True)
class Job:
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

    def file(self, kind: str, at: Index) -> Path:
        folder = self.flows if kind == "tiles" else self.scratch
        return Path(
            folder, kind, f"{at[0]}_{at[1]}.{'npy' if kind in ('tiles', 'ids', 'records') else 'npz'}"
        )

    def further_file(self, at: Index, number: int) -> Path:
        """Tiles of other blocks that a block needs besides those within its halo."""
        return Path(self.scratch, "further", f"{at[0]}_{at[1]}_{number}.npy")

    @property
    def globals_file(self) -> Path:
        return Path(self.flows, "globals.json")

    def read(self, box: Box) -> np.ndarray:
        """Preprocessed pixels ``(C, h, w)`` of `box`."""
        part = self.image.read(box)
        return part if self.settings.channels is None else part[list(self.settings.channels)]

    @property
    def measures_diameter(self) -> bool:
        return self.settings.method == "cellpose" and self.settings.diameter == "auto"

    @property
    def method(self) -> Method:
        settings = self.settings
        thresholds = Thresholds(
            settings.cellprob_threshold,
            settings.flow_threshold,
            settings.min_size,
            settings.max_size_fraction,
        )
        if settings.method == "watershed":
            return WatershedMethod(settings.watershed, thresholds)
        network = network_source(settings.model, self.device, settings.precision)
        diameter = None if settings.diameter in (None, "auto") else float(settings.diameter)
        return CellposeMethod(
            network, thresholds, diameter, settings.batch_size, settings.niter, settings.normalize
        )


def observe_blocks(job: Job, group: tuple[Index, ...]) -> None:
    """Some blocks, one after another: what is kept of each is small, and so is the time."""
    method, cores = job.method, [job.grid.core(at) for at in group]
    observed = [method.observe(job.read(core), core, job.shape) for core in cores]
    save_npz(job.file("samples", group[0]), *merge_observed(observed))


def choose_windows(job: Job) -> list[tuple[Box, Globals]]:
    """What the first pass for the diameter looks at, and how it is normalised."""
    method = job.method
    assert isinstance(method, CellposeMethod)
    return first_pass_windows(method, job.read, job.shape)


def measure_window(job: Job, box: Box, frozen: Globals) -> list[int]:
    """Areas of the cells that the first pass finds in a window."""
    method = job.method
    assert isinstance(method, CellposeMethod)
    return cell_areas(method, job.read(box), frozen)


def freeze_globals(job: Job, groups: list[tuple[Index, ...]], diameter: float | None) -> None:
    """Write the facts of the whole picture; `diameter` is the measured one, None where none was asked for."""
    method = job.method
    observed = []
    for group in groups:
        if not job.file("samples", group[0]).exists():
            observe_blocks(job, group)
        with np.load(job.file("samples", group[0]), allow_pickle=False) as arrays:
            observed.append([arrays[name] for name in arrays.files])
    if isinstance(method, CellposeMethod):
        if job.measures_diameter:
            method.diameter = diameter
        frozen = method.freeze(observed, job.shape)
        if job.settings.tissue_mask:
            info = image_info(job.path)
            small = info.levels[-1]
            picture = read_block(job.path, Box(0, 0, *small), len(info.levels) - 1)
            frozen = replace(frozen, skipped=tiles_without(tissue_mask(picture, info.is_rgb), frozen.tiles))
        write_json(job.globals_file, frozen.to_json())
    else:
        write_json(job.globals_file, method.freeze(observed, job.shape).to_json())


@lru_cache(maxsize=8)
def read_globals(path: str) -> Any:
    values = json.loads(Path(path).read_text())
    return Globals.from_json(values) if "diameter" in values else WatershedMethod.globals_from_json(values)


def run_tiles(job: Job, at: Index, tiles: list[int], file: Path | None = None) -> int:
    """Network outputs of `tiles`, into the file of the block that owns them, or another."""
    frozen = read_globals(str(job.globals_file))
    method = job.method
    assert isinstance(method, CellposeMethod)
    outputs = method.run(job.read, frozen, tiles)
    # One after another: for small cells all together are larger than a worker's memory.
    save_parts(file or job.file("tiles", at), (len(tiles), 3, TILE, TILE), np.float32, outputs)
    return len(tiles)


class _Outputs(dict[int, Any]):
    """Network outputs by tile; those on disk are read each time they are asked for, and not kept."""

    def __getitem__(self, tile: int) -> np.ndarray:
        found = super().__getitem__(tile)
        return np.array(np.load(found[0], mmap_mode="r")[found[1]]) if isinstance(found, tuple) else found


class NotThere(Exception):
    """A block looks further than the network outputs it was given."""

    def __init__(self, tiles: list[int]):
        super().__init__(tiles)
        self.tiles = tiles


class _StoredOutputs(CellposeMethod):
    """Labels without a network: only some workers may have the GPU it runs on."""

    def run(self, read: Read, frozen: Globals, tiles: list[int]) -> Iterator[np.ndarray]:
        if tiles:
            raise NotThere(tiles)
        return iter(())


def label_block(
    job: Job, at: Index, halo: int, sources: list[Index], further: Mapping[Path, list[int]]
) -> tuple[SeamReport, int] | list[int]:
    """Candidates of a block, from the tiles of the blocks `sources` and of the files `further`.

    Returns what the report says of it and its largest extent, or the tiles that it needs besides.
    """
    frozen, method, grid = read_globals(str(job.globals_file)), job.method, job.grid
    outputs = _Outputs()
    for source in sources:
        tiles = [tile for tile in frozen.tiles.owned(grid.core(source)) if tile not in frozen.skipped]
        outputs |= {tile: (job.file("tiles", source), n) for n, tile in enumerate(tiles)}
    for file, tiles in further.items():
        outputs |= {tile: (file, n) for n, tile in enumerate(tiles)}
    if isinstance(method, CellposeMethod):
        method = _StoredOutputs(**vars(method))
    try:
        look = method.look(frozen, job.read, outputs)
        found, doublings = own_labels(grid.core(at), halo, job.shape, look, method.thresholds)
    except NotThere as more:
        return more.tiles
    save_candidates(job.file("labels", at), found)
    return SeamReport(redone=int(doublings > 0)), found.extent


def largest_extent(job: Job, at: Index) -> int:
    return load_candidates(job.file("labels", at)).extent


def check_blocks(job: Job, group: tuple[Index, ...], steps: int) -> list[tuple[np.ndarray, Box]]:
    found, thresholds = [], job.method.thresholds
    for at in group:
        cells = check_block(load_candidates(job.file("labels", at)), steps, thresholds)
        save_cells(job.file("cells", at), cells)
        found.append((cells.anchors[:, 0] * job.shape[1] + cells.anchors[:, 1], cells.reach))
    return found


def paint_block(job: Job, at: Index, sources: list[Index]) -> SeamReport:
    """Write the labels of a block, and the records of what lies in it."""
    core = job.grid.core(at)
    parts = [(load_cells(job.file("cells", source)), np.load(job.file("ids", source))) for source in sources]
    labels, report = paint_core(parts, core, job.shape)
    write_labels_block(job.path, job.name, core, labels)
    save_arrays(job.file("records", at), block_records(labels, (core.y0, core.x0)))
    return report


def index_labels(job: Job, path: str) -> None:
    """Write the index of all labels, from the records of the blocks."""
    write_index(path, merge_records(np.load(job.file("records", at)) for at in job.grid))
