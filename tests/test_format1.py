"""A study that was written in format 1: it can be read, and the next run brings it up to date.

``study_format1.zip`` holds inputs and study as the last version before format 2 left them: two tiny drawn
images, segmented by watershed, clustered, without overlays.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL as SETTINGS

import daskcell as dc
from daskcell.pipeline import upgrade
from daskcell.pipeline.edit_clusters import edit_clusters
from daskcell.pipeline.stages import STAGES
from daskcell.pipeline.status import damages, report
from daskcell.study import CLUSTERS, Study
from daskcell.study.format1 import NAMES
from daskcell.study.results import Clustered

CLUSTER_COLUMNS = ["cluster", "cluster_name", "distance"]


@pytest.fixture
def old(tmp_path):
    """Folder of the inputs and of the study."""
    with zipfile.ZipFile(Path(__file__).with_name("study_format1.zip")) as file:
        file.extractall(tmp_path)
    for path in (tmp_path / "study" / "study.json", *(tmp_path / "study" / "ledger").iterdir()):
        path.write_text(path.read_text().replace('"/data/', f'"{tmp_path}/'))
    return tmp_path


@pytest.fixture
def ran(monkeypatch):
    """Slides and stages that are worked on, where no stage has changed its results since format 1."""
    found: list[tuple[str, str]] = []
    versions = {NAMES.get(name, name): version for name, version in upgrade._VERSIONS.items()}
    for name, stage in STAGES.items():

        def noting(context, stage=stage):
            found.append((context.slide or "*", stage.name))
            return stage.run(context)

        version = versions.get(name, stage.version)
        monkeypatch.setitem(STAGES, name, replace(stage, run=noting, version=version))
    return found


@pytest.fixture
def fresh(small_study):
    """The same study as it is made today."""
    return Study(small_study)


def digests(out, *folders):
    files = [path for folder in folders for path in sorted((out / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_can_be_read_and_is_left_alone(old, fresh):
    before = digests(old, "study")
    study = dc.open_study(old / "study")
    pd.testing.assert_frame_equal(study.cells(), fresh.cells())
    found = report(study)
    assert all(set(row["stages"].values()) == {"done"} for row in found["slides"])
    assert found["totals"] == report(fresh)["totals"]
    assert study.record.ledger(CLUSTERS).read(Clustered).k == 2
    assert study.prepared("one").plan == fresh.prepared("one").plan
    assert dc.export_crops(study, old / "crops") == len(study.cells())
    assert damages(study.out) == set()
    assert digests(old, "study") == before


def test_the_next_run_brings_it_up_to_date_and_does_nothing_again(old, fresh, ran):
    study = dc.run(old / "in", old / "study", SETTINGS)
    assert study.failures == []
    assert ran == []
    assert study.record["format"] == 2
    for name in (*study.slides, CLUSTERS):
        assert json.loads(study.record.ledger(name).path.read_text())["format"] == 2
    assert damages(study.out) == set()
    pd.testing.assert_frame_equal(study.cells(), fresh.cells())
    folders = ("tables/cells", "tables/clusters", "features", "images")
    assert digests(study.out, *folders) == digests(fresh.out, *folders)
    assert dc.run(old / "in", old / "study", SETTINGS).failures == []
    assert ran == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"cluster": {"k": 3, "components": 4}}, {"cluster", "assign", "paint"}),
        ({"features": {"margin": 0.4}}, {"describe", "cluster", "assign", "paint"}),
    ],
)
def test_other_settings_redo_what_depends_on_them_only(old, ran, change, redone):
    settings = SETTINGS | change
    study = dc.run(old / "in", old / "study", settings)
    assert study.failures == []
    assert {stage for _, stage in ran} == redone
    again = dc.run(old / "in", old / "again", settings)
    pd.testing.assert_frame_equal(study.cells(), again.cells())
    assert not set(CLUSTER_COLUMNS) & set(pd.read_parquet(study.paths.table("one")).columns)


def test_a_changed_input_is_found(old, ran):
    import tifffile

    pixels = tifffile.imread(old / "in" / "two.tif")
    tifffile.imwrite(old / "in" / "two.tif", np.ascontiguousarray(pixels[::-1]))
    assert dc.run(old / "in", old / "study", SETTINGS).failures == []
    assert {stage for slide, stage in ran if slide == "one"} <= {"assign", "paint"}
    assert {stage for slide, stage in ran if slide == "two"} >= {"convert", "segment", "describe"}


@pytest.mark.slow
@pytest.mark.parametrize("saved", [0, 1, 2])
def test_a_run_that_is_killed_while_it_does_so_loses_nothing(old, ran, monkeypatch, saved):
    save, count = upgrade._save, []

    def killed(ledger):
        if len(count) == saved:
            raise KeyboardInterrupt
        count.append(1)
        save(ledger)

    monkeypatch.setattr(upgrade, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        dc.run(old / "in", old / "study", SETTINGS)
    monkeypatch.setattr(upgrade, "_save", save)
    assert dc.run(old / "in", old / "study", SETTINGS).failures == []
    # The one whose table was split, and whose ledger was not written, is described again.
    assert {slide for slide, stage in ran if stage in ("convert", "fit", "segment")} == set()


@pytest.mark.slow
def test_a_version_that_gives_other_results_redoes_what_it_made(old, ran, monkeypatch):
    monkeypatch.setitem(STAGES, "segment", replace(STAGES["segment"], version=99))
    assert dc.run(old / "in", old / "study", SETTINGS).failures == []
    assert {stage for slide, stage in ran if slide == "one"} == {"segment", "describe", "assign", "paint"}


@pytest.mark.slow
def test_what_changed_its_results_since_is_done_again(old, fresh):
    study = dc.run(old / "in", old / "study", SETTINGS)
    assert study.failures == []
    pd.testing.assert_frame_equal(study.cells(), fresh.cells())
    folders = ("tables", "features", "images")
    assert digests(study.out, *folders) == digests(fresh.out, *folders)


def test_a_damaged_table_is_made_again(old, ran):
    table = Study(old / "study").paths.table("two")
    table.write_bytes(table.read_bytes()[:-7])
    study = dc.run(old / "in", old / "study", SETTINGS)
    assert study.failures == []
    assert ("two", "describe") in ran
    assert ("one", "describe") not in ran
    assert study.cells("two")["cluster"].notna().all()


def test_clusters_get_names(old):
    edit_clusters(old / "study", lambda naming, k: naming.rename(0, "round", k))
    study = Study(old / "study")
    assert study.record["format"] == 2
    assert "round" in set(study.cells()["cluster_name"])
