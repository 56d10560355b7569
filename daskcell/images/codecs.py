"""Who decodes chunks: zarr's own pipeline, or `zarrs` (Rust) where the extra ``fast`` is installed.

Only for reading. zarrs 0.2.3 writes no file for a block of nothing but zeros, whatever
``array.write_empty_chunks`` says, and removes one that is there; a file that is absent must mean "not
written". `shards` writes.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import zarr

from daskcell import places


@cache
def zarrs_is_there() -> bool:
    return find_spec("zarrs") is not None


def read_fast(array: zarr.Array, path: str) -> zarr.Array:
    """`array`, which lies below `path`, decoded by zarrs from now on, if it is there and the path on disk.

    zarr's configuration could say so while an array is opened, but it belongs to the process: of two threads
    that change it at a time the second would put the first's value back, and everything opened later,
    for writing too, would get zarrs. Its threads are zarr's ``threading.max_workers``.
    """
    if not places.is_remote(path) and zarrs_is_there():
        from zarrs import ZarrsCodecPipeline

        opened = array.async_array
        pipeline = ZarrsCodecPipeline.from_array_metadata_and_store(opened.metadata, opened.store)
        object.__setattr__(opened, "codec_pipeline", pipeline)
    return array
