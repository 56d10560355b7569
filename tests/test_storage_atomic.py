"""Files appear whole or not at all, also where the disk takes no more."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import tifffile

from daskcell.storage import atomic

ARRAY = np.arange(5000, dtype=np.float32)
HEADER = 128
SIZE = HEADER + ARRAY.nbytes


@contextmanager
def room(size):
    """No file grows beyond `size` bytes: as on a full disk, what fits is written first."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def write_parts(path, array):
    atomic.save_parts(path, array.shape, array.dtype, np.array_split(array, 3))


WRITERS = {
    "atomic": lambda path, array: atomic.write_atomic(path, array.data),
    "arrays": atomic.save_arrays,
    "parts": write_parts,
    "npz": atomic.save_npz,
    "json": lambda path, array: atomic.write_json(path, array.tolist()),
}


@pytest.mark.parametrize("missing", [1, 100, 3000, 4095, 4097, 15_000])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_finds_no_room_is_an_error_and_leaves_the_old_file(tmp_path, writer, missing):
    path = tmp_path / "file"
    writer(path, ARRAY)
    whole = path.read_bytes()
    path.write_bytes(b"old")
    with room(len(whole) - missing), pytest.raises(OSError, match=r"large|space") as caught:
        writer(path, ARRAY)
    assert atomic.is_full(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with room(len(whole)):
        writer(path, ARRAY)
    assert path.read_bytes() == whole


def test_numpy_by_itself_loses_the_end_of_a_file_and_does_not_say_so(tmp_path):
    """The control: why arrays are not written by `numpy.save` and `ndarray.tofile`. If it fails one day,
    numpy is mended, and `disk` can be shorter."""
    with room(SIZE - 1):
        np.save(tmp_path / "array.npy", ARRAY)
        ARRAY.tofile(tmp_path / "array")
    assert (tmp_path / "array.npy").stat().st_size < SIZE
    with pytest.raises(ValueError, match=r"mmap length|reshape"):
        np.load(tmp_path / "array.npy", mmap_mode="r")


def test_arrays_are_what_numpy_writes(tmp_path):
    records = np.zeros(7, [("label", np.int64), ("area", np.float32)])
    for number, array in enumerate(
        [ARRAY, ARRAY.reshape(50, 100).T[::2], records, np.zeros((0, 3)), np.array(2)]
    ):
        np.save(tmp_path / "numpy.npy", array)
        atomic.save_arrays(tmp_path / f"{number}.npy", array)
        assert (tmp_path / f"{number}.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    write_parts(tmp_path / "parts.npy", ARRAY)
    np.save(tmp_path / "numpy.npy", ARRAY)
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_parts_that_are_not_the_whole_are_no_file(tmp_path):
    with pytest.raises(AssertionError, match="not the whole"):
        atomic.save_parts(tmp_path / "parts.npy", (4, 10), np.uint8, [np.zeros((3, 10))])
    assert not list(tmp_path.iterdir())


def test_what_is_written_last_stays_when_two_write_the_same_file(tmp_path):
    path = tmp_path / "file"
    with atomic.atomic_path(path) as mine:
        mine.write_bytes(b"half of mi")
        atomic.write_json(path, 1)
        mine.write_bytes(b"mine")
        assert json.loads(path.read_text()) == 1
    assert path.read_bytes() == b"mine"


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "folder"
    for name in "ab":
        with atomic.atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), atomic.atomic_path(tmp_path / "removed" / "file") as temporary:
        temporary.touch()
    assert not (tmp_path / "removed").exists()


def test_a_full_disk_is_told_from_other_errors():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert atomic.is_full(full)
    assert atomic.is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not atomic.is_full(OSError(errno.EACCES, "Permission denied"))
    assert not atomic.is_full(ValueError("No space left on device"))
    outer = RuntimeError("the stage failed")
    outer.__cause__ = full
    assert atomic.is_full(outer)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["convert {file} {out}", "segment {file} -o {out} --method watershed"])
def test_a_command_on_a_full_disk_ends_with_one_sentence_and_leaves_nothing(text, tmp_path):
    file = tmp_path / "picture.tif"
    tifffile.imwrite(file, np.random.default_rng(0).integers(0, 255, (200, 200)).astype(np.uint8))
    words = text.format(file=file, out=tmp_path / "out.zarr").split()
    command = [sys.executable, "-m", "daskcell", *words]
    with room(3000):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "daskcell: The disk takes no more. Please make room, and give the same command again."
    ]
    assert list(tmp_path.iterdir()) == [file]
