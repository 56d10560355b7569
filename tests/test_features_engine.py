"""The engine gives what the Python API gives, for any blocks and workers, and leaves nothing half-made."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

from daskcell import images
from daskcell.compute import Workers
from daskcell.config import FeatureSettings, PreprocessSettings
from daskcell.errors import InputError, WeightsError
from daskcell.features import embed, engine, measure
from daskcell.features.engine import describe_slide
from daskcell.geometry import Grid
from daskcell.preprocess import apply_block, fit_slide

SIDES = (900, 700)
WIDTH = 96
SETTINGS = PreprocessSettings.model_validate({"gaussian": {"sigma": 1.5}})


def field(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two stains and cells of all sizes, one over many blocks; label 7 is missing."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(SIDES, np.uint32)
    labels[300:780, 250:690] = 1
    for i in range(150):
        y, x = rng.integers(0, SIDES[0] - 20), rng.integers(0, SIDES[1] - 20)
        h, w = rng.integers(6, 30, 2)
        labels[y : y + h, x : x + w] = i + 2
    labels[labels == 7] = 0
    image = rng.poisson(40 + 100 * (labels > 0), (2, *SIDES)).astype(np.uint16)
    return image, labels


def make_slide(folder, image, labels, name="slide"):
    tifffile.imwrite(folder / f"{name}.tif", image, metadata={"axes": "CYX"}, photometric="minisblack")
    path = folder / f"{name}.zarr"
    images.convert(folder / f"{name}.tif", path)
    images.create_labels(path, "cells", block=512, dtype=np.uint32)
    grid = Grid.regular(labels.shape, 512)
    for index in grid:
        box = grid.core(index)
        images.write_labels_block(path, "cells", box, labels[box.slices])
    images.build_label_pyramid(path, "cells")
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    image, labels = field()
    path = make_slide(tmp_path_factory.mktemp("slide"), image, labels)
    return path, image, labels, fit_slide(path, SETTINGS)


def describe(slide, out, block=512, workers=None, **changes):
    settings = FeatureSettings(**({"encoder": "tiny", "batch_size": 16} | changes))
    report = describe_slide(
        slide[0],
        out / "t.parquet",
        out / "f.zarr",
        settings,
        slide[3],
        workers or Workers(),
        block,
        out / "scratch",
    )
    assert sorted(path.name for path in out.iterdir()) == ["f.zarr", "t.parquet"], "nothing else is left"
    return (
        report,
        pd.read_parquet(out / "t.parquet"),
        np.asarray(zarr.open_array(out / "f.zarr", mode="r")[:]),
    )


@pytest.fixture(scope="module")
def described(slide, tmp_path_factory):
    return describe(slide, tmp_path_factory.mktemp("described"))


@pytest.mark.slow
def test_equals_the_python_functions_on_the_whole_image(slide, described):
    path, image, labels, plan = slide
    report, table, features = described
    info = images.image_info(path)
    expected = measure(labels, image, channels=info.channels)
    pd.testing.assert_frame_equal(table[expected.columns], expected, check_exact=True)
    assert table["area_um2"].isna().all() == (info.pixel_size is None)
    np.testing.assert_array_equal(features, embed(apply_block(image, plan), labels, "tiny", batch_size=16))
    assert report == {"cells": len(np.unique(labels)) - 1, "features": WIDTH, "missing": report["missing"]}
    assert report["missing"] >= 1
    assert np.isnan(features[6]).all()
    assert table.loc[6, "area"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("block", [256, 2048])
def test_no_bit_depends_on_the_blocks(slide, described, block, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "FULL_TASK", 10)
    _, table, features = describe(slide, tmp_path, block)
    pd.testing.assert_frame_equal(table, described[1], check_exact=True)
    np.testing.assert_array_equal(features, described[2])


@pytest.mark.slow
def test_maps_pooled_over_cells_equal_the_python_function_for_any_blocks(slide, tmp_path):
    expected = embed(apply_block(slide[1], slide[3]), slide[2], "tiny", pooling="mask")
    for block in (256, 2048):
        (tmp_path / str(block)).mkdir()
        report, _, features = describe(slide, tmp_path / str(block), block, pooling="mask")
        np.testing.assert_array_equal(features, expected)
        assert report["features"] == features.shape[1]


def test_a_network_without_feature_maps_is_refused_before_any_work(slide, tmp_path, monkeypatch):
    from daskcell.models.registry import torch_folder, torchvision_release

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch_folder().mkdir(parents=True)
    (torch_folder() / torchvision_release("alexnet")[2].rsplit("/", 1)[1]).write_bytes(b"x")
    with pytest.raises(InputError, match="accessible feature maps"):
        describe(slide, tmp_path, encoder="alexnet", pooling="mask")
    assert [path.name for path in tmp_path.iterdir()] == ["torch"]


@pytest.mark.slow
def test_no_bit_depends_on_the_workers(slide, described, tmp_path, monkeypatch):
    from distributed import Client

    monkeypatch.setattr(engine, "FULL_TASK", 10)
    with Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as client:
        _, table, features = describe(slide, tmp_path, 256, Workers(client))
    pd.testing.assert_frame_equal(table, described[1], check_exact=True)
    np.testing.assert_array_equal(features, described[2])


@pytest.mark.slow
def test_what_a_killed_run_finished_is_not_done_again(slide, described, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "FULL_TASK", 10)
    calls = []
    whole = engine._task

    def task(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(*args)

    monkeypatch.setattr(engine, "_task", task)
    with pytest.raises(KeyboardInterrupt):
        describe(slide, tmp_path, 256)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"], "no result that looks whole"
    calls.clear()
    calls.extend([None] * 3)
    _, table, features = describe(slide, tmp_path, 256)
    again = len(calls) - 3
    calls.clear()
    calls.extend([None] * 3)
    describe(slide, tmp_path, 256)
    assert again == len(calls) - 3 - 2
    pd.testing.assert_frame_equal(table, described[1], check_exact=True)
    np.testing.assert_array_equal(features, described[2])


@pytest.mark.slow
def test_steps_are_told_as_tasks_are_done(slide, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "FULL_TASK", 10)
    steps: list[float | None] = []
    describe(slide, tmp_path, 256, Workers().metered(steps.append))
    assert len([step for step in steps if step]) > 3
    assert sum(step or 0 for step in steps) == pytest.approx(0.9), "the rest is for the rows put in order"


def test_no_cell_gives_an_empty_table_with_the_same_columns(slide, described, tmp_path):
    image, _ = field()
    path = make_slide(tmp_path, image[:, :300, :300], np.zeros((300, 300), np.uint32), "empty")
    (tmp_path / "out").mkdir()
    report, table, features = describe((path, None, None, fit_slide(path, SETTINGS)), tmp_path / "out")
    assert report == {"cells": 0, "features": WIDTH, "missing": 0}
    assert table.dtypes.to_dict() == described[1].dtypes.to_dict()
    assert features.shape == (0, WIDTH)


@pytest.mark.slow
def test_measurements_can_be_left_out(slide, described, tmp_path):
    _, table, features = describe(slide, tmp_path, measurements=[])
    assert not any(name.startswith(("texture", "intensity")) for name in table)
    _, table, features = describe(slide, tmp_path, measurements=["texture"])
    assert any(name.startswith("texture_contrast-") for name in table)
    assert not any(name.startswith(("perimeter", "intensity")) for name in table)
    _, table, features = describe(slide, tmp_path, measurements=False)
    names = ["label", "centroid-0", "bbox-3", "area", "touches_edge", "area_um2"]
    pd.testing.assert_frame_equal(table[names], described[1][names])
    assert "perimeter" not in table
    assert "perimeter_um" not in table
    np.testing.assert_array_equal(features, described[2])


@pytest.mark.slow
def test_features_say_how_they_were_made(slide, tmp_path):
    describe(slide, tmp_path, margin=0.3, mask=False)
    made = dict(zarr.open_array(tmp_path / "f.zarr", mode="r").attrs)["daskcell"]
    assert made["encoder"] == "tiny"
    assert made["margin"] == 0.3
    assert made["mask"] is False
    assert len(made["fingerprint"]) == 64


def test_missing_weights_are_refused_before_any_work(slide, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    with pytest.raises(WeightsError, match="daskcell weights fetch resnet152"):
        describe(slide, tmp_path, encoder="resnet152")
    assert not list(tmp_path.iterdir())
