"""What is wrong with a TIFF file, found before anything is decoded.

tifffile opens many damaged files, and gives zeros for what is not there: that must not pass for a picture.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from daskcell.errors import ImageError


def check_pages(file: Any, path: str) -> None:
    """Refuse a file whose chain of pages breaks off, or leads back: tifffile would leave out what follows."""
    handle, tiff = file.filehandle, file.tiff
    if tiff.is_ndpi:  # whose last page points to vendor data
        return
    seen: set[int] = set()
    handle.seek(4 if tiff.offsetsize == 4 else 8)
    at = tiff.offsetsize
    (offset,) = struct.unpack(tiff.offsetformat, handle.read(at))
    while offset:
        if offset in seen:
            raise ImageError(f"Cannot read {path}: damaged, a page points back to one before.")
        seen.add(offset)
        count = b""
        if offset < handle.size:
            handle.seek(offset)
            count = handle.read(tiff.tagnosize)
        if len(count) == tiff.tagnosize:
            (tags,) = struct.unpack(tiff.tagnoformat, count)
            handle.seek(offset + tiff.tagnosize + tags * tiff.tagsize)
            following = handle.read(at)
        if len(count) < tiff.tagnosize or len(following) < at:
            raise ImageError(f"Cannot read {path}: the file is truncated, a page lies beyond its end.")
        (offset,) = struct.unpack(tiff.offsetformat, following)


def check_page(page: Any, path: str) -> None:
    """Refuse a page whose samples are no intensities."""
    if page.dtype is None:
        raise ImageError(f"Cannot read {path}: pixels of {page.bitspersample} bits are not supported.")
    bits = page.tags.get(258)
    if bits is not None and bits.count not in (1, page.samplesperpixel):
        raise ImageError(
            f"Cannot read {path}: it gives the bits of {bits.count} samples, but has {page.samplesperpixel}."
        )
    if min(page.imagelength, page.imagewidth) < 1 or 0 in page.shaped:
        raise ImageError(f"Cannot read {path}: its picture has no pixels ({page.shape}).")
    if page.imagedepth > 1:
        raise ImageError(f"Cannot read {path}: volumes within one page are not supported.")
    if page.dtype.kind not in "buif" or (page.dtype.kind in "iu" and page.dtype.itemsize > 4):
        raise ImageError(f"Cannot read {path}: pixels of type {page.dtype} are not intensities.")


def check_data(series: Any, leading: int, path: str) -> None:
    """Refuse a file whose data cannot all be there; nothing is decoded."""
    expected = math.prod(series.shape[:leading])
    key = series.keyframe
    file = key.parent.filehandle
    check_page(key, path)
    if series.dataoffset is not None:
        size = math.prod(series.shape) * key.dtype.itemsize
        if series.dataoffset + size > file.size:
            raise ImageError(f"Cannot read {path}: the file is truncated.")
        _check_segments(key, path)
        return
    if len(series.pages) != expected:
        raise ImageError(
            f"Cannot read {path}: it should hold {expected} pages by its metadata, but holds "
            f"{len(series.pages)}."
        )
    total = math.prod(series.shape) * key.dtype.itemsize
    if total > 2**31 and total > 20_000 * file.size:
        raise ImageError(
            f"Cannot read {path}: it claims a picture of {total / 2**30:.0f} GiB in a file of "
            f"{file.size} bytes."
        )
    missing = sum(page is None for page in series.pages)
    if missing:
        raise ImageError(
            f"Cannot read {path}: {missing} of {expected} pages are not there, or in a file that is missing."
        )
    for page in series.pages:
        _check_segments(page, path)


def _check_segments(page: Any, path: str) -> None:
    key = page.keyframe
    segments = math.prod(key.chunked)
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) < segments or len(counts) < segments:
        raise ImageError(
            f"Cannot read {path}: {segments - min(len(offsets), len(counts))} of {segments} "
            "pieces are missing."
        )
    end = page.parent.filehandle.size
    if not any(counts[:segments]):
        raise ImageError(f"Cannot read {path}: a page holds no data at all.")
    for offset, count in zip(offsets[:segments], counts[:segments], strict=True):
        if offset == 0 and count == 0:
            continue  # a legal empty tile: zeros
        if count == 0 or offset < 8:
            raise ImageError(f"Cannot read {path}: a piece of the picture is empty (0 bytes).")
        if offset + count > end:
            raise ImageError(f"Cannot read {path}: the file is truncated.")
