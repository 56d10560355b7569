"""Memory that two processes see, lent and taken back.

The system clears every new page, maps it on both sides and unmaps it again, which for pixels takes half as
long as decoding them. So a sheet whose array nobody looks at any more is lent again.
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

KEPT = 2
"""Sheets in waiting."""
KEPT_BYTES = 128 * 2**20
"""Larger ones are not kept: they are rare, and a worker has other uses for the memory."""


class Sheet:
    """Memory of a file without a name, which nobody has to clean up. Only Linux has that (`possible`)."""

    def __init__(self, size: int) -> None:
        self._handle = os.memfd_create("daskcell")
        try:
            os.ftruncate(self._handle, size)
            self.memory = mmap.mmap(self._handle, size)
        except BaseException:
            os.close(self._handle)
            raise
        self.path = f"/proc/{os.getpid()}/fd/{self._handle}"
        """Under which the other process opens it."""
        weakref.finalize(self, os.close, self._handle)


def possible() -> bool:
    return hasattr(os, "memfd_create")


class Sheets:
    """Lends sheets. Not locked: its list is changed in single steps, also when garbage is collected."""

    def __init__(self) -> None:
        self._waiting: list[Sheet] = []

    def lend(self, size: int) -> Sheet:
        """A sheet of at least `size` bytes; who does not make an `array` of it drops it."""
        while self._waiting:
            sheet = self._waiting.pop()
            if len(sheet.memory) >= size:
                return sheet
        return Sheet(size)

    def array(self, sheet: Sheet, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
        """What was written into `sheet`, which is lent again when the array and all its views are gone."""
        flat = np.frombuffer(sheet.memory, dtype, int(np.prod(shape)))
        weakref.finalize(flat, self._take_back, sheet).atexit = False
        return flat.reshape(shape)  # and every view of it: their base is `flat`

    def _take_back(self, sheet: Sheet) -> None:
        if len(sheet.memory) <= KEPT_BYTES and len(self._waiting) < KEPT:
            self._waiting.append(sheet)
