"""Disk to disk gives what the lazy arrays give, goes on where it was, and does nothing twice."""

from __future__ import annotations

import shutil
import traceback
from collections import Counter
from functools import wraps
from typing import ClassVar

import numpy as np
import pytest
import tifffile
from blobs import blobs, same_cells

import daskcell as dc
from daskcell.compute import Window, Workers
from daskcell.config import PreprocessSettings, SegmentSettings
from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.images import image_info, read_labels
from daskcell.preprocess import fit_slide
from daskcell.preprocess.plan import Plan
from daskcell.segmentation import engine, tasks
from daskcell.segmentation.core.ownership import load_candidates, save_candidates
from daskcell.segmentation.index import block_records, read_index
from daskcell.segmentation.methods import CellposeMethod, installed

PLAIN = PreprocessSettings(reconstruct=None, histogram=None)
SETTINGS = SegmentSettings(diameter=None)


@pytest.fixture(scope="module")
def picture():
    return (np.clip(blobs((430, 620), 11, radius=11), 0, 1) * 200).astype(np.uint8)


@pytest.fixture
def slide(tmp_path, picture):
    tifffile.imwrite(tmp_path / "picture.tif", picture)
    dc.convert(tmp_path / "picture.tif", tmp_path / "picture.zarr")
    return tmp_path / "picture.zarr"


class CountingWindow(Window):
    """Counts what is submitted; may stop after so many tasks, as a kill would."""

    counts: ClassVar[Counter] = Counter()
    stop_after: int | None = None

    def submit(self, key, function, *args, kind="cpu"):
        type(self).counts[function.__name__] += 1
        if self.stop_after is not None and sum(self.counts.values()) > self.stop_after:
            raise KeyboardInterrupt
        super().submit(key, function, *args, kind=kind)


class CountingWorkers(Workers):
    def window(self, limit=None, *, keep_going=False):
        return CountingWindow(self, limit, keep_going=keep_going)


@pytest.fixture
def counts():
    CountingWindow.counts.clear()
    CountingWindow.stop_after = None
    return CountingWindow


def segment(slide, tmp_path, settings=SETTINGS, block=256, workers=None, **options):
    workers = workers or Workers()
    plan = fit_slide(slide, PLAIN, workers)
    scratch = options.pop("scratch", tmp_path / f"scratch-{block}")
    report = engine.segment_slide(slide, "cells", settings, plan, workers, block, scratch, **options)
    return read_labels(slide, "cells", Box(0, 0, *image_info(slide).shape[1:])), report


@pytest.mark.slow
@pytest.mark.parametrize("diameter", [None, "auto", 20.0])
def test_disk_to_disk_equals_the_lazy_labels_for_any_block(slide, tmp_path, picture, diameter):
    expected = dc.segment(picture, model="tiny", diameter=diameter).compute()
    assert expected.max() > 50
    for block in (256, 400, 2048):
        settings = SegmentSettings(diameter=diameter)
        labels, report = segment(slide, tmp_path, settings, block)
        np.testing.assert_array_equal(labels, expected)
        assert report["cells"] == expected.max()
        assert report["conflicts"] == 0


def test_watershed_on_disk_equals_the_lazy_labels(slide, tmp_path, picture):
    expected = dc.segment(picture, method="watershed").compute()
    index = tmp_path / "index" / "slide.parquet"
    labels, report = segment(slide, tmp_path, SegmentSettings(method="watershed"), index=index)
    np.testing.assert_array_equal(read_index(index), block_records(labels))
    np.testing.assert_array_equal(labels, expected)
    assert report["tiles"] == 0 < report["cells"]


def test_what_waits_on_the_disk_is_as_large_as_its_cells(tmp_path):
    picture = np.zeros((900, 900), np.uint8)
    picture[:430, :430] = np.clip(blobs((430, 430), 11, radius=11), 0, 1) * 200
    tifffile.imwrite(tmp_path / "picture.tif", picture)
    dc.convert(tmp_path / "picture.tif", tmp_path / "picture.zarr")
    labels, _ = segment(tmp_path / "picture.zarr", tmp_path, block=304)
    files = list((tmp_path / "scratch-304" / "candidates").iterdir())
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 9
    assert min(sizes) < 3000  # no cell there
    # Two float32 numbers for each pixel of a cell; those near a border are kept by two blocks.
    assert 8 * (labels > 0).sum() < sum(sizes) < 16 * (labels > 0).sum()
    found = load_candidates(max(files, key=lambda file: file.stat().st_size))
    save_candidates(tmp_path / "again.npz", found)
    again = load_candidates(tmp_path / "again.npz")
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert not found.flows[:, found.labels == 0].any()
    assert found.flows[:, found.labels > 0].any()


@pytest.mark.slow
def test_every_tile_is_computed_once_and_blocks_take_few_tasks(slide, tmp_path, counts):
    _, report = segment(slide, tmp_path, workers=CountingWorkers())
    blocks = report["blocks"]
    assert blocks == 6
    assert report["tiles"] == 3 * 3
    assert report["repeated"] == 0
    assert 0 < counts.counts["run_tiles"] <= blocks  # a small block may hold no tile's centre
    for task in ("label_block", "paint_block"):
        assert counts.counts[task] == blocks
    assert 0 < counts.counts["check_blocks"] < blocks, "some checks a task"
    assert counts.counts.total() <= 4 * blocks, counts.counts
    assert not list((tmp_path / "scratch-256").rglob("tiles/*.npy")), "tiles are removed when used"


def test_few_calls_lead_from_the_engine_to_the_network(slide, tmp_path, monkeypatch):
    frames = []

    class Network:
        device, dtype = "cpu", None

        def eval(self):
            pass

        def forward(self):
            """Asked for by name alone."""

        def __call__(self, tiles):
            import torch

            stack = [frame.filename for frame in traceback.extract_stack()]
            frames.append(
                sum("daskcell/segmentation" in name or "daskcell/storage" in name for name in stack)
            )
            return (torch.zeros(len(tiles), 3, 256, 256),)

    monkeypatch.setattr(installed, "network_source", lambda model, device, *_: Network())
    segment(slide, tmp_path)
    assert frames
    assert max(frames) <= 5


@pytest.mark.slow
def test_a_slide_of_four_blocks_takes_sixteen_tasks(slide, tmp_path, picture, monkeypatch):
    """With the largest levels too: pyramids of small slides are one task."""
    tifffile.imwrite(tmp_path / "wide.tif", np.tile(picture, (2, 2)))
    dc.convert(tmp_path / "wide.tif", tmp_path / "wide.zarr")
    ran = Counter()
    workers = Workers(on_task=lambda: ran.update(all=1))
    _, report = segment(tmp_path / "wide.zarr", tmp_path, block=640, workers=workers)
    assert report["blocks"] == 4
    assert len(image_info(tmp_path / "wide.zarr").levels) == 2
    assert ran["all"] <= 16


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.15, 0.45, 0.6, 0.8, 0.99])
def test_a_run_that_is_killed_goes_on_where_it_was(slide, tmp_path, counts, share):
    expected, _ = segment(slide, tmp_path, workers=CountingWorkers(), scratch=tmp_path / "undisturbed")
    networks, all_tasks = counts.counts["run_tiles"], counts.counts.total()
    shutil.rmtree(slide / "labels")
    counts.counts.clear()
    counts.stop_after = int(share * all_tasks)
    with pytest.raises(KeyboardInterrupt):
        segment(slide, tmp_path, workers=CountingWorkers())
    counts.stop_after = None
    counts.counts.clear()
    labels, _ = segment(slide, tmp_path, workers=CountingWorkers())
    np.testing.assert_array_equal(labels, expected)
    assert counts.counts["run_tiles"] < networks or share < 0.4


@pytest.mark.slow
def test_thresholds_change_without_the_network(slide, tmp_path, counts):
    flows = tmp_path / "flows"
    segment(slide, tmp_path, workers=CountingWorkers(), flows=flows)
    assert counts.counts["run_tiles"] > 0
    counts.counts.clear()
    changed = SegmentSettings(diameter=None, cellprob_threshold=1.0, flow_threshold=0.3, min_size=60)
    labels, report = segment(
        slide, tmp_path, changed, workers=CountingWorkers(), flows=flows, scratch=tmp_path / "other"
    )
    assert counts.counts["run_tiles"] == 0
    assert report["tiles"] == 0
    fresh, _ = segment(slide, tmp_path, changed, scratch=tmp_path / "fresh")
    np.testing.assert_array_equal(labels, fresh)


@pytest.mark.slow
def test_the_network_computes_in_the_precision_that_is_asked_for(slide, tmp_path, counts):
    found = {}
    for precision in (None, "float32", "bfloat16"):
        counts.counts.clear()
        settings = SegmentSettings(diameter=None, precision=precision)
        options = {"flows": tmp_path / f"flows-{precision}", "scratch": tmp_path / str(precision)}
        segment(slide, tmp_path, settings, workers=CountingWorkers(), **options)
        assert counts.counts["run_tiles"] > 0
        files = sorted((tmp_path / f"flows-{precision}").glob("tiles/*"))
        found[precision] = np.load(files[-1])
    np.testing.assert_array_equal(found[None], found["float32"])
    moved = np.abs(found["bfloat16"] - found["float32"])
    assert 0 < moved.max() < 1


@pytest.mark.slow
def test_glass_is_skipped_and_tissue_stays_the_same(tmp_path):
    rng = np.random.default_rng(0)
    picture = np.full((760, 800, 3), 240, np.float32)
    cells = blobs((300, 300), 3, radius=8)
    picture[:300, :300] -= np.stack([150 * cells, 180 * cells, 60 * cells], -1)
    picture = np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "slide.tif", picture, photometric="rgb")
    dc.convert(tmp_path / "slide.tif", tmp_path / "slide.zarr")
    everything, _ = segment(tmp_path / "slide.zarr", tmp_path, scratch=tmp_path / "a")
    masked, report = segment(
        tmp_path / "slide.zarr",
        tmp_path,
        SegmentSettings(diameter=None, tissue_mask=True),
        scratch=tmp_path / "b",
    )
    assert everything[:280, :280].max() > 20
    cells = np.unique(everything[:300, :300])
    assert same_cells(masked, np.where(np.isin(everything, cells), everything, 0))[0] == len(cells) - 1
    assert 0.4 < report["skipped_fraction"] < 0.9
    assert report["tiles"] + report["skipped"] == 4 * 4


@pytest.mark.slow
def test_the_network_runs_on_gpu_workers_and_everything_else_on_cpu_workers(slide, tmp_path, monkeypatch):
    from distributed import Client, SpecCluster, Worker, get_worker
    from distributed.scheduler import Scheduler

    expected, _ = segment(slide, tmp_path, scratch=tmp_path / "here")
    places: dict[str, Counter] = {}
    for name in ("run_tiles", "label_block", "check_blocks", "paint_block"):
        function = getattr(tasks, name)

        @wraps(function)  # by the same name, so that it is sent by reference
        def noted(*args, _function=function):
            places.setdefault(_function.__name__, Counter())[get_worker().name] += 1
            return _function(*args)

        monkeypatch.setattr(engine, name, noted)
        monkeypatch.setattr(tasks, name, noted)
    spec = {
        name: {"cls": Worker, "options": {"nthreads": 1, "resources": {label: 1}, "dashboard": False}}
        for name, label in {"gpu": "GPU", "cpu-0": "CPU", "cpu-1": "CPU"}.items()
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "port": 0, "host": "127.0.0.1"}}
    with SpecCluster(spec, scheduler) as cluster, Client(cluster) as client:
        labels, _ = segment(slide, tmp_path, workers=Workers(client))
    np.testing.assert_array_equal(labels, expected)
    assert places["run_tiles"].keys() == {"gpu"}
    for name in ("label_block", "check_blocks", "paint_block"):
        assert places[name].keys() <= {"cpu-0", "cpu-1"}
        assert places[name].total() >= (2 if name == "check_blocks" else 6)


@pytest.mark.slow
def test_blocks_that_look_further_ask_gpu_workers_for_the_tiles_they_lack(tmp_path, monkeypatch):
    from blobs import BlobNetwork
    from distributed import Client, SpecCluster, Worker, get_worker
    from distributed.scheduler import Scheduler

    def network():
        if not here and get_worker().name != "gpu":
            raise AssertionError("the network was asked for where there is no GPU")
        return BlobNetwork(sigma=12)

    picture = np.uint8(np.clip(blobs((420, 440), 5, radius=30, density=0.003), 0, 1) * 200)
    tifffile.imwrite(tmp_path / "picture.tif", picture)
    dc.convert(tmp_path / "picture.tif", tmp_path / "picture.zarr")
    monkeypatch.setattr(installed, "network_source", lambda model, device, *_: network)
    monkeypatch.setattr(CellposeMethod, "halo", 16)
    settings = SegmentSettings(diameter=None, niter=500)
    here = True
    expected, report = segment(tmp_path / "picture.zarr", tmp_path, settings, block=4096)
    assert report["redone"] == 0
    here = False
    spec = {
        name: {"cls": Worker, "options": {"nthreads": 1, "resources": {label: 1}, "dashboard": False}}
        for name, label in {"gpu": "GPU", "cpu-0": "CPU", "cpu-1": "CPU"}.items()
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "port": 0, "host": "127.0.0.1"}}
    with SpecCluster(spec, scheduler) as cluster, Client(cluster) as client:
        labels, report = segment(
            tmp_path / "picture.zarr", tmp_path, settings, block=128, workers=Workers(client)
        )
    np.testing.assert_array_equal(labels, expected)
    assert report["redone"] > 5
    assert report["repeated"] > 0
    assert report["tiles"] > report["repeated"]
    assert not any((tmp_path / "scratch-128" / "extra_tiles").iterdir())


def test_a_slide_that_could_overflow_the_labels_is_refused_before_any_work(tmp_path):
    plan = Plan((80_000, 100_000), 1, np.dtype(np.uint8))
    arguments = (Workers(), 2048, tmp_path / "scratch")
    with pytest.raises(InputError, match="raise min_size to 2 or more"):
        engine.segment_slide(tmp_path / "none.zarr", "cells", SegmentSettings(min_size=1), plan, *arguments)
    assert not (tmp_path / "scratch").exists()


def test_too_many_channels_ask_which(tmp_path):
    stack = np.stack([np.uint8(255 * np.clip(blobs((90, 80), seed), 0, 1)) for seed in range(5)])
    tifffile.imwrite(tmp_path / "five.tif", stack, photometric="minisblack", metadata={"axes": "CYX"})
    dc.convert(tmp_path / "five.tif", tmp_path / "five.zarr")
    with pytest.raises(InputError, match="5 channels after preprocessing"):
        segment(tmp_path / "five.zarr", tmp_path)
    with pytest.raises(InputError, match="does not fit"):
        segment(tmp_path / "five.zarr", tmp_path, SegmentSettings(channels=[7]))
    labels, _ = segment(tmp_path / "five.zarr", tmp_path, SegmentSettings(channels=[3], diameter=None))
    assert labels.shape == (90, 80)
