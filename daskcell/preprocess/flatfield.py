"""The flat field of a microscope, from many of its images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.images.arrays import NamedArray, as_image, plain
from daskcell.preprocess.coarse_grid import CoarseGrid
from daskcell.preprocess.dtypes import check_finite, working_dtype
from daskcell.preprocess.steps import smooth

_CELLS = 48
"""Cells of the coarse grid along the longer side."""
_SIGMA = 1.0
"""Smoothing of the result, in cells."""
_LEAST = 3


def estimate_flat(images: Any, dark: float = 0.0, *, axes: str | None = None) -> np.ndarray:
    """Estimate the flat field of a microscope, its fall-off of light, from images of different places.

    Each image is averaged over small tiles and divided by its mean intensity. The median over all images of
    each tile, which ignores what lies there in a few of them, is smoothed. More images give a better field:
    dozens where cells are sparse, hundreds where they are dense.

    Parameters
    ----------
    images : path, or iterable of arrays or paths
        A folder or pattern; or images ``(C, Y, X)`` or ``(Y, X)``, or an array that stacks them along its
        first axis. All have one size and number of channels. Read one at a time, in any order.
    dark : float
        Intensity that the camera gives without light.
    axes : str, optional
        Order of the axes of each array, such as ``"YXC"``.

    Returns
    -------
    numpy.ndarray
        ``(C, Y, X)`` float32: an empty field as the camera would see it, `dark` included. It is the ``flat``
        of `correct_background`.

    Raises
    ------
    InputError
        For fewer than three images, images of different sizes or without light, arrays that are no images,
        and where nothing tells which of their axes is which.

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
    for number, image in enumerate(_each(images, axes), start=1):
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
            raise InputError(f"Image {number} has no light above dark = {dark:g}: please leave it out.")
        means.append((light / level).astype(np.float32))
        levels.append(level)
    if len(means) < _LEAST or shape is None:
        raise InputError(f"A flat field needs {_LEAST} images or more, not {len(means)} image(s).")
    field = smooth(np.median(np.stack(means), axis=0), _SIGMA)
    cells = Box(0, 0, *field.shape[1:])
    spread = np.stack([grid.spread(plane.astype(np.float64), cells, whole) for plane in field])
    spread *= np.median(np.stack(levels), axis=0) / spread.mean(axis=(1, 2), keepdims=True)
    return (spread + dark).astype(np.float32)


def _each(given: Any, axes: str | None) -> Iterator[np.ndarray]:
    """The images ``(C, Y, X)``, one after the other."""
    from daskcell.images import Source, find_images, open_image

    if isinstance(given, str | os.PathLike):
        given = find_images(os.fspath(given))
    elif hasattr(given, "shape") and not type(given).__module__.startswith("pandas"):
        stack = plain(given, "The stack of images")
        if stack.data.ndim not in (3, 4):
            raise InputError(f"A stack of shape {stack.data.shape} holds no images (C, Y, X) or (Y, X).")
        given = [NamedArray(data, stack.dims and stack.dims[1:]) for data in stack.data]
    if not isinstance(given, Iterable):
        raise InputError(f"A flat field comes from images or a folder of them, not from {given!r}.")
    for number, one in enumerate(given, start=1):
        if isinstance(one, str | os.PathLike):
            one = Path(one)
        if isinstance(one, Path | Source):
            one = open_image(one)
        pixels = np.asarray(as_image(one, f"Image {number}", axes).data)
        if 0 in pixels.shape:
            raise InputError(f"Image {number} has no pixels: its shape is {pixels.shape}.")
        yield np.ascontiguousarray(pixels.astype(working_dtype(pixels.dtype), copy=False))
