"""Cells coloured by cluster over the image: colours, painting, and the legend.

    image, stretched  ──>  cells tinted in the colour of their cluster  ──>  cells outlined in full colour

The tint keeps the brightness of the image, so that a cell shows its texture as well as its cluster. `paint`
is the pure function; `overlay` applies it to arrays, `write_overlay` and `write_cluster_labels` from disk to
disk.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import InputError
from daskcell.images.arrays import as_image, as_labels, as_values

if TYPE_CHECKING:
    import dask.array as da

    ArrayLike = np.ndarray | da.Array

OPACITY = 0.5
STRETCH = (0.5, 99.8)
MAX_CLUSTERS = 65534
"""As many as a label image of 16 bits has values for."""
_BRIGHT = 200  # of 255: a colour image that reaches it is shown as it is
CLUSTER_COLORS = np.array(
    [
        (0, 150, 255),
        (255, 150, 0),
        (0, 200, 80),
        (235, 50, 50),
        (250, 235, 50),
        (90, 60, 255),
        (105, 240, 240),
        (180, 90, 120),
        (195, 0, 150),
        (180, 240, 165),
        (210, 180, 255),
        (225, 0, 225),
        (0, 255, 210),
        (45, 120, 30),
        (180, 240, 90),
        (240, 75, 105),
        (240, 225, 135),
        (75, 90, 195),
        (225, 105, 180),
        (90, 195, 150),
        (195, 105, 210),
        (240, 105, 15),
        (255, 150, 150),
        (240, 150, 75),
    ],
    dtype=np.uint8,
)
"""Colours of the first clusters, visible on black and on white. Each is as far as possible from those before
it, also with red-green colour blindness (greedy choice in CIELAB; vision model of Machado et al. 2009)."""


def overlay(
    image: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    *,
    opacity: float = OPACITY,
    outline: int = 1,
    palette: np.ndarray | None = None,
    axes: str | None = None,
) -> ArrayLike:
    """Colour cells by cluster over the image.

    Parameters
    ----------
    image : (C, Y, X) or (Y, X) numpy or Dask array
        Three channels are shown as red, green and blue, one as grey, others in the colours of
        `features.crops.three_channels`. A uint8 image of three channels with bright pixels is shown as it is;
        any other is stretched, each channel between two percentiles of the whole image.
    labels : (Y, X) numpy or Dask array of whole numbers
        0 is background.
    clusters : (n,) array of whole numbers
        Cluster of label 1, 2, ..., as from `ClusterModel.predict`; cells of cluster -1 are not coloured.
    opacity : float
        Of the tint, from 0 (outlines only) to 1.
    outline : int
        Width in pixels of the line inside each cell's border; 0: none.
    palette : (k, 3) array of whole numbers from 0 to 255, optional
        Colour of each cluster (red, green, blue); None: `colors`.
    axes : str, optional
        Order of the axes of `image`, such as ``"YXC"``; None: inferred from the shape of the labels.

    Returns
    -------
    (Y, X, 3) uint8
        Dask array if `image` or `labels` is one, else numpy.

    Raises
    ------
    InputError
        The shapes do not fit, `labels` is not a label image or has labels beyond the last of `clusters`, or
        an option is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from daskcell import overlay
    >>> image = np.zeros((1, 6, 8), np.uint8)
    >>> labels = np.zeros((6, 8), np.uint32)
    >>> labels[1:5, 1:4], labels[1:5, 5:8] = 1, 2
    >>> rgb = overlay(image, labels, clusters=[0, -1])
    >>> rgb.shape
    (6, 8, 3)
    >>> rgb[1, 1].tolist(), rgb[1, 5].tolist()  # the outline of cluster 0; a cell of no cluster
    ([0, 150, 255], [0, 0, 0])
    """
    import dask.array as da

    from daskcell.features.crops import sample_boxes

    cells = as_labels(labels)
    channels = as_image(image, axes=axes, like=cells.shape).data
    lazy = isinstance(channels, da.Array) or isinstance(cells, da.Array)
    channels, cells = da.asarray(channels), da.asarray(cells)
    if channels.shape[1:] != cells.shape:
        raise InputError(
            "image must be (C, Y, X) with the Y and X of the labels, but the shapes are "
            f"{channels.shape} and {cells.shape}."
        )
    clusters = np.asarray(as_values(clusters, "clusters"))
    if clusters.ndim != 1 or clusters.dtype.kind not in "iu":
        raise InputError(
            f"clusters must be one whole number per cell, not {clusters.dtype} {clusters.shape}."
        )
    largest = int(clusters.max(initial=0))
    if largest >= MAX_CLUSTERS:
        raise InputError(
            f"There is a cluster {largest}, but at most {MAX_CLUSTERS} can be shown. Please renumber the "
            "clusters, as with np.unique(clusters, return_inverse=True)[1]."
        )
    lookup = cluster_values(clusters)
    palette = colors(largest + 1) if palette is None else _checked_palette(palette, int(lookup.max()))
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity must be from 0 to 1, not {opacity!r}.")
    if outline < 0:
        raise InputError(f"outline must be a number of pixels from 0, not {outline!r}.")
    boxes, step = sample_boxes(cells.shape)
    samples = [np.asarray(channels[(slice(None), *box.slices)][:, ::step, ::step]) for box in boxes]
    low, high = stretch_limits(samples, channels.dtype)

    def block(pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        rgb = as_rgb(pixels, low, high)
        painted = paint(rgb, numbers[0], lookup, palette, opacity=opacity, outline=outline)
        inner = slice(outline, -outline or None)
        return np.moveaxis(painted[inner, inner], -1, 0)

    if min(min(sizes) for sizes in cells.chunks) < outline:
        cells = cells.rechunk(512)  # a halo has to come from the next block alone
    painted = da.map_overlap(
        block,
        channels.rechunk((-1, *cells.chunks)),
        cells[None],
        depth={0: 0, 1: outline, 2: outline},
        boundary="nearest",
        trim=False,
        align_arrays=False,
        dtype=np.uint8,
        chunks=((3,), *cells.chunks),
        meta=np.zeros((0, 0, 0), np.uint8),
    )
    result = da.moveaxis(painted, 0, -1)
    return result if lazy else result.compute()


def _checked_palette(palette: Any, count: int) -> np.ndarray:
    values = np.asarray(as_values(palette, "palette"))
    good = values.ndim == 2 and values.shape[1] == 3 and len(values) >= count and values.dtype.kind in "iu"
    if not good or (values.size and not (values.min() >= 0 and values.max() <= 255)):
        raise InputError(
            f"palette must be (k, 3) whole numbers from 0 to 255, a colour for each of {count} clusters, not "
            f"{values.dtype} {values.shape}."
        )
    return values.astype(np.uint8)


def cluster_values(clusters: np.ndarray) -> np.ndarray:
    """Value in the label image of clusters for label 0, 1, ...: cluster + 1, or 0 for none."""
    return np.concatenate([[0], np.maximum(np.asarray(clusters, np.int64), -1) + 1])


def paint(
    rgb: np.ndarray,
    labels: np.ndarray,
    lookup: np.ndarray,
    palette: np.ndarray,
    *,
    opacity: float = OPACITY,
    outline: int = 1,
) -> np.ndarray:
    """Colour the cells of one block.

    Parameters
    ----------
    rgb : (h, w, 3) float
        From 0 to 1.
    labels : (h, w) array of whole numbers
        Including a margin of `outline` pixels, since borders are found by comparing neighbours.
    lookup : (n + 1,) array
        Cluster + 1 of every label; 0: not coloured. See `cluster_values`.
    palette : (k, 3) uint8

    Returns
    -------
    (h, w, 3) uint8
    """
    if labels.dtype.kind == "i" and labels.min(initial=0) < 0:
        raise InputError(
            f"There is a label {labels.min()}, below 0. Please give 0 to the background, as with "
            "np.maximum(labels, 0)."
        )
    if labels.size and int(labels.max()) >= len(lookup):
        raise InputError(
            f"There is a cell {int(labels.max())}, but clusters of {len(lookup) - 1} cells only. "
            "Please give a cluster for each label, or number the labels anew, as with "
            "skimage.segmentation.relabel_sequential(labels)[0]."
        )
    value = lookup[labels]
    table = np.concatenate([np.zeros((1, 3), np.uint8), palette]).astype(np.float32) / 255
    color = table[value]
    light = (rgb.max(axis=-1) + rgb @ np.array([0.299, 0.587, 0.114], np.float32)) / 2
    light = light[..., None]
    # Inside cells the image keeps half of its colour, so that stains can still be told apart. Dark texture
    # stays dark, but never so dark that the colour of the cluster is lost.
    tinted = (1 - opacity) * (rgb + light) / 2 + opacity * color * (0.5 + 0.5 * light)
    out = np.where((value > 0)[..., None], tinted, rgb)
    edge = borders(labels, outline) & (value > 0)
    out[edge] = color[edge]
    return np.round(np.clip(out, 0, 1) * 255).astype(np.uint8)


def borders(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels within `width` pixels of another label along an axis: boolean, of the shape of `labels`."""
    edge = np.zeros(labels.shape, bool)
    for step in range(1, width + 1):
        for axis in (0, 1):
            near, far = [slice(None)] * 2, [slice(None)] * 2
            near[axis], far[axis] = slice(None, -step), slice(step, None)
            differs = labels[tuple(near)] != labels[tuple(far)]
            edge[tuple(near)] |= differs
            edge[tuple(far)] |= differs
    return edge


def as_rgb(block: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Channels ``(C, h, w)`` as colours ``(h, w, 3)`` from 0 to 1, which are `low` and `high` (C,)."""
    from daskcell.features.crops import three_channels

    low, high = (np.asarray(values, np.float32)[:, None, None] for values in (low, high))
    scaled = np.clip((block.astype(np.float32) - low) / np.maximum(high - low, np.float32(1e-12)), 0, 1)
    scaled = np.nan_to_num(scaled)
    if len(scaled) > 7:
        scaled = scaled.mean(axis=0, keepdims=True)
    return np.moveaxis(three_channels(scaled), 0, -1)


def stretch_limits(samples: Sequence[np.ndarray], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Values ``(C,)`` that become black and white in each channel, from samples ``(C, h, w)``."""
    count = len(samples[0]) if samples else 1
    values = np.concatenate([sample.reshape(count, -1) for sample in samples] or [np.zeros((1, 1))], axis=1)
    values = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = np.percentile(values, STRETCH, axis=1)
    if dtype == np.uint8 and count == 3 and high.max() >= _BRIGHT:
        return np.zeros(3), np.full(3, 255.0)
    return low, np.where(high > low, high, low + 1)


# -- what the colours mean ----------------------------------------------------------------------------
def colors(k: int) -> np.ndarray:
    """Colours of `k` clusters, ``(k, 3)`` uint8; those of the first clusters do not depend on `k`."""
    more = [
        # Steps of the golden angle never repeat a hue; saturation and brightness vary as well.
        colorsys.hsv_to_rgb(
            (0.1 + i * 0.6180339887) % 1, (0.95, 0.6, 0.8)[i % 3], (1.0, 0.95, 0.7)[i // 3 % 3]
        )
        for i in range(len(CLUSTER_COLORS), k)
    ]
    extra = np.round(np.array(more).reshape(-1, 3) * 255).astype(np.uint8)
    return np.concatenate([CLUSTER_COLORS, extra])[:k]


def titled(names: Sequence[str | None] | None, k: int) -> list[tuple[int, str]]:
    """Number and name of each cluster that is shown; those with the name None are shown as another."""
    if names is None:
        names = [f"cluster {i}" for i in range(k)]
    return [(i, name) for i, name in enumerate(names) if name is not None]


def add_legend(
    rgb: np.ndarray,
    palette: np.ndarray,
    counts: np.ndarray,
    names: Sequence[str | None] | None = None,
) -> np.ndarray:
    """Add a panel with the colour, name and number of cells of every cluster to the right of an image.

    Parameters
    ----------
    rgb : (Y, X, 3) uint8
    palette : (k, 3) uint8
    counts : (k,) array of whole numbers
        Cells of each cluster.
    names : sequence, optional
        Name of each cluster; those with the name None are left out. None: their numbers.

    Returns
    -------
    (Y, X + panel, 3) uint8
        With as many rows of the legend as fit; an image too low for three is extended.
    """
    from PIL import Image, ImageDraw, ImageFont

    height = rgb.shape[0]
    text = int(np.clip(height / 45, 13, 64))
    row = int(1.7 * text)
    titles = titled(names, len(palette))
    k = len(titles)
    wanted = (k + 1) * row
    if height < wanted:
        text = max(11, int(height / (k + 1) / 1.7))
        row = int(1.7 * text)
    height = max(height, min(wanted, (k + 1) * row) if k <= 30 else 3 * row)
    font = ImageFont.load_default(text)
    lines = [f"{title}: {int(counts[i]):,}" for i, title in titles]
    room = max(1, height // row - 1)
    cut = len(lines) > room
    if cut:
        lines = [*lines[: room - 1], f"and {k - room + 1} more"]
    width = int(max([font.getlength(line) for line in lines] or [0])) + 3 * row
    panel = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(panel)
    for i, line in enumerate(lines):
        y = row // 2 + i * row
        if not cut or i < room - 1:
            color = tuple(palette[titles[i][0]].tolist())
            draw.rectangle((row // 2, y + 2, row // 2 + text, y + 2 + text), fill=color)
        draw.text((row // 2 + int(1.5 * text), y), line, fill=(235, 235, 235), font=font)
    out = np.zeros((height, rgb.shape[1] + width, 3), np.uint8)
    out[: rgb.shape[0], : rgb.shape[1]] = rgb
    out[:, rgb.shape[1] :] = np.asarray(panel)
    return out
