"""`segment_slide`: cells of an OME-Zarr image, block by block, from disk to disk.

    observe(row) ── freeze ──> globals.json
    network(block) ─┐                        tiles owned by the block           (GPU workers, where there are)
                    ├──> labels(block)       when all tiles around it are there (CPU workers)
    network(...)   ─┘         │
             largest mask of all blocks
                              └──> check(block) ── ids ──> paint(block) ──> labels/<name>

Every task reads what it needs and writes one file under a temporary name, so a run that is killed goes on
where it was: `scratch` belongs to one content key. Tiles are removed when the last block that needs them has
been labelled, and no block runs far ahead, so neither memory nor scratch space grows with the slide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tlz import partition_all

from daskcell.compute import Workers
from daskcell.config import SegmentSettings
from daskcell.disk import remove, write_json
from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.images import build_label_pyramid, create_labels, image_info, read_block, write_labels_block
from daskcell.preprocess.plan import Plan, apply_block
from daskcell.segmentation.cells import (
    Thresholds,
    check_block,
    load_candidates,
    load_cells,
    number,
    own_labels,
    refuse_too_many,
    save,
)
from daskcell.segmentation.diameter import estimate_diameter
from daskcell.segmentation.globals import Globals
from daskcell.segmentation.methods import CellposeMethod, Method, Read, network_source
from daskcell.segmentation.seams import SeamReport, paint_core
from daskcell.segmentation.tissue import tiles_without, tissue_mask
from daskcell.segmentation.watershed import WatershedMethod

Index = tuple[int, int]
_CHECKS_A_TASK = 4


@dataclass(frozen=True)
class Job:
    """What all tasks of one slide share; small, and fit to be sent to a worker."""

    path: str
    name: str
    settings: SegmentSettings
    plan: Plan
    block: int
    scratch: str
    flows: str
    device: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.plan.shape

    @property
    def grid(self) -> Grid:
        return Grid.regular(self.shape, self.block)

    def file(self, kind: str, at: Index) -> Path:
        folder = self.flows if kind == "tiles" else self.scratch
        return Path(folder, kind, f"{at[0]}_{at[1]}.{'npy' if kind in ('tiles', 'ids') else 'npz'}")

    @property
    def globals_file(self) -> Path:
        return Path(self.flows, "globals.json")

    def read(self, box: Box) -> np.ndarray:
        """Preprocessed pixels ``(C, h, w)`` of `box`."""
        grown = box.grow(self.plan.halo).clip(self.shape)
        part = apply_block(read_block(self.path, grown), self.plan, grown)[(slice(None), *box.within(grown))]
        return part if self.settings.channels is None else part[list(self.settings.channels)]

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
        network = network_source(settings.model, self.device)
        diameter = None if settings.diameter in (None, "auto") else float(settings.diameter)
        return CellposeMethod(network, thresholds, diameter, settings.batch_size, settings.niter)


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
) -> dict[str, Any]:
    """Find the cells of an OME-Zarr image and write them as ``labels/<name>``.

    Parameters
    ----------
    path
        OME-Zarr image group.
    plan
        Frozen preprocessing; what the network sees is ``apply_block`` of the pixels.
    block
        Side in pixels of the blocks; changes no label.
    scratch
        Folder for intermediate files. A folder from a run that was killed is continued.
    flows
        Folder that keeps the network's outputs; with it, thresholds can be changed without the network.
    device
        ``"cpu"`` or ``"cuda"``: where the network runs.

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
    key = _flows_key(settings, plan, block)
    scratch = Path(scratch)
    flows = scratch / "flows" if flows is None else Path(flows) / key
    job = Job(str(path), name, settings, plan, block, str(scratch), str(flows), device)
    for kind in ("observed", "labels", "cells", "ids"):
        (scratch / kind).mkdir(parents=True, exist_ok=True)
    (flows / "tiles").mkdir(parents=True, exist_ok=True)

    _freeze_globals(job, workers)
    report, extent = _label(job, workers, keep=flows.parent != scratch)
    report += _check_and_paint(job, workers, 2 * extent)
    frozen = read_globals(str(job.globals_file))
    result = report.to_json()
    if isinstance(frozen, Globals):
        result["diameter"] = frozen.diameter
        result["skipped_fraction"] = len(frozen.skipped) / len(frozen.tiles)
    return result


def _flows_key(settings: SegmentSettings, plan: Plan, block: int) -> str:
    """What network outputs depend on, and what they are cut by."""
    if settings.method != "cellpose":
        return "none"
    from daskcell.models import network_fingerprint

    parts = [network_fingerprint(settings.model), plan.key, settings.diameter, settings.channels]
    parts += [settings.batch_size, settings.tissue_mask, block]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


# -- facts of the whole picture ------------------------------------------------------------------------
def _freeze_globals(job: Job, workers: Workers) -> None:
    if job.globals_file.exists():
        return
    window = workers.window()
    for row in range(job.grid.counts[0]):
        if not job.file("observed", (row, 0)).exists():
            window.submit(row, _observe_row, job, row)
    for _ in window:
        pass
    window = workers.window()
    window.submit("freeze", _freeze, job, kind="network")
    for _ in window:
        pass


def _observe_row(job: Job, row: int) -> None:
    """A row of blocks, one after another: what is kept of each is small, and so is the time."""
    method, cores = job.method, [job.grid.core((row, j)) for j in range(job.grid.counts[1])]
    observed = [method.observe(job.read(core), core, job.shape) for core in cores]
    together = [np.concatenate(channel) for channel in zip(*observed, strict=True)]
    _write(job.file("observed", (row, 0)), lambda path: np.savez(path, *together))


def _freeze(job: Job) -> None:
    method = job.method
    observed = []
    for row in range(job.grid.counts[0]):
        with np.load(job.file("observed", (row, 0)), allow_pickle=False) as arrays:
            observed.append([arrays[name] for name in arrays.files])
    if isinstance(method, CellposeMethod):
        if job.settings.diameter == "auto":
            method.diameter = estimate_diameter(method, job.read, job.shape)
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


# -- network and labels --------------------------------------------------------------------------------
def _label(job: Job, workers: Workers, *, keep: bool) -> tuple[SeamReport, int]:
    """Run networks and follow flows, each block as soon as the tiles around it are there.

    Returns the report and the largest extent of a cell, which the flow check of every block needs.
    """
    grid, frozen = job.grid, read_globals(str(job.globals_file))
    halo = _halo(job, frozen)
    report = SeamReport(blocks=len(grid))
    needs: dict[Index, set[Index]] = {}
    tiles: dict[Index, list[int]] = {}
    if isinstance(frozen, Globals):
        owner = {}
        for at in grid:
            tiles[at] = [tile for tile in frozen.tiles.owned(grid.core(at)) if tile not in frozen.skipped]
            owner.update(dict.fromkeys(tiles[at], at))
        report.skipped = len(frozen.skipped)
        for at in grid:
            held = grid.core(at).grow(halo).clip(job.shape)
            touched = frozen.tiles.touching(frozen.tiles.to_scaled(held))
            needs[at] = {owner[tile] for tile in touched if tile in owner}
    to_label = [at for at in grid if not job.file("labels", at).exists()]
    wanted = set().union(*(needs.get(at, set()) for at in to_label)) if to_label else set()
    missing = {at for at in wanted if not job.file("tiles", at).exists()}
    waiting = {at: needs.get(at, set()) & missing for at in to_label}
    users: dict[Index, set[Index]] = {at: set() for at in wanted}
    for at in to_label:
        for other in needs.get(at, ()):
            users[other].add(at)

    window = workers.window()
    networks = iter([at for at in grid if at in missing])
    ahead = 2 * workers.count + 1

    def start_networks() -> None:
        """Keep the network busy, but not so far ahead that tiles pile up faster than blocks are labelled."""
        while running["network"] < ahead and running["labels"] < 4 * ahead:
            at = next(networks, None)
            if at is None:
                return
            running["network"] += 1
            window.submit(("network", at), _run_network, job, at, tiles[at], kind="network")

    def start_labels(blocks: Iterable[Index]) -> None:
        for at in blocks:
            running["labels"] += 1
            window.submit(("labels", at), _follow_block, job, at, halo, sorted(needs.get(at, ())))

    running = {"network": 0, "labels": 0, "extent": 0}
    for at in grid:
        if at not in waiting:  # labelled before the run was killed
            running["extent"] += 1
            window.submit(("extent", at), _extent, job, at)
    largest = 0
    start_labels([at for at, others in waiting.items() if not others])
    start_networks()
    for (kind, at), result in window:
        running[kind] -= 1
        if kind == "network":
            report.tiles += result
            for other in users[at]:
                waiting[other].discard(at)
            start_labels(sorted(other for other in users[at] if not waiting[other]))
        elif kind == "extent":
            largest = max(largest, result)
        else:
            part, extent = result
            report += part
            largest = max(largest, extent)
            for other in needs.get(at, ()):
                users[other].discard(at)
                if not users[other] and not keep:
                    remove(job.file("tiles", other))
        start_networks()
    report.tiles += report.repeated
    return report, largest


def _halo(job: Job, frozen: Any) -> int:
    method = job.method
    if isinstance(method, CellposeMethod):
        method.diameter = frozen.diameter
    return method.halo


def _run_network(job: Job, at: Index, tiles: list[int]) -> int:
    frozen = read_globals(str(job.globals_file))
    method = job.method
    assert isinstance(method, CellposeMethod)
    outputs = method.run(job.read, frozen, tiles)
    _write(job.file("tiles", at), lambda path: np.save(path, outputs))
    return len(tiles)


def _follow_block(job: Job, at: Index, halo: int, sources: list[Index]) -> tuple[SeamReport, int]:
    frozen, method, grid = read_globals(str(job.globals_file)), job.method, job.grid
    outputs: dict[int, np.ndarray] = {}
    for source in sources:
        tiles = [tile for tile in frozen.tiles.owned(grid.core(source)) if tile not in frozen.skipped]
        outputs.update(zip(tiles, np.load(job.file("tiles", source), mmap_mode="r"), strict=True))
    known = len(outputs)
    read: Read = job.read
    look = method.look(frozen, read, outputs)
    found, doublings = own_labels(grid.core(at), halo, job.shape, look, method.thresholds)
    _write(job.file("labels", at), lambda path: save(path, found))
    return SeamReport(redone=int(doublings > 0), repeated=len(outputs) - known), found.extent


# -- checks, ids, painting -----------------------------------------------------------------------------
def _check_and_paint(job: Job, workers: Workers, steps: int) -> SeamReport:
    grid = job.grid
    window = workers.window()
    # A check is short: some at a time, so that tasks have a length worth sending.
    for group in partition_all(min(_CHECKS_A_TASK, max(1, len(grid) // workers.count)), grid):
        window.submit(group, _check, job, group, steps)
    places: dict[Index, np.ndarray] = {}
    reaches: dict[Index, Box] = {}
    for group, checked in window:
        for at, (anchors, reach) in zip(group, checked, strict=True):
            places[at], reaches[at] = anchors, reach
    total = _number(job, places)
    del places

    create_labels(job.path, job.name, block=job.block, dtype=np.uint32)
    window = workers.window()
    order = list(grid)
    y0, x0, y1, x1 = np.array([[box.y0, box.x0, box.y1, box.x1] for box in map(reaches.get, order)]).T
    for at in grid:
        # One pixel more than the core: the seam report looks across its lower and right border.
        core = grid.core(at)
        near = (y0 <= core.y1) & (y1 > core.y0) & (x0 <= core.x1) & (x1 > core.x0)
        window.submit(at, _paint, job, at, [order[n] for n in np.flatnonzero(near)])
    report = SeamReport(cells=total)
    for _, part in window:
        report += part
    build_label_pyramid(job.path, job.name, workers)
    return report


def _number(job: Job, places: dict[Index, np.ndarray]) -> int:
    """Write every block's ids; returns the number of cells."""
    order = list(job.grid)
    for at, ids in zip(order, number([places[at] for at in order]), strict=True):
        _write(job.file("ids", at), partial(_save_array, ids))
    return sum(len(part) for part in places.values())


def _extent(job: Job, at: Index) -> int:
    return load_candidates(job.file("labels", at)).extent


def _check(job: Job, group: tuple[Index, ...], steps: int) -> list[tuple[np.ndarray, Box]]:
    found, thresholds = [], job.method.thresholds
    for at in group:
        cells = check_block(load_candidates(job.file("labels", at)), steps, thresholds)
        _write(job.file("cells", at), partial(save, arrays=cells))
        found.append((cells.anchors[:, 0] * job.shape[1] + cells.anchors[:, 1], cells.reach))
    return found


def _paint(job: Job, at: Index, sources: list[Index]) -> SeamReport:
    core = job.grid.core(at)
    parts = [(load_cells(job.file("cells", source)), np.load(job.file("ids", source))) for source in sources]
    labels, report = paint_core(parts, core, job.shape)
    write_labels_block(job.path, job.name, core, labels)
    return report


def _save_array(array: np.ndarray, path: Path) -> None:
    np.save(path, array)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write under a temporary name and rename: a file that is there is whole."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    write(temporary)
    temporary.replace(path)
