"""Measurements equal scikit-image's on the whole image, in every bit for any chunks."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.measure import label, regionprops_table

from daskcell.errors import InputError
from daskcell.features import measure

PROPERTIES = (
    "label",
    "centroid",
    "bbox",
    "area",
    "perimeter",
    "eccentricity",
    "axis_major_length",
    "axis_minor_length",
    "orientation",
    "solidity",
    "extent",
    "equivalent_diameter_area",
    "intensity_mean",
    "intensity_std",
    "intensity_min",
    "intensity_max",
)


def blobs(shape=(160, 220), seed=0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return label(ndimage.gaussian_filter(noise, 2.5) > 0.04).astype(np.uint32)


def assert_equals_skimage(labels: np.ndarray, image: np.ndarray) -> None:
    expected = regionprops_table(labels, np.moveaxis(image, 0, -1), properties=PROPERTIES)
    table = measure(labels, image)
    assert table["label"].tolist() == expected["label"].tolist()
    for name, values in expected.items():
        if name == "orientation":  # an axis: +90 and -90 degrees are the same
            difference = np.abs(table[name] - values) % np.pi
            np.testing.assert_allclose(np.minimum(difference, np.pi - difference), 0, atol=1e-6)
        else:
            np.testing.assert_allclose(table[name], values, rtol=1e-7, atol=1e-6, err_msg=name)


def test_equals_regionprops_of_the_whole_image():
    labels = blobs()
    assert labels.max() > 50
    assert_equals_skimage(labels, np.random.default_rng(1).random((2, *labels.shape)))


@pytest.mark.slow
@given(hnp.arrays(bool, st.tuples(st.integers(2, 14), st.integers(2, 14))))
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_equals_regionprops_for_any_mask(mask):
    # scikit-image cannot take the hull of a single row or column
    if not mask.any(axis=0).sum() > 1 or not mask.any(axis=1).sum() > 1:
        return
    image = np.random.default_rng(0).random((1, *mask.shape))
    assert_equals_skimage(mask.astype(np.uint32), image)


@pytest.mark.slow
@given(st.integers(20, 230), st.integers(20, 230), st.integers(1, 230))
@settings(max_examples=15, deadline=None)
def test_no_bit_depends_on_the_chunks(rows, columns, image_rows):
    labels, image = blobs(), np.random.default_rng(1).random((2, 160, 220), np.float32)
    cut = measure(
        da.from_array(labels, chunks=(rows, columns)), da.from_array(image, chunks=(1, image_rows, 50))
    )
    pd.testing.assert_frame_equal(cut, measure(labels, image), check_exact=True)


def test_a_cell_over_many_blocks_is_one_row():
    labels = np.zeros((90, 90), np.uint32)
    labels[5:85, 5:85] = 1
    table = measure(da.from_array(labels, chunks=10))
    assert table[["area", "perimeter", "centroid-0", "solidity"]].to_numpy().tolist() == [
        [6400, 4 * 79, 44.5, 1.0]
    ]


def test_a_label_that_no_pixel_has_keeps_its_row():
    labels = np.zeros((5, 5), np.uint32)
    labels[1, 1], labels[3:, 3:] = 1, 3
    table = measure(labels)
    assert table["label"].tolist() == [1, 2, 3]
    assert table["area"].tolist() == [1, 0, 4]
    assert table["touches_edge"].tolist() == [False, False, True]
    assert table.loc[1].drop(["label", "area", "touches_edge"]).isna().all()


def test_no_cell_gives_an_empty_table_with_the_same_columns():
    empty = measure(np.zeros((5, 5), np.uint32), np.zeros((2, 5, 5)), 0.5)
    some = measure(np.ones((5, 5), np.uint32), np.zeros((2, 5, 5)), 0.5)
    assert len(empty) == 0
    assert empty.dtypes.to_dict() == some.dtypes.to_dict()


def test_micrometres_follow_the_pixel_size():
    table = measure(np.pad(np.ones((4, 10), np.uint32), 1), pixel_size=(0.5, 2.0)).loc[0]
    assert table["area_um2"] == table["area"] == 40
    assert table["centroid-0_um"] == table["centroid-0"] * 0.5
    assert table["centroid-1_um"] == table["centroid-1"] * 2
    assert table["perimeter_um"] == table["perimeter"]


def test_a_missing_pixel_makes_brightness_missing_and_nothing_else():
    image = np.ones((1, 4, 4))
    image[0, 1, 1] = np.nan
    table = measure(np.ones((4, 4), np.uint32), image).loc[0]
    assert table.filter(like="intensity").isna().all()
    assert table["area"] == 16


@pytest.mark.parametrize("dtype", ["bool", "uint8", ">u2", "int32", "float16", ">f4", "float64"])
def test_any_number_type_is_measured(dtype):
    image = np.arange(32).reshape(2, 4, 4).astype(dtype)
    table = measure(np.ones((4, 4), ">i8"), image)
    assert table["intensity_mean-1"][0] == pytest.approx(image[1].astype(float).mean())
    assert table["intensity_max-1"][0] == image[1].astype(float).max()


def test_bright_images_lose_no_digits():
    rng = np.random.default_rng(0)
    image = 1e9 + rng.random((1, 50, 50))
    table = measure(np.ones((50, 50), np.uint32), image)
    assert table["intensity_std-0"][0] == pytest.approx(image.std(), rel=1e-9)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="shape"):
        measure(np.ones((4, 4), np.uint32), np.ones((1, 5, 4)))
    with pytest.raises(InputError, match="3 names"):
        measure(np.ones((4, 4), np.uint32), np.ones((1, 4, 4)), channels=["a", "b", "c"])
    with pytest.raises(InputError, match="whole numbers"):
        measure(np.ones((4, 4)))
    with pytest.raises(InputError, match="pixel_size"):
        measure(np.ones((4, 4), np.uint32), pixel_size=-1)
