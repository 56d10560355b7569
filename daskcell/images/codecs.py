"""Who decodes chunks: zarr's own pipeline, or `zarrs` (Rust) where the extra ``fast`` is installed.

Only for reading. zarrs 0.2.3 writes no file for a block of nothing but zeros, whatever
``array.write_empty_chunks`` says, and removes one that is there; a file that is absent must mean "not
written". `shards` writes.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import zarr
from zarr.core.metadata import ArrayV3Metadata

from daskcell.storage import paths

_CODECS = {"bytes", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed", "transpose"}
"""Of Zarr 3, that zarrs decodes as zarr does."""


@cache
def zarrs_is_there() -> bool:
    return find_spec("zarrs") is not None


def _is_for_zarrs(array: zarr.Array) -> bool:
    """Whether zarrs decodes the chunks of `array`: it takes the bytes of this machine only, row by row.

    What it cannot do it finds out when pixels are read, which is too late for another pipeline.
    """
    metadata = array.metadata
    if isinstance(metadata, ArrayV3Metadata):
        return all(codec.to_dict()["name"] in _CODECS for codec in metadata.codecs)
    name = metadata.compressor.codec_id if metadata.compressor else "none"
    return (
        array.dtype.isnative
        and metadata.order == "C"
        and not metadata.filters
        and name in ("none", "blosc", "zstd", "gzip", "zlib")
    )


def read_fast(array: zarr.Array, path: str) -> zarr.Array:
    """`array`, which lies below `path`, decoded by zarrs from now on, if it is there and the path on disk.

    zarr's configuration could say so while an array is opened, but it belongs to the process: of two threads
    that change it at a time the second would put the first's value back, and everything opened later,
    for writing too, would get zarrs. Its threads are zarr's ``threading.max_workers``.
    """
    if not paths.is_remote(path) and zarrs_is_there() and _is_for_zarrs(array):
        from zarrs import ZarrsCodecPipeline

        opened = array.async_array
        pipeline = ZarrsCodecPipeline.from_array_metadata_and_store(opened.metadata, opened.store)
        object.__setattr__(opened, "codec_pipeline", pipeline)
    return array
