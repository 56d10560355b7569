"""Pictures that are given as arrays: kept in the study as files, since workers and later runs need them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from daskcell.disk import remove, write_atomic
from daskcell.errors import InputError, StudyError
from daskcell.images.channels import safe_name
from daskcell.study.lock import holder

FOLDER = "inputs"


def given_inputs(inputs: Any, out: str | os.PathLike[str]) -> tuple[list[str], Iterator[tuple[str, Any]]]:
    """What was given, as paths, and the arrays among it; of a generator, arrays are taken one at a time.

    Where the first is an array, all must be.
    """
    if isinstance(inputs, (str, os.PathLike)):
        return [os.fspath(inputs)], iter(())
    waiting = iter(inputs)
    first = next(waiting, None)
    if isinstance(first, tuple):
        return [os.path.join(out, FOLDER)], _pairs(first, waiting)
    paths = [] if first is None else [first, *waiting]
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(
                f"An input is a {type(path).__name__}; please give paths only, or (name, array) only."
            )
    return [os.fspath(path) for path in paths], iter(())


def keep_arrays(arrays: Iterable[tuple[str, Any]], out: str | os.PathLike[str]) -> None:
    """Write arrays into the study, and remove those that are no longer given; equal ones stay as they are."""
    folder = Path(out, FOLDER)
    kept: set[Path] = set()
    for name, array in arrays:
        if not kept and (owner := holder(Path(out)) if Path(out).is_dir() else None) is not None:
            raise StudyError(
                f"Another run works on {out} (process {owner.get('pid')}). Please wait until it ends."
            )
        file = folder / f"{safe_name(name)}.tif"
        if file in kept:
            raise InputError(f"Two arrays are called {name!r}. Please give each a name of its own.")
        kept.add(file)
        data = _tiff(name, array)
        if not file.exists() or file.read_bytes() != data:
            write_atomic(file, data)
    if kept:
        remove(*(file for file in folder.iterdir() if file not in kept))


def _pairs(first: Any, others: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    pair = first
    while pair is not None:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(f"An input is a {type(pair).__name__}, and others are (name, array) pairs.")
        yield pair
        pair = next(others, None)


def _tiff(name: str, array: Any) -> bytes:
    import io

    import numpy as np
    import tifffile

    pixels = np.asarray(array)
    if pixels.ndim not in (2, 3) or pixels.size == 0 or pixels.dtype.kind not in "uif":
        raise InputError(
            f"The array {name!r} is {pixels.dtype} of shape {pixels.shape}; please give numbers, (Y, X) or "
            "(C, Y, X)."
        )
    file = io.BytesIO()
    axes = "YX" if pixels.ndim == 2 else "CYX"
    tifffile.imwrite(
        file,
        pixels,
        photometric="minisblack",
        planarconfig="separate" if axes == "CYX" else None,
        metadata={"axes": axes},
    )
    return file.getvalue()
