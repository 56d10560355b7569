"""Textures equal scikit-image's on the cell's own pixels, wherever the blocks are cut."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.feature import graycomatrix, graycoprops

from daskcell.features import measure
from daskcell.features.textures import LEVELS, Greys, fit_greys, textures

NAMES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation")


def field(dtype=np.uint16, shape=(90, 110)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = np.zeros(shape, np.uint32)
    for i in range(25):
        y, x, h, w = rng.integers(0, shape[0] - 9), rng.integers(0, shape[1] - 9), *rng.integers(1, 22, 2)
        labels[y : y + h, x : x + w][rng.random(labels[y : y + h, x : x + w].shape) < 0.9] = i + 1
    smooth = np.cumsum(rng.normal(size=(2, *shape)), axis=2)
    image = 200 + 20 * smooth + rng.normal(size=(2, *shape)) * 5 * labels
    return np.clip(image, 0, 4000).astype(dtype), labels


def by_skimage(labels, image, label, greys, channel) -> list[float]:
    """The co-occurrence matrix of the cell's box, outside as a level of its own that is then dropped."""
    ys, xs = np.nonzero(labels == label)
    box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    low, high = greys.low[channel], greys.high[channel]
    share = (image[channel][box].astype(float) - low) / (high - low)
    levels = np.clip(np.floor(share * LEVELS), 0, LEVELS - 1).astype(np.uint8) + 1
    levels[labels[box] != label] = 0
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    counts = graycomatrix(levels, [1], angles, levels=LEVELS + 1, symmetric=True)[1:, 1:]
    pooled = counts.sum(axis=3, keepdims=True)
    return [float(graycoprops(pooled, name)[0, 0]) for name in NAMES]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_equals_scikit_image(dtype):
    image, labels = field(dtype)
    table = measure(labels, image)
    greys = fit_greys([image[:, labels > 0]])
    compared = 0
    for row in table[table["area"] > 4].itertuples(index=False):
        for channel in range(2):
            expected = by_skimage(labels, image, row.label, greys, channel)
            got = [table.loc[row.label - 1, f"texture_{name}-{channel}"] for name in NAMES]
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
            compared += 1
    assert compared > 30


@pytest.mark.slow
@given(st.integers(7, 90), st.integers(7, 110))
@settings(max_examples=8, deadline=None)
def test_no_bit_depends_on_the_chunks(rows, columns):
    image, labels = field()
    names = [name for name in measure(labels, image) if name.startswith("texture")]
    assert len(names) == 10
    cut = measure(
        da.from_array(labels, chunks=(rows, columns)), da.from_array(image, chunks=(1, columns, rows))
    )
    np.testing.assert_array_equal(cut[names], measure(labels, image)[names])


def test_levels_of_each_cell_by_itself_would_hide_what_differs():
    """Control: a faint and a strong grain look alike unless the grey levels are those of the image."""
    rng = np.random.default_rng(0)
    labels = np.zeros((40, 80), np.uint32)
    labels[5:35, 5:35], labels[5:35, 45:75] = 1, 2
    grain = rng.random((30, 30))
    image = np.full((1, 40, 80), 100.0)
    image[0, 5:35, 5:35] += grain
    image[0, 5:35, 45:75] += 50 * grain
    contrast = measure(labels, image)["texture_contrast-0"]
    assert contrast[1] > 100 * contrast[0]
    own = [measure((labels == i).astype(np.uint32), image)["texture_contrast-0"][0] for i in (1, 2)]
    assert own[0] == pytest.approx(own[1], rel=0.05)


def test_a_cell_without_neighbouring_pixels_is_even():
    labels = np.zeros((10, 10), np.uint32)
    labels[2, 2], labels[5:8, 5:8] = 1, 2
    image = np.zeros((1, 10, 10))
    boxes = np.array([[2, 2, 3, 3], [5, 5, 8, 8]])
    found = textures(labels, image, np.array([1, 2]), boxes, Greys((0.0,), (1.0,)))
    np.testing.assert_array_equal(found[:, 0], [[0, 0, 1, 1, 1]] * 2)


def test_missing_values_are_left_out():
    labels = np.ones((6, 6), np.uint32)
    image = np.random.default_rng(0).random((1, 6, 6))
    image[0, :, 3:] = np.nan
    found = measure(labels, image)
    alone = measure(labels[:, :3], image[:, :, :3])
    for name in NAMES:
        assert found[f"texture_{name}-0"][0] == alone[f"texture_{name}-0"][0]


def test_what_is_not_asked_for_is_not_measured():
    image, labels = field()
    table = measure(labels, image, kinds=["intensity"])
    assert {name.split("-")[0].split("_")[0] for name in table} == {
        "label", "centroid", "bbox", "area", "touches", "intensity",
    }  # fmt: skip
    assert not any(name.startswith("texture") for name in measure(labels))
