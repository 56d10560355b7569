"""Crops of a study's own cells, to train an encoder on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import StudyError
from daskcell.geometry import Grid

if TYPE_CHECKING:
    from daskcell.study import Study

BLOCK = 2048


def study_crops(study: Study, per_slide: int = 4000) -> list[np.ndarray]:
    """Crops of cells, as the encoder wants them: for each slide ``(n, 3, side, side)`` uint8.

    Cells are taken from blocks in a fixed random order, at most `per_slide`; memory does not grow with the
    slide. Slides with fewer than 16 cells are left out.

    Raises
    ------
    StudyError
        No slide has enough cells.
    """
    found = []
    for name in study.slides:
        ledger = study.ledger(name)
        if "segment" in ledger.stages and ledger.result("segment").get("cells", 0):
            crops = slide_crops(study.image(name), ledger.result("freeze")["plan"], per_slide)
            if len(crops) >= 16:
                found.append(crops)
    if not found:
        raise StudyError(f"{study.out} has no slide with 16 whole cells to train on. Please run it first.")
    return found


def slide_crops(path: Any, plan: Any, most: int) -> np.ndarray:
    """Crops of at most `most` cells of one OME-Zarr image with ``labels/cells``."""
    from daskcell.features.crops import three_channels
    from daskcell.images import read_block, read_labels
    from daskcell.models.encoder_data import cell_crops
    from daskcell.preprocess import Plan, apply_block

    plan = Plan.from_json(plan)
    grid = Grid.regular(plan.shape, BLOCK)
    order = list(grid)
    np.random.default_rng(0).shuffle(order)
    scale = 1.0 if plan.out_dtype.kind == "f" else float(np.iinfo(plan.out_dtype).max)
    parts, count = [], 0
    for at in order:
        core = grid.core(at)
        grown = core.grow(plan.halo).clip(plan.shape)
        block = apply_block(read_block(path, grown), plan, grown)[(slice(None), *core.within(grown))]
        picture = three_channels(block.astype(np.float32) / np.float32(scale))
        crops, _ = cell_crops(picture, read_labels(path, "cells", core))
        parts.append(crops[: most - count])
        count += len(parts[-1])
        if count >= most:
            break
    return np.concatenate(parts)
