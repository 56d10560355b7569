"""What arrays say of themselves is kept or refused, by every function that takes them."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

import daskcell as dc
from daskcell.errors import InputError, InputWarning

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(100, 250, (3, 40, 50), np.uint8) for _ in range(4)]


def test_a_flat_field_is_the_same_whatever_the_order_of_the_axes() -> None:
    expected = dc.estimate_flat(IMAGES)
    assert expected.shape == (3, 40, 50)
    last = [image.transpose(1, 2, 0) for image in IMAGES]
    with pytest.warns(InputWarning, match="its last axis is taken for channels"):
        np.testing.assert_array_equal(dc.estimate_flat(last), expected)
    np.testing.assert_array_equal(dc.estimate_flat(last, axes="YXC"), expected)
    crossed = [image.transpose(2, 0, 1) for image in IMAGES]
    np.testing.assert_array_equal(dc.estimate_flat(crossed, axes="XCY"), expected)
    with pytest.raises(InputError, match=r"Image 1 has shape \(50, 3, 40\), .*please name the axes"):
        dc.estimate_flat(crossed)


@pytest.mark.parametrize(
    "pack", [np.stack, lambda images: da.stack([da.from_array(i) for i in images]), list, iter]
)
def test_a_flat_field_comes_from_a_stack_or_any_iterable(pack) -> None:
    np.testing.assert_array_equal(dc.estimate_flat(pack(IMAGES)), dc.estimate_flat(IMAGES))
    grey = [image[0] for image in IMAGES]
    np.testing.assert_array_equal(dc.estimate_flat(pack(grey)), dc.estimate_flat(grey))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.ma.masked_less(IMAGES[0], 120), "Image 2 is a masked array"),
        (np.zeros((2, 3, 40, 50), np.uint8), "Image 2 has shape"),
        (np.zeros((3, 0, 50), np.uint8), "Image 2 has no pixels"),
        ("nowhere.tif", "no file or folder"),
        ({"a": IMAGES[0]}, "Image 2 is a dict"),
    ],
)
def test_images_that_a_flat_field_cannot_come_from_are_named(wrong, says: str) -> None:
    with pytest.raises(InputError, match=says):
        dc.estimate_flat([IMAGES[0], wrong, IMAGES[2]])
    with pytest.raises(InputError, match="stack of shape"):
        dc.estimate_flat(IMAGES[0][0])


@pytest.mark.parametrize("wrong", [IMAGES[0], None, 3, [IMAGES[0]]])
def test_crops_are_exported_from_studies_only(tmp_path, wrong) -> None:
    with pytest.raises(InputError, match="study must be a folder or a Study, not a"):
        dc.export_crops(wrong, tmp_path / "out")
    with pytest.raises(InputError, match="out must be a folder, not a"):
        dc.export_crops(tmp_path, wrong)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "32"])
def test_the_size_of_crops_is_a_number_of_pixels(tmp_path, size) -> None:
    with pytest.raises(InputError, match="size must be a number of pixels"):
        dc.export_crops(tmp_path, tmp_path / "out", size=size)
