"""Feature maps pooled over each cell's own pixels: one pass over the image instead of one crop a cell.

    tiles of the global grid ──> network ──> maps of every stage ──> mean and deviation over the cell,
                                                                     its core and its rim

The *core* is the part of a cell that differs more from the background than the cell does on average - its
nucleus, where that is stained - and the *rim* is the rest. Every pixel of the cell counts the value of each
map's pixel that it lies in, so a cell's numbers depend on its pixels and its tiles alone: the same in every
bit for any blocks.
"""

from __future__ import annotations

import numpy as np

from daskcell.features.crops import Framing, brightness, three_channels
from daskcell.features.feature_maps import FeatureMaps
from daskcell.features.tiles import NetworkTiling
from daskcell.geometry import Box

REGIONS = 3
"""Cell, core and rim."""
_CORE = 0.3  # deviations above a cell's mean difference from the background at which its core begins


def natural_scale(records: np.ndarray, cell: float) -> float:
    """Scale at which the median cell has a diameter of `cell` network pixels, at most 4; 1 without cells.

    The median of the cells' pixels, so that small fragments of a poor segmentation carry little weight.
    """
    if not len(records):
        return 1.0
    areas = np.sort(records["area"])
    middle = areas[np.searchsorted(np.cumsum(areas), areas.sum() / 2)]
    return min(4.0, float(cell / np.sqrt(middle * (4 / np.pi))))


def pool_cells(
    image: np.ndarray,
    labels: np.ndarray,
    box: Box,
    records: np.ndarray,
    framing: Framing,
    tiling: NetworkTiling,
    network: FeatureMaps,
) -> np.ndarray:
    """Vectors of cells that one read of `NetworkTiling.plan` holds, with all pixels of their tiles.

    Parameters
    ----------
    image : (C, h, w) array
    labels : (h, w) array of integers
    box : Box
        Where the read lies in the whole image.
    records : (n,) array of `cell_index.RECORD`

    Returns
    -------
    (n, d) float32
        For every stage: mean over cell, core, rim; then the deviations in the same order.
    """
    background = np.asarray(framing.background, np.float32)
    tiles_of = tiling.tiles_of(records)
    members: dict[tuple[int, int], list[int]] = {}
    for i, tiles in enumerate(tiles_of):
        for tile in tiles:
            members.setdefault(tile, []).append(i)
    left = [len(tiles) for tiles in tiles_of]
    open_sums: dict[int, _Sums] = {}
    out = np.zeros((len(records), 2 * REGIONS * network.width), np.float32)
    order = sorted(members)
    for start in range(0, len(order), network.batch_size):
        tiles = order[start : start + network.batch_size]
        tile_images = [
            three_channels(_tile(image, labels, box, framing, tiling, tile, background)) for tile in tiles
        ]
        ground = three_channels(background[:, None, None])[:, 0, 0]
        for tile, maps in zip(tiles, network(tile_images, ground), strict=True):
            for i in members[tile]:
                sums = open_sums.get(i)
                if sums is None:
                    sums = open_sums[i] = _Sums(image, labels, box, records[i], framing, maps)
                sums.add(maps, tiling, tile, whole=len(tiles_of[i]) == 1)
                left[i] -= 1
                if not left[i]:
                    out[i] = open_sums.pop(i).vector()
    return out


def _tile(
    image: np.ndarray,
    labels: np.ndarray,
    box: Box,
    framing: Framing,
    tiling: NetworkTiling,
    tile: tuple[int, int],
    background: np.ndarray,
) -> np.ndarray:
    """A tile as the network sees it, before its channels become three: ``(C, *frame)`` from 0 to 1."""
    cut = tiling.source(tile).within(box)
    pixels = brightness(image[(slice(None), *cut)], framing)
    if framing.mask:
        pixels = np.where((labels[cut] == 0)[None], background[:, None, None], pixels)
    return tiling.resample(pixels, tile, background)


class _Sums:
    """Running sums of one cell, over the tiles seen so far."""

    def __init__(
        self,
        image: np.ndarray,
        labels: np.ndarray,
        box: Box,
        record: np.void,
        framing: Framing,
        maps: list[np.ndarray],
    ):
        own = Box(*(int(record[name]) for name in ("y0", "x0", "y1", "x1")))
        cut = own.within(box)
        cell = labels[cut] == record["label"]
        ground = np.asarray(framing.background, np.float32)[:, None]
        pixels = brightness(image[(slice(None), *cut)], framing)[:, cell]
        differs = np.abs(pixels - ground).sum(axis=0, dtype=np.float64)
        self.regions = cell.astype(np.uint8)
        self.regions[cell] += differs > differs.mean() + _CORE * differs.std()
        self.corner = np.array([own.y0, own.x0])
        self.counts = [np.zeros(2) for _ in maps]
        self.sums = [np.zeros((2, stage.shape[2])) for stage in maps]
        self.squares = [np.zeros((2, stage.shape[2])) for stage in maps]

    def add(self, maps: list[np.ndarray], tiling: NetworkTiling, tile: tuple[int, int], whole: bool) -> None:
        from daskcell.features._pooling import pool_maps

        origin = np.array(tiling.origin(tile))
        core = np.array([index * side for index, side in zip(tile, tiling.core, strict=True)])
        bounds = np.array([*core, *(core + tiling.core)], np.float64)
        if whole:
            bounds = np.array([-np.inf, -np.inf, np.inf, np.inf])
        for i, stage in enumerate(maps):
            stride = tiling.frame[0] // stage.shape[0]
            pool_maps(
                stage, stride, self.regions, self.corner, tiling.scale, origin, bounds,
                self.counts[i], self.sums[i], self.squares[i],
            )  # fmt: skip

    def vector(self) -> np.ndarray:
        return np.concatenate(
            [_moments(*of_stage) for of_stage in zip(self.counts, self.sums, self.squares, strict=True)]
        )


def _moments(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Means of cell, core and rim, then deviations; a part without pixels is taken to be like the cell."""
    n = np.array([counts.sum(), counts[1], counts[0]])
    first = np.stack([sums.sum(axis=0), sums[1], sums[0]])
    second = np.stack([squares.sum(axis=0), squares[1], squares[0]])
    empty = n == 0
    n[empty], first[empty], second[empty] = n[0], first[0], second[0]
    means = first / n[:, None]
    deviations = np.sqrt(np.maximum(second / n[:, None] - means**2, 0))
    return np.concatenate([means.ravel(), deviations.ravel()]).astype(np.float32)
