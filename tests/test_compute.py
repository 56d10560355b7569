"""Windows of tasks, in this process and on worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask.system
import distributed.system
import pytest

from daskcell.compute import Failed, Window, Workers, start_workers, threads_limited
from daskcell.compute.local import share_machine
from daskcell.config import ComputeSettings
from daskcell.errors import ComputeError, ConfigError


def double(x):
    return 2 * x


def fail_on(x, bad):
    if x == bad:
        raise ValueError(f"cannot take {x}")
    time.sleep(0.02)
    return x


def where(_):
    time.sleep(0.02)
    return os.getpid()


def die_once(marker: str, x: int):
    """Kills its worker the first time it runs."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def count_running(folder: str, number: int):
    """How many of its kind run now, itself included."""
    mark = Path(folder) / str(number)
    mark.touch()
    time.sleep(0.1)
    running = len(list(Path(folder).iterdir()))
    mark.unlink()
    return running


def threads_here(_):
    import torch
    from threadpoolctl import threadpool_info

    return torch.get_num_threads(), {pool["num_threads"] for pool in threadpool_info()}


@pytest.mark.parametrize(
    ("cores", "gib", "settings", "gpus", "least", "count", "each"),
    [
        (16, 64, {}, 0, 1.5, 16, 3.8),
        (16, 16, {}, 0, 1.5, 10, 1.52),
        (16, 16, {"workers": 16}, 0, 1.5, 16, 0.95),
        (16, 16, {"threads": 4}, 0, 1.5, 4, 3.8),
        (16, 16, {}, 2, 1.5, 8, 1.52),
        (4, 2, {}, 0, 4, 1, 1.9),
        (4, 2, {}, 0, 0, 4, 0.475),
    ],
)
def test_workers_are_no_more_than_the_memory_is_enough_for(
    cores, gib, settings, gpus, least, count, each, monkeypatch
):
    monkeypatch.setattr(dask.system, "CPU_COUNT", cores)
    monkeypatch.setattr(distributed.system, "MEMORY_LIMIT", gib * 2**30)
    found, memory = share_machine(ComputeSettings(**settings), gpus, int(least * 2**30))
    assert (found, int(memory) / 2**30) == (count, pytest.approx(each, rel=0.01))
    asked = ComputeSettings(memory="1GiB", **settings)
    assert share_machine(asked, gpus, int(least * 2**30))[1] == "1GiB"


@pytest.fixture(scope="module")
def cluster():
    with start_workers(ComputeSettings(workers=2)) as workers:
        yield workers


@pytest.fixture(params=["inline", pytest.param("cluster", marks=pytest.mark.cluster)])
def workers(request):
    return Workers() if request.param == "inline" else request.getfixturevalue("cluster")


def test_every_task_comes_back_once_with_its_key(workers):
    window = workers.window()
    for i in range(50):
        window.submit(("block", i), double, i)
    results = list(window)
    assert sorted(results) == [(("block", i), 2 * i) for i in range(50)]
    assert list(window) == []


def test_tasks_may_be_submitted_while_iterating(workers):
    window = workers.window()
    window.submit(1, double, 1)
    seen = {}
    for key, result in window:
        seen[key] = result
        if result < 100:
            window.submit(result, double, result)
    assert seen == {1: 2, 2: 4, 4: 8, 8: 16, 16: 32, 32: 64, 64: 128}


def test_an_exception_is_raised_with_its_key_and_cancels_the_rest(workers):
    window = workers.window()
    for i in range(40):
        window.submit(("block", i), fail_on, i, 2)
    with pytest.raises(ValueError, match="cannot take 2") as caught:
        list(window)
    assert "('block', 2)" in caught.value.__notes__[0]
    assert len(window) == 0
    window.submit("again", double, 4)
    assert list(window) == [("again", 8)]


def test_a_window_that_keeps_going_yields_failures_as_results(workers):
    window = workers.window(keep_going=True)
    for i in range(6):
        window.submit(i, fail_on, i, 2)
    results = dict(window)
    assert isinstance(results.pop(2), Failed)
    assert results == {i: i for i in (0, 1, 3, 4, 5)}


def test_leaving_the_loop_early_drops_what_is_left(workers):
    window = workers.window(2)
    for i in range(10):
        window.submit(i, double, i)
    for _ in window:
        break
    assert len(window) == 0


@pytest.mark.slow
@pytest.mark.cluster
def test_no_more_than_the_limit_is_in_flight(cluster, tmp_path):
    window = cluster.window(1)
    for i in range(6):
        window.submit(i, count_running, str(tmp_path), i)
    assert {running for _, running in window} == {1}
    window = cluster.window(2)  # control: two at a time do meet
    for i in range(6):
        window.submit(i, count_running, str(tmp_path), i)
    assert max(running for _, running in window) == 2


@pytest.mark.slow
@pytest.mark.cluster
def test_threads_of_a_worker_are_held_to_the_setting(cluster):
    window = cluster.window()
    window.submit(0, threads_here, 0)
    assert list(window) == [(0, (1, {1}))]


def test_threads_of_this_process_are_put_back():
    import torch

    before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    with threads_limited(1):
        assert threads_here(0) == (1, {1})
    assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == before


def test_callbacks_follow_finished_tasks(workers):
    ticks = []
    window = workers.watched(lambda: ticks.append(1)).window()
    for i in range(5):
        window.submit(i, double, i)
    assert len(list(window)) == len(ticks) == 5


@pytest.mark.slow
@pytest.mark.cluster
def test_a_task_whose_worker_dies_runs_again(tmp_path):
    with start_workers(ComputeSettings(workers=2)) as workers:
        window = workers.window()
        for i in range(8):
            window.submit(i, die_once, str(tmp_path / "died"), i)
        assert dict(window) == {i: i for i in range(8)}
    assert (tmp_path / "died").exists()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_one_failure_among_results():
    with start_workers(ComputeSettings(workers=2)) as workers:
        window = workers.window(1, keep_going=True)
        window.submit("bad", die, 0)
        window.submit("good", double, 4)
        results = dict(window)
    assert results["good"] == 8
    assert isinstance(results["bad"].error, ComputeError)
    assert "killed its worker" in str(results["bad"].error)


def hand_on(ref, _):
    """A task with tasks of its own; where it ran, where they did, and how one ended that cannot succeed."""
    window = Workers.of_task(ref).window(2, keep_going=True)
    for i in range(5):
        window.submit(("network", i), where, i, kind="network")
        window.submit(("cpu", i), where, i)
    window.submit("bad", double, None, kind="network")
    found = dict(window)
    assert type(found.pop("bad").error) is TypeError
    return os.getpid(), [{pid for (kind, _), pid in found.items() if kind == k} for k in ("cpu", "network")]


@pytest.mark.slow
@pytest.mark.cluster
def test_network_tasks_run_on_labelled_workers_only():
    from distributed import Client, Nanny, Scheduler, SpecCluster

    options = {"host": "127.0.0.1", "nthreads": 1, "dashboard": False}
    spec = {
        "gpu": {"cls": Nanny, "options": options | {"resources": {"GPU": 1}}},
        "cpu-0": {"cls": Nanny, "options": options | {"resources": {"CPU": 1}}},
        "cpu-1": {"cls": Nanny, "options": options | {"resources": {"CPU": 1}}},
    }
    quiet = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": quiet}
    with SpecCluster(workers=spec, scheduler=scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(3)
        pids = client.run(os.getpid)
        info = client.scheduler_info(n_workers=-1)["workers"]
        gpu_pids = {pids[address] for address, worker in info.items() if worker["resources"] == {"GPU": 1}}
        workers = Workers(client)
        assert workers.count == 3
        assert workers.labels == {"GPU", "CPU"}
        window = workers.window(6)
        for i in range(30):
            window.submit(("network", i), where, i, kind="network")
            window.submit(("cpu", i), where, i)
        ran = {"network": set(), "cpu": set()}
        for (kind, _), pid in window:
            ran[kind].add(pid)
        assert ran["network"] == gpu_pids
        assert not ran["cpu"] & gpu_pids
        for kind in ("cpu", "network"):  # on one that has a GPU itself, all of it is done there
            window = workers.window()
            for i in range(4):
                window.submit(i, hand_on, workers.ref, i, kind=kind)
            for _, (here, (cpu, network)) in window:
                assert cpu == {here}
                assert network == (gpu_pids if kind == "cpu" else {here}) == gpu_pids


def test_a_gpu_asked_for_and_absent_is_an_error(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(ComputeError, match="none is visible"),
        start_workers(ComputeSettings(device="cuda")),
    ):
        pass


@pytest.mark.parametrize("kind", ["cloud", "slurmm", ""])
def test_an_unknown_place_to_work_is_refused(kind):
    with pytest.raises(ConfigError, match="tcp://host:8786"), start_workers(ComputeSettings(kind=kind)):
        pass


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_refused(monkeypatch):
    monkeypatch.setattr("daskcell.compute.given.CONNECT_SECONDS", 1.0)
    with (
        pytest.raises(ComputeError, match="No Dask scheduler answers"),
        start_workers(ComputeSettings(kind="tcp://127.0.0.1:9")),
    ):
        pass


def test_kind_of_a_task_must_be_known():
    with pytest.raises(ValueError, match="kind"):
        Window(Workers()).submit(0, double, 1, kind="gpu")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from daskcell.compute import start_workers\n"
        "from daskcell.config import ComputeSettings\n"
        "with start_workers(ComputeSettings(workers=1)) as workers:\n"
        "    print('started')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert "__main__" in done.stderr.splitlines()[-1]


@pytest.mark.cluster
@pytest.mark.parametrize(
    "name", ["distributed.comm.require-encryption", "distributed.scheduler.preload", "temporary-directory"]
)
def test_settings_of_a_site_that_keep_workers_from_starting_are_named(name, tmp_path):
    """They were blamed on a script without a guard."""
    import dask

    cause = {"temporary-directory": "/proc/nowhere", "distributed.scheduler.preload": ["no_such_module"]}
    with (
        dask.config.set({name: cause.get(name, True)}),
        pytest.raises(ComputeError, match=rf"did not start \(.*{name}: please check") as refusal,
        start_workers(ComputeSettings(workers=1, wait=30)),
    ):
        pass
    text = str(refusal.value)
    assert "__main__" not in text
    assert any(word in text for word in ("encryption required", "no_such_module", "/proc/nowhere"))


@pytest.mark.cluster
def test_nothing_listens_beyond_this_machine(cluster):
    """Reads the kernel's list of listening sockets: all of ours and our workers' are on 127.0.0.1."""
    inodes = set()
    pids = [os.getpid(), *cluster.client.run(os.getpid).values()]
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.append(fields[1].split(":")[0])
    assert addresses
    assert set(addresses) == {"0100007F"}
