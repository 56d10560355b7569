"""Where a new image goes, so that nothing half-written ever has its name and opens.

on disk          written as .name.partial beside, renamed when whole; what had the name is removed after
object storage   cannot rename: written under its name, and a group opens only when its metadata, the last
                 object, is there. An object .name.partial says meanwhile that what is there is unfinished
                 and ours, so that only that is ever removed to begin again
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

from daskcell import places
from daskcell.errors import ImageError


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
    if not overwrite:
        refuse_existing(path)
    target = places.absolute(path)  # workers may run elsewhere
    return RemoteTarget(target) if places.is_remote(target) else DiskTarget(Path(target))


def refuse_existing(path: str | Path) -> None:
    """Raise `ImageError` if there is something at `path` that is not an unfinished image of ours."""
    target = places.absolute(path)
    if places.exists(target) and not (places.is_remote(target) and places.exists(_marker(target))):
        raise ImageError(f"{target} exists already; please remove it or choose another name.")


def _marker(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.partial"


def remove_cut_writes(folder: str | Path) -> None:
    """Remove what workers that were killed left of files of Zarr, which are written as .partial first."""
    for file in Path(folder).rglob("*.partial"):
        file.unlink(missing_ok=True)


class DiskTarget:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = str(path.parent / f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.abandon()  # what a killed run left

    def finish(self) -> None:
        """What had the name before is removed after, so it is never lost."""
        remove_cut_writes(self.work)
        if not self.path.exists():
            os.rename(self.work, self.path)
            return
        old = self.path.parent / f".{self.path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(self.path, old)
        os.rename(self.work, self.path)
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


class RemoteTarget:
    def __init__(self, path: str) -> None:
        self.work = path
        self.marker = _marker(path)
        places.write(self.marker, b"An image is being written here, or the process that did was stopped.\n")
        self._clear()

    def finish(self) -> None:
        places.remove_remote(self.marker)

    def abandon(self) -> None:
        self._clear()
        places.remove_remote(self.marker)

    def _clear(self) -> None:
        for name in ("zarr.json", ".zattrs"):  # first what would let the rest open
            places.remove_remote(places.join(self.work, name))
        places.remove_remote(self.work)
