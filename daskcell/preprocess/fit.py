"""From settings to a `Plan`: the statistics of one image are counted, and every step gets its numbers.

`fit_plan` counts an array, `fit_slide` an OME-Zarr image without ever holding the whole; both count the same
things and give the same plan. `block_stats` reads the image for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.config import BackgroundSettings, HistogramSettings, PreprocessSettings, StainSettings
from daskcell.errors import InputError
from daskcell.preprocess.background import Background, FlatFile
from daskcell.preprocess.block_stats import (
    RunPass,
    as_set,
    count_array,
    count_set,
    count_slide,
    run_passes,
)
from daskcell.preprocess.clahe import ClaheAim
from daskcell.preprocess.colors import auto_colors, mixing_weights
from daskcell.preprocess.dtypes import all_values, is_small, working_dtype
from daskcell.preprocess.plan import Plan
from daskcell.preprocess.stains import ColourCounts, Palette, separation
from daskcell.preprocess.statistics import (
    Aim,
    Equalizing,
    ExactCounts,
    Extremes,
    Matching,
    Pass,
    Reference,
    Referring,
    SignalCounts,
    Stretching,
    first_pass,
)
from daskcell.preprocess.steps import Floor, Gaussian, Mix, Step

if TYPE_CHECKING:
    from daskcell.compute import Workers

_SIGNAL_PERCENTILE = 99.8
_DEAD = 0.05
"""A channel of a colour image whose bright pixels reach less of the brightest channel's holds no signal."""
_OVERDRIVEN = 10.0
"""A stain is rare if contrast up to its 99th percentile would show its 99.9th this many times too bright."""


def fit_plan(
    image: Any,
    settings: PreprocessSettings | None = None,
    channels: Sequence[str] | None = None,
    is_rgb: bool = False,
    *,
    reference: Any = None,
) -> Plan:
    """Fit the preprocessing of an array.

    Parameters
    ----------
    image : numpy or dask array ``(C, Y, X)``
        Read once or more, block by block.
    channels : names of the channels
        For colours chosen automatically.
    is_rgb : bool
        A colour image already: it keeps its channels unless colours or a ratio are asked for.
    reference : array ``(C, Y, X)`` or list of such, optional
        What histograms are matched to (method ``"match"``); default: the files named in the settings.

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
    return _fit(
        tuple(image.shape),
        image.dtype,
        settings,
        channels,
        is_rgb,
        reference,
        lambda p, s: count_array(image, p, s),
    )


def fit_slide(
    zarr_path: str | Path, settings: PreprocessSettings | None = None, workers: Workers | None = None
) -> Plan:
    """Fit the preprocessing of an OME-Zarr image, one task a block; the same plan as from the whole."""
    from daskcell import images

    settings = settings or PreprocessSettings()
    info = images.image_info(zarr_path)

    def run_pass(counting: Pass, steps: tuple[Step, ...]) -> Any:
        return count_slide(zarr_path, counting, steps, workers)

    return _fit(info.shape, info.dtype, settings, info.channels, info.is_rgb, None, run_pass)


def _fit(
    shape: tuple[int, ...],
    dtype: Any,
    settings: PreprocessSettings,
    channels: Sequence[str] | None,
    is_rgb: bool,
    reference: Any,
    run_pass: RunPass,
) -> Plan:
    if 0 in shape:
        raise InputError(f"The image has no pixels (shape {shape}).")
    count, kind = shape[0], working_dtype(dtype)
    steps = light_steps(settings.background, shape, kind)
    before = tuple(steps)
    if settings.stains is not None:
        if not is_rgb:
            raise InputError("Only the stains of a colour image can be told apart: leave 'stains' out.")
        steps.append(run_passes(start_stains(settings.stains), lambda counting: run_pass(counting, before)))
        kind = steps[-1].dtype(kind)
        # Stains that were taken apart are no colours that belong together.
        is_rgb = settings.stains.method == "normalize"
    elif settings.reconstruct is not None and count > 1 and not is_rgb and kind.kind == "u":
        steps += _without_noise(run_pass, before, kind)
    taken_apart = settings.stains is not None and not is_rgb
    weights = None if taken_apart else _weights(settings, count, channels, is_rgb)
    if weights is not None:
        steps.append(Mix(weights))
        count = len(weights)
    counted: np.ndarray | None = None
    if weights is None and is_rgb and settings.reconstruct is not None and is_small(kind):
        blanks, counted = _without_dead_channels(run_pass, tuple(steps), kind)
        steps += blanks
    if settings.histogram is not None:
        matched = None
        linked = is_rgb if settings.histogram.linked == "auto" else settings.histogram.linked
        if settings.histogram.method == "match":
            matched = _fit_reference(settings.histogram, reference, dtype, tuple(steps), shape[0], linked)
        state: Any = start_pass(settings.histogram, kind, (count, *shape[1:]), linked, matched)

        def counts(counting: Pass) -> Any:
            known = counted
            if known is not None and isinstance(counting, SignalCounts):
                known = counting.of_pixels(known)
            elif not isinstance(counting, ExactCounts):
                known = None
            return run_pass(counting, tuple(steps)) if known is None else known

        steps.append(run_passes(state, counts))
    if settings.gaussian is not None:
        steps.append(Gaussian(settings.gaussian.sigma))
    return Plan((int(shape[1]), int(shape[2])), int(shape[0]), np.dtype(dtype), tuple(steps))


def light_steps(background: BackgroundSettings | None, shape: tuple[int, ...], dtype: np.dtype) -> list[Step]:
    """What takes uneven light out of an image of `shape` ``(C, Y, X)``."""
    steps: list[Step] = []
    if background is not None and background.flat is not None:
        whole = (int(shape[0]), int(shape[1]), int(shape[2]))
        steps.append(FlatFile.open(background.flat, background.dark, whole, dtype))
    if background is not None and background.radius is not None:
        steps.append(Background((int(shape[1]), int(shape[2])), background.radius, background.light))
    return steps


def start_stains(stains: StainSettings) -> Any:
    """The first pass over a slide for its stains, or the step that needs none."""
    if stains.method == "separate":
        return separation()
    if stains.reference is None:
        return ColourCounts()
    return ColourCounts(standard=find_reference_stains(_open(stains.reference)))


def find_reference_stains(reference: Any) -> Palette:
    """The stains of the image others are brought to."""
    if reference.ndim != 3 or reference.shape[0] != 3:
        raise InputError(f"The reference has shape {tuple(reference.shape)}, not that of a colour image.")
    return run_passes(ColourCounts(finding=True), lambda counting: count_array(reference, counting, ()))


def _without_noise(run_pass: RunPass, steps: tuple[Step, ...], dtype: np.dtype) -> list[Step]:
    """A step that keeps of a rare stain only what is stained, if there is one beside others.

    Of a marker that few cells carry, the 99th percentile is still background, and whatever adjusts contrast
    between percentiles later, such as Cellpose, would make a full channel of its noise. What is asked is how
    far such contrast would miss the signal, and not how far the signal lies above the noise: where cells are
    dense, nothing in a histogram says which pixels are background.
    """
    if not is_small(dtype):
        return []
    counting = ExactCounts(Referring(), dtype)
    counts = run_pass(counting, steps)
    usual = np.array(counting.limits(counts, Stretching(1.0, 99.0)))
    rare = np.array(counting.limits(counts, Stretching(1.0, 99.9)))
    sparse = _OVERDRIVEN * (usual[:, 1] - usual[:, 0]) < rare[:, 1] - rare[:, 0]
    if sparse.all() or not sparse.any():
        return []
    return [Floor(tuple(int(high) if few else 0 for high, few in zip(usual[:, 1], sparse, strict=True)))]


def _without_dead_channels(
    run_pass: RunPass, steps: tuple[Step, ...], dtype: np.dtype
) -> tuple[list[Step], np.ndarray]:
    """A step that empties channels of a colour image that hold no signal, if any; and the counts after it.

    One stain stored as JPEG in colours leaves compression noise of a few grey levels in the two others.
    Whatever adjusts contrast channel by channel later, such as Cellpose, would blow it up.
    """
    counting = ExactCounts(Referring(), dtype)
    counts = run_pass(counting, steps).copy()
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
        # One channel stays one grey channel, a colour image stays as it is.
        if chosen.ratio is None and (count == 1 or is_rgb):
            return None
        names = list(channels) if channels is not None and len(channels) == count else [""] * count
        colors = ["red", "green", "blue"] if is_rgb and count == 3 else auto_colors(names)
    else:
        colors = list(chosen.colors)
    weights = mixing_weights(count, colors, chosen.ratio if chosen.ratio is not None else [1.0] * count)
    # Red, green and blue in this order are a colour image already.
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
    return first_pass(aim, dtype, shape, linked)


def _fit_reference(
    histogram: HistogramSettings,
    reference: Any,
    dtype: Any,
    steps: tuple[Step, ...],
    channels: int,
    linked: bool,
) -> Reference:
    if reference is None:
        if not histogram.reference:
            raise InputError("Matching histograms needs a reference image: set 'reference'.")
        names = [histogram.reference] if isinstance(histogram.reference, str) else histogram.reference
        reference = [_open(name) for name in names]
    images = as_set(reference)
    kind, count = working_dtype(dtype), channels
    for image in images:
        check_reference(image, kind, channels)
    for step in steps:
        kind, count = step.dtype(kind), step.channels(count)
    state = first_pass(Referring(), kind, (count,), linked)
    return run_passes(state, lambda counting: count_set(images, counting, steps))


def _open(path: str) -> Any:
    from daskcell import images

    return images.open_image(path).data


def check_reference(reference: Any, dtype: np.dtype, channels: int) -> None:
    """Refuse a reference whose channels or type differ from the image's."""
    if reference.ndim != 3 or reference.shape[0] != channels or 0 in reference.shape:
        raise InputError(
            f"The reference has shape {tuple(reference.shape)}, but the image has {channels} channel(s): "
            "give a reference (C, Y, X) with the same channels."
        )
    if working_dtype(reference.dtype) != dtype:
        raise InputError(f"The reference has pixels of type {reference.dtype}, but the image of {dtype}.")
