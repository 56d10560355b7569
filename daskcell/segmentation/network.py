"""Pixels to network tiles, tiles through the network, network outputs to flows.

Pure functions over one block; which tiles a block owns is the caller's (`TileGrid.owned`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from daskcell.geometry import Box
from daskcell.segmentation.core.rescale import resize_part
from daskcell.segmentation.core.tiles import TILE
from daskcell.segmentation.image_params import ImageParams

FLOW_Y, FLOW_X, CELLPROB = 0, 1, 2
"""Planes of a network output."""
GLASS_CELLPROB = -20.0
"""Cell probability (a logit) of tiles that are not computed because they hold no tissue."""
_STRIP = 512
"""Rows of the rescaled image that are blended at a time."""


def needed_box(params: ImageParams, tiles: Sequence[int]) -> Box | None:
    """Image pixels that these tiles are made from; None without tiles."""
    if not tiles:
        return None
    return Box.hull(params.tiles.to_image(params.tiles.box(tile)) for tile in tiles)


def cut_tiles(part: np.ndarray, grown: Box, params: ImageParams, tiles: Sequence[int]) -> np.ndarray:
    """Network inputs: rescaled, zero beyond the image.

    Parameters
    ----------
    part : (C, h, w) float32
        Normalised pixels `grown` of the preprocessed image.
    tiles
        Tiles to cut; `grown` must cover ``needed_box(params, tiles)``.

    Returns
    -------
    (len(tiles), C, 256, 256) float32
    """
    grid = params.tiles
    out = np.zeros((len(tiles), part.shape[0], TILE, TILE), np.float32)
    for n, tile in enumerate(tiles):
        box = grid.box(tile)
        inside = box.clip(grid.scaled)
        out[(n, slice(None), *inside.within(box))] = resize_part(part, grown, grid.image, grid.scaled, inside)
    return out


def tiles_at_once(network: Any) -> int:
    """How many tiles a network is best given: on a CPU, one tile's activations stay in the cache."""
    import torch

    return 1 if torch.device(network.device).type == "cpu" else 8


def run_network(network: Any, inputs: np.ndarray, batch_size: int) -> np.ndarray:
    """One batch of tiles through the network.

    Convolutions may choose another algorithm, and with it other last bits, for another batch size: a short
    batch is filled up with zeros, so a tile's output does not depend on how many tiles its block has.

    Parameters
    ----------
    network : torch.nn.Module
        With ``.device`` and ``.dtype``; returns flows and cell probability ``(N, 3, 256, 256)`` first.
    inputs : (N, C, 256, 256) float32
        At most `batch_size` tiles.

    Returns
    -------
    (N, 3, 256, 256) float32
    """
    import torch

    batch = torch.zeros(batch_size, *inputs.shape[1:])
    batch[: len(inputs)] = torch.from_numpy(inputs)
    network.eval()
    with torch.no_grad():
        result = network(batch.to(network.device, dtype=network.dtype))[0]
    return result[: len(inputs), :3].detach().to("cpu", torch.float32).numpy()


def blend(outputs: Mapping[int, np.ndarray], params: ImageParams, box: Box) -> np.ndarray:
    """Network output over `box` of the image: tapered tiles summed in the grid's order, then rescaled back.

    The order of the sum is the grid's, not the blocks', so every block gets the same bits. It is the
    arithmetic of `cellpose.transforms.average_tiles`: products in float64, sums in float32. Worked off strip
    by strip, as small cells make the rescaled image many times larger than the image.

    Parameters
    ----------
    outputs : mapping of tile to (3, 256, 256) float32
        Must hold all tiles that touch `box`, but for those the tissue mask leaves out.

    Returns
    -------
    (3, h, w) float32 : flow along y, flow along x, cell probability
    """
    blended = np.empty((3, *box.shape), np.float32)
    rows = max(64, _STRIP * params.tiles.image[0] // params.tiles.scaled[0])
    for y in range(box.y0, box.y1, rows):
        strip = Box(y, box.x0, min(y + rows, box.y1), box.x1)
        blended[(slice(None), *strip.within(box))] = _blend(outputs, params, strip)
    return blended


def _blend(outputs: Mapping[int, np.ndarray], params: ImageParams, box: Box) -> np.ndarray:
    grid = params.tiles
    scaled = grid.to_scaled(box)
    total = np.zeros((3, *scaled.shape), np.float32)
    weight = np.zeros(scaled.shape)
    mask = taper()
    for tile in grid.touching(scaled):
        tile_box = grid.box(tile)
        shared = tile_box & scaled
        there, here = shared.within(scaled), shared.within(tile_box)
        weight[there] += mask[here]
        if tile in outputs:
            total[(slice(None), *there)] += outputs[tile][(slice(None), *here)] * mask[here]
        else:
            total[(CELLPROB, *there)] += GLASS_CELLPROB * mask[here]
    total /= weight
    return resize_part(total, scaled, grid.scaled, grid.image, box)


@lru_cache
def taper() -> np.ndarray:
    """Weight of a tile's pixels, falling off towards its border (`cellpose.transforms._taper_mask`)."""
    distance = np.abs(np.arange(TILE) - (TILE - 1) / 2)
    slope = 1 / (1 + np.exp((distance - (TILE / 2 - 20)) / 7.5))
    return slope * slope[:, np.newaxis]
