"""Crops of single cells to train the encoder: masked, fitted to the cell, background at 0."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from daskcell.models.encoder import SIZE, signal_above_background


def cell_crops(
    signal: np.ndarray, labels: np.ndarray, *, size: int = SIZE, margin: float = 0.1, smallest: int = 40
) -> tuple[np.ndarray, np.ndarray]:
    """Every cell of a picture by itself.

    Parameters
    ----------
    signal
        ``(3, Y, X)`` float, see `signal_above_background`.
    labels
        ``(Y, X)`` whole numbers, 0 background.
    size, margin
        Side of the crops, and room around a cell as a share of its larger side.
    smallest
        Cells of fewer pixels, and cells cut by the picture's border, are left out.

    Returns
    -------
    crops : ndarray
        ``(n, 3, size, size)`` uint8, 170 standing for 1.
    which : ndarray
        ``(n,)`` the cells' labels.
    """
    height, width = labels.shape
    crops, which = [], []
    for i, box in enumerate(ndimage.find_objects(labels.astype(np.int32)), start=1):
        if box is None:
            continue
        (y0, y1), (x0, x1) = ((s.start, s.stop) for s in box)
        if y0 == 0 or x0 == 0 or y1 == height or x1 == width:
            continue
        mask = labels[box] == i
        if mask.sum() < smallest:
            continue
        side = int(np.ceil(max(mask.shape) * (1 + 2 * margin)))
        canvas = np.zeros((3, side, side), np.float32)
        top, left = (side - mask.shape[0]) // 2, (side - mask.shape[1]) // 2
        # Never 0 inside the cell: the encoder reads the cell's shape from it.
        inside = np.maximum(signal[(slice(None), *box)], 1 / 170) * mask
        canvas[:, top : top + mask.shape[0], left : left + mask.shape[1]] = inside
        crops.append(_resize(canvas, size))
        which.append(i)
    if not crops:
        return np.zeros((0, 3, size, size), np.uint8), np.zeros(0, np.int64)
    return np.stack(crops), np.array(which)


def _resize(canvas: np.ndarray, size: int) -> np.ndarray:
    x = torch.from_numpy(canvas)[None]
    y = F.interpolate(x, (size, size), mode="bilinear", antialias=canvas.shape[1] > size, align_corners=False)
    return np.clip(np.rint(y[0].numpy() * 170), 0, 255).astype(np.uint8)


def generated_crops(fields: int, seed: int = 0, side: int = 768) -> tuple[np.ndarray, np.ndarray]:
    """Crops ``(n, 3, 64, 64)`` and types ``(n,)`` of generated cells, in the usual colours."""
    from daskcell.synthetic import synthesize_field

    crops, types = [], []
    for i in range(fields):
        field = synthesize_field((side, side), seed=seed + i)
        c = field.channels.astype(np.float32)
        picture = np.stack([c[0], c[1] + c[3], c[2] + c[3]])
        found, which = cell_crops(signal_above_background(picture, dark=False), field.labels)
        crops.append(found)
        types.append(field.types[which - 1])
    return np.concatenate(crops), np.concatenate(types)
