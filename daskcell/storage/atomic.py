"""Files on disk: written whole or not at all, and nothing of other people's is replaced or removed.

What is still being written is called ``.daskcell-<8 hex digits>.tmp``: whoever finds one of a killed process
knows that it is ours.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from daskcell.errors import InputError

_PIECE = 4 << 20
_TEMPORARY = re.compile(r"\.daskcell-[0-9a-f]{8}\.tmp")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write under; what is there in the end takes its place.

    So readers see the old file or the new one, whole, also where two processes write the same one. The
    folder must be there: what a lost worker still writes does not bring removed ones back.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():  # which only moves onto nothing
            old = temporary_beside(path)
            os.replace(path, old)
            os.replace(temporary, path)
            remove(old)
        else:
            os.replace(temporary, path)
    finally:
        remove(temporary)


def temporary_beside(path: str | Path) -> Path:
    """A name for what is still being written, in the folder of `path`.

    Nothing of the name of `path` is in it, which may be as long as names can be.
    """
    return Path(path).parent / f".daskcell-{uuid.uuid4().hex[:8]}.tmp"


def temporaries(folder: str | Path) -> list[Path]:
    """Files and folders in `folder` that a process of ours is writing, or was when it was killed."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(folder, name) for name in names if _TEMPORARY.fullmatch(name)]


def write_atomic(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def save_arrays(path: str | Path, *arrays: np.ndarray) -> None:
    """Write arrays one after another into one file for `numpy.load`, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        # Into a file of the system numpy writes by `ndarray.tofile`, which does not look whether the last
        # bytes found room on the disk.
        hidden: Any = SimpleNamespace(write=file.write)
        for array in arrays:
            np.save(hidden, array, allow_pickle=False)


def save_parts(path: str | Path, shape: tuple[int, ...], dtype: Any, parts: Iterable[np.ndarray]) -> None:
    """Write an array that comes in parts, along its first axis, as `save_arrays` would write it."""
    with saving_parts(path, shape, dtype) as write:
        for part in parts:
            write(part)


@contextmanager
def saving_parts(
    path: str | Path, shape: tuple[int, ...], dtype: Any
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function to call with each part of an array, which is there whole in the end, or not at all."""
    dtype = np.dtype(dtype)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()

        def write(part: np.ndarray) -> None:
            file.write(np.ascontiguousarray(part, dtype).data)

        yield write
        assert file.tell() - start == math.prod(shape) * dtype.itemsize, "the parts are not the whole"


def save_npz(path: str | Path, *arrays: np.ndarray, **named: np.ndarray) -> None:
    """`numpy.savez` without pickle, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *arrays, allow_pickle=False, **named)


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """`write_atomic` of JSON. Without `indent` it is on one line, and written ten times as fast."""
    write_atomic(path, json_bytes(values, indent))


def json_bytes(values: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8 and a line end; file names that are not UTF-8 are escaped, and come back as they were."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, sort_keys=True)
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(values, indent=indent, sort_keys=True) + "\n").encode()


def remove(*paths: Path) -> None:
    """Remove files and folders; what is not there is fine."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_impossible(path: str | Path) -> None:
    """Raise `InputError` if nothing can be written at a path: there is a NUL in it, a name is longer than the
    system takes, or it is not UTF-8, as Zarr and Parquet want it."""
    try:
        os.fspath(path).encode()
        os.lstat(path)
    except ValueError:
        raise InputError(f"{os.fspath(path)!r} cannot be a path. Please choose another name.") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{path} is too long for a path here. Please choose a shorter name.") from None


def files_of(path: Path) -> list[Path]:
    """All files of a folder, in order of their names; a file is itself."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def digest(path: Path) -> str:
    """BLAKE2 of a file's bytes, or of the names and bytes of all files in a folder."""
    total = hashlib.blake2b(digest_size=20)
    for file in files_of(path):
        if file != path:
            total.update(os.fsencode(file.relative_to(path)) + b"\0")
        with open(file, "rb") as stream:
            while piece := stream.read(_PIECE):
                total.update(piece)
    return total.hexdigest()


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one it came from, says that a disk takes no more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False
