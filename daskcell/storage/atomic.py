"""Files on disk that are written completely or not at all.

What is being written is named ``.daskcell-<8 hex digits>.tmp``, so that what a killed process left can be
recognised.
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
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; at the end, what was written there replaces `path`.

    Readers see the old file or the new one, also where two processes write the same one. The folder of `path`
    must exist: it is not made, so that a lost worker that still writes does not bring a removed one back.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        move_over(temporary, path, temporary_beside(path))
    finally:
        remove(temporary)


def move_over(new: Path, path: Path, aside: Path) -> None:
    """Rename `new` to `path`. Nothing can be renamed to the name of a folder that is not empty, so that is
    renamed to `aside` first, and removed afterwards."""
    if not new.is_dir() or not os.path.lexists(path):
        os.replace(new, path)
        return
    remove(aside)
    os.replace(path, aside)
    os.replace(new, path)
    remove(aside)


def temporary_beside(path: str | Path) -> Path:
    """A temporary name in the folder of `path`, short whatever the name of `path` is."""
    return Path(path).parent / f".daskcell-{uuid.uuid4().hex[:8]}.tmp"


def temporaries(folder: str | Path) -> list[Path]:
    """Files and folders in `folder` that are being written, or were when the process was killed."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(folder, name) for name in names if _TEMPORARY.fullmatch(name)]


def write_atomic(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file atomically; its folder is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def save_arrays(path: str | Path, *arrays: np.ndarray) -> None:
    """Write arrays one after another into one file, for repeated `numpy.load`, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # Given a real file, numpy writes with `ndarray.tofile`, which does not notice that the disk was full
        # for the last bytes.
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
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()

        def write(part: np.ndarray) -> None:
            file.write(np.ascontiguousarray(part, dtype).data)

        yield write
        assert file.tell() - start == math.prod(shape) * dtype.itemsize, "the parts are not the whole"


def save_npz(path: str | Path, *arrays: np.ndarray, **named: np.ndarray) -> None:
    """`numpy.savez` without pickle, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *arrays, allow_pickle=False, **named)


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """Write JSON atomically. Without `indent` it is one line, which is ten times as fast."""
    write_atomic(path, json_bytes(values, indent))


def json_bytes(values: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8 with a line end; file names that are not UTF-8 are escaped reversibly."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, sort_keys=True)
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(values, indent=indent, sort_keys=True) + "\n").encode()


def remove(*paths: Path) -> None:
    """Remove files and folders, if they exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_impossible(path: str | Path) -> None:
    """Raise `InputError` for a path that cannot be written: it holds a NUL, a name is too long for the file
    system, or it is not UTF-8, which Zarr and Parquet require."""
    try:
        os.fspath(path).encode()
        os.lstat(path)
    except ValueError:
        raise InputError(f"{os.fspath(path)!r} cannot be a path. Please choose another name.") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{path} is too long for a path here. Please choose a shorter name.") from None


def files_of(path: Path) -> list[Path]:
    """All files below a folder, sorted by name; of a file, itself."""
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
    """Whether an error, or one of its causes, says that a disk is full or read-only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False
