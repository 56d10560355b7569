"""OME-Zarr: what is written equals the source, opens elsewhere, and is never half there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from daskcell import images
from daskcell.compute import Workers
from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box, Grid
from daskcell.images import conversion, labels, shards, store
from daskcell.images.joined import SourceReader
from daskcell.images.pyramid import halve_mean, halve_nearest, level_shapes

RNG = np.random.default_rng(0)


def source_of(folder: Path, pixels: np.ndarray, name: str = "a", **options) -> images.Source:
    """A TIFF file of ``(C, Y, X)`` as a source."""
    path = folder / f"{name}.ome.tif"
    metadata = {"axes": "CYX", **options.pop("metadata", {})}
    if len(pixels) == 1:  # OME-XML of tifffile does not hold sides of one pixel
        path, pixels, metadata = folder / f"{name}.tif", pixels[0], None
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=metadata, **options)
    return images.find_images(path)[0]


def files_of_pixels(path: Path) -> list[Path]:
    return [
        file
        for file in path.rglob("*")
        if file.is_file() and file.name != "zarr.json" and "histograms" not in file.parts
    ]


def small_files(
    monkeypatch: pytest.MonkeyPatch, chunk: int = 32, shard: int = 64, smallest: int = 64
) -> None:
    """Files so small that a test picture has many of them."""
    monkeypatch.setattr(store, "CHUNK", chunk)
    monkeypatch.setattr(labels, "CHUNK", chunk)
    monkeypatch.setattr(store, "SHARD", shard)
    monkeypatch.setattr("daskcell.images.pyramid.SMALLEST", smallest)


def mean_by_hand(array: np.ndarray) -> np.ndarray:
    """Mean of the pixels that are there, halves up: one output pixel after another."""
    channels, height, width = array.shape
    out = np.empty((channels, -(-height // 2), -(-width // 2)), array.dtype)
    for c, y, x in np.ndindex(out.shape):
        mean = array[c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].astype(np.float64).mean()
        out[c, y, x] = mean if array.dtype.kind == "f" else np.floor(mean + 0.5)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64", "int8"]
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (3, 8, 8), (1, 7, 10), (2, 13, 1)])
def test_halving_is_the_mean_of_the_pixels_that_are_there(shape: tuple[int, ...], dtype: str) -> None:
    if np.dtype(dtype).kind == "f":
        pixels = RNG.normal(size=shape).astype(dtype)
        np.testing.assert_allclose(halve_mean(pixels), mean_by_hand(pixels), rtol=1e-5, atol=1e-6)
    else:
        limits = np.iinfo(dtype)
        pixels = RNG.integers(limits.min, limits.max, shape, dtype, endpoint=True)
        np.testing.assert_array_equal(halve_mean(pixels), mean_by_hand(pixels))
    assert halve_mean(pixels).dtype == dtype
    np.testing.assert_array_equal(halve_nearest(pixels), pixels[:, ::2, ::2])


def test_levels_go_on_until_both_sides_are_small() -> None:
    assert level_shapes((5, 9)) == [(5, 9)]
    assert level_shapes((1023, 1023)) == [(1023, 1023)]
    assert level_shapes((1024, 3)) == [(1024, 3), (512, 2)]
    assert level_shapes((4097, 1000)) == [(4097, 1000), (2049, 500), (1025, 250), (513, 125)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 64, 64), (2, 65, 31), (1, 150, 201), (4, 1, 130), (1, 300, 1)]
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_every_level_equals_the_picture_halved_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: str
) -> None:
    small_files(monkeypatch)
    pixels = (RNG.random(shape) * 120).astype(dtype)
    result = images.convert_slide(source_of(tmp_path, pixels), tmp_path / "a.zarr")
    info = images.image_info(tmp_path / "a.zarr")
    assert info.shape == result["shape"] == shape
    assert info.dtype == dtype
    expected = pixels
    for level, (height, width) in enumerate(info.levels):
        if level:
            expected = halve_mean(expected)
        np.testing.assert_array_equal(
            images.read_block(tmp_path / "a.zarr", Box(0, 0, height, width), level), expected
        )
    assert max(info.levels[-1]) < 64
    assert len(files_of_pixels(tmp_path / "a.zarr")) == result["files"]


def test_files_are_as_large_as_asked_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)
    result = images.convert_slide(source_of(tmp_path, np.zeros((2, 130, 200), np.uint8)), tmp_path / "a.zarr")
    # 130 x 200 in files of 64: 3 x 4, and their halves; then 33 x 50: 1. All zero, and yet all there.
    assert result["files"] == 12 + 12 + 1 == len(files_of_pixels(tmp_path / "a.zarr"))
    for level, array in enumerate(zarr.open_group(tmp_path / "a.zarr", mode="r")[str(k)] for k in range(3)):
        assert array.chunks == (1, 32, 32), level
        assert array.metadata.dimension_names == ("c", "y", "x")


def test_files_hold_less_pixels_of_more_channels() -> None:
    assert store.shard_shape(3, (100_000, 80_000), "uint8") == (3, 4096, 4096)
    assert store.shard_shape(3, (600, 5000), "uint8") == (3, 1024, 4096)
    assert store.shard_shape(3, (40, 40), "uint8") == (3, 512, 512)
    channels, height, width = store.shard_shape(40, (100_000, 80_000), "uint16")
    assert channels * height * width * 2 <= store.SHARD_BYTES
    channels, height, width = store.shard_shape(3, (100_000, 80_000), "uint8", strips=True)
    assert channels * height * 80_000 <= store.SHARD_BYTES
    assert width == 4096
    assert height % store.CHUNK == width % store.CHUNK == 0


def test_metadata_says_names_size_colours_and_windows(tmp_path: Path) -> None:
    pixels = np.zeros((2, 100, 100), np.uint16)
    pixels[0] = np.arange(10_000).reshape(100, 100)
    metadata = {
        "PhysicalSizeX": 0.25,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": ["DNA", "actin"]},
    }
    images.convert_slide(source_of(tmp_path, pixels, metadata=metadata), tmp_path / "a.zarr")
    info = images.image_info(tmp_path / "a.zarr")
    assert info.channels == ("DNA", "actin")
    assert info.pixel_size == (0.5, 0.25)
    ome = zarr.open_group(tmp_path / "a.zarr", mode="r").attrs["ome"]
    (scale,) = ome["multiscales"]
    assert [axis.get("unit") for axis in scale["axes"]] == [None, "micrometer", "micrometer"]
    assert scale["datasets"][0]["coordinateTransformations"] == [{"type": "scale", "scale": [1.0, 0.5, 0.25]}]
    first, second = (channel["window"] for channel in ome["omero"]["channels"])
    assert (first["min"], first["max"]) == (0, 9999)
    assert first["start"] == pytest.approx(np.quantile(pixels[0], 0.001), abs=1)
    assert first["end"] == pytest.approx(np.quantile(pixels[0], 0.999), abs=1)
    assert second["start"] < second["end"]  # a channel of one value must not divide by zero


def test_unknown_pixel_size_stays_unknown(tmp_path: Path) -> None:
    images.convert_slide(source_of(tmp_path, np.zeros((1, 20, 30), np.uint8)), tmp_path / "a.zarr")
    assert images.image_info(tmp_path / "a.zarr").pixel_size is None
    (scale,) = zarr.open_group(tmp_path / "a.zarr", mode="r").attrs["ome"]["multiscales"]
    assert all("unit" not in axis for axis in scale["axes"])


def test_levels_lie_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)
    images.convert_slide(source_of(tmp_path, np.zeros((2, 200, 200), np.uint8)), tmp_path / "a.zarr")
    (scale,) = zarr.open_group(tmp_path / "a.zarr", mode="r").attrs["ome"]["multiscales"]
    for level, dataset in enumerate(scale["datasets"]):
        steps = {step["type"]: step[step["type"]][1:] for step in dataset["coordinateTransformations"]}
        # The first pixel begins at the same place on every level.
        shift = steps.get("translation", [0.0, 0.0])
        assert [s - size / 2 for s, size in zip(shift, steps["scale"], strict=True)] == [-0.5, -0.5], level


def test_other_libraries_open_image_and_labels(tmp_path: Path) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader
    from ome_zarr_models.v05 import Image, Labels

    pixels = RNG.integers(0, 255, (2, 1100, 300), np.uint8)
    path = tmp_path / "a.zarr"
    images.convert_slide(source_of(tmp_path, pixels), path)
    images.create_labels(
        path, "clusters", block=512, dtype=np.uint8, colors={1: (255, 0, 0), 2: (0, 255, 0, 128)},
        properties=[{"label-value": 1, "name": "one"}, {"label-value": 2, "name": "two"}],
    )  # fmt: skip
    drawn = RNG.integers(0, 3, pixels.shape[1:], np.uint8)
    grid = Grid.regular(drawn.shape, 512)
    for index in grid:
        images.write_labels_block(path, "clusters", grid.core(index), drawn[grid.core(index).slices])
    images.build_label_pyramid(path, "clusters")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.from_zarr(zarr.open_group(path, mode="r"))
        Labels.from_zarr(zarr.open_group(path / "labels", mode="r"))
    nodes = {str(node.zarr).rstrip("/").split("a.zarr")[-1]: node for node in Reader(parse_url(str(path)))()}
    image = next(node for node in nodes.values() if node.data and node.data[0].ndim == 3)
    np.testing.assert_array_equal(image.data[0].compute(), pixels)
    assert image.metadata["channel_names"] == ["channel 1", "channel 2"]
    label = next(node for node in nodes.values() if node.data and node.data[0].ndim == 2)
    np.testing.assert_array_equal(label.data[0].compute(), drawn)
    np.testing.assert_array_equal(label.data[1].compute(), drawn[::2, ::2])
    assert label.metadata["color"][1] == [1.0, 0.0, 0.0, 1.0]
    assert label.metadata["properties"][1] == {"name": "one"}


def test_what_is_opened_again_is_the_same(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 4000, (3, 70, 90), np.uint16)
    image = images.convert(source_of(tmp_path, pixels), tmp_path / "a.zarr")
    assert image.name == "a"
    assert not image.is_rgb
    assert image.shape == (3, 70, 90)
    np.testing.assert_array_equal(image.data.compute(), pixels)
    again = images.convert(tmp_path / "a.zarr", tmp_path / "b.zarr")
    np.testing.assert_array_equal(again.data.compute(), pixels)
    assert again.channels == image.channels


def test_colour_pictures_stay_colour_pictures(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 255, (40, 50, 3), np.uint8), photometric="rgb")
    assert images.convert(tmp_path / "a.tif", tmp_path / "a.zarr").is_rgb
    assert images.image_info(tmp_path / "a.zarr").is_rgb


def test_fingerprint_goes_by_pixels_not_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)
    pixels = RNG.integers(0, 255, (2, 100, 150), np.uint8)
    plain = images.convert_slide(source_of(tmp_path, pixels, "a"), tmp_path / "a.zarr")
    packed = source_of(tmp_path, pixels, "b", compression="zlib", tile=(32, 32))
    monkeypatch.setattr(store, "SHARD", 96)
    assert images.convert_slide(packed, tmp_path / "b.zarr")["fingerprint"] == plain["fingerprint"]
    pixels[1, 99, 149] ^= 1
    other = images.convert_slide(source_of(tmp_path, pixels, "c"), tmp_path / "c.zarr")
    assert other["fingerprint"] != plain["fingerprint"]


def test_a_strip_is_decoded_once_for_a_whole_row_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(monkeypatch)
    pixels = RNG.integers(0, 255, (1, 130, 400), np.uint8)
    source = source_of(tmp_path, pixels, rowsperstrip=5, compression="zlib")
    reads: list[Box] = []

    class Counting:
        def __init__(self) -> None:
            self.inner = SourceReader(source)

        def read(self, level: int, box: Box):
            reads.append(box)
            return self.inner.read(level, box)

    counting = Counting()
    monkeypatch.setattr(conversion, "cached_reader", lambda *args: counting)
    result = images.convert_slide(source, tmp_path / "a.zarr")
    assert sorted(reads) == [Box(0, 0, 64, 400), Box(64, 0, 128, 400), Box(128, 0, 130, 400)]
    assert result["files"] == len(files_of_pixels(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(images.read_block(tmp_path / "a.zarr", Box(0, 0, 130, 400)), pixels)
    reads.clear()
    monkeypatch.setattr(store, "SHARD_BYTES", 130 * 64)  # lower files, and four side by side
    wide = images.convert_slide(source, tmp_path / "b.zarr")
    assert {box.shape for box in reads} == {(32, 256), (32, 144), (2, 256), (2, 144)}
    assert wide["fingerprint"] == result["fingerprint"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int8", "int16"])
@pytest.mark.parametrize("side", [30, 1100])  # counted by numpy, and compiled
def test_histograms_are_exact(dtype: str, side: int) -> None:
    from daskcell.images.pixel_stats import block_stats

    limits = np.iinfo(dtype)
    pixels = RNG.integers(limits.min, limits.max, (1, side, side + 1), dtype, endpoint=True)
    (histogram,) = block_stats(pixels).histograms
    assert histogram is not None
    for got, expected in zip(histogram, np.unique(pixels, return_counts=True), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16"])
def test_histograms_of_all_pixels_are_kept_with_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    small_files(monkeypatch)
    limits = np.iinfo(dtype)
    pixels = RNG.integers(limits.min, limits.max, (2, 150, 201), dtype, endpoint=True)
    images.convert_slide(source_of(tmp_path, pixels), tmp_path / "a.zarr")
    histograms = images.read_histograms(tmp_path / "a.zarr")
    assert histograms is not None
    for histogram, channel in zip(histograms, pixels, strict=True):
        for got, expected in zip(histogram, np.unique(channel, return_counts=True), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_floats_have_no_histogram(tmp_path: Path) -> None:
    images.convert_slide(source_of(tmp_path, RNG.random((1, 50, 60)).astype(np.float32)), tmp_path / "a.zarr")
    assert images.read_histograms(tmp_path / "a.zarr") is None


def read_ome_zarr_of_another_writer(tmp_path: Path, version: str) -> None:
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image

    pixels = RNG.integers(0, 255, (2, 3, 4, 60, 80), np.uint8)  # TCZYX
    path = tmp_path / f"other{version}.zarr"
    write_image(
        pixels, str(path), axes="tczyx", scaler=None, fmt=FormatV04() if version == "0.4" else FormatV05()
    )
    group = zarr.open_group(path, mode="r+")
    attributes = dict(group.attrs)
    (scale,) = attributes.get("ome", attributes)["multiscales"]
    scale["coordinateTransformations"] = [{"type": "scale", "scale": [1.0, 1.0, 2.0, 500.0, 250.0]}]
    for axis in scale["axes"][2:]:
        axis["unit"] = "nanometer"
    group.attrs.put(attributes)
    sources = images.find_images(path)
    assert len(sources) == 2
    image = images.open_image(sources[1])
    assert image.pixel_size == (0.5, 0.25)
    np.testing.assert_array_equal(image.data.compute(), pixels[1].max(axis=1))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_of_another_writer_is_read(tmp_path: Path, version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_ome_zarr_of_another_writer(tmp_path, version)


def test_nan_is_refused_with_file_and_number(tmp_path: Path) -> None:
    for name in ("red", "green"):
        pixels = np.zeros((30, 40), np.float32)
        if name == "green":
            pixels[3, 4:7] = np.nan
            pixels[5, 6] = np.inf
        tifffile.imwrite(tmp_path / f"s_{name}.tif", pixels)
    with pytest.raises(ImageError, match=r"s_green\.tif holds 4 pixels that are NaN or infinite"):
        images.convert(tmp_path, tmp_path / "out" / "a.zarr")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    first = source_of(tmp_path, np.full((1, 20, 30), 1, np.uint8), "a")
    second = source_of(tmp_path, np.full((1, 25, 35), 2, np.uint8), "b")
    target = tmp_path / "x.zarr"
    images.convert_slide(first, target)
    with pytest.raises(ImageError, match="exists already"):
        images.convert_slide(second, target)
    assert images.read_block(target, Box(0, 0, 1, 1))[0, 0, 0] == 1
    images.convert_slide(second, target, overwrite=True)
    assert images.image_info(target).shape == (1, 25, 35)
    assert images.read_block(target, Box(0, 0, 1, 1))[0, 0, 0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.tif", "x.zarr"]


def test_failure_in_the_middle_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(monkeypatch)
    source = source_of(tmp_path, np.ones((1, 200, 200), np.uint8))
    target = tmp_path / "x.zarr"
    images.convert_slide(source, target)
    write, calls = conversion._convert_run, []

    def fails_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")
        return write(*args)

    monkeypatch.setattr(conversion, "_convert_run", fails_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        images.convert_slide(source, tmp_path / "y.zarr")
    calls.clear()
    with pytest.raises(OSError, match="disk full"):
        images.convert_slide(source, target, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "x.zarr"]
    assert images.read_block(target, Box(0, 0, 200, 200)).all()


KILLED = """
import os, sys, time
from daskcell import images
from daskcell.images import conversion, store
store.SHARD, write = 512, conversion._convert_run
def slowly(*args):
    result = write(*args)
    os.write(1, b"written\\n")  # at once: there are several threads
    time.sleep(0.2)
    return result
conversion._convert_run = slowly
images.convert_slide(images.find_images(sys.argv[1])[0], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_can_be_repeated(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (1, 2000, 2000), np.uint8)
    source = source_of(tmp_path, pixels)
    target = tmp_path / "out" / "a.zarr"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, source.files[0], str(target)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for _ in range(3):
        assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not target.exists()
    (left,) = target.parent.iterdir()
    assert files_of_pixels(left)  # it was in the middle
    with pytest.raises(ImageError):
        images.image_info(left)
    assert images.find_images([target.parent, *source.files])[0].files == source.files  # hidden from a search
    images.convert_slide(source, target)
    assert [p.name for p in target.parent.iterdir()] == ["a.zarr"]
    np.testing.assert_array_equal(images.read_block(target, Box(0, 0, 2000, 2000)), pixels)


def test_windows_of_workers_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)
    source = source_of(tmp_path, RNG.integers(0, 255, (2, 200, 150), np.uint8))
    alone = images.convert_slide(source, tmp_path / "a.zarr")
    assert images.convert_slide(source, tmp_path / "b.zarr", Workers(None)) == alone


@pytest.mark.slow
def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    source = source_of(tmp_path, RNG.integers(0, 255, (2, 5000, 4200), np.uint8), tile=(256, 256))
    alone = images.convert_slide(source, tmp_path / "a.zarr")
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        assert images.convert_slide(source, tmp_path / "b.zarr", Workers(client)) == alone
        (tmp_path / "bad.tif").write_bytes(Path(source.files[0]).read_bytes()[:-2000])
        with pytest.raises(ImageError, match="truncated"):
            images.convert(tmp_path / "bad.tif", tmp_path / "c.zarr", client)
    for file in files_of_pixels(tmp_path / "a.zarr"):
        assert file.read_bytes() == (tmp_path / "b.zarr" / file.relative_to(tmp_path / "a.zarr")).read_bytes()


def labelled(tmp_path: Path, shape: tuple[int, int] = (150, 201), block: int = 64, dtype="uint32") -> Path:
    path = tmp_path / "l.zarr"
    images.convert_slide(source_of(tmp_path, np.zeros((1, *shape), np.uint8), "l"), path, overwrite=True)
    images.create_labels(path, "cells", block=block, dtype=dtype)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 64, 96, 256])
def test_labels_are_written_block_by_block_with_nearest_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    small_files(monkeypatch)
    drawn = RNG.integers(0, 2**32 - 1, (150, 201), np.uint32)
    path = labelled(tmp_path, block=block)
    grid = Grid.regular(drawn.shape, block)
    for index in grid:
        images.write_labels_block(path, "cells", grid.core(index), drawn[grid.core(index).slices])
        np.testing.assert_array_equal(
            images.read_labels(path, "cells", grid.core(index)), drawn[grid.core(index).slices]
        )
    assert images.image_info(path).labels == ()  # not before it is finished
    images.build_label_pyramid(path, "cells", Workers(None))
    assert images.image_info(path).labels == ("cells",)
    expected = drawn
    for level, (height, width) in enumerate(images.image_info(path).levels):
        expected = halve_nearest(expected) if level else expected
        np.testing.assert_array_equal(
            images.read_labels(path, "cells", Box(0, 0, height, width), level), expected
        )


def test_blocks_that_share_a_file_with_others_are_refused(tmp_path: Path) -> None:
    path = labelled(tmp_path)
    for box in (
        Box(0, 0, 64, 63),
        Box(1, 0, 64, 64),
        Box(32, 0, 96, 64),
        Box(128, 192, 150, 200),
        Box(0, 0, 64, 256),
    ):
        with pytest.raises(InputError, match="two tasks would write one file"):
            images.write_labels_block(path, "cells", box, np.zeros(box.shape, np.uint32))
    for box in (Box(0, 0, 64, 64), Box(128, 192, 150, 201), Box(0, 0, 150, 201), Box(64, 0, 128, 128)):
        images.write_labels_block(path, "cells", box, np.zeros(box.shape, np.uint32))
    with pytest.raises(InputError, match="do not fill"):
        images.write_labels_block(path, "cells", Box(0, 0, 64, 64), np.zeros((64, 63), np.uint32))


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = labelled(tmp_path, dtype="uint8")
    box = Box(0, 0, 64, 64)
    images.write_labels_block(path, "cells", box, np.full(box.shape, 255, np.int64))
    assert (images.read_labels(path, "cells", box) == 255).all()
    for value in (256, -1):
        with pytest.raises(InputError, match=f"Label {value} does not fit"):
            images.write_labels_block(path, "cells", box, np.full(box.shape, value, np.int64))
    with pytest.raises(InputError, match="must be integers"):
        images.write_labels_block(path, "cells", box, np.zeros(box.shape))
    for dtype in ("float32", "uint64"):
        with pytest.raises(InputError, match="Labels cannot be"):
            images.create_labels(path, "other", block=64, dtype=dtype)
    with pytest.raises(ImageError, match="no labels 'absent'"):
        images.read_labels(path, "absent", box)


def test_labels_made_again_replace_the_old_and_others_stay(tmp_path: Path) -> None:
    path = labelled(tmp_path, block=256)
    box = Box(0, 0, 150, 201)
    images.write_labels_block(path, "cells", box, np.full(box.shape, 7, np.uint32))
    images.build_label_pyramid(path, "cells")
    images.create_labels(path, "clusters", block=256, dtype="uint8")
    images.build_label_pyramid(path, "clusters")
    assert images.image_info(path).labels == ("cells", "clusters")
    images.create_labels(path, "cells", block=256, dtype="uint16")
    assert images.image_info(path).labels == ("clusters",)
    assert not images.read_labels(path, "cells", box).any()
    assert images.read_labels(path, "cells", box).dtype == np.uint16


def test_no_ome_zarr_is_one_sentence(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "plain.zarr", mode="w")
    (tmp_path / "odd.zarr").mkdir()
    for name in ("plain.zarr", "odd.zarr", "absent.zarr"):
        with pytest.raises(ImageError, match=name):
            images.image_info(tmp_path / name)


def test_lazy_image_reads_only_what_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RNG.integers(0, 255, (2, 4100, 2100), np.uint8)
    image = images.open_image(source_of(tmp_path, pixels, tile=(512, 512)))
    reads: list[Box] = []
    reader = conversion.cached_reader

    class Counting:
        def __init__(self, inner) -> None:
            self.inner = inner

        def read(self, level: int, box: Box):
            reads.append(box)
            return self.inner.read(level, box)

    monkeypatch.setattr(conversion, "cached_reader", lambda *args: Counting(reader(*args)))
    np.testing.assert_array_equal(image.data[:, 4000:4050, 10:20].compute(), pixels[:, 4000:4050, 10:20])
    assert reads == [Box(2048, 0, 4096, 2048)]


def test_blocks_follow_tiles_and_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RNG.integers(0, 255, (1, 5000, 2300), np.uint8)
    tiled = images.open_image(source_of(tmp_path, pixels, "t", tile=(240, 240)))
    assert tiled.data.chunks == ((1,), (1920, 1920, 1160), (1920, 380))
    strips = source_of(tmp_path, pixels, "s", rowsperstrip=16)
    assert images.open_image(strips).data.chunks == ((1,), (2048, 2048, 904), (2300,))
    monkeypatch.setattr("daskcell.images.image.BLOCK_BYTES", 2300 * 1000)
    low = images.open_image(strips)
    assert low.data.chunks == ((1,), (1000,) * 5, (2300,))
    np.testing.assert_array_equal(low.data.compute(), pixels)


def test_every_channel_as_its_own_picture(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 4000, (2, 600, 530), np.uint16)
    metadata = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "Channel": {"Name": ["DNA", "é/actin"]}}
    images.convert_slide(source_of(tmp_path, pixels, metadata=metadata), tmp_path / "a.zarr")
    files = images.split_channels(tmp_path / "a.zarr", tmp_path / "channels")
    assert [file.name for file in files] == ["a_DNA.tif", "a_é_actin.tif"]
    assert sorted((tmp_path / "channels").iterdir()) == sorted(files)
    for file, channel in zip(files, pixels, strict=True):
        np.testing.assert_array_equal(tifffile.imread(file), channel)
        image = images.open_image(file)
        assert image.pixel_size == (0.5, 0.25)
        np.testing.assert_array_equal(image.data[0].compute(), channel)


def test_channels_split_from_colour_and_float(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "f.tif", RNG.random((30, 40)).astype(np.float32))
    (file,) = images.split_channels(tmp_path / "f.tif", tmp_path / "out")
    np.testing.assert_array_equal(tifffile.imread(file), tifffile.imread(tmp_path / "f.tif"))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "channels/human", "channels/fly", "channels/bbbc022", "cellcycle-ifc", "slide/CMU-1-Small-Region.svs",
        "slide/OS-1-detail.ome.tif", "slide/human_3ch_pyramid.ome.tif", "slide/test3-DAPI-2-(387).ndpi",
        "dsb2018/val/images/fluo256_16c3d593.png", "rbc12/images/102.jpg",
    ],
)  # fmt: skip
def test_real_pictures_convert_to_their_own_pixels(data_dir: Path, tmp_path: Path, name: str) -> None:
    image = images.open_image(data_dir / name)
    converted = images.convert(data_dir / name, tmp_path / "a.zarr")
    assert converted.channels == image.channels
    assert converted.pixel_size == image.pixel_size
    assert converted.is_rgb == image.is_rgb
    np.testing.assert_array_equal(converted.data.compute(), image.data.compute())


def test_what_killed_workers_left_of_their_files_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zarr writes ``<file>.<hex>.partial`` first; whoever is killed meanwhile leaves it."""
    put, cut = shards._put, []

    def killed_once(array: zarr.Array, position, content) -> None:
        root = Path(array.store.root, array.path)
        cut.append(root / f"{array.metadata.encode_chunk_key(position)}.4fbd275c.partial")
        cut[-1].parent.mkdir(parents=True, exist_ok=True)
        cut[-1].write_bytes(bytes(content)[:10])
        put(array, position, content)

    monkeypatch.setattr(shards, "_put", killed_once)
    path = labelled(tmp_path)
    images.write_labels_block(path, "cells", Box(0, 0, 150, 201), np.ones((150, 201), np.uint32))
    assert cut[-1].exists()
    images.build_label_pyramid(path, "cells", Workers(None))
    assert len(cut) > 1
    assert list(tmp_path.rglob("*.partial")) == []
