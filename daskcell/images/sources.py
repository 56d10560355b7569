"""One image to be read, as plain data that travels to a worker and is opened there."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from daskcell import places
from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images.channels import matching_channels
from daskcell.images.readers import Reader, ZChoice, open_reader


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
    group: str | None = None
    """What a manifest says it belongs to, such as a treatment; changes nothing."""
    said: tuple[str, ...] = ()
    """What else a manifest says of it and the settings do not: part of the content keys."""

    def open(self) -> Reader:
        """Open for reading, in this process.

        Raises
        ------
        ImageError
            If a file cannot be read, channels have different sizes or types, or a channel is not there.
        """
        return SourceReader(self)

    def file_of(self, channel: str) -> str:
        """The file that holds a channel."""
        if self.file_channels is None:
            return self.files[0]
        return self.files[find_channel(channel, self.file_channels, self)]

    def identity(self) -> str:
        """Hash of what decides the pixels: the files (name, size, time of change) and how they are read."""
        parts: list[str] = [repr((self.file_channels, self.take, self.pixel_size, self.t, self.z))]
        for file in self.files:
            names = ("zarr.json", ".zattrs") if places.is_folder(file) else ()
            for one in [places.join(file, name) for name in names] or [file]:
                with contextlib.suppress(FileNotFoundError):
                    parts.append(" ".join(map(str, (PurePath(one).name, *places.version(one)))))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class SourceReader:
    """The files of a `Source` as one reader."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.readers: list[Reader] = []
        try:
            for file in source.files:
                self.readers.append(open_reader(file, t=source.t, z=source.z))
            self._join(source)
        except BaseException:
            self.close()
            raise

    def _join(self, source: Source) -> None:
        first = self.readers[0]
        self.axes, self.levels, self.piece, self.sizes = first.axes, first.levels, first.piece, first.sizes
        self.files = tuple(sorted({file for reader in self.readers for file in reader.files}))
        self.is_rgb = first.is_rgb and source.file_channels is None
        self.pixel_size = source.pixel_size or first.pixel_size
        if source.file_channels is None:
            self.channels: tuple[str, ...] = first.channels
        else:
            self.channels = source.file_channels
            for file, reader in zip(source.files, self.readers, strict=True):
                if reader.levels[0] != first.levels[0]:
                    sizes = [
                        f"{s} of {f}"
                        for s, f in ((first.levels[0], source.files[0]), (reader.levels[0], file))
                    ]
                    raise ImageError(
                        f"Channels of image '{source.name}' differ in size (y, x): {sizes[0]}, {sizes[1]}."
                    )
                if len(reader.channels) != 1 and not reader.is_rgb:
                    raise ImageError(
                        f"{file} should be one channel of image '{source.name}', but holds "
                        f"{len(reader.channels)}."
                    )
            same = takewhile(
                lambda each: len(set(each)) == 1, zip(*(r.levels for r in self.readers), strict=False)
            )
            self.levels = tuple(each[0] for each in same)
        dtypes = [reader.dtype for reader in self.readers]
        self.dtype = np.result_type(*dtypes)
        if self.dtype.itemsize > 4 and self.dtype.kind in "iu":
            self.dtype = np.dtype(np.float64)
        self.order = list(range(len(self.channels)))
        if source.take is not None:
            self.order = [find_channel(name, self.channels, source) for name in source.take]
            self.channels = tuple(self.channels[i] for i in self.order)
            self.is_rgb = self.is_rgb and self.order == [0, 1, 2]
        self.per_file = source.file_channels is not None

    def read(self, level: int, box: Box) -> NDArray:
        """Pixels ``(C, h, w)`` of `box`."""
        if not self.per_file:
            pixels = self.readers[0].read(level, box)
            return pixels if self.order == list(range(len(pixels))) else pixels[self.order]
        out = np.empty((len(self.order), *box.shape), self.dtype)
        for k, i in enumerate(self.order):
            # A channel saved in its colour has its signal there: the largest of the three is the intensity.
            out[k] = self.readers[i].read(level, box).max(axis=0)
        return out

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


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
