"""Writing whole files of an array: encoded here chunk by chunk, put in place once.

zarr-python goes through several copies, an event loop and a thread for every chunk, which costs as much as a
fast codec; and `zarrs`, which reads faster, leaves out a shard of nothing but zeros, so that "not written"
and "empty" look alike. So files are put together here by the rules of the format
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/), and read by zarr.

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
Look = Callable[[Position, NDArray], None]
_SHUFFLE = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


def write_box(array: zarr.Array, box: Box, pixels: NDArray, look: Look | None = None) -> int:
    """Write ``(..., h, w)`` `pixels` into `box`, which must be whole files of `array`, each once.

    Parameters
    ----------
    look
        Called with the position (in chunks of the array) and the pixels of every chunk, filled up with
        zeros at the image's border; only to look at, they change after.

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
            for chunk in _chunks(part, files, array.chunks, start, look)
        ]
        content = encoded[0] if array.shards is None else b"".join([*encoded, _index(encoded)])
        _put(array, tuple(low // step for low, step in zip(start, files, strict=True)), content)
        count += 1
    return count


def encoder(array: zarr.Array) -> Callable[[NDArray], bytes | bytearray]:
    """What turns a chunk into its bytes, as the metadata of `array` say: zstd, or Blosc in one thread.

    Blosc with threads of its own would put its blocks into the file in the order they get ready.
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
    part: NDArray, file: Position, shape: Position, start: Position, look: Look | None
) -> Iterator[NDArray | None]:
    """Chunks of one file in the order of its index: at the image's border filled up, None beyond it.

    All in the same memory: fresh memory for each, cleared by the system, takes longer than the copy.
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
        if look is not None:
            look(tuple((s + c) // step for s, c, step in zip(start, corner, shape, strict=True)), chunk)
        yield chunk


def _index(encoded: list[bytes | bytearray]) -> bytes:
    import google_crc32c

    lengths = np.array([len(chunk) for chunk in encoded], "<u8")
    table = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype("<u8")
    table[lengths == 0] = np.iinfo("<u8").max  # no such chunk
    index = table.tobytes()
    return index + google_crc32c.value(index).to_bytes(4, "little")


def _put(array: zarr.Array, position: Position, content: bytes | bytearray) -> None:
    """Give a file its name when it is whole: stores write beside it first."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    key = f"{array.path}/{array.metadata.encode_chunk_key(position)}".lstrip("/")
    sync(array.store.set(key, default_buffer_prototype().buffer.from_bytes(content)))
