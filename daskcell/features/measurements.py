"""Shape, brightness and texture of every cell, with scikit-image's names.

Pure: blocks of pixels and records in, arrays out. The numbers are those of
`skimage.measure.regionprops_table` on the whole image, up to rounding; and the same in every bit wherever the
blocks are cut.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import numpy as np

from daskcell.errors import InputError
from daskcell.features.textures import TEXTURE_COLUMNS, Greys, textures
from daskcell.geometry import Box

if TYPE_CHECKING:
    import pandas as pd

SHAPE_COLUMNS = (
    "centroid-0",
    "centroid-1",
    "bbox-0",
    "bbox-1",
    "bbox-2",
    "bbox-3",
    "area",
    "perimeter",
    "eccentricity",
    "axis_major_length",
    "axis_minor_length",
    "orientation",
    "solidity",
    "extent",
    "equivalent_diameter_area",
    "touches_edge",
)
PLACE_COLUMNS = (*SHAPE_COLUMNS[:7], "touches_edge")
"""Columns of position and area, which every table has."""
INTENSITY_COLUMNS = ("intensity_mean", "intensity_std", "intensity_min", "intensity_max")
_WHOLE = ("bbox-0", "bbox-1", "bbox-2", "bbox-3")
_LENGTHS = ("perimeter", "axis_major_length", "axis_minor_length", "equivalent_diameter_area")


Kind = Literal["shape", "intensity", "texture"]
KINDS: tuple[Kind, ...] = ("shape", "intensity", "texture")
"""Kinds of measurements that can be asked for; position and area are always measured."""


def measurement_columns(channels: tuple[str, ...] = (), kinds: Collection[str] = KINDS) -> list[str]:
    """Names of `measure_block`'s columns; brightness and texture end in the channel's name."""
    columns = list(SHAPE_COLUMNS if "shape" in kinds else PLACE_COLUMNS)
    for kind, names in (("intensity", INTENSITY_COLUMNS), ("texture", TEXTURE_COLUMNS)):
        if kind in kinds:
            columns += [f"{name}-{channel}" for channel in channels for name in names]
    return columns


def measure_block(
    labels: np.ndarray,
    image: np.ndarray | None,
    box: Box,
    records: np.ndarray,
    shape: tuple[int, int],
    greys: Greys | None = None,
    kinds: Collection[str] = KINDS,
) -> np.ndarray:
    """Measurements of cells that one block of pixels holds whole.

    Parameters
    ----------
    labels : (h, w) array of integers
    image : (C, h, w) array or None
    box : Box
        Where the block lies in the whole image.
    records : (n,) array of `cell_index.RECORD`
        Cells to measure.
    shape : (Y, X)
        Of the whole image: cells that reach its border are flagged.
    greys : Greys
        The image's grey levels, for textures.
    kinds
        Which of `KINDS`.

    Returns
    -------
    (n, columns) float64
        Columns as `measurement_columns`, without those of channels where there is no image;
        pixels; coordinates in the whole image.
    """
    from daskcell.features import _kernels as k

    labels = np.ascontiguousarray(labels.astype(np.uint32, copy=False))
    ids = records["label"].astype(np.int64)
    bounds = np.stack([records[name] for name in ("y0", "x0", "y1", "x1")], axis=1)
    boxes = bounds - np.array([box.y0, box.x0, box.y0, box.x0])
    sums = k.shape_sums(labels, ids, boxes)
    if not (sums[:, k.N] == records["area"]).all():
        raise AssertionError("a read must hold its cells whole")
    n = sums[:, k.N].astype(np.float64)
    y, x = sums[:, k.SUM_Y] / n, sums[:, k.SUM_X] / n
    # Second moments about the centre; the cell's tensor of inertia is [[xx, -yx], [-yx, yy]].
    yy = sums[:, k.SUM_YY] / n - y * y
    xx = sums[:, k.SUM_XX] / n - x * x
    yx = sums[:, k.SUM_YX] / n - y * x
    middle, spread = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
    first, second = middle + spread, np.maximum(middle - spread, 0)
    height, width = (bounds[:, 2:] - bounds[:, :2]).T
    with np.errstate(invalid="ignore", divide="ignore"):
        eccentricity = np.where(first > 0, np.sqrt(1 - second / first), 0.0)
    values = {
        "centroid-0": y + bounds[:, 0],
        "centroid-1": x + bounds[:, 1],
        **dict(zip(_WHOLE, bounds.T, strict=True)),
        "area": n,
        "perimeter": sums[:, k.STRAIGHT]
        + sums[:, k.DIAGONAL] * np.sqrt(2)
        + sums[:, k.CORNER] * (1 + np.sqrt(2)) / 2,
        "eccentricity": eccentricity,
        "axis_major_length": 4 * np.sqrt(first),
        "axis_minor_length": 4 * np.sqrt(second),
        "orientation": _orientation(sums, n),
        "solidity": n / sums[:, k.CONVEX],
        "extent": n / (height * width),
        "equivalent_diameter_area": np.sqrt(4 * n / np.pi),
        "touches_edge": (bounds[:, :2] == 0).any(axis=1) | (bounds[:, 2:] == shape).any(axis=1),
    }
    out = [
        np.stack([np.asarray(values[name], np.float64) for name in measurement_columns((), kinds)], axis=1)
    ]
    if image is not None:
        pixels = np.ascontiguousarray(_plain(image))
        if "intensity" in kinds:
            out.append(k.intensity_sums(labels, pixels, ids, boxes).reshape(len(ids), -1))
        if "texture" in kinds:
            assert greys is not None, "textures need the image's grey levels"
            out.append(textures(labels, pixels, ids, boxes, greys).reshape(len(ids), -1))
    return np.concatenate(out, axis=1)


def _plain(image: np.ndarray) -> np.ndarray:
    """In a number type that compiled code takes."""
    if image.dtype.kind == "b":
        return image.view(np.uint8)
    if image.dtype == np.float16:
        return image.astype(np.float32)
    return image.astype(image.dtype.newbyteorder("="), copy=False)


def _orientation(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Angle from the rows' axis to the major axis, in radians from -pi/2 to pi/2."""
    from daskcell.features import _kernels as k

    # Area squared times the second moments, which are whole numbers: so a square is seen to be one, and an
    # upright cell does not turn over by rounding.
    y, x = sums[:, k.SUM_Y].astype(np.float64), sums[:, k.SUM_X].astype(np.float64)
    tall = n * (sums[:, k.SUM_YY] - sums[:, k.SUM_XX]) - (y * y - x * x)
    mixed = n * sums[:, k.SUM_YX] - y * x
    return np.where(tall == 0, np.where(mixed > 0, np.pi / 4, -np.pi / 4), 0.5 * np.arctan2(2 * mixed, tall))


def to_table(
    ids: np.ndarray,
    values: np.ndarray,
    columns: list[str],
    pixel_size: tuple[float, float] | float | None = None,
    n: int | None = None,
    first: int = 1,
    microns: bool = False,
) -> pd.DataFrame:
    """Table whose row i is label ``first + i``, from measurements in any order.

    Parameters
    ----------
    ids : (m,) array of integers
        Label of each row of `values`.
    values : (m, columns) float64
    pixel_size : (y, x) or one number, in micrometres
        Adds the columns in micrometres. Lengths of a shape on oblong pixels use the geometric mean.
    n : int
        Number of rows; None: up to the largest label. A label that no pixel has gives a row of area 0, with
        its other numbers missing.
    microns : bool
        Columns in micrometres even where the pixel size is unknown (as missing numbers).
    """
    import pandas as pd

    if n is None:
        n = int(ids.max()) - first + 1 if len(ids) else 0
    rows = np.full((n, len(columns)), np.nan)
    rows[np.asarray(ids, np.int64) - first] = values
    there = np.zeros(n, bool)
    there[np.asarray(ids, np.int64) - first] = True
    data: dict[str, np.ndarray] = {"label": np.arange(first, first + n, dtype=np.int64)}
    for name, column in zip(columns, rows.T, strict=True):
        if name == "area":
            data[name] = np.where(there, column, 0).astype(np.int64)
        elif name == "touches_edge":
            data[name] = np.where(there, column, 0).astype(bool)
        else:
            data[name] = np.ascontiguousarray(column)
    if pixel_size is not None or microns:
        y, x = (np.nan, np.nan) if pixel_size is None else pixel_pair(pixel_size)
        data["centroid-0_um"] = data["centroid-0"] * y
        data["centroid-1_um"] = data["centroid-1"] * x
        data["area_um2"] = data["area"] * (y * x)
        for name in [name for name in _LENGTHS if name in data]:
            data[f"{name}_um"] = data[name] * np.sqrt(y * x)
    return pd.DataFrame(data)


def pixel_pair(pixel_size: tuple[float, float] | float) -> tuple[float, float]:
    """Pixel size as ``(y, x)``; raises `InputError` unless both are positive."""
    try:
        y, x = (float(side) for side in np.broadcast_to(np.asarray(pixel_size, float), 2))
    except ValueError:
        raise InputError(f"pixel_size must be one number or (y, x), not {pixel_size!r}.") from None
    if not (y > 0 and x > 0):
        raise InputError(f"pixel_size must be positive micrometres, not {pixel_size!r}.")
    return y, x
