"""The demo, small: it draws, runs, compares, and continues."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

from daskcell.errors import StudyError
from daskcell.evaluation.generated import CELL_TYPES
from daskcell.pipeline.demo import compare, demo, draw, names


def test_data_sets_are_named_by_letters():
    assert names(4) == ["setA", "setB", "setC", "setD"]
    assert names(28)[25:] == ["setZ", "set27", "set28"]


def test_pictures_are_one_file_per_channel_with_truth_beside_them(tmp_path):
    draw(tmp_path / "demo", 2, 256)
    files = sorted(path.name for path in (tmp_path / "demo" / "pictures").iterdir())
    assert files == [f"set{s}_{c}.tif" for s in "AB" for c in ("blue", "cyan", "green", "red")]
    labels = tifffile.imread(tmp_path / "demo" / "truth" / "setA.tif")
    rows = (tmp_path / "demo" / "truth" / "setA.csv").read_text().splitlines()
    assert len(rows) == labels.max() + 1
    assert {row.split(",")[2] for row in rows[1:]} <= {kind.name for kind in CELL_TYPES}


def test_drawing_again_changes_nothing(tmp_path):
    draw(tmp_path / "demo", 1, 256)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    draw(tmp_path / "demo", 1, 256)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == before


def test_a_demo_in_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").touch()
    with pytest.raises(StudyError, match="something else"):
        draw(tmp_path, 1, 256)
    draw(tmp_path / "demo", 1, 256)
    with pytest.raises(StudyError, match="another size"):
        draw(tmp_path / "demo", 2, 256)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("demo") / "demo", fields=2, size=384, workers=2)


@pytest.mark.slow
def test_the_demo_finds_and_clusters_the_cells(result):
    assert result.study.failures == []
    every = result.scores["all"]
    assert every["cells"] == sum(result.scores[name]["cells"] for name in ("setA", "setB"))
    assert every["f1"] > 0.85
    assert every["ari"] > 0.25  # few cells of each type here; the full demo has more
    assert json.loads((result.study.out.parent / "scores.json").read_text()) == result.scores
    assert str(result.study.paths.overlays) in result.text
    assert "setB" in result.text


@pytest.mark.slow
def test_scores_fall_when_the_cells_do_not_fit_the_truth(result, tmp_path):
    """Control: the same study against a truth that is moved by half a cell."""
    truth = result.study.out.parent / "truth"
    for name in ("setA", "setB"):
        labels = tifffile.imread(truth / f"{name}.tif")
        tifffile.imwrite(tmp_path / f"{name}.tif", np.roll(labels, (15, 15), (0, 1)))
        (tmp_path / f"{name}.csv").write_text((truth / f"{name}.csv").read_text())
    assert compare(result.study, tmp_path)["all"]["f1"] < 0.5


@pytest.mark.slow
def test_a_second_demo_continues_and_finds_all_done(result):
    before = (result.study.out / "study.json").stat().st_mtime_ns, sorted(result.study.out.rglob("*.tif"))
    times = {path: path.stat().st_mtime_ns for path in before[1]}
    again = demo(result.study.out.parent, fields=2, size=384, workers=2)
    assert again.scores == result.scores
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_to_open_first_is_named_first_by_a_whole_path(tmp_path):
    from types import SimpleNamespace

    from daskcell.pipeline.status import open_first

    files = SimpleNamespace(report=tmp_path / "report.html", overlays=tmp_path / "overlays")
    study = SimpleNamespace(paths=files)
    assert open_first(study) == []
    study.paths.overlays.mkdir()
    study.paths.report.touch()
    assert open_first(study) == [f"open first: {study.paths.report}", f"overlays: {study.paths.overlays}"]
