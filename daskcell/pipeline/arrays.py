"""Images that are given as arrays: kept in the study as files, since workers and later runs need them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from daskcell.errors import InputError, StudyError
from daskcell.images.arrays import plain
from daskcell.images.axes import axes_of_names, choose_axes, note_of
from daskcell.images.filename_channels import safe_name
from daskcell.storage.atomic import remove, temporaries, temporary_beside
from daskcell.study import Study

FOLDER = "inputs"
_TOGETHER = 64
"""Arrays that are added to the study's list at a time."""


def given_inputs(
    inputs: Any, out: str | os.PathLike[str]
) -> tuple[list[str], Iterator[tuple[str, Any]] | None]:
    """The inputs as paths, and as ``(name, array)`` pairs if they are arrays, one at a time from a generator.

    If the first input is an array, all must be; the path is then that of the folder that will hold them.
    """
    if isinstance(inputs, (str, os.PathLike)):
        return [os.fspath(inputs)], None
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
    return [os.fspath(path) for path in paths], None


def keep_arrays(
    arrays: Iterable[tuple[str, Any]],
    study: Study,
    axes: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Write arrays into the study, unless the same array is there; arrays no longer given stay.

    `axes` is the setting of that name; `tell` is called with a sentence where the axes follow from the shape
    alone.

    Returns
    -------
    list of str
        The files of `arrays`. The study lists them (``arrays``); it replaces no other file in that folder.

    Raises
    ------
    InputError
        Two arrays have one name, or one is no image.
    StudyError
        There is a file of an array's name that is not the study's.
    """
    folder = study.out / FOLDER
    mine = set(study.record.get("arrays", _before_lists(study)))
    given: list[str] = []
    waiting = iter(arrays)
    while batch := list(islice(waiting, _TOGETHER)):
        written: dict[str, Path] = {}
        try:
            for name, array in batch:
                file = folder / f"{safe_name(name)}.tif"
                if str(file) in given:
                    raise InputError(f"Two arrays are called {name!r}. Please give each a name of its own.")
                given.append(str(file))
                data = _tiff(name, array, axes, tell)
                if os.path.lexists(file):
                    if file.is_file() and file.read_bytes() == data:
                        continue
                    if file.name not in mine:
                        raise StudyError(
                            f"{file} was not written by daskcell, and array {name!r} would take its place. "
                            "Please move the file, or give the array another name."
                        )
                folder.mkdir(exist_ok=True)
                written[file.name] = temporary_beside(file)
                written[file.name].write_bytes(data)
            # First the list: a run that is killed here leaves no file that is not listed.
            mine |= written.keys()
            study.record.update(arrays=sorted(mine))
            for name, temporary in written.items():
                os.replace(temporary, folder / name)
        finally:
            remove(*written.values())
    return given


def take_back_arrays(out: Path, record: dict[str, Any]) -> None:
    """Remove the arrays of a new study that was refused, and their folder if it is empty then."""
    folder = out / FOLDER
    remove(*(folder / name for name in record.get("arrays", ())), *temporaries(folder))
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _before_lists(study: Study) -> set[str]:
    """Files of arrays in a study written before there was such a list: those its slides were made from."""
    folder = os.path.abspath(study.out / FOLDER)
    files = [file["path"] for slide in study.slides for file in study.record.ledger(slide).files]
    return {os.path.basename(file) for file in files if os.path.dirname(file) == folder}


def _pairs(first: Any, others: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    pair = first
    while pair is not None:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(f"An input is a {type(pair).__name__}, and others are (name, array) pairs.")
        yield pair
        pair = next(others, None)


def _tiff(name: str, array: Any, axes: str | None, tell: Callable[[str], None]) -> bytes:
    import io

    import numpy as np
    import tifffile

    what = f"The array {name!r}"
    given = plain(array, what)
    shape = given.data.shape
    said = axes_of_names(given.dims, what) or axes
    found = choose_axes(shape, what, said)
    if 0 in shape:
        raise InputError(f"{what} of shape {shape} has no pixels.")
    note = note_of(shape, found, what) if said is None else None
    if note is not None:
        tell(note)
    pixels = np.asarray(given.data)
    order = [axis for axis in "TZCYXS" if axis in found]
    pixels = np.ascontiguousarray(pixels.transpose([found.index(axis) for axis in order]))
    metadata: dict[str, Any] = {"axes": "".join(order)}
    if given.channels is not None and "C" in order:
        metadata["Channel"] = {"Name": list(given.channels)}
    file = io.BytesIO()
    colours = order[-1] == "S" and pixels.shape[-1] in (3, 4)
    tifffile.imwrite(
        file,
        pixels,
        photometric="rgb" if colours else "minisblack",
        planarconfig="separate" if order[0] == "C" and len(order) == 3 else None,
        metadata=metadata,
    )
    return file.getvalue()
