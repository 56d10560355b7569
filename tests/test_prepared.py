"""A prepared image reads the same pixels for every box, and at a coarser level about those of the whole, made
as small."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import skimage.io
import skimage.transform
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from test_preprocess import chunkings, random_image

import daskcell as dc
from daskcell import images
from daskcell.compute import Workers
from daskcell.config import HistogramSettings, PreprocessSettings
from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.images.pyramid import halve_mean
from daskcell.preprocess import PreparedArray, PreparedImage, apply_block, block_stats, fit_plan, fit_slide
from daskcell.preprocess.background import Background
from daskcell.preprocess.steps import Gaussian
from daskcell.render import colors, write_overlay
from daskcell.render.thumbnails import Thumbnails

LIGHT = [None, {"radius": 30}, {"flat": True}, {"flat": True, "radius": 40}]
STAINS = [None, "normalize", "separate"]
HISTOGRAMS = [None, "stretch", "equalize", "clahe", "match"]
SIGMAS = [None, 1.0, 5.0]


def smaller(x: np.ndarray, level: int) -> np.ndarray:
    for _ in range(level):
        x = halve_mean(x)
    return x


def tissue(data_dir: Path) -> np.ndarray:
    image = images.open_image(data_dir / "slide" / "CMU-1-Small-Region.svs").data
    return np.ascontiguousarray(image[:, 700:956, 500:756].compute())


def cells(data_dir: Path) -> np.ndarray:
    files = sorted((data_dir / "channels" / "human").iterdir())
    return np.concatenate([np.asarray(images.open_image(file).data)[:, :256, :256] for file in files])


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("light", LIGHT, ids=str)
@pytest.mark.parametrize("scene", [tissue, cells], ids=lambda scene: scene.__name__)
def test_a_coarse_image_is_the_prepared_image_made_small(scene, light, data_dir, tmp_path):
    """For all combinations of settings. Means over all pixels, as shares of white."""
    x = scene(data_dir)
    lamp = 2000 - 4 * np.hypot(*(np.mgrid[:128, :128] - 50))  # of a camera whose fields make the image
    tifffile.imwrite(tmp_path / "flat.tif", lamp.astype(np.uint16))
    tifffile.imwrite(tmp_path / "other.tif", x[:, ::2, ::2] // 2 + 20, photometric="minisblack")
    if light is not None:
        light = light | {"light": scene is tissue}
        light |= {"flat": str(tmp_path / "flat.tif")} if "flat" in light else {}
    for stains, method, sigma in itertools.product(STAINS, HISTOGRAMS, SIGMAS):
        if stains and (scene is cells or (stains == "normalize" and method == "match")):
            continue  # refused
        histogram = {"method": method, "reference": str(tmp_path / "other.tif")}
        values = {
            "background": light,
            "stains": stains and {"method": stains},
            "histogram": method and histogram,
            "gaussian": sigma and {"sigma": sigma},
        }
        plan = fit_plan(x, PreprocessSettings.model_validate(values), list("RGB"), is_rgb=scene is tissue)
        whole = apply_block(x, plan)
        white = np.iinfo(whole.dtype).max if whole.dtype.kind == "u" else np.percentile(whole, 99.8)
        # Curves that are steep make small differences large, and so does a ground of few large pixels.
        steep = (2 if method == "equalize" else 1) * (2 if light and "radius" in light else 1)
        for level, most, least in ((1, 0.03, 0.75), (3, 0.06, 0.5)):
            raw = smaller(x, level)
            got = apply_block(raw, plan.at_level(level, raw.shape[1:])) / white
            expected = smaller(whole.astype(np.float64), level) / white
            assert got.shape == expected.shape
            assert np.abs(got - expected).mean() < most * steep, (stains, method, sigma, level)
            alike = np.corrcoef(got.ravel(), expected.ravel())[0, 1]
            assert alike > least, (stains, method, sigma, level)


def test_a_filter_whose_reach_is_below_a_pixel_is_left_out_and_a_disc_keeps_some():
    assert Gaussian(4.0).at_level(1, (50, 50)) == Gaussian(2.0)
    assert Gaussian(1.0).at_level(4, (50, 50)) is None
    assert Background((800, 801), 80.0).at_level(3, (100, 101)) == Background((100, 101), 10.0)
    assert Background((800, 801), 8.0).at_level(3, (100, 101)).radius == 4.0


@pytest.fixture(scope="module")
def slide(data_dir, tmp_path_factory):
    """A stained slide as OME-Zarr with a pyramid, and its pixels."""
    folder = tmp_path_factory.mktemp("prepared")
    image = images.open_image(data_dir / "slide" / "CMU-1-Small-Region.svs").data
    x = np.ascontiguousarray(image[:, :1101, :803].compute())
    tifffile.imwrite(folder / "s.tif", np.moveaxis(x, 0, -1), photometric="rgb")
    images.convert(folder / "s.tif", folder / "s.zarr")
    images.create_labels(folder / "s.zarr", "cells", block=2048, dtype=np.uint32)
    images.build_label_pyramid(folder / "s.zarr", "cells")
    pd.DataFrame({"label": [], "area": [], "cluster": np.zeros(0, np.int32)}).to_parquet(folder / "s.parquet")
    return folder, x


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("light", [{"radius": 25}, None], ids=str)
def test_any_box_holds_the_pixels_of_the_whole(slide, light):
    folder, x = slide
    chosen = {"background": light, "histogram": {"method": "clahe"}, "gaussian": {"sigma": 2.0}}
    image = PreparedImage(
        str(folder / "s.zarr"), fit_slide(folder / "s.zarr", PreprocessSettings.model_validate(chosen))
    )
    whole = apply_block(x, image.plan)
    array = PreparedArray.of(x, image.plan)
    coarse = apply_block(smaller(x, 1), image.plan.at_level(1, image.levels[1]))
    for box in (Box(0, 0, 40, 70), Box(700, 500, 900, 803), Box(1090, 1, 1101, 3)):
        np.testing.assert_array_equal(image.read(box), whole[(slice(None), *box.slices)])
        np.testing.assert_array_equal(array.read(box), whole[(slice(None), *box.slices)])
        raw, prepared = image.read_both(box)
        np.testing.assert_array_equal(raw, x[(slice(None), *box.slices)])
        np.testing.assert_array_equal(prepared, whole[(slice(None), *box.slices)])
    for box in (Box(0, 0, 40, 70), Box(300, 200, 500, 402), Box(549, 1, 551, 402)):
        np.testing.assert_array_equal(image.read(box, 1), coarse[(slice(None), *box.slices)])


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("method", ["separate", "normalize"])
def test_the_overlay_of_a_level_shows_what_the_overlay_of_the_whole_shows(slide, method, tmp_path):
    folder, _ = slide
    chosen = PreprocessSettings.model_validate({"stains": {"method": method}})
    image = PreparedImage(str(folder / "s.zarr"), fit_slide(folder / "s.zarr", chosen))
    shown = []
    for side in (8192, 600):
        (file,) = write_overlay(
            image, *[folder / "s.parquet"] * 2, tmp_path, f"{side}", 2, Workers(), formats=["tif"], side=side
        )
        shown.append(np.moveaxis(tifffile.imread(file), -1, 0))
    small = smaller(shown[0], 1)
    assert shown[1].shape == small.shape
    np.testing.assert_allclose(shown[1].mean(axis=(1, 2)), small.mean(axis=(1, 2)), atol=6)
    assert np.corrcoef(shown[1].ravel(), small.ravel())[0, 1] > 0.9


@pytest.mark.data
def test_the_report_shows_a_slide_as_it_was_segmented(slide):
    folder, x = slide
    chosen = PreprocessSettings.model_validate({"stains": {"method": "separate"}})
    image = PreparedImage(str(folder / "s.zarr"), fit_slide(folder / "s.zarr", chosen))
    jpeg = Thumbnails(lambda name: image).slide("s", folder / "s.parquet", colors(2))
    shown = skimage.io.imread(io.BytesIO(jpeg))
    assert shown.mean() < 100, "densities of a slide that is mostly glass are dark"
    glass = skimage.transform.resize(x.min(axis=0), shown.shape[:2], anti_aliasing=True)
    assert np.corrcoef(glass.ravel(), shown.mean(axis=2).ravel())[0, 1] < -0.7


def test_plans_are_applied_to_parts_in_one_place():
    package = Path(dc.__file__).parent
    found = {file.name for file in package.rglob("*.py") if "plan.halo" in file.read_text(encoding="utf-8")}
    assert found == {"prepared.py"}
    found = {file.name for file in package.rglob("*.py") if "Plan.from_json(" in file.read_text("utf-8")}
    assert found == {"plan.py", "results.py"}  # of a task, and of a study


@pytest.mark.parametrize("method", ["equalize", "match", "clahe", "stretch"])
def test_no_task_carries_a_large_table(method, tmp_path, monkeypatch):
    """Of three 16-bit channels with every value; neither the tasks that count nor those that read."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 16, (3, 512, 512)).astype(np.uint16)
    histogram = HistogramSettings(method=method, reference="given" if method == "match" else None)
    chosen = PreprocessSettings(reconstruct=None, histogram=histogram)
    sent = []
    count_block = block_stats._count_block

    def counted(image, core, counting):
        sent.append(len(pickle.dumps(counting)))
        return count_block(image, core, counting)

    monkeypatch.setattr(block_stats, "_count_block", counted)
    plan = fit_plan(x, chosen, reference=x[:, ::-1] // 2 if method == "match" else None)
    if method != "clahe":  # whose last pass needs the curves of all tiles
        assert max(sent) < 50_000
    image = PreparedArray.of(np.zeros((3, 0, 0), np.uint16), plan.kept_in(tmp_path))
    job = pickle.dumps(image)
    assert len(job) < 50_000
    again = pickle.loads(job).plan
    assert again == plan
    np.testing.assert_array_equal(apply_block(x, again), apply_block(x, plan))
    assert pickle.loads(pickle.dumps(again.at_level(1, (256, 256)))) == plan.at_level(1, (256, 256))
    assert len(list(tmp_path.iterdir())) == (method != "stretch")


def test_a_plan_in_another_plans_file_is_refused(tmp_path):
    x = np.random.default_rng(0).integers(0, 1 << 16, (1, 512, 512)).astype(np.uint16)
    chosen = PreprocessSettings(histogram=HistogramSettings(method="equalize"))
    job = pickle.dumps(fit_plan(x, chosen).kept_in(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(fit_plan(x // 2, chosen).to_json()))
    with pytest.raises(InputError, match="another image"):
        pickle.loads(job)


# -- the lazy functions against the steps the engine applies ---------------------------------------
DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    chunks=chunkings(),
    sigma=st.floats(0.1, 30),
    radius=st.floats(1, 50),
    light=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    flat=st.booleans(),
)
def test_filters_of_dask_image_give_the_bits_of_the_steps(chunks, sigma, radius, light, dtype, flat):
    """Odd chunks, chunks smaller than the halo, images smaller than it; 2-D and (C, Y, X)."""
    x = random_image(dtype)
    whole = Box(0, 0, *x.shape[1:])
    lazy = da.from_array(x, chunks=(1, *chunks))
    lazy, x = (lazy[0], x[:1]) if flat else (lazy, x)
    for got, step in (
        (dc.gaussian(lazy, sigma), Gaussian(sigma)),
        (dc.correct_background(lazy, radius, light=light), Background(x.shape[1:], radius, light)),
    ):
        expected = step.apply(x, whole)
        assert got.dtype == x.dtype
        assert got.shape == lazy.shape
        np.testing.assert_array_equal(got.compute(scheduler="sync"), expected[0] if flat else expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 3, 300), (2, 300, 3), (1, 2, 2)])
def test_images_smaller_than_a_filter_are_filtered_whole(shape):
    x = random_image(np.uint8, shape)
    whole = Box(0, 0, *shape[1:])
    lazy = da.from_array(x, chunks=(1, 1, 7))
    np.testing.assert_array_equal(dc.gaussian(lazy, 5.0, axes="CYX"), Gaussian(5.0).apply(x, whole))
    expected = Background(shape[1:], 20.0).apply(x, whole)
    np.testing.assert_array_equal(dc.correct_background(lazy, 20.0, axes="CYX"), expected)


def test_the_lazy_filters_are_those_of_dask_image():
    x = da.from_array(random_image(np.uint8, (1, 61, 83)), chunks=(1, 30, 40))
    assert any("gaussian_filter" in name for name in dc.gaussian(x, 1.0).dask.layers)
    layers = list(dc.correct_background(x, 12.0).dask.layers)
    assert any("minimum_filter" in name for name in layers)
    assert any("maximum_filter" in name for name in layers)
