"""Pixel types: which are accepted, what they become, and how computed values return to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from daskcell.errors import InputError


def working_dtype(dtype: Any) -> np.dtype:
    """The type pixels of `dtype` are processed in: native byte order; bool becomes uint8 and float16 float32.

    Raises
    ------
    InputError
        For pixels that are no numbers, or complex ones.
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise InputError(
            f"Pixels of type {dtype} cannot be processed: give integers or floats of up to 64 bits."
        )
    if dtype == np.float16:
        return np.dtype(np.float32)
    return dtype.newbyteorder("=")


def float_dtype(dtype: np.dtype) -> np.dtype:
    """The type of results on the 0-1 scale: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def largest(dtype: np.dtype) -> float:
    """What "white" is: the largest value of an integer type, 1.0 of a float type."""
    return float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0


def is_small(dtype: np.dtype) -> bool:
    """Whether every value of the type can have its own bin (integers of up to 16 bits)."""
    return dtype.kind in "ui" and dtype.itemsize <= 2


def all_values(dtype: np.dtype) -> np.ndarray:
    """Every value of a small integer type, in order; ``value - values[0]`` is its index."""
    info = np.iinfo(dtype)
    return np.arange(info.min, info.max + 1).astype(dtype)


def look_up(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``table[value - smallest value]`` for small integers."""
    # Seen as unsigned, int8 -1 is 255: the table is turned instead of the image being shifted.
    if plane.dtype.kind == "i":
        table = np.roll(table, len(table) // 2)
    return table[plane.view(f"u{plane.dtype.itemsize}")]


def to_dtype(values: np.ndarray, dtype: np.dtype, *, truncate: bool = False) -> np.ndarray:
    """Computed values back in `dtype`: integers rounded (or truncated) and cut at what the type holds."""
    if dtype.kind not in "ui":
        return values.astype(dtype, copy=False)
    info = np.iinfo(dtype)
    # 2**64 - 1 has no float64: the next float down is the largest that casts safely.
    top = float(info.max) if dtype.itemsize < 8 else float(np.nextafter(float(info.max), 0))
    values = values if truncate else np.rint(values)
    return np.clip(values, float(info.min), top).astype(dtype)


def check_finite(block: np.ndarray) -> None:
    """Refuse NaN and infinity.

    Raises
    ------
    InputError
        With the channel and the number of such pixels.
    """
    if block.dtype.kind != "f":
        return
    for channel, plane in enumerate(block):
        bad = plane.size - int(np.count_nonzero(np.isfinite(plane)))
        if bad:
            raise InputError(
                f"Channel {channel} has NaN or infinite pixels ({bad} in one block): replace them, say by 0."
            )
