"""Blocks give the cells of the whole picture, and the cells of Cellpose."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path

import dask
import numpy as np
import pytest
from blobs import BlobNetwork, blobs, cell_ious, same_cells

import daskcell
from daskcell.geometry import Grid
from daskcell.segmentation import blocks, segment
from daskcell.segmentation.methods import CellposeMethod


@pytest.fixture(scope="module")
def serial():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "serial.py"
    spec = importlib.util.spec_from_file_location("serial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole(serial, image, net, **options):
    """`CellposeModel.eval` on the whole array."""
    image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    axis = -1 if image.ndim == 3 else None
    return serial.cellpose_model(net).eval(image, channel_axis=axis, bsize=256, tile_overlap=0.1, **options)[
        0
    ]


def run(image, **options):
    """Labels and seam report, by Cellpose's own defaults."""
    options = {"diameter": None, "normalize": "cellpose"} | options
    return dask.compute(*segment(image, return_report=True, **options), scheduler="synchronous")


def assert_same_cells(labels, expected, identical=0.999, close=1.0):
    """None missing, none extra; so many pixel by pixel (but one, in a small picture), so many at IoU 0.95."""
    ious = cell_ious(labels, expected)
    assert len(ious) == labels.max() == expected.max() > 0
    assert (ious == 1).sum() >= min(identical * len(ious), len(ious) - 1)
    assert (ious >= 0.95).sum() >= close * len(ious)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "channels"), [((520, 430), 1), ((257, 700), 3), ((120, 90), 2), ((255, 256), 1), ((16, 400), 1)]
)
def test_blocks_give_every_cell_of_the_whole_picture_pixel_by_pixel(serial, shape, channels):
    image = np.stack([blobs(shape, seed) for seed in range(channels)])
    net = BlobNetwork()
    expected = whole(serial, image, net)
    for block in (2048, 150):
        labels, report = run(image, model=net, block=block)
        assert_same_cells(labels, expected)
        assert report.cells == expected.max()
        assert report.conflicts == 0


@pytest.mark.slow
@pytest.mark.parametrize("diameter", [12, 20.0, 47])
def test_rescaling_by_a_diameter_gives_the_cells_of_the_whole_picture(serial, diameter):
    image = blobs((430, 610), 3)
    net = BlobNetwork()
    expected = whole(serial, image, net, diameter=diameter)
    labels, _ = run(image, model=net, diameter=diameter, block=200)
    assert_same_cells(labels, expected, identical=0.99, close=0.995)


@pytest.mark.slow
def test_the_embedded_network_gives_the_cells_of_the_whole_picture(serial):
    from daskcell.models import load_network

    image, net = blobs((900, 950), 13, radius=6), load_network("tiny")
    expected = whole(serial, image, net)
    assert expected.max() > 800
    labels, _ = run(image, model=net, block=400)
    assert_same_cells(labels, expected)


def test_the_network_sees_the_pixels_that_cellpose_shows_it_of_an_image_above_its_sampling_limit(
    serial, monkeypatch
):
    from cellpose.models import CellposeModel

    class Shown(Exception):
        pass

    def show(self, pixels, *args, **options):
        raise Shown(pixels)

    # Brightness drifts over the image, so the strided sample and all values give other percentiles.
    image = np.tile(blobs((565, 580), 1), (6, 6))
    image *= np.linspace(0.5, 1.5, image.shape[1], dtype=np.float32)
    assert image.size > 224**3
    monkeypatch.setattr(CellposeModel, "_run_net", show)
    with pytest.raises(Shown) as stop:
        whole(serial, image, BlobNetwork())
    expected = np.squeeze(stop.value.args[0])
    expected = expected[..., 0] if expected.ndim == 3 else expected

    method = CellposeMethod(None, normalize="cellpose")
    grid = Grid((0, 1000, 1004, image.shape[0]), (0, 776, 3000, image.shape[1]))
    read = lambda box: image[None, box.y0 : box.y1, box.x0 : box.x1]  # noqa: E731
    observed = [blocks.observe(method, read, [grid.core(at)], image.shape) for at in grid]
    params = blocks.fit(method, observed, image.shape)
    np.testing.assert_array_equal(params.normalise(image[None])[0], expected)
    assert not np.allclose(params.bounds[0], np.percentile(image, (1, 99)), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"cellprob_threshold": 2.0},
        {"flow_threshold": 0.0},
        {"flow_threshold": 0.15},
        {"min_size": 150},
        {"min_size": 0},
        {"max_size_fraction": 0.002},
        {"niter": 40},
    ],
)
def test_thresholds_mean_what_they_mean_to_cellpose(serial, options):
    image = blobs((420, 450), 4)
    net = BlobNetwork()
    expected = whole(serial, image, net, **options)
    assert_same_cells(run(image, model=net, block=128, **options)[0], expected)


@pytest.mark.slow
def test_a_cell_larger_than_any_halo_comes_out_whole(serial):
    image = blobs((300, 320), 5, radius=30, density=0.003)
    net = BlobNetwork(sigma=12)
    expected = whole(serial, image, net, niter=500)
    labels, report = run(image, model=net, block=96, halo=16, niter=500)
    assert_same_cells(labels, expected)
    np.testing.assert_array_equal(labels, run(image, model=net, block=4096, niter=500)[0])
    assert report.halo_retries > 5
    assert report.conflicts == 0


@pytest.mark.parametrize(("limit", "cells"), [(0.4, 1), (0.05, 0)])
def test_a_mask_over_many_blocks_is_dropped_by_its_share_of_the_whole_picture(limit, cells):
    image = np.zeros((300, 500), np.uint8)
    image[40:260, 50:250] = 1  # 0.32 of the picture, and all of the blocks within
    labels, report = run(image, method=lambda block: block[0], block=60, halo=8, max_size_fraction=limit)
    np.testing.assert_array_equal(labels, image * cells)
    assert report.cells == cells
    assert report.halo_retries > 0


@pytest.mark.slow
def test_without_ownership_blocks_cut_cells():
    """The control: the same picture, block by block, as others do it. The seam report must see it."""
    image = blobs((512, 512), 6)
    net = BlobNetwork()
    good, _ = run(image, model=net)
    cut = np.zeros_like(good)
    for y in range(0, 512, 128):
        for x in range(0, 512, 128):
            part, _ = run(image[y : y + 128, x : x + 128], model=net)
            cut[y : y + 128, x : x + 128] = np.where(part > 0, part + cut.max(), 0)
    same, _, true = same_cells(cut, good)
    assert same < 0.7 * true

    from daskcell.geometry import Box
    from daskcell.segmentation.core.seams import SeamReport, count_changes

    grid = Grid.regular((512, 512), 128)

    def rate(labels):
        total = SeamReport()
        for at in grid:
            core = grid.core(at)
            grown = Box(core.y0, core.x0, core.y1 + 1, core.x1 + 1).clip(grid.shape)
            total += count_changes(labels[grown.slices], core)
        return total.cut_rate

    assert rate(cut) > 0.3
    assert abs(rate(good)) < 0.05


def test_any_function_of_a_block_becomes_a_method_without_seams():
    from skimage.measure import label

    image = blobs((300, 400), 7)
    expected, _ = run(image, method=lambda block: label(block[0] > 0.4), block=4096)
    labels, report = run(image, method=lambda block: label(block[0] > 0.4), block=70)
    np.testing.assert_array_equal(labels, expected)
    assert report.halo_retries > 0
    assert labels.max() == report.cells > 20


def test_the_readmes_example_of_a_method_runs_as_it_stands():
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    example = re.search(r"no\s+seams\s+either:\n\n((?:    .*\n)+)", text)[1]
    names = {"dc": daskcell, "x": blobs((1050, 1100), 7)}
    exec(textwrap.dedent(example), names)
    labels = names["labels"]
    assert labels.numblocks == (2, 2)
    expected, _ = run(names["x"], method=lambda block: names["label"](block[0] > 0.3), block=4096)
    np.testing.assert_array_equal(labels.compute(scheduler="synchronous"), expected)
    assert expected.max() > 100


@pytest.mark.slow
def test_ids_run_in_reading_order_from_one():
    labels, _ = run(blobs((400, 400), 8), model=BlobNetwork(), block=90)
    flat = labels.ravel()
    ids, first = np.unique(flat, return_index=True)
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(ids, np.arange(ids[-1] + 1))
    assert (np.diff(first[1:]) > 0).all()


def test_a_ring_swallows_what_lies_in_it_whoever_owns_it():
    from daskcell.geometry import Box
    from daskcell.segmentation.core.cells import check_block, paint
    from daskcell.segmentation.core.ownership import Thresholds, choose_owned

    picture = np.zeros((60, 60), np.int32)
    picture[10:50, 10:50] = 1
    picture[20:40, 20:40] = 0
    picture[27:33, 27:33] = 2
    limits = Thresholds(flow=0.0, min_size=5, max_size_fraction=1.0)
    held, none = Box(0, 0, 60, 60), np.zeros((60, 60), bool)
    parts = []
    for core in (Box(0, 0, 25, 60), Box(25, 0, 60, 60)):
        found = choose_owned(picture, none, None, held, core, (60, 60), limits)
        parts.append(check_block(found, 0, limits))
    assert [len(part) for part in parts] == [1, 0]
    labels, conflicts = paint([(part, np.arange(1, len(part) + 1)) for part in parts], held)
    assert (labels[10:50, 10:50] == 1).all()
    assert conflicts == 0
