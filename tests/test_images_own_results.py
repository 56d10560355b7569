"""What daskcell itself wrote beside or below images is not taken for images, and this is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from typer.testing import CliRunner

from daskcell.cli import app
from daskcell.errors import ImageError
from daskcell.images import convert, find_images, split_channels
from daskcell.render.overlays import _write_png, _write_tif

RNG = np.random.default_rng(0)


def command(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images with channels of their own."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "über"):
        pixels = RNG.integers(50, 250, (2, 60, 70), np.uint8)
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", pixels, metadata={"axes": "CYX"}, ome=True)
    return tmp_path / "in"


def found(*inputs: object) -> tuple[list[str], str]:
    said: list[str] = []
    sources = find_images([str(path) for path in inputs], None, said.append)
    return [source.name for source in sources], " ".join(said)


@pytest.mark.parametrize("below", [".", "split", "deep/er", "../in/split"])
def test_split_channels_are_left_out(folder: Path, below: str) -> None:
    command("channels", folder, "--split", folder / below)
    names, said = found(folder)
    assert names == ["a", "b", "über"]
    assert "a_channel_1.tif" in said
    assert "6 files" in said or "and 3 more" in said
    assert found(f"{folder}/**/*.tif")[0] == ["a", "b", "über"]


def test_split_channels_are_images_where_theirs_is_not(folder: Path, tmp_path: Path) -> None:
    command("channels", folder, "--split", tmp_path / "split")
    assert found(tmp_path / "split") == (["a", "b", "über"], "")
    assert found(folder / "a.tif", tmp_path / "split" / "a_channel_1.tif")[0] == ["a", "a_channel_1"]
    assert found(tmp_path / "split" / "a_channel_1.tif")[0] == ["a_channel_1"]


def test_split_channels_of_a_set_of_files_are_left_out(tmp_path: Path) -> None:
    for channel in ("red", "green"):
        tifffile.imwrite(tmp_path / f"s_{channel}.tif", RNG.integers(0, 250, (40, 50), np.uint8))
    split_channels(tmp_path, tmp_path / "out")
    names, said = found(tmp_path)
    assert names == ["s"]
    assert "s_red.tif" in said


def test_split_channels_of_a_plate_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "p.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.put({"ome": {"version": "0.5", "bioformats2raw.layout": 3}})
    tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 250, (40, 50), np.uint8))
    for name in "01":
        convert(tmp_path / "a.tif", path / name)
    (tmp_path / "a.tif").unlink()
    command("channels", path, "--split", tmp_path / "split")
    names, said = found(tmp_path)
    assert names == ["p_0", "p_1"]
    assert "p_0_" in said
    assert "p_1_" in said


def test_true_labels_beside_images_are_left_out(tmp_path: Path) -> None:
    """As `daskcell demo` writes them."""
    for name in ("pictures/f_red.tif", "pictures/f_green.tif", "truth/f.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / name, RNG.integers(0, 250, (40, 50), np.uint8))
    names, said = found(tmp_path)
    assert names == ["pictures_f"]
    assert "truth" in said


def test_a_flat_field_is_left_out(folder: Path) -> None:
    command("flat", folder, "-o", folder / "flat.tif")
    command("flat", folder, "-o", folder / "light of the lamp.tif")
    names, said = found(folder)
    assert names == ["a", "b", "über"]
    assert "flat.tif" in said
    assert "light of the lamp.tif" in said
    assert found(folder / "flat.tif")[0] == ["flat"], "named itself"
    for name in ("a", "b", "über"):
        (folder / f"{name}.tif").unlink()
    with pytest.raises(ImageError, match="no image"):
        found(folder)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_an_overlay_is_left_out(folder: Path, suffix: str) -> None:
    pixels, file = np.zeros((20, 30, 3), np.uint8), folder / f"view{suffix}"
    _write_png(file, pixels) if suffix == ".png" else _write_tif(file, pixels, None)
    names, said = found(folder)
    assert names == ["a", "b", "über"]
    assert f"view{suffix}" in said


@pytest.mark.parametrize("target", ["a.zarr", "b.zarr", "c.zarr", "converted/a.zarr", "converted/c.zarr"])
def test_a_converted_image_is_left_out(folder: Path, target: str) -> None:
    (folder / target).parent.mkdir(exist_ok=True)
    convert(folder / "a.tif", folder / target)
    names, said = found(folder)
    assert names == ["a", "b", "über"]
    assert target.rpartition("/")[2] in said


def test_a_converted_image_is_an_image_where_its_own_is_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    convert(folder / "a.tif", tmp_path / "other" / "a.zarr")
    assert found(tmp_path / "other") == (["a"], "")
    shutil.copytree(folder, tmp_path / "both" / "one")
    shutil.copytree(tmp_path / "other", tmp_path / "both" / "two")
    assert len(found(tmp_path / "both")[0]) == 4


def test_an_image_that_another_program_wrote_is_one(folder: Path) -> None:
    tifffile.imwrite(folder / "flat.tif", np.ones((20, 30), np.uint8), software="other")
    tifffile.imwrite(folder / "a_red.tif", np.ones((20, 30), np.uint8))
    assert found(folder)[0] == ["a", "a_red", "b", "flat", "über"]
