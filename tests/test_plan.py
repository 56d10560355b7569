"""What a run would do, said without doing it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from daskcell.cli import app
from daskcell.pipeline import api, run
from daskcell.pipeline.stages import STAGES
from daskcell.segmentation.methods import CellposeMethod

SETTINGS = {
    "segment": {"keep_flows": True, "diameter": None},
    "cluster": {"k": 2, "components": 4},
    "compute": {"kind": "inline", "block": 256},
    "output": {"overlays": [], "report": False},
    "preprocess": {"reconstruct": None},
}
LATE = ["assign", "paint"]


def cells(seed: int, side: int = 300) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    pixels = np.random.default_rng(seed).integers(5, 20, (side, side)).astype(np.uint8)
    for i in range(25, side - 20, 45):
        for j in range(25, side - 20, 45):
            pixels[np.hypot(y - i, x - j) < 8 + (i + j) % 3 * 3] = 160
    return pixels


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "in").mkdir()
    for seed, name in enumerate(("one", "two")):
        tifffile.imwrite(folder / "in" / f"{name}.tif", cells(seed))
    assert run(folder / "in", folder / "out", SETTINGS).failures == []
    return folder


@pytest.fixture
def study(made, tmp_path):
    """Inputs and study of one's own; the inputs lie where they were."""
    shutil.copytree(made / "out", tmp_path / "out")
    return made / "in", tmp_path / "out"


def reasons(inputs, out, changes):
    plan = api.plan(inputs, out, SETTINGS | changes)
    return {one.slide: dict(one.reasons) for one in plan.slides}


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_of_a_new_study_everything_is_to_do_and_nothing_is_written(made, tmp_path, monkeypatch):
    counts = []
    run_tiles = CellposeMethod.run_tiles

    def counted(self, read, params, tiles):
        counts.append(len(tiles))
        return run_tiles(self, read, params, tiles)

    plan = api.plan(made / "in", tmp_path / "new", SETTINGS)
    assert not (tmp_path / "new").exists()
    assert [list(one.reasons) for one in plan.slides] == [
        [n for n in STAGES if STAGES[n].scope == "slide"]
    ] * 2
    assert {one.reasons["convert"] for one in plan.slides} == {"new"}
    assert [(one.shape, one.blocks) for one in plan.slides] == [((1, 300, 300), 4)] * 2
    assert plan.clusters == "not done yet"
    assert plan.seconds is None
    assert "not known yet" in str(plan)
    monkeypatch.setattr(CellposeMethod, "run_tiles", counted)
    run(made / "in", tmp_path / "new", SETTINGS)
    assert sum(one.tiles for one in plan.slides) == sum(counts)
    sizes = sum(path.stat().st_size for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert 0 < sizes < 2 * plan.disk


def test_of_a_finished_study_nothing_is_to_do(study):
    inputs, out = study
    before = contents(out)
    plan = api.plan(inputs, out, SETTINGS)
    assert [one.reasons for one in plan.slides] == [{}, {}]
    assert plan.clusters == ""
    assert str(plan) == f"0 of 2 slides have work left in {out}"
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "stages", "why"),
    [
        (
            {"segment": SETTINGS["segment"] | {"min_size": 40}},
            ["segment", "describe", *LATE],
            "segment.min_size was 15 and is 40",
        ),
        ({"features": {"margin": 0.4}}, ["describe", *LATE], "features.margin was 0.1 and is 0.4"),
        ({"output": SETTINGS["output"] | {"overlays": ["png"]}}, ["paint"], r"output.overlays was"),
        ({"cluster": {"k": 3, "components": 4}}, LATE, "cluster is done again"),
    ],
)
def test_the_plan_names_the_setting_and_what_follows_from_it(study, changes, stages, why):
    inputs, out = study
    plan = api.plan(inputs, out, SETTINGS | changes)
    for one in plan.slides:
        assert list(one.reasons) == stages
        assert one.reasons[stages[0]].startswith(why)
    assert plan.seconds > 0
    assert (plan.clusters == "cluster.k was 2 and is 3") == ("cluster" in changes)


def test_kept_flows_leave_no_tile_to_compute(study):
    inputs, out = study
    tuned = {"segment": SETTINGS["segment"] | {"cellprob_threshold": 1.0}}
    assert [one.tiles for one in api.plan(inputs, out, SETTINGS | tuned).slides] == [0, 0]
    scaled = {"segment": SETTINGS["segment"] | {"diameter": 15.0}}
    assert all(one.tiles > 4 for one in api.plan(inputs, out, SETTINGS | scaled).slides)


def test_damage_a_new_version_and_a_changed_input_are_named(study, tmp_path, monkeypatch):
    inputs, out = study
    (out / "features" / "two.zarr" / "zarr.json").unlink()
    found = reasons(inputs, out, {})
    assert found["two"]["describe"] == "features/two.zarr/zarr.json is damaged or missing"
    assert list(found["one"]) == LATE
    monkeypatch.setitem(STAGES, "segment", replace(STAGES["segment"], version=99))
    found = reasons(inputs, out, {})
    assert found["one"]["segment"] == "this version of daskcell gives other results"
    assert found["one"]["describe"] == "segment is done again"


@pytest.mark.slow
def test_an_input_that_changed_or_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("one", "two")):
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", cells(seed, 100))
    settings = SETTINGS | {"segment": {"method": "watershed"}}
    run(tmp_path / "in", tmp_path / "out", settings)
    tifffile.imwrite(tmp_path / "in" / "two.tif", cells(5, 120))
    (tmp_path / "in" / "one.tif").write_text("this is no image")
    plan = api.plan(tmp_path / "in", tmp_path / "out", settings)
    assert [one.reasons["convert"] for one in plan.slides] == ["the input changed"] * 2
    assert "one.tif" in plan.slides[0].error
    assert plan.slides[1].shape == (1, 120, 120)
    assert "one cannot be opened" in str(plan)


def test_the_command_prints_it(study):
    inputs, out = study
    command = ["run", str(inputs), "-o", str(out), "--plan", "-k", "3", "--compute", "inline"]
    for change in (
        "segment.keep_flows=true",
        "cluster.components=4",
        "compute.block=256",
        "output.overlays=[]",
    ):
        command += ["--set", change]
    command += ["--set", "preprocess.reconstruct=null", "--diameter", "none"]
    before = contents(out)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "clusters: cluster.k was 2 and is 3" in done.output
    for word in ("one, two:", "assign: cluster is done again", "disk: at most", "memory:", "time: about"):
        assert word in done.output
    assert contents(out) == before
