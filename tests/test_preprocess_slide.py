"""Preprocessing from disk: the same plan and the same pixels as from the array."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from scipy import ndimage

import daskcell.preprocess.block_stats
from daskcell import images
from daskcell.compute import Workers
from daskcell.config import BackgroundSettings, GaussianSettings, HistogramSettings, PreprocessSettings
from daskcell.errors import ConfigError, InputError
from daskcell.images import convert, open_image
from daskcell.preprocess import (
    PreparedImage,
    apply_block,
    fit_plan,
    fit_slide,
    write_prepared_tiff,
)


@pytest.fixture(scope="module", params=[np.uint8, np.uint16, np.float32], ids=lambda d: np.dtype(d).name)
def slide(request, tmp_path_factory):
    """An OME-Zarr image of three stains, and its pixels."""
    rng = np.random.default_rng(3)
    x = ndimage.gaussian_filter(rng.random((3, 700, 1100)), (0, 3, 3)) + 0.02 * rng.random((3, 700, 1100))
    x = (x - x.min()) / (x.max() - x.min())
    if request.param != np.float32:
        x = x * np.iinfo(request.param).max * 0.6
    x = x.astype(request.param)
    folder = tmp_path_factory.mktemp("slide")
    tifffile.imwrite(folder / "x.tif", x, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    convert(folder / "x.tif", folder / "x.zarr")
    return folder / "x.zarr", x


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stretch", "equalize", "clahe"])
@pytest.mark.parametrize("workers", [None, Workers()], ids=["loop", "window"])
def test_a_slide_gives_the_plan_of_the_whole(slide, method, workers, monkeypatch):
    path, x = slide
    monkeypatch.setattr(daskcell.preprocess.block_stats, "COUNT_BLOCK", 256)
    monkeypatch.setattr(images, "read_histograms", lambda path: None)
    settings = PreprocessSettings(histogram=HistogramSettings(method=method))
    assert fit_slide(path, settings, workers) == fit_plan(x, settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stretch", "equalize", "clahe"])
def test_histograms_kept_with_the_image_save_reading_it(slide, method, monkeypatch):
    path, x = slide
    settings = PreprocessSettings(histogram=HistogramSettings(method=method))
    read = []
    count = daskcell.preprocess.block_stats._count_block
    monkeypatch.setattr(
        daskcell.preprocess.block_stats, "_count_block", lambda *given: read.append(1) or count(*given)
    )
    kept = fit_slide(path, settings)
    passes = {"stretch": 2, "equalize": 2, "clahe": 3} if x.dtype == np.float32 else {"clahe": 2}
    assert len(read) == passes.get(method, 0)
    monkeypatch.setattr(images, "read_histograms", lambda path: None)
    assert fit_slide(path, settings) == kept
    assert len(read) > passes.get(method, 0)


@pytest.mark.slow
def test_the_tif_is_the_preprocessed_image(slide, tmp_path):
    path, x = slide
    settings = PreprocessSettings(gaussian=GaussianSettings(sigma=2.0))
    plan = fit_slide(path, settings)
    write_prepared_tiff(PreparedImage(str(path), plan), tmp_path / "made" / "x.tif")
    np.testing.assert_array_equal(
        np.moveaxis(tifffile.imread(tmp_path / "made" / "x.tif"), -1, 0), apply_block(x, plan)
    )
    assert [f.name for f in (tmp_path / "made").iterdir()] == ["x.tif"]


@pytest.mark.slow
def test_blocks_are_counted_with_their_halo(slide, monkeypatch):
    """What lies below the cells is the same for blocks of 256 pixels and for the whole."""
    path, x = slide
    settings = PreprocessSettings(background=BackgroundSettings(radius=40))
    monkeypatch.setattr(daskcell.preprocess.block_stats, "COUNT_BLOCK", 256)
    blocks = fit_slide(path, settings)
    monkeypatch.setattr(daskcell.preprocess.block_stats, "COUNT_BLOCK", 4096)
    assert fit_plan(x, settings) == blocks


@pytest.mark.slow
def test_channels_that_are_not_three_become_pages(slide, tmp_path):
    x = slide[1][:2]
    tifffile.imwrite(tmp_path / "x.tif", x, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    convert(tmp_path / "x.tif", tmp_path / "x.zarr")
    plan = fit_slide(tmp_path / "x.zarr", PreprocessSettings(reconstruct=None))
    write_prepared_tiff(PreparedImage(str(tmp_path / "x.zarr"), plan), tmp_path / "y.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "y.tif"), apply_block(x, plan))


def test_a_failed_write_leaves_no_file(slide, tmp_path, monkeypatch):
    path, _ = slide
    image = PreparedImage(str(path), fit_slide(path))
    monkeypatch.setattr(PreparedImage, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_prepared_tiff(image, tmp_path / "x.tif")
    assert not list(tmp_path.iterdir())


def test_a_reference_image_is_matched(slide, tmp_path):
    path, x = slide
    settings = PreprocessSettings(histogram=HistogramSettings(method="match", reference=str(path)))
    darker = (x // 2 if x.dtype.kind == "u" else x / 2).astype(x.dtype)
    matched = apply_block(darker, fit_plan(darker, settings))
    scale = float(x.max())
    assert abs(float(matched.mean()) - float(x.mean())) < 0.01 * scale


def test_match_without_a_reference_is_refused_with_the_settings():
    from daskcell.config import parse_config

    with pytest.raises(ConfigError, match="reference"):
        parse_config({"preprocess": {"histogram": {"method": "match"}}})


def test_nan_pixels_of_a_slide_are_refused(tmp_path):
    x = np.random.default_rng(0).random((1, 40, 50)).astype(np.float32)
    x[0, 3, 3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        fit_plan(x)


@pytest.mark.data
def test_a_stain_stored_as_jpeg_in_colours_loses_its_noise(data_dir):
    image = open_image(data_dir / "slide" / "test3-DAPI-2-(387).ndpi")
    part = image.data[:, 1000:2000, 1000:2000].compute()
    assert part[:2].any()
    plan = fit_plan(part, None, image.channels, image.is_rgb)
    got = apply_block(part, plan)
    assert not got[:2].any()
    assert got[2].max() == 255


@pytest.mark.data
def test_a_stained_slide_keeps_its_colours(data_dir):
    image = open_image(data_dir / "slide" / "CMU-1-Small-Region.svs")
    part = image.data[:, 500:1500, 500:1500].compute()
    got = apply_block(part, fit_plan(part, None, image.channels, image.is_rgb)).astype(int)
    lightest, darkest = part.max(axis=0), part.min(axis=0)
    clear = (lightest.astype(int) - darkest > 30) & (got.max(axis=0) < 255) & (got.min(axis=0) > 0)
    assert clear.mean() > 0.3
    # The order of red, green and blue in a pixel is its hue.
    assert (part.argmax(axis=0) == got.argmax(axis=0))[clear].mean() > 0.99
    assert (part.argmin(axis=0) == got.argmin(axis=0))[clear].mean() > 0.99


@pytest.mark.data
@pytest.mark.parametrize("name", ["human", "fly", "bbbc022"])
def test_real_stains_use_the_whole_range(data_dir, name):
    files = sorted((data_dir / "channels" / name).iterdir())
    x = np.concatenate([np.asarray(open_image(file).data) for file in files])
    got = apply_block(x, fit_plan(x))
    white = np.iinfo(x.dtype).max
    assert len(got) == 3
    for plane in got:
        assert 0.001 < (plane == white).mean() < 0.01
        assert np.median(plane) < 0.1 * white


def test_a_rare_stain_keeps_its_cells_and_loses_its_noise():
    rng = np.random.default_rng(3)
    stains = rng.poisson(10, (3, 300, 300)).astype(np.uint8)
    stains[0, 50:120, 50:200] += 90
    stains[2, :, 100:200] += 60
    stains[1, 10:30, 20:40] = 200  # 400 of 90 000 pixels
    plan = fit_plan(stains, PreprocessSettings(), ["d0", "d1", "d2"])
    out = apply_block(stains, plan)
    assert (out[1, 10:30, 20:40] > 200).all()
    out[1, 10:30, 20:40] = 0
    assert np.percentile(out[1], 99) == 0, "what the network takes its percentiles of"
    again = type(plan).from_json(plan.to_json())
    np.testing.assert_array_equal(apply_block(stains, again)[0], out[0])
    # Where all stains are rare, the image is merely empty for the most part, and nothing is cut.
    few = np.where(stains > 150, stains, stains // 3)
    few[:] = few[1]
    assert "floor" not in [step.kind for step in fit_plan(few, PreprocessSettings(), list("abc")).steps]
