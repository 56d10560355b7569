"""Shared memory for pixels from the reader process, reused.

The system clears every new page, maps it in both processes and unmaps it again, which takes half as long as
decoding the pixels. So a buffer is used again as soon as its array is no longer referenced.
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

KEPT = 2
"""Free buffers that are kept."""
KEPT_BYTES = 128 * 2**20
"""Larger ones are not kept: they are rare, and a worker needs the memory."""


class SharedBuffer:
    """Memory of a file without a name, which needs no cleaning up. Only on Linux (`is_available`)."""

    def __init__(self, size: int) -> None:
        self._handle = os.memfd_create("daskcell")
        try:
            os.ftruncate(self._handle, size)
            self.memory = mmap.mmap(self._handle, size)
        except BaseException:
            os.close(self._handle)
            raise
        self.path = f"/proc/{os.getpid()}/fd/{self._handle}"
        """Path by which the other process opens it."""
        weakref.finalize(self, os.close, self._handle)


def is_available() -> bool:
    return hasattr(os, "memfd_create")


class BufferPool:
    """Free buffers. Needs no lock: its list is changed in single steps, also by the garbage collector."""

    def __init__(self) -> None:
        self._free: list[SharedBuffer] = []

    def acquire(self, size: int) -> SharedBuffer:
        """A buffer of at least `size` bytes, which comes back to the pool once it is an `array`."""
        while self._free:
            buffer = self._free.pop()
            if len(buffer.memory) >= size:
                return buffer
        return SharedBuffer(size)

    def array(self, buffer: SharedBuffer, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
        """The content of `buffer`, which is free again when the array and all its views are gone."""
        flat = np.frombuffer(buffer.memory, dtype, int(np.prod(shape)))
        weakref.finalize(flat, self._release, buffer).atexit = False
        return flat.reshape(shape)  # `flat` is the base of this and of every view of it

    def _release(self, buffer: SharedBuffer) -> None:
        if len(buffer.memory) <= KEPT_BYTES and len(self._free) < KEPT:
            self._free.append(buffer)
