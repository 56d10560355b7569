"""Writing a new image so that nothing half-written has its name and opens.

disk             written as .daskcell-<hash>.partial beside, and renamed when it is complete; what had the
                 name is removed afterwards, and only if daskcell could have written all of it
object storage   has no rename: written under the final name. A group opens only when its metadata, which are
                 written last, are there. An object .name.partial marks it as unfinished and as ours, so that
                 only such an image is removed to begin again
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
from daskcell.storage.atomic import move_over, refuse_impossible, remove

_UNFINISHED = b"An image is being written here, or the process that did was stopped.\n"
_CUT = re.compile(r".*\.[0-9a-f]{8,32}\.partial")
_META = r"(zarr\.json|\.zgroup|\.zattrs|\.zarray)"
_OURS = re.compile(
    rf"((labels|labels/(cells|nuclei|clusters)|daskcell|daskcell/histograms)/)?(\d+/)?"
    rf"({_META}|c(/\d+)*|\d+(/\d+)*)(\.[0-9a-f]{{8,32}}\.partial)?"
)
"""Files of an image, of its labels or of a single array as daskcell writes them, below its folder."""


class Staging(Protocol):
    """A new image while it is being written."""

    work: str
    """Where to write it."""

    def commit(self) -> None:
        """Give the finished image, whose metadata were written last, its name."""
        ...

    def rollback(self) -> None:
        """Remove what was written."""
        ...


def begin(path: str | Path, *, overwrite: bool = False) -> Staging:
    """Begin to write an image at `path`.

    Raises
    ------
    ImageError
        If there is something at `path` that may not be replaced.
    """
    if overwrite:
        refuse_foreign(path)
    else:
        refuse_existing(path)
    target = paths.absolute(path)  # workers may run elsewhere
    return RemoteStaging(target) if paths.is_remote(target) else LocalStaging(Path(target))


def refuse_existing(path: str | Path) -> None:
    """Raise `ImageError` if there is something at `path` that is not an unfinished image of ours."""
    target = paths.absolute(path)
    if not paths.is_remote(target):
        refuse_impossible(target)
    if paths.exists(target) and not (paths.is_remote(target) and _is_unfinished(target)):
        raise ImageError(f"{target} exists already; please remove it or choose another name.")


def refuse_foreign(path: str | Path) -> None:
    """Raise `ImageError` if a folder that is to be replaced or removed holds a file of another kind than
    daskcell writes."""
    for file in _files(Path(path)):
        if not _OURS.fullmatch(file):
            raise ImageError(
                f"{Path(path, file)} was not written by daskcell, and would be lost as {path} is made anew. "
                "Please move it to another place; the same command continues."
            )


def remove_zarr(path: str | Path) -> None:
    """Remove a Zarr image, label image or array; raises `ImageError` if its folder holds other files too."""
    refuse_foreign(path)
    remove(Path(path))


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files and links below `folder`, relative to it, with slashes."""
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
    """Remove the .partial files that killed workers left: Zarr writes each file under such a name first."""
    for file in Path(folder).rglob("*.partial"):
        if _CUT.fullmatch(file.name):
            file.unlink(missing_ok=True)


class LocalStaging:
    """Written beside its final name, under a name that is always the same: a later try removes what a killed
    one left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = str(_beside(path, "partial"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rollback()

    def commit(self) -> None:
        remove_cut_writes(self.work)
        move_over(Path(self.work), self.path, _beside(self.path, "old"))

    def rollback(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A name that depends on that of `path` alone, and is short enough for any file system."""
    return path.parent / f".daskcell-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{kind}"


class RemoteStaging:
    """Written under its final name, with a marker beside it as long as it is unfinished."""

    def __init__(self, path: str) -> None:
        self.work = path
        self.marker = _marker(path)
        paths.write(self.marker, _UNFINISHED)
        self._clear()

    def commit(self) -> None:
        paths.remove_remote(self.marker)

    def rollback(self) -> None:
        self._clear()
        paths.remove_remote(self.marker)

    def _clear(self) -> None:
        for name in ("zarr.json", ".zattrs"):  # first what would let the rest open
            paths.remove_remote(paths.join(self.work, name))
        paths.remove_remote(self.work)
