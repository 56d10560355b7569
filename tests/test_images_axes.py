"""What an array is told by: its own metadata, what the user says, or one rule; what is unclear is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

import daskcell as dc
from daskcell.config import Config, InputSettings
from daskcell.errors import ConfigError, ImageError, InputError, InputWarning
from daskcell.images.arrays import as_image
from daskcell.images.axes import choose_axes
from daskcell.pipeline.progress import Progress

SETTINGS = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"kind": "inline"}}
UNCLEAR = [(3, 4, 3), (5, 512, 4), (512, 3, 512), (300, 400, 8), (512, 512, 40), (3, 512, 4), (20, 30, 40, 2)]
UNCLEAR += [(2, 3, 64, 64), (1, 2, 3, 64, 64), (7,)]


def picture(channels: int = 3, side: int = 96) -> np.ndarray:
    """``(C, Y, X)``, wider than high."""
    pixels = np.random.default_rng(0).integers(0, 20, (channels, side, side + 16), np.uint8)
    pixels[:, 20:50, 20:50] = pixels[:, 60:90, 60:90] = 180
    pixels[0] //= 2
    return pixels


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 9), "YX"),
        ((3, 40, 50), "CYX"),
        ((40, 50, 3), "YXC"),
        ((16, 16, 2), "YXC"),
        ((40, 50, 1), "YXC"),
        ((1, 40, 50), "CYX"),
        ((5, 5, 5), "CYX"),
        ((64, 50, 60), "CYX"),
        ((100, 512, 512), "CYX"),
        ((2, 3, 40), "CYX"),
        ((2, 4, 4), "CYX"),
        ((1, 1, 1), "CYX"),
    ],
)
def test_the_rule(shape: tuple[int, ...], axes: str) -> None:
    assert choose_axes(shape, "x") == axes


@pytest.mark.parametrize("shape", UNCLEAR)
def test_what_is_unclear_is_refused_with_the_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.zeros(shape, np.uint8)
    for call in (lambda: dc.segment(array, method="watershed"), lambda: dc.gaussian(array, 1)):
        with pytest.raises(InputError) as found:
            call()
        assert str(shape) in str(found.value)
    with pytest.raises(InputError) as found:
        dc.run([("a", array)], tmp_path / "out", SETTINGS)
    assert str(shape) in str(found.value)
    assert not (tmp_path / "out").exists()
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ImageError, match=r"a\.npy") as found:
        dc.open_image(tmp_path / "a.npy")
    assert str(shape) in str(found.value)


def test_axes_can_be_given() -> None:
    x = picture(3, 24)
    for axes in ("CYX", "YXC", "XCY", "yxc", "TCZYX", "ZYXC"):
        moved = np.transpose(x[None, None], ["TZCYX".index(axis) for axis in "TCZYX"])
        order = {"T": 0, "C": 1, "Z": 2, "Y": 3, "X": 4}
        moved = moved.transpose(
            [order[a] for a in axes.upper()] + [order[a] for a in "TCZYX" if a not in axes.upper()]
        )
        moved = moved.reshape(moved.shape[: len(axes)])
        np.testing.assert_array_equal(as_image(moved, axes=axes).data, x)
    with pytest.raises(InputError, match="2 planes"):
        as_image(np.zeros((2, 20, 30)), axes="ZYX")
    for wrong in ("YX", "YYX", "ABC", "CX", "", 3):
        with pytest.raises(InputError, match=r"[Aa]xes"):
            as_image(x, axes=wrong)


@given(st.permutations("CYX"), st.lists(st.integers(1, 6), min_size=3, max_size=3))
def test_given_axes_are_kept_to_for_any_shape(order: list[str], shape: list[int]) -> None:
    x = np.arange(np.prod(shape)).reshape(shape)
    moved = x.transpose(["CYX".index(axis) for axis in order])
    np.testing.assert_array_equal(as_image(moved, axes="".join(order)).data, x)


@pytest.mark.slow
def test_every_public_function_reads_channels_that_come_last() -> None:
    x = picture()
    last = np.moveaxis(x, 0, -1)
    labels = np.asarray(dc.segment(x, method="watershed"))
    assert labels.max() == 2
    for function in (
        lambda a, **o: dc.segment(a, method="watershed", **o),
        lambda a, **o: dc.gaussian(a, 1, **o),
        lambda a, **o: dc.adjust_histogram(a, **o),
        lambda a, **o: dc.correct_background(a, 30, **o),
        lambda a, **o: dc.adjust_stains(a, "separate", **o),
        lambda a, **o: dc.reconstruct(a, **o),
    ):
        expected = np.asarray(function(x))
        for array in (last, da.from_array(last, (50, 50, 3))):
            with pytest.warns(InputWarning, match=r"\(96, 112, 3\): its last axis"):
                found = function(array)
            np.testing.assert_array_equal(np.asarray(found), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error", InputWarning)
            np.testing.assert_array_equal(np.asarray(function(last, axes="YXC")), expected)
    for function in (
        lambda a: dc.measure(labels, a),
        lambda a: dc.embed(a, labels),
        lambda a: dc.overlay(a, labels, [0, 1]),
    ):
        np.testing.assert_array_equal(function(last), function(x))


def test_labels_tell_where_channels_are_however_small() -> None:
    labels = np.ones((3, 4), np.uint8)
    x = np.arange(24).reshape(2, 3, 4)
    expected = dc.measure(labels, x, kinds=["intensity"])
    found = dc.measure(labels, np.moveaxis(x, 0, -1), kinds=["intensity"])
    assert found.equals(expected)


def refused_kinds() -> dict[str, Any]:
    import pandas as pd
    import scipy.sparse
    import torch

    x = picture(1)[0]
    kinds = {
        "masked": np.ma.masked_greater(x, 50),
        "masked array": da.from_array(np.ma.masked_greater(x, 50), 50),
        "table": pd.DataFrame(x),
        "sparse": scipy.sparse.csr_matrix(x),
        "complex": x.astype(complex),
        "datetime": x.astype("M8[s]"),
        "object": x.astype(object),
        "is a path": "a.tif",
        "values of type": np.zeros((20, 20), [("a", int), ("b", int)]),
        "bfloat16": torch.zeros((20, 20), dtype=torch.bfloat16),
        "array of numbers": [[1, 2], [3]],
        "dict": {"a": x},
        "unknown size": da.from_array(x, 50)[da.from_array(x.ravel() > 5, 50)[:96]],
    }
    try:
        import pint

        kinds["units"] = x * pint.UnitRegistry().volt
    except ImportError:
        pass
    try:
        import sparse

        kinds["sparse array"] = sparse.COO.from_numpy(x)
        kinds["a sparse"] = da.from_array(sparse.COO.from_numpy(x), 50)
    except ImportError:
        pass
    return kinds


@pytest.mark.slow
def test_arrays_that_mean_more_than_numbers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    for word, array in refused_kinds().items():
        for call in (
            lambda a: dc.segment(a, method="watershed"),
            lambda a: dc.gaussian(a, 1),
            lambda a: dc.measure(a),
            lambda a: dc.overlay(a, np.zeros((96, 112), int), [0]),
            lambda a: dc.run([("a", a)], tmp_path / "out", SETTINGS),
        ):
            with pytest.raises(InputError) as found:
                call(array)
            assert word in str(found.value), (word, str(found.value))
            assert str(found.value).count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_arrays_of_other_libraries_are_read(tmp_path: Path) -> None:
    import torch

    x = picture(2)
    expected = np.asarray(dc.gaussian(x, 1))
    named = zarr.create_array(
        tmp_path / "n.zarr", data=np.moveaxis(x, 0, -1), dimension_names=["y", "x", "c"]
    )
    plain = zarr.create_array(tmp_path / "p.zarr", data=x)
    dc.convert(tmp_path / "p.zarr", tmp_path / "image.zarr")
    for array in (
        torch.from_numpy(x),
        torch.from_numpy(x).requires_grad_(False),
        np.ma.array(x, mask=False),
        named,
        plain,
        dc.open_image(tmp_path / "image.zarr"),
        x.tolist(),
    ):
        result = np.asarray(dc.gaussian(array, 1))
        np.testing.assert_array_equal(result, expected)
    assert isinstance(as_image(plain).data, da.Array)


@pytest.mark.slow
def test_xarray_says_its_axes_and_channels(tmp_path: Path) -> None:
    xr = pytest.importorskip("xarray")
    x = picture(2)
    labels = np.asarray(dc.segment(x, method="watershed"))
    array = xr.DataArray(x.T, dims=("x", "y", "channel"), coords={"channel": ["DAPI", "GFP"]})
    np.testing.assert_array_equal(np.asarray(dc.segment(array, method="watershed")), labels)
    flipped = xr.DataArray(labels.T, dims=("x", "y"))
    columns = dc.measure(flipped, array).columns
    assert any("DAPI" in name for name in columns)
    assert any("GFP" in name for name in columns)
    study = dc.run([("a", array)], tmp_path / "out", SETTINGS)
    image = study.open_image("a")
    assert image.channels == ("DAPI", "GFP")
    np.testing.assert_array_equal(image.data.compute(), x)
    with pytest.raises(InputError, match="'wave'"):
        dc.segment(array.rename(channel="wave"), method="watershed")
    lazy = xr.DataArray(da.from_array(x, 50), dims=("dim_0", "dim_1", "dim_2"))
    np.testing.assert_array_equal(np.asarray(dc.segment(lazy, method="watershed")), labels)
    with pytest.raises(InputError, match="Dataset"):
        dc.segment(xr.Dataset({"a": array}), method="watershed")


class Said(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array", "npy", "tif", "bare.tif"])
def test_a_run_reads_channels_that_come_last_and_says_so(tmp_path: Path, kind: str) -> None:
    x = picture()
    last = np.ascontiguousarray(np.moveaxis(x, 0, -1))
    (tmp_path / "in").mkdir()
    inputs: Any = tmp_path / "in"
    if kind == "array":
        inputs = [("a", last)]
    elif kind == "npy":
        np.save(tmp_path / "in" / "a.npy", last)
    else:
        metadata = None if kind.startswith("bare") else {}
        tifffile.imwrite(tmp_path / "in" / "a.tif", last, photometric="minisblack", metadata=metadata)
    progress = Said()
    study = dc.run(inputs, tmp_path / "out", SETTINGS, progress=progress)
    assert study.failures == []
    np.testing.assert_array_equal(study.open_image("a").data.compute(), x)
    assert len(study.cells("a")) == 2
    assert sum("last axis is taken for channels" in text for text in progress.said) == 1


@pytest.mark.parametrize("shape", [(3, 4, 3), (40, 3, 50), (2, 3, 40, 50)])
def test_a_tiff_whose_axes_nothing_says_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), photometric="minisblack")
    with pytest.raises(ImageError, match=r"a\.tif.*input\.axes") as found:
        dc.open_image(tmp_path / "a.tif")
    assert str(shape) in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["YXC", "CYX", "YCX", "XYC", "ZCYX", "CZYX", "TCYX", "YXZC", "YXS"])
@pytest.mark.parametrize("kind", ["npy", "tif", "deflate.tif", "zarr"])
def test_the_setting_axes_holds_where_a_file_does_not_say(tmp_path: Path, axes: str, kind: str) -> None:
    x = picture(3, 20)
    whole = {"C": x, "S": x}.get(axes, x)
    if set(axes) & set("ZT"):
        whole = np.stack([x // 2, x])  # leading Z or T
        names = ("Z" if "Z" in axes else "T") + "CYX"
        array = whole.transpose([names.index(axis) for axis in axes])
    else:
        array = x.transpose(["CYX".index(axis) for axis in axes.replace("S", "C")])
    array = np.ascontiguousarray(array)
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, array)
    elif kind == "zarr":
        zarr.save_array(path, array)
    else:
        compression = "deflate" if "deflate" in kind else None
        tifffile.imwrite(path, array, photometric="minisblack", compression=compression)
    image = dc.open_image(path, InputSettings(axes=axes, t=1 if "T" in axes else "all"))
    np.testing.assert_array_equal(image.data.compute(), x)
    np.testing.assert_array_equal(image.data[:, 3:9, 5:30].compute(), x[:, 3:9, 5:30])
    assert image.is_rgb == (axes == "YXS")


def test_axes_that_a_file_says_are_believed(tmp_path: Path) -> None:
    x = picture(3, 24)
    tifffile.imwrite(tmp_path / "a.tif", x, photometric="minisblack", metadata={"axes": "ZYX"})
    assert dc.open_image(tmp_path / "a.tif").shape == (1, 24, 40)
    last = np.ascontiguousarray(np.moveaxis(x, 0, -1))
    tifffile.imwrite(tmp_path / "b.tif", last, photometric="minisblack", metadata={"axes": "YXC"})
    np.testing.assert_array_equal(dc.open_image(tmp_path / "b.tif").data.compute(), x)
    small = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for axes, shape in (("CYX", (2, 3, 4)), ("YXC", (4, 2, 3))):
        tifffile.imwrite(tmp_path / "c.tif", small, photometric="minisblack", metadata={"axes": axes})
        assert dc.open_image(tmp_path / "c.tif").shape == shape
    group = zarr.create_array(tmp_path / "d.zarr", data=last, dimension_names=["y", "x", "c"])
    np.testing.assert_array_equal(dc.open_image(str(group.store.root)).data.compute(), x)


def test_axes_that_cannot_be_are_refused_as_a_setting() -> None:
    assert Config(input={"axes": "yxc"}).input.axes == "YXC"
    with pytest.raises((ConfigError, ValueError), match="axes"):
        Config(input={"axes": "ABC"})


def test_what_opens_a_file_warns_of_a_guess(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.moveaxis(picture(), 0, -1))
    with pytest.warns(InputWarning, match=r"a\.npy has shape \(96, 112, 3\): its last axis"):
        assert dc.open_image(tmp_path / "a.npy").shape == (3, 96, 112)
    with pytest.warns(InputWarning, match=r"a\.npy"):
        dc.convert(tmp_path / "a.npy", tmp_path / "a.zarr")
