"""Steps and passes as dask graphs: what `lazy`'s functions are made of.

Pointwise steps go over each chunk, filters are those of dask-image; a pass counts each chunk, and the counts
are merged as a tree. The bits are those of the steps' own `apply`, which the engine calls.

Of dask-image daskcell uses only `ndfilters`. `dask_image.ndmeasure.label` adds up the numbers of labels of
all chunks before a chunk in one chained graph, which is copied for each, and hands the table of all labels to
every chunk: both grow with the square of the image. Cells are numbered by `segmentation.cells.number`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.images.arrays import NamedArray, as_image, plain
from daskcell.preprocess.background import Background
from daskcell.preprocess.dtypes import to_dtype, working_dtype
from daskcell.preprocess.plan import apply_steps
from daskcell.preprocess.signal import SPAN, aligned
from daskcell.preprocess.statistics import Pass, for_blocks
from daskcell.preprocess.steps import Gaussian, Step

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
        given, axes = NamedArray(da.stack([da.asarray(plane) for plane in planes])), "CYX"
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
    """A step on an image; `Step.apply` gives the same bits."""
    import dask.array as da

    if isinstance(step, Gaussian):
        return _smooth(x, step.sigma)
    if isinstance(step, Background):
        return _clear(x, step)
    assert not step.halo, f"{step.kind} has no lazy form"
    chunks = ((step.channels(int(x.shape[0])),), *x.chunks[1:])
    dtype = step.dtype(x.dtype)
    return da.map_blocks(_apply_step, x, step, chunks=chunks, dtype=dtype, meta=np.empty((0, 0, 0), dtype))


def map_delayed_step(x: da.Array, step: Any, dtype: np.dtype) -> da.Array:
    """A pointwise step that is known only when the graph is computed (a `dask.delayed`)."""
    import dask.array as da

    return da.map_blocks(_apply_step, x, step, dtype=dtype, meta=np.empty((0, 0, 0), dtype))


def _apply_step(block: Any, step: Step, block_info: Any = None) -> Any:
    return apply_steps(block, (step,), _box(block_info))


def _box(block_info: Any) -> Box:
    location = block_info[0]["array-location"]
    return Box(location[1][0], location[2][0], location[1][1], location[2][1])


def _filter(name: str, x: da.Array, reach: int, *arguments: Any, **options: Any) -> da.Array:
    """A filter of `dask_image.ndfilters`, which takes part of `reach` pixels around each."""
    from dask_image import ndfilters
    from scipy import ndimage

    if min(x.shape[1:]) >= reach:
        return getattr(ndfilters, name)(x, *arguments, **options)
    # Dask refuses an overlap that is wider than the image. So small a one is filtered whole.
    whole = x.rechunk({1: -1, 2: -1})
    return whole.map_blocks(getattr(ndimage, name), *arguments, dtype=x.dtype, meta=whole._meta, **options)


def _smooth(x: da.Array, sigma: float) -> da.Array:
    import dask.array as da

    # Of integers SciPy cuts the fraction off after each axis.
    exact = x if x.dtype.kind == "f" else x.astype(np.float64)
    smooth = _filter("gaussian_filter", exact, Gaussian(sigma).halo, (0.0, sigma, sigma))
    return da.map_blocks(to_dtype, smooth, x.dtype, dtype=x.dtype, meta=x._meta)


def _clear(x: da.Array, step: Background) -> da.Array:
    """The image less (or by) what its background is on a coarse grid, opened by dask-image's filters."""
    import dask.array as da
    from dask.array.overlap import overlap

    # Chunks that are cut between cells of the coarse grid, so that each cell's mean is made in one of them.
    cell = step.grid.cell
    edges = [{0, side, *(edge // cell * cell for edge in np.cumsum(sizes))} for side, sizes in _sides(x)]
    grid = Grid(*(tuple(sorted(int(edge) for edge in axis)) for axis in edges))
    x = x.rechunk({0: -1, 1: grid.chunks[0], 2: grid.chunks[1]})
    cells = (x.chunks[0], *(tuple(-(-size // cell) for size in sizes) for sizes in grid.chunks))
    kind = {"dtype": np.dtype(np.float64), "meta": np.empty((0, 0, 0))}
    ground = da.map_blocks(_means, x, step, chunks=cells, **kind)
    for name in ("maximum_filter", "minimum_filter") if step.light else ("minimum_filter", "maximum_filter"):
        ground = _filter(name, ground, step.reach, footprint=step.disc[None])
    # Between the middles of cells their values are mixed: a chunk needs one cell more on each side.
    near = overlap(ground.rechunk(cells), {0: 0, 1: 1, 2: 1}, "none")
    return da.map_blocks(_clear_block, x, near, step, chunks=x.chunks, dtype=x.dtype, meta=x._meta)


def _sides(x: da.Array) -> list[tuple[int, tuple[int, ...]]]:
    return [(int(x.shape[axis]), x.chunks[axis]) for axis in (1, 2)]


def _means(block: Any, step: Background, block_info: Any = None) -> Any:
    return step.means(block, _box(block_info))


def _clear_block(block: Any, ground: Any, step: Background, block_info: Any = None) -> Any:
    box = _box(block_info)
    cells = step.grid.inside(box).grow(1).clip(step.grid.counts)
    return step.clear(block, ground, cells, box)


def count_lazily(x: Any, counting: Any, steps: tuple[Step, ...] = ()) -> Any:
    """Merged counts of all chunks, as one `dask.delayed`."""
    from dask.delayed import delayed

    x = as_planes(x)
    for step in steps:
        x = map_step(x, step)
    x = x.rechunk((-1, *aligned(x.chunks[1:], SPAN)))  # for passes that count tiles
    grid = Grid.from_chunks(x.chunks[1:])
    blocks = x.to_delayed(optimize_graph=False)[0]
    count = delayed(_count, pure=True)
    counter = delayed(for_blocks, pure=True)(counting)
    parts = [count(counter, blocks[index], grid.core(index)) for index in grid]
    while len(parts) > 1:
        groups = [parts[i : i + _FAN_IN] for i in range(0, len(parts), _FAN_IN)]
        parts = [delayed(_merge, pure=True)(counting, group) for group in groups]
    return parts[0]


def fit_lazily(images: Sequence[da.Array], state: Any, passes: int) -> Any:
    """The step that `passes` passes over an image, or a set of them, lead to, as one `dask.delayed`."""
    from dask.delayed import delayed

    for number in range(passes):
        parts = [count_lazily(read_again(x, state) if number else x, state) for x in images]
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


def _count(counting: Pass, block: Any, core: Box) -> Any:
    return counting.count(block, core)


def _merge(counting: Pass, parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = counting.merge(total, part)
    return total


def _finish(counting: Pass, total: Any) -> Any:
    return counting.finish(total)
