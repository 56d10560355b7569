"""Arrays as users have them, as plain NumPy or Dask arrays: what they say of themselves is kept or refused.

xarray's dimensions and channel coordinates, and the dimension names of Zarr arrays, say what the axes are;
arrays on disk (Zarr, HDF5) are read lazily, tensors of torch are taken from any device. Masked arrays,
quantities with units, sparse arrays, tables and arrays of no numbers are refused: as plain numbers they would
mean something else.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from daskcell.errors import InputError, InputWarning
from daskcell.images.axes import axes_of_names, choose_axes, dimension_names, note_of, to_cyx


@dataclass(frozen=True)
class Given:
    """An array that was given, and what it says of itself."""

    data: Any
    """NumPy or Dask array of booleans, integers or floats."""
    dims: tuple[Any, ...] | None = None
    """Names of its axes; None: it has none."""
    channels: tuple[str, ...] | None = None
    """Names along its axis of channels."""


def as_image(
    value: Any, what: str = "The image", axes: str | None = None, *, like: tuple[int, ...] | None = None
) -> Given:
    """An array of a user's as a NumPy or Dask array ``(C, Y, X)``, and the names of its channels.

    Parameters
    ----------
    what
        Names the array in errors, as the beginning of a sentence.
    axes
        Where the user says them, such as ``"YXC"``.
    like
        ``(Y, X)`` of labels that the image must have: tells where the channels are.

    Raises
    ------
    InputError
        For an array that is no image, or whose axes nothing tells.
    """
    given = value if isinstance(value, Given) else plain(value, what)
    shape = given.data.shape
    said = axes if axes is not None else axes_of_names(given.dims, what)
    if said is None and like is not None and len(shape) == 3:
        fits = [order for order, sides in (("CYX", shape[1:]), ("YXC", shape[:2])) if sides == like]
        said = fits[0] if len(fits) == 1 else None
    found = choose_axes(shape, what, said)
    note = note_of(shape, found, what) if said is None else None
    if note is not None:
        warnings.warn(note, InputWarning, stacklevel=3)
    return Given(to_cyx(given.data, found, what), tuple("CYX"), given.channels)


def as_labels(value: Any, what: str = "labels") -> Any:
    """A label image of a user's as a NumPy or Dask array ``(Y, X)`` of whole numbers.

    Raises
    ------
    InputError
        For anything else, with a way to make a label image of it.
    """
    given = plain(value, what)
    shape, dtype = given.data.shape, given.data.dtype
    if len(shape) != 2:
        colours = len(shape) == 3 and shape[-1] in (3, 4)
        advice = f": please number its colours, as with {_NUMBER_COLOURS}" if colours else ""
        raise InputError(f"{what} must have the axes (Y, X), but have the shape {shape}{advice}.")
    if dtype.kind == "b":
        raise InputError(
            f"{what} must be whole numbers, but are True and False: please number the cells, as with "
            "skimage.measure.label(mask)."
        )
    if dtype.kind not in "iu":
        raise InputError(f"{what} must be whole numbers, but are {dtype}: please give labels.astype(int).")
    if isinstance(given.data, np.ndarray) and dtype.kind == "i" and given.data.min(initial=0) < 0:
        raise InputError(
            f"{what} must not be below 0, but go down to {given.data.min()}: please give 0 to the "
            "background, as with np.maximum(labels, 0)."
        )
    return given.data if axes_of_names(given.dims, what) in (None, "YX") else given.data.T


_NUMBER_COLOURS = (
    "np.unique(mask.reshape(-1, mask.shape[2]), axis=0, return_inverse=True)[1].reshape(mask.shape[:2])"
)


def as_values(value: Any, what: str) -> Any:
    """Values of cells as a NumPy or Dask array; a table or a column of one gives its numbers."""
    return plain(value.to_numpy() if hasattr(value, "to_numpy") else value, what).data


def plain(value: Any, what: str = "The array") -> Given:
    """An array of a user's as a NumPy or Dask array, with its axes in their order."""
    module = type(value).__module__.partition(".")[0]
    if module == "xarray":
        return _from_xarray(value, what)
    if module == "daskcell" and hasattr(value, "data") and hasattr(value, "channels"):  # `Image`
        return Given(value.data, tuple("CYX"), tuple(value.channels))
    if module == "torch":
        value = _from_torch(value, what)
    _refuse(value, module, what)
    dims = None
    if module == "dask" and hasattr(value, "chunks"):
        meta = value._meta
        _refuse(meta, type(meta).__module__.partition(".")[0], what)
        if any(math.isnan(side) for side in value.shape):
            raise InputError(f"{what} has chunks of unknown size. Please call compute_chunk_sizes() first.")
        if any(0 in sizes for sizes in value.chunks) and 0 not in value.shape:
            value = value.rechunk(tuple(tuple(size for size in sizes if size) for sizes in value.chunks))
    elif module in ("zarr", "h5py") and hasattr(value, "shape"):
        import dask.array as da

        dims = dimension_names(value)
        value = da.from_array(value, chunks=value.chunks or "auto")
    else:
        try:
            value = np.asarray(value)
        except Exception as error:  # of another library's conversion, or of lists of unequal lengths
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{what} ({type(value).__name__}) is no array of numbers: {reason}.") from None
    if value.dtype.kind not in "buif":
        raise InputError(f"{what} holds values of type {value.dtype}. Please give integers or floats.")
    return Given(value, None if dims is None else tuple(dims))


def _from_xarray(value: Any, what: str) -> Given:
    if not hasattr(value, "dims") or not hasattr(value, "dtype"):
        raise InputError(f"{what} is an xarray {type(value).__name__}. Please give one of its variables.")
    names = None
    for dim in value.dims:
        if axes_of_names([dim], what, unknown="") in ("C", "S") and dim in value.coords:
            found = value.coords[dim]
            names = tuple(str(name) for name in found.values) if found.dtype.kind in "UOT" else None
    return Given(plain(value.data, what).data, tuple(value.dims), names)


def _from_torch(value: Any, what: str) -> Any:
    if not hasattr(value, "detach") or getattr(value, "is_sparse", False) or value.is_quantized:
        raise InputError(f"{what} is a {type(value).__name__} of torch that is no dense tensor.")
    try:
        return value.detach().cpu().numpy()
    except TypeError:
        raise InputError(f"{what} is a tensor of {value.dtype}. Please give x.float() or integers.") from None


def _refuse(value: Any, module: str, what: str) -> None:
    """Raise `InputError` for kinds of arrays whose meaning would be lost as plain numbers."""
    module = module.partition(".")[0]
    if isinstance(value, np.ma.MaskedArray):
        if not np.ma.is_masked(value) and value.size:
            return
        raise InputError(
            f"{what} is a masked array, and masked pixels have no value: please give x.filled(0)."
        )
    if hasattr(value, "unit") or (hasattr(value, "units") and hasattr(value, "magnitude")):
        number = "value" if hasattr(value, "unit") else "magnitude"
        raise InputError(f"{what} is in units, which an image has not: please give the numbers, x.{number}.")
    if module == "pandas":
        raise InputError(f"{what} is a table of pandas, and no array: please give x.to_numpy().")
    if module in ("sparse", "scipy") and hasattr(value, "nnz"):
        dense = "toarray" if module == "scipy" else "todense"
        raise InputError(f"{what} is a sparse array: please give x.{dense}().")
    if hasattr(value, "__cuda_array_interface__") and module != "torch":
        raise InputError(f"{what} lies in the memory of a GPU: please give a NumPy array, such as x.get().")
    if isinstance(value, (str, bytes)) or module == "pathlib":
        raise InputError(f"{what} is a path: please give its pixels, such as open_image(path).data.")
    if hasattr(value, "keys") and not hasattr(value, "shape"):
        raise InputError(f"{what} is a {type(value).__name__}, and no array: please give one of its arrays.")
