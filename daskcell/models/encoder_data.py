"""Crops of single cells to train the encoder: one cell each, all else in the background's colour."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from daskcell.models.encoder import SIZE


def cell_crops(
    picture: np.ndarray, labels: np.ndarray, *, size: int = SIZE, margin: float = 0.1, smallest: int = 40
) -> tuple[np.ndarray, np.ndarray]:
    """Every cell of a picture by itself.

    Parameters
    ----------
    picture
        ``(3, Y, X)`` float, 0 to 1.
    labels
        ``(Y, X)`` whole numbers, 0 background.
    size, margin
        Side of the crops, and room around a cell as a share of its larger side.
    smallest
        Cells of fewer pixels, and cells cut by the picture's border, are left out.

    Returns
    -------
    crops : ndarray
        ``(n, 3, size, size)`` uint8.
    which : ndarray
        ``(n,)`` the cells' labels.
    """
    height, width = labels.shape
    outside = picture[:, labels == 0]
    ground = np.median(outside, axis=1) if outside.size else np.zeros(len(picture))
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
        canvas = np.empty((3, side, side), np.float32)
        canvas[:] = ground[:, None, None]
        top, left = (side - mask.shape[0]) // 2, (side - mask.shape[1]) // 2
        inner = canvas[:, top : top + mask.shape[0], left : left + mask.shape[1]]
        inner[:, mask] = picture[(slice(None), *box)][:, mask]
        crops.append(_resize(canvas, size))
        which.append(i)
    if not crops:
        return np.zeros((0, 3, size, size), np.uint8), np.zeros(0, np.int64)
    return np.stack(crops), np.array(which)


def _resize(canvas: np.ndarray, size: int) -> np.ndarray:
    x = torch.from_numpy(canvas)[None]
    y = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return np.clip(np.rint(y[0].numpy() * 255), 0, 255).astype(np.uint8)


def generated_crops(fields: int, seed: int = 0, side: int = 768) -> tuple[np.ndarray, np.ndarray]:
    """Crops ``(n, 3, 64, 64)`` and types ``(n,)`` of generated cells, in the usual colours."""
    from daskcell.synthetic import synthesize_field

    crops, types = [], []
    for i in range(fields):
        field = synthesize_field((side, side), seed=seed + i)
        c = field.channels.astype(np.float32)
        picture = np.stack([c[0], c[1] + c[3], c[2] + c[3]])
        low, high = np.percentile(picture, [1, 99.8], axis=(1, 2), keepdims=True)
        found, which = cell_crops(
            np.clip((picture - low) / (high - low), 0, 1).astype(np.float32), field.labels
        )
        crops.append(found)
        types.append(field.types[which - 1])
    return np.concatenate(crops), np.concatenate(types)
