"""The axes of arrays: one rule for arrays in memory, NumPy and Zarr files, and TIFF files without metadata.

Axes are letters, as in tifffile: T frames, C channels, Z planes, Y rows, X columns, S samples of a colour
image. If nothing names them, two axes are ``YX`` and three are ``CYX``; or ``YXC`` if the last is at most
`CHANNELS` and the other two are at least `SIDE` long. Ambiguous shapes, and more axes, are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daskcell.config import check_axes
from daskcell.errors import InputError

CHANNELS = 4
"""Longest last axis that is interpreted as channels."""
SIDE = 16
"""Shortest side of an image whose channels come last."""
MOST_CHANNELS = 64

_NAMES = {
    "T": ("t", "time", "frame", "frames", "timepoint"),
    "C": ("c", "ch", "channel", "channels", "band", "bands", "marker", "markers", "stain", "wavelength"),
    "Z": ("z", "depth", "plane", "planes", "slice"),
    "Y": ("y", "row", "rows", "height"),
    "X": ("x", "col", "cols", "column", "columns", "width"),
    "S": ("s", "sample", "samples", "rgb", "rgba"),
}
_LETTERS = {name: letter for letter, names in _NAMES.items() for name in names}


def choose_axes(shape: Sequence[int], what: str, axes: str | None = None) -> str:
    """Axes of an array of `shape`: those that are given, or by the rule above.

    Parameters
    ----------
    what
        Name of the array in errors, such as that of its file.
    axes
        From the metadata of the array or the user.

    Raises
    ------
    InputError
        For axes that do not fit the shape, and for an ambiguous shape.
    """
    shape = tuple(int(side) for side in shape)
    if axes is not None:
        return _checked(shape, what, axes)
    if len(shape) == 2:
        return "YX"
    if len(shape) != 3:
        if len(shape) < 2:
            raise InputError(f"{what} of shape {shape} is no image: one is (Y, X) or (C, Y, X).")
        raise InputError(f"{what} has shape {shape}, and nothing says which axis is what: {_REMEDY}.")
    first, middle, last = shape
    if 0 in shape:
        return "CYX"
    if last <= CHANNELS and min(first, middle) >= SIDE:
        return "YXC"
    ambiguous = (
        (last <= CHANNELS and (last < middle or first > CHANNELS) and not first == last == 1)
        or (middle <= CHANNELS < first)
        or (last < SIDE <= min(first, middle))
        or (first > MOST_CHANNELS and first > min(middle, last))
    )
    if ambiguous:
        raise InputError(f"{what} has shape {shape}, which may be (C, Y, X) or another order: {_REMEDY}.")
    return "CYX"


_REMEDY = 'please name the axes, such as axes="YXC" in Python or the setting input.axes for files'


def note_of(shape: Sequence[int], axes: str, what: str) -> str | None:
    """A message about axes that were chosen by the shape alone; None if there was no choice."""
    if axes != "YXC":
        return None
    return (
        f"{what} has shape {tuple(int(side) for side in shape)}: its last axis is taken for channels. "
        "Please name the axes if that is wrong."
    )


def axes_of_names(
    names: Sequence[Any] | None, what: str = "The array", unknown: str | None = None
) -> str | None:
    """Letters of axes that have names, such as xarray's dimensions; None for no names, or ``dim_0``.

    Raises `InputError` for names that are not known, unless a letter for them is given.
    """
    if names is None or all(name is None or str(name).startswith("dim_") for name in names):
        return None
    letters = [_LETTERS.get(str(name).casefold(), unknown or "") for name in names]
    if unknown is None and not all(letters):
        strange = next(name for name, letter in zip(names, letters, strict=True) if not letter)
        raise InputError(
            f"{what} has an axis '{strange}', and none of t, c, z, y, x. Please rename it, or give axes=."
        )
    return "".join(letters)


def dimension_names(array: Any) -> Any:
    """Names of the axes of a Zarr array: in its own metadata (3), or as xarray writes them (2); or None."""
    names = getattr(getattr(array, "metadata", None), "dimension_names", None)
    if names is None and hasattr(array, "attrs"):
        names = dict(array.attrs).get("_ARRAY_DIMENSIONS")
    return names


def to_cyx(array: Any, axes: str, what: str) -> Any:
    """An array as ``(C, Y, X)``; raises `InputError` for several planes or frames."""
    for axis in "TZ":
        at = axes.find(axis)
        if at >= 0 and array.shape[at] != 1:
            kind = "frames (T)" if axis == "T" else "planes (Z)"
            raise InputError(f"{what} has {array.shape[at]} {kind}. Please choose one, or their maximum.")
        if at >= 0:
            array, axes = array[(slice(None),) * at + (0,)], axes.replace(axis, "")
    axes = axes.replace("S", "C")
    if "C" not in axes:
        array, axes = array[None], "C" + axes
    order = tuple(axes.index(axis) for axis in "CYX")
    return array if order == (0, 1, 2) else array.transpose(order)


def _checked(shape: tuple[int, ...], what: str, axes: str) -> str:
    axes = check_axes(axes)
    if len(axes) != len(shape):
        raise InputError(f"{what} has shape {shape}, to which the axes {axes} do not fit.")
    return axes
