"""Blocks give the cells of the whole picture, and the cells of Cellpose."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from blobs import BlobNetwork, blobs, same_cells
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daskcell.errors import InputError
from daskcell.segmentation import segment


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
    """Labels and seam report."""
    return dask.compute(*segment(image, return_report=True, **options), scheduler="synchronous")


def assert_same_cells(labels, expected, share=0.999):
    """No cell missing or extra; all but `share` (at least one) pixel by pixel, those to IoU 0.95.

    Cellpose's own labels change in a pixel now and then with its batch size, as convolutions do in the last
    bit.
    """
    assert labels.max() == expected.max() > 0
    same, found, true = same_cells(labels, expected)
    assert found == true
    assert true - same <= max(1, (1 - share) * true)
    assert (labels != expected).sum() <= 0.05 * true * np.median(np.bincount(expected.ravel())[1:])


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


@pytest.mark.parametrize("diameter", [12, 20.0, 47])
def test_rescaling_by_a_diameter_gives_the_cells_of_the_whole_picture(serial, diameter):
    image = blobs((430, 610), 3)
    net = BlobNetwork()
    expected = whole(serial, image, net, diameter=diameter)
    labels, _ = run(image, model=net, diameter=diameter, block=200)
    assert_same_cells(labels, expected, 0.995)


@pytest.mark.slow
def test_a_picture_above_the_sampling_limit_has_cellposes_sampled_percentiles(serial, monkeypatch):
    import torch

    # Of seeds with equally many pixels an unstable sort prefers any; in a tiled picture there are thousands.
    argsort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda tensor: argsort(tensor, stable=True))
    # Brightness drifts over the picture, so the strided sample and all values give other percentiles.
    image = np.tile(blobs((1130, 1160), 1), (3, 3))
    image *= np.linspace(0.5, 1.5, image.shape[1], dtype=np.float32)
    assert image.size > 224**3
    options = {"flow_threshold": 0.0, "niter": 60}  # Cellpose's flow check alone takes minutes here
    expected = whole(serial, image, BlobNetwork(), **options)
    image = da.from_array(image, chunks=(1000, 777))
    labels, report = run(image, model=BlobNetwork(), block=1024, **options)
    assert expected.max() > 4000
    assert_same_cells(labels, expected)
    assert report.conflicts == 0


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float64", "bool"])
def test_every_kind_of_number_is_segmented(serial, dtype):
    image = blobs((300, 280), 2)
    if dtype == "bool":
        image = image > 0.4
    elif dtype != "float64":
        image = np.clip(image * 200, 0, 255).astype(dtype)
    image = image.astype(dtype)
    net = BlobNetwork()
    assert_same_cells(run(image, model=net, block=150)[0], whole(serial, image, net))


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


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.integers(20, 600), st.integers(20, 600)),
    chunks=st.tuples(st.integers(13, 400), st.integers(13, 400)),
    block=st.integers(64, 500),
    seed=st.integers(0, 1000),
    method=st.sampled_from(["cellpose", "watershed"]),
)
def test_labels_do_not_depend_on_chunks_or_blocks(shape, chunks, block, seed, method):
    image = blobs(shape, seed)
    options = {"model": BlobNetwork()} if method == "cellpose" else {}
    expected, _ = run(image, method=method, block=4096, **options)
    labels, report = run(da.from_array(image, chunks=chunks), method=method, block=block, **options)
    np.testing.assert_array_equal(labels, expected)
    assert report.conflicts == 0


def test_each_tile_goes_through_the_network_once():
    net = BlobNetwork()
    _, report = run(blobs((600, 800), 5), model=net, block=300, batch_size=1)
    assert net.tiles == report.tiles == 3 * 4
    assert report.repeated == 0


def test_a_cell_larger_than_any_halo_comes_out_whole(serial):
    image = blobs((420, 440), 5, radius=30, density=0.003)
    net = BlobNetwork(sigma=12)
    expected = whole(serial, image, net, niter=500)
    labels, report = run(image, model=net, block=128, halo=16, niter=500)
    assert_same_cells(labels, expected)
    np.testing.assert_array_equal(labels, run(image, model=net, block=4096, niter=500)[0])
    assert report.redone > 5
    assert report.conflicts == 0


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

    from daskcell.geometry import Box, Grid
    from daskcell.segmentation.seams import SeamReport, count_changes

    grid = Grid.regular((512, 512), 128)

    def rate(labels):
        total = SeamReport()
        for at in grid:
            core = grid.core(at)
            held = Box(core.y0, core.x0, core.y1 + 1, core.x1 + 1).clip(grid.shape)
            total += count_changes(labels[held.slices], held, core)
        return total.cut_rate

    assert rate(cut) > 0.3
    assert abs(rate(good)) < 0.05


def test_any_function_of_a_block_becomes_a_method_without_seams():
    from skimage.measure import label

    image = blobs((300, 400), 7)
    expected, _ = run(image, method=lambda block: label(block[0] > 0.4), block=4096)
    labels, report = run(image, method=lambda block: label(block[0] > 0.4), block=70)
    np.testing.assert_array_equal(labels, expected)
    assert report.redone > 0
    assert labels.max() == report.cells > 20


def test_ids_run_in_reading_order_from_one():
    labels, _ = run(blobs((400, 400), 8), model=BlobNetwork(), block=90)
    flat = labels.ravel()
    ids, first = np.unique(flat, return_index=True)
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(ids, np.arange(ids[-1] + 1))
    assert (np.diff(first[1:]) > 0).all()


def test_a_ring_swallows_what_lies_in_it_whoever_owns_it():
    from daskcell.geometry import Box
    from daskcell.segmentation.cells import check_block, paint
    from daskcell.segmentation.ownership import Thresholds, choose_owned

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


def test_constant_and_empty_pictures_have_no_cells():
    assert run(np.full((3, 90, 80), 7, np.uint8), model=BlobNetwork())[0].max() == 0
    assert run(np.zeros((90, 80)), method="watershed")[0].max() == 0


@pytest.mark.parametrize(
    ("image", "options", "says"),
    [
        (np.zeros((0, 5, 5)), {}, "0 channels"),
        (np.zeros((5, 5, 5)), {}, "5 channels, and one to 3"),
        (np.zeros((5, 5, 5)), {"channels": [0, 9]}, "does not fit"),
        (np.zeros((5,)), {}, "shape"),
        (np.zeros((2, 5, 5, 5)), {}, "shape"),
        (np.zeros((1, 0, 5)), {}, "no pixels"),
        (np.zeros((5, 5), complex), {}, "complex"),
        (np.zeros((9, 9)), {"method": "magic"}, "magic"),
        (np.zeros((9, 9)), {"diameter": -3}, "-3"),
        (np.zeros((9, 9)), {"diameter": "big"}, "big"),
        (np.zeros((9, 9)), {"diameter": 1000}, "leaves no pixel"),
        (np.zeros((9, 9)), {"method": "watershed", "opening": -1}, "opening"),
        (np.zeros((9, 9)), {"method": "watershed", "spline": 1}, "spline"),
    ],
)
def test_what_cannot_be_segmented_is_refused_with_the_value(image, options, says):
    with pytest.raises(InputError, match=says):
        segment(image, **{"model": BlobNetwork()} | options)


def test_a_picture_that_could_overflow_the_labels_is_refused_before_any_work():
    image = da.zeros((80_000, 100_000), chunks=20_000, dtype=np.uint8)
    segment(image, model=BlobNetwork(), block=20_000)
    with pytest.raises(InputError, match="raise min_size to 2 or more"):
        segment(image, model=BlobNetwork(), min_size=1)


def test_threads_of_the_network_change_at_most_one_cell_in_a_thousand():
    import torch

    image, net, threads = blobs((700, 800), 12), BlobNetwork(), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run(image, model=net, block=300)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_cells(other, results[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(value):
    image = blobs((100, 100), 1)
    image[40, 50] = value
    for method in ("cellpose", "watershed"):
        with pytest.raises(InputError, match="1 NaN or infinite"):
            run(image, method=method, model=BlobNetwork())


def test_a_method_that_returns_no_labels_is_told_so():
    with pytest.raises(InputError, match="whole-number labels"):
        run(blobs((50, 50)), method=lambda block: block[0])


def test_workers_in_other_processes_give_the_same_labels():
    from distributed import Client

    image = blobs((600, 500), 9)
    expected, _ = run(image, model=BlobNetwork(), block=4096)
    with Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as client:
        labels = segment(da.from_array(image, chunks=200), model=BlobNetwork(), block=128, halo=8)
        np.testing.assert_array_equal(client.compute(labels).result(), expected)
