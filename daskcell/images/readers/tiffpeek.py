"""A look at the first directory of a TIFF file: most files of a large folder are single images.

Opening a file with tifffile, in the reader process, takes milliseconds, and several requests on object
storage; this reads one small piece of the file. It decodes nothing.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

from daskcell.errors import DaskcellError
from daskcell.storage import paths

_FORMATS = {
    b"II*\0": ("<", "H", "I"),
    b"MM\0*": (">", "H", "I"),
    b"II+\0": ("<", "Q", "Q"),
    b"MM\0+": (">", "Q", "Q"),
}
"""Byte order, and how the number of tags and how an offset are stored."""
_SAY_PLANES = (b"<OME", b"openmicroscopy", b"ImageJ=", b"truncated", b"SCANIMAGE", b"MetaMorph")
_DESCRIPTION, _SOFTWARE = 270, 305
_STACKS = {33628, 33629, 34412, 51123}
"""Tags of STK, LSM and Micro-Manager files, which have a number of planes of their own."""


class Peek(NamedTuple):
    """What the first directory of a TIFF file says."""

    may_be_stack: bool
    """Whether the file may hold several time points or planes; False only for a single plain page."""
    software: str
    """What program wrote it; empty if it does not say."""


def may_be_stack(path: str) -> bool:
    """Whether a TIFF file may hold several time points or planes; False only for a single plain page."""
    return peek(path).may_be_stack


@cache
def peek(path: str) -> Peek:
    """Read the first directory of a file. The cache is for one search, which clears it."""
    software = ""
    try:
        with paths.open_file(path) as file:
            head = file.read(16)
            order, tag_count, size = _FORMATS[head[:4]]
            step = struct.calcsize(order + size)
            file.seek(struct.unpack_from(order + size, head, step)[0])
            (count,) = struct.unpack(order + tag_count, file.read(struct.calcsize(order + tag_count)))
            width = 4 + 2 * step
            entries = file.read(min(count, 1000) * width)
            following = file.read(step)
            tags = {}
            for at in range(0, len(entries), width):
                tag, _, length = struct.unpack_from(order + "HH" + size, entries, at)
                tags[tag] = length, entries[at + width - step : at + width]

            def text(tag: int) -> bytes:
                length, place = tags.get(tag, (0, b""))
                if length <= len(place):
                    return place[:length]
                file.seek(struct.unpack(order + size, place)[0])
                return file.read(min(length, 4096))

            software = text(_SOFTWARE).rstrip(b"\0").decode("latin-1")
            if struct.unpack(order + size, following)[0] or len(tags) != count or _STACKS & tags.keys():
                return Peek(True, software)
            description = text(_DESCRIPTION)
            return Peek(any(word in description for word in _SAY_PLANES), software)
    except (OSError, KeyError, ValueError, struct.error, DaskcellError):
        return Peek(True, software)  # opening it says what is wrong
