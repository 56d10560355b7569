"""The command line: help, exit codes, sentences instead of tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from daskcell.errors import ImageError
from daskcell.pipeline import api
from daskcell.pipeline.stages import STAGES
from daskcell.study import Study

pytestmark = pytest.mark.alone

COMMANDS = [
    ["run"],
    ["assign"],
    ["clusters"],
    ["clusters", "show"],
    ["clusters", "rename"],
    ["clusters", "merge"],
    ["clusters", "split"],
    ["demo"],
    ["status"],
    ["convert"],
    ["segment"],
    ["channels"],
    ["score"],
    ["weights"],
    ["weights", "list"],
    ["weights", "fetch"],
    ["train"],
    ["train", "segmenter"],
    ["train", "encoder"],
    ["neighbours"],
    ["export"],
    ["export", "crops"],
    ["export", "geojson"],
    ["report"],
    ["doctor"],
]


def daskcell(*arguments, timeout=200):
    return subprocess.run(
        [sys.executable, "-m", "daskcell", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command in this process: ``call("status", path) -> (code, out, err)``."""
    from daskcell.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["daskcell", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", np.full((20, 30), 7, np.uint8))
    return tmp_path / "in"


@pytest.fixture
def fakes(monkeypatch):
    """Stages that do nearly nothing."""

    def outputs(study, slide):
        return {
            "convert": study.paths.image(slide) / "zarr.json",
            "segment": study.paths.image(slide) / "labels" / "cells" / "zarr.json",
            "paint": study.paths.image(slide) / "labels" / "clusters" / "zarr.json",
            "describe": study.paths.features(slide) / "zarr.json",
            "cluster": study.paths.clusters / "model.json",
        }

    bad = set()

    def make(stage):
        def run_stage(context):
            study, slide = context.study, context.slide
            if (slide, stage.name) in bad:
                raise ImageError(f"{slide}.tif cannot be read.")
            path = outputs(study, slide).get(stage.name)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
            if stage.name == "describe":
                study.paths.table(slide).parent.mkdir(parents=True, exist_ok=True)
                study.paths.table(slide).write_text("")
            found = {"shape": [1, 20, 30], "cells": 7, "files": 1 if stage.name == "convert" else []}
            found |= {"conflicts": 0, "redone": 1, "plan": {}, "k": context.config.cluster.k}
            return stage.result.model_validate(found)

        return replace(stage, run=run_stage)

    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, make(stage))
    monkeypatch.setattr(api, "fingerprints", lambda config: {})

    monkeypatch.setattr(api, "bring_report_up_to_date", lambda study: None)
    return bad


def test_help_names_every_command():
    done = daskcell("--help")
    assert done.returncode == 0, done.stderr
    assert {command[0] for command in COMMANDS} <= set(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(call, command):
    code, out, _ = call(*command, "--help")
    assert code == 0
    assert "Usage" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['daskcell', 'run', '--help']\n"
        "from daskcell.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'dask', 'distributed', 'zarr', 'pandas', 'sklearn', 'cellpose'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(call):
    from daskcell._version import __version__

    assert call("--version") == (0, f"daskcell {__version__}\n", "")


def test_a_run_that_does_all_ends_with_0_and_says_what_there_is(call, fakes, pictures, tmp_path):
    code, out, err = call("run", pictures, "-o", tmp_path / "s", "--compute", "inline", "-k", 5)
    assert code == 0
    assert "2 slides, 14 cells, 5 clusters" in out
    assert err == ""
    assert Study(tmp_path / "s").config.cluster.k == 5


def test_a_run_that_set_slides_aside_ends_with_3(call, fakes, pictures, tmp_path):
    fakes.add(("one", "segment"))
    code, out, err = call("run", pictures, "-o", tmp_path / "s", "--compute", "inline")
    assert code == 3
    assert "set aside: one (segment): one.tif cannot be read." in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "segment.diametre=3"], "unknown setting 'segment.diametre'"),
        (["--set", "segment.diameter"], "should be NAME=VALUE"),
        (["--set", "cluster=3"], "cluster"),
        (["-k", "1"], "'cluster.k' cannot be 1"),
        (["--config", "no.yaml"], "Cannot read the config no.yaml"),
        (["--compute", "moon"], "tcp://host:8786"),
    ],
)
def test_a_refused_run_ends_with_2_and_one_sentence(call, fakes, pictures, tmp_path, arguments, sentence):
    code, out, err = call("run", pictures, "-o", tmp_path / "s", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("daskcell: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_run_that_breaks_on_the_way_ends_with_1(call, fakes, pictures, tmp_path, monkeypatch):
    def full(context):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(STAGES, "segment", replace(STAGES["segment"], run=full))
    code, _, err = call("run", pictures, "-o", tmp_path / "s", "--compute", "inline")
    assert code == 1
    assert "No space left" in err


def test_missing_input_and_missing_options_end_with_2(call, tmp_path):
    code, _, err = call("run", tmp_path / "nowhere", "-o", tmp_path / "s")
    assert code == 2
    assert "no file or folder" in err
    code, _, err = call("run", tmp_path)
    assert code == 2
    assert "--out" in err


def test_a_bug_is_one_line_unless_asked(call, monkeypatch, tmp_path):
    monkeypatch.setattr(Study, "__init__", lambda self, out: 1 / 0)
    code, _, err = call("status", tmp_path)
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
    monkeypatch.setattr(sys, "argv", ["daskcell", "status", str(tmp_path), "--debug"])
    from daskcell.cli import main

    with pytest.raises(ZeroDivisionError):
        main()


def test_settings_come_from_the_file_then_set_then_options(call, fakes, pictures, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "cluster: {k: 3, seed: 4}\nsegment: {diameter: 9}\ncompute: {kind: inline}\n"
    )
    settings = ["-c", tmp_path / "c.yaml", "--set", "cluster.k=6", "--set", "segment.min_size=2", "-k", "7"]
    code, _, _ = call("run", pictures, "-o", tmp_path / "s", *settings)
    assert code == 0
    config = Study(tmp_path / "s").config
    assert (config.cluster.k, config.cluster.seed) == (7, 4)
    assert (config.segment.diameter, config.segment.min_size) == (9, 2)


def test_no_diameter_and_an_estimated_one_can_be_asked_for(call, fakes, pictures, tmp_path):
    call("run", pictures, "-o", tmp_path / "a", "--compute", "inline", "--diameter", "null")
    assert Study(tmp_path / "a").config.segment.diameter is None
    call("run", pictures, "-o", tmp_path / "b", "--compute", "inline", "--diameter", "auto")
    assert Study(tmp_path / "b").config.segment.diameter == "auto"


def test_status_shows_slides_and_stages(call, fakes, pictures, tmp_path):
    fakes.add(("two", "describe"))
    call("run", pictures, "-o", tmp_path / "s", "--compute", "inline", "-k", 2)
    code, out, _ = call("status", tmp_path / "s")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["one"][1:8] == ["done"] * 7
    assert lines["two"][1:8] == ["done", "done", "done", "done", "FAILED", "-", "-"]
    assert "0 conflicts, 1 redone" in out
    assert "1 of 2 slides done" in out
    code, out, _ = call("status", tmp_path / "s", "--json")
    found = json.loads(out)
    assert [row["cells"] for row in found["slides"]] == [7, 7]
    assert found["slides"][1]["error"] == "two.tif cannot be read."


def test_status_of_what_is_no_study_is_refused(call, tmp_path):
    code, _, err = call("status", tmp_path)
    assert code == 2
    assert "no study" in err


def test_channels_are_shown(call, tmp_path):
    for name in ("a_red.tif", "a_green.tif"):
        tifffile.imwrite(tmp_path / name, np.zeros((8, 8), np.uint8))
    code, out, _ = call("channels", tmp_path)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["image", "channel", "file"]
    assert [row[:2] for row in rows[1:]] == [["a", "red"], ["a", "green"]]


def test_channels_are_written_as_pictures(call, tmp_path):
    stack = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    tifffile.imwrite(tmp_path / "x.tif", stack, photometric="minisblack", metadata={"axes": "CYX"})
    code, out, _ = call("channels", tmp_path / "x.tif", "--split", tmp_path / "parts")
    assert code == 0
    files = [Path(line) for line in out.splitlines() if line.startswith(str(tmp_path / "parts"))]
    assert len(files) == 2
    for file, plane in zip(files, stack, strict=True):
        np.testing.assert_array_equal(tifffile.imread(file), plane)


def test_a_picture_is_converted(call, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.full((40, 50), 9, np.uint16))
    code, out, _ = call("convert", tmp_path / "x.tif", tmp_path / "x.zarr", "--set", "compute.kind=inline")
    assert code == 0
    assert "1 x 40 x 50 uint16" in out
    code, _, err = call("convert", tmp_path / "x.tif", tmp_path / "x.zarr", "--set", "compute.kind=inline")
    assert code == 2
    assert "exists already" in err


def test_weights_are_listed(call):
    code, out, _ = call("weights", "list")
    assert code == 0
    assert any(line.split()[:2] == ["tiny", "yes"] for line in out.splitlines())
    assert "cpsam_v2" in out
