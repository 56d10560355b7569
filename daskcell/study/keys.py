"""Content keys: what a stage's result depends on, as one hash.

A key covers the keys of the stages it needs, the settings and files (weights) that decide its result, and the
version of the stage; the key of the first stage covers the bytes of the input. Equal keys mean equal results,
so a study redoes what has another key, and nothing else. Where a run works (`compute`) is part of no key. The
stages are in `daskcell.pipeline.stages`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from daskcell.errors import ImageError
from daskcell.storage import paths
from daskcell.storage.atomic import digest, files_of


def content_key(stage: str, version: int, *parts: Any) -> str:
    """Hash of a stage's name, its version and everything its result depends on (JSON-able)."""
    text = json.dumps([stage, version, *parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(files: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """The part of what `identify` returns that decides results: neither the folder nor the time."""
    return [[file["name"], file["digest"], *file.get("said", ())] for file in files]


def identify(
    files: Iterable[str | Path], known: Iterable[Mapping[str, Any]] = (), said: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Name, size, time and digest of each input file; a folder (Zarr) counts as one file.

    Parameters
    ----------
    files : iterable of paths
    known : iterable of mappings
        An earlier answer: a file of the same size and time is not read again.
    said : iterable of str
        What a manifest says of the files.

    Returns
    -------
    list of dict
        For remote files, which are not read, the digest covers names, sizes and ETags.
    """
    earlier = {entry["path"]: entry for entry in known}
    found = []
    for path in files:
        size, mtime = _weigh(path)
        before = earlier.get(str(path))
        if before is not None and (before["size"], before["mtime_ns"]) == (size, mtime):
            found.append(dict(before))
        else:
            content = str(mtime) if paths.is_remote(path) else digest(Path(path))
            entry = {
                "path": str(path),
                "name": PurePath(path).name,
                "size": size,
                "mtime_ns": mtime,
                "digest": content,
            }
            found.append(entry)
    for entry in found[:1]:
        entry.pop("said", None)
        entry |= {"said": list(said)} if said else {}
    return found


def unchanged(files: Iterable[str | Path], known: list[dict[str, Any]], said: Iterable[str] = ()) -> bool:
    """Whether files have the sizes and times in `known`, and the manifest says the same of them."""
    found = [str(path) for path in files]
    if [entry["path"] for entry in known] != found or (known and known[0].get("said", []) != list(said)):
        return False
    with contextlib.suppress(OSError, ImageError):
        return all(_weigh(p) == (e["size"], e["mtime_ns"]) for p, e in zip(found, known, strict=True))
    return False


def _weigh(path: str | Path) -> tuple[int, int | str]:
    """Size in bytes and time in ns: of a folder, the sum and the latest. Remote: a hash of ETags."""
    if paths.is_remote(path):
        found = paths.versions_below(str(path))
        tags = hashlib.blake2b(repr(found).encode(), digest_size=20)
        return sum(size for size, _ in found.values()), tags.hexdigest()
    try:
        status = [file.stat() for file in files_of(Path(path))]
    except FileNotFoundError as error:
        raise ImageError(f"Cannot read {path}: {paths.why_unreadable(path, error)}.") from error
    return sum(s.st_size for s in status), max((s.st_mtime_ns for s in status), default=0)
