"""Files that are put together here are read by zarr as if zarr had written them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc
from zarr.codecs import BloscCodec, ZstdCodec

from daskcell import images
from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.images import codecs, shards, store

RNG = np.random.default_rng(3)
CODECS = {
    "zstd": ZstdCodec(level=1),
    "lz4": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "blosc": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
}


def new_array(store, shape, shard=(2, 32, 32), chunk=(1, 16, 16), codec="zstd", dtype="uint16", **options):
    return zarr.create_array(
        store, shape=shape, shards=shard, chunks=chunk, dtype=dtype, compressors=CODECS[codec],
        fill_value=0, **options,
    )  # fmt: skip


def write_all(array, pixels, look=None) -> int:
    files = (array.shards or array.chunks)[-2:]
    if array.shards is None:
        files = tuple(2 * side for side in files)  # several files at a time
    edges = [(*range(0, n, step), n) for n, step in zip(pixels.shape[-2:], files, strict=True)]
    grid = Grid(*edges)
    return sum(shards.write_box(array, grid.core(i), pixels[(..., *grid.core(i).slices)], look) for i in grid)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(1, 100)),
    codec=st.sampled_from(sorted(CODECS)),
    dtype=st.sampled_from(["uint8", "int16", "uint32", "float32"]),
    empty=st.booleans(),
)
def test_zarr_reads_what_is_written_and_every_file_is_there(shape, codec, dtype, empty) -> None:
    store = zarr.storage.MemoryStore()
    array = new_array(store, shape, (shape[0], 32, 48), codec=codec, dtype=dtype)
    pixels = np.zeros(shape, dtype) if empty else (RNG.random(shape) * 200).astype(dtype)
    files = write_all(array, pixels)
    np.testing.assert_array_equal(array[:], pixels)
    grid = -(-shape[1] // 32) * -(-shape[2] // 48)
    assert files == grid == len([key for key in store._store_dict if "zarr.json" not in key])


def test_chunks_are_the_bytes_that_zarr_writes() -> None:
    pixels = RNG.integers(0, 9, (2, 64, 64), np.uint16)
    ours, theirs = zarr.storage.MemoryStore(), zarr.storage.MemoryStore()
    write_all(new_array(ours, pixels.shape), pixels)
    new_array(theirs, pixels.shape)[:] = pixels
    for key in (f"c/0/{i}/{j}" for i in range(2) for j in range(2)):
        assert chunks_of(ours, key) == chunks_of(theirs, key)


def chunks_of(store, key: str, count: int = 8) -> list[bytes]:
    """Chunks by the file's index, in whatever order they lie in the file."""
    content = store._store_dict[key].to_bytes()
    index = np.frombuffer(content[-4 - 16 * count : -4], "<u8").reshape(count, 2)
    return [content[int(offset) : int(offset + length)] for offset, length in index]


def test_a_damaged_index_is_noticed() -> None:
    store = zarr.storage.MemoryStore()
    array = new_array(store, (2, 32, 32))
    write_all(array, RNG.integers(0, 9, array.shape, np.uint16))
    content = bytearray(store._store_dict["c/0/0/0"].to_bytes())
    content[-30] ^= 1
    store._store_dict["c/0/0/0"] = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        array[:]


def test_labels_of_two_axes_and_arrays_without_shards() -> None:
    labels = RNG.integers(0, 2**32, (70, 50), np.uint32)
    array = new_array({}, labels.shape, (32, 32), (16, 16), "blosc", "uint32")
    write_all(array, labels)
    np.testing.assert_array_equal(array[:], labels)
    for compressor in (Blosc("lz4", 5, Blosc.BITSHUFFLE), Blosc("zstd", 1, Blosc.SHUFFLE)):
        store = zarr.storage.MemoryStore()
        old = zarr.create_array(
            store, name="0", shape=labels.shape, chunks=(16, 16), dtype="uint32", compressors=compressor,
            zarr_format=2, chunk_key_encoding={"name": "v2", "separator": "/"},
        )  # fmt: skip
        assert write_all(old, labels) == 5 * 4
        np.testing.assert_array_equal(old[:], labels)
        assert "0/4/3" in store._store_dict


def test_every_chunk_is_looked_at_once_whatever_the_files() -> None:
    pixels = RNG.integers(0, 9, (2, 70, 50), np.uint16)
    seen = []
    for shard in ((2, 32, 32), (2, 64, 16), (2, 80, 64)):
        chunks: dict[tuple[int, ...], bytes] = {}

        def look(position, chunk, chunks=chunks) -> None:
            assert position not in chunks
            chunks[position] = chunk.tobytes()

        write_all(new_array({}, pixels.shape, shard), pixels, look)
        seen.append(chunks)
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 2 * 5 * 4
    np.testing.assert_array_equal(
        np.frombuffer(seen[0][1, 4, 3], np.uint16).reshape(16, 16)[:6, :2], pixels[1, 64:, 48:]
    )


def test_boxes_that_cut_a_file_are_refused(tmp_path: Path) -> None:
    array = new_array({}, (2, 70, 50))
    for box in (Box(0, 0, 16, 32), Box(8, 0, 32, 32), Box(0, 0, 32, 40)):
        with pytest.raises(InputError, match="two tasks would write one file"):
            shards.write_box(array, box, np.zeros((2, *box.shape), np.uint16))


class TestZarrs:
    """The pipeline of the extra ``fast`` reads the same pixels; it must not write."""

    @pytest.fixture(autouse=True)
    def there(self) -> None:
        pytest.importorskip("zarrs")

    @pytest.fixture(params=["0.5", "0.4"])
    def image(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
        """An image with an empty file, and borders that no chunk ends at."""
        pixels = RNG.integers(0, 4000, (2, 1300, 700), np.uint16)
        pixels[:, :512, :512] = 0
        tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": "CYX"})
        images.convert(tmp_path / "a.ome.tif", tmp_path / "a.zarr", version=request.param)
        return tmp_path / "a.zarr", pixels

    def test_pixels_and_files_are_the_same_with_and_without(
        self, image: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, pixels = image
        monkeypatch.setattr(codecs, "zarrs_is_there", lambda: False)
        plain = store.OmeZarr(str(path))
        images.convert(path, path.parent / "plain.zarr")
        monkeypatch.setattr(codecs, "zarrs_is_there", lambda: True)
        fast = store.OmeZarr(str(path))
        images.convert(path, path.parent / "fast.zarr")
        pipelines = [type(one.arrays[0].async_array.codec_pipeline).__name__ for one in (plain, fast)]
        assert pipelines == ["BatchedCodecPipeline", "ZarrsCodecPipeline"]
        for box in (
            Box(0, 0, 1300, 700),
            Box(0, 0, 10, 10),
            Box(500, 500, 1200, 700),
            Box(1299, 699, 1300, 700),
        ):
            for one in (plain, fast):
                np.testing.assert_array_equal(one.read(0, box), pixels[(slice(None), *box.slices)])
        written = [
            {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
            for folder in (path.parent / "plain.zarr", path.parent / "fast.zarr")
        ]
        assert written[0] == written[1]

    def test_opening_in_many_threads_leaves_what_is_written_to_zarr(
        self, image: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        path, pixels = image
        with ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(lambda _: store.OmeZarr(str(path)), range(64)))
        for one in opened:
            np.testing.assert_array_equal(one.read(0, Box(500, 500, 600, 700)), pixels[:, 500:600, 500:700])
        written = zarr.create_array(tmp_path / "new.zarr", shape=(8, 8), chunks=(4, 4), dtype="u2")
        assert type(written.async_array.codec_pipeline).__name__ == "BatchedCodecPipeline"

    def test_a_file_that_is_not_there_reads_as_zeros(self, image: tuple[Path, np.ndarray]) -> None:
        path, pixels = image
        victim = next(path.glob("0/c/0/0/0" if (path / "zarr.json").exists() else "0/1/2/1"))
        victim.unlink()
        fast = store.OmeZarr(str(path))
        got = fast.read(0, Box(0, 0, 1300, 700))
        assert not np.array_equal(got, pixels)
        np.testing.assert_array_equal(got[got != pixels], 0)

    @pytest.mark.parametrize("shards_", [None, (1, 32, 32)])
    def test_why_it_must_not_write(self, tmp_path: Path, shards_: tuple[int, ...] | None) -> None:
        """It leaves out what is all zero though told not to. If this fails, `codecs` can be had simpler."""
        options = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "array.write_empty_chunks": True}
        with zarr.config.set(options):
            array = zarr.create_array(
                tmp_path / "a.zarr", shape=(1, 64, 64), chunks=(1, 16, 16), shards=shards_, dtype="uint16"
            )
        array[:] = np.zeros(array.shape, array.dtype)
        assert not (tmp_path / "a.zarr" / "c").exists()
        ours = zarr.create_array(
            tmp_path / "b.zarr", shape=(1, 64, 64), chunks=(1, 16, 16), shards=(1, 32, 32), dtype="uint16",
            compressors=CODECS["zstd"],
        )  # fmt: skip
        assert write_all(ours, np.zeros(ours.shape, ours.dtype)) == 4
        assert len([one for one in (tmp_path / "b.zarr" / "c").rglob("*") if one.is_file()]) == 4
