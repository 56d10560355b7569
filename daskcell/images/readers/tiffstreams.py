"""Checks that the compressed bytes of a tile or strip are complete.

Decoders of JPEG, JPEG 2000, WebP and fax do not mind data that end early or have holes (of a file copied in
blocks, some of which never came): they fill up with grey or white, which would pass for an image. What has a
checksum (deflate, PNG, LZMA) or a length (LZW, PackBits, Zstandard) is checked by decoding.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from numpy.typing import NDArray

MOST_PADDING = 64
"""Consecutive zeros that are accepted as padding at the end; more were never written."""
TAIL = 512
"""Bytes after the end of a JPEG stream that are accepted."""

_RLE, _FAX3, _FAX4, _LZW, _PACKBITS = 2, 3, 4, 5, 32773
_JPEG = {7, 33007, 34892}
_JPEG_2000 = {33003, 33004, 33005, 34712}
_ZSTD = {34926, 50000}
_WEBP = {34927, 50001}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers that are followed by the size."""
_BASELINE, _HUFFMAN, _SCAN = {0xC0, 0xC1}, 0xC4, 0xDA
_END_OF_FAX = re.compile("000000000001" * 2 + "0*$")
_RUNS = "011111" * 300
"""Short white and black runs, as fax codes."""
_ZEROS_OF_A_CODE = 4
"""No fax code ends in more zero bits."""


def defect(
    data: bytes, compression: int, size: int, *, reverse_bits: bool, abbreviated: bool, tables: bytes = b""
) -> str:
    """What is wrong with `data`, as the end of a sentence; empty if nothing is found.

    Parameters
    ----------
    size
        Number of bytes it decodes to.
    reverse_bits
        Each byte holds its first bit last (fill order 2).
    abbreviated
        A part of a JPEG stream without an end of its own (NDPI).
    tables
        JPEG tables that stand elsewhere in the file.
    """
    first = 0
    if compression in _JPEG:
        if abbreviated:
            return ""
        data = data.rstrip(b"\0")
        if data.rfind(b"\xff\xd9", max(0, len(data) - TAIL)) < 0:
            return "a JPEG piece of it has no end"
        first = _scan(data, tables)
    elif compression == _FAX4:
        if not _END_OF_FAX.search(_bits(data[-16:], reverse_bits)):
            return "a fax piece of it has no end"
        return ""
    elif compression in _WEBP and data[:4] == b"RIFF":
        data = data[: int.from_bytes(data[4:8], "little") + 8]
    if compression in _JPEG | _JPEG_2000 | _WEBP | _ZSTD | {_LZW, _PACKBITS}:
        # Zstandard keeps what does not shrink by 1/64 as it is.
        zeros = max(MOST_PADDING, size // 32 if compression in _ZSTD else 0) + 1
        if data.find(bytes(zeros), first) >= 0:
            return f"a compressed piece of it holds {zeros} zeros in a row, which were never written"
    return ""


def has_hole(data: bytes) -> bool:
    """Whether the pixels of a whole JPEG file are interrupted by zeros that were never written."""
    first = _scan(data, b"")
    return data.find(bytes(MOST_PADDING + 1), first, max(data.find(b"\xff\xd9", first), first)) >= 0


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Markers of a JPEG stream up to its first scan, and where what belongs to each begins."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filled up
            at += 1
            continue
        yield marker, at + 4
        if marker == _SCAN:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _scan(data: bytes, tables: bytes) -> int:
    """Where zeros in a JPEG stream mean that data are missing; its end where they may be a blank image.

    A zero bit continues no block of a blank image unless the code for "nothing more in this block" is
    zeros, in every table.
    """
    baseline, blank, first = False, True, len(data)
    for stream in (tables, data):
        for marker, at in _segments(stream):
            if marker in _BASELINE:
                baseline = True
            elif marker == _HUFFMAN:
                end = at - 2 + int.from_bytes(stream[at - 2 : at], "big")
                while at + 17 <= end:
                    if stream[at] >> 4:  # a table of AC coefficients
                        blank = blank and stream[at + 17] in (0x00, 0xF0)
                    at += 17 + sum(stream[at + 1 : at + 17])
            elif marker == _SCAN and stream is data:
                first = at
    return first if baseline and not blank else len(data)


def frames(data: bytes) -> Iterator[tuple[int, int]]:
    """Markers of the frames of a JPEG stream, and where their bits, height, width and colours stand."""
    for marker, at in _segments(data):
        if marker in _FRAMES and at + 6 <= len(data):
            yield marker, at


def exceeds(data: bytes, rows: int, columns: int) -> bool:
    """Whether JPEG `data` hold more than `rows` x `columns`, each rounded up to whole blocks of 16.

    False where the size is not in them (NDPI).
    """
    for _, at in frames(data):
        height, width = struct.unpack_from(">HH", data, at + 1)
        return height > -(-rows // 16) * 16 or width > -(-columns // 16) * 16
    return False


def runs_out(
    data: bytes, compression: int, pixels: NDArray, decode: Callable[[bytes], NDArray], *, reverse_bits: bool
) -> bool:
    """Whether fax `data` without an end mark end early: what follows them changes the `pixels` they gave.

    A decoder that has all rows reads no further, whatever follows; one that ran out takes what it is given.
    The data may end within a code, so runs are tried from each of their bits.
    """
    if compression not in (_RLE, _FAX3):
        return False
    kept = (_reversed(data) if reverse_bits else data).rstrip(b"\0") or b"\0"
    last = f"{kept[-1]:08b}"
    zeros = "0" * max(0, _ZEROS_OF_A_CODE - len(last) + len(last.rstrip("0")))
    for first in range(6):
        more = zeros + _RUNS[first:]
        more += "0" * (-len(more) % 8)
        longer = kept + int(more, 2).to_bytes(len(more) // 8, "big")
        other = decode(_reversed(longer) if reverse_bits else longer)
        if other.shape != pixels.shape or (other != pixels).any():
            return True
    return False


def _bits(data: bytes, reverse: bool) -> str:
    return "".join(f"{byte:08b}" for byte in (_reversed(data) if reverse else data))


def _reversed(data: bytes) -> bytes:
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
