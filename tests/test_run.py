"""Whole runs through the real rooms, on small pictures: good ones, bad ones, and ones without cells."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

from daskcell.compute import Workers
from daskcell.evaluation.generated import CHANNELS, synthesize_field
from daskcell.geometry import Box
from daskcell.images import image_info, read_labels
from daskcell.pipeline import run

SETTINGS = {
    "segment": {"method": "watershed"},
    "cluster": {"k": 3},
    "compute": {"kind": "inline", "block": 256},
    "output": {"preprocessed": True, "channels": True},
}


def spots(seed: int, side: int = 160) -> np.ndarray:
    """Round cells on a grid, of two sizes."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    picture = generator.normal(10, 2, (side, side))
    for i, cy in enumerate(range(25, side - 20, 40)):
        for j, cx in enumerate(range(25, side - 20, 40)):
            picture[(y - cy) ** 2 + (x - cx) ** 2 < (8 + 5 * ((i + j) % 2)) ** 2] += 120
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A collection in which nearly everything that can be wrong is wrong."""
    folder = tmp_path_factory.mktemp("collection")
    for name in ("good1", "good2"):
        tifffile.imwrite(folder / f"{name}.tif", spots(len(name)))
    tifffile.imwrite(folder / "blank.tif", np.full((160, 160), 9, np.uint8))
    holes = spots(3).astype(np.float32)
    holes[5:9, 7] = np.nan
    tifffile.imwrite(folder / "holes.tif", holes)
    (folder / "empty.tif").write_bytes(b"")
    (folder / "text.tif").write_text("a shopping list")
    whole = folder / "cut.tif"
    tifffile.imwrite(whole, spots(4), compression="zlib")
    whole.write_bytes(whole.read_bytes()[:700])
    return run(folder, tmp_path_factory.mktemp("out") / "study", SETTINGS)


def test_bad_pictures_are_set_aside_with_one_sentence_each(study):
    failures = {failure["slide"]: failure for failure in study.failures}
    assert set(failures) == {"cut", "empty", "holes", "text"}
    for name, failure in failures.items():
        assert failure["stage"] == "convert"
        assert "trace" not in failure, failure["trace"]
        assert name in failure["error"]
        assert "\n" not in failure["error"]
    assert "NaN" in failures["holes"]["error"]


def test_nothing_of_a_bad_picture_looks_whole(study):
    for name in ("cut", "empty", "holes", "text"):
        assert not study.paths.image(name).exists()
        assert not study.paths.table(name).exists()
        assert not study.paths.features(name).exists()
        assert not list(study.paths.overlays.glob(f"{name}.*"))


def test_good_pictures_have_cells_clusters_and_overlays(study):
    for name in ("good1", "good2"):
        cells = study.cells(name)
        assert len(cells) == 9
        assert set(cells["cluster"]) <= {0, 1, 2}
        box = Box(0, 0, 160, 160)
        labels = read_labels(study.paths.image(name), "cells", box)
        clusters = read_labels(study.paths.image(name), "clusters", box)
        for label, cluster in zip(cells["label"], cells["cluster"], strict=True):
            assert set(clusters[labels == label]) == {cluster + 1}
        assert image_info(study.paths.image(name)).labels == ("cells", "clusters")
        assert tifffile.imread(study.paths.overlays / f"{name}.tif").shape == (160, 160, 3)
        assert (study.paths.overlays / f"{name}.png").exists()
        features = zarr.open_array(study.paths.features(name), mode="r")
        assert features.shape[0] == 9


def test_a_picture_without_cells_is_a_result(study):
    assert study.record.ledger("blank").entry("segment")["result"]["cells"] == 0
    assert len(study.cells("blank")) == 0
    assert "cluster" in study.cells("blank")
    assert zarr.open_array(study.paths.features("blank"), mode="r").shape[0] == 0
    assert tifffile.imread(study.paths.overlays / "blank.tif").shape == (160, 160, 3)
    assert read_labels(study.paths.image("blank"), "clusters", Box(0, 0, 160, 160)).max() == 0


def test_preprocessed_pictures_and_channels_are_written_when_asked(study):
    assert tifffile.imread(study.paths.preprocessed / "good1.tif").shape[:2] == (160, 160)
    parts = list((study.paths.channels / "good1").iterdir())
    assert len(parts) == 1
    np.testing.assert_array_equal(tifffile.imread(parts[0]), spots(5))


def test_all_tables_together_name_their_slides(study):
    cells = study.cells()
    assert isinstance(cells, pd.DataFrame)
    assert cells["slide"].value_counts().to_dict() == {"good1": 9, "good2": 9}


def test_nothing_temporary_is_left(study):
    left = [path for path in study.out.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    left += [path for path in study.out.rglob(".*") if path.name != ".clusters.json"]
    assert left == []
    assert not (study.out / "scratch").exists()
    assert not (study.out / ".lock").exists()


def test_no_file_is_a_pickle(study):
    for path in study.out.rglob("*"):
        if path.is_file():
            assert not path.suffix.startswith((".pkl", ".pickle", ".joblib"))
            assert path.read_bytes()[:2] not in (b"\x80\x04", b"\x80\x05"), path


def test_what_the_study_says_of_itself_can_be_read(study):
    record = json.loads((study.out / "study.json").read_text())
    assert record["config"]["segment"]["method"] == "watershed"
    assert record["versions"]["daskcell"]
    assert record["slides"] == sorted(record["slides"])
    plan = study.record.ledger("good1").entry("fit")["result"]["plan"]
    assert plan["shape"] == [160, 160]


@pytest.mark.slow
def test_channels_of_different_sizes_are_set_aside(tmp_path):
    (tmp_path / "in").mkdir()
    for name, side in (("a_red", 160), ("a_green", 160), ("b_red", 160), ("b_green", 150)):
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", spots(1, side))
    study = run(tmp_path / "in", tmp_path / "out", SETTINGS)
    assert [(f["slide"], f["stage"]) for f in study.failures] == [("b", "convert")]
    assert "differ in size" in study.failures[0]["error"]
    assert len(study.cells("a")) == 9


@pytest.mark.slow
def test_the_block_size_changes_no_cell_and_no_cluster(tmp_path):
    (tmp_path / "in").mkdir()
    field = synthesize_field((600, 620), seed=3)
    for channel, pixels in zip(CHANNELS, field.channels, strict=True):
        tifffile.imwrite(tmp_path / "in" / f"x_{channel}.tif", pixels)
    tables, labels = [], []
    for block in (256, 1024):
        settings = SETTINGS | {"compute": {"kind": "inline", "block": block}}
        study = run(tmp_path / "in", tmp_path / f"out{block}", settings)
        assert study.failures == []
        tables.append(study.cells("x"))
        labels.append(read_labels(study.paths.image("x"), "cells", Box(0, 0, 600, 620)))
    np.testing.assert_array_equal(labels[0], labels[1])
    pd.testing.assert_frame_equal(tables[0], tables[1])


@pytest.mark.slow
@pytest.mark.cluster
def test_network_work_goes_to_labelled_workers_and_the_result_is_the_same(tmp_path, monkeypatch):
    """One worker labelled GPU, two CPU: a log of every task says who did what."""
    from distributed import Client, Nanny, Scheduler, SpecCluster

    (tmp_path / "in").mkdir()
    field = synthesize_field((600, 300), seed=3)
    for channel, pixels in zip(CHANNELS, field.channels, strict=True):
        tifffile.imwrite(tmp_path / "in" / f"x_{channel}.tif", pixels)
    settings = {"cluster": {"k": 3}, "compute": {"kind": "inline", "block": 256}}
    plain = run(tmp_path / "in", tmp_path / "plain", settings)

    options = {"host": "127.0.0.1", "nthreads": 1, "dashboard": False, "env": {"OMP_NUM_THREADS": "1"}}
    workers = {
        "gpu": {"cls": Nanny, "options": options | {"resources": {"GPU": 1}}},
        "cpu0": {"cls": Nanny, "options": options | {"resources": {"CPU": 1}}},
        "cpu1": {"cls": Nanny, "options": options | {"resources": {"CPU": 1}}},
    }
    quiet = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with (
        SpecCluster(workers=workers, scheduler={"cls": Scheduler, "options": quiet}) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(3)
        assert Workers(client).labels == {"GPU", "CPU"}
        labelled = run(tmp_path / "in", tmp_path / "labelled", settings, client)
        info = client.scheduler_info(n_workers=-1)["workers"]
        gpu = {address for address, worker in info.items() if "GPU" in worker["resources"]}
        story = client.run(lambda dask_worker: sorted(k.rsplit("-", 2)[0] for k in done_by(dask_worker)))
    network, other = set(), set()
    for address, names in story.items():
        (network if address in gpu else other).update(names)
    assert labelled.failures == []
    assert "run_tiles" in network
    assert "run_tiles" not in other
    assert {"label_block", "paint_block"} <= other
    assert not {"label_block", "paint_block", "_convert_shard"} & network
    pd.testing.assert_frame_equal(plain.cells("x"), labelled.cells("x"))


def done_by(worker) -> list[str]:
    """Keys of the tasks a worker has finished, from its log of transitions."""
    return [str(key) for key, _, finish, *_ in worker.state.log if finish == "memory"]


@pytest.mark.data
@pytest.mark.slow
def test_real_pictures_in_one_file_per_channel(data_dir, tmp_path):
    study = run(data_dir / "channels" / "bbbc022", tmp_path / "out", {"compute": {"kind": "inline"}})
    assert study.failures == []
    assert len(study.slides) == 1
    assert 15 <= len(study.cells()) <= 60
    assert os.listdir(study.paths.overlays)
    assert isinstance(study.out, Path)
