"""Linear resizing of a part of an image, with the pixels the whole image would get.

`cv2.resize` places its samples by the length of the array it is given; here they are placed by the length of
the whole image, whatever part of it is at hand.
"""

from __future__ import annotations

import numpy as np

from daskcell.geometry import Box


def resize_part(
    part: np.ndarray, grown: Box, source: tuple[int, int], target: tuple[int, int], wanted: Box
) -> np.ndarray:
    """Pixels `wanted` of an image resized from `source` to `target`, as ``cv2.INTER_LINEAR`` gives them.

    Parameters
    ----------
    part : (C, h, w) float32
        Pixels `grown` of the source image; must cover what `wanted` samples.
    grown : Box
        Where `part` lies in the source image.
    source, target : (Y, X)
        Sizes of the whole image before and after.
    wanted : Box
        Pixels of the target image to make.

    Returns
    -------
    (C, wanted.y1 - wanted.y0, wanted.x1 - wanted.x0) float32
    """
    if source == target:
        return part[(..., *wanted.within(grown))]
    rows = _samples(source[0], target[0], wanted.y0, wanted.y1, grown.y0)
    columns = _samples(source[1], target[1], wanted.x0, wanted.x1, grown.x0)
    left, right, share = columns
    across = part[..., left] * (np.float32(1) - share) + part[..., right] * share
    above, below, share = rows
    share = share[:, None]
    return across[..., above, :] * (np.float32(1) - share) + across[..., below, :] * share


def _samples(
    source: int, target: int, start: int, stop: int, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two neighbours of each sample and the weight of the second."""
    position = ((np.arange(start, stop) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    share = position - first.astype(np.float32)
    share[(first < 0) | (first >= source - 1)] = 0
    first = np.clip(first, 0, source - 1)
    second = np.minimum(first + 1, source - 1)
    second[share == 0] = first[share == 0]
    return first - offset, second - offset, share.astype(np.float32)
