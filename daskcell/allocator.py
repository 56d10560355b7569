"""What becomes of the memory a process frees: kept for the next array, up to a bound (glibc's allocator).

Memory that goes back to the system for every array, and is cleared when it comes again, takes half of a
network's time. So it is with the 64 KiB that Dask's nannies set, and so with the chunks of a picture.
"""

from __future__ import annotations

import ctypes
import os
import platform

VARIABLES = {"MALLOC_MMAP_THRESHOLD_": 32 * 2**20, "MALLOC_TRIM_THRESHOLD_": 256 * 2**20}
"""Bytes: from which an array gets memory of its own; of free memory that stays with the process."""
_OPTIONS = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
"""Their numbers in ``malloc.h``."""
_SET_BY_DASK = {"MALLOC_TRIM_THRESHOLD_": "65536"}


def keep_freed_memory() -> None:
    """Set this process's allocator to `VARIABLES`; what the user set stays, and so does another allocator."""
    if platform.libc_ver()[0] != "glibc":
        return
    for name, size in VARIABLES.items():
        if os.environ.get(name) in (None, _SET_BY_DASK.get(name)):
            ctypes.CDLL(None).mallopt(_OPTIONS[name], size)
