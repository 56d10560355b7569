"""What a killed client leaves at work, and what a killed scheduler never hands over."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from distributed import Client, Future, as_completed
from distributed.comm import CommClosedError

from daskcell.compute import Workers
from daskcell.compute._distributed import Completed

pytestmark = pytest.mark.cluster
SUBMIT = '''
import sys
from distributed import Client
from daskcell.compute import Workers
address, folder, mark, go = sys.argv[1:]
window = Workers(Client(address)).claim(folder).window()
window.submit(0, exec, f"""
import os, time
while not os.path.exists({go!r}):
    time.sleep(0.05)
open({mark!r}, 'w').close()
""")
window.submit(1, print)
print("first", flush=True)
for key, _ in window:
    print(key, flush=True)
'''


def start(kind: str, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.dask_{kind}", *options, "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture
def cluster(tmp_path):
    """The file of a scheduler with two workers, all processes of their own."""
    file = tmp_path / "scheduler.json"
    scheduler = start(
        "scheduler", "--scheduler-file", str(file), "--no-dashboard", "--dashboard-address", "127.0.0.1:0"
    )
    options = ("--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path))
    processes = [
        scheduler,
        *(start("worker", "--scheduler-file", str(file), *options) for _ in range(2)),
    ]
    until(file.exists)
    try:
        yield file
    finally:
        for process in processes:
            process.kill()
            process.wait()


def until(ready, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_that_is_continued_waits_for_what_a_killed_one_left_at_work(cluster, tmp_path):
    mark, go = tmp_path / "mark", tmp_path / "go"
    with Client(scheduler_file=str(cluster), set_as_default=False) as client:
        client.wait_for_workers(2)
        process = subprocess.Popen(
            [sys.executable, "-c", SUBMIT, client.scheduler.address, str(tmp_path), str(mark), str(go)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["first\n", "1\n"]
        process.kill()
        process.wait()
        until(lambda: not client.processing() or not any(client.processing().values()))
        said: list[str] = []
        others = Workers(client).claim(tmp_path / "another", said.append)
        assert not mark.exists(), "a task of another folder is nobody's business"
        threading.Timer(1, go.touch).start()
        workers = Workers(client).claim(tmp_path, said.append)
        assert mark.exists()
        assert workers.owner != others.owner
        window = workers.window()
        window.submit("key", len, "abc")
        assert list(window) == [("key", 3)]


@pytest.mark.slow
@pytest.mark.parametrize("completed", [as_completed, Completed])
def test_a_task_whose_result_is_not_to_be_had_at_once_is_not_waited_for_for_ever(completed, monkeypatch):
    """As when a scheduler dies while it hands over a result. Dask's own `as_completed` is the control."""
    fetch = Future._result
    lost: list[str] = []

    async def flaky(self, raiseit=True):
        if not lost:
            lost.append(self.key)
            raise CommClosedError("reset by peer")
        return await fetch(self, raiseit)

    monkeypatch.setattr("daskcell.compute._distributed.Completed", completed)
    monkeypatch.setattr(Future, "_result", flaky)
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with Client(**options, set_as_default=False) as client:
        window = Workers(client).window()
        window.submit("key", len, "abc")
        found: list[tuple[str, int]] = []
        thread = threading.Thread(target=lambda: found.extend(window), daemon=True)
        thread.start()
        thread.join(timeout=5)
        assert len(lost) == 1
        assert found == ([("key", 3)] if completed is Completed else [])
