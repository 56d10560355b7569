"""`segment_slide`: cells of an OME-Zarr image, block by block, from disk to disk.

    observe(blocks) ─┐
    diameter        ─┴ fit ──> globals.json
    network(block) ─┐                        tiles owned by the block           (GPU workers, where there are)
                    ├──> label(block)        when all tiles around it are there (CPU workers)
    network(...)   ─┘        │
             largest mask of all blocks
                             └──> check(block) ── ids ──> paint(block) ──> labels/<name>

Every task reads what it needs and writes one file under a temporary name, so a run that is killed continues
where it was: `scratch` belongs to one content key. Tiles are removed when the last block that needs them has
been labelled, and no block runs far ahead, so memory does not grow with the slide. Scratch space does: the
candidates of all blocks, 8 bytes a pixel of a cell, wait for the largest mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from tlz import partition_all

from daskcell.compute import Workers
from daskcell.config import SegmentSettings
from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.images import build_label_pyramid, create_labels
from daskcell.preprocess import Plan, PreparedImage
from daskcell.segmentation.core.cells import number, refuse_too_many
from daskcell.segmentation.core.seams import SeamReport
from daskcell.segmentation.diameter import diameter_of
from daskcell.segmentation.tasks import (
    Index,
    LabelledBlock,
    SlideBlocks,
    check_blocks,
    choose_windows,
    fit_params,
    index_labels,
    label_block,
    largest_extent,
    measure_window,
    observe_blocks,
    paint_block,
    run_tiles,
)
from daskcell.storage.atomic import remove, save_arrays, temporaries

_FIRST_PASS, _OBSERVED, _CHECKED, _PAINTED = 0.4, 0.03, 0.05, 0.1
"""Parts of the time, roughly, for progress: the diameter, percentiles, checks and painting."""
_CHECKS_A_TASK = 4
_OBSERVED_A_TASK = 8
"""The same for any number of workers: a run goes on from the files of another."""


def segment_slide(
    path: str | Path,
    name: str,
    settings: SegmentSettings,
    plan: Plan,
    workers: Workers,
    block: int,
    scratch: str | Path,
    *,
    flows: str | Path | None = None,
    device: str = "cpu",
    index: str | Path | None = None,
) -> dict[str, Any]:
    """Find the cells of an OME-Zarr image and write them as ``labels/<name>``.

    Parameters
    ----------
    path
        OME-Zarr image group.
    plan
        Frozen preprocessing; what the network sees is `PreparedImage.read`.
    block
        Side in pixels of the blocks; changes no label.
    scratch
        Folder for intermediate files. A folder from a run that was killed is continued.
    flows
        Folder that keeps the network's outputs and the image parameters, so that thresholds can be changed
        without the network. It belongs to one image, one preprocessing, one network and the settings that
        decide its outputs: another of these needs another folder.
    device
        ``"cpu"`` or ``"cuda"``: where the network runs.
    index
        Parquet file to write: first pixel, bounding box and area of every label (`segmentation.index`).

    Returns
    -------
    dict
        The seam report, with the number of ``cells``, the ``diameter`` used, and ``skipped_fraction``.
    """
    channels = plan.out_channels if settings.channels is None else len(settings.channels)
    if settings.channels is not None and (not channels or max(settings.channels) >= plan.out_channels):
        raise InputError(
            f"segment.channels={settings.channels} does not fit an image with {plan.out_channels} channels."
        )
    if channels > 3:
        raise InputError(
            f"{path} has {channels} channels after preprocessing, and one to three can be segmented. "
            "Please choose with segment.channels, or leave preprocess.reconstruct on."
        )
    refuse_too_many(plan.shape, settings.min_size)
    scratch = Path(scratch)
    keep = flows is not None
    flows = scratch / "flows" if flows is None else Path(flows)
    slide = SlideBlocks(
        PreparedImage(str(path), plan), name, settings, block, str(scratch), str(flows), device
    )
    for kind in ("samples", "candidates", "extra_tiles", "cells", "ids", "records"):
        (scratch / kind).mkdir(parents=True, exist_ok=True)
    (flows / "tiles").mkdir(parents=True, exist_ok=True)

    if not slide.params_file.exists():
        _fit(slide, workers)
    report, extent = _Labelling(slide, workers, keep=keep).run()
    if keep:
        remove(*temporaries(flows), *temporaries(flows / "tiles"))  # of tasks that were killed
    report += _check_and_paint(slide, workers, 2 * extent, index)
    return report.to_json() | slide.method.describe(slide.params)


# -- facts of the whole image --------------------------------------------------------------------------
def _fit(slide: SlideBlocks, workers: Workers) -> None:
    diameter = _diameter(slide, workers) if slide.method.measures_diameter else None
    groups = list(partition_all(_OBSERVED_A_TASK, slide.grid))
    if len(groups) > 1:  # else it is observed where the parameters are fitted
        window = workers.part(_OBSERVED, len(groups)).window()
        for group in groups:
            if not slide.file("samples", group[0]).exists():
                window.submit(group, observe_blocks, slide, group)
        for _ in window:
            pass
    window = workers.part(0.0, 1).window()
    window.submit("fit", fit_params, slide, groups, diameter)
    for _ in window:
        pass


def _diameter(slide: SlideBlocks, workers: Workers) -> float | None:
    """Measured in a first pass: a task for each of the windows it looks at."""
    window = workers.part(0.0, 1).window()
    window.submit("windows", choose_windows, slide)
    ((_, chosen),) = window
    window = workers.part(_FIRST_PASS, len(chosen)).window()
    for at, (box, params) in enumerate(chosen):
        window.submit(at, measure_window, slide, box, params, kind="network")
    return diameter_of(areas for _, areas in window)


# -- network and labels --------------------------------------------------------------------------------
class _Step(Enum):
    """Kinds of tasks of `_Labelling`."""

    TILES = "network"
    LABELS = "labels"
    EXTRA_TILES = "extra tiles"
    EXTENT = "extent"

    def __repr__(self) -> str:
        return repr(self.value)


class _Labelling:
    """Runs the network on all tiles, and labels each block as soon as the tiles around it are there.

    A block needs the tiles that touch its core and halo; each of these is owned by one block, and computed
    with the others of that block. What is there already, from a run that was killed or kept flows, is not
    done again.
    """

    def __init__(self, slide: SlideBlocks, workers: Workers, *, keep: bool):
        self._slide, self._keep = slide, keep
        grid, params = slide.grid, slide.params
        method = slide.method.adapt(params)
        self._halo = method.halo
        self._largest = 0
        self._report = SeamReport(blocks=len(grid))

        tile_grid, skipped = method.tile_grid(slide.shape), method.skipped_tiles(params)
        self._report.skipped = len(skipped)
        self._tiles: dict[Index, list[int]] = {}  # owned by each block
        self._sources: dict[Index, set[Index]] = {at: set() for at in grid}  # blocks whose tiles each needs
        if tile_grid is not None:
            self._tiles = {at: slide.owned_tiles(at, tile_grid, skipped) for at in grid}
            owner = {tile: at for at, tiles in self._tiles.items() for tile in tiles}
            for at in grid:
                grown = grid.core(at).grow(self._halo).clip(slide.shape)
                touching = tile_grid.touching(tile_grid.to_scaled(grown))
                self._sources[at] = {owner[tile] for tile in touching if tile in owner}

        to_label = [at for at in grid if not slide.file("candidates", at).exists()]
        self._labelled = [at for at in grid if at not in set(to_label)]
        self._users: dict[Index, set[Index]] = {}  # blocks that still need the tiles of each
        for at in to_label:
            for source in self._sources[at]:
                self._users.setdefault(source, set()).add(at)
        missing = {at for at in self._users if not slide.file("tiles", at).exists()}
        self._waiting = {at: self._sources[at] & missing for at in to_label}  # for tiles of these blocks
        self._networks = iter([at for at in grid if at in missing])
        self._extra: dict[Index, dict[Path, list[int]]] = {}  # tiles each block needs beyond its halo

        first_pass = _FIRST_PASS if slide.method.measures_diameter else 0.0
        share = 1 - _OBSERVED - _CHECKED - _PAINTED - first_pass
        self._queue = workers.part(share, len(missing) + len(grid)).window()
        self._ahead = 2 * workers.count + 1
        self._running = {_Step.TILES: 0, _Step.LABELS: 0}

    def run(self) -> tuple[SeamReport, int]:
        """The report, and the largest extent of a cell, which the flow check of every block needs."""
        for at in self._labelled:  # before the run was killed
            self._queue.submit((_Step.EXTENT, at), largest_extent, self._slide, at)
        self._start_labels(at for at, sources in self._waiting.items() if not sources)
        self._start_networks()
        for (step, at), result in self._queue:
            if step in self._running:
                self._running[step] -= 1
            match step:
                case _Step.TILES:
                    self._report.tiles += result
                    self._have_tiles(at)
                case _Step.EXTRA_TILES:
                    self._report.repeated += result
                    self._start_labels([at])
                case _Step.LABELS if result.missing_tiles:
                    self._start_extra_tiles(at, result.missing_tiles)
                case _Step.LABELS:
                    self._have_labels(at, result)
                case _Step.EXTENT:
                    self._largest = max(self._largest, result)
            self._start_networks()
        self._report.tiles += self._report.repeated
        return self._report, self._largest

    def _start_networks(self) -> None:
        """Keep the network busy, but not so far ahead that tiles pile up faster than blocks are labelled."""
        while self._running[_Step.TILES] < self._ahead and self._running[_Step.LABELS] < 4 * self._ahead:
            at = next(self._networks, None)
            if at is None:
                return
            self._running[_Step.TILES] += 1
            self._queue.submit((_Step.TILES, at), run_tiles, self._slide, at, self._tiles[at], kind="network")

    def _start_labels(self, blocks: Iterable[Index]) -> None:
        for at in blocks:
            self._running[_Step.LABELS] += 1
            sources, extra = sorted(self._sources[at]), self._extra.get(at, {})
            self._queue.submit((_Step.LABELS, at), label_block, self._slide, at, self._halo, sources, extra)

    def _start_extra_tiles(self, at: Index, tiles: list[int]) -> None:
        """A cell, or what may be one, reaches beyond the halo: these tiles let the block look further."""
        files = self._extra.setdefault(at, {})
        file = self._slide.extra_tiles_file(at, len(files))
        files[file] = tiles
        self._queue.submit((_Step.EXTRA_TILES, at), run_tiles, self._slide, at, tiles, file, kind="network")

    def _have_tiles(self, at: Index) -> None:
        """Label the blocks that waited for these tiles alone."""
        users = sorted(self._users[at])
        for user in users:
            self._waiting[user].discard(at)
        self._start_labels(user for user in users if not self._waiting[user])

    def _have_labels(self, at: Index, labelled: LabelledBlock) -> None:
        """Remove the tiles that no other block needs."""
        remove(*self._extra.pop(at, ()))
        self._report.halo_retries += labelled.halo_retries > 0
        self._largest = max(self._largest, labelled.extent)
        for source in self._sources[at]:
            self._users[source].discard(at)
            if not self._users[source] and not self._keep:
                remove(self._slide.file("tiles", source))


# -- checks, ids, painting -----------------------------------------------------------------------------
def _check_and_paint(
    slide: SlideBlocks, workers: Workers, steps: int, index: str | Path | None
) -> SeamReport:
    grid = slide.grid
    # A check is short: some at a time, so that tasks have a length worth sending.
    groups = list(partition_all(min(_CHECKS_A_TASK, max(1, len(grid) // workers.count)), grid))
    window = workers.part(_CHECKED, len(groups)).window()
    for group in groups:
        window.submit(group, check_blocks, slide, group, steps)
    anchors: dict[Index, np.ndarray] = {}
    reaches: dict[Index, Box] = {}
    for group, checked in window:
        for at, (found, reach) in zip(group, checked, strict=True):
            anchors[at], reaches[at] = found, reach
    total = _number(slide, anchors)
    del anchors

    create_labels(slide.path, slide.name, block=slide.block, dtype=np.uint32)
    window = workers.part(_PAINTED, len(grid)).window()
    order = list(grid)
    y0, x0, y1, x1 = np.array([[box.y0, box.x0, box.y1, box.x1] for box in map(reaches.__getitem__, order)]).T
    for at in grid:
        # One pixel more than the core: the seam report looks across its lower and right border.
        core = grid.core(at)
        near = (y0 <= core.y1) & (y1 > core.y0) & (x0 <= core.x1) & (x1 > core.x0)
        window.submit(at, paint_block, slide, at, [order[n] for n in np.flatnonzero(near)])
    report = SeamReport(cells=total)
    for _, part in window:
        report += part
    if index is not None:  # a task, so that the records do not travel through this process
        window = workers.part(0.0, 1).window()
        window.submit("index", index_labels, slide, str(index))
        for _ in window:
            pass
    build_label_pyramid(slide.path, slide.name, workers)
    return report


def _number(slide: SlideBlocks, anchors: dict[Index, np.ndarray]) -> int:
    """Write every block's ids; returns the number of cells."""
    order = list(slide.grid)
    for at, ids in zip(order, number([anchors[at] for at in order]), strict=True):
        save_arrays(slide.file("ids", at), ids)
    return sum(len(part) for part in anchors.values())
