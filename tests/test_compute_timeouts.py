"""A task that hangs: ended, tried again elsewhere, and given up in the end."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from test_pipeline import contents

from daskcell.compute import Failed, Workers, timeouts
from daskcell.compute.timeouts import TaskTimeout, paused, reset
from daskcell.images import Source, find_images
from daskcell.pipeline import api, run

pytestmark = [pytest.mark.alone, pytest.mark.cluster]


LIMIT = 600.0
"""Seconds that no task takes here, however busy the machine is; what hangs makes its clock run ahead."""


def pass_time(seconds: float) -> None:
    """As if this thread's task had run for `seconds` more."""
    timeouts._running[threading.get_ident()].since -= seconds


def hang() -> None:
    pass_time(2 * LIMIT)
    time.sleep(LIMIT)


def hang_once(mark: str) -> str:
    if not Path(mark).exists():
        Path(mark).write_text(str(os.getpid()))
        hang()
    return "done"


def hang_at_the_second(mark: str) -> None:
    reset("first")
    pass_time(0.7 * LIMIT)
    reset("second")
    with open(mark, "a") as file:
        file.write(f"{os.getpid()}\n")
    hang()


def short_items() -> str:
    for number in range(4):  # longer than the limit together, not each
        reset(str(number))
        pass_time(0.5 * LIMIT)
        time.sleep(0.3)  # for the thread that watches
    return "done"


@pytest.fixture(scope="module")
def client():
    from distributed import Client, Nanny, Scheduler, SpecCluster

    options = {"host": "127.0.0.1", "nthreads": 1, "dashboard": False, "env": {"OMP_NUM_THREADS": "1"}}
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with (
        SpecCluster(
            workers={i: {"cls": Nanny, "options": options} for i in range(2)},
            scheduler={"cls": Scheduler, "options": scheduler | {"allowed_failures": 2}},
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        yield client


@pytest.mark.slow
def test_what_hangs_is_tried_three_times_and_the_rest_goes_on(client, tmp_path):
    once, always = str(tmp_path / "once"), str(tmp_path / "always")
    window = Workers(client, task_seconds=LIMIT).window(keep_going=True)
    window.submit("once", hang_once, once)
    window.submit("short", short_items)
    results = {}
    for key, result in window:
        results[key] = result
        if key == "once":  # not at the same time: Dask blames a worker's death on all that wait there
            window.submit("always", hang_at_the_second, always)
            for number in range(20):
                window.submit(number, os.getpid)
    assert (results["once"], results["short"]) == ("done", "done")
    assert len([key for key in range(20) if isinstance(results[key], int)]) == 20
    failed = results["always"]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, TaskTimeout)
    assert "compute.task_seconds (600 s), 3 times over" in str(failed.error)
    assert failed.error.item == "second"
    assert len(set(Path(always).read_text().split())) == 3


def test_without_a_process_of_its_own_a_task_has_no_limit():
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        window = Workers(client, task_seconds=0.1).window()
        window.submit("sleep", time.sleep, 1)
        assert dict(window) == {"sleep": None}


class Hung(Source):
    """An image whose task never gets to reading it: what hangs while it reads ends with its reader."""

    def identity(self):
        hang()


@pytest.mark.slow
def test_a_slide_whose_reading_hangs_is_set_aside_and_the_others_finish(client, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("hung", "one", "two"):
        picture = np.random.default_rng(0).integers(0, 20, (120, 120), np.uint8)
        picture[20:50, 20:50] = picture[70:100, 60:90] = 200
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", picture)
    found = find_images(tmp_path / "in")
    sources = [Hung(s.name, s.files) if s.name == "hung" else s for s in found]
    monkeypatch.setattr(api, "find_images", lambda *args: sources)
    client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    settings = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"task_seconds": LIMIT}}
    study = run(tmp_path / "in", tmp_path / "out", settings, client)
    assert [(f["slide"], f["stage"]) for f in study.failures] == [("hung", "convert")]
    assert "compute.task_seconds (600 s)" in study.failures[0]["error"]
    assert [len(study.cells(name)) for name in ("one", "two")] == [2, 2]
    (tmp_path / "in" / "hung.tif").unlink()
    monkeypatch.undo()
    calm = run(tmp_path / "in", tmp_path / "whole", settings | {"compute": {"kind": "inline"}})
    assert contents(study.out) == contents(calm.out)


def test_a_task_that_waits_for_others_does_not_grow_older():
    me = threading.get_ident()
    begun = time.monotonic()
    task = timeouts._Running(None, "key", 100.0, time.monotonic() - 7)
    timeouts._running[me] = task
    try:
        with paused():
            assert task.since > time.monotonic() + 1e9
            time.sleep(0.3)
        age = time.monotonic() - task.since
        assert 7 <= age <= 7 + (time.monotonic() - begun) - 0.3
    finally:
        del timeouts._running[me]
        timeouts._rearm()
    with paused():  # outside a task it does nothing
        pass
