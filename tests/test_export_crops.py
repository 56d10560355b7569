"""Exported pictures are those the features were made from, each with the right cell, place and cluster."""

from __future__ import annotations

import io
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

import daskcell as dc
from daskcell.cli import app
from daskcell.errors import InputError, StudyError
from daskcell.features import embed
from daskcell.geometry import Box
from daskcell.images import image_info, read_block, read_labels
from daskcell.preprocess import apply_block


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two small pictures of bright squares, segmented and clustered."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        picture = rng.poisson(10, (300, 340)).astype(np.uint8)
        for y in range(20, 280, 40):
            for x in range(20, 320, 40):
                side = int(rng.integers(10, 20))
                picture[y : y + side, x : x + side] = rng.integers(90, 240)
        tifffile.imwrite(folder / "in" / f"{name}.tif", picture)
    settings = {
        "segment": {"method": "watershed"},
        "features": {"batch_size": 16},
        "cluster": {"k": 3},
        "compute": {"kind": "inline", "block": 256},
    }
    return dc.run(folder / "in", folder / "study", settings)


def crops_of(study, name) -> np.ndarray:
    """What the network was shown of each cell, by way of the Python function on the whole picture."""
    shape = image_info(study.paths.image(name)).shape
    whole = Box(0, 0, *shape[1:])
    plan = study.prepared(name).plan
    picture = apply_block(read_block(study.paths.image(name), whole), plan, whole)
    labels = read_labels(study.paths.image(name), "cells", whole)
    shown = embed(picture, labels, lambda batch: batch.reshape(len(batch), -1), size=64, batch_size=16)
    return np.rint(shown.reshape(-1, 3, 64, 64) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_shards_hold_every_cell_once_as_the_features_saw_it(study, tmp_path, monkeypatch):
    from daskcell.export import crops

    monkeypatch.setattr(crops, "_SHARD", 10)
    count = dc.export_crops(study, tmp_path / "crops")
    shards = sorted((tmp_path / "crops").glob("*.parquet"))
    assert len(shards) > 4
    assert sorted(path.name for path in (tmp_path / "crops").iterdir()) == [path.name for path in shards]
    table = pd.concat([pd.read_parquet(path) for path in shards])
    assert count == len(table) == len(study.cells())
    for name in study.slides:
        rows = table[table["slide"] == name].sort_values("label")
        expected = study.cells(name)
        for column in ("label", "centroid-0", "centroid-1", "cluster"):
            np.testing.assert_array_equal(rows[column], expected[column])
        np.testing.assert_array_equal([pixels(data) for data in rows["image"]], crops_of(study, name))


@pytest.mark.slow
def test_folders_hold_the_cells_of_each_cluster(study, tmp_path):
    count = dc.export_crops(study.out, tmp_path / "png", format="png", slides=["b"])
    cells = pd.read_csv(tmp_path / "png" / "cells.csv")
    assert count == len(cells) == len(study.cells("b"))
    expected = crops_of(study, "b")
    for row in cells.itertuples():
        assert row.file == f"cluster-{study.cells('b')['cluster'][row.label - 1]}/b-{row.label}.png"
        np.testing.assert_array_equal(
            pixels((tmp_path / "png" / row.file).read_bytes()), expected[row.label - 1]
        )
    files = [path for path in (tmp_path / "png").rglob("*") if path.is_file()]
    assert len(files) == count + 1, "nothing else is left"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "png"])
def test_an_export_that_was_cut_off_is_continued(study, tmp_path, monkeypatch, format):
    from daskcell.export import crops

    monkeypatch.setattr(crops, "_SHARD", 10)
    tasks = []
    write = crops._write_task

    def until_killed(*args):
        if len(tasks) == killed_at:
            raise KeyboardInterrupt
        tasks.append(args)
        write(*args)

    monkeypatch.setattr(crops, "_write_task", until_killed)
    killed_at = -1
    count = dc.export_crops(study, tmp_path / "whole", format=format)
    needed = len(tasks)
    assert needed > 5
    tasks.clear()
    killed_at = 5  # in the second slide
    with pytest.raises(KeyboardInterrupt):
        dc.export_crops(study, tmp_path / "cut", format=format)
    (tmp_path / "cut" / ".daskcell-0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "cut" / ".daskcell-export-killed").mkdir()
    with pytest.raises(InputError, match="not finished"):
        dc.export_crops(study, tmp_path / "cut", format=format, size=20)
    other = study.config.model_copy(
        update={"compute": study.config.compute.model_copy(update={"block": 512})}
    )
    with monkeypatch.context() as patch:
        patch.setattr(type(study), "config", other)  # its tasks hold other cells
        with pytest.raises(InputError, match="not finished"):
            dc.export_crops(study, tmp_path / "cut", format=format)
    killed_at = -1
    assert dc.export_crops(study, tmp_path / "cut", format=format) == count
    assert len(tasks) == needed, "no task is done twice"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    with pytest.raises(InputError, match="exists already"):
        dc.export_crops(study, tmp_path / "cut", format=format)


KILLED = """
import os, signal, sys
import daskcell as dc
from daskcell.export import crops
from daskcell.study import Study
study, out, format, last = sys.argv[1:]
crops._SHARD = 10
replace, count = os.replace, 0
def killed(*args):
    global count
    count += 1
    if count == int(last):
        os.kill(os.getpid(), signal.SIGKILL)  # the file is written, and has not got its name
    replace(*args)
os.replace = killed
print(dc.export_crops(Study(study), out, format=format))
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "png"])
def test_an_export_killed_again_and_again_holds_every_cell_once(study, tmp_path, monkeypatch, format):
    from daskcell.export import crops

    monkeypatch.setattr(crops, "_SHARD", 10)
    count = dc.export_crops(study, tmp_path / "whole", format=format)
    kills, last = 0, 1
    while True:
        command = [sys.executable, "-c", KILLED, study.out, tmp_path / "out", format, last]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills, last = kills + 1, last + 1
    assert kills > 3
    assert int(done.stdout) == count
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pictures_may_have_another_size(study, tmp_path):
    dc.export_crops(study, tmp_path / "crops", size=20, slides=["a"])
    table = pd.read_parquet(next((tmp_path / "crops").glob("*.parquet")))
    assert pixels(table["image"][0]).shape == (20, 20, 3)


def test_what_cannot_be_exported_is_refused(study, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="exists already"):
        dc.export_crops(study, tmp_path / "full")
    with pytest.raises(InputError, match="no slide 'c'"):
        dc.export_crops(study, tmp_path / "out", slides=["c"])
    with pytest.raises(InputError, match="parquet"):
        dc.export_crops(study, tmp_path / "out", format="tif")
    ledger = study.record.ledger("a")
    kept = dict(ledger.stages)
    del ledger.stages["describe"]
    ledger.save()
    with pytest.raises(StudyError, match="not been described"):
        dc.export_crops(study, tmp_path / "out")
    ledger.stages = kept
    ledger.save()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_says_how_many(study, tmp_path):
    command = [sys.executable, "-m", "daskcell", "export", "crops", str(study.out), "-o", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f": {len(study.cells()):,} cells\n")


def test_the_command_refuses_a_format_it_does_not_know(study, tmp_path):
    command = ["export", "crops", str(study.out), "-o", str(tmp_path / "c"), "--format", "pgn"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, InputError)
    assert not (tmp_path / "c").exists()
