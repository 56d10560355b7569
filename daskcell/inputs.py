"""Arrays as users have them, as arrays that the functions over arrays take."""

from __future__ import annotations

from typing import Any

import numpy as np

from daskcell.errors import InputError


def as_numbers(value: Any, what: str, kinds: str = "buif") -> Any:
    """`value` as a numpy or Dask array of numbers, of any shape.

    Parameters
    ----------
    value
        A numpy or Dask array, or what becomes one: lists, a table, a torch tensor.
    what
        Its name in messages.
    kinds
        Of its type, by numpy's letters.

    Raises
    ------
    InputError
        It is not an array, is sparse, holds no numbers, or has chunks of unknown size.
    """
    import dask.array as da

    if not isinstance(value, (np.ndarray, da.Array)):
        if value is None or isinstance(value, str) or hasattr(value, "__fspath__"):
            raise InputError(f"{what} must be an array, not {value!r}. open_image() makes one of a file.")
        if hasattr(value, "toarray"):
            raise InputError(f"{what} is a sparse {type(value).__name__}. Please give it as .toarray().")
        if hasattr(value, "detach"):
            value = value.detach().cpu()  # a torch tensor
        try:
            value = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{what} cannot be made an array ({error}).") from None
    if value.dtype.kind not in kinds:
        wanted = "whole numbers" if kinds == "iu" else "numbers"
        raise InputError(f"{what} must be {wanted}, but has the type {value.dtype}.")
    if any(np.isnan(side) for side in value.shape):
        raise InputError(
            f"{what} has chunks of unknown size. Please call its method compute_chunk_sizes() before."
        )
    if isinstance(value, da.Array) and any(0 in sizes for sizes in value.chunks) and 0 not in value.shape:
        value = value.rechunk(tuple(tuple(size for size in sizes if size) for sizes in value.chunks))
    return value
