"""The stored pixels of TIFF pages: tiles and strips, decoded and kept for a while, or raw bytes.

Only what a box touches is read. Every piece is checked: that its data are all there, are of the page's type
and size, and do not end early, where decoders would fill up with zeros.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from daskcell.errors import ImageError
from daskcell.geometry import Box
from daskcell.images.readers import tiffstreams
from daskcell.images.readers.tiffcheck import is_too_long, piece_bytes
from daskcell.storage import paths

CACHE_BYTES = 64 * 2**20
"""Decoded strips kept, so that neighbouring boxes do not decode them again."""

MEASURED_BYTES = 16 * 2**20
"""Larger pieces are not decoded a second time to learn whether their data are too many."""

_JPEG = {6, 7, 34892, 33007}
_CUT_OFF = {5, 34925}
"""LZW and LZMA."""


class Pieces:
    """What `file` stores at `path`: `samples` values of type `dtype` a pixel."""

    def __init__(self, file: tifffile.TiffFile, path: str, dtype: np.dtype, samples: int) -> None:
        self.file, self.path, self.dtype, self.samples = file, path, dtype, samples
        self.remote = paths.is_remote(path)
        self._measured: list[Any] = []
        self._strips: OrderedDict[tuple[int, int, int], NDArray] = OrderedDict()
        self._strip_bytes = 0

    def read(self, series: Any, number: int, box: Box, out: NDArray | None = None) -> NDArray:
        """Stored samples ``(S, h, w)`` of a part of page `number` of a level, which is a tifffile series.

        `out` is where they go, if it is given.
        """
        key = series.keyframe
        planar = key.planarconfig == 2 and self.samples > 1
        if out is None:
            out = np.empty((self.samples, *box.shape), self.dtype)
        if series.dataoffset is not None:
            return self._read_raw(series, number, box, planar, out)
        page, at = series.pages[number], (id(series), number)
        height, width = key.chunks[:2]
        down, across = math.ceil(key.imagelength / height), math.ceil(key.imagewidth / width)
        where = {
            (plane * down + i) * across + j: (plane, i * height, j * width)
            for plane in range(self.samples if planar else 1)
            for i in range(box.y0 // height, -(-box.y1 // height))
            for j in range(box.x0 // width, -(-box.x1 // width))
        }
        wanted = [index for index in where if (*at, index) not in self._strips]
        fetched = self._fetch(page, wanted) if self.remote else {}
        for index, (plane, y, x) in where.items():
            piece = self._piece(page, (*at, index), fetched.pop(index, None))
            if piece is None:
                part = Box(y, x, y + height, x + width) & box
                out[(plane if planar else slice(None), *part.within(box))] = key.nodata or 0
                continue
            covers = Box(y, x, y + piece.shape[0], x + piece.shape[1])
            part = covers & box
            if part != Box(y, x, y + height, x + width) & box:
                raise ImageError(f"Cannot read {self.path}: a piece of it is too small, data are missing.")
            pixels = piece[part.within(covers)]
            rows, columns = part.within(box)
            if planar:
                out[plane, rows, columns] = pixels[..., 0]
            else:
                for sample in range(self.samples):  # in one go it takes longer
                    out[sample, rows, columns] = pixels[..., sample]
        return out

    def _fetch(self, page: Any, indices: list[int]) -> dict[int, bytes]:
        """The compressed tiles or strips of a remote file, many at a time."""
        ranges = [(page.dataoffsets[index], page.databytecounts[index]) for index in indices]
        return dict(zip(indices, paths.read_ranges(self.path, ranges), strict=True))

    def _piece(self, page: Any, name: tuple[int, int, int], data: bytes | None = None) -> NDArray | None:
        """One decoded tile or strip ``(h, w, samples)``, of `data` if it is there; None for an empty one."""
        index = name[-1]
        if name in self._strips:
            self._strips.move_to_end(name)
            return self._strips[name]
        key = page.keyframe
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if count == 0:
            return None
        if data is None:
            handle = page.parent.filehandle
            if handle.closed:  # files of a multi-file OME-TIFF are closed between reads
                handle.open()
            handle.seek(offset)
            data = handle.read(count)
        if len(data) != count:
            raise ImageError(f"Cannot read {self.path}: the file is truncated.")
        options: dict[str, Any] = {}
        if int(key.compression) in _JPEG:
            options = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
        decoded = self._decode(key, data, index, options)
        piece = decoded.reshape(decoded.shape[-3:])
        if not key.is_tiled and decoded.nbytes <= CACHE_BYTES // 2:
            self._strips[name] = piece
            self._strip_bytes += piece.nbytes
            while self._strip_bytes > CACHE_BYTES:
                self._strip_bytes -= self._strips.popitem(last=False)[1].nbytes
        return piece

    def _decode(self, key: Any, data: bytes, index: int, options: dict[str, Any]) -> NDArray:
        """One tile or strip; refuses data that end early."""
        compression, reverse = int(key.compression), key.fillorder == 2
        size = math.prod(key.chunks) * key.dtype.itemsize
        abbreviated = bool(options.get("jpegheader"))
        tables = options.get("jpegtables") or b""
        reason = tiffstreams.defect(
            data, compression, size, reverse_bits=reverse, abbreviated=abbreviated, tables=tables
        )
        if reason:
            raise ImageError(f"Cannot read {self.path}: damaged, {reason}.")

        def decode(encoded: bytes) -> NDArray:
            return np.asarray(key.decode(encoded, index, **options)[0])

        decoded = decode(data)
        self._check_decoded(key, data, decoded)
        if tiffstreams.runs_out(data, compression, decoded, decode, reverse_bits=reverse):
            raise ImageError(f"Cannot read {self.path}: damaged, a fax piece of it is too short.")
        return decoded

    def _check_decoded(self, key: Any, data: bytes, decoded: NDArray) -> None:
        """Refuse a piece whose data are of another type, or more, than its page says."""
        compression = int(key.compression)
        typed = compression in _JPEG or compression in tifffile.TIFF.IMAGE_COMPRESSIONS
        if typed and decoded.dtype.newbyteorder("=") != self.dtype.newbyteorder("="):
            raise ImageError(f"Cannot read {self.path}: damaged, a piece of it holds {decoded.dtype}.")
        if compression in _JPEG and tiffstreams.exceeds(data, key.chunks[0], key.chunks[1]):
            raise ImageError(
                f"Cannot read {self.path}: damaged, a JPEG piece of it is larger than its place."
            )
        # Of too many bytes these decoders give the first; once a page is enough to know that its sizes lie.
        if compression in _CUT_OFF and key not in self._measured:
            self._measured.append(key)
            if piece_bytes(key) <= MEASURED_BYTES:
                encoded = imagecodecs.bitorder_decode(data) if key.fillorder == 2 else data
                if is_too_long(key, len(tifffile.TIFF.DECOMPRESSORS[compression](encoded))):
                    raise ImageError(f"Cannot read {self.path}: damaged, its data are more than its pixels.")

    def _read_raw(self, series: Any, number: int, box: Box, planar: bool, out: NDArray) -> NDArray:
        """Part of a page of a file whose pixels lie uncompressed one after another."""
        key = series.keyframe
        dtype = np.dtype(self.file.byteorder + key.dtype.char)
        height, width = key.imagelength, key.imagewidth
        inner = 1 if planar else self.samples
        row = width * inner * dtype.itemsize
        for plane in range(self.samples if planar else 1):
            first = (number * (self.samples if planar else 1) + plane) * height + box.y0
            start, count = series.dataoffset + first * row, (box.y1 - box.y0) * row
            if self.remote:
                (data,) = paths.read_ranges(self.path, [(start, count)])
            else:
                handle = key.parent.filehandle  # of another file, where several make an OME-TIFF
                if handle.closed:
                    handle.open()
                handle.seek(start)
                data = handle.read(count)
            if len(data) != count:
                raise ImageError(f"Cannot read {self.path}: the file is truncated.")
            rows = np.frombuffer(data, dtype).reshape(-1, width, inner)[:, box.x0 : box.x1]
            if planar:
                out[plane] = rows[..., 0]
            else:
                out[:] = np.moveaxis(rows, 2, 0)
        return out
