"""Steps and passes as dask graphs: what `lazy`'s functions are made of.

A step goes over each chunk, with its halo where it needs one; a pass counts each chunk, and the counts are
merged as a tree. Everything keeps to the numpy functions the engine calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.images.arrays import Given, as_image, plain
from daskcell.preprocess.pixels import working_dtype
from daskcell.preprocess.plan import apply_steps, count_block
from daskcell.preprocess.statistics import Pass
from daskcell.preprocess.steps import Step

if TYPE_CHECKING:
    import dask.array as da

_FAN_IN = 16


def as_planes(x: Any, *, allow_2d: bool = False, axes: str | None = None) -> da.Array:
    """A dask array ``(C, Y, X)`` of a working dtype with all channels in each chunk; see `images.arrays`."""
    import dask.array as da

    if isinstance(x, list | tuple) and len(x) and all(getattr(plane, "ndim", 0) == 2 for plane in x):
        planes = [as_image(plane, f"Channel {number}").data[0] for number, plane in enumerate(x, 1)]
        shapes = {plane.shape for plane in planes}
        if len(shapes) != 1:
            raise InputError(f"The channels differ in size: {sorted(shapes)}.")
        given, axes = Given(da.stack([da.asarray(plane) for plane in planes])), "CYX"
    else:
        given = plain(x, "An image")
    if given.data.ndim < 2 or (given.data.ndim == 2 and not allow_2d):
        raise InputError(f"An image must have the axes (C, Y, X), but this one has shape {given.data.shape}.")
    if 0 in given.data.shape:
        raise InputError(f"An image needs at least one pixel, but this one has shape {given.data.shape}.")
    x = as_image(given, axes=axes).data
    if not isinstance(x, da.Array):
        # One chunk a block of this size keeps filters and counts parallel.
        x = da.from_array(x, chunks=(-1, 2048, 2048))
    return x.astype(working_dtype(x.dtype), copy=False).rechunk({0: -1})


def map_step(x: da.Array, step: Step) -> da.Array:
    """A step on every chunk of an image."""
    import dask.array as da

    chunks = ((step.channels(int(x.shape[0])),), *x.chunks[1:])
    dtype = step.dtype(x.dtype)
    meta = np.empty((0, 0, 0), dtype)
    if not step.halo:
        return da.map_blocks(_apply_frozen, x, step, chunks=chunks, dtype=dtype, meta=meta)
    grown, grid = _grown(x, step.halo)
    chunks = (chunks[0], *grid.chunks)
    return da.map_blocks(_apply_grown, grown, step=step, grid=grid, chunks=chunks, dtype=dtype, meta=meta)


def map_frozen(x: da.Array, step: Any, dtype: np.dtype) -> da.Array:
    """A pointwise step that is known only when the graph is computed (a `dask.delayed`)."""
    import dask.array as da

    return da.map_blocks(_apply_frozen, x, step, dtype=dtype, meta=np.empty((0, 0, 0), dtype))


def _grown(x: da.Array, halo: int) -> tuple[da.Array, Grid]:
    """Chunks with their halo, cut at the image's border; and the grid of their cores."""
    from dask.array.overlap import ensure_minimum_chunksize, overlap

    # Dask refuses an overlap wider than a chunk: chunks are joined, and a short axis stays in one piece.
    chunks = {i: -1 if x.shape[i] <= halo else ensure_minimum_chunksize(halo, x.chunks[i]) for i in (1, 2)}
    x = x.rechunk(chunks)
    depth = {0: 0} | {i: 0 if len(x.chunks[i]) == 1 else halo for i in (1, 2)}
    return overlap(x, depth, "none"), Grid.from_chunks(x.chunks[1:])


def _apply_frozen(block: Any, step: Step, block_info: Any = None) -> Any:
    location = block_info[0]["array-location"]
    box = Box(location[1][0], location[2][0], location[1][1], location[2][1])
    return apply_steps(block, (step,), box)


def _apply_grown(block: Any, step: Step, grid: Grid, block_id: Any = None) -> Any:
    core = grid.core(block_id[1:])
    grown = core.grow(step.halo).clip(grid.shape)
    return apply_steps(block, (step,), grown)[(slice(None), *core.within(grown))]


def count_lazily(x: Any, counting: Any, steps: tuple[Step, ...] = ()) -> Any:
    """Merged counts of all chunks, as one `dask.delayed`."""
    from dask.delayed import delayed

    x = as_planes(x)
    for step in steps:
        x = map_step(x, step)
    grid = Grid.from_chunks(x.chunks[1:])
    blocks = x.to_delayed(optimize_graph=False)[0]
    count = delayed(count_block, pure=True)
    parts = [count(blocks[index], grid.core(index), counting) for index in grid]
    while len(parts) > 1:
        groups = [parts[i : i + _FAN_IN] for i in range(0, len(parts), _FAN_IN)]
        parts = [delayed(_merge, pure=True)(counting, group) for group in groups]
    return parts[0]


def frozen_lazily(pictures: Sequence[da.Array], state: Any, passes: int) -> Any:
    """The step that `passes` passes over an image, or a set of them, lead to, as one `dask.delayed`."""
    from dask.delayed import delayed

    for number in range(passes):
        parts = [count_lazily(read_again(x, state) if number else x, state) for x in pictures]
        total = parts[0] if len(parts) == 1 else delayed(_merge, pure=True)(state, parts)
        state = delayed(_finish, pure=True)(state, total)
    return state


def read_again(x: da.Array, after: Any) -> da.Array:
    """The same pixels, computed anew once `after` is known.

    With the blocks of one reading in the graph of the next too, Dask would keep the whole image in memory
    from the one to the other.
    """
    from dask.graph_manipulation import bind

    return bind(x, after, seed=f"again-{after.key}")


def _merge(counting: Pass, parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = counting.merge(total, part)
    return total


def _finish(counting: Pass, total: Any) -> Any:
    return counting.finish(total)
