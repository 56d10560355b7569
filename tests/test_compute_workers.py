"""Workers that leave, that promise a GPU they have not, and what listens where."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker

from daskcell.compute import Reschedule, Workers, WorkersRef, start_workers
from daskcell.compute._distributed import JobWorker, WorkerSetup
from daskcell.compute.local import dashboard_options
from daskcell.compute.process import NEEDS_GPU
from daskcell.config import ComputeSettings
from daskcell.errors import ComputeError, ConfigError

pytestmark = [pytest.mark.alone, pytest.mark.cluster]

OPTIONS = {"host": "127.0.0.1", "nthreads": 1, "dashboard": False}
QUIET = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}


def cluster(**workers) -> SpecCluster:
    """Nannies with options of their own."""
    spec = {name: {"cls": Nanny, "options": OPTIONS | options} for name, options in workers.items()}
    return SpecCluster(workers=spec, scheduler={"cls": Scheduler, "options": QUIET})


def begun_and_ended(folder: str, number: int) -> int:
    """Notes when it begins and, once there is a file ``go``, that it ends, apart for each time it runs."""
    mark = Path(folder) / f"{number}-{time.monotonic_ns()}"
    mark.with_suffix(".begun").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
    mark.with_suffix(".ended").touch()
    return os.getpid()


def leave(dask_worker: Worker) -> None:
    """What Dask calls when a worker's lifetime is over."""
    dask_worker.loop.add_callback(dask_worker.close_gracefully)


def is_busy(dask_worker: Worker) -> bool:
    return bool(dask_worker.active_threads)


def until(ready) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def address_of(client: Client, name: str) -> str:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    (found,) = [address for address, worker in workers.items() if worker["name"] == name]
    return found


def marks(folder: Path) -> tuple[int, int]:
    return len(list(folder.glob("*.begun"))), len(list(folder.glob("*.ended")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [JobWorker, Worker])
def test_a_worker_whose_lifetime_is_over_finishes_the_task_it_is_at(kind, tmp_path):
    """Dask's own worker is the control: it leaves at once, and its task runs twice at the same time."""
    with cluster(leaving={"worker_class": kind}, staying={}) as here, Client(here) as client:
        client.wait_for_workers(2)
        first = address_of(client, "leaving")
        futures = client.map(begun_and_ended, [str(tmp_path)] * 4, range(4), pure=False)
        until(lambda: marks(tmp_path)[0] == 2)
        client.run(leave, workers=[first])
        until(lambda: client.scheduler_info()["workers"].get(first, {}).get("status") != "running")
        (tmp_path / "go").touch()
        pids = client.gather(futures)
        until(lambda: len(client.scheduler_info()["workers"]) == 1)
    begun, ended = marks(tmp_path)
    if kind is JobWorker:
        assert (begun, ended) == (4, 4)
        assert len(set(pids)) == 2
    else:
        assert begun > 4


def need_gpu(ref: WorkersRef) -> None:
    window = Workers.of_task(ref).window()
    window.submit("key", os.getpid, kind="network")
    list(window)


@pytest.mark.slow
def test_a_task_that_waits_for_a_gpu_lets_its_worker_leave_in_time():
    """Else its job would be killed at the walltime, again and again, and the task with it."""
    leaving = {"worker_class": JobWorker, "resources": {"CPU": 1}}
    with cluster(leaving=leaving, staying={"resources": {"CPU": 1}}) as here, Client(here) as client:
        client.wait_for_workers(2)
        first = address_of(client, "leaving")
        ref = WorkersRef(labels=frozenset({"CPU", "GPU"}))
        future = client.submit(need_gpu, ref, workers=[first], allow_other_workers=True)
        until(lambda: client.run(is_busy, workers=[first])[first])
        client.run(leave, workers=[first])
        with pytest.raises(Reschedule):
            future.result(timeout=120)
        until(lambda: len(client.scheduler_info()["workers"]) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers_set_up", [True, False])
def test_a_worker_that_is_closed_does_not_go_on_with_a_task_that_others_have(workers_set_up, tmp_path):
    """Without the plugin (control), the task goes on for seconds while it runs elsewhere too."""
    with cluster(one={}, two={}) as here, Client(here) as client:
        client.wait_for_workers(2)
        if workers_set_up:
            client.register_plugin(WorkerSetup(1))
        addresses = list(client.scheduler_info()["workers"])
        future = client.submit(
            begun_and_ended, str(tmp_path), 0, workers=addresses, allow_other_workers=True, pure=False
        )
        until(lambda: marks(tmp_path)[0])
        (busy,) = [address for address, tasks in client.processing().items() if tasks]
        client.retire_workers([busy], close_workers=True)
        until(lambda: marks(tmp_path)[0] == 2)
        (tmp_path / "go").touch()
        future.result(timeout=120)
        if not workers_set_up:
            until(lambda: marks(tmp_path)[1] == 2)
    begun, ended = marks(tmp_path)
    assert begun == 2
    assert ended == (1 if workers_set_up else 2)


def test_a_worker_that_promises_a_gpu_it_has_not_is_refused(monkeypatch):
    """Before any work, though the label is there: it would fail slide after slide."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with cluster(gpu={"resources": {"GPU": 1}}) as here:
        address = here.scheduler_address
        settings = ComputeSettings(kind=address, device="cuda")
        with pytest.raises(ComputeError, match="labelled GPU, but torch finds no CUDA GPU there"):
            start_workers(settings).__enter__()


def test_a_gpu_job_without_a_gpu_does_not_become_a_worker():
    """Whatever it says of itself; without the variable (control) it does."""
    without = {"CUDA_VISIBLE_DEVICES": ""}
    with cluster(plain={"worker_class": JobWorker, "env": without}) as here:
        assert len(here.scheduler.workers) == 1
        needing = {"worker_class": JobWorker, "env": without | {NEEDS_GPU: "1"}, "resources": {"GPU": 1}}
        here.worker_spec["gpu"] = {"cls": Nanny, "options": OPTIONS | needing}
        with pytest.raises(RuntimeError):
            here.sync(here._correct_state)
        assert len(here.scheduler.workers) == 1
        del here.worker_spec["gpu"]


def test_a_scheduler_that_takes_the_call_and_says_nothing_is_an_error_in_time(monkeypatch):
    monkeypatch.setattr("daskcell.compute.given.CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ComputeError, match=f"answers at {address} within 1 s"):
            start_workers(ComputeSettings(kind=address)).__enter__()
        assert time.monotonic() - started < 15


def test_a_scheduler_without_workers_is_an_error_in_time():
    with cluster() as here:
        address = here.scheduler_address
        with pytest.raises(ComputeError, match=r"had no worker within 1 s \(compute.wait\)"):
            start_workers(ComputeSettings(kind=address, wait=1)).__enter__()


def listening(pid: int) -> set[str]:
    """Addresses that a process listens on, as the kernel knows them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            host, port = fields[1].split(":")
            found.add(f"{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}")
    return found


@pytest.mark.parametrize(("said", "expected"), [("{port}", "127.0.0.1"), ("0.0.0.0:{port}", "0.0.0.0")])
def test_the_dashboard_listens_on_this_machine_only_unless_told_otherwise(said, expected):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = said.format(port=port)
    dashboard = int(text) if text.isdigit() else text
    before = listening(os.getpid())
    with start_workers(ComputeSettings(workers=1, dashboard=dashboard)):
        here = listening(os.getpid()) - before
    assert f"{expected}:{port}" in here
    assert {address.split(":")[0] for address in here} <= {"127.0.0.1", expected}


def test_a_dashboard_is_off_unless_asked_for_and_its_address_must_be_one():
    assert dashboard_options(None) == {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    assert dashboard_options(8787)["dashboard_address"] == "127.0.0.1:8787"
    with pytest.raises(ConfigError, match="not a port or an address such as"):
        dashboard_options("everywhere")


@pytest.mark.parametrize("options", [["--compute", "gpu"], ["--compute", "inline", "--device", "cuda"]])
def test_a_run_that_asks_for_a_gpu_where_there_is_none_is_refused_before_any_work(options, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((64, 64), 7, np.uint8))
    done = subprocess.run(
        [sys.executable, "-m", "daskcell", "run", tmp_path / "a.tif", "-o", tmp_path / "out", *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "A GPU was asked for" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
