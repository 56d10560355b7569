"""The files of a source, opened and read as one image. Only for `reader_process`, whose child may crash."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import ImageError
from daskcell.geometry import Box
from daskcell.images.readers import Reader, open_reader
from daskcell.images.sources import Source, find_channel


class SourceReader:
    """The files of a `Source` as one reader.

    Raises
    ------
    ImageError
        If a file cannot be read, channels have different sizes or types, or a channel is not there.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.readers: list[Reader] = []
        try:
            for file in source.files:
                reader = open_reader(file, t=source.t, z=source.z, axes=source.axes, scene=source.scene)
                self.readers.append(reader)
            self._join(source)
        except BaseException:
            self.close()
            raise

    def _join(self, source: Source) -> None:
        first = self.readers[0]
        self.axes, self.levels, self.piece, self.sizes = first.axes, first.levels, first.piece, first.sizes
        self.notes = tuple(note for reader in self.readers for note in getattr(reader, "notes", ()))
        """What the readers assume that the files do not say, in sentences."""
        self.files = tuple(sorted({file for reader in self.readers for file in reader.files}))
        self.scenes = tuple(getattr(first, "scenes", ("",)))
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
        # From a file's name that is not UTF-8, which no metadata can hold.
        self.channels = tuple(name.encode(errors="replace").decode() for name in self.channels)
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
