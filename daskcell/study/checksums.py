"""Checksums of what the stages wrote: damage to a study is found, however long after.

A ledger entry lists the files of its stage, which no other stage writes: path in the study -> ``[bytes,
CRC-32]``. Names and sizes cost a microsecond a file and are
looked at always; the bytes are read where a slide has work left to do, or when asked (``--verify``).

The checksum inside a Zarr shard covers its index only, and a shard that is missing reads as zeros.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from daskcell.compute import Workers

Files = Mapping[str, list[int]]
_PIECE = 1 << 20
_TASK_BYTES = 256 << 20
_TASK_FILES = 256


def checksum(out: Path, roots: Iterable[Path], workers: Workers) -> dict[str, list[int]]:
    """Size and CRC-32 of every file at or under `roots`, by path in the study `out`; temporary ones left out.

    Large folders are read by all `workers`.
    """
    sizes = {}
    for root in roots:
        for file in _files(os.fspath(root)):
            sizes[os.path.relpath(file, out)] = os.stat(file).st_size
    window = workers.window()
    for number, names in enumerate(_shares(sizes)):
        window.submit(number, _crcs, os.path.abspath(out), names)
    found: dict[str, list[int]] = {}
    for _, crcs in window:
        found |= {name: [sizes[name], crc] for name, crc in crcs.items()}
    return dict(sorted(found.items()))


def verify(out: Path, files: Files, workers: Workers | None = None) -> list[str]:
    """Files that are missing or of another size than they were; with `workers`, or of other bytes."""
    wrong, left = [], {}
    for name, was in files.items():
        size = _size(os.path.join(out, name))
        if size != was[0]:
            wrong.append(name)
        else:
            left[name] = was[0]
    if workers is not None:
        window = workers.window()
        for number, names in enumerate(_shares(left)):
            window.submit(number, _crcs, os.path.abspath(out), names)
        for _, crcs in window:
            wrong += [name for name, crc in crcs.items() if [left[name], crc] != files[name]]
    return sorted(wrong)


def _files(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        if os.path.exists(root):
            yield root
        return
    for folder, _, names in os.walk(root):
        yield from (os.path.join(folder, name) for name in names if not name.endswith(".tmp"))


def _shares(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """`sizes` cut into tasks of a sensible length."""
    share: list[str] = []
    total = 0
    for name, size in sizes.items():
        share.append(name)
        total += size
        if total >= _TASK_BYTES or len(share) >= _TASK_FILES:
            yield share
            share, total = [], 0
    if share:
        yield share


def _crcs(out: str, names: list[str]) -> dict[str, int]:
    """CRC-32 of files; -1 for one that cannot be read."""
    return {name: _crc(os.path.join(out, name)) for name in names}


def _crc(file: str) -> int:
    crc = 0
    try:
        with open(file, "rb") as stream:
            while piece := stream.read(_PIECE):
                crc = zlib.crc32(piece, crc)
    except OSError:
        return -1
    return crc


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size
    except OSError:
        return None
