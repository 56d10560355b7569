"""Clusters that outlive their study: new slides get the old clusters, and names are shown everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

import daskcell as dc
from daskcell.clustering import load_clusters
from daskcell.errors import ConfigError, DriftWarning, InputError, StudyError
from daskcell.evaluation import read_truth, score_study
from daskcell.geometry import Box
from daskcell.images import read_labels
from daskcell.pipeline import api
from daskcell.pipeline.edit_clusters import cluster_rows, edit_clusters
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.status import drift, drift_sentences, report, table
from daskcell.storage.lock import Lock
from daskcell.study import CLUSTERS, Study

SETTINGS = {
    "preprocess": {"histogram": None},
    "segment": {"method": "watershed"},
    "cluster": {"k": 3, "components": None},
    "compute": {"kind": "inline", "block": 256, "device": "cpu"},
}
WHERE = {"compute": SETTINGS["compute"]}


def spots(seed: int, side: int = 200, bright: float = 120) -> np.ndarray:
    """Round cells on a grid, of two sizes."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    picture = generator.normal(10, 2, (side, side))
    for i, cy in enumerate(range(25, side - 20, 40)):
        for j, cx in enumerate(range(25, side - 20, 40)):
            radius = 8 + 5 * ((i + j) % 2) + generator.uniform(-1, 1)
            picture[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] += bright * generator.uniform(0.8, 1.2)
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of a first month, and of the next: alike, and unlike."""
    folder = tmp_path_factory.mktemp("pictures")
    for month, names in {"old": "abc", "new": "de"}.items():
        (folder / month).mkdir()
        for name in names:
            tifffile.imwrite(folder / month / f"{name}.tif", spots(ord(name)))
    (folder / "odd").mkdir()
    y, x = np.mgrid[:200, :200]
    thin = np.random.default_rng(0).normal(10, 2, (200, 200))
    for cy, cx in ((i, j) for i in range(25, 180, 40) for j in range(25, 180, 40)):
        thin[np.hypot(y - cy, (x - cx) / 0.45) < 15] += 120
    tifffile.imwrite(folder / "odd" / "thin.tif", thin.clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def fitted(folder, tmp_path_factory):
    return api.run(folder / "old", tmp_path_factory.mktemp("fitted") / "study", SETTINGS)


@pytest.fixture
def study(fitted, tmp_path):
    """A study of one's own to change."""
    shutil.copytree(fitted.out, tmp_path / "study")
    return Study(tmp_path / "study")


def no_warning(*arguments, **options):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        return dc.assign(*arguments, **options)


def clusters_of(study, slide: str) -> np.ndarray:
    return study.cells(slide)["cluster"].to_numpy()


# -- assign ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cells_that_were_fitted_get_their_clusters_again(fitted, folder, tmp_path):
    again = no_warning(folder / "old", tmp_path / "again", model=fitted.out, config=WHERE)
    for slide in fitted.slides:
        pd.testing.assert_frame_equal(again.cells(slide), fitted.cells(slide))
    assert again.record.ledger(CLUSTERS).entry("cluster")["result"]["given"] is True
    for name in ("arrays.npz", "model.json"):
        assert (again.paths.clusters / name).read_bytes() == (fitted.paths.clusters / name).read_bytes()


@pytest.mark.slow
def test_new_slides_are_made_as_the_models_and_only_once(fitted, folder, tmp_path, monkeypatch):
    study = no_warning(folder / "new", tmp_path / "new", model=fitted.paths.clusters, config=WHERE)
    assert study.failures == []
    assert study.config.segment.method == "watershed"
    assert study.config.preprocess.histogram is None
    model = load_clusters(fitted.paths.clusters)
    for slide in ("d", "e"):
        features = zarr.open_array(study.paths.features(slide), mode="r")[:]
        np.testing.assert_array_equal(clusters_of(study, slide), model.predict(features))
        assert (study.paths.overlays / f"{slide}.png").exists()
    monkeypatch.setattr(api.Run, "process", lambda self, jobs, pool: jobs and pytest.fail("works again"))
    no_warning(folder / "new", tmp_path / "new", model=fitted.out, config=WHERE)
    rows = report(study)["slides"]
    assert all(state == "done" for row in rows for state in row["stages"].values())


@pytest.mark.slow
def test_an_assigned_study_is_a_model_too(fitted, folder, tmp_path):
    first = no_warning(folder / "new", tmp_path / "first", model=fitted.out, config=WHERE)
    shutil.copytree(first.paths.clusters, tmp_path / "saved")
    second = no_warning(folder / "new", tmp_path / "second", model=tmp_path / "saved", config=WHERE)
    pd.testing.assert_frame_equal(first.cells(), second.cells())


@pytest.mark.slow
def test_another_model_gives_new_clusters_and_keeps_the_features(fitted, folder, tmp_path):
    out = tmp_path / "out"
    no_warning(folder / "new", out, model=fitted.out, config=WHERE)
    made = [path for name in ("features", "tables/cells") for path in (out / name).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in made if path.is_file()}
    model = load_clusters(fitted.paths.clusters)
    for name in ("centers_", "reduced_centers_", "counts_", "spread_"):
        setattr(model, name, getattr(model, name)[::-1].copy())
    model.save(tmp_path / "turned")
    old = {slide: clusters_of(Study(out), slide) for slide in "de"}
    study = no_warning(folder / "new", out, model=tmp_path / "turned", config=WHERE)
    for slide in "de":
        np.testing.assert_array_equal(clusters_of(study, slide), 2 - old[slide])
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"features": {"encoder": "resnet152"}},
            "features.encoder cannot be 'resnet152'.*fitted with 'tiny'",
        ),
        ({"segment": {"watershed": {"opening": 5}}}, "segment.watershed.opening cannot be 5.*fitted with 2"),
        ({"preprocess": {"histogram": {}}}, "preprocess.histogram cannot be .*fitted with None"),
        ({"cluster": {"k": 5}}, "cluster.k cannot be 5.*fitted with 3"),
    ],
)
def test_settings_that_would_change_what_features_mean_are_refused(
    fitted, folder, tmp_path, change, sentence
):
    with pytest.raises(ConfigError, match=sentence):
        dc.assign(folder / "new", tmp_path / "out", model=fitted.out, config=WHERE | change)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_settings_that_say_what_the_model_says_are_taken(fitted, folder, tmp_path):
    same = SETTINGS | {"output": {"overlays": ["png"]}, "input": {"pixel_size": 0.5}}
    study = no_warning(folder / "new", tmp_path / "out", model=fitted.out, config=same)
    assert not list(study.paths.overlays.glob("*.tif"))
    assert "area_um2" in study.cells("d")


def test_features_of_an_encoder_of_the_same_name_but_other_weights_are_refused(
    fitted, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(api, "fingerprints", lambda config: {"describe": "f" * 40})
    with pytest.raises(InputError, match=r"encoder tiny \(hash [0-9a-f]{12}\), but here is tiny \(f{12}\)"):
        dc.assign(folder / "new", tmp_path / "out", model=fitted.out, config=WHERE)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_without_settings_takes_those_that_are_given(fitted, folder, tmp_path):
    features = np.concatenate([zarr.open_array(fitted.paths.features(s), mode="r")[:] for s in fitted.slides])
    dc.fit_clusters(features, 3).save(tmp_path / "plain")
    study = dc.assign(folder / "new", tmp_path / "out", model=tmp_path / "plain", config=SETTINGS)
    assert study.failures == []
    assert set(clusters_of(study, "d")) <= {0, 1, 2}
    dc.fit_clusters(features[:, :5], 3).save(tmp_path / "narrow")
    study = dc.assign(folder / "new", tmp_path / "narrow out", model=tmp_path / "narrow", config=SETTINGS)
    assert "5 features per cell" in study.failures[0]["error"]


def test_what_is_no_model_is_refused_before_work(folder, tmp_path):
    with pytest.raises(InputError, match="neither a study with clusters nor a saved model"):
        dc.assign(folder / "new", tmp_path / "out", model=tmp_path)


@pytest.mark.slow
def test_run_and_assign_do_not_take_each_others_studies(fitted, folder, tmp_path):
    no_warning(folder / "new", tmp_path / "out", model=fitted.out, config=WHERE)
    with pytest.raises(StudyError, match="continue it with 'assign'"):
        api.run(folder / "new", tmp_path / "out", SETTINGS)
    with pytest.raises(StudyError, match="continue it with 'run'"):
        dc.assign(folder / "old", fitted.out, model=fitted.out, config=WHERE)


@pytest.mark.slow
def test_cells_unlike_the_models_are_told_with_numbers(fitted, folder, tmp_path):
    with pytest.warns(DriftWarning, match=r"thin: \d+ % of [\d,]+ cells lie farther .* most in cluster \d"):
        study = dc.assign(folder / "odd", tmp_path / "odd", model=fitted.out, config=WHERE)
    values = drift(study)["thin"]
    assert values["far"] > 0.5
    assert len(values["far_by_cluster"]) == 3
    found = report(study)
    assert found["model"] == str(fitted.paths.clusters)
    assert found["drift"]["thin"] == values
    assert "thin: " in table(found)
    like = no_warning(folder / "new", tmp_path / "new", model=fitted.out, config=WHERE)
    assert drift_sentences(like) == []
    assert all(values["far"] < 0.2 for values in drift(like).values())


@pytest.mark.slow
def test_a_model_of_another_version_of_the_code_is_told(study, folder, tmp_path):
    path = study.paths.clusters / "model.json"
    values = json.loads(path.read_text())
    values["origin"]["stages"]["describe"] -= 1
    path.write_text(json.dumps(values))
    with pytest.warns(DriftWarning, match="whose stage describe gave other results"):
        dc.assign(folder / "new", tmp_path / "out", model=study.out, config=WHERE)


def contents(study: Study) -> dict[str, bytes]:
    """Every file but those that hold times."""
    files = [path for path in study.out.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(study.out)): path.read_bytes()
        for path in files
        if "ledger" not in path.parts and path.name != "study.json"
    }


@pytest.mark.slow
def test_an_assignment_killed_again_and_again_ends_with_the_same_bytes(fitted, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "de":
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", spots(ord(name), side=420))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "daskcell", "assign", str(tmp_path / "in"), "--model", str(fitted.out)]
    command += ["-o", str(out), "--compute", "inline", "--set", "compute.block=256"]
    killed = []
    for slide, stage in (("d", "segment"), ("e", "describe"), ("e", "paint")):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not begun(out, slide, stage):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed.append((slide, stage))
        process.wait(60)
    assert len(killed) >= 2  # a stage may be over before we look
    no_warning(tmp_path / "in", out, model=fitted.out, config=WHERE)
    whole = no_warning(tmp_path / "in", tmp_path / "whole", model=fitted.out, config=WHERE)
    assert contents(Study(out)) == contents(whole)


def begun(out, slide: str, stage: str) -> bool:
    """Whether a stage is being worked on, now."""
    try:
        return json.loads((out / "ledger" / f"{slide}.json").read_text())["began"] == stage
    except FileNotFoundError:
        return False


# -- names and merges -----------------------------------------------------------------------------------


def rename(study, cluster, name):
    edit_clusters(study.out, lambda naming, k: naming.rename(cluster, name, k))


def merge(study, *clusters, name=None):
    edit_clusters(study.out, lambda naming, k: naming.merge(clusters, k, name))


def split(study, cluster):
    edit_clusters(study.out, lambda naming, k: naming.split(cluster, k))


def properties(study, slide: str) -> dict[int, str]:
    cluster = zarr.open_group(study.paths.image(slide) / "labels" / "clusters", mode="r")
    found = cluster.attrs["ome"]["image-label"]
    assert [c["label-value"] for c in found["colors"]] == [p["label-value"] for p in found["properties"]]
    return {p["label-value"]: p["name"] for p in found["properties"]}


@pytest.mark.slow
def test_names_and_merges_go_into_model_tables_labels_and_pictures(study):
    before = contents(study)
    base = {slide: clusters_of(study, slide) for slide in study.slides}
    rename(study, 1, "large")
    merge(study, 2, "large", name="big ones")
    for slide in study.slides:
        cells = study.cells(slide)
        np.testing.assert_array_equal(cells["cluster"], np.where(base[slide] == 2, 1, base[slide]))
        assert set(cells.loc[cells["cluster"] == 1, "cluster_name"]) == {"big ones"}
        assert set(cells.loc[cells["cluster"] == 0, "cluster_name"]) <= {"cluster 0"}
        assert properties(study, slide) == {1: "cluster 0", 2: "big ones"}
        labels = read_labels(study.paths.image(slide), "cells", Box(0, 0, 200, 200))
        shown = read_labels(study.paths.image(slide), "clusters", Box(0, 0, 200, 200))
        np.testing.assert_array_equal(shown, np.append(0, cells["cluster"].to_numpy() + 1)[labels])
    after = contents(study)
    assert "clusters/names.json" in after
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"images", "overlays", "report.html", "tables"}
    assert after["clusters/arrays.npz"] == before["clusters/arrays.npz"]
    assert after["overlays/a.png"] != before["overlays/a.png"]
    assert [row["parts"] for row in cluster_rows(study.out)] == [[0], [1, 2]]
    model = load_clusters(study.paths.clusters)
    assert 2 not in model.predict(model.centers_)


@pytest.mark.slow
def test_what_was_named_and_merged_can_be_taken_back_to_the_byte(study):
    before = contents(study)
    merge(study, 0, 2)
    rename(study, 1, "small")
    once = contents(study)
    merge(study, 0, 2)
    rename(study, 1, "small")
    rename(study, "small", "small")
    assert contents(study) == once
    split(study, 2)
    rename(study, "small", "")
    assert contents(study) == before


@pytest.mark.slow
def test_a_later_run_keeps_names_and_makes_nothing_again(study, folder, monkeypatch):
    rename(study, 0, "round")
    monkeypatch.setattr(api.Run, "process", lambda self, jobs, pool: jobs and pytest.fail("works again"))
    api.run(folder / "old", study.out, SETTINGS)
    assert load_clusters(study.paths.clusters).naming.names == {0: "round"}
    assert all(state == "done" for row in report(study)["slides"] for state in row["stages"].values())


def test_a_change_that_was_killed_is_finished_by_the_next_run(study, folder, monkeypatch):
    monkeypatch.setattr(
        "daskcell.pipeline.edit_clusters.update_slides",
        lambda *args: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        rename(study, 0, "round")
    assert {row["stages"]["assign"] for row in report(study)["slides"]} == {"old"}
    api.run(folder / "old", study.out, SETTINGS)
    assert "round" in set(study.cells()["cluster_name"])


def test_names_are_given_without_the_input_files(study, folder, monkeypatch):
    record = json.loads((study.out / "study.json").read_text())
    for path in (study.out / "ledger").glob("*.json"):
        path.write_text(path.read_text().replace(str(folder), "/gone"))
    assert record["slides"] == ["a", "b", "c"]
    rename(study, 0, "round")
    assert study.failures == []
    assert "round" in set(study.cells()["cluster_name"])


@pytest.mark.slow
def test_a_folder_that_has_the_name_of_earlier_clusters_stays(study, folder):
    mine = study.out / "clusters-before" / "names.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    rename(study, 0, "round")
    study = api.run(folder / "old", study.out, SETTINGS | {"cluster": {"k": 2}})
    assert mine.read_text() == "mine"
    assert load_clusters(study.out / "clusters-before-2").naming.names == {0: "round"}
    assert [name for name in study.record["owned"] if "before" in name] == ["clusters-before-2"]


def files_in(study: Study) -> dict[str, bytes]:
    return {str(p.relative_to(study.out)): p.read_bytes() for p in study.out.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_rename_writes_only_what_is_in_the_list_of_the_studys_files(study):
    before = files_in(study)
    rename(study, 0, "round")
    merge(study, 1, 2)
    written = [name for name, data in files_in(study).items() if before.get(name) != data]
    owned = [name.replace("*", slide) for name in Study(study.out).record["owned"] for slide in study.slides]
    assert written
    for name in written:
        assert any(name == one or name.startswith(f"{one}/") for one in owned), name


@pytest.mark.parametrize("name", ["images/b.zarr/labels/clusters/notes.txt", "clusters/notes.txt"])
def test_a_rename_loses_no_file_of_a_users(study, name):
    (study.out / name).write_text("mine")
    with contextlib.suppress(dc.DaskcellError):
        rename(study, 0, "round")
    assert (study.out / name).read_text() == "mine"


def test_what_has_the_name_of_a_file_that_is_not_in_the_list_refuses_a_rename(study):
    """As in a study of an earlier version, which wrote fewer files."""
    owned = [name for name in study.record["owned"] if not name.startswith("tables/clusters")]
    study.record.update(owned=owned)
    before = files_in(study)
    with pytest.raises(dc.DaskcellError, match="not written by daskcell"):
        rename(study, 0, "round")
    assert files_in(study) == before


@pytest.mark.slow
def test_a_new_fit_sets_the_named_clusters_aside(study, folder):
    class Heard(Progress):
        said = ""

        def say(self, text):
            self.said += text

    rename(study, 0, "round")
    heard = Heard()
    study = api.run(folder / "old", study.out, SETTINGS | {"cluster": {"k": 2}}, progress=heard)
    assert "clusters-before" in heard.said
    assert not load_clusters(study.paths.clusters).naming
    assert load_clusters(study.out / "clusters-before").naming.names == {0: "round"}
    assert "clusters-before" in study.record["owned"]
    assert set(study.cells()["cluster_name"]) <= {"cluster 0", "cluster 1"}


@pytest.mark.slow
def test_new_slides_get_the_names_and_merges(study, folder, tmp_path):
    rename(study, 1, "large")
    merge(study, 0, 2, name="rest")
    new = no_warning(folder / "new", tmp_path / "new", model=study.out, config=WHERE)
    assert set(new.cells()["cluster_name"]) == {"large", "rest"}
    assert properties(new, "d") == {1: "rest", 2: "large"}
    rename(study, "large", "giant")
    no_warning(folder / "new", tmp_path / "new", model=study.out, config=WHERE)
    assert set(new.cells()["cluster_name"]) == {"giant", "rest"}


def test_names_are_refused_while_a_run_works(study):
    with Lock(study.out), pytest.raises(StudyError, match="Another run works"):
        rename(study, 0, "round")
    assert not (study.paths.clusters / "names.json").exists()


def test_a_saved_model_can_be_named_too(fitted, tmp_path):
    load_clusters(fitted.paths.clusters).save(tmp_path / "model")
    edit_clusters(tmp_path / "model", lambda naming, k: naming.merge([0, 1], k, "both"))
    assert load_clusters(tmp_path / "model").naming.titles(3) == ["both", None, "cluster 2"]


# -- truth ----------------------------------------------------------------------------------------------


@pytest.fixture
def truth(study, tmp_path):
    """The clusters themselves as types, by label and by a point inside each cell; one cell is not found."""
    cells = study.cells()
    named = cells.assign(type=np.array(["x", "y", "z"])[cells["cluster"]])
    named[["slide", "label", "type"]].to_csv(tmp_path / "labels.csv", index=False)
    points = named.rename(columns={"centroid-0": "Y", "centroid-1": "X", "slide": "file", "type": "Class"})
    points["file"] += ".tif"
    points = points[["file", "Y", "X", "Class"]]
    points.loc[len(points)] = ["a.tif", 1.0, 1.0, "y"]  # glass
    points.loc[len(points)] = [*points.iloc[0, :1], *points.iloc[0, 1:3] + 2, "z"]  # a second one in a cell
    points.to_csv(tmp_path / "points.csv", index=False)
    return tmp_path


def test_clusters_are_compared_with_known_types(study, truth):
    n = len(study.cells())
    by_label = score_study(study, truth / "labels.csv")
    assert (by_label["ari"], by_label["matched"], by_label["cells"]) == (1.0, n, n)
    assert by_label["nmi"] == pytest.approx(1)
    by_point = score_study(study, truth / "points.csv")
    assert (by_point["ari"], by_point["matched"], by_point["cells"]) == (1.0, n, n + 2)
    assert by_point["types"] == ["x", "y", "z"]
    assert by_point["groups"] == ["cluster 0", "cluster 1", "cluster 2"]
    counts = np.bincount(study.cells()["cluster"])
    np.testing.assert_array_equal(by_point["contingency"], np.diag(counts))
    assert set(by_point["slides"]) == {"a", "b", "c"}
    assert study.scores == by_point
    assert "ARI 1.000" in table(report(study))


@pytest.mark.slow
def test_old_scores_are_not_shown_of_cells_that_changed(fitted, folder, tmp_path):
    """A given model is the same for any input, so its clusters alone do not say what was compared."""
    shutil.copytree(folder / "new", tmp_path / "in")
    study = no_warning(tmp_path / "in", tmp_path / "study", model=fitted.out, config=WHERE)
    cells = study.cells("d")
    known = pd.DataFrame({"slide": "d", "label": cells["label"], "type": cells["cluster"].astype(str)})
    known.to_csv(tmp_path / "labels.csv", index=False)
    assert score_study(study, tmp_path / "labels.csv")["ari"] == 1
    again = no_warning(tmp_path / "in", tmp_path / "study", model=fitted.out, config=WHERE)
    assert again.scores["ari"] == 1
    pixels = tifffile.imread(tmp_path / "in" / "d.tif")
    tifffile.imwrite(tmp_path / "in" / "d.tif", pixels[:, ::-1])
    again = no_warning(tmp_path / "in", tmp_path / "study", model=fitted.out, config=WHERE)
    assert again.scores is None


def test_merged_clusters_are_compared_as_one_and_old_scores_are_not_shown(study, truth):
    score_study(study, truth / "labels.csv")
    merge(study, 0, 1, name="both")
    assert study.scores is None
    found = score_study(study, truth / "labels.csv")
    assert found["groups"] == ["both", "cluster 2"]
    assert np.array(found["contingency"]).shape == (3, 2)
    assert 0 < found["ari"] < 1


def test_scores_equal_scikit_learn(study, tmp_path):
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    cells = study.cells()
    types = np.random.default_rng(0).choice(list("uvw"), len(cells))
    cells.assign(type=types)[["slide", "label", "type"]].to_csv(tmp_path / "t.csv", index=False)
    found = score_study(study, tmp_path / "t.csv")
    assert found["ari"] == pytest.approx(adjusted_rand_score(types, cells["cluster"]))
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(types, cells["cluster"]))
    expected = pd.crosstab(types, cells["cluster"].to_numpy()).to_numpy()
    np.testing.assert_array_equal(found["contingency"], expected)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slide,kind\na,x\n", "needs the columns slide, type"),
        ("slide,type\na,x\n", "label or y and x"),
        ("slide,type,label\na,x,\n", "Row 2 of the truth .* is not complete"),
        ("slide,type,label\na,x,1\na,,3\n", "Row 3 of"),
        ("slide,type,label\nq,x,1\n", "names no slide of the study: it has 'q'"),
        ("", "Cannot read the truth"),
    ],
)
def test_a_truth_that_cannot_be_used_is_refused_before_work(folder, tmp_path, text, sentence):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=sentence):
        api.run(folder / "old", tmp_path / "out", SETTINGS, truth=tmp_path / "t.csv")
    assert not (tmp_path / "out").exists()


def test_slides_are_named_with_or_without_their_ending(tmp_path):
    (tmp_path / "t.csv").write_text("image,class,x,y\na.tif,u,3,4\nb,v,1,2\nother.tif,v,1,2\n")
    found = read_truth(tmp_path / "t.csv", ["a", "b"])
    assert found.to_dict("records") == [
        {"slide": "a", "type": "u", "y": 4, "x": 3},
        {"slide": "b", "type": "v", "y": 2, "x": 1},
    ]


# -- the command line -----------------------------------------------------------------------------------


@pytest.fixture
def call(capsys, monkeypatch):
    from daskcell.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["daskcell", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.mark.slow
def test_clusters_are_shown_named_and_merged_from_the_command_line(call, study):
    assert call("clusters", "rename", study.out, 0, "round ones", "-q")[0] == 0
    code, out, _ = call("clusters", "merge", study.out, "round ones", 2)
    assert code == 0
    assert "round ones" in out
    assert "0 + 2" in out
    assert "0 + 2" not in call("clusters", "split", study.out, 0)[1]
    code, out, err = call("clusters", "rename", study.out, 9, "x")
    assert (code, out) == (2, "")
    assert err == "daskcell: There is no cluster '9': clusters are numbered 0 to 2, 'round ones'.\n"


@pytest.mark.slow
def test_assign_and_truth_from_the_command_line(call, study, folder, tmp_path):
    rows = ["slide,x,y,type", *(f"d,{x},{y},t{(x + y) // 40 % 2}" for x in (25, 65) for y in (25, 65))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    options = [
        "--model",
        study.out,
        "-o",
        tmp_path / "out",
        "--compute",
        "inline",
        "--set",
        "compute.block=256",
    ]
    code, out, _ = call("assign", folder / "new", *options, "--truth", tmp_path / "t.csv", "-q")
    assert code == 0
    code, out, _ = call("status", tmp_path / "out")
    assert "assigned to the model" in out
    assert "4 of 4 cells" in out
    code, out, _ = call("score", tmp_path / "out", tmp_path / "t.csv")
    assert "4 of 4 cells with a known type were found: ARI" in out
    (tmp_path / "odd").mkdir()
    options[3] = tmp_path / "odd" / "out"
    code, out, err = call("assign", folder / "odd", *options, "-q")
    assert code == 0
    assert err.startswith("daskcell: thin: ")
    code, out, err = call("assign", folder / "new", *options, "--set", "features.encoder=resnet152")
    assert code == 2
    assert "features.encoder cannot be 'resnet152'" in err
    assert os.listdir(tmp_path / "odd") == ["out"]
