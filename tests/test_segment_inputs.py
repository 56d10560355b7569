"""What can be segmented is, whatever kind of numbers it holds; what cannot is refused with the value."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import tifffile
from blobs import BlobNetwork, blobs

import daskcell as dc
from daskcell.compute import Workers
from daskcell.config import PreprocessSettings, SegmentSettings
from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images import image_info, read_labels
from daskcell.preprocess import fit_slide
from daskcell.segmentation import segment
from daskcell.segmentation.engine import segment_slide

KINDS = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
KINDS += ["float16", "float32", "float64", ">u2", ">f4"]


def run(image, **options):
    """Labels and seam report."""
    return dask.compute(
        *segment(image, **{"diameter": None, "return_report": True} | options), scheduler="synchronous"
    )


def run_engine(image, folder, settings):
    """Labels that `daskcell run` gives."""
    tifffile.imwrite(folder / "picture.tif", image, photometric="minisblack")
    slide = folder / "picture.zarr"
    dc.convert(folder / "picture.tif", slide)
    plan = fit_slide(slide, PreprocessSettings(reconstruct=None, histogram=None), Workers())
    segment_slide(slide, "cells", settings, plan, Workers(), 256, folder / "scratch")
    return read_labels(slide, "cells", Box(0, 0, *image_info(slide).shape[1:]))


def as_kind(image, kind):
    """A picture (0 to about 1) over the middle of the range of a kind of number."""
    kind = np.dtype(kind)
    if kind.kind == "b":
        return image > 0.4
    if kind.kind == "f":
        return image.astype(kind)
    low, high = np.iinfo(kind).min / 2, np.iinfo(kind).max / 2
    return (low + np.clip(image, 0, 1).astype(np.float64) * (high - low)).astype(kind)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cellpose", "watershed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number_gives_the_cells_of_its_values(kind, method):
    image = as_kind(blobs((200, 230), 2), kind)
    labels, _ = run(image, method=method, model=BlobNetwork(), block=120)
    as_floats, _ = run(image.astype(np.float32), method=method, model=BlobNetwork())
    assert labels.max() > 15
    np.testing.assert_array_equal(labels, as_floats)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bool", "int8", "uint32", "float16", ">u2"])
def test_every_kind_of_number_in_a_file_gives_the_same_cells(kind, tmp_path):
    image = as_kind(blobs((200, 230), 2), kind)
    expected, _ = run(image, model="tiny")
    assert expected.max() > 10
    labels = run_engine(image, tmp_path, SegmentSettings(diameter=None))
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("kind", ["uint64", "int64"])
def test_numbers_of_64_bits_in_a_file_are_refused_by_name(kind, tmp_path):
    with pytest.raises(ImageError, match=f"picture.tif: pixels of type {kind}"):
        run_engine(as_kind(blobs((60, 70)), kind), tmp_path, SegmentSettings())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["cellpose", "watershed"])
def test_constant_pictures_have_no_cells(kind, method):
    for value in (0, 1):
        image = np.full((2, 90, 80), value, kind)
        assert run(image, method=method, model=BlobNetwork())[0].max() == 0


def test_a_constant_picture_in_a_file_has_no_cells(tmp_path):
    assert run_engine(np.full((90, 80), 7, np.uint16), tmp_path, SegmentSettings()).max() == 0


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


@pytest.mark.slow
def test_a_picture_that_could_overflow_the_labels_is_refused_before_any_work():
    image = da.zeros((80_000, 100_000), chunks=20_000, dtype=np.uint8)
    segment(image, model=BlobNetwork(), block=20_000)
    with pytest.raises(InputError, match="raise min_size to 2 or more"):
        segment(image, model=BlobNetwork(), min_size=1)


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
