"""Collections grow and shrink: what is done stays, what is new is done, and what left is kept and marked."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tifffile
from test_pipeline import INLINE, fakes, folder  # noqa: F401
from test_run import SETTINGS, spots
from typer.testing import CliRunner

from daskcell.cli import app
from daskcell.errors import InputError
from daskcell.pipeline import assign, open_study, run
from daskcell.pipeline.status import report


def images(where, *names):
    where.mkdir(exist_ok=True, parents=True)
    for name in names:
        tifffile.imwrite(where / f"{name}.tif", np.full((20, 30), len(name), np.uint8))
    return [where / f"{name}.tif" for name in names]


def early(ran):
    """Slides that were begun anew."""
    return [slide for slide, stage in ran if stage == "convert"]


@pytest.mark.parametrize("how", ["list", "folder", "arrays"])
def test_the_same_command_with_more_inputs_continues(fakes, tmp_path, how):  # noqa: F811
    def given(*names):
        if how == "arrays":
            return [(name, np.full((20, 30), len(name), np.uint8)) for name in names]
        files = images(tmp_path / "in", *names)
        return files if how == "list" else tmp_path / "in"

    run(given("one"), tmp_path / "out", INLINE)
    fakes.take()
    study = run(given("one", "three"), tmp_path / "out", INLINE)
    ran = fakes.take()
    assert early(ran) == ["three"]
    assert ("*", "cluster") in ran
    assert (study.slides, study.left, study.failures) == (["one", "three"], [], [])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["list", "folder", "arrays"])
def test_slides_whose_input_is_no_longer_given_stay_and_are_marked(fakes, tmp_path, how):  # noqa: F811
    def given(*names):
        if how == "arrays":
            return [(name, np.full((20, 30), len(name), np.uint8)) for name in names]
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        files = images(tmp_path / "in", *names)
        return files if how == "list" else tmp_path / "in"

    run(given("one", "three"), tmp_path / "out", INLINE)
    fakes.take()
    study = run(given("three", "seven_"), tmp_path / "out", INLINE)
    assert (study.slides, study.left) == (["one", "seven", "three"], ["one"])
    assert study.failures == []
    ran = fakes.take()
    assert ("one", "assign") in ran, "all tables refer to the same clusters"
    assert study.paths.table("one").exists()
    rows = {row["slide"]: row["left"] for row in report(study)["slides"]}
    assert rows == {"one": True, "seven": False, "three": False}
    shown = CliRunner().invoke(app, ["status", str(study.out)]).output
    assert "one (left)" in shown
    assert "1 of them left" in shown
    assert run(given("one", "three", "seven_"), tmp_path / "out", INLINE).left == []
    assert early(fakes.take()) == []


def test_a_bad_image_that_is_taken_out_is_no_failure_any_more(fakes, tmp_path):  # noqa: F811
    files = images(tmp_path / "in", "one", "three")
    fakes.raises["one", "segment"] = ValueError("bad")
    assert [f["slide"] for f in run(files, tmp_path / "out", INLINE).failures] == ["one"]
    study = run(files[1:], tmp_path / "out", INLINE)
    assert (study.failures, study.left) == ([], ["one"])
    assert report(study)["totals"]["failed"] == 0


def test_another_image_of_the_name_of_a_slide_is_refused_with_both_paths(fakes, tmp_path):  # noqa: F811
    (old,) = images(tmp_path / "monday", "cells")
    (new,) = images(tmp_path / "tuesday", "cells")
    tifffile.imwrite(new, np.full((20, 31), 9, np.uint8))
    run([old], tmp_path / "out", INLINE)
    fakes.take()
    with pytest.raises(InputError, match="cells") as refused:
        run([new], tmp_path / "out", INLINE)
    assert str(old) in str(refused.value)
    assert str(new) in str(refused.value)
    assert open_study(tmp_path / "out").left == []
    for inputs in ([old, new], [new, old]):  # both: the old one keeps its name, whatever the order
        assert run(inputs, tmp_path / "out", INLINE).slides == ["cells", "cells-2"]
    assert early(fakes.take()) == ["cells-2"]


def test_a_collection_that_was_moved_continues(fakes, folder, tmp_path):  # noqa: F811
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    moved = tmp_path / "archive"
    folder.rename(moved)
    study = run(moved, tmp_path / "out", INLINE)
    assert (fakes.take(), study.left, len(study.slides)) == ([], [], 3)


def test_a_channel_that_came_makes_the_slide_anew(fakes, tmp_path):  # noqa: F811
    files = images(tmp_path / "in", "a_red", "a_green", "b_red", "b_green")
    run(files, tmp_path / "out", INLINE)
    fakes.take()
    files += images(tmp_path / "in", "a_blue", "b_blue")
    study = run(files, tmp_path / "out", INLINE)
    assert early(fakes.take()) == ["a", "b"] == study.slides


def test_a_file_keeps_its_name_when_it_is_given_another_way(fakes, tmp_path):  # noqa: F811
    images(tmp_path / "in" / "plate", "a", "b")
    assert run(tmp_path / "in", tmp_path / "out", INLINE).slides == ["plate_a", "plate_b"]
    fakes.take()
    files = [tmp_path / "in" / "plate" / f"{name}.tif" for name in "ab"]
    assert run(files, tmp_path / "out", INLINE).slides == ["plate_a", "plate_b"]
    assert fakes.take() == []


@pytest.mark.slow
def test_a_grown_study_is_what_a_new_one_would_be(tmp_path):
    """The true way, and after it a slide that left has the clusters of the new fit."""
    for seed, name in enumerate("abc"):
        tifffile.imwrite(tmp_path / f"{name}.tif", spots(seed))
    files = [tmp_path / f"{name}.tif" for name in "abc"]
    run(files[:2], tmp_path / "grown", SETTINGS)
    grown = run(files[1:], tmp_path / "grown", SETTINGS)
    new = run(files[1:], tmp_path / "new", SETTINGS)
    assert grown.failures == []
    assert grown.left == ["a"]
    for name in ("arrays.npz", "model.json"):
        assert (grown.paths.clusters / name).read_bytes() == (new.paths.clusters / name).read_bytes()
    for name in "bc":
        assert grown.paths.table(name).read_bytes() == new.paths.table(name).read_bytes()
    assert sorted(grown.cells()["slide"].unique()) == ["a", "b", "c"]
    key = grown.record.ledger("a").entry("assign")["key"]
    assert "No longer among the inputs" in grown.paths.report.read_text()
    given = assign(files[:1], tmp_path / "given", model=new.out)
    assert grown.paths.table("a").read_bytes() == given.paths.table("a").read_bytes()
    again = run(files[1:], tmp_path / "grown", SETTINGS)
    assert again.record.ledger("a").entry("assign")["key"] == key
    more = assign(files, tmp_path / "given", model=new.out)
    assert (more.slides, more.left) == (["a", "b", "c"], [])
    assert assign(files[:2], tmp_path / "given", model=new.out).left == ["c"]
