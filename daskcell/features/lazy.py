"""The Python API over arrays: `measure` and `embed`, numpy or Dask in, one row per cell out.

Both compute: how many rows there are is known only once the cells are found.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from daskcell.config import ComputeSettings, FeatureSettings
from daskcell.errors import InputError
from daskcell.features import tasks
from daskcell.features.array_tasks import ArrayTasks
from daskcell.features.cell_index import merge_records, plan_reads, refuse_far_labels
from daskcell.features.crops import BackgroundSample, sample_boxes
from daskcell.features.embedders import Network, make_embedder, make_tasks
from daskcell.features.encoders import Encoder, as_encoder, encoder_spec, load
from daskcell.features.feature_maps import as_feature_maps
from daskcell.features.measurements import KINDS, Kind, measurement_columns, to_table
from daskcell.features.textures import fit_greys
from daskcell.images.arrays import NamedArray, as_image, as_labels

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

    ArrayLike = np.ndarray | da.Array

_DEFAULT = FeatureSettings()


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

    Not lazy: the table is computed, with the Dask client or scheduler that is set. At most some blocks of the
    image are in memory at a time.

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
        What to measure besides position and area. For textures the image is read twice: grey levels are
        scaled by percentiles of the whole image first.
    axes : str, optional
        Order of the axes of `image`, such as ``"YXC"``; None: inferred from the shape of the labels.

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
    arrays, given = _arrays(labels, image, axes)
    names: tuple[str, ...] = ()
    if given is None:
        kinds = set(kinds) - {"intensity", "texture"}
    else:
        known = given.channels if channels is None else channels
        count = given.data.shape[0]
        names = tuple(str(i) for i in range(count)) if known is None else tuple(known)
        if len(names) != count:
            raise InputError(f"channels has {len(names)} names, but the image has {count} channels.")
    records = _find_cells(arrays)
    greys = fit_greys([grey for _, grey in _samples(arrays)]) if "texture" in kinds else None
    plans = [read for reads in plan_reads(records, arrays.grid).values() for read in reads]
    calls = [([read.box], ((read,), greys, kinds)) for read in plans]
    if not {"intensity", "texture"} & set(kinds):
        arrays = replace(arrays, image=None)  # no pixel is needed
    columns = measurement_columns(names, kinds)
    values = np.concatenate([np.zeros((0, len(columns))), *arrays.run(tasks.measure, calls)])
    ids = np.concatenate([np.zeros(0, np.int64), *(read.records["label"] for read in plans)])
    return to_table(ids, values, columns, pixel_size)


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
    threads: int = ComputeSettings().threads,
    axes: str | None = None,
) -> np.ndarray:
    """A network's feature vector for every cell.

    Not lazy: the vectors are computed, with the Dask client or scheduler that is set. At most some blocks of
    the image are in memory at a time.

    Parameters
    ----------
    image : `Image`, or (C, Y, X) or (Y, X) numpy or Dask array
    labels : (Y, X) numpy or Dask array of whole numbers
        Computed once and kept in memory, 4 bytes a pixel.
    encoder : str, path or callable
        A name or file as for `load_encoder`, a torch module, or a function from crops, float32 numpy arrays
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
        Number type that the network computes in.
    threads : int
        Threads that the network runs with, whatever torch is set to; results depend on it in the last bit.
        The default is that of a study (``compute.threads``).
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
        There is no such encoder, or its weights are not on this machine (before anything is computed).

    See Also
    --------
    measure : shape, brightness and texture of the same cells.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.zeros((40, 60), np.uint32)
    >>> labels[10:20, 10:25], labels[22:34, 40:52] = 1, 2
    >>> image = np.where(labels > 0, 200, 10).astype(np.uint8)
    >>> embed(image, labels, encoder="tiny").shape
    (2, 96)
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
    arrays, given = _arrays(labels, image, axes)
    if given is None:
        raise InputError("Cells are described by the pixels of an image, which was not given.")
    arrays = replace(arrays, threads=threads)
    records = _find_cells(arrays)
    side = None
    if pooling == "crop":
        side = (network if isinstance(network, Encoder) else load(network)).size  # type: ignore[arg-type]
    embedder = make_embedder(
        network,
        [sample for sample, _ in _samples(arrays)],
        records,
        arrays.labels.shape,
        size=side,
        pooling=pooling,
        scale=scale,
        margin=margin,
        window=window,
        mask=mask,
        channels=channels,
        limits=limits,
    )
    work = make_tasks(embedder.plan(records, arrays.grid), tasks.FULL_TASK)
    calls = [([read.box for read in task.reads], (task.reads, embedder)) for task in work]
    found = arrays.run(tasks.embed, calls, kind="cpu" if device == "cpu" else "network")
    n = int(records["label"].max()) if len(records) else 0
    out = np.full((n, found[0].shape[1] if found else embedder.width), np.nan, np.float32)
    for task, vectors in zip(work, found, strict=True):
        out[np.concatenate([read.records["label"] for read in task.reads]) - 1] = vectors
    return out


def _arrays(labels: Any, image: Any, axes: str | None) -> tuple[ArrayTasks, NamedArray | None]:
    """Both as Dask arrays that fit together, labels in memory; and what the image says of itself."""
    import dask.array as da

    labels = da.asarray(as_labels(labels))
    given = None
    if image is not None:
        given = as_image(image, axes=axes, like=labels.shape)
        if given.data.shape[1:] != labels.shape:
            raise InputError(
                f"image must be (C, Y, X) with the Y and X of the labels, {labels.shape}, but has the shape "
                f"{given.data.shape}."
            )
    # Every cell is looked at twice: where it is, then what it is. Labels may have cost hours of network.
    return ArrayTasks(labels.persist(), None if given is None else da.asarray(given.data)), given


def _find_cells(arrays: ArrayTasks) -> np.ndarray:
    """Records of all cells."""
    cores = [core for core in map(arrays.grid.core, arrays.grid) if not core.is_empty]
    parts = replace(arrays, image=None).run(tasks.block_cells, [([core], (core,)) for core in cores])
    records = merge_records(parts)
    refuse_far_labels(records)
    return records


def _samples(arrays: ArrayTasks) -> list[tuple[BackgroundSample, np.ndarray]]:
    boxes, step = sample_boxes(arrays.labels.shape)
    found = arrays.run(tasks.sample, [([box], ((box,), step)) for box in boxes])
    return [sample for samples in found for sample in samples]
