"""Freezing: the statistics of one image, counted, and the `Plan` they lead to.

`freeze` counts an array, `freeze_slide` an OME-Zarr image without ever holding the whole; both count the same
things and give the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.config import HistogramSettings, PreprocessSettings
from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.preprocess.clahe import ClaheAim
from daskcell.preprocess.colors import auto_colors, mixing_weights
from daskcell.preprocess.pixels import all_values, is_small, working_dtype
from daskcell.preprocess.plan import Plan, apply_steps
from daskcell.preprocess.statistics import (
    Aim,
    Equalizing,
    ExactCounts,
    Extremes,
    Matching,
    Pass,
    Reference,
    Referring,
    Stretching,
    first_pass,
)
from daskcell.preprocess.steps import Floor, Gaussian, Mix, Step

if TYPE_CHECKING:
    from daskcell.compute import Workers

_COUNT_BLOCK = 2048
_SIGNAL_PERCENTILE = 99.8
_DEAD = 0.05
"""A channel of a colour picture whose bright pixels reach less of the brightest channel's holds no signal."""
_SPARSE = 0.1
"""A stain is rare if its 99th percentile is not this far towards its 99.9th."""

Survey = Callable[[Pass, tuple[Step, ...]], Any]
"""One pass over the image: merged counts of all blocks after the given steps."""


def freeze(
    image: Any,
    settings: PreprocessSettings | None = None,
    channels: Sequence[str] | None = None,
    is_rgb: bool = False,
    *,
    reference: Any = None,
) -> Plan:
    """Freeze the preprocessing of an array.

    Parameters
    ----------
    image : numpy or dask array ``(C, Y, X)``
        Read once or more, block by block.
    channels : names of the channels
        For colours chosen automatically.
    is_rgb : bool
        A colour picture already: it keeps its channels unless colours or a ratio are asked for.
    reference : array ``(C, Y, X)``, optional
        What histograms are matched to (method ``"match"``); default: the file named in the settings.

    Raises
    ------
    InputError
        For colours or ratios that do not fit, or NaN pixels where a histogram is adjusted.
    """
    settings = settings or PreprocessSettings()
    if image.ndim != 3:
        raise InputError(
            f"An image must have the axes (C, Y, X), but this one has shape {tuple(image.shape)}."
        )
    return _freeze(
        tuple(image.shape),
        image.dtype,
        settings,
        channels,
        is_rgb,
        reference,
        lambda p, s: _count_array(image, p, s),
    )


def freeze_slide(
    zarr_path: str | Path, settings: PreprocessSettings | None = None, workers: Workers | None = None
) -> Plan:
    """Freeze the preprocessing of an OME-Zarr image, one task a block; the same plan as from the whole."""
    from daskcell import images

    settings = settings or PreprocessSettings()
    info = images.image_info(zarr_path)

    def survey(counting: Pass, steps: tuple[Step, ...]) -> Any:
        kept = None if steps else _kept_counts(zarr_path, counting)
        if kept is not None:
            return kept
        return _count_slide(zarr_path, Grid.regular(info.shape[1:], _COUNT_BLOCK), counting, steps, workers)

    return _freeze(info.shape, info.dtype, settings, info.channels, info.is_rgb, None, survey)


def _freeze(
    shape: tuple[int, ...],
    dtype: Any,
    settings: PreprocessSettings,
    channels: Sequence[str] | None,
    is_rgb: bool,
    reference: Any,
    survey: Survey,
) -> Plan:
    if 0 in shape:
        raise InputError(f"The image has no pixels (shape {shape}).")
    count = shape[0]
    steps: list[Step] = []
    if settings.reconstruct is not None and count > 1 and not is_rgb and working_dtype(dtype).kind == "u":
        steps = _without_noise(survey, working_dtype(dtype))
    weights = _weights(settings, count, channels, is_rgb)
    if weights is not None:
        steps.append(Mix(weights))
        count = len(weights)
    counted: np.ndarray | None = None
    if weights is None and is_rgb and settings.reconstruct is not None and is_small(working_dtype(dtype)):
        steps, counted = _without_dead_channels(survey, working_dtype(dtype))
    if settings.histogram is not None:
        matched = None
        linked = is_rgb if settings.histogram.linked == "auto" else settings.histogram.linked
        if settings.histogram.method == "match":
            matched = _freeze_reference(
                settings.histogram, reference, working_dtype(dtype), tuple(steps), shape[0], linked
            )
        state: Any = start_pass(
            settings.histogram, working_dtype(dtype), (count, *shape[1:]), linked, matched
        )

        def counts(counting: Pass) -> Any:
            known = counted is not None and isinstance(counting, ExactCounts)
            return counted if known else survey(counting, tuple(steps))

        steps.append(run_passes(state, counts))
    if settings.gaussian is not None:
        steps.append(Gaussian(settings.gaussian.sigma))
    return Plan((int(shape[1]), int(shape[2])), int(shape[0]), np.dtype(dtype), tuple(steps))


def _without_noise(survey: Survey, dtype: np.dtype) -> list[Step]:
    """A step that keeps of a rare stain only what is stained, if there is one beside others.

    Of a marker that few cells carry, the 99th percentile is still background, and whatever adjusts contrast
    between percentiles later, such as Cellpose, would make a full channel of its noise.
    """
    if not is_small(dtype):
        return []
    counting = ExactCounts(Referring(), dtype)
    counts = survey(counting, ())
    usual = np.array(counting.limits(counts, Stretching(1.0, 99.0)))
    rare = np.array(counting.limits(counts, Stretching(1.0, 99.9)))
    sparse = usual[:, 1] - usual[:, 0] < _SPARSE * (rare[:, 1] - rare[:, 0])
    if sparse.all() or not sparse.any():
        return []
    return [Floor(tuple(int(high) if few else 0 for high, few in zip(usual[:, 1], sparse, strict=True)))]


def _without_dead_channels(survey: Survey, dtype: np.dtype) -> tuple[list[Step], np.ndarray]:
    """A step that empties channels of a colour picture that hold no signal, if any; and the counts after it.

    One stain stored as JPEG in colours leaves compression noise of a few grey levels in the two others.
    Whatever adjusts contrast channel by channel later, such as Cellpose, would blow it up.
    """
    counting = ExactCounts(Referring(), dtype)
    counts = survey(counting, ()).copy()
    bright = np.array(counting.limits(counts, Stretching(0.0, _SIGNAL_PERCENTILE)))[:, 1]
    dead = bright < _DEAD * bright.max()
    if not dead.any():
        return [], counts
    counts[dead] = 0
    counts[dead, np.searchsorted(all_values(dtype), 0)] = counts[~dead][0].sum()
    weights = np.diag((~dead).astype(float))
    return [Mix(tuple(tuple(row) for row in weights.tolist()))], counts


def _weights(
    settings: PreprocessSettings, count: int, channels: Sequence[str] | None, is_rgb: bool
) -> tuple[tuple[float, ...], ...] | None:
    chosen = settings.reconstruct
    if chosen is None:
        return None
    if chosen.colors == "auto":
        # One channel stays one grey channel, a colour picture stays as it is.
        if chosen.ratio is None and (count == 1 or is_rgb):
            return None
        names = list(channels) if channels is not None and len(channels) == count else [""] * count
        colors = ["red", "green", "blue"] if is_rgb and count == 3 else auto_colors(names)
    else:
        colors = list(chosen.colors)
    weights = mixing_weights(count, colors, chosen.ratio if chosen.ratio is not None else [1.0] * count)
    # Red, green and blue in this order are a colour picture already.
    return None if np.array_equal(weights, np.eye(3)) else weights


def start_pass(
    histogram: HistogramSettings,
    dtype: np.dtype,
    shape: tuple[int, ...],
    linked: bool = False,
    reference: Reference | None = None,
) -> Pass:
    """The first pass for a method of histogram adjustment on an image of `shape` ``(C, Y, X)``."""
    if histogram.method == "clahe":
        tiles = histogram.tiles
        kernel = (max(shape[1] // tiles, 1), max(shape[2] // tiles, 1))
        tiled = ClaheAim((shape[1], shape[2]), kernel, histogram.clip_limit, histogram.bins, linked)
        return Extremes(tiled, dtype, linked)
    aim: Aim
    if histogram.method == "stretch":
        aim = Stretching(histogram.low, histogram.high)
    elif histogram.method == "equalize":
        aim = Equalizing(histogram.bins)
    else:
        assert reference is not None
        aim = Matching(reference)
    return first_pass(aim, dtype, shape[0], shape[1] * shape[2], linked)


def run_passes(state: Any, survey: Callable[[Pass], Any]) -> Any:
    """Count, merge and finish until a step (or reference) is reached."""
    while hasattr(state, "count"):
        state = state.finish(survey(state))
    return state


def _freeze_reference(
    histogram: HistogramSettings,
    reference: Any,
    dtype: np.dtype,
    steps: tuple[Step, ...],
    channels: int,
    linked: bool,
) -> Reference:
    if reference is None:
        if histogram.reference is None:
            raise InputError("Matching histograms needs a reference image: set 'reference'.")
        from daskcell import images

        reference = images.open_image(histogram.reference).data
    check_reference(reference, dtype, channels)
    count = steps[-1].channels(channels) if steps else channels
    state = first_pass(Referring(), dtype, count, int(np.prod(reference.shape[1:])), linked)
    return run_passes(state, lambda counting: _count_array(reference, counting, steps))


def check_reference(reference: Any, dtype: np.dtype, channels: int) -> None:
    """Refuse a reference whose channels or type differ from the image's."""
    if reference.ndim != 3 or reference.shape[0] != channels or 0 in reference.shape:
        raise InputError(
            f"The reference has shape {tuple(reference.shape)}, but the image has {channels} channel(s): "
            "give a reference (C, Y, X) with the same channels."
        )
    if working_dtype(reference.dtype) != dtype:
        raise InputError(f"The reference has pixels of type {reference.dtype}, but the image of {dtype}.")


# -- one pass over ... ------------------------------------------------------------------------------
def _count_array(image: Any, counting: Pass, steps: tuple[Step, ...]) -> Any:
    """... an array: numpy in blocks, dask chunk by chunk, so that one pass holds no more than its blocks."""
    if isinstance(image, np.ndarray):
        grid = Grid.regular(image.shape[1:], _COUNT_BLOCK)
        total = None
        for index in grid:
            box = grid.core(index)
            part = count_block(image[(slice(None), *box.slices)], box, counting, steps)
            total = part if total is None else counting.merge(total, part)
        return total
    from daskcell.preprocess.lazy import count_lazily

    return count_lazily(image, counting, steps).compute()


def _count_slide(
    zarr_path: str | Path, grid: Grid, counting: Pass, steps: tuple[Step, ...], workers: Workers | None
) -> Any:
    """... an OME-Zarr image: one task a block."""
    total = None
    if workers is None:
        for index in grid:
            part = _count_slide_block(zarr_path, grid.core(index), counting, steps)
            total = part if total is None else counting.merge(total, part)
        return total
    window = workers.window()
    for index in grid:
        window.submit(index, _count_slide_block, zarr_path, grid.core(index), counting, steps)
    for _, part in window:
        total = part if total is None else counting.merge(total, part)
    return total


def _kept_counts(zarr_path: str | Path, counting: Pass) -> Any:
    """... nothing: the counts kept with the image when it was converted, where they answer the question."""
    from daskcell import images

    histograms = images.read_histograms(zarr_path) if isinstance(counting, ExactCounts | Extremes) else None
    if histograms is None:
        return None
    if isinstance(counting, Extremes):
        ends = [[values[i] for values, _ in histograms] for i in (0, -1)]
        return np.array(ends, counting.dtype)
    assert isinstance(counting, ExactCounts)
    first = int(all_values(counting.dtype)[0])
    counts = np.zeros((len(histograms), len(all_values(counting.dtype))), np.int64)
    for row, (values, numbers) in zip(counts, histograms, strict=True):
        row[values - first] = numbers
    return counts


def _count_slide_block(zarr_path: str | Path, box: Box, counting: Pass, steps: tuple[Step, ...]) -> Any:
    from daskcell import images

    return count_block(images.read_block(zarr_path, box), box, counting, steps)


def count_block(block: np.ndarray, box: Box, counting: Pass, steps: tuple[Step, ...] = ()) -> Any:
    """Counts of one block after `steps`."""
    return counting.count(apply_steps(block, steps, box), box)
