"""Many slides: refusals, set-aside slides, what is redone and what is not; stages are small fakes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pytest
import tifffile
from distributed import Client

from daskcell.compute import Reschedule, WorkersRef
from daskcell.errors import (
    ConfigError,
    DaskcellError,
    ImageError,
    InputError,
    InputWarning,
    StudyError,
    WeightsError,
)
from daskcell.images import Source, find_images
from daskcell.images.reader_process import open_safely
from daskcell.pipeline import api, open_study, run, runner, slide, worker_pool
from daskcell.pipeline.progress import Lines, Progress, clock
from daskcell.pipeline.stages import STAGES
from daskcell.storage.lock import Lock
from daskcell.study.results import (
    Assigned,
    Clustered,
    Converted,
    Described,
    Exported,
    Fitted,
    Painted,
    Segmented,
)

INLINE = {"compute": {"kind": "inline"}, "cluster": {"k": 2}}


class Fakes:
    """Stages that write one small file each, and remember that they ran."""

    def __init__(self):
        self.ran = []
        self.cells = 5
        self.text = "x"
        self.raises = {}

    def stage(self, name):
        def run_stage(context):
            self.ran.append((context.slide or "*", name))
            error = self.raises.get((context.slide, name))
            if error is not None:
                raise error
            return getattr(self, name)(context)

        return run_stage

    def convert(self, context):
        reader = open_safely(context.source)
        self._write(context.image / "zarr.json")
        return Converted(shape=(len(reader.channels), *reader.levels[0]))

    def fit(self, context):
        return Fitted(plan={})

    def segment(self, context):
        self._write(context.image / "labels" / "cells" / "zarr.json")
        return Segmented(cells=self.cells)

    def describe(self, context):
        self._write(context.study.paths.table(context.slide))
        self._write(context.study.paths.features(context.slide) / "zarr.json")
        return Described()

    def export(self, context):
        return Exported()

    def cluster(self, context):
        self._write(context.study.paths.clusters / "centers.json")
        return Clustered(k=2)

    def assign(self, context):
        self._write(context.study.paths.clusters_table(context.slide))
        return Assigned()

    def paint(self, context):
        self._write(context.image / "labels" / "clusters" / "zarr.json")
        self._write(context.study.paths.overlays / f"{context.slide}.tif")
        return Painted(files=[f"overlays/{context.slide}.tif"])

    def _write(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text)

    def take(self):
        """Stages that ran since the last call, without their slides."""
        ran, self.ran = self.ran, []
        return ran


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes()
    for name, stage in STAGES.items():
        if name != "report":
            monkeypatch.setitem(STAGES, name, replace(stage, run=fakes.stage(name)))
    monkeypatch.setattr(api, "bring_report_up_to_date", lambda study: None)
    monkeypatch.setattr(api, "fingerprints", lambda config: {"segment": "a", "describe": "b"})
    return fakes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("one", "two", "three"):
        picture = np.full((20, 30), 7, np.uint8)
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", picture)
    return tmp_path / "in"


EARLY = ["convert", "fit", "export", "segment", "describe"]


def test_a_run_does_every_stage_of_every_slide_once(fakes, folder, tmp_path):
    study = run(folder, tmp_path / "out", INLINE)
    expected = [(s, stage) for s in ("one", "three", "two") for stage in EARLY]
    expected += [("*", "cluster")] + [
        (s, stage) for s in ("one", "three", "two") for stage in ("assign", "paint")
    ]
    assert fakes.take() == expected
    assert study.slides == ["one", "three", "two"]
    assert study.failures == []
    assert open_study(tmp_path / "out").config.cluster.k == 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"study.json", "images", "tables", "features", "clusters", "overlays", "ledger"}


def test_slides_whose_worker_has_to_leave_are_done_by_another(fakes, folder, tmp_path, monkeypatch):
    segment, left = STAGES["segment"], ["one", "three", "one"]

    def leaving(context):
        if context.slide in left:
            left.remove(context.slide)
            raise Reschedule("The worker leaves.")
        return segment.run(context)

    monkeypatch.setitem(STAGES, "segment", replace(segment, run=leaving))
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        study = run(folder, tmp_path / "out", INLINE, client)
    assert study.failures == []
    assert not left
    done = fakes.take()
    assert [done.count((name, "segment")) for name in ("one", "two", "three")] == [1, 1, 1]
    assert done.count(("one", "convert")) == 1


def test_a_batch_that_is_cut_off_says_what_is_left(fakes, folder, tmp_path, monkeypatch):
    study = run(folder, tmp_path / "out", INLINE)
    jobs = [slide.Job(str(study.out), source, study.config, {}) for source in find_images(folder)]
    process = slide.process_slide

    def until(job, *args, **options):
        if job.slide == "three":
            raise Reschedule("The worker leaves.")
        return process(job, *args, **options)

    monkeypatch.setattr(slide, "process_slide", until)
    outcomes, _ = slide.process_batch(jobs, 10**9, WorkersRef())
    assert [(o.slide, o.rescheduled) for o in outcomes] == [("one", False), ("three", True), ("two", True)]


def test_the_same_run_again_does_nothing_and_starts_no_worker(fakes, folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "out", INLINE)
    before = (tmp_path / "out" / "study.json").read_bytes()
    fakes.take()
    monkeypatch.setattr(worker_pool, "start_workers", None)
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == []
    assert (tmp_path / "out" / "study.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"segment": {"min_size": 3}}, ["segment", "describe", "assign", "paint"]),
        ({"features": {"margin": 0.4}}, ["describe", "assign", "paint"]),
        ({"cluster": {"k": 3}}, ["assign", "paint"]),
        ({"output": {"overlays": []}}, ["paint"]),
        ({"compute": {"kind": "inline", "block": 512}}, []),
    ],
)
def test_changed_settings_redo_what_depends_on_them_only(fakes, folder, tmp_path, change, redone):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    run(folder, tmp_path / "out", INLINE | change)
    assert [stage for slide_name, stage in fakes.take() if slide_name == "one"] == redone


def test_a_changed_file_is_redone_and_the_clusters_with_it(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    tifffile.imwrite(folder / "two.tif", np.full((20, 30), 8, np.uint8))
    run(folder, tmp_path / "out", INLINE)
    ran = fakes.take()
    assert [stage for name, stage in ran if name == "two"] == [*EARLY, "assign", "paint"]
    assert [stage for name, stage in ran if name == "one"] == ["assign", "paint"]
    assert ("*", "cluster") in ran


def test_a_file_that_changes_during_the_run_is_set_aside_and_done_by_the_next(
    fakes, folder, tmp_path, monkeypatch
):
    describe = STAGES["describe"]

    def disturbed(context):
        result = describe.run(context)
        if context.slide == "two":
            tifffile.imwrite(folder / "two.tif", np.full((20, 31), 8, np.uint8))
        return result

    monkeypatch.setitem(STAGES, "describe", replace(describe, run=disturbed))
    study = run(folder, tmp_path / "out", INLINE)
    assert [failure["slide"] for failure in study.failures] == ["two"]
    assert "changed while the run lasted" in study.failures[0]["error"]
    assert [name for name, stage in fakes.take() if stage == "paint"] == ["one", "three"]
    monkeypatch.setitem(STAGES, "describe", describe)
    assert run(folder, tmp_path / "out", INLINE).failures == []
    assert [stage for name, stage in fakes.take() if name == "two"] == [*EARLY, "assign", "paint"]


def test_a_touched_file_of_the_same_bytes_is_not_redone(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    os.utime(folder / "two.tif", (1, 1))
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == []


def test_a_lost_output_is_made_again(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    (tmp_path / "out" / "overlays" / "one.tif").unlink()
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == [("one", "paint")]


def test_with_a_lost_image_all_that_was_in_it_is_made_again(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    shutil.rmtree(tmp_path / "out" / "images" / "one.zarr")
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == [("one", stage) for stage in ("convert", "segment", "paint")]


def test_a_damaged_input_of_other_stages_redoes_them_unless_it_becomes_the_same_again(
    fakes, folder, tmp_path
):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    features = tmp_path / "out" / "features" / "one.zarr" / "zarr.json"
    features.unlink()
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == [("one", "describe")]
    features.unlink()
    fakes.text = "other"
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == [("one", "describe"), ("one", "assign"), ("one", "paint")]
    assert "held" not in json.loads((tmp_path / "out" / "ledger" / "one.json").read_text())


def test_a_repair_that_is_killed_still_knows_what_it_holds(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    (tmp_path / "out" / "images" / "one.zarr" / "zarr.json").unlink()
    fakes.raises["one", "convert"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", INLINE)
    fakes.raises.clear()
    fakes.take()
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == [("one", "convert")]


def test_changed_bytes_are_found_when_asked_and_told(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    overlay = tmp_path / "out" / "overlays" / "one.tif"
    overlay.write_text("y")
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == []  # names and sizes are as they were
    progress = Recorder()
    run(folder, tmp_path / "out", INLINE, progress=progress, verify=True)
    assert fakes.take() == [("one", "paint")]
    assert progress.said == ["one: overlays/one.tif is damaged or missing; paint is done again."]
    assert overlay.read_text() == "x"


def test_a_slide_with_work_left_is_compared_byte_by_byte(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    (tmp_path / "out" / "images" / "one.zarr" / "zarr.json").write_text("y")
    run(folder, tmp_path / "out", INLINE | {"features": {"margin": 0.4}})
    ran = fakes.take()
    assert [stage for name, stage in ran if name == "one"] == ["convert", "describe", "assign", "paint"]
    assert [stage for name, stage in ran if name == "two"] == ["describe", "assign", "paint"]


def test_damaged_features_are_made_again_before_clusters_are_fitted(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    (tmp_path / "out" / "features" / "two.zarr" / "zarr.json").write_text("y")
    (tmp_path / "out" / "clusters" / "centers.json").unlink()
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == [("two", "describe"), ("*", "cluster")]


def test_a_bad_slide_is_set_aside_with_its_reason_and_the_rest_finish(fakes, folder, tmp_path):
    fakes.raises["two", "segment"] = ImageError("two.tif is broken.")
    fakes.raises["one", "describe"] = ZeroDivisionError("oops")
    study = run(folder, tmp_path / "out", INLINE)
    failures = [{k: f[k] for k in ("slide", "stage", "error", "tries")} for f in study.failures]
    assert failures == [
        {"slide": "one", "stage": "describe", "error": "ZeroDivisionError: oops", "tries": 1},
        {"slide": "two", "stage": "segment", "error": "two.tif is broken.", "tries": 1},
    ]
    assert "Traceback" in study.failures[0]["trace"]
    assert "trace" not in study.failures[1]
    assert [name for name, stage in fakes.take() if stage == "paint"] == ["three"]
    fakes.raises.clear()
    study = run(folder, tmp_path / "out", INLINE)
    assert study.failures == []
    ran = fakes.take()
    assert [stage for name, stage in ran if name == "one"] == ["describe", "assign", "paint"]
    assert [stage for name, stage in ran if name == "three"] == ["assign", "paint"]  # clusters of all are new


def test_only_failed_slides_are_retried_when_asked(fakes, folder, tmp_path):
    fakes.raises["two", "segment"] = ImageError("two.tif is broken.")
    run(folder, tmp_path / "out", INLINE)
    fakes.take()
    study = run(folder, tmp_path / "out", INLINE, retry_failed=True)
    assert fakes.take() == [("two", "segment")]
    assert study.failures[0]["tries"] == 2
    with pytest.raises(InputError, match="without --retry-failed"):
        run(folder, tmp_path / "out", INLINE | {"features": {"margin": 0.9}}, retry_failed=True)


def test_a_file_that_is_no_picture_is_set_aside(fakes, folder, tmp_path):
    (folder / "zero.tif").write_bytes(b"")
    (folder / "text.tif").write_text("this is not a picture")
    study = run(folder, tmp_path / "out", INLINE)
    assert [(f["slide"], f["stage"]) for f in study.failures] == [("text", "convert"), ("zero", "convert")]
    assert all("Traceback" not in f["error"] and "trace" not in f for f in study.failures)
    assert len([1 for name, stage in fakes.take() if stage == "paint"]) == 3


def test_fewer_cells_than_clusters_is_one_sentence_and_keeps_the_rest(fakes, folder, tmp_path):
    fakes.cells = 2
    study = run(folder, tmp_path / "out", INLINE | {"cluster": {"k": 11}})
    assert [(f["slide"], f["stage"]) for f in study.failures] == [(None, "cluster")]
    assert "6 cells were found in all and cluster.k is 11" in study.failures[0]["error"]
    assert {stage for _, stage in fakes.take()} == set(EARLY)
    study = run(folder, tmp_path / "out", INLINE | {"cluster": {"k": 6}})
    assert study.failures == []
    assert {stage for _, stage in fakes.take()} == {"cluster", "assign", "paint"}


def test_images_without_cells_are_a_result(fakes, folder, tmp_path):
    fakes.cells = 0
    study = run(folder, tmp_path / "out", INLINE)
    assert [f["slide"] for f in study.failures] == [None]
    assert "no cell was found" in study.failures[0]["error"]


def test_what_a_slide_that_was_set_aside_has_done_so_far_is_there_for_the_next_run(
    fakes, folder, tmp_path, monkeypatch
):
    segment, found = STAGES["segment"], []

    def failing(context):
        found.append((context.slide, context.scratch.is_dir()))
        context.scratch.mkdir(parents=True, exist_ok=True)
        (context.scratch / "tiles.npy").write_text("hours of work")
        if context.slide == "two":
            raise ImageError("two.tif took too long.")
        return segment.run(context)

    monkeypatch.setitem(STAGES, "segment", replace(segment, run=failing))
    scratch = tmp_path / "out" / "scratch"
    for _ in range(2):
        assert [f["slide"] for f in run(folder, tmp_path / "out", INLINE).failures] == ["two"]
        (left,) = scratch.iterdir()
        assert left.name.startswith("two-segment-")
    assert found == [("one", False), ("three", False), ("two", False), ("two", True)]
    # Of other settings, or once it is done, it is of no use.
    other = INLINE | {"segment": {"min_size": 3}}
    run(folder, tmp_path / "out", other)
    assert found[-1] == ("two", False)
    assert left not in scratch.iterdir()
    monkeypatch.setitem(STAGES, "segment", segment)
    assert run(folder, tmp_path / "out", other).failures == []
    assert not scratch.exists()


def test_results_that_were_made_in_different_ways_are_named(fakes, folder, tmp_path):
    from daskcell.pipeline.status import remarks, report, table

    fakes.raises["two", "describe"] = ImageError("two.tif is broken.")
    study = run(folder, tmp_path / "out", INLINE)
    ran = {"device": "cpu", "threads": 1, "precision": "float32"}
    assert {name: entry.get("ran") for name, entry in study.record.ledger("one").stages.items()} == {
        "convert": None,
        "fit": None,
        "export": None,
        "segment": ran,
        "describe": ran,
        "assign": None,
        "paint": None,
    }
    assert remarks(study) == []
    fakes.raises.clear()
    study = run(folder, tmp_path / "out", INLINE | {"compute": {"kind": "inline", "threads": 2}})
    (sentence,) = remarks(study)
    assert sentence == (
        "The stage describe ran in different ways, so results differ in their last bits: "
        "2 slides on cpu with 1 thread in float32, 1 slide on cpu with 2 threads in float32."
    )
    assert sentence in table(report(study))


# ---------------------------------------------------------------------- refused before any work


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"segmnt": {}}, ConfigError),
        ({"cluster": {"k": 1}}, ConfigError),
        (3, ConfigError),
        ("no.yaml", ConfigError),
    ],
)
def test_wrong_settings_are_refused(fakes, folder, tmp_path, config, error):
    with pytest.raises(error):
        run(folder, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_refused_before_the_folder_is_made(folder, tmp_path):
    with pytest.raises(WeightsError, match="nothing-like-this"):
        run(
            folder,
            tmp_path / "out",
            {"features": {"encoder": "nothing-like-this"}, "segment": {"method": "watershed"}},
        )
    assert not (tmp_path / "out").exists()


def test_missing_inputs_are_refused(fakes, tmp_path):
    with pytest.raises(ImageError, match="no file or folder"):
        run(tmp_path / "nowhere", tmp_path / "out", INLINE)
    with pytest.raises(InputError, match="no input"):
        run([], tmp_path / "out", INLINE)
    assert not (tmp_path / "out").exists()


def test_a_single_file_that_is_no_picture_is_refused(fakes, tmp_path):
    (tmp_path / "text.tif").write_text("this is not a picture")
    with pytest.raises(ImageError, match=r"text\.tif"):
        run(tmp_path / "text.tif", tmp_path / "out", INLINE)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something_else_is_refused(fakes, folder, tmp_path):
    with pytest.raises(StudyError, match="holds something else"):
        run(folder, folder, INLINE)
    assert sorted(path.name for path in folder.iterdir()) == ["one.tif", "three.tif", "two.tif"]


def test_two_runs_at_once_are_refused(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    with Lock(tmp_path / "out"), pytest.raises(StudyError, match="Another run works"):
        run(folder, tmp_path / "out", INLINE)


def test_a_machine_that_is_not_there_leaves_no_study_behind(fakes, folder, tmp_path):
    with pytest.raises(DaskcellError, match="moon"):
        run(folder, tmp_path / "out", {"compute": {"kind": "moon"}})
    assert not (tmp_path / "out").exists()


def test_an_error_that_concerns_all_slides_stops_the_run(fakes, folder, tmp_path):
    fakes.raises["one", "segment"] = OSError(28, "No space left on device")
    with pytest.raises(StudyError, match="make room"):
        run(folder, tmp_path / "out", INLINE)
    fakes.raises.clear()
    fakes.take()
    study = run(folder, tmp_path / "out", INLINE)
    assert study.failures == []
    assert fakes.take()[0] == ("one", "segment")


# ---------------------------------------------------------------------- interruptions


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*EARLY, "assign", "paint"])
def test_a_run_that_dies_in_any_stage_continues_with_that_stage(fakes, folder, tmp_path, stage):
    fakes.raises["three", stage] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", INLINE)
    done = fakes.take()
    fakes.raises.clear()
    run(folder, tmp_path / "out", INLINE)
    again = fakes.take()
    assert again[0] == ("three", stage)
    assert set(done) & set(again) <= {("three", stage)}


def test_settings_that_changed_back_after_a_death_do_not_trust_what_was_touched(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    fakes.raises["one", "segment"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", INLINE | {"segment": {"min_size": 3}})
    fakes.raises.clear()
    fakes.take()
    run(folder, tmp_path / "out", INLINE)
    assert fakes.take() == [("one", stage) for stage in ("segment", "describe", "assign", "paint")]


# ---------------------------------------------------------------------- progress


class Recorder(Progress):
    def __init__(self):
        super().__init__()
        self.said, self.fractions = [], []

    def changed(self):
        self.fractions.append(self.fraction)

    def say(self, text):
        self.said.append(text)


def test_progress_counts_cells_and_pixels_and_reaches_the_end(fakes, folder, tmp_path):
    fakes.raises["two", "segment"] = ImageError("two.tif is broken.")
    progress = Recorder()
    run(folder, tmp_path / "out", INLINE, progress=progress)
    assert (progress.slides, progress.slides_done, progress.failed) == (3, 2, 1)
    assert (progress.cells, progress.pixels) == (10, 3 * 600)
    assert progress.said == ["Set aside: two: two.tif is broken."]
    assert progress.fractions == sorted(progress.fractions)
    assert progress.fraction == pytest.approx(1)
    assert "2/3 slides" in progress.line
    again = Recorder()
    run(folder, tmp_path / "out", INLINE, progress=again)
    assert again.slides_done == 2


def test_warnings_of_a_run_name_the_line_that_called_it(fakes, folder, tmp_path):
    shutil.copy(folder / "one.tif", folder / "one_masks.tif")
    with pytest.warns(InputWarning) as caught:
        run(folder, tmp_path / "out", INLINE)
    assert {warning.filename for warning in caught} == {__file__}


def test_lines_come_at_intervals_even_when_nothing_was_finished():
    stream = io.StringIO()
    with Lines(0.05, stream) as progress:
        progress.begin({"a": 3e6, "b": 1e6}, {"a": ["segment", "describe"], "b": []})
        progress.counts("a", 2_000_000, 1234)
        time.sleep(0.3)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3
    assert "41%, 1/2 slides, 2.0 Mpx, 1,234 cells" in lines[-1]


def test_the_status_tells_how_far_a_run_is_while_it_lasts(fakes, folder, tmp_path, monkeypatch):
    from daskcell.pipeline.status import report, table

    monkeypatch.setattr(runner, "_WRITE_SECONDS", -1)
    seen = []
    describe = STAGES["describe"]

    def look(context):
        seen.append(report(open_study(tmp_path / "out")))
        return describe.run(context)

    monkeypatch.setitem(STAGES, "describe", replace(describe, run=look))
    study = run(folder, tmp_path / "out", INLINE)
    last = seen[-1]["running"]["progress"]
    assert 0 < seen[0]["running"]["progress"]["fraction"] < last["fraction"] < 1
    assert last["seconds_left"] is None or last["seconds_left"] >= 0  # None: too little is measured yet
    assert "% done" in table(seen[-1])
    assert seen[-1]["slides"][-1]["stages"]["describe"] == "running"
    assert report(study)["running"] is None
    assert not (study.out / ".progress.json").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (3720, "1 h 02 min")]
)
def test_times_are_told_in_words(seconds, text):
    assert clock(seconds) == text


def test_ledgers_are_plain_json_without_pickles(fakes, folder, tmp_path):
    run(folder, tmp_path / "out", INLINE)
    for path in (tmp_path / "out" / "ledger").iterdir():
        assert set(json.loads(path.read_text())) == {"format", "files", "stages", "began", "failure", "tries"}


# ---------------------------------------------------------------------- on workers


class Deadly(Source):
    """An image whose task takes the worker with it, as no file can: those are opened beside the worker."""

    def identity(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Hungry(Source):
    """An image whose task fills its worker's memory until the nanny ends it."""

    def identity(self):
        held = []
        while True:
            held.append(np.ones(1 << 23))  # 64 MB
            time.sleep(0.05)


def paint_cells(folder, names, first=0):
    folder.mkdir()
    for number, name in enumerate(names, start=first):
        picture = np.random.default_rng(number).integers(0, 20, (120, 120), np.uint8)
        picture[20:50, 20:50] = picture[70:100, 60:90] = 200
        tifffile.imwrite(folder / f"{name}.tif", picture)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_slide_that_kills_its_worker_is_set_aside_and_the_others_finish(tmp_path, monkeypatch):
    """Also those that wait on the same worker, against which Dask counts its deaths."""
    bad, good = {"bad0": Deadly, "bad1": Hungry}, [f"good{i}" for i in range(3)]
    paint_cells(tmp_path / "in", [*bad, *good])
    found = find_images(tmp_path / "in")
    sources = [bad.get(source.name, Source)(source.name, source.files) for source in found]
    monkeypatch.setattr(api, "find_images", lambda *args: sources)
    settings = {
        "segment": {"method": "watershed"},
        "cluster": {"k": 2},
        "compute": {"workers": 1, "memory": "2GB"},
    }
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):  # each death takes a new worker
        study = run(tmp_path / "in", tmp_path / "out", settings)
    assert [(f["slide"], f["stage"]) for f in study.failures] == [(name, "convert") for name in bad]
    for failure in study.failures:
        assert "killed its worker" in failure["error"]
        assert "compute.memory" in failure["error"]
    assert [len(study.cells(name)) for name in good] == [2] * 3
    monkeypatch.undo()  # the deadly ones would kill this process
    paint_cells(tmp_path / "calm", good, first=len(bad))
    calm = run(tmp_path / "calm", tmp_path / "whole", settings | {"compute": {"kind": "inline"}})
    assert contents(study.out) == contents(calm.out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file but those that tell what happened to bad slides, and where it ran."""
    aside = {"ledger", "study.json", "failures.jsonl", "report.html"}
    files = [path for path in out.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in files
        if path.relative_to(out).parts[0] not in aside
    }


@pytest.mark.slow
@pytest.mark.cluster
def test_many_small_slides_share_tasks(fakes, tmp_path, monkeypatch):
    from distributed import Client

    from daskcell.compute.task_queue import Window

    (tmp_path / "in").mkdir()
    for number in range(120):
        tifffile.imwrite(tmp_path / "in" / f"{number:03d}.tif", np.full((20, 30), number, np.uint8))
    lengths = []
    submit = Window.submit

    def counted(window, key, function, *args, **kind):
        if function is slide.process_batch:
            lengths.append(len(args[0]))
        submit(window, key, function, *args, **kind)

    monkeypatch.setattr(Window, "submit", counted)
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        study = run(tmp_path / "in", tmp_path / "out", INLINE, client)
        for _ in range(100):  # a future that was released is forgotten a moment later
            tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
            if not tasks:
                break
            time.sleep(0.1)
    assert (len(study.slides), study.failures) == (120, [])
    assert sum(lengths) == 2 * 120  # once up to the features, once after the clusters
    assert len(lengths) < 90
    assert max(lengths) > 5
    assert lengths[0] == lengths[-1] == 1  # the pace is not known yet; at the end all workers have some
    assert tasks == 0
