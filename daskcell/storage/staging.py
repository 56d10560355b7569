"""Where a new image goes, so that nothing half-written ever has its name and opens.

on disk          written as .daskcell-<hash>.partial beside, renamed when whole; what had the name is removed
                 after, and only if all in it is of the kind that daskcell writes
object storage   cannot rename: written under its name, and a group opens only when its metadata, the last
                 object, is there. An object .name.partial says meanwhile that what is there is unfinished
                 and ours, so that only that is ever removed to begin again
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from daskcell.errors import ImageError
from daskcell.storage import paths
from daskcell.storage.atomic import refuse_impossible, remove

_UNFINISHED = b"An image is being written here, or the process that did was stopped.\n"
_CUT = re.compile(r".*\.[0-9a-f]{8,32}\.partial")
_META = r"(zarr\.json|\.zgroup|\.zattrs|\.zarray)"
_OURS = re.compile(
    rf"((labels|labels/(cells|nuclei|clusters)|daskcell|daskcell/histograms)/)?(\d+/)?"
    rf"({_META}|c(/\d+)*|\d+(/\d+)*)(\.[0-9a-f]{{8,32}}\.partial)?"
)
"""Files of an image, of its labels or of a single array as daskcell writes them, below its folder."""


class Target(Protocol):
    """A new image while it is made."""

    work: str
    """Where to write it."""

    def finish(self) -> None:
        """It is whole, its metadata written last."""
        ...

    def abandon(self) -> None:
        """It will not be: leave nothing of it."""
        ...


def new_image(path: str | Path, *, overwrite: bool = False) -> Target:
    """Begin an image at `path`; raises `ImageError` if there is something that may not be replaced."""
    if overwrite:
        refuse_foreign(path)
    else:
        refuse_existing(path)
    target = paths.absolute(path)  # workers may run elsewhere
    return RemoteTarget(target) if paths.is_remote(target) else DiskTarget(Path(target))


def refuse_existing(path: str | Path) -> None:
    """Raise `ImageError` if there is something at `path` that is not an unfinished image of ours."""
    target = paths.absolute(path)
    if not paths.is_remote(target):
        refuse_impossible(target)
    if paths.exists(target) and not (paths.is_remote(target) and _is_unfinished(target)):
        raise ImageError(f"{target} exists already; please remove it or choose another name.")


def refuse_foreign(path: str | Path) -> None:
    """Raise `ImageError` if a folder on disk, which is to be replaced or removed, holds what daskcell did not
    write."""
    for file in _files(Path(path)):
        if not _OURS.fullmatch(file):
            raise ImageError(
                f"{Path(path, file)} was not written by daskcell, and would be lost as {path} is made anew. "
                "Please move it to another place; the same command continues."
            )


def remove_zarr(path: str | Path) -> None:
    """Remove a Zarr image, label image or array of ours; raises `ImageError` if there is more in its
    folder."""
    refuse_foreign(path)
    remove(Path(path))


def _files(folder: Path) -> Iterator[str]:
    """All that is not a folder below `folder`, relative, with slashes."""
    for parent, folders, names in os.walk(folder):
        names += [name for name in folders if os.path.islink(os.path.join(parent, name))]
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        yield from (name if below == "." else f"{below}/{name}" for name in names)


def _is_unfinished(path: str) -> bool:
    marker = _marker(path)
    return paths.exists(marker) and paths.read(marker) == _UNFINISHED


def _marker(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.partial"


def remove_cut_writes(folder: str | Path) -> None:
    """Remove what workers that were killed left of files of Zarr, which are written as .partial first."""
    for file in Path(folder).rglob("*.partial"):
        if _CUT.fullmatch(file.name):
            file.unlink(missing_ok=True)


class DiskTarget:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = str(_beside(path, "partial"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.abandon()  # what a killed run left

    def finish(self) -> None:
        """What had the name before is removed after, so it is never lost."""
        remove_cut_writes(self.work)
        if not self.path.exists():
            os.rename(self.work, self.path)
            return
        old = _beside(self.path, "old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(self.path, old)
        os.rename(self.work, self.path)
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """Always the same name for what a killed run may leave, short enough beside the longest one."""
    return path.parent / f".daskcell-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{kind}"


class RemoteTarget:
    def __init__(self, path: str) -> None:
        self.work = path
        self.marker = _marker(path)
        paths.write(self.marker, _UNFINISHED)
        self._clear()

    def finish(self) -> None:
        paths.remove_remote(self.marker)

    def abandon(self) -> None:
        self._clear()
        paths.remove_remote(self.marker)

    def _clear(self) -> None:
        for name in ("zarr.json", ".zattrs"):  # first what would let the rest open
            paths.remove_remote(paths.join(self.work, name))
        paths.remove_remote(self.work)
