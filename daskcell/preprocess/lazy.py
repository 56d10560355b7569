"""Preprocessing of dask arrays: `reconstruct`, `adjust_histogram`, `gaussian`.

Lazy: nothing is computed before the result is asked for. All take dask or numpy arrays and return dask
arrays. The arithmetic is that of the steps the engine applies, so both give the same bits, for every
chunking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from daskcell.config import HistogramSettings
from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.preprocess.colors import mixing_weights
from daskcell.preprocess.freezing import check_reference, count_block, start_pass
from daskcell.preprocess.pixels import float_dtype, working_dtype
from daskcell.preprocess.plan import Plan, apply_steps
from daskcell.preprocess.statistics import Equalizing, Pass, Referring, Stretching, first_pass, passes_needed
from daskcell.preprocess.steps import TRUNCATE, Gaussian, Mix, Step, smooth

if TYPE_CHECKING:
    import dask.array as da

_COLORS = ("red", "green", "blue", "cyan")
_RATIO = (1, 1, 1, 1)
_FAN_IN = 16


def reconstruct(
    channels: Any,
    colors: Sequence[str] = _COLORS,
    ratio: Sequence[float] = _RATIO,
) -> da.Array:
    """Rebuild the colour picture from one picture per stain, by adding their light.

    Every channel adds to red, green and blue what its colour has of them, times its ratio: cyan adds to
    green and blue. With fewer channels than four, the first of the default colours and ratios are taken.

    Parameters
    ----------
    channels : dask or numpy array ``(C, Y, X)``, or a list of ``(Y, X)``
    colors : one colour a channel
        Any matplotlib name, or ``"#rrggbb"``; ``"green"`` is full green ``(0, 1, 0)``.
    ratio : one weight of 0 or more a channel

    Returns
    -------
    dask array ``(3, Y, X)`` of the same dtype
        Integers are rounded to nearest and saturate at the largest value of their type; floats are not cut.

    Raises
    ------
    InputError
        Naming the colour, ratio or count that does not fit.
    """
    x = _planes(channels)
    count = int(x.shape[0])
    if colors is _COLORS:
        colors = colors[:count]
    if ratio is _RATIO:
        ratio = [1] * count
    step = Mix(mixing_weights(count, list(colors), list(ratio)))
    return _map(x, step)


def adjust_histogram(
    x: Any,
    method: Literal["stretch", "equalize", "clahe", "match"] = "stretch",
    low: float = 0.2,
    high: float = 99.8,
    *,
    linked: bool = False,
    reference: Any = None,
    tiles: int = 8,
    clip_limit: float = 0.01,
    bins: int = 256,
) -> da.Array:
    """Adjust the histogram of each channel over the whole image.

    ======== ================================================================== ==========================
    method   what, and whose result it is                                       dtype of the result
    ======== ================================================================== ==========================
    stretch  percentiles ``low`` and ``high`` become 0 and white;               as given (white: largest
             ``skimage.exposure.rescale_intensity``                             integer, or 1.0)
    equalize every value becomes the share of pixels up to it;                  float32 on 0-1 (float64
             ``skimage.exposure.equalize_hist``                                 for float64)
    clahe    equalised locally, on one grid of tiles over the whole image;      float32 on 0-1 (float64
             ``skimage.exposure.equalize_adapthist``                            for float64)
    match    every value becomes the reference's of the same rank;              as given
             ``skimage.exposure.match_histograms``
    ======== ================================================================== ==========================

    The image is read once for the statistics (twice or more for types wider than 16 bits and for CLAHE) and
    once for the result. Percentiles are exact, those of `numpy.percentile`, for every dtype. For
    ``equalize`` and ``match``, integers of up to 16 bits have a bin for every value; wider types `bins` bins
    (as scikit-image) or 65536 (``match``, where scikit-image would sort the whole) between their extremes. A
    channel whose two percentiles coincide is stretched between its extremes; one with a single value stays
    as it is (stretch) or becomes 0 (equalize, clahe).

    Parameters
    ----------
    x : dask or numpy array ``(C, Y, X)`` or ``(Y, X)``
    low, high : float
        Percentiles, 0-100 (stretch).
    linked : bool
        Give all channels the curve of their common histogram, which keeps the colours of a colour picture.
    reference : array ``(C, Y, X)`` or ``(Y, X)``
        The image to match (match): same channels and dtype, any size.
    tiles : int
        Tiles along each side: more adapt to smaller structures (clahe).
    clip_limit : float
        0-1; high gives more contrast, and more noise (clahe).

    Raises
    ------
    InputError
        For settings out of range or a missing reference; when computed, for NaN pixels.
    """
    import dask.array as da
    from dask.delayed import delayed

    settings = _histogram_settings(method, low, high, tiles, clip_limit, bins)
    planes = _planes(x, allow_2d=True)
    dtype = planes.dtype
    if method != "match":
        if reference is not None:
            raise InputError(f"A reference is for method 'match', but the method is {method!r}.")
        state: Any = start_pass(settings, dtype, planes.shape, linked)
    else:
        if reference is None:
            raise InputError("Matching histograms needs a reference image: give reference=.")
        other = _planes(reference, allow_2d=True)
        check_reference(other, dtype, planes.shape[0])
        counting = first_pass(Referring(), dtype, planes.shape[0], int(np.prod(other.shape[1:])), linked)
        frozen = _frozen_lazily(other, counting, passes_needed(Referring, dtype))
        state = delayed(start_pass, pure=True)(settings, dtype, planes.shape, linked, frozen)
    passes = (
        3 if method == "clahe" else passes_needed(Stretching if method == "stretch" else Equalizing, dtype)
    )
    step = _frozen_lazily(planes, state, passes)
    kind = float_dtype(dtype) if method in ("equalize", "clahe") else dtype
    again = _read_again(planes, step)
    result = da.map_blocks(_apply_frozen, again, step, dtype=kind, meta=np.empty((0, 0, 0), kind))
    return result[0] if np.ndim(x) == 2 else result


def gaussian(x: Any, sigma: float) -> da.Array:
    """Smooth each channel by a Gaussian.

    `dask_image.ndfilters.gaussian_filter`, and so `scipy.ndimage.gaussian_filter`: reflected at the image's
    border, cut at four standard deviations. (`skimage.filters.gaussian` differs at the border, where it
    repeats the edge.)

    Parameters
    ----------
    x : dask or numpy array ``(C, Y, X)`` or ``(Y, X)``
    sigma : float
        Standard deviation in pixels, above 0.

    Returns
    -------
    dask array of the same shape and dtype
        Integers are filtered in float64 and rounded to nearest.

    Raises
    ------
    InputError
        For a sigma of 0 or less, or that is no number.
    """
    from dask_image.ndfilters import gaussian_filter

    try:
        good = math.isfinite(sigma) and sigma > 0
    except TypeError:
        good = False
    if not good:
        raise InputError(f"The sigma {sigma!r} of the Gaussian filter cannot be used: it must be above 0.")
    planes = _planes(x, allow_2d=True)
    sigma = float(sigma)
    halo = Gaussian(sigma).halo
    # Dask refuses an overlap wider than the array: such an axis stays in one piece and needs none.
    short = {axis: -1 for axis in (1, 2) if planes.shape[axis] <= halo}
    if planes.dtype.kind == "f" and not short:
        result = gaussian_filter(planes, (0, sigma, sigma), truncate=TRUNCATE)
    else:
        # dask-image would filter integers as SciPy does, rounding down after each axis.
        depth = {0: 0, 1: 0 if 1 in short else halo, 2: 0 if 2 in short else halo}
        cut = planes.rechunk(short)
        result = cut.map_overlap(smooth, depth, "none", dtype=planes.dtype, meta=planes._meta, sigma=sigma)
    return result[0] if np.ndim(x) == 2 else result


def preprocess(x: Any, plan: Plan) -> da.Array:
    """A frozen plan on a dask or numpy array ``(C, Y, X)``, lazily: what the engine makes by blocks."""
    planes = _planes(x)
    if tuple(planes.shape[1:]) != plan.shape or planes.shape[0] != plan.in_channels:
        raise InputError(
            f"The plan is for shape {(plan.in_channels, *plan.shape)}, but the image has {planes.shape}."
        )
    result = planes
    for step in plan.steps:
        result = gaussian(result, step.sigma) if isinstance(step, Gaussian) else _map(result, step)
    return result


# -- helpers ----------------------------------------------------------------------------------------
def _planes(x: Any, *, allow_2d: bool = False) -> da.Array:
    """A dask array ``(C, Y, X)`` of a working dtype with all channels in each chunk."""
    import dask.array as da

    if isinstance(x, list | tuple):
        shapes = {np.shape(plane) for plane in x}
        if len(shapes) != 1:
            raise InputError(f"The channels differ in size: {sorted(shapes)}.")
        x = da.stack([da.asarray(plane) for plane in x])
    elif not isinstance(x, da.Array):
        x = np.asarray(x)
        # One chunk a block of this size keeps filters and counts parallel.
        x = da.from_array(x, chunks=(-1,) * (x.ndim - 2) + (2048, 2048) if x.ndim >= 2 else -1)
    if x.ndim == 2 and allow_2d:
        x = x[None]
    if x.ndim != 3:
        raise InputError(f"An image must have the axes (C, Y, X), but this one has shape {tuple(x.shape)}.")
    if any(math.isnan(side) for side in x.shape) or 0 in x.shape:
        raise InputError(
            f"An image needs a known size and at least one pixel, but this one has shape {x.shape}."
        )
    return x.astype(working_dtype(x.dtype), copy=False).rechunk({0: -1})


def _histogram_settings(
    method: str, low: float, high: float, tiles: int, clip_limit: float, bins: int
) -> HistogramSettings:
    from pydantic import ValidationError

    values: dict[str, Any] = {"method": method, "low": low, "high": high}
    values |= {"tiles": tiles, "clip_limit": clip_limit, "bins": bins}
    if method == "match":
        values["reference"] = "given"
    try:
        return HistogramSettings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        what = ".".join(str(step) for step in problem["loc"]) or "histogram"
        value = values.get(what, (low, high))
        raise InputError(f"adjust_histogram: {what} cannot be {value!r} ({problem['msg']}).") from None


def _map(x: da.Array, step: Step) -> da.Array:
    import dask.array as da

    chunks = ((step.channels(int(x.shape[0])),), *x.chunks[1:])
    dtype = step.dtype(x.dtype)
    return da.map_blocks(_apply_frozen, x, step, chunks=chunks, dtype=dtype, meta=np.empty((0, 0, 0), dtype))


def _apply_frozen(block: Any, step: Step, block_info: Any = None) -> Any:
    location = block_info[0]["array-location"]
    box = Box(location[1][0], location[2][0], location[1][1], location[2][1])
    return apply_steps(block, (step,), box)


def count_lazily(x: Any, counting: Any, steps: tuple[Step, ...] = ()) -> Any:
    """Merged counts of all chunks, as one `dask.delayed`."""
    from dask.delayed import delayed

    x = _planes(x)
    grid = Grid.from_chunks(x.chunks[1:])
    blocks = x.to_delayed(optimize_graph=False)[0]
    count = delayed(count_block, pure=True)
    parts = [count(blocks[index], grid.core(index), counting, steps) for index in grid]
    while len(parts) > 1:
        groups = [parts[i : i + _FAN_IN] for i in range(0, len(parts), _FAN_IN)]
        parts = [delayed(_merge, pure=True)(counting, group) for group in groups]
    return parts[0]


def _frozen_lazily(x: da.Array, state: Any, passes: int) -> Any:
    """The step that `passes` passes over the image lead to, as one `dask.delayed`."""
    from dask.delayed import delayed

    for number in range(passes):
        blocks = _read_again(x, state) if number else x
        state = delayed(_finish, pure=True)(state, count_lazily(blocks, state))
    return state


def _read_again(x: da.Array, after: Any) -> da.Array:
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
