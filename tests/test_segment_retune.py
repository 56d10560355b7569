"""Other thresholds from kept flows, by command: no tile goes through the network again."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest
import tifffile
from blobs import blobs

import daskcell as dc
from daskcell.geometry import Box
from daskcell.images import image_info, read_labels
from daskcell.segmentation.methods import CellposeMethod


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process, which ends with 0; returns what it printed."""
    from daskcell.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["daskcell", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    return call


@pytest.fixture
def tiles(monkeypatch):
    """Counts tiles that go through the network."""
    counts, run = Counter(), CellposeMethod.run_tiles

    def counted(self, read, params, tiles):
        counts["all"] += len(tiles)
        return run(self, read, params, tiles)

    monkeypatch.setattr(CellposeMethod, "run_tiles", counted)
    return counts


@pytest.mark.slow
def test_thresholds_are_changed_by_command_without_the_network(command, tiles, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", (np.clip(blobs((300, 320), 11, radius=11), 0, 1) * 200).astype("u1"))
    plain = ["--compute", "inline", "-k", 2, "--quiet", "--set", "compute.block=256", "--diameter", "none"]
    changed = ["segment.cellprob_threshold=1", "segment.flow_threshold=0.3", "segment.min_size=60"]
    changed = [word for change in changed for word in ("--set", change)]

    def run(study, *settings):
        tiles.clear()
        command("run", tmp_path / "a.tif", "-o", tmp_path / study, *plain, *settings)
        return read_labels(tmp_path / study / "images" / "a.zarr", "cells", Box(0, 0, 300, 320))

    first = run("kept", "--set", "segment.keep_flows=true")
    assert tiles["all"] == 4
    again = run("kept", "--set", "segment.keep_flows=true", *changed)
    assert tiles["all"] == 0
    assert 0 < again.max() != first.max()
    fresh = run("fresh", *changed)
    assert tiles["all"] == 4
    np.testing.assert_array_equal(again, fresh)

    assert "0 conflicts, 0 redone" in command("status", tmp_path / "kept")
    (slide,) = json.loads(command("status", tmp_path / "kept", "--json"))["slides"]
    assert slide["seams"]["cells"] == again.max()
    assert slide["seams"]["blocks"] == 4
    assert slide["seams"]["tiles"] == 0
    assert slide["seams"]["seam_pairs"] > 0
    assert abs(slide["seams"]["cut_rate"]) < 0.2


def _real(data_dir, number=0):
    """Part of one of some real images of nuclei, ``(200, 200)`` uint8."""
    from PIL import Image

    pixels = np.asarray(Image.open(sorted((data_dir / "bbbc039" / "images").glob("*.png"))[number]))[
        :200, :200
    ]
    return np.clip(pixels * (200 / pixels.max()), 0, 255).astype(np.uint8)


def _cells(study):
    image = study.paths.image("a")
    return read_labels(image, "cells", Box(0, 0, *image_info(image).shape[1:]))


def _run(folder, out, segment):
    settings = {
        "compute": {"kind": "inline", "block": 256},
        "preprocess": {"reconstruct": None, "histogram": None},
        "cluster": {"k": 2},
        "output": {"overlays": [], "report": False},
    }
    study = dc.run(folder, out, settings | {"segment": segment})
    assert study.failures == []
    return _cells(study)


CELLPOSE = {"keep_flows": True, "diameter": None}
WATERSHED = {"keep_flows": True, "method": "watershed"}


@pytest.mark.slow
@pytest.mark.parametrize("segment", [CELLPOSE, WATERSHED], ids=["cellpose", "watershed"])
@pytest.mark.parametrize("other", ["mirror image", "another"])
def test_what_is_kept_of_another_input_is_not_used(data_dir, tmp_path, segment, other):
    """Both have the same shape, and a mirror image the same histogram: every setting and plan is equal."""
    pixels = _real(data_dir)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", pixels)
    before = _run(tmp_path / "in", tmp_path / "kept", segment)
    tifffile.imwrite(
        tmp_path / "in" / "a.tif", pixels[:, ::-1] if other == "mirror image" else _real(data_dir, 1)
    )
    after = _run(tmp_path / "in", tmp_path / "kept", segment)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, _run(tmp_path / "in", tmp_path / "fresh", segment))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (WATERSHED, WATERSHED | {"watershed": {"threshold": 0.8}}),
        (WATERSHED, WATERSHED | {"watershed": {"dark": True}}),
        (WATERSHED, CELLPOSE),
        (CELLPOSE, CELLPOSE | {"diameter": 20.0}),
        (CELLPOSE, CELLPOSE | {"min_size": 200, "max_size_fraction": 0.1, "niter": 50}),
    ],
)
def test_what_is_kept_under_other_settings_is_not_used(data_dir, tmp_path, before, after):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", _real(data_dir))
    first = _run(tmp_path / "in", tmp_path / "kept", before)
    again = _run(tmp_path / "in", tmp_path / "kept", after)
    assert not np.array_equal(again, first)
    np.testing.assert_array_equal(again, _run(tmp_path / "in", tmp_path / "fresh", after))


@pytest.mark.slow
def test_what_is_kept_after_another_preprocessing_is_not_used(data_dir, tmp_path):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", _real(data_dir))
    settings = {"compute": {"kind": "inline", "block": 256}, "cluster": {"k": 2}, "segment": CELLPOSE}
    blurred = settings | {"preprocess": {"gaussian": {"sigma": 4.0}}}
    first = _cells(dc.run(tmp_path / "in", tmp_path / "kept", settings))
    again = _cells(dc.run(tmp_path / "in", tmp_path / "kept", blurred))
    assert not np.array_equal(again, first)
    np.testing.assert_array_equal(again, _cells(dc.run(tmp_path / "in", tmp_path / "fresh", blurred)))


@pytest.mark.slow
def test_flows_of_what_is_gone_are_not_kept_for_ever(data_dir, tmp_path):
    (tmp_path / "in").mkdir()
    for pixels in (_real(data_dir), _real(data_dir)[::-1]):
        tifffile.imwrite(tmp_path / "in" / "a.tif", pixels)
        _run(tmp_path / "in", tmp_path / "study", CELLPOSE)
    assert len(list((tmp_path / "study" / "flows" / "a").iterdir())) == 1


@pytest.mark.slow
def test_a_slide_that_was_set_aside_goes_on_where_it_stopped(data_dir, tmp_path, monkeypatch, tiles):
    from daskcell.segmentation import engine

    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", _real(data_dir))
    settings = {"compute": {"kind": "inline", "block": 256}, "cluster": {"k": 2}}
    settings |= {"segment": {"diameter": None}, "output": {"overlays": [], "report": False}}
    check = engine._check_and_paint

    def broken(*arguments):
        raise ValueError("The worker ran out of luck.")

    monkeypatch.setattr(engine, "_check_and_paint", broken)
    study = dc.run(tmp_path / "in", tmp_path / "study", settings)
    assert [failure["stage"] for failure in study.failures] == ["segment"]
    assert tiles["all"] > 0
    tiles.clear()
    monkeypatch.setattr(engine, "_check_and_paint", check)
    study = dc.run(tmp_path / "in", tmp_path / "study", settings)
    assert study.failures == []
    assert tiles["all"] == 0
    assert not (study.out / "scratch").exists()
    fresh = dc.run(tmp_path / "in", tmp_path / "fresh", settings)
    np.testing.assert_array_equal(_cells(study), _cells(fresh))
