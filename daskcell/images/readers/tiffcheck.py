"""Checks of TIFF files before anything is decoded.

tifffile opens many damaged files, and gives zeros for what is not there: that must not be taken for pixels.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import tifffile

from daskcell.errors import ImageError

_TYPE_BYTES = {int(kind): struct.calcsize("<" + form) for kind, form in tifffile.TIFF.DATA_FORMATS.items()}
"""Size of a value of each type a tag can have."""
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_MEANING = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 284, 292, 317, 320, 322, 323),
    *(324, 325, 330, 332, 338, 339, 347, 529, 530, 532, 32997),
}
"""Tags without which pixels would be other ones, or in another order."""
_REQUIRED = {256, 257, 258, 262}
_KNOWN = {
    "photometric": frozenset(map(int, tifffile.PHOTOMETRIC)),
    "planarconfig": frozenset((1, 2)),
    "fillorder": frozenset((1, 2)),
    "sampleformat": frozenset(range(1, 7)),
}
"""Values of tags that must be understood."""
_RGB, _PALETTE, _YCBCR = 2, 3, 6
_FAX = {2, 3, 4}
_PRIVATE = 32768
"""Tags from this number on are private."""
_SLACK = 64
"""Bytes that a strip or tile may hold beyond its pixels and an eighth of them."""


Form = tuple[int, ...]
"""Sides, bits, compression and so on of a page."""
Forms = dict[tuple[Any, int], Form]
"""By file and place in it."""
_FORM = {
    256: 0,
    257: 0,
    258: 1,
    259: 1,
    277: 1,
    284: 1,
    317: 1,
    322: 0,
    323: 0,
    339: 1,
    278: 2**32 - 1,
    279: 0,
}
"""Tags that give it, with their defaults; rows of a strip, and the bytes of a single one, come last."""


def check_pages(file: Any, path: str) -> Forms:
    """Refuse a file whose chain of pages breaks off or leads back, or whose tags are not all there.

    tifffile would leave out what follows, and read pixels as if there were no such tag. Gives the form of the
    page at each place.
    """
    handle, tiff = file.filehandle, file.tiff
    seen: Forms = {}
    if tiff.is_ndpi:  # whose last page points to vendor data
        return seen
    handle.seek(4 if tiff.offsetsize == 4 else 8)
    (offset,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    while offset:
        if (file, offset) in seen:
            raise ImageError(f"Cannot read {path}: damaged, a page points back to one before.")
        place = file, offset
        offset, seen[place] = _read_directory(handle, tiff, offset, path)
    return seen


def _read_directory(handle: Any, tiff: Any, offset: int, path: str) -> tuple[int, Form]:
    """Where the page after the one at `offset` is (0 after the last), and the form of this one.

    Refuses tags that cannot be read.
    """
    handle.seek(min(offset, handle.size))
    count = handle.read(tiff.tagnosize)
    entries = following = b""
    if len(count) == tiff.tagnosize:
        (tags,) = struct.unpack(tiff.tagnoformat, count)
        entries = handle.read(min(tags * tiff.tagsize, handle.size))
        following = handle.read(tiff.offsetsize)
    if len(following) < tiff.offsetsize:
        raise ImageError(f"Cannot read {path}: the file is truncated, a page lies beyond its end.")
    codes = [code for code, *_ in struct.iter_unpack(tiff.tagheaderformat, entries)]
    strange = [code for code in codes if code < _PRIVATE and code not in tifffile.TIFF.TAGS]
    # Some writers do not sort tags; what stands out of order and is no tag at all was another one.
    if codes != sorted(codes) and (strange or not _REQUIRED.issubset(codes)):
        raise ImageError(f"Cannot read {path}: damaged, its tags are out of order and some are lost.")
    form = dict(_FORM)
    for code, kind, length, value in struct.iter_unpack(tiff.tagheaderformat, entries):
        if code in _FORM and length == 1 and kind in _INTEGERS:
            (form[code],) = struct.unpack_from(tiff.byteorder + _INTEGERS[kind], value)
        if code not in _MEANING:
            continue
        if kind not in _TYPE_BYTES:
            raise ImageError(f"Cannot read {path}: damaged, its tag {code} has no known type ({kind}).")
        size = length * _TYPE_BYTES[kind]
        if size > len(value) and struct.unpack(tiff.offsetformat, value)[0] + size > handle.size:
            raise ImageError(
                f"Cannot read {path}: the file is truncated, its tag {code} lies beyond its end."
            )
    (next_offset,) = struct.unpack(tiff.offsetformat, following)
    form[278] = min(form[278], form[257])
    if form[259] != 1:
        form[279] = 0
    return int(next_offset), tuple(form.values())


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
        raise ImageError(f"Cannot read {path}: its image has no pixels ({page.shape}).")
    if 262 not in page.tags or any(getattr(page, name) not in known for name, known in _KNOWN.items()):
        said = ", ".join(f"{name} {getattr(page, name)!s}" for name in _KNOWN)
        raise ImageError(f"Cannot read {path}: its tags do not tell what its numbers mean ({said}).")
    colours = {_PALETTE: 320 in page.tags, _RGB: page.samplesperpixel >= 3, _YCBCR: page.samplesperpixel >= 3}
    if not colours.get(int(page.photometric), True):
        raise ImageError(f"Cannot read {path}: it is said to be in colours, which are not there.")
    if page.compression in _FAX and page.bitspersample != 1:
        raise ImageError(f"Cannot read {path}: a fax has one bit a pixel, not {page.bitspersample}.")
    if page.imagedepth > 1:
        raise ImageError(f"Cannot read {path}: volumes within one page are not supported.")
    if page.dtype.kind not in "buif" or (page.dtype.kind in "iu" and page.dtype.itemsize > 4):
        raise ImageError(f"Cannot read {path}: pixels of type {page.dtype} are not intensities.")


def check_data(series: Any, leading: int, path: str, forms: Forms) -> None:
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
            f"Cannot read {path}: it claims an image of {total / 2**30:.0f} GiB in a file of "
            f"{file.size} bytes."
        )
    missing = sum(page is None for page in series.pages)
    if missing:
        raise ImageError(
            f"Cannot read {path}: {missing} of {expected} pages are not there, or in a file that is missing."
        )
    for page in series.pages:
        _check_segments(page, path)
        # tifffile reads of most pages where they are only, and takes the rest from the first.
        if page is not key and _form(page, forms, path) != _form(key, forms, path):
            raise ImageError(f"Cannot read {path}: damaged, its pages differ in size or kind of pixels.")


def _form(page: Any, forms: Forms, path: str) -> Form:
    file = page.parent
    if file.tiff.is_ndpi or page.is_virtual:
        return ()
    place = file, page.offset
    if place not in forms:  # of a smaller level, or of another file
        if file.filehandle.closed:  # files of a multi-file OME-TIFF are closed between reads
            file.filehandle.open()
        forms[place] = _read_directory(file.filehandle, file.tiff, page.offset, path)[1]
    return forms[place]


def piece_bytes(page: Any) -> int:
    """Uncompressed bytes of a whole strip or tile."""
    rows, columns = page.chunks[:2]
    bits = page.bitspersample
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    row = columns * (sum(bits) if isinstance(bits, tuple) else bits * samples)
    return int(rows * -(-row // 8))


def is_too_long(page: Any, count: int) -> bool:
    """Whether `count` uncompressed bytes are clearly more than any strip or tile of a page needs."""
    need = piece_bytes(page)
    return count > need + max(_SLACK, need // 8)


def _check_segments(page: Any, path: str) -> None:
    key = page.keyframe
    segments = math.prod(key.chunked)
    offsets, counts = page.dataoffsets, page.databytecounts
    tag = page is key and (page.tags.get(273) or page.tags.get(324))
    if tag and tag.count > segments and not (page.parent.is_stk or page.parent.is_lsm):
        raise ImageError(f"Cannot read {path}: damaged, it holds {tag.count} pieces and needs {segments}.")
    if len(offsets) < segments or len(counts) < segments:
        raise ImageError(
            f"Cannot read {path}: {segments - min(len(offsets), len(counts))} of {segments} "
            "pieces are missing."
        )
    if key.compression == 1 and is_too_long(key, max(counts[:segments])):
        raise ImageError(f"Cannot read {path}: damaged, its data are more than its pixels need.")
    end = page.parent.filehandle.size
    if not any(counts[:segments]):
        raise ImageError(f"Cannot read {path}: a page holds no data at all.")
    for offset, count in zip(offsets[:segments], counts[:segments], strict=True):
        if offset == 0 and count == 0:
            continue  # a legal empty tile: zeros
        if count == 0 or offset < 8:
            raise ImageError(f"Cannot read {path}: a piece of the image is empty (0 bytes).")
        if offset + count > end:
            raise ImageError(f"Cannot read {path}: the file is truncated.")
