"""The flat field of a camera, from many images it took."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.images.arrays import plain
from daskcell.preprocess.coarse_grid import CoarseGrid
from daskcell.preprocess.dtypes import check_finite, working_dtype
from daskcell.preprocess.steps import smooth

_CELLS = 48
"""Cells of the coarse grid along the longer side."""
_SIGMA = 1.0
"""Smoothing of the result, in cells."""
_LEAST = 3


def estimate_flat(images: Any, dark: float = 0.0) -> np.ndarray:
    """Estimate the flat field of a microscope's camera from images of different places.

    Each image is averaged over small squares and divided by its mean; of every square the median over all
    images is taken, so that what lies there in a few of them does not count, and the result is smoothed. More
    images give a better field: dozens where cells are sparse, hundreds where they are dense.

    Parameters
    ----------
    images : path of a folder or a pattern, or an iterable of arrays ``(C, Y, X)``, ``(Y, X)`` or paths
        Of one size and number of channels; read one at a time, in any order.
    dark : float
        What the camera records without light.

    Returns
    -------
    array ``(C, Y, X)`` float32
        An empty field as the camera would record it, `dark` included: the ``flat`` of `correct_background`.

    Raises
    ------
    InputError
        For fewer than three images, images of different sizes, or without light.

    Examples
    --------
    >>> import numpy as np
    >>> lamp = np.linspace(1.0, 0.5, 64) * np.ones((64, 1))
    >>> field = estimate_flat([level * lamp for level in (100, 200, 300)])
    >>> field.shape, field.dtype
    ((1, 64, 64), dtype('float32'))
    >>> bool(field[0, 0, 0] > 1.8 * field[0, 0, -1])
    True
    """
    means: list[np.ndarray] = []
    levels: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    for number, image in enumerate(_each(images), start=1):
        if shape is None:
            shape = image.shape
        if image.shape != shape:
            raise InputError(
                f"Image {number} has shape {image.shape}, but the first {shape}: a flat field comes from "
                "images of one size."
            )
        check_finite(image)
        grid = CoarseGrid((shape[1], shape[2]), max(1, max(shape[1:]) // _CELLS))
        whole = Box(0, 0, shape[1], shape[2])
        light = np.stack([grid.means(plane, whole) for plane in image]) - dark
        level = light.mean(axis=(1, 2), keepdims=True)
        if not (level > 0).all():
            raise InputError(f"Image {number} has no light above dark = {dark:g}: leave it out.")
        means.append((light / level).astype(np.float32))
        levels.append(level)
    if len(means) < _LEAST or shape is None:
        raise InputError(f"A flat field needs {_LEAST} images or more, not {len(means)} image(s).")
    field = smooth(np.median(np.stack(means), axis=0), _SIGMA)
    cells = Box(0, 0, *field.shape[1:])
    spread = np.stack([grid.spread(plane.astype(np.float64), cells, whole) for plane in field])
    spread *= np.median(np.stack(levels), axis=0) / spread.mean(axis=(1, 2), keepdims=True)
    return (spread + dark).astype(np.float32)


def _each(given: Any) -> Iterator[np.ndarray]:
    from daskcell.images import Source, find_images, open_image

    if isinstance(given, str | os.PathLike):
        given = find_images(os.fspath(given))
    if hasattr(given, "chunks"):
        given = plain(given, "images").data
    if not isinstance(given, Iterable):
        raise InputError(f"A flat field comes from images or a folder of them, not from {given!r}.")
    for one in given:
        pixels = one
        if isinstance(one, str | os.PathLike):
            pixels = open_image(os.fspath(one)).data
        elif isinstance(one, Source):
            pixels = open_image(one).data
        pixels = np.asarray(plain(pixels, "An image").data)
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or 0 in pixels.shape:
            raise InputError(f"An image has shape {pixels.shape}, but must be (C, Y, X).")
        yield np.ascontiguousarray(pixels.astype(working_dtype(pixels.dtype), copy=False))
