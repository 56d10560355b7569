"""Who decodes chunks: zarr's own pipeline, or `zarrs` (Rust) where the extra ``fast`` is installed.

Only for reading. zarrs 0.2.3 writes no file for a block of nothing but zeros, whatever
``array.write_empty_chunks`` says, and removes one that is there; a file that is absent must mean "not
written". `shards` writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import zarr

from daskcell import places


@cache
def zarrs_is_there() -> bool:
    return find_spec("zarrs") is not None


@contextlib.contextmanager
def fast_reading(path: str) -> Iterator[None]:
    """Arrays below `path` that are opened within are read with zarrs, if it is there and they are on disk."""
    if places.is_remote(path) or not zarrs_is_there():
        yield
        return
    settings: dict[str, object] = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    threads = os.environ.get("OMP_NUM_THREADS", "")  # a worker's share, as `compute.threads` sets it
    if threads.isdigit() and int(threads):
        settings["threading.max_workers"] = int(threads)
    with zarr.config.set(settings):
        yield
