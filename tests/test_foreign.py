"""No file that daskcell did not write is replaced or removed: by no verb, no command, no killed run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from test_run import SETTINGS, spots
from typer.testing import CliRunner

import daskcell as dc
from daskcell.cli import app
from daskcell.errors import DaskcellError, InputError, StudyError, WeightsError
from daskcell.pipeline import open_study, run

CHANGED = SETTINGS | {"input": {"pixel_size": 0.5}, "output": {"preprocessed": True, "channels": True}}
"""Settings under which every stage is done again."""
NOTES = [
    "notes.txt",
    ".hidden/deep/notes",
    "mine.tmp",
    ".mine.tmp",
    ".mine.tif.0123abcd.tmp",
    "inputs/mine.tif",
    "inputs/deep/mine.tif",
    "images/mine.zarr/zarr.json",
    "images/.mine.zarr.partial/zarr.json",
    "images/.a.zarr.old/zarr.json",
    "images/.a.zarr.partial/zarr.json",
    "tables/mine.csv",
    "tables/cells/mine.parquet",
    "tables/cells/.mine.tmp",
    "features/mine.npy",
    "features/.a.zarr.0123abcd.tmp/c",
    "overlays/mine.png",
    "overlays/.mine.tmp",
    "preprocessed/mine.tif",
    "channels/mine.tif",
    "channels/a/mine.tif",
    "ledger/mine.json",
    "ledger/.mine.tmp",
    "clusters-before/names.json",
    "crops/mine.npy",
    "report.htm",
    "flows/mine",
]
"""Places in a study that are in nobody's way."""
IN_THE_WAY = [
    "images/a.zarr/notes.txt",
    "images/a.zarr/labels/manual/zarr.json",
    "images/a.zarr/labels/manual/0/c/0/0",
    "images/a.zarr/0/notes.txt",
    "features/a.zarr/notes.txt",
    "images/a.zarr/labels/cells/notes.txt",
]
"""Places in folders that are replaced whole when a slide is done again."""


def write(root: Path, *names: str) -> dict[Path, bytes]:
    files = {}
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"precious {name}".encode())
        files[path] = path.read_bytes()
    return files


def check(files: dict[Path, bytes]) -> None:
    lost = [str(path) for path, data in files.items() if not path.is_file() or path.read_bytes() != data]
    assert lost == []


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of one image, and the study of it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "in").mkdir()
    tifffile.imwrite(folder / "in" / "a.tif", spots(1, 220))
    study = run(folder / "in" / "a.tif", folder / "study", SETTINGS)
    assert study.failures == []
    return folder


@pytest.fixture
def study(finished, tmp_path):
    shutil.copytree(finished / "study", tmp_path / "study")
    return tmp_path / "study"


# ---------------------------------------------------------------------- studies


@pytest.mark.parametrize("given", ["path", "array"])
@pytest.mark.parametrize("name", [*NOTES, *IN_THE_WAY, "study.json", "inputs/a.tif", ".lock", ".lock-mine"])
def test_a_new_study_is_refused_where_anything_else_is(finished, tmp_path, name, given):
    files = write(tmp_path / "out", name)
    inputs = finished / "in" if given == "path" else [("a", spots(1))]
    with pytest.raises(StudyError) as refused:
        run(inputs, tmp_path / "out", SETTINGS)
    assert name.split("/")[0] in str(refused.value)
    check(files)
    assert len(contents(tmp_path / "out")) == 1


@pytest.mark.slow
def test_whatever_lies_in_a_study_stays_when_all_is_done_again(finished, study):
    files = write(study, *NOTES)
    assert run(finished / "in" / "a.tif", study, SETTINGS).failures == []
    check(files)
    assert run(finished / "in" / "a.tif", study, CHANGED, verify=True).failures == []
    check(files)


@pytest.mark.slow
def test_what_lies_in_a_folder_that_is_replaced_stops_its_slide_only(finished, study, tmp_path):
    tifffile.imwrite(tmp_path / "b.tif", spots(2))
    inputs = [finished / "in" / "a.tif", tmp_path / "b.tif"]
    files = write(study, *IN_THE_WAY)
    done = run(inputs, study, CHANGED)
    check(files)
    assert [failure["slide"] for failure in done.failures] == ["a"]
    assert "was not written by daskcell" in done.failures[0]["error"]
    assert done.paths.table("b").exists()
    for file in files:
        file.unlink()
    shutil.rmtree(study / "images" / "a.zarr" / "labels" / "manual")
    assert run(inputs, study, CHANGED).failures == []


@pytest.mark.parametrize("name", IN_THE_WAY[4:])
def test_only_what_is_replaced_is_looked_at(finished, study, name):
    files = write(study, name)
    settings = SETTINGS | {"segment": {"method": "watershed", "min_size": 20}}
    done = run(finished / "in" / "a.tif", study, settings)
    check(files)
    assert str(study / name) in done.failures[0]["error"]


@pytest.mark.parametrize("file", ["images/a.zarr/labels/zarr.json", "images/a.zarr/0/c/0/0/0"])
def test_labels_of_other_people_outlive_damage(finished, study, file):
    files = write(study, *IN_THE_WAY[1:3])
    (study / file).unlink()
    run(finished / "in" / "a.tif", study, SETTINGS, verify=True)
    check(files)


@pytest.mark.parametrize(
    "name",
    [
        "images/b.zarr/zarr.json",
        "tables/cells/b.parquet",
        "features/b.zarr/c/0/0",
        "overlays/b.png",
        "overlays/b.tif",
        "preprocessed/b.tif",
        "channels/b/mine.tif",
        "ledger/b.json",
    ],
)
def test_a_file_in_the_place_of_a_new_slide_is_refused_before_any_work(finished, study, tmp_path, name):
    tifffile.imwrite(tmp_path / "b.tif", spots(2))
    write(study, name)
    before = contents(study)
    with pytest.raises(StudyError, match="was not written by daskcell") as refused:
        run([finished / "in" / "a.tif", tmp_path / "b.tif"], study, SETTINGS)
    assert "/".join(name.split("/")[: 3 if name.startswith("tables") else 2]) in str(refused.value)
    assert contents(study) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report.html", "overlays/a.tif", "overlays/a.png", "flows/a/mine"])
def test_a_file_in_the_place_of_an_output_that_was_off_is_kept(finished, tmp_path, name):
    off = SETTINGS | {"output": {"overlays": [], "report": False}}
    out = tmp_path / "study"
    run(finished / "in", out, off)
    files = write(out, name)
    run(finished / "in", out, off)
    check(files)
    on = off | {"segment": {"method": "watershed", "keep_flows": True}, "output": {}}
    with pytest.raises(StudyError, match="was not written by daskcell"):
        run(finished / "in", out, on)
    check(files)


def test_the_report_is_removed_only_if_it_is_ours(finished, study):
    off = SETTINGS | {"output": {"preprocessed": True, "channels": True, "report": False}}
    assert (study / "report.html").exists()
    run(finished / "in" / "a.tif", study, off)
    assert not (study / "report.html").exists()
    files = write(study, "report.html")
    run(finished / "in" / "a.tif", study, off)
    with pytest.raises(StudyError, match="was not written"):
        dc.report.write_report(open_study(study))
    check(files)


@pytest.mark.parametrize("name", ["scratch/mine.txt", "clusters/mine.txt"])
def test_folders_that_are_replaced_whole_are_refused_with_something_else_in_them(finished, study, name):
    files = write(study, name)
    with pytest.raises(StudyError, match=r"mine\.txt was not written"):
        run(finished / "in" / "a.tif", study, CHANGED)
    check(files)


def test_scores_of_other_people_stay(finished, study, tmp_path):
    (tmp_path / "truth.csv").write_text("slide,label,type\na,1,x\na,2,y\n")
    files = write(study, "scores.json")
    with pytest.raises(StudyError, match="was not written"):
        run(finished / "in" / "a.tif", study, SETTINGS, truth=tmp_path / "truth.csv")
    done = CliRunner().invoke(app, ["score", str(study), str(tmp_path / "truth.csv")])
    assert isinstance(done.exception, StudyError)
    check(files)


@pytest.mark.slow
def test_arrays_keep_to_their_list(tmp_path):
    out = tmp_path / "out"
    one = run([("a", spots(1)), ("b", spots(2))], out, SETTINGS)
    assert one.record["arrays"] == ["a.tif", "b.tif"]
    files = write(out, "inputs/mine.tif", "inputs/deep/x.txt", "inputs/.hidden", "inputs/c.tif")
    two = run([("b", spots(3))], out, SETTINGS)
    assert (two.slides, two.left, two.failures) == (["a", "b"], ["a"], [])
    check(files)
    with pytest.raises(StudyError, match=r"c\.tif was not written by daskcell"):
        run([("b", spots(3)), ("c", spots(4))], out, SETTINGS)
    check(files)
    with pytest.raises(InputError, match="Two arrays"):
        run([("d", spots(1)), ("d", spots(2))], out, SETTINGS)
    check(files)


def test_arrays_that_are_refused_leave_nothing(tmp_path):
    with pytest.raises(InputError):
        run([("a", spots(1)), ("b", np.zeros(3))], tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
import daskcell as dc
from daskcell.pipeline import runner
import sklearn.decomposition, pandas, torch  # once for all forks
sys.path.insert(0, sys.argv[3])
from test_foreign import CHANGED
last, count = 0, 0
def counted(function):
    def call(*args, **options):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call
os.replace, os.rename, os.unlink = counted(os.replace), counted(os.rename), counted(os.unlink)
for line in sys.stdin:
    last = int(line)
    child = os.fork()
    if not child:
        dc.run(sys.argv[1], sys.argv[2], CHANGED)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs in forks of one process, each of which is killed at a change of files, told by its number on stdin."""


@pytest.mark.slow
def test_a_run_killed_again_and_again_leaves_them_too(finished, study):
    files = write(study, *NOTES)
    last, kills, code = 2, 0, -signal.SIGKILL
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(finished / "in" / "a.tif"), str(study), here]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        while code == -signal.SIGKILL:
            forks.stdin.write(f"{last}\n")
            forks.stdin.flush()
            code = int(forks.stdout.readline())
            check(files)
            last, kills = last * 2, kills + (code != 0)
        forks.stdin.close()
    assert code == 0
    assert kills > 3
    assert run(finished / "in" / "a.tif", study, CHANGED).failures == []
    check(files)


def test_a_lock_of_other_people_is_not_broken(finished, study):
    for text in (b"", b"precious", b"[1]", b'{"pid": 1}'):
        (study / ".lock").write_bytes(text)
        os.utime(study / ".lock", (0, 0))
        with pytest.raises(StudyError, match=r"\.lock was not written by daskcell"):
            run(finished / "in" / "a.tif", study, SETTINGS)
        assert (study / ".lock").read_bytes() == text


# ---------------------------------------------------------------------- other outputs


def test_crops_to_train_on_keep_to_their_list(finished, tmp_path):
    from daskcell.training.crops import study_crops

    names = ["mine.npy", ".mine.tmp", ".mine.npy.0123abcd.tmp", f"{'0' * 32}.npy", "deep/mine.npy"]
    files = write(tmp_path / "crops", *names)
    found = [open_study(finished / "study")]
    study_crops(found, tmp_path / "crops", cells=100, report=lambda line: None)
    study_crops(found, tmp_path / "crops", cells=12 + 4, report=lambda line: None)
    check(files)
    assert len(list((tmp_path / "crops").glob("*.npy"))) == 3, "those of the first call are gone"
    files = write(tmp_path / "other", "files.json")
    with pytest.raises(StudyError, match=r"files\.json"):
        study_crops(found, tmp_path / "other", cells=100, report=lambda line: None)
    check(files)


@pytest.mark.parametrize("name", ["encoder.npz", "segmenter.npz", "segmenter.pt", "log.csv", "checkpoint.pt"])
@pytest.mark.parametrize("kind", ["encoder", "segmenter"])
def test_a_training_replaces_no_file_of_other_people(tmp_path, kind, name):
    from daskcell.training import EncoderRecipe, Recipe, train_encoder, train_segmenter

    files = write(tmp_path, name)
    crops = np.random.default_rng(0).integers(0, 255, (16, 3, 64, 64)).astype(np.uint8)
    train = {
        "encoder": lambda: train_encoder(crops, tmp_path, EncoderRecipe(steps=1)),
        "segmenter": lambda: train_segmenter([], tmp_path, Recipe(steps=1, generated=1)),
    }
    with pytest.raises(WeightsError, match=name):
        train[kind]()
    check(files)
    assert len(contents(tmp_path)) == 1


@pytest.mark.slow
def test_a_training_leaves_what_lies_beside_it(tmp_path):
    from daskcell.training import EncoderRecipe, train_encoder

    files = write(tmp_path, ".mine.0123abcd.tmp", ".mine.tmp", "notes.txt")
    crops = np.random.default_rng(0).integers(0, 255, (16, 3, 64, 64)).astype(np.uint8)
    for steps in (1, 2):
        train_encoder(crops, tmp_path, EncoderRecipe(steps=steps, batch=8), report=lambda line: None)
    check(files)


COMMANDS = {
    "convert": (["convert", "IN", "OUT/x.zarr"], "x.zarr/notes.txt"),
    "segment": (["segment", "IN", "-o", "OUT/x.zarr", "--method", "watershed"], "x.zarr/notes.txt"),
    "flat": (["flat", "IN", "-o", "OUT/flat.tif"], "flat.tif"),
    "channels": (["channels", "IN", "--split", "OUT"], "a_grey.tif"),
    "crops": (["export", "crops", "STUDY", "-o", "OUT"], ".mine.tmp"),
    "png": (["export", "crops", "STUDY", "-o", "OUT", "--format", "png"], "cluster-0/a-1.png"),
    "report": (["report", "STUDY", "-o", "OUT/page.html"], "page.html"),
    "demo": (["demo", "-o", "OUT", "--fields", "1", "--size", "256"], "pictures/setA_red.tif"),
    "run": (["run", "IN", "-o", "OUT"], "inputs/mine.tif"),
    "assign": (["assign", "IN", "--model", "STUDY", "-o", "OUT"], "inputs/mine.tif"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_replaces_no_file_of_other_people(finished, tmp_path, command):
    words, name = COMMANDS[command]
    if command == "channels":
        reader = dc.open_image(finished / "in" / "a.tif")
        name = f"a_{reader.channels[0]}.tif"
    files = write(tmp_path, name)
    places = {"IN": str(finished / "in" / "a.tif"), "STUDY": str(finished / "study"), "OUT": str(tmp_path)}
    words = [places.get(word, word.replace("OUT/", f"{tmp_path}/")) for word in words]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, DaskcellError), done.output
    assert Path(name).parts[0] in str(done.exception) or str(tmp_path) in str(done.exception)
    check(files)
    assert len(contents(tmp_path)) == 1


@pytest.mark.slow
def test_what_lies_beside_an_output_stays(finished, tmp_path):
    names = [".x.zarr.partial/notes", ".x.zarr.old/notes", ".x.zarr-mine/notes", ".page.html.0123abcd.tmp"]
    files = write(tmp_path, *names, "a_mine.tif")
    source, out = str(finished / "in" / "a.tif"), str(tmp_path)
    for words in (
        ["convert", source, f"{out}/x.zarr"],
        ["channels", source, "--split", out],
        ["report", str(finished / "study"), "-o", f"{out}/page.html"],
        ["report", str(finished / "study"), "-o", f"{out}/page.html"],  # a page of ours is replaced
    ):
        assert CliRunner().invoke(app, words).exit_code == 0
        check(files)


def test_a_model_is_saved_over_a_model_only(finished, tmp_path):
    model = dc.load_clusters(finished / "study" / "clusters")
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")
    files = write(tmp_path, "model/notes.txt", "file", "folder/notes.txt")
    for name in ("model", "file", "folder"):
        with pytest.raises(InputError, match="would be lost"):
            model.save(tmp_path / name)
    check(files)
