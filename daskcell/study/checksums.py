"""Checksums of the files that stages wrote, so that damage to a study is found at any later time.

A ledger entry lists the files of its stage, which no other stage writes: path in the study -> ``[bytes,
CRC-32]``. Names and sizes are always checked, since that costs a microsecond per file. The bytes are read for
slides that have work left, and on request (``--verify``).

Zarr alone does not notice: the checksum in a shard covers only its index, and a missing shard reads as zeros.
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
    """Size and CRC-32 of files.

    Parameters
    ----------
    out : Path
        Folder of the study.
    roots : iterable of Path
        Files, and folders whose files are taken except temporary ones.
    workers : Workers
        Read the files, in tasks of about 256 MB.

    Returns
    -------
    dict
        ``[bytes, CRC-32]`` by path in the study, sorted.
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
    """Names of damaged files: missing, of another size, or, with `workers`, of other bytes.

    Parameters
    ----------
    out : Path
        Folder of the study.
    files : mapping
        As `checksum` returned it.
    workers : Workers, optional
        Read the files; None: only sizes are compared.
    """
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
    """File names in shares of a suitable size for one task."""
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
