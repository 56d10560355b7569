"""Writing whole files (shards) of a Zarr array, each once.

zarr-python needs several copies, an event loop and a thread for every chunk, which takes as long as a fast
codec; and `zarrs` leaves out a shard of zeros only, which then cannot be told from one that was not written.
So files are assembled here as the format says
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/).

    | chunk | chunk | ... | chunk | index: (offset, length) of each chunk, 64 bits | CRC-32C |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from daskcell.geometry import Box

Position = tuple[int, ...]
ChunkCallback = Callable[[Position, NDArray], None]
_SHUFFLE = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


def write_box(array: zarr.Array, box: Box, pixels: NDArray, on_chunk: ChunkCallback | None = None) -> int:
    """Write ``(..., h, w)`` `pixels` into `box`, which must be whole files of `array`, each once.

    Parameters
    ----------
    on_chunk
        Called with the position (in chunks of the array) and the pixels of every chunk, padded with zeros at
        the border of the image. The array is reused for the next chunk.

    Returns
    -------
    int
        Number of files.

    Raises
    ------
    InputError
        If the box is not aligned: two tasks would write one file.
    """
    from daskcell.images.store import assert_aligned

    assert_aligned(box, array)
    files = array.shards or array.chunks
    pixels = pixels.astype(array.dtype, copy=False)
    encode = encoder(array)
    count = 0
    for corner in product(*(range(0, side, step) for side, step in zip(pixels.shape, files, strict=True))):
        part = pixels[tuple(slice(low, low + step) for low, step in zip(corner, files, strict=True))]
        start = (*corner[:-2], corner[-2] + box.y0, corner[-1] + box.x0)
        encoded = [
            b"" if chunk is None else encode(chunk)
            for chunk in _chunks(part, files, array.chunks, start, on_chunk)
        ]
        content = encoded[0] if array.shards is None else b"".join([*encoded, _index(encoded)])
        _put(array, tuple(low // step for low, step in zip(start, files, strict=True)), content)
        count += 1
    return count


def encoder(array: zarr.Array) -> Callable[[NDArray], bytes | bytearray]:
    """The function that encodes a chunk as the metadata of `array` say: zstd, or Blosc in one thread.

    With several threads, Blosc would write its blocks in the order in which they are ready.
    """
    import imagecodecs
    from numcodecs import zstd

    codec: Any
    (codec,) = array.compressors
    if array.metadata.zarr_format == 2:
        settings = codec.get_config()
    else:
        settings = {"id": codec.to_dict()["name"], **codec.to_dict()["configuration"]}
    level = settings.get("level", settings.get("clevel"))
    if settings["id"] == "zstd":
        return lambda chunk: zstd.compress(chunk, level)
    assert settings["id"] == "blosc", settings
    shuffle = _SHUFFLE.get(settings["shuffle"], settings["shuffle"])
    options: dict[str, Any] = {"level": level, "compressor": settings["cname"], "shuffle": shuffle}
    options |= {"typesize": array.dtype.itemsize, "numthreads": 1}
    return lambda chunk: imagecodecs.blosc_encode(chunk, **options)  # type: ignore[arg-type]


def _chunks(
    part: NDArray, file: Position, shape: Position, start: Position, on_chunk: ChunkCallback | None
) -> Iterator[NDArray | None]:
    """Chunks of one file in the order of its index: padded at the border of the image, None beyond it.

    All share one buffer, since allocating new memory takes longer than the copy.
    """
    chunk = np.empty(shape, part.dtype)
    for corner in product(*(range(0, side, step) for side, step in zip(file, shape, strict=True))):
        piece = part[tuple(slice(low, low + step) for low, step in zip(corner, shape, strict=True))]
        if not piece.size:
            yield None
            continue
        if piece.shape != shape:
            chunk.fill(0)
        chunk[tuple(slice(0, side) for side in piece.shape)] = piece
        if on_chunk is not None:
            on_chunk(tuple((s + c) // step for s, c, step in zip(start, corner, shape, strict=True)), chunk)
        yield chunk


def _index(encoded: list[bytes | bytearray]) -> bytes:
    import google_crc32c

    lengths = np.array([len(chunk) for chunk in encoded], "<u8")
    table = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype("<u8")
    table[lengths == 0] = np.iinfo("<u8").max  # no such chunk
    index = table.tobytes()
    return index + google_crc32c.value(index).to_bytes(4, "little")


def _put(array: zarr.Array, position: Position, content: bytes | bytearray) -> None:
    """Write one file; stores write to a temporary name and rename it."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    key = f"{array.path}/{array.metadata.encode_chunk_key(position)}".lstrip("/")
    sync(array.store.set(key, default_buffer_prototype().buffer.from_bytes(content)))
