"""`segment_slide`: cells of an OME-Zarr image, block by block, from disk to disk.

    observe(blocks) ─┐
    diameter        ─┴ freeze ──> globals.json
    network(block) ─┐                        tiles owned by the block           (GPU workers, where there are)
                    ├──> labels(block)       when all tiles around it are there (CPU workers)
    network(...)   ─┘         │
             largest mask of all blocks
                              └──> check(block) ── ids ──> paint(block) ──> labels/<name>

Every task reads what it needs and writes one file under a temporary name, so a run that is killed goes on
where it was: `scratch` belongs to one content key. Tiles are removed when the last block that needs them has
been labelled, and no block runs far ahead, so memory does not grow with the slide. Scratch space does: labels
and flows of all blocks, 8 bytes a pixel of a cell, wait for the largest mask.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from daskcell.segmentation.cells import number, refuse_too_many
from daskcell.segmentation.diameter import diameter_of
from daskcell.segmentation.image_params import Globals
from daskcell.segmentation.methods import CellposeMethod
from daskcell.segmentation.seams import SeamReport
from daskcell.segmentation.tasks import (
    Index,
    Job,
    check_blocks,
    choose_windows,
    freeze_globals,
    index_labels,
    label_block,
    largest_extent,
    measure_window,
    observe_blocks,
    paint_block,
    read_globals,
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
    job = Job(
        PreparedImage(str(path), plan.kept_in(scratch)),
        name,
        settings,
        block,
        str(scratch),
        str(flows),
        device,
    )
    for kind in ("samples", "labels", "further", "cells", "ids", "records"):
        (scratch / kind).mkdir(parents=True, exist_ok=True)
    (flows / "tiles").mkdir(parents=True, exist_ok=True)

    _globals(job, workers)
    report, extent = _label(job, workers, keep=keep)
    if keep:
        remove(*temporaries(flows), *temporaries(flows / "tiles"))  # of tasks that were killed
    report += _check_and_paint(job, workers, 2 * extent, index)
    frozen = read_globals(str(job.globals_file))
    result = report.to_json()
    if isinstance(frozen, Globals):
        result["diameter"] = frozen.diameter
        result["skipped_fraction"] = len(frozen.skipped) / len(frozen.tiles)
    return result


# -- facts of the whole picture ------------------------------------------------------------------------
def _globals(job: Job, workers: Workers) -> None:
    if job.globals_file.exists():
        return
    diameter = _diameter(job, workers) if job.measures_diameter else None
    groups = list(partition_all(_OBSERVED_A_TASK, job.grid))
    if len(groups) > 1:  # else it is observed where it is frozen
        window = workers.part(_OBSERVED, len(groups)).window()
        for group in groups:
            if not job.file("samples", group[0]).exists():
                window.submit(group, observe_blocks, job, group)
        for _ in window:
            pass
    window = workers.part(0.0, 1).window()
    window.submit("freeze", freeze_globals, job, groups, diameter)
    for _ in window:
        pass


def _diameter(job: Job, workers: Workers) -> float | None:
    """Of the first pass: a task for each of the windows it looks at."""
    window = workers.part(0.0, 1).window()
    window.submit("windows", choose_windows, job)
    ((_, chosen),) = window
    window = workers.part(_FIRST_PASS, len(chosen)).window()
    for at, (box, frozen) in enumerate(chosen):
        window.submit(at, measure_window, job, box, frozen, kind="network")
    return diameter_of(areas for _, areas in window)


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

    share = 1 - _OBSERVED - _CHECKED - _PAINTED - (_FIRST_PASS if job.measures_diameter else 0.0)
    window = workers.part(share, len(missing) + len(grid)).window()
    networks = iter([at for at in grid if at in missing])
    ahead = 2 * workers.count + 1

    def start_networks() -> None:
        """Keep the network busy, but not so far ahead that tiles pile up faster than blocks are labelled."""
        while running["network"] < ahead and running["labels"] < 4 * ahead:
            at = next(networks, None)
            if at is None:
                return
            running["network"] += 1
            window.submit(("network", at), run_tiles, job, at, tiles[at], kind="network")

    def start_labels(blocks: Iterable[Index]) -> None:
        for at in blocks:
            running["labels"] += 1
            window.submit(
                ("labels", at), label_block, job, at, halo, sorted(needs.get(at, ())), further.get(at, {})
            )

    further: dict[Index, dict[Path, list[int]]] = {}
    running = {"network": 0, "labels": 0, "further": 0, "extent": 0}
    for at in grid:
        if at not in waiting:  # labelled before the run was killed
            running["extent"] += 1
            window.submit(("extent", at), largest_extent, job, at)
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
        elif kind == "further":
            report.repeated += result
            start_labels([at])
        elif isinstance(result, list):  # a cell, or what may be one, reaches beyond the halo
            file = job.further_file(at, len(further.setdefault(at, {})))
            further[at][file] = result
            running["further"] += 1
            window.submit(("further", at), run_tiles, job, at, result, file, kind="network")
        else:
            part, extent = result
            remove(*further.pop(at, ()))
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


# -- checks, ids, painting -----------------------------------------------------------------------------
def _check_and_paint(job: Job, workers: Workers, steps: int, index: str | Path | None) -> SeamReport:
    grid = job.grid
    # A check is short: some at a time, so that tasks have a length worth sending.
    groups = list(partition_all(min(_CHECKS_A_TASK, max(1, len(grid) // workers.count)), grid))
    window = workers.part(_CHECKED, len(groups)).window()
    for group in groups:
        window.submit(group, check_blocks, job, group, steps)
    places: dict[Index, np.ndarray] = {}
    reaches: dict[Index, Box] = {}
    for group, checked in window:
        for at, (anchors, reach) in zip(group, checked, strict=True):
            places[at], reaches[at] = anchors, reach
    total = _number(job, places)
    del places

    create_labels(job.path, job.name, block=job.block, dtype=np.uint32)
    window = workers.part(_PAINTED, len(grid)).window()
    order = list(grid)
    y0, x0, y1, x1 = np.array([[box.y0, box.x0, box.y1, box.x1] for box in map(reaches.__getitem__, order)]).T
    for at in grid:
        # One pixel more than the core: the seam report looks across its lower and right border.
        core = grid.core(at)
        near = (y0 <= core.y1) & (y1 > core.y0) & (x0 <= core.x1) & (x1 > core.x0)
        window.submit(at, paint_block, job, at, [order[n] for n in np.flatnonzero(near)])
    report = SeamReport(cells=total)
    for _, part in window:
        report += part
    if index is not None:  # a task, so that the records do not travel through this process
        window = workers.part(0.0, 1).window()
        window.submit("index", index_labels, job, str(index))
        for _ in window:
            pass
    build_label_pyramid(job.path, job.name, workers)
    return report


def _number(job: Job, places: dict[Index, np.ndarray]) -> int:
    """Write every block's ids; returns the number of cells."""
    order = list(job.grid)
    for at, ids in zip(order, number([places[at] for at in order]), strict=True):
        save_arrays(job.file("ids", at), ids)
    return sum(len(part) for part in places.values())
