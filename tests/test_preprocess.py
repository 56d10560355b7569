"""Preprocessing: equal to scikit-image and SciPy on the whole, and the same bits however the image is cut."""

from __future__ import annotations

import doctest
import json
import pickle
import weakref
from itertools import pairwise

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage import exposure

from daskcell.config import GaussianSettings, HistogramSettings, PreprocessSettings, ReconstructSettings
from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.preprocess import (
    Plan,
    adjust_histogram,
    apply_block,
    auto_colors,
    fit_plan,
    gaussian,
    prepare,
    reconstruct,
)
from daskcell.preprocess import flatfield as flatfield_module
from daskcell.preprocess import lazy as lazy_module
from daskcell.preprocess.colors import color_rgb

DTYPES = [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64]
METHODS = ["stretch", "equalize", "clahe", "match"]


def random_image(dtype, shape=(2, 61, 83), seed=0) -> np.ndarray:
    """Blobs on a background, with noise: few values repeat in floats, many in integers."""
    rng = np.random.default_rng(seed)
    x = ndimage.gaussian_filter(rng.random(shape), (0, 4, 4))
    x = (x - x.min()) / (x.max() - x.min()) * 0.7 + rng.random(shape) * 0.2
    if np.dtype(dtype).kind == "f":
        return x.astype(dtype)
    info = np.iinfo(dtype)
    low = info.min // 4 if info.min else 0
    return (low + x * (info.max * 0.8 - low)).astype(dtype)


@st.composite
def chunkings(draw, sides=(61, 83)):
    """Any way to cut each side."""
    chunks = []
    for side in sides:
        cuts = draw(st.lists(st.integers(1, side - 1), max_size=4, unique=True))
        edges = [0, *sorted(cuts), side]
        chunks.append(tuple(b - a for a, b in pairwise(edges)))
    return tuple(chunks)


# -- reconstruct ----------------------------------------------------------------------------------
def test_cyan_adds_to_green_and_blue():
    x = np.zeros((4, 2, 2), np.uint8)
    x[:, 0, 0] = 10, 20, 30, 40
    assert reconstruct(x).compute()[:, 0, 0].tolist() == [10, 60, 70]


def test_integers_saturate_and_round():
    x = np.array([[[250, 3]], [[0, 0]], [[0, 0]], [[10, 10]]], np.uint8)
    rgb = reconstruct(x, ratio=(1.1, 1, 1, 0.25)).compute()
    assert rgb.dtype == np.uint8
    assert rgb[0].tolist() == [[255, 3]]  # 275 saturates, 3.3 rounds down
    assert rgb[1].tolist() == [[2, 2]]  # 2.5 rounds to even


def test_floats_are_not_cut():
    x = np.full((4, 3, 3), 0.75, np.float32)
    rgb = reconstruct(x)
    assert rgb.dtype == np.float32
    assert rgb.compute()[:, 0, 0].tolist() == [0.75, 1.5, 1.5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reconstruct_equals_the_weighted_sum(dtype):
    x = random_image(dtype, (3, 20, 30))
    ratio = (0.7, 1.0, 0.2)
    rgb = reconstruct(x, colors=("orange", "#0000ff", "white"), ratio=ratio).compute()
    weights = np.array([[1, 165 / 255, 0], [0, 0, 1], [1, 1, 1]]).T * ratio
    exact = np.einsum("kc,cyx->kyx", weights, x.astype(np.float64))
    if np.dtype(dtype).kind == "f":
        np.testing.assert_allclose(rgb, exact, rtol=1e-6)
    else:
        exact = np.clip(np.rint(exact), np.iinfo(dtype).min, np.iinfo(dtype).max)
        assert np.abs(rgb.astype(np.int64) - exact).max() <= 1
        assert (rgb == exact).mean() > 0.999
    assert rgb.dtype == dtype


def test_reconstruct_is_lazy_and_takes_a_list():
    calls = []
    x = da.zeros((4, 10, 10), chunks=(1, 5, 5), dtype=np.uint8).map_blocks(
        lambda b: calls.append(1) or b, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    rgb = reconstruct(x)
    assert rgb.shape == (3, 10, 10)
    assert not calls
    np.testing.assert_array_equal(reconstruct([np.ones((4, 5), np.uint8)] * 2).compute()[:2], 1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ratio": (1, 1, -1, 1)}, "-1"),
        ({"ratio": (1, float("nan"), 1, 1)}, "nan"),
        ({"ratio": (1, "much", 1, 1)}, "much"),
        ({"ratio": (1, 1, 1)}, "3 value"),
        ({"colors": ("red", "green", "blue", "ultraviolet")}, "ultraviolet"),
        ({"colors": ("red", "green")}, "2 color"),
        ({"colors": ("red", "green", "blue", "#12")}, "#12"),
    ],
)
def test_colors_and_ratios_that_do_not_fit_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        reconstruct(np.zeros((4, 5, 5), np.uint8), **options)


def test_more_channels_than_colors_are_refused():
    with pytest.raises(InputError, match="5 channel"):
        reconstruct(np.zeros((5, 5, 5), np.uint8), colors=("red", "green", "blue", "cyan"))


def test_every_channel_has_a_color_of_its_own_by_default():
    x = np.random.default_rng(0).integers(0, 50, (5, 8, 9)).astype(np.uint8)
    colors = auto_colors([""] * 5)
    assert colors[:4] == ["red", "green", "blue", "cyan"]
    np.testing.assert_array_equal(reconstruct(x), reconstruct(x, colors=colors))


@pytest.mark.parametrize(
    ("color", "rgb"),
    [
        ("green", (0, 1, 0)),
        ("#008000", (0, 128 / 255, 0)),
        ("c", (0, 1, 1)),
        ("RebeccaPurple", (102 / 255, 51 / 255, 153 / 255)),
        ("tab:orange", (1, 127 / 255, 14 / 255)),
        ("#0f0", (0, 1, 0)),
        ("0.5", (0.5, 0.5, 0.5)),
    ],
)
def test_colors_as_matplotlib_names_them(color, rgb):
    assert color_rgb(color) == pytest.approx(rgb)


def test_auto_colors_follow_names_and_never_repeat():
    assert auto_colors(["R", "G", "B", "Cyan"]) == ["red", "green", "blue", "cyan"]
    assert auto_colors(["w1Hoechst", "GFP-Akt", "Rhodamine"]) == ["blue", "green", "red"]
    assert auto_colors(["d0", "d1", "d2"]) == ["red", "green", "blue"]
    assert auto_colors(["actin", "DAPI", "DNA"]) == ["red", "blue", "green"]
    assert auto_colors(["Alexa Fluor 568", "AF488", "C1"]) == ["red", "green", "blue"]
    assert auto_colors(["infrared"]) == ["red"]  # the first in turn, not because of its name
    assert auto_colors(["brightfield", "Cy5"]) == ["white", "magenta"]
    many = auto_colors([f"stain {i}" for i in range(20)])
    assert len(set(many)) == 20
    assert all(color_rgb(color) for color in many)


# -- adjust_histogram -----------------------------------------------------------------------------
def by_skimage(x: np.ndarray, method: str, reference: np.ndarray) -> np.ndarray:
    if method == "stretch":
        white = np.iinfo(x.dtype).max if x.dtype.kind in "ui" else 1.0
        limits = [(np.percentile(c, 2.0), np.percentile(c, 99.0)) for c in x]
        planes = [exposure.rescale_intensity(c, lim, (0, white)) for c, lim in zip(x, limits, strict=True)]
        return np.stack(planes).astype(x.dtype)
    if method == "equalize":
        return np.stack([exposure.equalize_hist(c) for c in x])
    if method == "clahe":
        return np.stack([exposure.equalize_adapthist(c, clip_limit=0.02) for c in x])
    return exposure.match_histograms(x, reference, channel_axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_histograms_equal_scikit_image_on_the_whole(method, dtype):
    if method == "equalize" and dtype == np.int32:
        pytest.skip("scikit-image takes one bin for each of 2**32 values: more memory than there is")
    x = random_image(dtype)
    reference = (
        random_image(dtype, (2, 40, 50), seed=1) // 2
        if np.dtype(dtype).kind != "f"
        else random_image(dtype, seed=1) ** 2
    )
    options = {"low": 2.0, "high": 99.0, "clip_limit": 0.02}
    if method == "match":
        options["reference"] = reference
    ours = adjust_histogram(da.from_array(x, chunks=(1, 20, 33)), method, **options)
    theirs = by_skimage(x, method, reference)
    got = ours.compute()
    assert got.dtype == ours.dtype
    if method in ("stretch", "match"):
        assert got.dtype == dtype
    if method == "match" and np.dtype(dtype).itemsize > 2:
        # 65536 bins against a full sort: a pixel may be off by a rank, which in the sparse tails is a step.
        off = np.abs(got - theirs.astype(float)) / theirs.max()
        assert off.mean() < 4e-5
        assert off.max() < 2e-2
    elif got.dtype.kind in "ui":
        np.testing.assert_array_equal(got, theirs)
    else:
        np.testing.assert_allclose(got, theirs, atol=3e-7, rtol=1e-6)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(chunks=chunkings(), method=st.sampled_from(METHODS), dtype=st.sampled_from(DTYPES))
def test_chunks_change_no_bit(chunks, method, dtype):
    x = random_image(dtype)
    options = {"reference": random_image(dtype, seed=5)} if method == "match" else {}
    whole = adjust_histogram(da.from_array(x, chunks=-1), method, **options)
    cut = adjust_histogram(da.from_array(x, chunks=(1, *chunks)), method, **options)
    np.testing.assert_array_equal(whole.compute(scheduler="sync"), cut.compute(scheduler="sync"))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    x=st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
            elements=None
            if np.dtype(dtype).kind != "f"
            else st.floats(-1e3, 1e3, width=8 * np.dtype(dtype).itemsize),
        )
    ),
    low=st.floats(0, 49),
    high=st.floats(51, 100),
)
def test_percentiles_are_those_of_numpy(x, low, high):
    plan = fit_plan(
        x[None],
        PreprocessSettings(reconstruct=None, histogram=HistogramSettings(low=low, high=high)),
    )
    # Differences of narrow integers overflow in numpy.
    wide = x.astype(np.int64) if x.dtype.kind in "ui" else x
    expected = float(np.percentile(wide, low)), float(np.percentile(wide, high))
    if expected[0] >= expected[1]:
        expected = float(x.min()), float(x.max())
    assert (plan.steps[0].low[0], plan.steps[0].high[0]) == expected


def test_an_image_is_read_pass_by_pass_and_not_kept():
    """At most a few blocks are alive at a time, though the image is read twice."""
    alive, most = set(), []

    def read(value):
        block = np.full((1, 64, 64), value, np.uint8)
        alive.add(id(block))
        weakref.finalize(block, alive.discard, id(block))
        most.append(len(alive))
        return block

    graph = {("read", 0, i, j): (read, i + j) for i in range(8) for j in range(8)}
    x = da.Array(graph, "read", ((1,), (64,) * 8, (64,) * 8), dtype=np.uint8)
    assert adjust_histogram(x).sum().compute(scheduler="sync") > 0
    assert len(most) == 2 * 64
    assert max(most) < 16


def test_a_few_bright_cells_survive_the_stretch():
    x = np.full((1, 100, 100), 7, np.uint8)
    x[0, 50, 50:53] = 90  # fewer than the 0.2 % above the high percentile
    got = adjust_histogram(x).compute()
    assert got.max() == 255
    assert got[0, 0, 0] == 0


def test_a_flat_channel_stays_as_it_is():
    x = np.full((1, 30, 30), 7, np.uint8)
    for method in ("stretch", "clahe", "equalize"):
        got = adjust_histogram(x, method).compute()
        assert np.isfinite(got).all()
        assert len(np.unique(got)) == 1
    assert not adjust_histogram(np.zeros((1, 30, 30), np.uint8), "clahe").compute().any()
    assert not adjust_histogram(np.zeros((1, 30, 30), np.float32), "equalize").compute().any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_linked_channels_share_the_curve_of_their_common_histogram(method, dtype):
    x = random_image(dtype, (3, 40, 60))
    x[1] = x[1] // 2 if np.dtype(dtype).kind == "u" else x[1] / 2
    options = {"reference": random_image(dtype, (3, 33, 44), seed=8)} if method == "match" else {}
    got = adjust_histogram(da.from_array(x, chunks=(1, 13, 60)), method, linked=True, **options).compute()
    if method == "clahe":
        # The same three planes, linked, are one plane three times over.
        same = np.repeat(x[:1], 3, axis=0)
        alone = adjust_histogram(x[:1], method, clip_limit=0.0).compute()
        three = adjust_histogram(same, method, clip_limit=0.0, linked=True).compute()
        np.testing.assert_allclose(three, np.repeat(alone, 3, axis=0), atol=1e-3)
        order = np.lexsort((got.ravel(), x.ravel()))
        assert got.ravel()[order[0]] < got.ravel()[order[-1]]
        return
    # One image of all channels side by side has that histogram.
    row = np.concatenate(list(x), axis=1)[None]
    if method == "match":
        options = {"reference": np.concatenate(list(options["reference"]), axis=1)[None]}
    expected = adjust_histogram(row, method, **options).compute()[0]
    np.testing.assert_array_equal(np.concatenate(list(got), axis=1), expected)


def test_colour_images_keep_their_colours():
    """A grey ramp stays grey when channels are linked, and turns blue when they are not (the control)."""
    ramp = np.linspace(60, 180, 900).astype(np.uint8).reshape(1, 30, 30)
    rgb = np.concatenate([ramp, ramp, ramp])
    rgb[2, :5] = 255
    plan = fit_plan(rgb, PreprocessSettings(), is_rgb=True)
    got = apply_block(rgb, plan)[:, 10:]
    assert (got[0] == got[2]).all()
    alone = fit_plan(rgb, PreprocessSettings(histogram=HistogramSettings(linked=False)), is_rgb=True)
    got = apply_block(rgb, alone)[:, 10:]
    assert not (got[0] == got[2]).all()


def test_compression_noise_in_the_empty_channels_of_a_colour_image_is_removed():
    rng = np.random.default_rng(0)
    blue = ndimage.gaussian_filter((rng.random((60, 60)) > 0.99).astype(float), 2.0)
    blue *= 250 / blue.max()
    rgb = np.stack([rng.integers(0, 3, (60, 60)), rng.integers(0, 2, (60, 60)), blue]).astype(np.uint8)
    for histogram in (None, HistogramSettings(), HistogramSettings(method="clahe")):
        chosen = PreprocessSettings(histogram=histogram)
        plan = fit_plan(rgb, chosen, is_rgb=True)
        got = apply_block(rgb, plan)
        assert got[:2].max() < 1e-3
        assert got[2].max() > 0.9
        assert fit_plan(da.from_array(rgb, chunks=(3, 17, 20)), chosen, is_rgb=True) == plan
    stains = fit_plan(rgb, PreprocessSettings(histogram=None), ["R", "G", "B"])
    np.testing.assert_array_equal(apply_block(rgb, stains), rgb)  # a weak stain is a stain


def test_two_dimensional_images_stay_two_dimensional():
    x = random_image(np.uint8)[0]
    assert adjust_histogram(x).shape == gaussian(x, 1.0).shape == x.shape


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "log"}, "log"),
        ({"low": 60.0, "high": 40.0}, "60.0"),
        ({"high": 101.0}, "101"),
        ({"method": "match"}, "reference"),
        ({"method": "match", "reference": np.zeros((3, 4, 4), np.uint8)}, "2 channel"),
        ({"method": "match", "reference": np.zeros((2, 4, 4), np.float32)}, "float32"),
        ({"reference": np.zeros((2, 4, 4), np.uint8)}, "reference"),
        ({"method": "clahe", "tiles": 0}, "tiles"),
    ],
)
def test_histogram_settings_that_cannot_be_used_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        adjust_histogram(np.zeros((2, 8, 8), np.uint8), **options)


@pytest.mark.parametrize("method", ["stretch", "equalize", "clahe"])
def test_nan_pixels_are_refused(method):
    x = random_image(np.float32)
    x[1, 3, 4] = np.nan
    with pytest.raises(InputError, match=r"Channel 1 .* NaN"):
        adjust_histogram(x, method).compute()


@pytest.mark.parametrize("x", [np.zeros((2, 0, 4)), np.zeros((2, 2, 2, 2)), np.zeros((1, 4, 4), complex)])
def test_arrays_that_are_no_image_are_refused(x):
    with pytest.raises(InputError):
        adjust_histogram(x)


# -- gaussian -------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(chunks=chunkings(), sigma=st.floats(0.3, 30), dtype=st.sampled_from(DTYPES))
def test_gaussian_equals_scipy_on_the_whole_bit_for_bit(chunks, sigma, dtype):
    x = random_image(dtype)
    got = gaussian(da.from_array(x, chunks=(1, *chunks)), sigma)
    assert got.dtype == dtype
    if np.dtype(dtype).kind == "f":
        expected = ndimage.gaussian_filter(x, (0, sigma, sigma))
    else:
        expected = np.rint(ndimage.gaussian_filter(x.astype(float), (0, sigma, sigma))).astype(dtype)
    np.testing.assert_array_equal(got.compute(scheduler="sync"), expected)


@pytest.mark.parametrize("sigma", [0, -1.5, float("nan"), float("inf"), None])
def test_sigma_must_be_above_zero(sigma):
    with pytest.raises(InputError, match=str(sigma)):
        gaussian(np.zeros((1, 5, 5)), sigma)


# -- plans ----------------------------------------------------------------------------------------
def plans():
    return [
        pytest.param(method, dtype, id=f"{method}-{np.dtype(dtype).name}")
        for method in METHODS
        for dtype in (np.uint8, np.uint16, np.float32)
    ]


def make_plan(method, dtype):
    x = random_image(dtype, (4, 61, 83))
    histogram = HistogramSettings(method=method, reference="given" if method == "match" else None)
    chosen = PreprocessSettings(histogram=histogram, gaussian=GaussianSettings(sigma=1.3))
    return (
        x,
        fit_plan(x, chosen, ["R", "G", "B", "Cyan"], reference=random_image(dtype, (4, 30, 30), seed=3)),
        chosen,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), plans())
def test_blocks_equal_the_whole_and_the_lazy_functions(method, dtype):
    x, plan, _ = make_plan(method, dtype)
    whole = apply_block(x, plan)
    assert whole.dtype == plan.out_dtype
    assert len(whole) == plan.out_channels == 3
    pieces = np.zeros_like(whole)
    grid = Grid.regular(x.shape[1:], 19)
    for index in grid:
        core = grid.core(index)
        grown = core.grow(plan.halo).clip(grid.shape)
        block = apply_block(x[(slice(None), *grown.slices)], plan, grown)
        pieces[(slice(None), *core.slices)] = block[(slice(None), *core.within(grown))]
    np.testing.assert_array_equal(pieces, whole)

    lazy = da.from_array(x, chunks=(2, 23, 31))
    np.testing.assert_array_equal(prepare(lazy, plan).compute(), whole)
    options = (
        {"reference": reconstruct(random_image(dtype, (4, 30, 30), seed=3))} if method == "match" else {}
    )
    by_hand = gaussian(adjust_histogram(reconstruct(lazy), method, **options), 1.3)
    np.testing.assert_array_equal(by_hand.compute(), whole)


def test_without_its_halo_a_block_differs():
    """The control: the halo is what makes blocks equal the whole."""
    x, plan, _ = make_plan("stretch", np.uint8)
    assert plan.halo == 6
    cut = apply_block(x[:, :, :40], plan, Box(0, 0, 61, 40))
    assert not np.array_equal(cut, apply_block(x, plan)[:, :, :40])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), plans())
def test_plans_survive_json_and_pickle(method, dtype):
    x, plan, chosen = make_plan(method, dtype)
    text = json.dumps(plan.to_json())
    for back in (Plan.from_json(json.loads(text)), Plan.from_json(text), pickle.loads(pickle.dumps(plan))):
        assert back == plan
        assert back.key == plan.key
        np.testing.assert_array_equal(apply_block(x, back), apply_block(x, plan))
    again = fit_plan(
        da.from_array(x, chunks=(1, 17, 83)),
        chosen,
        ["R", "G", "B", "Cyan"],
        reference=random_image(dtype, (4, 30, 30), seed=3),
    )
    assert again == plan


def test_other_statistics_are_another_plan():
    x, plan, chosen = make_plan("stretch", np.uint16)
    x = x.copy()
    x[0] = x[0] // 2
    assert fit_plan(x, chosen, ["R", "G", "B", "Cyan"]) != plan


def test_one_channel_stays_grey_and_a_colour_image_stays_as_it_is():
    assert fit_plan(random_image(np.uint8, (1, 20, 20))).out_channels == 1
    rgb = random_image(np.uint8, (3, 20, 20))
    nothing = PreprocessSettings(histogram=None)
    np.testing.assert_array_equal(apply_block(rgb, fit_plan(rgb, nothing, ["c", "m", "y"], is_rgb=True)), rgb)
    weighted = PreprocessSettings(histogram=None, reconstruct=ReconstructSettings(ratio=[1, 0.5, 0]))
    half = apply_block(rgb, fit_plan(rgb, weighted, None, is_rgb=True))
    np.testing.assert_array_equal(half[0], rgb[0])
    assert not half[2].any()
    two = random_image(np.uint8, (2, 20, 20))
    assert apply_block(two, fit_plan(two, nothing, ["DAPI", "GFP"]))[0].max() == 0


def test_clahe_needs_to_know_where_a_block_lies():
    x, plan, _ = make_plan("clahe", np.uint8)
    with pytest.raises(InputError, match="box"):
        apply_block(x[:, :30], plan)


def test_a_plan_refuses_another_number_of_channels():
    x, plan, _ = make_plan("stretch", np.uint8)
    with pytest.raises(InputError, match="4 channel"):
        apply_block(x[:3], plan)


@pytest.mark.parametrize("module", [lazy_module, flatfield_module], ids=lambda module: module.__name__)
def test_the_examples_run(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 4
