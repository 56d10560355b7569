"""The Python API over arrays: `measure` and `embed`, numpy or Dask in, one row per cell out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from daskcell.errors import InputError
from daskcell.features.crops import (
    Framing,
    Sample,
    background_sample,
    crop_batches,
    freeze_framing,
    sample_boxes,
)
from daskcell.features.encoders import Encoder, EncoderSpec, as_encoder, encoder_spec, load
from daskcell.features.measurements import measure_block, measurement_columns, to_table
from daskcell.features.objects import Reading, block_records, merge_records, plan_readings
from daskcell.geometry import Grid

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

    ArrayLike = np.ndarray | da.Array


def measure(
    labels: ArrayLike,
    image: ArrayLike | None = None,
    pixel_size: tuple[float, float] | float | None = None,
    channels: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Where every cell is, its shape and its brightness.

    Parameters
    ----------
    labels : (Y, X) numpy or Dask array of whole numbers
        0 is background. Computed once and kept in memory, 4 bytes a pixel.
    image : (C, Y, X) or (Y, X) numpy or Dask array, optional
    pixel_size : (y, x) or one number, in micrometres
        Adds columns in micrometres (``_um``, ``_um2``).
    channels : sequence of str
        Channel names that the columns of brightness end in; None: 0, 1, 2, ...

    Returns
    -------
    pandas.DataFrame
        Row i is label i + 1, with the columns ``label``, those of `measurements.SHAPE_COLUMNS` (named as in
        scikit-image; ``touches_edge`` marks cells at the image's border) and, for every channel,
        ``intensity_mean``, ``_std``, ``_min`` and ``_max``. A label no pixel has gives area 0 and missing
        numbers.

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
    pixels, picture = _arrays(labels, image)
    names: tuple[str, ...] = ()
    if picture is not None:
        names = tuple(str(i) for i in range(picture.shape[0])) if channels is None else tuple(channels)
        if len(names) != picture.shape[0]:
            raise InputError(
                f"channels has {len(names)} names, but the image has {picture.shape[0]} channels."
            )
    _, plans = _plan(pixels, margin=0.0)
    jobs, ids = [], [np.zeros(0, np.int64)]
    for reading in plans:
        jobs.append(_task(_measure_task, pixels, picture, reading, pixels.shape))
        ids.append(reading.records["label"])
    columns = measurement_columns(names)
    values = np.concatenate([np.zeros((0, len(columns))), *_compute(jobs)])
    return to_table(np.concatenate(ids), values, columns, pixel_size)


def embed(
    image: ArrayLike,
    labels: ArrayLike,
    encoder: Any = "tiny",
    *,
    layer: Literal["output", "pool"] = "output",
    size: int | None = None,
    margin: float = 0.1,
    window: int | None = None,
    mask: bool = True,
    channels: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
    batch_size: int = 32,
    device: str = "cpu",
) -> np.ndarray:
    """A network's vector for every cell: cropped, masked, resized, encoded.

    Parameters
    ----------
    image : (C, Y, X) or (Y, X) numpy or Dask array
    labels : (Y, X) numpy or Dask array of whole numbers
        Computed once and kept in memory, 4 bytes a pixel.
    encoder : str, path or callable
        ``tiny`` (embedded), any torchvision classification model (``resnet152``), a TorchScript or
        torch.export file, a torch module, or a function from crops, float32 numpy arrays ``(n, 3, size,
        size)``, to ``(n, d)``; n is always `batch_size`, the last batch filled up with zeros.
    layer : {"output", "pool"}
        The network's outputs (1000 for ImageNet's), or the vector before its last layer (2048 for resnet152).
    size : int
        Side of a crop in pixels; None: the encoder's own.
    margin : float
        Room around a cell, as a share of its larger side.
    window : int
        Side in pixels of the square around every cell, in place of `margin`: keeps all cells at one scale.
    mask : bool
        Blank out everything that is not the cell, with the colour of the background.
    channels : sequence of int
        Channels to take; None: all. See `crops.three_channels` for how they become three.
    limits : (low, high)
        Values that become 0 and 1; None: by the image's type, see `crops.freeze_framing`.
    batch_size : int
        Pictures per network call; results depend on it in the last bit.
    device : str
        ``cpu``, or ``cuda`` where there is one.

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
    network: EncoderSpec | Encoder
    if isinstance(encoder, str | Path):  # a name travels better than a network, where tasks run elsewhere
        network = encoder_spec(encoder, layer=layer, size=size, batch_size=batch_size, device=device)
    else:
        network = as_encoder(encoder, size=size, batch_size=batch_size, device=device)
    pixels, picture = _arrays(labels, image)
    assert picture is not None
    samples: list[Sample] = []
    boxes, step = sample_boxes(pixels.shape)
    samples = _compute([_task(_sample_task, pixels, picture, Reading(box, _NONE), step) for box in boxes])
    framing = freeze_framing(
        samples,
        size=_loaded(network).size,
        margin=margin,
        window=window,
        mask=mask,
        channels=channels,
        limits=limits,
    )
    records, plans = _plan(pixels, margin, window)
    n = int(records["label"].max()) if len(records) else 0
    out = np.full((n, _loaded(network).width), np.nan, np.float32)
    jobs = [_task(_embed_task, pixels, picture, reading, framing, network) for reading in plans]
    for reading, vectors in zip(plans, _compute(jobs), strict=True):
        out[reading.records["label"] - 1] = vectors
    return out


def _measure_task(
    labels: np.ndarray, image: np.ndarray | None, reading: Reading, shape: tuple[int, int]
) -> np.ndarray:
    return measure_block(labels, image, reading.box, reading.records, shape)


def _sample_task(labels: np.ndarray, image: np.ndarray, reading: Reading, step: int) -> Sample:
    return background_sample(image, labels, step)


def _embed_task(
    labels: np.ndarray, image: np.ndarray, reading: Reading, framing: Framing, network: EncoderSpec | Encoder
) -> np.ndarray:
    encoder = _loaded(network)
    crops = crop_batches(image, labels, reading.box, reading.records, framing, encoder.batch_size)
    return np.concatenate(list(encoder.stream(crops)))


def _loaded(network: EncoderSpec | Encoder) -> Encoder:
    return network if isinstance(network, Encoder) else load(network)


_NONE = merge_records([])


def _arrays(labels: Any, image: Any) -> tuple[Any, Any]:
    """Both as Dask arrays that fit together, labels in memory."""
    import dask.array as da

    labels = da.asanyarray(labels)
    if labels.ndim != 2:
        raise InputError(f"labels must have the axes (Y, X), but have the shape {labels.shape}.")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels must be whole numbers, but are {labels.dtype}.")
    if image is not None:
        image = da.asanyarray(image)
        image = image[None] if image.ndim == 2 else image
        if image.ndim != 3 or image.shape[1:] != labels.shape:
            raise InputError(
                f"image must be (C, Y, X) with the Y and X of the labels, {labels.shape}, but has the shape "
                f"{image.shape}."
            )
    # Every cell is looked at twice: where it is, then what it is. Labels may have cost hours of network.
    return labels.persist(), image


def _plan(labels: da.Array, margin: float, window: int | None = None) -> tuple[np.ndarray, list[Reading]]:
    grid = Grid.from_chunks(labels.chunks)
    jobs = [
        _task(_records_task, labels, None, Reading(grid.core(index), _NONE))
        for index in grid
        if not grid.core(index).is_empty
    ]
    records = merge_records(_compute(jobs))
    plans = plan_readings(records, grid, margin, window)
    return records, [reading for number in sorted(plans) for reading in plans[number]]


def _records_task(labels: np.ndarray, image: None, reading: Reading) -> np.ndarray:
    return block_records(labels, (reading.box.y0, reading.box.x0))


def _task(
    function: Callable[..., Any], labels: da.Array, image: da.Array | None, reading: Reading, *args: Any
) -> Any:
    """``function(labels, image, reading, *args)`` on the pixels of a reading, as a delayed value."""
    import dask

    def piece(array: da.Array) -> Any:
        cut = array[(..., *reading.box.slices)]
        # One chunk, so that Dask hands over the array and does not copy the graph (delayed(array) does).
        return cut.rechunk(cut.shape).to_delayed().item()

    return dask.delayed(function, pure=False)(
        piece(labels), None if image is None else piece(image), reading, *args
    )


def _compute(jobs: list[Any]) -> list[Any]:
    import dask

    return list(dask.compute(*jobs))
