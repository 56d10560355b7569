"""The plain serial script computes what daskcell computes, and runs from pictures to clusters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage

from daskcell.config import GaussianSettings, PreprocessSettings
from daskcell.evaluation import score_pair
from daskcell.preprocess import apply_block, fit_plan
from daskcell.segmentation import segment


@pytest.fixture(scope="module")
def serial():
    path = Path(__file__).parents[1] / "benchmarks" / "serial.py"
    spec = importlib.util.spec_from_file_location("serial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Slopes(torch.nn.Module):
    """A network nobody trained: flows up the slope of the smoothed picture, cells where it is bright."""

    device = torch.device("cpu")
    dtype = torch.float32

    def forward(self, x):
        smooth = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 9, 1, 4)[:, 0]
        y, x_ = torch.gradient(smooth, dim=(1, 2))
        return torch.stack([100 * y, 100 * x_, 10 * (smooth - 0.4)], 1), torch.zeros(len(smooth), 256)


def blobs(shape=(300, 400), count=60, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Four stains of round cells on a grid with jitter, uint8, and the truth."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, np.int32)
    y, x = np.mgrid[: shape[0], : shape[1]]
    stains = np.zeros((4, *shape))
    grid = [(cy, cx) for cy in range(25, shape[0] - 20, 35) for cx in range(25, shape[1] - 20, 35)]
    for i, (cy, cx) in enumerate(grid[:count]):
        cy, cx = np.add((cy, cx), rng.normal(0, 2, 2))
        cell = (y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(80, 140)
        truth[cell] = i + 1
        stains[:, cell] = [[0.8], [0.7], [0.6], [0.2]] if i % 2 else [[0.2], [0.7], [0.7], [0.8]]
    stains = ndimage.gaussian_filter(stains, (0, 1.5, 1.5)) + 0.03 * rng.random(stains.shape)
    return (stains * 200).astype(np.uint8), truth


def test_preprocessing_is_the_same(serial):
    x, _ = blobs()
    plan = fit_plan(x, PreprocessSettings(gaussian=GaussianSettings(sigma=1.5)), ["R", "G", "B", "Cyan"])
    plain = serial.gaussian(serial.adjust_histogram(serial.reconstruct(x)), 1.5)
    np.testing.assert_array_equal(apply_block(x, plan), plain)


@pytest.mark.slow
@pytest.mark.parametrize("diameter", [None, 20.0, "auto"])
def test_cellpose_on_the_whole_is_cellposes_own_eval(serial, diameter):
    picture = blobs()[0][:3]
    labels = np.asarray(segment(picture, model=Slopes(), diameter=diameter))
    assert labels.max() > 5
    np.testing.assert_array_equal(labels, serial.segment_cellpose(picture, Slopes(), diameter))


def test_watershed_finds_the_cells_and_the_cures_cure(serial):
    x, truth = blobs()
    found = serial.segment_watershed(x)
    assert score_pair(truth, found)[0.5].ap > 0.95
    assert found.dtype == np.uint32
    inverted = serial.segment_watershed(255 - x, dark=True)
    assert score_pair(truth, inverted)[0.5].ap > 0.95
    # Markers much closer than cells are wide split them; merging similar sub-regions joins them again.
    rough = x.astype(float) + 25 * np.random.default_rng(1).standard_normal(x.shape)
    rough = np.clip(rough, 0, 255).astype(np.uint8)
    split = serial.segment_watershed(rough, opening=0, min_distance=1, merge_similarity=None)
    cured = serial.segment_watershed(rough, opening=2, min_distance=1, merge_similarity=0.75)
    assert score_pair(truth, split)[0.5].ap < 0.75
    assert score_pair(truth, cured)[0.5].ap > 0.95


def test_from_pictures_to_clusters(serial, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        stains, _ = blobs(seed=ord(name))
        for channel, plane in zip(("R", "G", "B", "Cyan"), stains, strict=True):
            tifffile.imwrite(tmp_path / "in" / f"{name}_{channel}.tif", plane)

    def colours(x):
        return x.mean(dim=(2, 3))

    monkeypatch.setattr(serial, "load_features_net", lambda encoder: (colours, 16))
    figures = serial.run(
        tmp_path / "in",
        tmp_path / "out",
        channels=["_R", "_G", "_B", "_Cyan"],
        method="watershed",
        sigma=1.0,
        k=2,
    )
    assert figures["pictures"] == 2
    assert figures["cells"] > 100
    assert {"read", "preprocess", "segment", "crop", "features", "cluster", "overlay"} <= set(
        figures["seconds"]
    )
    json.dumps(figures)
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {f"{n}_{what}.tif" for n in "ab" for what in ("preprocessed", "cells", "clusters")}
    coloured = tifffile.imread(tmp_path / "out" / "a_clusters.tif")
    assert coloured.shape == (300, 400, 3)
    assert coloured.dtype == np.uint8


def test_crops_hold_one_cell_each(serial):
    x, truth = blobs()
    crops = serial.crop_cells(x[:3], truth, 32)
    assert crops.shape == (truth.max(), 3, 32, 32)
    assert crops.max() <= 1
    assert (crops[:, 1, 16, 16] > 0.3).all()  # the cell is in the middle
    assert not crops[:, :, 0, 0].any()  # and blank around
