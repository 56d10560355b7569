"""The study's folder: content keys, ledger, refusals, atomic files, lock."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from daskcell.config import parse_config
from daskcell.errors import StudyError
from daskcell.pipeline import stages
from daskcell.pipeline.stages import CLUSTER, SLIDE_STAGES, STAGES, slide_keys
from daskcell.storage import atomic, lock
from daskcell.storage.lock import Lock
from daskcell.study import Study, check_folder, create_study, sweep
from daskcell.study import keys as content_keys
from daskcell.study.keys import identify, unchanged

FILES = [{"path": "/a/x.tif", "name": "x.tif", "size": 3, "mtime_ns": 5, "digest": "d1"}]
WEIGHTS = {"segment": "w1", "describe": "w2"}


def keys(changes=None, files=FILES, weights=WEIGHTS):
    config = parse_config(changes or {})
    cluster = CLUSTER.key([("x", slide_keys(config, files, weights)["describe"])], config)
    return {"cluster": cluster} | slide_keys(config, files, weights, cluster)


ALL = {*SLIDE_STAGES, "cluster"}
LATE = {"cluster", "assign", "paint"}


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({}, set()),
        ({"compute": {"workers": 7, "block": 512, "threads": 2}}, set()),
        ({"segment": {"keep_flows": True}}, set()),
        ({"segment": {"watershed": {"opening": 5}}}, set()),  # not the chosen method
        ({"input": {"z": 3}}, ALL),
        ({"preprocess": {"gaussian": {"sigma": 2.0}}}, ALL - {"convert"}),
        ({"segment": {"diameter": 20.0}}, {"segment", "describe"} | LATE),
        ({"segment": {"method": "watershed"}}, {"segment", "describe"} | LATE),
        ({"features": {"margin": 0.3}}, {"describe"} | LATE),
        ({"cluster": {"k": 4}}, LATE),
        ({"output": {"overlays": ["tif"]}}, {"paint"}),
        ({"output": {"preprocessed": True}}, {"export"}),
    ],
)
def test_a_setting_changes_the_keys_of_what_depends_on_it_only(changes, redone):
    before, after = keys(), keys(changes)
    assert {stage for stage in before if before[stage] != after[stage]} == redone


def test_settings_of_the_network_do_not_matter_to_a_watershed():
    one = keys({"segment": {"method": "watershed"}})
    other = keys({"segment": {"method": "watershed", "flow_threshold": 0.9, "model": "cpsam_v2"}})
    assert one == other
    assert one != keys({"segment": {"method": "watershed", "watershed": {"opening": 5}}})


def test_input_bytes_and_weights_are_part_of_the_keys():
    assert keys()["convert"] != keys(files=[FILES[0] | {"digest": "d2"}])["convert"]
    assert keys() == keys(files=[FILES[0] | {"mtime_ns": 6, "path": "/elsewhere/x.tif"}])
    other = keys(weights=WEIGHTS | {"describe": "w3"})
    assert {stage for stage, key in keys().items() if other[stage] != key} == {"describe"} | LATE


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("watershed", {"precision": "bfloat16"}),
        ("watershed", {"diameter": 12.0}),
        ("watershed", {"tissue_mask": True}),
        ("cellpose", {"watershed": {"threshold": 0.2}}),
    ],
)
def test_settings_of_another_method_redo_nothing(method, changes):
    assert keys({"segment": {"method": method}}) == keys({"segment": {"method": method} | changes})


@pytest.mark.parametrize("method", ["cellpose", "watershed"])
@pytest.mark.parametrize("changes", [{"channels": [0]}, {"min_size": 3}, {"max_size_fraction": 0.1}])
def test_settings_of_all_methods_redo_the_segmentation(method, changes):
    before, after = (keys({"segment": {"method": method} | more}) for more in ({}, changes))
    assert before["segment"] != after["segment"]


def test_every_setting_of_a_segmentation_belongs_to_one_method_or_to_all():
    """One that is added is part of every key until it is said to matter to one method alone."""
    named = [name for names in stages._OF_METHOD.values() for name in names]
    fields = set(parse_config({}).segment.model_dump())
    assert len(named) == len(set(named))
    assert set(named) <= fields
    assert fields - set(named) == {"method", "channels", "min_size", "max_size_fraction", "keep_flows"}


def test_there_are_no_keys_of_what_waits_for_clusters_before_there_are_any():
    assert set(slide_keys(parse_config({}), FILES, WEIGHTS)) == set(SLIDE_STAGES) - LATE


@pytest.mark.parametrize("name", SLIDE_STAGES)
def test_a_new_version_of_a_stage_redoes_it_and_all_that_reads_it(name, monkeypatch):
    before = keys()
    monkeypatch.setitem(STAGES, name, replace(STAGES[name], version=99))
    after = keys()
    redone = {name}
    for other in STAGES.values():
        if {need.name for need in other.needs} & redone:
            redone.add(other.name)
    assert {stage for stage in before if before[stage] != after[stage]} == redone - {"report"}


def test_every_stage_comes_after_those_it_needs():
    names = list(STAGES)
    for stage in STAGES.values():
        assert all(names.index(need.name) < names.index(stage.name) for need in stage.needs)
    assert sum(STAGES[name].weight for name in SLIDE_STAGES) == pytest.approx(1)
    assert all(stage.result.stage == stage.name for stage in STAGES.values())


def test_files_are_read_again_only_when_size_or_time_changed(tmp_path, monkeypatch):
    file = tmp_path / "a.tif"
    file.write_bytes(b"one")
    first = identify([file])
    read = []
    original = content_keys.digest
    monkeypatch.setattr(content_keys, "digest", lambda path: read.append(path) or original(path))
    assert identify([file], first) == first
    assert unchanged([file], first)
    assert read == []
    file.write_bytes(b"two")
    os.utime(file, ns=(1, first[0]["mtime_ns"] + 1))
    assert not unchanged([file], first)
    second = identify([file], first)
    assert read == [file]
    assert second[0]["digest"] != first[0]["digest"]
    assert not unchanged([tmp_path / "b.tif"], second)
    file.unlink()
    assert not unchanged([file], second)


def test_a_folder_counts_as_all_its_files(tmp_path):
    folder = tmp_path / "x.zarr"
    (folder / "0").mkdir(parents=True)
    (folder / "zarr.json").write_text("{}")
    (folder / "0" / "c").write_bytes(b"abc")
    before = identify([folder])[0]
    assert before["size"] == 5
    (folder / "0" / "c").rename(folder / "0" / "d")
    assert identify([folder])[0]["digest"] != before["digest"]


# ---------------------------------------------------------------------- the ledger


def test_a_finished_stage_is_done_under_its_key_alone(tmp_path):
    study = create_study(tmp_path / "s", ["in"], parse_config({}))
    ledger = study.record.ledger("x")
    ledger.finish("convert", "k1", {"shape": [1, 2, 3]}, 0.5)
    again = study.record.ledger("x")
    assert again.is_done("convert", "k1")
    assert not again.is_done("convert", "k2")
    assert not again.is_done("fit", "k1")
    assert again.entry("convert")["result"] == {"shape": [1, 2, 3]}


def test_beginning_a_stage_forgets_it_and_all_made_from_it(tmp_path):
    study = create_study(tmp_path / "s", ["in"], parse_config({}))
    ledger = study.record.ledger("x")
    for name in SLIDE_STAGES:
        ledger.finish(name, "k", needs=[need.name for need in STAGES[name].needs])
    assert ledger.dependents("segment") == {"describe", "assign", "paint"}
    assert ledger.dependents("export") == set()
    ledger.begin("describe")
    assert set(study.record.ledger("x").stages) == {"convert", "fit", "segment", "export"}


def test_a_ledger_that_cannot_be_read_says_nothing_is_done(tmp_path):
    study = create_study(tmp_path / "s", ["in"], parse_config({}))
    ledger = study.record.ledger("x")
    ledger.finish("convert", "k")
    ledger.path.write_text(ledger.path.read_text()[:20])
    assert not study.record.ledger("x").is_done("convert", "k")


@pytest.mark.parametrize("name", ["../precious", "images/../../precious", "/precious"])
@pytest.mark.parametrize("held", [False, True])
def test_a_ledger_that_names_files_outside_the_study_says_nothing_is_done(tmp_path, name, held):
    """Files of a stage that are not as they were are removed: a study from elsewhere must not choose them."""
    study = create_study(tmp_path / "s", ["in"], parse_config({}))
    ledger = study.record.ledger("x")
    ledger.finish("convert", "k", {"files": 1}, files={"images/x..zarr/zarr.json": [1, 2]})
    assert study.record.ledger("x").is_done("convert", "k")
    ledger.finish("convert", "k", files={name: [1, 2]})
    if held:
        ledger.invalidate("convert")
    again = study.record.ledger("x")
    assert (again.stages, again.suspended) == ({}, {})


def test_a_failure_counts_its_tries_and_goes_when_the_stage_succeeds(tmp_path):
    study = create_study(tmp_path / "s", ["in"], parse_config({}))
    study.record.ledger("x").fail("segment", "no")
    study.record.ledger("x").fail("segment", "no")
    assert study.record.ledger("x").failure == {
        "slide": "x",
        "stage": "segment",
        "error": "no",
        "tries": 2,
    }
    study.record.ledger("x").finish("segment", "k")
    assert study.record.ledger("x").failure is None


# ---------------------------------------------------------------------- folders


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.docx").write_text("precious")
    with pytest.raises(StudyError, match=r"holds something else \(thesis.docx\)"):
        create_study(tmp_path, ["in"], parse_config({}))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.docx"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / ".DS_Store").touch()
    assert create_study(tmp_path, ["in"], parse_config({})).slides == []


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 1}', "{"])
def test_a_study_json_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(StudyError, match="choose another output"):
        check_folder(tmp_path)


def test_a_study_of_another_format_is_refused(tmp_path):
    create_study(tmp_path, ["in"], parse_config({})).record.update(format=99)
    with pytest.raises(StudyError, match="format 99"):
        check_folder(tmp_path)


def test_slides_that_are_no_longer_among_the_inputs_stay_and_are_marked(tmp_path):
    assert create_study(tmp_path / "s", ["a", "b"], parse_config({}), ["a", "b"]).left == []
    grown = create_study(tmp_path / "s", ["b", "c"], parse_config({}), ["b", "c"])
    assert (grown.slides, grown.left) == (["a", "b", "c"], ["a"])
    assert create_study(tmp_path / "s", ["a"], parse_config({}), ["a"]).left == ["b", "c"]


def test_a_file_as_output_is_refused(tmp_path):
    (tmp_path / "s").touch()
    with pytest.raises(StudyError, match="is a file"):
        check_folder(tmp_path / "s")


def test_opening_what_is_no_study_is_an_error(tmp_path):
    with pytest.raises(StudyError, match="no study"):
        Study(tmp_path)


def test_failures_are_replaced_and_removed_when_there_are_none(tmp_path):
    study = create_study(tmp_path / "s", ["in"], parse_config({}))
    study.record.write_failures([{"slide": "x", "stage": "convert", "error": "é", "tries": 1}])
    assert study.failures == [{"slide": "x", "stage": "convert", "error": "é", "tries": 1}]
    study.record.write_failures([])
    assert study.failures == []
    assert not (study.out / "failures.jsonl").exists()


# ---------------------------------------------------------------------- atomic files


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    atomic.write_json(file, {"v": 1})

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_json(file, {"v": 2})
    assert json.loads(file.read_text()) == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_leftovers_of_a_killed_run_are_swept(tmp_path):
    study = create_study(tmp_path / "s", ["in"], parse_config({}))
    study.record.ledger("x").finish("convert", "k")
    (study.out / "ledger" / ".daskcell-0123abcd.tmp").touch()
    study.paths.clusters.mkdir()
    (study.paths.clusters / ".daskcell-0123abcd.tmp").touch()
    (study.paths.clusters / ".names.json.0123abcd.tmp").touch()  # somebody else's
    (study.paths.features("x").parent / ".daskcell-0123abcd.tmp" / "c").mkdir(parents=True)
    sweep(study.out)
    assert list(study.paths.features("x").parent.iterdir()) == []
    assert [p.name for p in study.paths.clusters.iterdir()] == [".names.json.0123abcd.tmp"]
    assert [p.name for p in (study.out / "ledger").iterdir()] == ["x.json"]


# ---------------------------------------------------------------------- the lock


def test_a_second_run_on_the_same_study_is_refused(tmp_path):
    with Lock(tmp_path):
        with pytest.raises(StudyError, match=f"process {os.getpid()} on"), Lock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    with Lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_broken(tmp_path):
    code = (
        f"import os; from daskcell.storage.lock import Lock; Lock({str(tmp_path)!r}).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / ".lock").exists()
    with Lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_a_dead_process_may_be_used_again(tmp_path):
    holder = {"token": "t", "pid": os.getpid(), "host": socket.gethostname(), "born": "12"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with Lock(tmp_path):
        pass


def test_a_lock_of_another_host_is_stale_only_when_its_heart_stopped(tmp_path):
    file = tmp_path / ".lock"
    file.write_text(json.dumps({"token": "t", "pid": 1, "host": "elsewhere", "born": "1"}))
    with pytest.raises(StudyError, match="elsewhere"), Lock(tmp_path):
        pass
    old = file.stat().st_mtime - lock.STALE_SECONDS - 5
    os.utime(file, (old, old))
    with Lock(tmp_path):
        pass


def test_of_many_who_break_a_stale_lock_one_holds_it(tmp_path):
    (tmp_path / ".lock").write_text(
        json.dumps({"token": "t", "pid": 1, "host": socket.gethostname(), "born": "0"})
    )
    start, done = threading.Barrier(8), threading.Event()
    held, refused = [], []

    def take():
        start.wait()
        try:
            with Lock(tmp_path):
                held.append(1)
                done.wait(10)
        except StudyError:
            refused.append(1)
        if len(refused) == 7:
            done.set()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)


def test_a_run_whose_lock_was_taken_over_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with Lock(tmp_path) as mine:
        mine.check()
        (tmp_path / ".lock").write_text(json.dumps({"token": "other", "pid": 1, "host": "elsewhere"}))
        mine._thread.join(5)
        with pytest.raises(StudyError, match="took over"):
            mine.check()
    assert (tmp_path / ".lock").exists()
