"""Whether the compressed bytes of one tile or strip are all there.

Decoders of JPEG, JPEG 2000, WebP and fax do not mind data that end early: they fill the rest with grey or
white, which would pass for a picture. What has a checksum (deflate, PNG, LZMA) or a length that tells (LZW,
PackBits, Zstandard) is told by decoding.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from numpy.typing import NDArray

MOST_PADDING = 64
"""Zeros at the end that are taken for filling up; more were never written."""
TAIL = 512
"""Bytes after the end of a JPEG stream that are let pass."""

_RLE, _FAX3, _FAX4, _LZW = 2, 3, 4, 5
_JPEG = {7, 33007, 34892}
_JPEG_2000 = {33003, 33004, 33005, 34712}
_ZSTD = {34926, 50000}
_WEBP = {34927, 50001}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers that are followed by the size."""
_END_OF_FAX = re.compile("000000000001" * 2 + "0*$")
_RUNS = "011111" * 300
"""Short white and black runs, as fax codes."""
_ZEROS_OF_A_CODE = 4
"""No fax code ends in more zero bits."""


def defect(data: bytes, compression: int, size: int, *, reverse_bits: bool, abbreviated: bool) -> str:
    """What is wrong with the end of `data`, as the end of a sentence; empty if nothing can be told.

    Parameters
    ----------
    size
        Number of bytes it decodes to.
    reverse_bits
        Each byte holds its first bit last (fill order 2).
    abbreviated
        A part of a JPEG stream without an end of its own (NDPI).
    """
    if compression in _JPEG and not abbreviated:
        end = data.rstrip(b"\0")
        if end.rfind(b"\xff\xd9", max(0, len(end) - TAIL)) < 0:
            return "a JPEG piece of it has no end"
    elif compression == _FAX4:
        if not _END_OF_FAX.search(_bits(data[-16:], reverse_bits)):
            return "a fax piece of it has no end"
    elif compression in _WEBP and data[:4] == b"RIFF":
        data = data[: int.from_bytes(data[4:8], "little") + 8]
    if compression in _JPEG_2000 | _WEBP | _ZSTD | {_LZW}:
        zeros = len(data) - len(data.rstrip(b"\0"))
        # Zstandard keeps what does not shrink by 1/64 as it is.
        if zeros > max(MOST_PADDING, size // 32 if compression in _ZSTD else 0):
            return f"a compressed piece of it ends in {zeros} zeros"
    return ""


def exceeds(data: bytes, rows: int, columns: int) -> bool:
    """Whether JPEG `data` hold more than `rows` x `columns`, each rounded up to whole blocks of 16.

    False where the size is not in them (NDPI).
    """
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height > -(-rows // 16) * 16 or width > -(-columns // 16) * 16
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big") if marker != 0xFF else 1
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
