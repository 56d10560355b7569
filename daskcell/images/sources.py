"""What one image is read from, as plain data that is sent to a worker and opened there (`reader_process`)."""

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
    """One image to be read: which files, and how. Small and picklable; no file is open."""

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
    """Name or number of the scene, in a file that holds several."""
    condition: str | None = None
    """Condition by the manifest, such as a treatment; does not affect results."""
    companions: tuple[str, ...] = ()
    """Other files that `files` refer to and that are read too, as in a multi-file OME-TIFF."""
    said: tuple[str, ...] = ()
    """Further parts of the content keys, which the manifest says instead of the settings."""

    def file_of(self, channel: str) -> str:
        """The file that holds a channel."""
        if self.file_channels is None:
            return self.files[0]
        return self.files[find_channel(channel, self.file_channels, self)]

    @property
    def all_files(self) -> tuple[str, ...]:
        """Every file or Zarr folder that is read."""
        return self.files + self.companions

    def identity(self) -> str:
        """Hash of the files (name, size, time or ETag) and of how they are read, for caches of open readers.

        Of Zarr, whose chunks are not cached, only the metadata; `study.keys` covers every chunk.
        """
        parts: list[str] = [
            repr((self.file_channels, self.take, self.pixel_size, self.t, self.z, self.axes, self.scene))
        ]
        for file in self.all_files:
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
