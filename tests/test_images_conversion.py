"""Conversion: levels that a slide has, OME-Zarr 0.4, and the same files whoever writes them."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from typer.testing import CliRunner

import daskcell as dc
from daskcell import images
from daskcell.cli import app
from daskcell.compute import start_workers
from daskcell.config import ComputeSettings
from daskcell.errors import ImageError, InputError, MemoryWarning
from daskcell.geometry import Box, Grid
from daskcell.images import conversion, store
from daskcell.images.levels import plan_levels
from daskcell.images.pyramid import halve_mean, halvings
from daskcell.images.reader_process import open_safely

RNG = np.random.default_rng(7)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files so small that a test picture has many of them."""
    monkeypatch.setattr(store, "CHUNK", 16)
    monkeypatch.setattr(store, "SHARD", 64)
    monkeypatch.setattr("daskcell.images.pyramid.SMALLEST", 32)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts the pixels that are read of each level of the file."""
    counter: Counter[int] = Counter()

    class Counting:
        def __init__(self, source) -> None:
            self.inner = open_safely(source)

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def read(self, level: int, box: Box):
            counter[level] += box.shape[0] * box.shape[1]
            return self.inner.read(level, box)

    monkeypatch.setattr(conversion, "open_safely", Counting)
    conversion.cached_reader.cache_clear()
    yield counter
    conversion.cached_reader.cache_clear()


def slide(path: Path, shapes: list[tuple[int, int]], **options) -> list[np.ndarray]:
    """A TIFF with SubIFD levels whose pixels have nothing to do with each other."""
    levels = [RNG.integers(0, 250, (*shape, 3), np.uint8) for shape in shapes]
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(levels[0], photometric="rgb", subifds=len(levels) - 1, **options)
        for level in levels[1:]:
            tiff.write(level, photometric="rgb", subfiletype=1, **options)
    return [np.moveaxis(level, 2, 0) for level in levels]


def levels_of(path: Path) -> list[np.ndarray]:
    info = images.image_info(path)
    return [images.read_block(path, Box(0, 0, *shape), k) for k, shape in enumerate(info.levels)]


@pytest.mark.slow
@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("tile", [{"tile": (16, 16)}, {"rowsperstrip": 8}])
@pytest.mark.parametrize(
    ("shapes", "used"),
    [
        ([(201, 150)], 1),
        ([(201, 150), (100, 75)], 2),  # rounded down, as scanners do
        ([(201, 150), (101, 75), (50, 38)], 3),
        ([(201, 150), (101, 75), (25, 18)], 2),  # then four at once
        ([(201, 150), (50, 37)], 1),
        ([(201, 150), (50, 37), (25, 18)], 1),
        ([(201, 150), (101, 74)], 1),  # 74 is no half of 150
    ],
)
def test_levels_of_half_the_sides_are_taken_and_others_made(
    tmp_path: Path, reads: Counter[int], shapes: list[tuple[int, int]], used: int, tile: dict
) -> None:
    stored = slide(tmp_path / "a.tif", shapes, **tile)
    result = images.convert_slide(images.find_images(tmp_path / "a.tif")[0], tmp_path / "a.zarr")
    expected = stored[:used]
    while max(expected[-1].shape[1:]) >= 32:
        expected.append(halve_mean(expected[-1]))
    written = levels_of(tmp_path / "a.zarr")
    assert len(written) == len(expected)
    for number, (got, wanted) in enumerate(zip(written, expected, strict=True)):
        np.testing.assert_array_equal(got, wanted, err_msg=f"level {number}")
    # Each pixel of each level that is used is read once, and of the others none.
    assert reads == {k: shapes[k][0] * shapes[k][1] for k in range(used)}
    assert result["files"] == count_files(tmp_path / "a.zarr")
    (scale,) = zarr.open_group(tmp_path / "a.zarr", mode="r").attrs["ome"]["multiscales"]
    assert scale.get("type") == ("mean" if used == 1 else None)


def count_files(path: Path) -> int:
    """Files with pixels, which are as many as the shards."""
    group = zarr.open_group(path, mode="r")
    arrays = [group[name] for name in group.array_keys()]
    shards = sum(
        int(np.prod([-(-n // side) for n, side in zip(a.shape, a.shards or a.chunks, strict=True)]))
        for a in arrays
    )
    folders = [path / name for name in group.array_keys()]
    found = sum(1 for f in folders for one in f.rglob("*") if one.is_file() and one.name[0] not in ".z")
    assert found == shards
    return found


def test_what_counts_as_half() -> None:
    assert halvings([(100, 101)]) == 1
    assert halvings([(100, 101), (50, 50), (25, 25), (12, 13), (6, 7)]) == 5
    assert halvings([(100, 100), (51, 50)]) == 1
    assert halvings([(3, 1), (2, 1), (1, 1), (1, 0)]) == 4


def test_channels_in_files_of_other_levels_share_what_they_have(tmp_path: Path) -> None:
    for name, second in (("red", (50, 60)), ("green", (51, 61))):
        with tifffile.TiffWriter(tmp_path / f"s_{name}.tif") as tiff:
            tiff.write(np.zeros((101, 121), np.uint8), subifds=1)
            tiff.write(np.zeros(second, np.uint8), subfiletype=1)
    (source,) = images.find_images(tmp_path)
    assert open_safely(source).levels == ((101, 121),)


def test_files_of_the_next_levels_hold_halves_of_whole_ones() -> None:
    levels = plan_levels([(100_000, 80_000)], 3, "uint8")
    assert [level.files[1:] for level in levels[:5]] == [
        (4096,) * 2,
        (2048,) * 2,
        (1024,) * 2,
        (512,) * 2,
        (4096,) * 2,
    ]
    assert [level.in_hand for level in levels[:5]] == [False, True, True, True, False]
    for level in plan_levels([(30_000, 300_000)], 3, "uint8", strips=True):
        assert all(side % 512 == 0 for side in level.files[1:])
    small = plan_levels([(2100, 900)], 1, "uint8")  # one file, of five by two chunks
    assert [level.files[1:] for level in small] == [(2560, 1024), (1536, 512), (1024, 512)]
    assert [level.in_hand for level in small] == [False, True, True]


@pytest.mark.slow
@pytest.mark.usefixtures("small_files")
def test_files_are_the_same_bytes_for_any_workers(tmp_path: Path) -> None:
    slide(tmp_path / "a.tif", [(301, 250)], tile=(32, 32))
    (source,) = images.find_images(tmp_path / "a.tif")
    here = images.convert_slide(source, tmp_path / "here.zarr")
    with start_workers(ComputeSettings(workers=2)) as workers:
        workers.client.run(lambda: [setattr(store, "CHUNK", 16), setattr(store, "SHARD", 64)])
        there = images.convert_slide(source, tmp_path / "there.zarr", workers)
    assert here == there
    files = {
        p.relative_to(tmp_path / "here.zarr") for p in (tmp_path / "here.zarr").rglob("*") if p.is_file()
    }
    assert len(files) > 40
    for file in files:
        assert (tmp_path / "here.zarr" / file).read_bytes() == (tmp_path / "there.zarr" / file).read_bytes()


def labelled(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Labels in `path`, drawn and finished."""
    drawn = RNG.integers(0, 3, shape, np.uint8)
    images.create_labels(
        path, "clusters", block=256, dtype=np.uint8, colors={1: (255, 0, 0), 2: (0, 255, 0)},
        properties=[{"label-value": 1, "name": "one"}, {"label-value": 2, "name": "two"}],
    )  # fmt: skip
    grid = Grid.regular(shape, 256)
    for index in grid:
        images.write_labels_block(path, "clusters", grid.core(index), drawn[grid.core(index).slices])
    images.build_label_pyramid(path, "clusters")
    return drawn


@pytest.fixture(scope="module", params=["0.4", "0.5"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """An image of a version with labels: its path, version, pixels and labels."""
    folder = tmp_path_factory.mktemp("versions")
    pixels = RNG.integers(0, 4000, (2, 1100, 300), np.uint16)
    metadata = {
        "axes": "CYX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": "µm", "Channel": {"Name": ["DNA", "actin"]},
    }  # fmt: skip
    tifffile.imwrite(folder / "a.ome.tif", pixels, metadata=metadata)
    dc.convert(folder / "a.ome.tif", folder / "a.zarr", version=request.param)
    return folder / "a.zarr", request.param, pixels, labelled(folder / "a.zarr", pixels.shape[1:])


def test_either_version_is_valid_and_says_the_same(written) -> None:
    path, version, pixels, drawn = written
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == (2 if version == "0.4" else 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if version == "0.4":
            from ome_zarr_models.v04 import Image, ImageLabel, Labels
        else:
            from ome_zarr_models.v05 import Image, ImageLabel, Labels
        Image.from_zarr(group)
        Labels.from_zarr(group["labels"])
        ImageLabel.from_zarr(group["labels/clusters"])
    image = dc.open_image(path)
    assert image.channels == ("DNA", "actin")
    assert image.pixel_size == (0.5, 0.25)
    np.testing.assert_array_equal(image.data.compute(), pixels)
    info = images.image_info(path)
    assert info.levels == ((1100, 300), (550, 150))
    assert info.labels == ("clusters",)
    np.testing.assert_array_equal(images.read_block(path, Box(0, 0, 550, 150), 1), halve_mean(pixels))
    np.testing.assert_array_equal(images.read_labels(path, "clusters", Box(0, 0, 1100, 300)), drawn)
    np.testing.assert_array_equal(
        images.read_labels(path, "clusters", Box(0, 0, 550, 150), 1), drawn[::2, ::2]
    )
    (histogram, _) = images.read_histograms(path)
    np.testing.assert_array_equal(histogram, np.unique(pixels[0], return_counts=True))
    count_files(path)


def test_either_version_opens_in_ome_zarr_py(written) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    path, _, pixels, drawn = written
    nodes = [node for node in Reader(parse_url(str(path)))() if node.data]
    image = next(node for node in nodes if node.data[0].ndim == 3)
    label = next(node for node in nodes if node.data[0].ndim == 2)
    np.testing.assert_array_equal(image.data[0].compute(), pixels)
    np.testing.assert_array_equal(image.data[1].compute(), halve_mean(pixels))
    np.testing.assert_array_equal(label.data[0].compute(), drawn)
    assert image.metadata["channel_names"] == ["DNA", "actin"]
    assert label.metadata["properties"][1] == {"name": "one"}


def test_versions_convert_into_each_other(written, tmp_path: Path) -> None:
    path, version, pixels, _ = written
    other = "0.5" if version == "0.4" else "0.4"
    image = dc.convert(path, tmp_path / "b.zarr", version=other)
    np.testing.assert_array_equal(image.data.compute(), pixels)
    again = store.opened(tmp_path / "b.zarr").attributes["daskcell"]
    assert again == store.opened(path).attributes["daskcell"]  # the fingerprint among them


def test_a_version_that_is_none_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9), np.uint8))
    with pytest.raises(InputError, match=r"0\.6 cannot be written; please choose 0\.5 or 0\.4"):
        dc.convert(tmp_path / "a.tif", tmp_path / "a.zarr", version="0.6")  # type: ignore[arg-type]


def test_the_command_tells_of_a_damaged_file_before_it_starts_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 99, (40, 50), np.uint8))
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-9])

    def start_workers(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("daskcell.compute.start_workers", start_workers)
    runner = CliRunner()
    done = runner.invoke(app, ["convert", str(tmp_path / "b.tif"), str(tmp_path / "b.zarr")])
    assert isinstance(done.exception, ImageError)
    assert "truncated" in str(done.exception)
    done = runner.invoke(app, ["convert", str(tmp_path / "a.tif"), str(tmp_path / "a.zarr")])
    assert isinstance(done.exception, AssertionError)


@pytest.mark.slow
def test_the_command_writes_either_version(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((40, 50), np.uint8))
    command = [sys.executable, "-m", "daskcell", "convert", "a.tif", "a.zarr", "--ome-zarr", "0.4"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "a.zarr" / ".zattrs").exists()
    refused = subprocess.run(
        [*command[:-3], "b.zarr", "--ome-zarr", "0.3"], cwd=tmp_path, capture_output=True
    )
    assert refused.returncode == 2
    assert b"ome_zarr" in refused.stderr + refused.stdout


@pytest.mark.slow
def test_either_version_opens_in_naparis_reader(written) -> None:
    reader = pytest.importorskip("napari_ome_zarr")
    path, _, pixels, drawn = written
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader's own
        layers = reader.napari_get_reader(str(path))(str(path))
    (levels, options, _), *rest = [layer for layer in layers if layer[2] == "image"]
    assert not rest
    for got, expected in zip(levels, (pixels, halve_mean(pixels)), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)
    assert [name.split()[-1] for name in options["name"]] == ["DNA", "actin"]
    assert options["channel_axis"] == 0
    shown = np.quantile(pixels[0], [0.001, 0.999])
    np.testing.assert_allclose(options["contrast_limits"][0], shown, atol=2)
    np.testing.assert_allclose(np.asarray(options["scale"]).ravel()[-2:], (0.5, 0.25))
    ((labels, options, _),) = [layer for layer in layers if layer[2] == "labels"]
    np.testing.assert_array_equal(np.asarray(labels[0]), drawn)
    np.testing.assert_array_equal(np.asarray(labels[1]), drawn[::2, ::2])
    assert options["name"].endswith("clusters")
    assert options["colormap"][1] == [1.0, 0.0, 0.0, 1.0]
    assert list(options["properties"]["name"]) == ["one", "two"]


@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"compression": "zlib", "rowsperstrip": 64}]
)
def test_a_large_single_strip_is_announced_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    monkeypatch.setattr(conversion, "MEMORY_BYTES", 8 * 100_000)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((400, 300), np.uint8), **({"rowsperstrip": 400} | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dc.convert(tmp_path / "a.tif", tmp_path / "a.zarr")
    told = [str(one.message) for one in caught if one.category is MemoryWarning]
    if options == {"compression": "zlib"}:
        (sentence,) = told
        assert sentence.startswith(f"{tmp_path / 'a.tif'} is one compressed piece")
    else:
        assert not told


def test_tasks_here_run_at_the_same_time_but_few_and_stop_at_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion, "THREADS", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    begun: list[int] = []
    both = threading.Barrier(2, timeout=20)

    def task(number: int) -> int:
        begun.append(number)
        if number < 2:
            both.wait()  # one alone would wait for ever
        if number == 5:
            raise OSError("disk full")
        return number

    def tasks(count: int) -> Iterator:
        for number in range(count):
            assert number <= len(done) + 2  # asked for when there is room
            yield number, task, (number,)

    done: list[int] = []
    for key, result in conversion.run_tasks(None, tasks(5)):
        assert key == result
        done.append(key)
    assert sorted(done) == [0, 1, 2, 3, 4]
    begun.clear()
    done.clear()
    both.reset()
    with pytest.raises(OSError, match="disk full"):
        done.extend(key for key, _ in conversion.run_tasks(None, tasks(100)))
    assert len(begun) <= 8
