"""The arithmetic of preprocessing: steps that hold every number they need, those of the whole image too.

Each step maps a block ``(C, h, w)`` to ``(C', h, w)`` and knows the halo it needs. Pure numpy: no Dask, no
files. The lazy functions and the engine both go through these, and through nothing else.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from daskcell.geometry import Box
from daskcell.preprocess.dtypes import all_values, float_dtype, is_small, largest, look_up, to_dtype

TRUNCATE = 4.0
"""Where the Gaussian is cut, in standard deviations: what SciPy, scikit-image and dask-image take."""


class Step(Protocol):
    """One step of a plan."""

    kind: ClassVar[str]
    placed: ClassVar[bool]
    """Whether it matters where a block lies in the image."""

    @property
    def halo(self) -> int:
        """Pixels needed around a block."""

    def channels(self, count: int) -> int:
        """Channels made of `count` channels."""

    def dtype(self, dtype: np.dtype) -> np.dtype:
        """Type made of `dtype`."""

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        """The step on a block that lies at `box` of the whole image."""

    def at_level(self, level: int, shape: tuple[int, int]) -> Step | None:
        """The step for pixels of a coarser level of the image's pyramid.

        Applied there it gives about what the step gives on the whole image, made as small.

        Parameters
        ----------
        level : int
            Pixels of the level are ``2 ** level`` times as large as the image's; 1 or more.
        shape : (Y, X)
            Of the level.

        Returns
        -------
        Step, or None where nothing is left of it at this size
        """

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class _Same:
    """Channels and dtype stay. In JSON, a step is its fields."""

    placed: ClassVar[bool] = False

    def channels(self, count: int) -> int:
        return count

    def dtype(self, dtype: np.dtype) -> np.dtype:
        return dtype

    def to_json(self) -> dict[str, Any]:
        return {one.name: _to_json(getattr(self, one.name)) for one in fields(self) if one.compare}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**{one.name: _from_json(values[one.name]) for one in fields(cls) if one.name in values})


class _Pointwise(_Same):
    """A pixel depends on itself only, so that the step is the same for pixels of every size."""

    halo = 0

    def at_level(self, level: int, shape: tuple[int, int]) -> Self:
        return self


@dataclass(frozen=True, kw_only=True)
class _Placed(_Pointwise):
    """A pixel depends on itself and on where it lies in the whole image."""

    placed: ClassVar[bool] = True
    level: int = 0
    """Of the image's pyramid: pixels are ``2 ** level`` times as large as the image's."""

    def at_level(self, level: int, shape: tuple[int, int]) -> Self:
        return replace(self, level=level)

    def places(self, start: int, stop: int) -> np.ndarray:
        """Rows (or columns) of the whole image in which the pixels `start` to `stop` have their middle."""
        size = 1 << self.level
        return np.arange(start, stop) * size + size // 2


@dataclass(frozen=True)
class Floor(_Pointwise):
    """Each channel less a grey level of its own; what lies below becomes 0. For integers."""

    kind: ClassVar[str] = "floor"
    lows: tuple[int, ...]

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        lows = np.array(self.lows, block.dtype)[:, None, None]
        return np.asarray(np.maximum(block, lows) - lows)


@dataclass(frozen=True)
class Mix(_Pointwise):
    """Colour image from channels: three rows of one weight a channel."""

    kind: ClassVar[str] = "mix"
    weights: tuple[tuple[float, ...], ...]

    def channels(self, count: int) -> int:
        return len(self.weights)

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        from daskcell.preprocess.colors import mix

        return mix(block, self.weights)


@dataclass(frozen=True)
class Stretch(_Pointwise):
    """``low`` becomes 0 and ``high`` white, per channel; same dtype (`skimage`'s ``rescale_intensity``)."""

    kind: ClassVar[str] = "stretch"
    low: tuple[float, ...]
    high: tuple[float, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)
    """How the limits differ from percentiles over all pixels, in words; not kept with the plan."""

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        out = np.empty_like(block)
        for target, plane, low, high in zip(out, block, self.low, self.high, strict=True):
            target[...] = _by_table(plane, partial(self._rescale, low=low, high=high))
        return out

    @staticmethod
    def _rescale(values: np.ndarray, low: float, high: float) -> np.ndarray:
        # The order of operations is scikit-image's, so that the last bit is too; integers are cut, not
        # rounded.
        white = largest(values.dtype)
        dtype = values.dtype
        values = np.clip(values, low, high)
        values = (values - low) / (high - low) * white if low < high else np.clip(values, 0, white)
        return to_dtype(values, dtype, truncate=True)


@dataclass(frozen=True, eq=False)
class Curve(_Pointwise):
    """Piecewise linear curve per channel: values ``x`` become ``y`` (equalised or matched histograms).

    ``to_float``: the result is on the 0-1 scale (float64 for float64, else float32); otherwise in the image's
    type, integers cut, as scikit-image does.
    """

    kind: ClassVar[str] = "curve"
    x: tuple[np.ndarray, ...]
    y: tuple[np.ndarray, ...]
    to_float: bool

    def dtype(self, dtype: np.dtype) -> np.dtype:
        return float_dtype(dtype) if self.to_float else dtype

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        dtype = self.dtype(block.dtype)
        out = np.empty(block.shape, dtype)
        for target, plane, x, y in zip(out, block, self.x, self.y, strict=True):

            def follow(values: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> np.ndarray:
                return to_dtype(np.interp(values, x, y), dtype, truncate=True)

            target[...] = _by_table(plane, follow)
        return out


@dataclass(frozen=True)
class Gaussian(_Same):
    """Gaussian filter of each channel, reflected at the image's border; same dtype, integers rounded.

    At a coarser level `sigma` is as many pixels as there are in it; one that does not reach the next pixel is
    left out.
    """

    kind: ClassVar[str] = "gaussian"
    sigma: float

    @property
    def halo(self) -> int:
        return math.ceil(TRUNCATE * self.sigma)

    def at_level(self, level: int, shape: tuple[int, int]) -> Gaussian | None:
        sigma = self.sigma / 2**level
        return Gaussian(sigma) if reach_of(sigma) else None

    def apply(self, block: np.ndarray, box: Box) -> np.ndarray:
        return smooth(block, self.sigma)


def reach_of(sigma: float) -> int:
    """Pixels to each side that a Gaussian takes part of."""
    return int(TRUNCATE * sigma + 0.5)


def smooth(block: np.ndarray, sigma: float) -> np.ndarray:
    """`scipy.ndimage.gaussian_filter` of every plane; integers through float64, rounded to nearest.

    Compiled for the engine, with SciPy's bits: 2.2 to 4.5 times as fast for 8 and 16 bits, 1.4 to 2.7 times
    for wider types (sigma 3 and 1; `benchmarks/preprocessing.py`). The lazy functions use dask-image.
    """
    from daskcell.preprocess._kernels import correlate_symmetric

    reach = reach_of(sigma)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 / (sigma * sigma) * offsets**2)
    weights = (weights / weights.sum())[reach:]
    kind = block.dtype if block.dtype.kind == "f" else np.dtype(np.float64)
    between = np.empty(block.shape[2] + 2 * reach, kind)
    out = np.empty_like(block, order="C")
    for target, plane in zip(out, block, strict=True):
        if block.dtype.kind == "f" or is_small(block.dtype):
            # SciPy would round integers down after each axis.
            correlate_symmetric(plane, weights, between, target, block.dtype.kind != "f")
        else:
            exact = np.empty(plane.shape, np.float64)
            correlate_symmetric(plane, weights, between, exact, False)
            target[...] = to_dtype(exact, block.dtype)
    return out


def _by_table(plane: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``function(plane)``; for small integers once for every value instead of every pixel."""
    # The same numbers either way: function works value by value.
    if is_small(plane.dtype) and plane.size > 1 << (8 * plane.dtype.itemsize):
        return look_up(plane, function(all_values(plane.dtype)))
    return function(plane)


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON, bit for bit."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(array.tobytes()).decode("ascii"),
    }


def decode_array(values: dict[str, Any]) -> np.ndarray:
    """Back from `encode_array`."""
    data = np.frombuffer(base64.b64decode(values["base64"]), values["dtype"])
    return data.reshape(values["shape"]).astype(data.dtype.newbyteorder("="))


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return encode_array(value)
    return [_to_json(one) for one in value] if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return decode_array(value)
    return tuple(_from_json(one) for one in value) if isinstance(value, list) else value
