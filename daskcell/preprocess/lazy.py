"""Preprocessing of dask arrays: `correct_background`, `adjust_stains`, `reconstruct`, `adjust_histogram`,
`gaussian`; and `prepare`, all of them as a study's settings say.

Lazy: nothing is computed before the result is asked for. All take dask or numpy arrays and return dask
arrays. The arithmetic is that of the steps the engine applies, so both give the same bits, for every
chunking.

``axes`` is the order of the axes of an array, such as ``"YXC"``; None: as the array says (xarray, Zarr), else
``CYX``, or ``YXC`` where the last axis is one of up to 4 channels, with a warning (`images.axes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from daskcell.config import (
    BackgroundSettings,
    GaussianSettings,
    HistogramSettings,
    PreprocessSettings,
    ReconstructSettings,
    Settings,
    StainSettings,
)
from daskcell.errors import InputError
from daskcell.preprocess.background import Background, Flat
from daskcell.preprocess.block_stats import as_set
from daskcell.preprocess.colors import auto_colors, mixing_weights
from daskcell.preprocess.dask_graph import as_planes, fit_lazily, map_delayed_step, map_step, read_again
from daskcell.preprocess.dtypes import float_dtype
from daskcell.preprocess.fit import check_reference, find_reference_stains, fit_plan, start_pass
from daskcell.preprocess.plan import Plan
from daskcell.preprocess.stains import ColourCounts, separation
from daskcell.preprocess.statistics import Equalizing, Referring, Stretching, first_pass, passes_needed
from daskcell.preprocess.steps import Gaussian, Mix

if TYPE_CHECKING:
    import dask.array as da

_Settings = TypeVar("_Settings", bound=Settings)
_BACKGROUND = BackgroundSettings.model_construct()
_STAINS = StainSettings()
_RECONSTRUCT = ReconstructSettings()
_HISTOGRAM = HistogramSettings()
_GAUSSIAN = GaussianSettings()


def correct_background(
    x: Any,
    radius: float | None = _BACKGROUND.radius,
    *,
    light: bool = _BACKGROUND.light,
    flat: Any = _BACKGROUND.flat,
    dark: float = _BACKGROUND.dark,
    axes: str | None = None,
) -> da.Array:
    """Correct uneven illumination of every channel: by a flat field, by a rolling background, or by both.

    ====== ==================================================================================================
    flat   ``(x - dark) * mean(flat - dark) / (flat - dark)``
    radius the image less its background, the morphological opening by a disc [1]_ of the means of small
           squares (`dask_image.ndfilters.minimum_filter` and `maximum_filter`, as
           `skimage.morphology.opening`), interpolated linearly (`skimage.transform.resize`)
    light  for bright field: the closing, by which the image is divided, so that its background becomes white
    ====== ==================================================================================================

    Parameters
    ----------
    x : dask or numpy array ``(C, Y, X)`` or ``(Y, X)``
        Integers or floats.
    radius : float, optional
        Of the disc in pixels, 1 or more, and more than that of the largest clump of cells.
    light : bool
        Whether the background is bright.
    flat : array ``(Y, X)`` or ``(C, Y, X)``, optional
        The evenly lit, empty field, as the camera recorded it (`estimate_flat` makes one from many images).
        As large as `x`, or of the size of the camera fields that `x` was stitched from.
    dark : float
        What the camera records without light, in `x` and in `flat`.
    axes : str, optional
        Order of the axes of `x`, such as ``"YXC"``; see the module.

    Returns
    -------
    dask array of the same shape and dtype
        Integers are rounded to nearest and clipped to the range of their type; floats may go below 0.

    Raises
    ------
    InputError
        For neither a flat field nor a radius, values out of range, or a flat field that does not fit.

    References
    ----------
    .. [1] S. R. Sternberg, "Biomedical image processing", Computer 16 (1983) 22-34.

    Examples
    --------
    The left half of the field is lit twice as brightly:

    >>> import numpy as np
    >>> image = np.array([[20, 10], [40, 20]], np.uint8)
    >>> correct_background(image, flat=np.array([[2.0, 1.0], [2.0, 1.0]])).compute()
    array([[15, 15],
           [30, 30]], dtype=uint8)
    """
    given = None if flat is None else "given"
    values = {"flat": given, "dark": dark, "radius": radius, "light": light}
    _checked(BackgroundSettings, "correct_background", values)
    result = planes = as_planes(x, allow_2d=True, axes=axes)
    if flat is not None:
        field = as_planes(flat, allow_2d=True).rechunk(-1)
        Flat.check(field.shape, planes.shape)
        from dask.delayed import delayed

        whole = field.to_delayed(optimize_graph=False).item()
        step = delayed(Flat.of, pure=True)(whole, float(dark), tuple(planes.shape), planes.dtype)
        result = map_delayed_step(planes, step, planes.dtype)
    if radius is not None:
        result = map_step(result, Background((planes.shape[1], planes.shape[2]), float(radius), light))
    return result[0] if np.ndim(x) == 2 else result


def adjust_stains(
    x: Any,
    method: Literal["normalize", "separate"] = _STAINS.method,
    *,
    reference: Any = _STAINS.reference,
    axes: str | None = None,
) -> da.Array:
    """Normalise the illumination and the stains of a colour slide, or separate the stains.

    ========= ============================================================================ ==================
    method    what                                                                         dtype of the result
    ========= ============================================================================ ==================
    normalize glass becomes white; with a reference, the illumination and the mean         as given
              density of the tissue in red, green and blue become the reference's [1]_
    separate  densities of haematoxylin, eosin and DAB, as `skimage.color.rgb2hed`         float32 (float64
                                                                                           for float64)
    ========= ============================================================================ ==================

    Parameters
    ----------
    x : dask or numpy array ``(3, Y, X)``
        Red, green and blue on a bright background; white is the largest integer, or 1.0.
    method : {"normalize", "separate"}
    reference : array ``(3, Y, X)``, optional
        The slide whose colours are the standard (normalize). It is read when this function is called.
    axes : str, optional
        Order of the axes of `x`, such as ``"YXC"``; see the module.

    Returns
    -------
    dask array ``(3, Y, X)``

    Raises
    ------
    InputError
        For another method, an image or reference that is not in three colours, a reference without stains.

    References
    ----------
    .. [1] E. Reinhard et al., "Color transfer between images", IEEE CG&A 21 (2001) 34-41.

    Examples
    --------
    >>> import numpy as np
    >>> slide = np.full((3, 4, 4), 250, np.uint8)
    >>> slide[:, 1, 1] = 120, 60, 160
    >>> densities = adjust_stains(slide, "separate")
    >>> densities.shape, densities.dtype
    ((3, 4, 4), dtype('float32'))
    >>> bool(densities[0, 1, 1] > densities[0, 0, 0])
    True
    """
    named = None if reference is None else "given"
    _checked(StainSettings, "adjust_stains", {"method": method, "reference": named})
    planes = as_planes(x, axes=axes)
    if planes.shape[0] != 3:
        raise InputError(f"Stains are told apart in three colours, but the image has shape {planes.shape}.")
    if method == "separate":
        return map_step(planes, separation())
    standard = None if reference is None else find_reference_stains(as_planes(reference))
    step = fit_lazily([planes], ColourCounts(standard=standard), 1)
    return map_delayed_step(read_again(planes, step), step, planes.dtype)


def reconstruct(
    channels: Any,
    colors: Sequence[str] | Literal["auto"] = _RECONSTRUCT.colors,
    ratio: Sequence[float] | None = _RECONSTRUCT.ratio,
    *,
    axes: str | None = None,
) -> da.Array:
    """Rebuild the colour image from one image per stain, by adding their light.

    Every channel adds to red, green and blue what its colour has of them, times its ratio: cyan adds to
    green and blue.

    Parameters
    ----------
    channels : dask or numpy array ``(C, Y, X)``, an `Image`, or a list of arrays ``(Y, X)``
    colors : one colour a channel, or "auto"
        Any matplotlib name, or ``"#rrggbb"``; ``"green"`` is full green ``(0, 1, 0)``. auto: from the names
        of an `Image`'s channels, else red, green, blue, cyan.
    ratio : sequence of float, optional
        One weight of 0 or more a channel; None: 1 for each.
    axes : str, optional
        Order of the axes of `channels`, such as ``"YXC"``; see the module.

    Returns
    -------
    dask array ``(3, Y, X)`` of the same dtype
        Integers are rounded to nearest and saturate at the largest value of their type; floats are not cut.

    Raises
    ------
    InputError
        Naming the colour, ratio or count that does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> channels = np.zeros((2, 4, 4), np.uint8)
    >>> channels[0, 0, 0], channels[1, 1, 1] = 200, 100
    >>> rgb = reconstruct(channels, colors=("red", "cyan"))
    >>> rgb.shape, rgb.dtype
    ((3, 4, 4), dtype('uint8'))
    >>> rgb[:, 1, 1].compute()
    array([  0, 100, 100], dtype=uint8)
    """
    x = as_planes(channels, axes=axes)
    count = int(x.shape[0])
    if isinstance(colors, str):
        if colors != "auto":
            raise InputError(f"colors cannot be {colors!r}: give one colour a channel, or 'auto'.")
        colors = auto_colors(getattr(channels, "channels", [""] * count))
    step = Mix(mixing_weights(count, list(colors), [1.0] * count if ratio is None else list(ratio)))
    return map_step(x, step)


def adjust_histogram(
    x: Any,
    method: Literal["stretch", "equalize", "clahe", "match"] = _HISTOGRAM.method,
    low: float = _HISTOGRAM.low,
    high: float = _HISTOGRAM.high,
    *,
    linked: bool | Literal["auto"] = _HISTOGRAM.linked,
    reference: Any = _HISTOGRAM.reference,
    tiles: int = _HISTOGRAM.tiles,
    clip_limit: float = _HISTOGRAM.clip_limit,
    bins: int = _HISTOGRAM.bins,
    axes: str | None = None,
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
    x : dask or numpy array ``(C, Y, X)`` or ``(Y, X)``, or an `Image`
        Integers or floats.
    method : {"stretch", "equalize", "clahe", "match"}
    low, high : float
        Percentiles, 0-100 (stretch), of the pixels that are no padding. Where cells cover so little of the
        image that a percentile lies in the noise of the background, a level of the cells is taken in its
        place (`daskcell.preprocess.signal` says when).
    linked : bool or "auto"
        Give all channels the curve of their common histogram, which keeps the colours of a colour image;
        auto: for an `Image` that is one (``is_rgb``). An array does not say whether it is.
    reference : array ``(C, Y, X)`` or ``(Y, X)``, or list of such
        The image to match, or a set of them, whose pixels are counted together (match): same channels and
        dtype, any size.
    tiles : int
        Tiles along each side: more adapt to smaller structures (clahe).
    clip_limit : float
        0-1; high gives more contrast, and more noise (clahe).
    bins : int
        Of the histogram (equalize of types wider than 16 bits, clahe).
    axes : str, optional
        Order of the axes of `x`, such as ``"YXC"``; see the module.

    Returns
    -------
    dask array of the shape of `x`

    Raises
    ------
    InputError
        For settings out of range or a missing reference; when computed, for NaN pixels.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(100, 200, dtype=np.uint8).reshape(10, 10)
    >>> adjust_histogram(image, low=0, high=100)[0, :4].compute()
    array([0, 2, 5, 7], dtype=uint8)
    >>> float(adjust_histogram(image, "equalize")[9, 9].compute())
    1.0
    >>> adjust_histogram(image, "match", reference=image // 2)[0, :4].compute()
    array([50, 50, 50, 51], dtype=uint8)
    """
    from dask.delayed import delayed

    values: dict[str, Any] = {
        "method": method,
        "low": low,
        "high": high,
        "tiles": tiles,
        "clip_limit": clip_limit,
    }
    values |= {"bins": bins, "linked": linked, "reference": "given" if method == "match" else None}
    settings = _checked(HistogramSettings, "adjust_histogram", values)
    linked = getattr(x, "is_rgb", False) if linked == "auto" else linked
    planes = as_planes(x, allow_2d=True, axes=axes)
    dtype = planes.dtype
    if method != "match":
        if reference is not None:
            raise InputError(f"A reference is for method 'match', but the method is {method!r}.")
        state: Any = start_pass(settings, dtype, planes.shape, linked)
    else:
        if reference is None:
            raise InputError("Matching histograms needs a reference image: give reference=.")
        others = [as_planes(image, allow_2d=True) for image in as_set(reference)]
        for other in others:
            check_reference(other, dtype, planes.shape[0])
        counting = first_pass(Referring(), dtype, planes.shape[:1], linked)
        fitted = fit_lazily(others, counting, passes_needed(Referring, dtype))
        state = delayed(start_pass, pure=True)(settings, dtype, planes.shape, linked, fitted)
    passes = (
        3 if method == "clahe" else passes_needed(Stretching if method == "stretch" else Equalizing, dtype)
    )
    step = fit_lazily([planes], state, passes)
    result = map_delayed_step(
        read_again(planes, step), step, float_dtype(dtype) if method in ("equalize", "clahe") else dtype
    )
    return result[0] if np.ndim(x) == 2 else result


def gaussian(x: Any, sigma: float = _GAUSSIAN.sigma, *, axes: str | None = None) -> da.Array:
    """Smooth each channel by a Gaussian.

    By `dask_image.ndfilters.gaussian_filter`, and so what `scipy.ndimage.gaussian_filter` makes of the whole:
    reflected at the image's border, cut at four standard deviations. (`skimage.filters.gaussian` differs at
    the border, where it repeats the edge.)

    Parameters
    ----------
    x : dask or numpy array ``(C, Y, X)`` or ``(Y, X)``
        Integers or floats.
    sigma : float
        Standard deviation in pixels, above 0.
    axes : str, optional
        Order of the axes of `x`, such as ``"YXC"``; see the module.

    Returns
    -------
    dask array of the same shape and dtype
        Integers are filtered in float64 and rounded to nearest.

    Raises
    ------
    InputError
        For a sigma of 0 or less, or that is no number.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.zeros((5, 5), np.uint8)
    >>> image[2, 2] = 100
    >>> gaussian(image, sigma=1.0)[2].compute()
    array([ 2, 10, 16, 10,  2], dtype=uint8)
    """
    try:
        good = math.isfinite(sigma) and sigma > 0
    except TypeError:
        good = False
    if not good:
        raise InputError(f"The sigma {sigma!r} of the Gaussian filter cannot be used: it must be above 0.")
    result = map_step(as_planes(x, allow_2d=True, axes=axes), Gaussian(float(sigma)))
    return result[0] if np.ndim(x) == 2 else result


def prepare(image: Any, settings: PreprocessSettings | Plan | None = None) -> da.Array:
    """All preprocessing before segmentation, as a study with these settings does it.

    Parameters
    ----------
    image : `Image`, or dask or numpy array ``(C, Y, X)``
        An `Image` knows the names of its channels and whether it is a colour image; an array has neither.
    settings : PreprocessSettings or Plan, optional
        With settings, the image is read for its statistics when this function is called, block by block; a
        `Plan` has all its numbers. None: the default settings.

    Returns
    -------
    dask array ``(C, Y, X)``
        The same bits as such a study segments.

    Raises
    ------
    InputError
        For settings or a plan that do not fit the image, or NaN pixels where a histogram is adjusted.

    Examples
    --------
    >>> import numpy as np
    >>> from daskcell.config import GaussianSettings, PreprocessSettings
    >>> image = np.arange(100, 200, dtype=np.uint8).reshape(1, 10, 10)
    >>> prepare(image, PreprocessSettings(gaussian=GaussianSettings(sigma=2.0)))
    dask.array<to_dtype, shape=(1, 10, 10), dtype=uint8, chunksize=(1, 10, 10), chunktype=numpy.ndarray>
    """
    planes = as_planes(image)
    if isinstance(settings, Plan):
        plan = settings
    else:
        names = getattr(image, "channels", None)
        plan = fit_plan(planes, settings, names, getattr(image, "is_rgb", False))
    if tuple(planes.shape[1:]) != plan.shape or planes.shape[0] != plan.in_channels:
        raise InputError(
            f"The plan is for shape {(plan.in_channels, *plan.shape)}, but the image has {planes.shape}."
        )
    result = planes
    for step in plan.steps:
        result = map_step(result, step)
    return result


def _checked(kind: type[_Settings], function: str, values: dict[str, Any]) -> _Settings:
    """Settings from the arguments of a function; what cannot be is refused with its value."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        what = ".".join(str(step) for step in problem["loc"])
        said = problem["msg"].removeprefix("Value error, ")
        about = f"{what} cannot be {values.get(what)!r} ({said})" if what else said
        raise InputError(f"{function}: {about}.") from None
