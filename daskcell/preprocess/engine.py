"""A plan carried out on a slide, from disk to disk: a task reads a block with its halo and writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.geometry import Box
from daskcell.preprocess.plan import Plan, apply_block

if TYPE_CHECKING:
    from daskcell.compute import Workers

_STRIP = 1024
"""Rows that are computed at once, so that what a task holds beside its file is small."""


def preprocess_slide(
    zarr_path: str | Path, plan: Plan, target: str | Path, workers: Workers | None = None
) -> None:
    """Carry a plan out on an OME-Zarr image and write the result as another, with its pyramid.

    Three channels become a colour picture. The image appears under its name only when it is whole.

    Raises
    ------
    ImageError
        If there is something at `target`.
    """
    from daskcell.images import image_info, metadata, store
    from daskcell.images.conversion import run_tasks
    from daskcell.images.levels import downscale_block, plan_levels
    from daskcell.images.target import new_image, refuse_existing

    refuse_existing(target)
    info = image_info(zarr_path)
    levels = plan_levels([plan.shape], plan.out_channels, plan.out_dtype)
    place = new_image(target, overwrite=False)
    try:
        group = store.new_group(place.work)
        chunks = (1, store.CHUNK, store.CHUNK)
        for level in levels:
            files = (plan.out_channels, *level.shape)
            store.create_level(group, level.number, files, level.files, chunks, plan.out_dtype)

        def tasks(number: int) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
            for index in levels[number].grid:
                box = levels[number].grid.core(index)
                if number:
                    yield (number, *index), downscale_block, (place.work, number, box, "mean")
                else:
                    yield (0, *index), _write_block, (str(zarr_path), plan, place.work, box)

        for level in levels:
            for _ in run_tasks(workers, tasks(level.number)):
                pass
        colour = plan.out_channels == 3
        names = ("red", "green", "blue") if colour else info.channels
        names = names if len(names) == plan.out_channels else tuple(map(str, range(plan.out_channels)))
        header = metadata.Header(Path(target).name.split(".")[0], names, info.pixel_size, colour)
        small = np.asarray(store.level_of(group, -1))
        windows = [_window(plane) for plane in small]
        shapes = [level.shape for level in levels]
        metadata.write(group, header, shapes, windows, plan.key, "mean")
        place.finish()
    except BaseException:
        place.abandon()
        raise


def _window(plane: np.ndarray) -> tuple[float, float, float, float]:
    """Least, most, and what is shown from and to."""
    least, most, low, high = (float(v) for v in np.percentile(plane, [0, 100, 1, 99.8]))
    return least, most, low, high


def _write_block(zarr_path: str, plan: Plan, target: str, box: Box) -> None:
    from daskcell.images import read_block, store
    from daskcell.images.shards import write_box

    out = np.empty((plan.out_channels, *box.shape), plan.out_dtype)
    for y in range(box.y0, box.y1, _STRIP):
        core = Box(y, box.x0, min(y + _STRIP, box.y1), box.x1)
        grown = core.grow(plan.halo).clip(plan.shape)
        block = apply_block(read_block(zarr_path, grown), plan, grown)
        out[(slice(None), *core.within(box))] = block[(slice(None), *core.within(grown))]
    write_box(store.writable(target, 0), box, out)
