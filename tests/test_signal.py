"""Sparse and padded images: the cells of the patch that holds them, whatever lies around it."""

from __future__ import annotations

from functools import lru_cache

import dask.array as da
import numpy as np
import pytest
import skimage.draw
from hypothesis import given, settings
from hypothesis import strategies as st

import daskcell as dc
from daskcell.config import PreprocessSettings, WatershedSettings
from daskcell.geometry import Box, Grid
from daskcell.images import Image
from daskcell.pipeline import status
from daskcell.pipeline.progress import Progress
from daskcell.preprocess import Plan, fit_plan
from daskcell.preprocess.signal import ROWS, SPAN, TILE, aligned, bin_values, count_tiles, find_signal
from daskcell.preprocess.steps import Stretch
from daskcell.segmentation.methods import CellposeMethod, WatershedMethod

PATCH = 256
CENTRES = [(50, 60), (60, 170), (120, 40), (140, 130), (200, 210), (210, 90)]


@lru_cache(maxsize=8)
def dark_field(side, dtype=np.uint16, cells=6, seed=0):
    """Bright cells in one patch of a dark field with shot and read noise; and the patch."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:PATCH, :PATCH]
    light = np.zeros((side, side))
    for n, (y, x) in enumerate(CENTRES[:cells]):
        inside = np.clip((14 - np.hypot(yy - y, xx - x)) / 4 + 0.5, 0, 1)
        light[41 : 41 + PATCH, 54 : 54 + PATCH] += (0.7 + 0.1 * n) * inside
    if dtype == np.uint8:
        pixels = rng.poisson(150 * light + 6) + rng.normal(0, 1.5, light.shape)
    else:
        pixels = 2 * rng.poisson(700 * light + 20) + 60 + rng.normal(0, 4, light.shape)
    pixels = np.clip(np.rint(pixels), 0, np.iinfo(dtype).max).astype(dtype)
    pixels.flags.writeable = False
    return pixels, (slice(41, 41 + PATCH), slice(54, 54 + PATCH))


def padded(image, patch, value=0, before=512, after=800):
    moved = tuple(slice(place.start + before, place.stop + before) for place in patch)
    return np.pad(image, ((before, after), (before, after)), constant_values=value), moved


def with_gaps(image, patch):
    image = image.copy()
    image[:20, :] = image[500:700, 300:] = image[800:, 100:400] = 0
    return image, patch


def with_defects(image, patch):
    """Hot pixels, and a speck of dust."""
    image, rng = image.copy(), np.random.default_rng(1)
    image[tuple(rng.integers(0, len(image), (2, 40)))] = np.iinfo(image.dtype).max
    image[700:703, 700:704] = np.iinfo(image.dtype).max
    return image, patch


AROUND = {
    "field": lambda image, patch: (image, patch),
    "rim": padded,
    "one side": lambda image, patch: (np.pad(image, ((0, 0), (0, 1500))), patch),
    "gaps": with_gaps,
    "defects": with_defects,
}


WHITE = {
    "white rim": lambda image, patch: padded(image, patch, np.iinfo(image.dtype).max, 67, 130),
    "white side": lambda image, patch: (np.pad(image, ((0, 0), (0, 170)), constant_values=250), patch),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8, np.float32, np.int32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("around", AROUND | WHITE)
def test_percentiles_are_those_of_the_cells_and_not_of_the_noise(around, dtype):
    field = dark_field(1024, np.uint8 if dtype == np.uint8 else np.uint16)
    image, _patch = (AROUND | WHITE)[around](*field)
    alone = field[0][field[1]].astype(dtype)
    (stretch,) = fit_plan(image[None].astype(dtype)).steps
    (expected,) = fit_plan(alone[None]).steps
    width = expected.high[0] - expected.low[0]
    assert stretch.low[0] == pytest.approx(expected.low[0], abs=0.03 * width)
    assert stretch.high[0] == pytest.approx(expected.high[0], abs=0.4 * width)

    ((low, high),) = bounds(image[None].astype(dtype))
    ((low_alone, high_alone),) = bounds(alone[None])
    width = high_alone - low_alone
    assert (low, high) == pytest.approx((low_alone, high_alone), abs=0.4 * width)
    assert low == pytest.approx(low_alone, abs=0.03 * width)


def count_whole(image):
    return count_tiles(image, Box(0, 0, *image.shape[1:]), image.shape[1:])


def bounds(image, normalize="signal"):
    method, box = CellposeMethod(None, normalize=normalize), Box(0, 0, *image.shape[1:])
    return method.fit(method.observe(image, box, box.shape), box.shape).bounds


@lru_cache
def cells_alone(dtype):
    field, patch = dark_field(1024, dtype)
    return dc.segment(dc.prepare(field[patch][None]), method="watershed").compute(scheduler="synchronous")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8], ids=lambda d: d.__name__)
@pytest.mark.parametrize("around", AROUND)
def test_the_watershed_finds_the_cells_of_the_patch_alone(around, dtype):
    field, patch = dark_field(1024, dtype)
    alone = cells_alone(dtype)
    image, patch = AROUND[around](field, patch)
    found = dc.segment(dc.prepare(image[None]), method="watershed").compute(scheduler="synchronous")
    assert found.max() == alone.max() == len(CENTRES)
    assert_alike(found[patch], alone)


@pytest.mark.slow
def test_cellpose_finds_the_cells_of_the_patch_alone():
    image, patch = padded(*dark_field(512), before=64, after=128)
    options = {"diameter": 28.0}
    alone = dc.segment(dc.prepare(image[patch][None]), **options).compute()
    found = dc.segment(dc.prepare(image[None]), **options).compute()
    assert found.max() == alone.max() == len(CENTRES)
    assert_alike(found[patch], alone)
    assert dc.segment(image, normalize="cellpose", **options).compute().max() < len(CENTRES)


def assert_alike(found, expected):
    for label in range(1, expected.max() + 1):
        cell = expected == label
        other = found == np.bincount(found[cell]).argmax()
        assert (cell & other).sum() / (cell | other).sum() > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8], ids=lambda d: d.__name__)
@pytest.mark.parametrize("spoil", [AROUND["field"], with_defects], ids=["clean", "defects"])
def test_nothing_is_found_in_an_empty_field(dtype, spoil):
    image, _ = spoil(*dark_field(1024, dtype, cells=0))
    labels = dc.segment(dc.prepare(image[None]), method="watershed").compute(scheduler="synchronous")
    assert labels.max() == 0


def test_little_tissue_on_a_bright_ground_keeps_its_contrast():
    rng = np.random.default_rng(0)
    dark = dark_field(1536)[0].clip(140, 1400) - 140.0
    light = np.stack([235 - 0.08 * dark, 230 - 0.12 * dark, 238 - 0.05 * dark])
    slide = np.clip(light + rng.normal(0, 2.5, light.shape), 0, 255).astype(np.uint8)
    patch = (slice(None), slice(41, 41 + PATCH), slice(54, 54 + PATCH))
    expected = stretch_of(slide[patch])
    for whole in (slide, np.pad(slide, ((0, 0), (300, 9), (0, 333)), constant_values=255)):
        found = stretch_of(whole)
        assert found.low == pytest.approx(expected.low, abs=40)
        assert found.high == pytest.approx(expected.high, abs=6)


def stretch_of(rgb):
    plan = fit_plan(rgb, is_rgb=True)
    return next(step for step in plan.steps if isinstance(step, Stretch))


@pytest.mark.slow
def test_a_channel_of_noise_is_not_shown_beside_one_with_cells():
    cells, noise = dark_field(1024)[0], dark_field(1024, cells=0, seed=3)[0]
    found = bounds(np.stack([cells, noise]))
    assert found[0] is not None
    assert found[1] is None
    assert None not in bounds(noise[None])


@pytest.mark.parametrize("coverage", [0.06, 0.3, 0.7])
def test_where_cells_cover_enough_nothing_changes_in_any_bit(coverage):
    rng = np.random.default_rng(0)
    image = rng.poisson(100, (400, 404)).astype(np.uint16)
    side = int(400 * coverage**0.5)
    image[40 : 40 + side, 4 : 4 + side] += rng.poisson(rng.uniform(200, 900, (side, side))).astype(np.uint16)
    assert bounds(image[None]) == bounds(image[None], "cellpose")
    (stretch,) = fit_plan(image[None]).steps
    assert (stretch.low[0], stretch.high[0]) == tuple(np.percentile(image, (0.2, 99.8)))


def test_a_ground_of_zeros_is_no_padding():
    image = np.zeros((300, 300), np.uint8)
    image[60:90, 60:90] = image[150:190, 100:140] = np.random.default_rng(0).integers(180, 220, (1,))
    image[200:230, 201:231] = 100
    assert bounds(image[None]) == bounds(image[None], "cellpose")
    small = np.pad(image, (0, 2000))  # 99 % and more of zeros
    assert bounds(small[None])[0] == (0.0, pytest.approx(200, abs=25))


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 4095), (np.float32, 1.0)])
@pytest.mark.parametrize("side", [120, 600])
def test_cells_that_saturate_the_camera_are_no_padding(dtype, full, side):
    """Flat, and of a value of their own, as padding is."""
    noise = np.random.default_rng(0).integers(0, 20, (side, side)) / 255 * full
    image = noise.astype(dtype)
    image[20:50, 20:50] = image[70:100, 60:90] = full
    labels = dc.segment(dc.prepare(image[None]), method="watershed").compute(scheduler="synchronous")
    assert labels.max() == 2
    assert (labels > 0)[image == full].mean() > 0.8


def discs(image, value, radius=14, count=12, seed=0):
    """Flat cells that do not touch."""
    side = len(image) // 4
    for place in np.random.default_rng(seed).permutation(16)[:count]:
        y, x = place // 4 * side + side // 2 - 3, place % 4 * side + side // 2 + 5
        image[skimage.draw.disk((y, x), radius, shape=image.shape)] = value
    return image


@pytest.mark.parametrize(("dtype", "ground"), [(np.uint8, 200), (np.uint16, 30000), (np.float32, 0.8)])
@pytest.mark.parametrize("radius", [6, 14, 30])
def test_flat_dark_cells_on_a_bright_ground_are_no_padding(dtype, ground, radius):
    noise = np.random.default_rng(0).normal(ground, 0.02 * ground, (300, 300))
    image = discs(noise.astype(dtype), 0, radius)
    (stretch,) = fit_plan(image[None]).steps
    assert stretch.low == (0,)
    labels = dc.segment(dc.prepare(image[None]), method="watershed").compute(scheduler="synchronous")
    assert labels.max() == 12
    assert (labels > 0)[image == 0].mean() > 0.8


def test_a_round_aperture_is_padding():
    image = discs(np.random.default_rng(0).normal(100, 5, (400, 400)).astype(np.uint8), 180)
    yy, xx = np.mgrid[:400, :400] - 200
    image[np.hypot(yy, xx) > 200] = 0
    (stretch,) = fit_plan(image[None]).steps
    assert (stretch.low[0], stretch.high[0]) == tuple(np.percentile(image[image > 0], (0.2, 99.8)))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_padding_of_any_form_changes_nothing(data):
    """The limits are those of the pixels that are no padding, in every bit."""
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16]))
    top = np.iinfo(dtype).max
    ground, cells = data.draw(st.sampled_from([(0.3, 0.6), (0.6, 0.9), (0.7, 0.3)]))
    side = data.draw(st.integers(230, 280))
    noise = np.random.default_rng(data.draw(st.integers(0, 9))).normal(ground, 0.02, (side, side))
    image = np.clip(noise * top, 1, top - 1).astype(dtype)
    image = discs(image, cells * top, radius=13)
    image += np.random.default_rng(1).integers(0, 9, image.shape).astype(dtype)  # not flat
    value = data.draw(st.sampled_from([0, top]))
    width = data.draw(st.integers(20, 200))
    form = data.draw(st.sampled_from(["rim", "side", "corner", "gap", "strip"]))
    seen = np.ones(image.shape, bool)
    if form in ("rim", "side"):
        around = (
            width
            if form == "rim"
            else data.draw(st.sampled_from([((width, 0), (0, 0)), ((0, 0), (0, width))]))
        )
        image = np.pad(image, around, constant_values=value)
        seen = np.pad(seen, around)
    elif form == "corner":
        seen[: side // 2, : side // 3] = False
    elif form == "gap":
        seen[21 : side // 2 + 50, 37 : side // 2 + 65] = False
    else:
        seen[:, 54:85] = False
    image[~seen] = value
    (stretch,) = fit_plan(image[None]).steps
    assert (stretch.low[0], stretch.high[0]) == tuple(np.percentile(image[seen], (0.2, 99.8)))


def count_by_hand(image):
    """What `count_tiles` counts of a plane, tile by tile."""
    height, width = (side // TILE for side in image.shape)
    counts = np.zeros((ROWS, 1 << (8 * image.dtype.itemsize)), np.int64)
    counts[0] = np.bincount(image.ravel(), minlength=counts.shape[1])
    flat = {}
    for y in range(height):
        for x in range(width):
            tile = image[TILE * y : TILE * y + TILE, TILE * x : TILE * x + TILE]
            at_rim = y in (0, height - 1) or x in (0, width - 1)
            counts[2, tile.min()] += 1
            counts[3, tile.max()] += 1
            counts[4, tile[0, 0]] += at_rim
            if tile.min() == tile.max():
                flat[y, x] = int(tile[0, 0])
                counts[1, tile[0, 0]] += 1
                counts[5, tile[0, 0]] += at_rim
    for y in range(height - 1):
        for x in range(width - 1):
            if (TILE * y + TILE) % SPAN == 0 or (TILE * x + TILE) % SPAN == 0:
                continue  # between squares of SPAN pixels nothing is compared
            four = [flat.get(place) for place in ((y, x), (y, x + 1), (y + 1, x + 1), (y + 1, x))]
            for value in {*four} - {None}:
                where = [i for i, one in enumerate(four) if one == value]
                if len(where) < 4:
                    beside = len(where) == 2 and where[1] - where[0] != 2
                    counts[6, value] += 1 if beside else -20
    return counts


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_counts_are_those_of_every_tile(data):
    shape = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    image = np.kron(rng.integers(0, 3, (18, 18)), np.ones((TILE, TILE))).astype(np.uint8)[
        : shape[0], : shape[1]
    ]
    image[rng.random(shape) < 0.01] = 7
    np.testing.assert_array_equal(count_whole(image[None])[0], count_by_hand(image))


def test_what_the_limits_leave_out_is_told():
    field, patch = dark_field(1024, cells=1)
    assert fit_plan(field[patch][None]).notes == ()
    padding, sparse = fit_plan(padded(field, patch, 65535, 64, 64)[0][None]).notes
    assert padding.startswith("21 % of the image is padding (value 65535)")
    assert "noise" in sparse
    assert "white is" in sparse
    plan = fit_plan(np.stack([field, field + np.uint16(5)]), PreprocessSettings(reconstruct=None))
    assert [note.split(":")[0] for note in plan.notes] == ["channel 1", "channel 2"]
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.slow
def test_a_run_and_its_report_tell_what_the_limits_leave_out(tmp_path):
    said: list[str] = []
    progress = Progress()
    progress.say = said.append  # type: ignore[method-assign]
    field, patch = dark_field(320)
    image, _ = padded(field + np.uint16(1000), patch, 0, 32, 32)
    chosen = {
        "segment": {"method": "watershed"},
        "features": {"encoder": "tiny"},
        "cluster": {"k": 2},
        "compute": {"kind": "inline", "block": 512},
    }
    study = dc.run([("mosaic", image)], tmp_path / "study", chosen, progress=progress)
    told = "mosaic: 30.6 % of the image is padding (value 0)"
    assert any(told in sentence for sentence in said)
    assert told in study.report
    assert told in status.table(status.report(study))


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_counts_do_not_depend_on_chunks(data):
    shape = data.draw(st.tuples(st.integers(9, 90), st.integers(9, 90)))
    chunks = tuple(
        tuple(np.diff([0, *sorted(data.draw(st.sets(st.integers(1, side - 1), max_size=4))), side]).tolist())
        for side in shape
    )
    image = np.random.default_rng(0).poisson(3, shape).astype(np.uint16)
    image[: shape[0] // 2] = 0
    image[-4:, -4:] = 900
    whole = fit_plan(image[None])
    lazy = dc.adjust_histogram(da.from_array(image, chunks=chunks))
    np.testing.assert_array_equal(lazy.compute(), dc.adjust_histogram(image).compute())
    assert fit_plan(da.from_array(image, chunks=chunks)[None]) == whole
    cut = aligned(chunks, SPAN)
    assert all(sum(sides) == side for sides, side in zip(cut, shape, strict=True))
    assert all(end % SPAN == 0 for sides in cut for end in np.cumsum(sides)[:-1])
    grid = Grid.from_chunks(cut)
    parts = (grid.core(at) for at in grid)
    total = sum(count_tiles(image[None][(slice(None), *part.slices)], part, shape) for part in parts)
    np.testing.assert_array_equal(total, count_whole(image[None]))


def test_an_image_kept_with_its_histogram_gives_the_plan_of_its_pixels(tmp_path):
    import tifffile

    from daskcell.preprocess import fit_slide

    image, _ = padded(*dark_field(1024))
    tifffile.imwrite(tmp_path / "sparse.tif", image)
    dc.convert(tmp_path / "sparse.tif", tmp_path / "sparse.zarr")
    assert fit_slide(tmp_path / "sparse.zarr") == fit_plan(image[None])


def test_one_value_is_no_signal():
    assert (
        find_signal(count_whole(np.full((1, 64, 64), 7, np.uint8))[0], bin_values(np.dtype(np.uint8))) is None
    )
    assert dc.segment(np.full((64, 64), 7, np.uint8), method="watershed").compute().max() == 0


def test_the_watershed_takes_the_threshold_it_is_given():
    image, _ = dark_field(1024)
    method, box = (
        WatershedMethod(WatershedSettings(threshold=0.3)),
        Box(0, 0, 1024, 1024),
    )
    assert method.fit(method.observe(image[None], box, box.shape), box.shape).threshold == 0.3


def test_an_image_is_prepared_as_what_it_is():
    pixels = da.from_array(np.random.default_rng(0).integers(0, 200, (3, 64, 64)).astype(np.uint8))
    colours = Image(pixels, ("red", "green", "blue"), None, "slide", "slide.png", is_rgb=True)
    low = stretch_of(pixels.compute()).low
    np.testing.assert_array_equal(dc.adjust_histogram(colours), dc.prepare(colours))
    assert len(set(low)) == 1
