"""One image to be read, as plain data that travels to a worker and is opened beside it (`sandbox`)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from daskcell.errors import InputError
from daskcell.images.filename_channels import matching_channels
from daskcell.images.readers import ZChoice
from daskcell.storage import paths


@dataclass(frozen=True)
class Source:
    """One image to be read: which files, and how. Small and picklable; nothing is open."""

    name: str
    """Unique among the images of a run and fit for a file name."""
    files: tuple[str, ...]
    """One file for each channel, or a single one with all."""
    file_channels: tuple[str, ...] | None = None
    """Names of the channels where there is one file for each."""
    take: tuple[str, ...] | None = None
    """Channels to take, in this order; None: all."""
    pixel_size: tuple[float, float] | None = None
    """``(y, x)`` in micrometres where the settings say; None: as in the file."""
    t: int = 0
    z: ZChoice = "max"
    axes: str | None = None
    """Order of the axes, where the settings say it; for files that do not."""
    scene: int = 0
    """Position of the image in a file that holds several."""
    part: str = ""
    """What tells it from the other images of its file: the name of a scene, or its number."""
    condition: str | None = None
    """What a manifest says it belongs to, such as a treatment; changes nothing."""
    said: tuple[str, ...] = ()
    """What else a manifest says of it and the settings do not: part of the content keys."""

    def file_of(self, channel: str) -> str:
        """The file that holds a channel."""
        if self.file_channels is None:
            return self.files[0]
        return self.files[find_channel(channel, self.file_channels, self)]

    def identity(self) -> str:
        """Hash of what decides the pixels: the files (name, size, time of change) and how they are read."""
        parts: list[str] = [
            repr((self.file_channels, self.take, self.pixel_size, self.t, self.z, self.axes, self.scene))
        ]
        for file in self.files:
            names = ("zarr.json", ".zattrs") if paths.is_folder(file) else ()
            for one in [paths.join(file, name) for name in names] or [file]:
                with contextlib.suppress(FileNotFoundError):
                    parts.append(" ".join(map(str, (PurePath(one).name, *paths.version(one)))))
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def find_channel(name: str, available: Sequence[str], source: Source) -> int:
    """Position of the channel that `name` means; raises `InputError` for none or several."""
    found = matching_channels(name, available)
    if len(found) == 1:
        return found[0]
    where = f"Image '{source.name}' ({source.files[0]})"
    if found:
        shown = ", ".join(f"'{available[index]}'" for index in found)
        raise InputError(f"{where} has several channels that '{name}' may mean: {shown}. Please name one.")
    raise InputError(f"{where} has no channel '{name}'; it has {', '.join(available)}.")
