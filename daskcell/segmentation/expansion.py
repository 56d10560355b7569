"""Labels grown outward by a distance, the same for any blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from daskcell.errors import InputError


def expand(labels: Any, distance: float) -> Any:
    """Grow every label by up to `distance` pixels, without overlap.

    Each background pixel within `distance` of a label takes the nearest one. Often used to get whole cells
    from nuclei where no cytoplasm is stained.

    Parameters
    ----------
    labels : (Y, X) array of integers, dask or numpy
        Label image; 0 is background.
    distance : float
        In pixels, 0 or more.

    Returns
    -------
    (Y, X) dask array
        Labels with the same ids and the same dtype.

    Raises
    ------
    InputError
        Not a label image, or a distance that is negative or not finite.

    Notes
    -----
    Equal to `skimage.segmentation.expand_labels` on the whole image in every pixel, for any chunks: what a
    pixel takes depends on no pixel farther away than `distance`, also where two labels are equally near. So
    each chunk is read with a margin of `distance`; chunks smaller than that are merged.

    Examples
    --------
    >>> import numpy as np
    >>> import daskcell as dc
    >>> dc.expand(np.array([[0, 0, 1, 0, 0, 0, 2]]), 1.5).compute()
    array([[0, 1, 1, 1, 0, 2, 2]])
    """
    import dask.array as da

    from daskcell.images.arrays import as_labels

    labels = da.asarray(as_labels(labels))
    distance = check_distance(distance, "The distance to expand by")
    return labels.map_overlap(
        expand_block,
        distance=distance,
        depth=margin(distance, labels.shape),
        boundary="none",
        dtype=labels.dtype,
        meta=labels._meta,
    )


def expand_block(labels: np.ndarray, distance: float) -> np.ndarray:
    """Labels ``(h, w)`` grown by `distance` pixels; right where the margin is at least as wide."""
    from skimage.segmentation import expand_labels

    return expand_labels(labels, distance)


def margin(distance: float, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Pixels (y, x) around a block that growing by `distance` depends on, in an image of this shape."""
    return tuple(min(math.floor(distance), side) for side in shape)


def check_distance(value: Any, what: str) -> float:
    """A distance in pixels as a float; raises `InputError` for one that is negative or not finite."""
    try:
        distance = float(value)
    except (TypeError, ValueError):
        distance = math.nan
    if not 0 <= distance < math.inf:
        raise InputError(f"{what} must be a number of pixels, 0 or more, not {value!r}.")
    return distance
