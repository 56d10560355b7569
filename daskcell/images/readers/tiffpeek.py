"""A glance at the first directory of a TIFF file: most files of a large folder are single pictures.

Opening a file with tifffile, in a process that may die, takes milliseconds, and several requests on object
storage; this takes one small piece of the file. It decodes nothing, and is only believed where it says no.
"""

from __future__ import annotations

import struct

from daskcell.errors import DaskcellError
from daskcell.storage import paths

_FORMATS = {
    b"II*\0": ("<", "H", "I"),
    b"MM\0*": (">", "H", "I"),
    b"II+\0": ("<", "Q", "Q"),
    b"MM\0+": (">", "Q", "Q"),
}
"""Order of bytes, and how the number of tags and how an offset are stored."""
_SAY_PLANES = (b"<OME", b"openmicroscopy", b"ImageJ=", b"truncated", b"SCANIMAGE", b"MetaMorph")
_DESCRIPTION = 270
_STACKS = {33628, 33629, 34412, 51123}
"""Tags of STK, LSM and Micro-Manager files, which count their planes themselves."""


def may_be_stack(path: str) -> bool:
    """Whether a TIFF file may hold several time points or planes; False only for a single plain page."""
    try:
        with paths.open_file(path) as file:
            head = file.read(16)
            order, tag_count, size = _FORMATS[head[:4]]
            step = struct.calcsize(order + size)
            file.seek(struct.unpack_from(order + size, head, step)[0])
            (count,) = struct.unpack(order + tag_count, file.read(struct.calcsize(order + tag_count)))
            width = 4 + 2 * step
            entries = file.read(min(count, 1000) * width)
            (following,) = struct.unpack(order + size, file.read(step))
            tags = {}
            for at in range(0, len(entries), width):
                tag, _, length = struct.unpack_from(order + "HH" + size, entries, at)
                tags[tag] = length, entries[at + width - step : at + width]
            if following or len(tags) != count or _STACKS & tags.keys():
                return True
            length, place = tags.get(_DESCRIPTION, (0, b""))
            if length <= len(place):
                return False
            file.seek(struct.unpack(order + size, place)[0])
            text = file.read(min(length, 4096))
            return any(word in text for word in _SAY_PLANES)
    except (OSError, KeyError, ValueError, struct.error, DaskcellError):
        return True  # whoever opens it says what is wrong
