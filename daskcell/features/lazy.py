"""The Python API over arrays: `measure` and `embed`, numpy or Dask in, one row per cell out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from daskcell.config import FeatureSettings
from daskcell.errors import InputError
from daskcell.features.cell_index import (
    ReadPlan,
    block_records,
    merge_records,
    plan_reads,
    refuse_far_labels,
)
from daskcell.features.crops import BackgroundSample, background_sample, sample_boxes
from daskcell.features.embedders import Embedder, Network, make_embedder, make_tasks
from daskcell.features.encoders import Encoder, as_encoder, encoder_spec, load
from daskcell.features.feature_maps import as_feature_maps
from daskcell.features.measurements import KINDS, Kind, measure_block, measurement_columns, to_table
from daskcell.features.textures import Greys, fit_greys, grey_sample
from daskcell.geometry import Grid
from daskcell.images.arrays import Given, as_image, as_labels

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

    ArrayLike = np.ndarray | da.Array

_DEFAULT = FeatureSettings()
_FULL_JOB = 512  # cells that share a job, so that the network's batches are full


def measure(
    labels: ArrayLike,
    image: ArrayLike | None = None,
    pixel_size: tuple[float, float] | float | None = None,
    channels: Sequence[str] | None = None,
    kinds: Collection[Kind] = KINDS,
    *,
    axes: str | None = None,
) -> pd.DataFrame:
    """Where every cell is, its shape, its brightness and its texture.

    Parameters
    ----------
    labels : (Y, X) numpy or Dask array of whole numbers
        0 is background. Computed once and kept in memory, 4 bytes a pixel.
    image : `Image`, or (C, Y, X) or (Y, X) numpy or Dask array, optional
        A study measures the pixels as they were before preprocessing.
    pixel_size : (y, x) or one number, in micrometres
        Adds columns in micrometres (``_um``, ``_um2``). None: what an `Image` says.
    channels : sequence of str
        Channel names that the columns of brightness and texture end in; None: those of the image (`Image`,
        xarray), else 0, 1, 2, ...
    kinds : collection of {"shape", "intensity", "texture"}
        What to measure besides place and area. For textures the image is looked at twice.
    axes : str, optional
        Order of the axes of `image`, such as ``"YXC"``; None: told by the shape of the labels.

    Returns
    -------
    pandas.DataFrame
        Row i is label i + 1, with the columns ``label``, those of `measurements.SHAPE_COLUMNS` (named as in
        scikit-image; ``touches_edge`` marks cells at the image's border) and, for every channel,
        ``intensity_mean``, ``_std``, ``_min`` and ``_max`` and those of
        `textures.TEXTURE_COLUMNS`. A label no pixel has gives area 0 and missing numbers; labels
        that go far beyond their number (such as 5 and 2 200 000 000) are refused.

    Raises
    ------
    InputError
        The shapes of labels and image differ, or labels are not whole numbers.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.zeros((4, 6), np.uint32)
    >>> labels[1:3, 1:5] = 1
    >>> measure(labels)[["label", "centroid-0", "centroid-1", "area"]].values.tolist()
    [[1.0, 1.5, 2.5, 8.0]]
    """
    if pixel_size is None:  # an `Image` says
        pixel_size = getattr(image, "pixel_size", None)
    pixels, given = _arrays(labels, image, axes)
    picture = None if given is None else given.data
    names: tuple[str, ...] = ()
    if given is not None and picture is not None:
        known = given.channels if channels is None else channels
        names = tuple(str(i) for i in range(picture.shape[0])) if known is None else tuple(known)
        if len(names) != picture.shape[0]:
            raise InputError(
                f"channels has {len(names)} names, but the image has {picture.shape[0]} channels."
            )
    records, grid = _find_cells(pixels)
    greys = None
    if picture is None:
        kinds = set(kinds) - {"intensity", "texture"}
    elif "texture" in kinds:
        greys = fit_greys(_sampled(_grey_task, pixels, picture))
    jobs, ids = [], [np.zeros(0, np.int64)]
    for reads in plan_reads(records, grid).values():
        for read in reads:
            jobs.append(_job(_measure_task, pixels, picture, [read], pixels.shape, greys, kinds))
            ids.append(read.records["label"])
    columns = measurement_columns(names, kinds)
    values = np.concatenate([np.zeros((0, len(columns))), *_compute(jobs)])
    return to_table(np.concatenate(ids), values, columns, pixel_size)


def embed(
    image: ArrayLike,
    labels: ArrayLike,
    encoder: Any = _DEFAULT.encoder,
    *,
    layer: Literal["output", "pool"] = _DEFAULT.layer,
    pooling: Literal["crop", "mask"] = _DEFAULT.pooling,
    scale: float | Literal["auto"] = _DEFAULT.scale,
    size: int | None = _DEFAULT.size,
    margin: float = _DEFAULT.margin,
    window: int | None = _DEFAULT.window,
    mask: bool = _DEFAULT.mask,
    channels: Sequence[int] | None = _DEFAULT.channels,
    limits: tuple[float, float] | None = None,
    batch_size: int = _DEFAULT.batch_size,
    device: str = "cpu",
    precision: Literal["float32", "bfloat16"] = _DEFAULT.precision,
    axes: str | None = None,
) -> np.ndarray:
    """A network's vector for every cell.

    Parameters
    ----------
    image : (C, Y, X) or (Y, X) numpy or Dask array
    labels : (Y, X) numpy or Dask array of whole numbers
        Computed once and kept in memory, 4 bytes a pixel.
    encoder : str, path or callable
        ``tiny`` (embedded), any torchvision classification model (``resnet152``), ``timm:NAME``, a
        TorchScript or torch.export file, a torch module, or a function from crops, float32 numpy arrays
        ``(n, 3, size, size)``, to ``(n, d)``; n is always `batch_size`, the last batch filled up with zeros.
    layer : {"output", "pool"}
        The network's outputs (1000 for ImageNet's), or the vector before its last layer (2048 for resnet152).
    pooling : {"crop", "mask"}
        ``crop``: every cell is cropped, resized and encoded by itself. ``mask``: the network runs once over
        the picture, and the maps of its stages are pooled over every cell, its core and its rim (mean and
        deviation, see `pooling.pool_cells`); for ``tiny``, torchvision's ResNets, and modules with a method
        ``stages(x)``.
    scale : float or "auto"
        Network pixels per pixel of the image, for ``mask``; "auto": the image's median cell is shown 48
        pixels wide to ``tiny``, and 32 to others.
    size : int
        Side of a crop in pixels; None: the encoder's own.
    margin : float
        Room around a cell, as a share of its larger side.
    window : int
        Side in pixels of the square around every cell, in place of `margin`: keeps all cells at one scale.
    mask : bool
        Blank out everything that is not the cell (``crop``) or no cell (``mask``), with the colour of the
        background.
    channels : sequence of int
        Channels to take; None: all. See `crops.three_channels` for how they become three.
    limits : (low, high)
        Values that become 0 and 1; None: by the image's type, see `crops.fit_framing`.
    batch_size : int
        Crops per network call; results depend on it in the last bit.
    device : str
        ``cpu``, or ``cuda`` where there is one.
    precision : {"float32", "bfloat16"}
        What the network computes in.
    axes : str, optional
        As for `measure`.

    Returns
    -------
    (n, d) float32 numpy array
        Row i is label i + 1; the same in every bit for any chunks. A label no pixel has gives a row of NaN.

    Raises
    ------
    InputError
        The arrays do not fit together.
    WeightsError
        The encoder's weights are not on this machine (before anything is computed).
    """
    network: Network
    if isinstance(encoder, str | Path):  # a name travels better than a network, where tasks run elsewhere
        network = encoder_spec(
            encoder, layer=layer, size=size, batch_size=batch_size, device=device, precision=precision,
            pooling=pooling,
        )  # fmt: skip
    elif pooling == "mask":
        network = as_feature_maps(encoder, batch_size=batch_size, device=device, precision=precision)
    else:
        network = as_encoder(encoder, size=size, batch_size=batch_size, device=device, precision=precision)
    pixels, given = _arrays(labels, image, axes)
    if given is None:
        raise InputError("Cells are described by the pixels of an image, which was not given.")
    picture = given.data
    records, grid = _find_cells(pixels)
    side = None
    if pooling == "crop":
        side = (network if isinstance(network, Encoder) else load(network)).size  # type: ignore[arg-type]
    embedder = make_embedder(
        network,
        _sampled(_sample_task, pixels, picture),
        records,
        pixels.shape,
        size=side,
        pooling=pooling,
        scale=scale,
        margin=margin,
        window=window,
        mask=mask,
        channels=channels,
        limits=limits,
    )
    tasks = make_tasks(embedder.plan(records, grid), _FULL_JOB)
    found = _compute([_job(_embed_task, pixels, picture, task.reads, embedder) for task in tasks])
    n = int(records["label"].max()) if len(records) else 0
    out = np.full((n, found[0].shape[1] if found else embedder.width), np.nan, np.float32)
    for task, vectors in zip(tasks, found, strict=True):
        out[np.concatenate([read.records["label"] for read in task.reads]) - 1] = vectors
    return out


Pixels = Sequence[tuple[np.ndarray, np.ndarray | None]]
"""Labels and image of each of a job's reads."""


def _measure_task(
    pixels: Pixels,
    reads: Sequence[ReadPlan],
    shape: tuple[int, int],
    greys: Greys | None,
    kinds: Collection[str],
) -> np.ndarray:
    ((labels, image),) = pixels
    return measure_block(labels, image, reads[0].box, reads[0].records, shape, greys, kinds)


def _sample_task(pixels: Pixels, reads: Sequence[ReadPlan], step: int) -> list[BackgroundSample]:
    return [background_sample(image, labels, step) for labels, image in pixels if image is not None]


def _grey_task(pixels: Pixels, reads: Sequence[ReadPlan], step: int) -> list[np.ndarray]:
    return [grey_sample(image, labels, step) for labels, image in pixels if image is not None]


def _embed_task(pixels: Pixels, reads: Sequence[ReadPlan], embedder: Embedder) -> np.ndarray:
    pieces = (
        (read, labels, image)
        for read, (labels, image) in zip(reads, pixels, strict=True)
        if image is not None
    )
    return np.concatenate(list(embedder.stream(pieces)))


_NONE = merge_records([])


def _arrays(labels: Any, image: Any, axes: str | None) -> tuple[Any, Given | None]:
    """Both as Dask arrays that fit together, labels in memory."""
    import dask.array as da

    labels = da.asarray(as_labels(labels))
    picture = None
    if image is not None:
        picture = as_image(image, axes=axes, like=labels.shape)
        if picture.data.shape[1:] != labels.shape:
            raise InputError(
                f"image must be (C, Y, X) with the Y and X of the labels, {labels.shape}, but has the shape "
                f"{picture.data.shape}."
            )
        picture = replace(picture, data=da.asarray(picture.data))
    # Every cell is looked at twice: where it is, then what it is. Labels may have cost hours of network.
    return labels.persist(), picture


def _find_cells(labels: da.Array) -> tuple[np.ndarray, Grid]:
    """Records of all cells, and the grid of the chunks."""
    grid = Grid.from_chunks(labels.chunks)
    cores = [grid.core(index) for index in grid]
    jobs = [_job(_records_task, labels, None, [ReadPlan(core, _NONE)]) for core in cores if not core.is_empty]
    records = merge_records(_compute(jobs))
    refuse_far_labels(records)
    return records, grid


def _records_task(pixels: Pixels, reads: Sequence[ReadPlan]) -> np.ndarray:
    return block_records(pixels[0][0], (reads[0].box.y0, reads[0].box.x0))


def _sampled(function: Callable[..., list[Any]], labels: da.Array, image: da.Array) -> list[Any]:
    """What `function` finds in each of the sampled boxes of the image."""
    boxes, step = sample_boxes(labels.shape)
    jobs = [_job(function, labels, image, [ReadPlan(box, _NONE)], step) for box in boxes]
    return [sample for samples in _compute(jobs) for sample in samples]


def _job(
    function: Callable[..., Any],
    labels: da.Array,
    image: da.Array | None,
    reads: Sequence[ReadPlan],
    *args: Any,
) -> Any:
    """``function(pixels, reads, *args)`` on the pixels of the reads, as a delayed value."""
    import dask

    def piece(array: da.Array, read: ReadPlan) -> Any:
        cut = array[(..., *read.box.slices)]
        # One chunk, so that Dask hands over the array and does not copy the graph (delayed(array) does).
        return cut.rechunk(cut.shape).to_delayed().item()

    pixels = [(piece(labels, read), None if image is None else piece(image, read)) for read in reads]
    # The reads as one value: Dask need not look into them for values to wait for.
    return dask.delayed(function, pure=False)(pixels, dask.delayed(tuple(reads), traverse=False), *args)


def _compute(jobs: list[Any]) -> list[Any]:
    import dask

    return list(dask.compute(*jobs))
