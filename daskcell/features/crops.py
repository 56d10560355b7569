"""One square crop of each cell, as a network takes it.

    cell's box -> square with margin -> brightness to 0..1 -> neighbours blanked -> three channels -> resized

Pure: blocks of pixels in, crops out. Whatever is global - the brightness that becomes 0 and 1, the colour of
the background - is measured once over the whole image (`background_sample`, `fit_framing`) and handed in,
and every crop is made from its own pixels alone: so crops are the same in every bit wherever the blocks are
cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from daskcell.errors import InputError
from daskcell.features.cell_index import crop_boxes
from daskcell.geometry import Box

if TYPE_CHECKING:
    import torch

_TILE = 256
_TILES = 256
_SAMPLES = 1 << 20
_COLORS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], dtype=np.float32
).T
"""Inputs (red, green, blue) that channels 1 to 7 go to: red, green, blue, cyan, magenta, yellow, grey."""


@dataclass(frozen=True)
class Framing:
    """How cells are cropped from one image; all of it the same for every block.

    Attributes
    ----------
    size : int
        Side of a crop in pixels.
    low, high : tuple of float
        Value that becomes 0 and 1, for each channel of the image; values beyond are cut off.
    background : tuple of float
        Value from 0 to 1, for each channel, that blanks out neighbours and what lies beyond the image.
    margin : float
        Room around the cell, as a share of its larger side.
    window : int or None
        Side in pixels of the square around every cell, in place of the margin: keeps cells at one scale.
    mask : bool
        Blank out everything that is not the cell.
    channels : tuple of int or None
        Channels of the image to take, in this order; None: all.
    """

    size: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    background: tuple[float, ...]
    margin: float = 0.1
    window: int | None = None
    mask: bool = True
    channels: tuple[int, ...] | None = None


def crop_batches(
    image: np.ndarray, labels: np.ndarray, box: Box, records: np.ndarray, framing: Framing, batch: int = 64
) -> Iterator[np.ndarray]:
    """Crops of cells that one block of pixels holds whole, at most `batch` at a time.

    Parameters
    ----------
    image : (C, h, w) array
    labels : (h, w) array of integers
    box : Box
        Where the block lies in the whole image. It must reach as far around the cells as their crops do, or
        to the image's border: what is outside is taken to be background.
    records : (n,) array of `cell_index.RECORD`

    Yields
    ------
    (m, 3, size, size) float32
        Values from 0 to 1, cells in the order of `records`.
    """
    crops = (resize(crop, framing.size) for crop in cut_cells(image, labels, box, records, framing))
    while some := list(islice(crops, batch)):
        yield np.stack(some)


def cut_cells(
    image: np.ndarray, labels: np.ndarray, box: Box, records: np.ndarray, framing: Framing
) -> Iterator[np.ndarray]:
    """As `crop_batches`, but one by one, ``(3, side, side)`` with the image's own pixels, not yet resized."""
    squares = crop_boxes(records, framing.margin, framing.window)
    for square, label in zip(squares.tolist(), records["label"].tolist(), strict=True):
        yield crop_cell(image, labels, box, Box(*square), label, framing)


def crop_cell(
    image: np.ndarray, labels: np.ndarray, box: Box, square: Box, label: int, framing: Framing
) -> np.ndarray:
    """The square of the image as ``(3, *square.shape)`` float32."""
    there = square & box
    background = np.asarray(framing.background, np.float32)[:, None, None]
    pixels = brightness(image[(slice(None), *there.within(box))], framing)
    if framing.mask:
        pixels = np.where((labels[there.within(box)] != label)[None], background, pixels)
    canvas = np.empty((len(pixels), *square.shape), np.float32)
    canvas[:] = background
    canvas[(slice(None), *there.within(square))] = pixels
    return three_channels(canvas)


def brightness(pixels: np.ndarray, framing: Framing) -> np.ndarray:
    """The chosen channels of ``(C, h, w)``, from 0 to 1 as float32; where there is no number, background."""
    picked = pixels if framing.channels is None else pixels[list(framing.channels)]
    low, high, background = (
        np.asarray(values, np.float32)[:, None, None]
        for values in (framing.low, framing.high, framing.background)
    )
    scaled = (picked.astype(np.float32) - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
    return np.where(np.isnan(scaled), background, np.clip(scaled, 0, 1))


def three_channels(crop: np.ndarray) -> np.ndarray:
    """Any number of channels ``(C, h, w)``, from 0 to 1, as the three a network takes.

    One channel is repeated; two get an empty third; three stay. Of four to seven, the further ones are cyan,
    magenta, yellow and grey: each is added to the colours it consists of, and every colour is the mean of
    what was added to it.
    """
    count = len(crop)
    if count == 1:
        return np.repeat(crop, 3, axis=0)
    if count == 2:
        return np.concatenate([crop, np.zeros_like(crop[:1])])
    if count == 3:
        return crop
    if count > _COLORS.shape[1]:
        raise InputError(
            f"An encoder takes at most {_COLORS.shape[1]} channels, not {count}. Choose some with 'channels'."
        )
    weights = _COLORS[:, :count] / _COLORS[:, :count].sum(axis=1, keepdims=True)
    return np.einsum("ic,chw->ihw", weights, crop)


def resize(crop: np.ndarray, size: int) -> np.ndarray:
    """Resize ``(C, s, s)`` to ``(C, size, size)``, bilinear, antialiased when it shrinks."""
    import torch

    if crop.shape[1:] == (size, size):
        return np.ascontiguousarray(crop)
    tensor = torch.from_numpy(np.ascontiguousarray(crop))[None]
    resized = torch.nn.functional.interpolate(
        tensor, (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].numpy()


def resize_together(crops: Sequence[np.ndarray], size: int, device: str) -> torch.Tensor:
    """Crops ``(3, s, s)`` of any sides, resized to ``(n, 3, size, size)`` by products on a device.

    As `resize` to about 1e-6. (torchvision's `roi_align` does not smooth where it shrinks, and would take
    neighbours' pixels along with a cell's.)
    """
    import torch

    longest = max(crop.shape[1] for crop in crops)
    padded = np.zeros((len(crops), 3, longest, longest), np.float32)
    shares = np.zeros((len(crops), 1, size, longest), np.float32)
    for i, crop in enumerate(crops):
        side = crop.shape[1]
        padded[i, :, :side, :side] = crop
        shares[i, 0, :, :side] = _shares(side, size)
    weights = torch.from_numpy(shares).to(device)
    return weights @ torch.from_numpy(padded).to(device) @ weights.transpose(2, 3)


@lru_cache(maxsize=512)
def _shares(side: int, size: int) -> np.ndarray:
    """Shares ``(size, side)`` of the pixels in each resized one: triangles, as wide as the larger pixel."""
    ratio = side / size
    middle = (np.arange(size) + 0.5) * ratio - 0.5
    shares = np.maximum(0, 1 - np.abs(np.arange(side)[None] - middle[:, None]) / max(ratio, 1.0))
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def sample_boxes(shape: tuple[int, int]) -> tuple[list[Box], int]:
    """Where to sample an image of `shape` ``(Y, X)``, and the step in pixels within each box.

    The whole image where it is small; else 256 tiles of 256 pixels, spread evenly. Depends on the shape only.
    """
    down, across = (-(-side // _TILE) for side in shape)
    count = down * across
    numbers = np.unique(np.linspace(0, count - 1, min(count, _TILES)).astype(int))
    boxes = [
        Box(y * _TILE, x * _TILE, (y + 1) * _TILE, (x + 1) * _TILE).clip(shape)
        for y, x in (divmod(int(number), across) for number in numbers)
    ]
    pixels = sum(box.shape[0] * box.shape[1] for box in boxes)
    return boxes, max(1, int(np.ceil(np.sqrt(pixels / _SAMPLES))))


@dataclass(frozen=True)
class BackgroundSample:
    """Of one sampled box: least and largest value per channel, values ``(C, m)`` outside all cells."""

    low: np.ndarray
    high: np.ndarray
    outside: np.ndarray


def background_sample(image: np.ndarray, labels: np.ndarray, step: int) -> BackgroundSample:
    """Sample one box of `sample_boxes`: `image` ``(C, h, w)``, `labels` ``(h, w)``."""
    image, labels = image[:, ::step, ::step], labels[::step, ::step]
    flat = image.reshape(len(image), -1)
    with np.errstate(all="ignore"):
        low, high = np.fmin.reduce(flat, axis=1), np.fmax.reduce(flat, axis=1)
    return BackgroundSample(low, high, image[:, labels == 0])


def fit_framing(
    samples: Sequence[BackgroundSample],
    *,
    size: int,
    margin: float = 0.1,
    window: int | None = None,
    mask: bool = True,
    channels: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
) -> Framing:
    """Crop settings for one image, from samples of all of it.

    Brightness: `limits` where given; bytes are divided by 255, truths stay, numbers with a fraction that lie
    between 0 and 1 too; anything else goes from the channel's least to its largest sampled value. Background:
    the median of the sampled pixels outside all cells, or 0 where there are none.

    Raises
    ------
    InputError
        `channels` names a channel the image does not have, or there are too many channels.
    """
    count = len(samples[0].low) if samples else 1
    chosen = tuple(range(count)) if channels is None else tuple(channels)
    for channel in chosen:
        if not 0 <= channel < count:
            raise InputError(f"channels={list(chosen)} names channel {channel}, but the image has {count}.")
    three_channels(np.zeros((len(chosen), 1, 1), np.float32))  # refuses too many before any work
    lows, highs, background = [], [], []
    for channel in chosen:
        if not samples:
            low, high = 0.0, 1.0
        else:
            low = float(np.fmin.reduce([sample.low[channel] for sample in samples]))
            high = float(np.fmax.reduce([sample.high[channel] for sample in samples]))
            dtype = samples[0].low.dtype
            if limits is not None:
                low, high = limits
            elif dtype == np.uint8:
                low, high = 0.0, 255.0
            elif dtype.kind == "b" or (dtype.kind == "f" and low >= 0 and high <= 1) or not low < high:
                low, high = 0.0, 1.0
        outside = np.concatenate([sample.outside[channel] for sample in samples] or [np.zeros(0)])
        outside = outside.astype(np.float64)
        outside = outside[np.isfinite(outside)]
        middle = float(np.median(outside)) if len(outside) else low
        lows.append(low)
        highs.append(high)
        background.append(float(np.clip((middle - low) / (high - low), 0, 1)))
    return Framing(
        size=size,
        low=tuple(lows),
        high=tuple(highs),
        background=tuple(background),
        margin=margin,
        window=window,
        mask=mask,
        channels=None if channels is None else chosen,
    )
