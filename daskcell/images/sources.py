"""From what a user names (files, folders, patterns) to images to be read: `find_images`."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcell.config import InputSettings
from daskcell.errors import DaskcellError, ImageError, InputError
from daskcell.geometry import Box
from daskcell.images import channels as names
from daskcell.images.readers import Reader, ZChoice, open_reader

SUFFIXES = [
    ".tif",
    ".tiff",
    ".btf",
    ".tf8",
    ".tf2",
    ".stk",
    ".lsm",
    ".svs",
    ".ndpi",
    ".scn",
    ".qptiff",
    ".bif",
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".bmp",
]  # what a folder is searched for


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
        return self.files[_find(channel, self.file_channels, self)]

    def identity(self) -> str:
        """Hash of what decides the pixels: the files (name, size, time of change) and how they are read."""
        parts: list[str] = [repr((self.file_channels, self.take, self.pixel_size, self.t, self.z))]
        for file in self.files:
            path = Path(file)
            inner = [path / n for n in ("zarr.json", ".zattrs")] if path.is_dir() else [path]
            for one in inner:
                if one.exists():
                    status = one.stat()
                    parts.append(f"{one.name} {status.st_size} {status.st_mtime_ns}")
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
            shared = min(len(reader.levels) for reader in self.readers)
            self.levels = first.levels[:shared]
        dtypes = [reader.dtype for reader in self.readers]
        self.dtype = np.result_type(*dtypes)
        if self.dtype.itemsize > 4 and self.dtype.kind in "iu":
            self.dtype = np.dtype(np.float64)
        self.order = list(range(len(self.channels)))
        if source.take is not None:
            self.order = [_find(name, self.channels, source) for name in source.take]
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


def find_images(
    inputs: str | Path | Sequence[str | Path], settings: InputSettings | None = None
) -> list[Source]:
    """All images among `inputs`: files, folders (searched to the bottom), patterns with ``*``, OME-Zarr.

    Raises
    ------
    ImageError
        If there is none, a name does not exist, or a channel is missing or there twice.
    """
    settings = settings or InputSettings()
    groups: list[names.Group] = []
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    singles: dict[str, list[str]] = {}
    for given in inputs:
        text = os.fspath(given)
        if os.path.isdir(text) and not _is_zarr(text):
            groups += _in_folder(text, settings.pattern)
        elif os.path.exists(text):
            singles.setdefault(os.path.dirname(text), []).append(text)
        elif glob.has_magic(text) and (
            found := sorted(glob.glob(text, recursive=True), key=names.natural_key)
        ):
            for file in found:
                if not os.path.isdir(file) or _is_zarr(file):
                    singles.setdefault(os.path.dirname(file), []).append(file)
        else:
            raise ImageError(f"There is no file or folder {text}.")
    for folder, files in singles.items():
        files = list(dict.fromkeys(files))
        if settings.pattern is not None:
            groups += names.group_by_pattern(
                {os.path.relpath(f, folder or "."): f for f in files}, settings.pattern
            )
        elif len(files) > 1:
            groups += names.group_by_guess(files)
        else:
            groups.append(names.Group(names._stem(files[0]), (files[0],)))
    if not groups:
        raise ImageError(f"There is no picture in {', '.join(os.fspath(i) for i in inputs)}.")
    size = settings.pixel_size
    pixel_size = (size, size) if isinstance(size, (int, float)) else size
    take = tuple(settings.channels) if settings.channels is not None else None
    sources = []
    for group in groups:
        source = Source(group.name, group.files, group.channels, take, pixel_size)
        if take and group.channels:
            for name in take:
                _find(name, group.channels, source)
        sources += _planes(source, settings)
    unique = names.unique_names(source.name for source in sources)
    return [replace(source, name=name) for source, name in zip(sources, unique, strict=True)]


def describe_sources(sources: Sequence[Source]) -> list[dict[str, str]]:
    """Which file became what: a row for each file, with ``image``, ``channel`` and ``file``."""
    rows = []
    for source in sources:
        for k, file in enumerate(source.files):
            channel = source.file_channels[k] if source.file_channels else "(as in the file)"
            if (
                source.file_channels
                and source.take
                and channel.lower() not in [n.lower() for n in source.take]
            ):
                channel += " (left out)"
            rows.append({"image": source.name, "channel": channel, "file": file})
    return rows


def _planes(source: Source, settings: InputSettings) -> list[Source]:
    """One source for each time point and plane that the settings want."""
    z: ZChoice = 0 if settings.z == "all" else settings.z
    t = 0 if settings.t == "all" else settings.t
    chosen = replace(source, t=t, z=z)
    if settings.z != "all" and settings.t != "all":
        return [chosen]
    from daskcell.images.sandbox import open_safely

    try:
        reader = open_safely(Source(source.name, source.files[:1]))
    except DaskcellError:
        return [chosen]  # says so itself when it is converted, and does not stop the others
    sizes = reader.sizes
    reader.close()
    times = range(sizes["t"]) if settings.t == "all" else [t]
    planes: Sequence[ZChoice] = range(sizes["z"]) if settings.z == "all" else [z]
    result = []
    for time in times:
        for plane in planes:
            name = source.name + (f"_t{time:03d}" if len(times) > 1 else "")
            name += f"_z{plane:03d}" if len(planes) > 1 else ""
            result.append(replace(source, name=name, t=time, z=plane))
    return result


def _in_folder(folder: str, pattern: str | None) -> list[names.Group]:
    """Images in a folder and below; channels are looked for in each folder by itself."""
    by_folder: dict[str, list[str]] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort(key=names.natural_key)
        shown = [f for f in folders if not f.startswith(".")]
        zarrs = [f for f in shown if _is_zarr(os.path.join(parent, f))]
        folders[:] = [f for f in shown if f not in zarrs]
        pictures = [f for f in files if not f.startswith(".") and f.lower().endswith(tuple(SUFFIXES))]
        found = sorted([*pictures, *zarrs], key=names.natural_key)
        if found:
            by_folder[parent] = [os.path.join(parent, f) for f in found]
    if pattern is not None:
        relative = {
            os.path.relpath(f, folder).replace(os.sep, "/"): f for files in by_folder.values() for f in files
        }
        return names.group_by_pattern(relative, pattern)
    groups = []
    for parent, files in by_folder.items():
        below = os.path.relpath(parent, folder)
        for group in names.group_by_guess(files):
            name = group.name or os.path.basename(os.path.abspath(parent))
            prefix = "" if below == "." else below.replace(os.sep, "_") + "_"
            groups.append(replace(group, name=prefix + name))
    return groups


def _is_zarr(path: str) -> bool:
    return os.path.isdir(path) and any(
        os.path.exists(os.path.join(path, n)) for n in ("zarr.json", ".zgroup", ".zattrs")
    )


def _find(name: str, available: Sequence[str], source: Source) -> int:
    lower = [a.lower() for a in available]
    if name.lower() in lower:
        return lower.index(name.lower())
    raise InputError(
        f"Image '{source.name}' ({source.files[0]}) has no channel '{name}'; it has {', '.join(available)}."
    )
