"""Uneven light and stains: right on the whole, and the same bits however the image is cut."""

from __future__ import annotations

import json

import dask.array as da
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import color, morphology, transform
from test_preprocess import chunkings, random_image

import daskcell as dc
from daskcell.config import (
    BackgroundSettings,
    GaussianSettings,
    HistogramSettings,
    PreprocessSettings,
    StainSettings,
    parse_config,
)
from daskcell.errors import ConfigError, InputError
from daskcell.geometry import Box, Grid
from daskcell.preprocess import Plan, apply_block, fit_plan, prepare
from daskcell.preprocess.background import Background
from daskcell.preprocess.stains import LEVELS, ColourCounts, find_stains

DTYPES = [np.uint8, np.uint16, np.int16, np.float32, np.float64]
HE = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
"""Densities of haematoxylin and eosin in red, green and blue, as usually taken (Macenko et al., 2009)."""


def stained(shape=(61, 83), seed=0, dtype=np.uint8, gains=(1.0, 1.0), cast=(1.0, 1.0, 1.0)) -> np.ndarray:
    """Two stains in known amounts, through Beer and Lambert's law: ``(3, Y, X)``."""
    rng = np.random.default_rng(seed)
    amounts = [ndimage.gaussian_filter(rng.random(shape), 3) for _ in range(2)]
    amounts = [3 * np.clip((a - a.min()) / (a.max() - a.min()) - 0.45, 0, 1) for a in amounts]
    density = np.einsum("k,kyx,ki->iyx", gains, amounts, HE)
    x = 240 / 255 * np.exp(-density * np.array(cast)[:, None, None])
    return (x * 255 if dtype == np.uint8 else x * 65535 if dtype == np.uint16 else x).astype(dtype)


# -- background -----------------------------------------------------------------------------------
def by_skimage(x: np.ndarray, radius: int, light: bool = False) -> np.ndarray:
    """The background, from the whole image at once."""
    cell = max(1, radius // 6)
    small = transform.downscale_local_mean(x.astype(float), (cell, cell))
    reach = radius / cell
    y, z = np.ogrid[-np.ceil(reach) : np.ceil(reach) + 1, -np.ceil(reach) : np.ceil(reach) + 1]
    disc = (y * y + z * z <= reach**2).astype(np.uint8)
    turn = morphology.closing if light else morphology.opening
    return transform.resize(turn(small, disc), x.shape, order=1, mode="edge", anti_aliasing=False)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [4, 12, 20])
@pytest.mark.parametrize("light", [False, True])
def test_the_ground_is_scikit_images_opening_of_the_means(radius, light):
    x = random_image(np.float64, (1, 60, 84))[0]
    ground = by_skimage(x, radius, light)
    got = dc.correct_background(da.from_array(x, chunks=(17, 40)), radius, light=light).compute()
    np.testing.assert_allclose(got, x / ground if light else x - ground, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    chunks=chunkings(),
    dtype=st.sampled_from(DTYPES),
    radius=st.floats(1, 40),
    light=st.booleans(),
    with_flat=st.booleans(),
)
def test_light_is_evened_out_alike_for_all_chunks(chunks, dtype, radius, light, with_flat):
    x = random_image(dtype)
    flat = random_image(np.uint16, (1, 61, 83), seed=4) + 500 if with_flat else None
    options = {"radius": radius, "light": light, "flat": flat, "dark": 3.0}
    whole = dc.correct_background(da.from_array(x, chunks=-1), **options)
    cut = dc.correct_background(da.from_array(x, chunks=(1, *chunks)), **options)
    assert cut.dtype == whole.dtype == dtype
    np.testing.assert_array_equal(whole.compute(scheduler="sync"), cut.compute(scheduler="sync"))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), radius=st.floats(1, 12))
def test_a_block_anywhere_gives_the_pixels_of_the_whole(data, radius):
    x = random_image(np.float32)
    step = Background(x.shape[1:], radius)
    y0, x0 = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 82))
    core = Box(y0, x0, data.draw(st.integers(y0 + 1, 61)), data.draw(st.integers(x0 + 1, 83)))
    grown = core.grow(step.halo).clip(step.shape)
    got = step.apply(x[(slice(None), *grown.slices)], grown)[(slice(None), *core.within(grown))]
    np.testing.assert_array_equal(got, step.apply(x, Box(0, 0, 61, 83))[(slice(None), *core.slices)])


def test_with_half_its_halo_a_block_differs():
    """The control: the halo is what makes blocks equal the whole."""
    x = random_image(np.float32, (1, 200, 200))
    step = Background((200, 200), 30)
    core = Box(80, 80, 120, 120)
    grown = core.grow(step.halo // 2)
    got = step.apply(x[(slice(None), *grown.slices)], grown)[(slice(None), *core.within(grown))]
    assert not np.array_equal(got, step.apply(x, Box(0, 0, 200, 200))[(slice(None), *core.slices)])


def test_cells_stay_and_the_lamp_goes():
    y, x = np.mgrid[:300, :400]
    lamp = 40 + 0.2 * x + 0.1 * y
    cells = np.zeros((300, 400))
    for cy, cx in [(40, 60), (150, 200), (260, 350), (60, 330)]:
        cells[np.hypot(y - cy, x - cx) < 12] = 80
    image = np.rint(lamp + cells).astype(np.uint16)
    got = dc.correct_background(image, 40).compute().astype(int)
    assert got[cells == 0].max() <= 10
    assert abs(np.median(got[cells > 0]) - 80) <= 4
    assert image[cells == 0].max() - image[cells == 0].min() > 100, "what it was before"


def test_a_bright_ground_becomes_white():
    y, x = np.mgrid[:200, :300]
    lamp = np.stack([150 + 0.2 * x, 180 + 0.1 * y, 120 + 0.1 * x + 0.1 * y])
    cells = np.hypot(y - 100, x - 150) < 15
    image = (lamp * np.where(cells, 0.4, 1)).astype(np.uint8)
    got = dc.correct_background(image, 40, light=True).compute()
    assert (got[:, ~cells] > 235).all()
    assert np.abs(got[:, cells].astype(int) - 102).max() < 12


def test_a_flat_field_is_divided_by():
    y, x = np.mgrid[:60, :80]
    field = 1000 + 10 * x + 5 * y
    scene = np.random.default_rng(0).random((2, 60, 80)) * 2
    seen = 100 + scene * field
    got = dc.correct_background(da.from_array(seen, chunks=(1, 23, 31)), flat=field + 100, dark=100).compute()
    np.testing.assert_allclose(got, scene * field.mean(), rtol=1e-12)
    whole = dc.correct_background(np.tile(seen, (1, 2, 3)), flat=field + 100, dark=100).compute()
    np.testing.assert_array_equal(whole, np.tile(got, (1, 2, 3)))
    bytes_ = np.full((60, 80), 200, np.uint8)
    assert dc.correct_background(bytes_, flat=field).compute().max() == 255


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "flat"),
        ({"radius": 0}, "radius cannot be 0"),
        ({"radius": -2.5}, "-2.5"),
        ({"radius": "large"}, "large"),
        ({"radius": float("nan")}, "nan"),
        ({"radius": 5, "dark": -1}, "dark cannot be -1"),
        ({"flat": np.ones((3, 8, 8))}, "3 channels and the image 2"),
        ({"flat": np.ones((5, 8))}, "5 x 8 pixels"),
        ({"flat": np.ones((0, 8))}, "0"),
    ],
)
def test_backgrounds_that_cannot_be_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        dc.correct_background(np.zeros((2, 8, 8), np.uint8), **options)


def test_a_flat_field_without_light_is_refused():
    field = np.ones((8, 8))
    field[2, 3] = 0
    with pytest.raises(InputError, match=r"1 pixel\(s\) of no light"):
        dc.correct_background(np.zeros((8, 8)), flat=field).compute()


# -- flat fields from exposures --------------------------------------------------------------------
def fields(count: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Images of bright cells by one uneven lamp, and the lamp (mean 1)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :160]
    lamp = np.exp(-((y - 50) ** 2 + (x - 100) ** 2) / 2 / 110**2)
    exposures = []
    for _ in range(count):
        scene = np.full((120, 160), 100.0)
        for cy, cx in rng.uniform((0, 0), (120, 160), (12, 2)):
            scene[np.hypot(y - cy, x - cx) < 7] = 600
        exposures.append(rng.poisson(scene * lamp).astype(np.uint16)[None] + np.uint16(20))
    return exposures, lamp / lamp.mean()


def test_the_lamp_is_found_in_many_images():
    exposures, lamp = fields(40)
    flat = dc.estimate_flat(exposures, dark=20)
    assert flat.shape == (1, 120, 160)
    assert flat.dtype == np.float32
    light = flat[0] - 20
    assert np.abs(light / light.mean() / lamp - 1).max() < 0.04
    even = dc.correct_background(exposures[0], flat=flat, dark=20).compute()
    assert np.std(even[even < 150]) < 0.8 * np.std((exposures[0] - 20.0)[exposures[0] < 170])
    assert np.abs(1 / lamp - 1).max() > 0.3, "what it is without"
    np.testing.assert_array_equal(dc.estimate_flat(exposures[::-1], dark=20), flat)


def test_flat_fields_come_from_files_too(tmp_path):
    exposures, _ = fields(5)
    for i, one in enumerate(exposures):
        tifffile.imwrite(tmp_path / f"{i}.tif", one[0])
    np.testing.assert_array_equal(dc.estimate_flat(tmp_path), dc.estimate_flat(exposures))


def test_the_command_writes_a_flat_field_that_a_run_can_use(tmp_path):
    from typer.testing import CliRunner

    from daskcell.cli import app

    exposures, _ = fields(6)
    (tmp_path / "exposures").mkdir()
    for i, one in enumerate(exposures):
        tifffile.imwrite(tmp_path / "exposures" / f"{i}.tif", one[0])
    made = tmp_path / "flat.tif"
    command = ["flat", str(tmp_path / "exposures"), "-o", str(made), "--dark", "20"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "preprocess.background.dark=20" in done.output
    chosen = BackgroundSettings(flat=str(made), dark=20)
    plan = fit_plan(exposures[0], PreprocessSettings(background=chosen, histogram=None))
    expected = dc.correct_background(exposures[0], flat=dc.estimate_flat(exposures, 20), dark=20)
    np.testing.assert_array_equal(apply_block(exposures[0], plan), expected.compute())
    assert CliRunner().invoke(app, command).exit_code != 0, "what is there is not replaced"


@pytest.mark.parametrize(
    ("exposures", "named"),
    [
        ([np.ones((1, 40, 40))] * 2, "2 image"),
        ([np.ones((1, 40, 40))] * 2 + [np.ones((1, 40, 41))], "40, 41"),
        ([np.zeros((1, 40, 40))] * 3, "no light"),
    ],
)
def test_images_no_flat_field_can_come_from_are_refused(exposures, named):
    with pytest.raises(InputError, match=named):
        dc.estimate_flat(exposures)


# -- stains ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_stains_are_taken_apart_as_by_scikit_image(dtype):
    x = stained(dtype=dtype)
    got = dc.adjust_stains(da.from_array(x, chunks=(1, 20, 30)), "separate")
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(got, color.rgb2hed(x, channel_axis=0), atol=2e-7)


def test_the_light_and_the_densities_of_an_image_are_found():
    pale, dark = (stained((200, 300), gains=(gain, gain)) for gain in (0.6, 1.2))
    pale, dark = (find_stains(ColourCounts().count(x, Box(0, 0, 200, 300))) for x in (pale, dark))
    assert pale.white == pytest.approx((240 / 255,) * 3, abs=0.02)
    assert pale.white == dark.white
    assert all(1.3 < b / a < 2.2 for a, b in zip(pale.strengths, dark.strengths, strict=True))


def test_pale_and_tinted_slides_come_to_look_alike():
    usual = stained((200, 300))
    tinted = (stained((200, 300)) * np.array([0.75, 0.7, 0.9])[:, None, None]).astype(np.uint8)
    others = [stained((200, 300), gains=(0.5, 0.5)), stained((200, 300), cast=(0.8, 1.0, 1.3)), tinted]
    for other in others:
        before = np.abs(other.astype(int) - usual).mean()
        after = np.abs(dc.adjust_stains(other, reference=usual).compute().astype(int) - usual).mean()
        assert after < before / 2
    white = dc.adjust_stains(tinted).compute()
    assert np.percentile(white, 99, axis=(1, 2)) == pytest.approx([240] * 3, abs=6), "without a reference"
    glass = np.full((3, 50, 50), 238, np.uint8)
    np.testing.assert_array_equal(dc.adjust_stains(glass).compute(), glass)


def test_darker_stays_darker():
    x = stained((100, 100))
    got = dc.adjust_stains(x, reference=stained((100, 100), gains=(0.3, 1.5))).compute()
    for before, after in zip(x, got, strict=True):
        order = np.argsort(before, axis=None, kind="stable")
        assert (np.diff(after.ravel()[order].astype(int)) >= 0).all()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    chunks=chunkings(),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]),
    method=st.sampled_from(["normalize", "separate"]),
)
def test_stains_do_not_depend_on_chunks(chunks, dtype, method):
    x = stained(dtype=dtype)
    whole = dc.adjust_stains(da.from_array(x, chunks=-1), method)
    cut = dc.adjust_stains(da.from_array(x, chunks=(1, *chunks)), method)
    np.testing.assert_array_equal(whole.compute(scheduler="sync"), cut.compute(scheduler="sync"))


@pytest.mark.parametrize(
    ("x", "options", "named"),
    [
        (np.zeros((2, 8, 8), np.uint8), {}, r"\(2, 8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), {"method": "bleach"}, "bleach"),
        (
            np.zeros((3, 8, 8), np.uint8),
            {"method": "separate", "reference": np.zeros((3, 8, 8))},
            "reference",
        ),
        (np.zeros((3, 8, 8), np.uint8), {"reference": np.full((3, 9, 9), 250, np.uint8)}, "no stains"),
        (np.zeros((3, 8, 8), np.uint8), {"reference": np.zeros((1, 9, 9), np.uint8)}, r"\(1, 9, 9\)"),
    ],
)
def test_stains_that_cannot_be_adjusted_are_refused(x, options, named):
    with pytest.raises(InputError, match=named):
        dc.adjust_stains(x, **options)


def test_counted_colours_are_whole_numbers():
    counts = ColourCounts().count(stained(), Box(0, 0, 61, 83))
    assert counts.sum() == 61 * 83
    assert counts.shape == (LEVELS**3,)


# -- a set of references --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_set_of_references_is_matched_as_one_image(dtype):
    x = random_image(dtype)
    others = [random_image(dtype, (2, 40, 50), seed=1), random_image(dtype, (2, 21, 50), seed=2) // 2]
    together = np.concatenate(others, axis=1)
    expected = dc.adjust_histogram(x, "match", reference=together).compute()
    got = dc.adjust_histogram(da.from_array(x, chunks=(1, 20, 33)), "match", reference=others)
    np.testing.assert_array_equal(got.compute(), expected)
    one = dc.adjust_histogram(x, "match", reference=others[0]).compute()
    assert not np.array_equal(one, expected), "both count"
    with pytest.raises(InputError, match="empty"):
        dc.adjust_histogram(x, "match", reference=[])


def test_references_are_named_in_the_settings(tmp_path):
    x = random_image(np.uint8)
    others = [random_image(np.uint8, (2, 40, 50), seed=i) for i in (1, 2)]
    names = [str(tmp_path / f"{i}.tif") for i in (1, 2)]
    for name, one in zip(names, others, strict=True):
        tifffile.imwrite(name, one, photometric="minisblack", metadata={"axes": "CYX"})
    chosen = PreprocessSettings(
        reconstruct=None, histogram=HistogramSettings(method="match", reference=names)
    )
    expected = dc.adjust_histogram(x, "match", reference=others).compute()
    np.testing.assert_array_equal(apply_block(x, fit_plan(x, chosen)), expected)


# -- in a plan ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def field(tmp_path_factory):
    x = random_image(np.uint16, (1, 61, 83), seed=9)[0] + 3000
    path = tmp_path_factory.mktemp("flat") / "flat.tif"
    tifffile.imwrite(path, x)
    return str(path), x


def blockwise(x: np.ndarray, plan: Plan, side: int) -> np.ndarray:
    out = np.empty((plan.out_channels, *plan.shape), plan.out_dtype)
    grid = Grid.regular(plan.shape, side)
    for index in grid:
        core = grid.core(index)
        grown = core.grow(plan.halo).clip(grid.shape)
        block = apply_block(x[(slice(None), *grown.slices)], plan, grown)
        out[(slice(None), *core.slices)] = block[(slice(None), *core.within(grown))]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_plan_with_all_light_steps_is_the_functions_one_after_another(field, dtype):
    path, flat = field
    x = random_image(dtype, (4, 61, 83))
    chosen = PreprocessSettings(
        background=BackgroundSettings(flat=path, dark=2, radius=12), gaussian=GaussianSettings(sigma=1.3)
    )
    cut = da.from_array(x, chunks=(4, 30, 41))
    plan = fit_plan(cut, chosen, ["R", "G", "B", "Cyan"])
    assert plan == fit_plan(x, chosen, ["R", "G", "B", "Cyan"])
    assert Plan.from_json(json.dumps(plan.to_json())) == plan
    even = dc.correct_background(cut, 12, flat=flat, dark=2)
    by_hand = dc.gaussian(dc.adjust_histogram(dc.reconstruct(even)), 1.3).compute()
    np.testing.assert_array_equal(blockwise(x, plan, 23), by_hand)
    np.testing.assert_array_equal(prepare(cut, plan).compute(), by_hand)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["normalize", "separate"])
def test_a_plan_with_stains_is_the_functions_one_after_another(method):
    x = stained()
    chosen = PreprocessSettings(
        background=BackgroundSettings(radius=20, light=True), stains=StainSettings(method=method)
    )
    plan = fit_plan(x, chosen, ["R", "G", "B"], is_rgb=True)
    cut = da.from_array(x, chunks=(1, 25, 83))
    assert fit_plan(cut, chosen, ["R", "G", "B"], is_rgb=True) == plan
    assert Plan.from_json(plan.to_json()) == plan
    by_hand = dc.adjust_stains(dc.correct_background(cut, 20, light=True), method)
    by_hand = dc.adjust_histogram(by_hand, linked=method == "normalize").compute()
    np.testing.assert_array_equal(blockwise(x, plan, 23), by_hand)


def test_a_flat_field_that_changed_is_not_used_unasked(tmp_path):
    x = random_image(np.uint8, (1, 61, 83))
    tifffile.imwrite(tmp_path / "flat.tif", np.full((61, 83), 90, np.uint8))
    chosen = PreprocessSettings(background=BackgroundSettings(flat=str(tmp_path / "flat.tif")))
    plan = Plan.from_json(fit_plan(x, chosen).to_json())
    from daskcell.preprocess.background import _flat

    _flat.cache_clear()
    tifffile.imwrite(tmp_path / "flat.tif", np.full((61, 83), 91, np.uint8))
    with pytest.raises(InputError, match="changed"):
        apply_block(x, plan)
    (tmp_path / "flat.tif").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        apply_block(x, plan)


def test_stains_are_for_colour_images():
    with pytest.raises(InputError, match="stains"):
        fit_plan(
            random_image(np.uint8, (3, 20, 20)), PreprocessSettings(stains=StainSettings()), is_rgb=False
        )


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"background": {}}, "flat"),
        ({"background": {"radius": -3}}, "-3"),
        ({"stains": {"method": "separate", "reference": "a.svs"}}, "reference"),
        ({"stains": {}, "histogram": {"method": "match", "reference": "a.tif"}}, "stains"),
        ({"gaussian": {"sigma": 0}}, "sigma"),
        ({"reconstruct": {"ratio": [1, -2]}}, "-2"),
        ({"histogram": {"method": "match", "reference": []}}, "reference"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_value(section, named):
    with pytest.raises(ConfigError, match=named):
        parse_config({"preprocess": section})


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"reconstruct": {"colors": ["red", "ultraviolet"]}}, "ultraviolet"),
        ({"background": {"flat": "nowhere.tif"}}, "nowhere.tif"),
        ({"stains": {"reference": "nowhere.svs"}}, "nowhere.svs"),
        ({"histogram": {"method": "match", "reference": ["nowhere.tif"]}}, "nowhere.tif"),
    ],
)
def test_what_settings_name_is_looked_for_before_any_work(section, named, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((20, 20), np.uint8))
    with pytest.raises(ConfigError, match=named):
        dc.run(tmp_path / "x.tif", tmp_path / "study", {"preprocess": section})
    assert not (tmp_path / "study").exists()
