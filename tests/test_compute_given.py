"""Workers of the user's own: checked and set up like ours, put back at the end, and the same results."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace

import dask
import dask.array as da
import numpy as np
import pytest
import tifffile
import torch
from distributed import Client, LocalCluster

import daskcell as dc
from daskcell.compute import start_workers
from daskcell.compute.given import version_difference
from daskcell.config import ComputeSettings
from daskcell.errors import ComputeError

pytestmark = pytest.mark.cluster
QUIET = {"dashboard_address": None, "n_workers": 1, "threads_per_worker": 2}
SETTINGS = {
    "segment": {"method": "watershed", "min_size": 5},
    "features": {"encoder": "tiny"},
    "cluster": {"k": 2},
    "output": {"report": False},
    "compute": {"threads": 1, "block": 256},
}


def threads_and_logs() -> tuple[int, str | None, int]:
    return (
        torch.get_num_threads(),
        os.environ.get("OMP_NUM_THREADS"),
        logging.getLogger("distributed").level,
    )


BOTH_THREADS = threading.Barrier(2)
"""Of a worker: each of its threads takes one of two tasks that wait here."""


def set_torch_threads(_, threads: int) -> tuple[int, str | None, int]:
    """As a user's own task leaves it, in the thread that tasks run in."""
    torch.set_num_threads(threads)
    BOTH_THREADS.wait(60)
    return threads_and_logs()


@pytest.fixture(scope="module")
def inside():
    """A client whose workers are threads of this process."""
    with LocalCluster(processes=False, **QUIET) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def outside():
    """A client whose workers are processes."""
    with LocalCluster(processes=True, **QUIET) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(3)
    for name in "ab":
        y, x = np.mgrid[:300, :300]
        image = np.sin(y / 7.0) * np.sin(x / 9.0) * 90 + 120 + rng.normal(0, 6, (300, 300))
        tifffile.imwrite(path / f"{name}.tif", image.astype(np.uint8))
    return path


def bits(study) -> dict[str, bytes]:
    found = {}
    for kind in ("tables", "features", "clusters", "images"):
        for file in sorted((study.out / kind).rglob("*")):
            if file.is_file():
                found[str(file.relative_to(study.out))] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "study"
    return bits(dc.run(folder, out, SETTINGS | {"compute": {"kind": "inline", "block": 256}}))


@pytest.mark.slow
def test_the_lazy_functions_give_the_same_under_a_client(inside, outside, folder):
    image = dc.open_image(folder / "a.tif").data.rechunk((1, 128, 128))

    def chain():
        x = dc.gaussian(dc.adjust_histogram(image), sigma=1.0)
        labels = dc.segment(x, method="watershed", block=256)
        return np.asarray(labels), dc.measure(labels, image), dc.embed(image, labels)

    labels, cells, features = chain()
    assert labels.max() > 10
    for client in (inside, outside):
        with client.as_current(), dask.config.set(scheduler=client):
            again = chain()
        assert np.array_equal(labels, again[0])
        assert cells.equals(again[1])
        assert np.array_equal(features, again[2])
    clusters = np.arange(labels.max()) % 3
    assert isinstance(dc.overlay(image, da.from_array(labels), clusters), da.Array)


@pytest.mark.parametrize(
    "kind", ["threads", pytest.param("processes", marks=pytest.mark.slow), "cluster", "address"]
)
def test_given_workers_give_the_same_bits_and_are_put_back(kind, inside, outside, folder, expected, tmp_path):
    client = outside if kind == "processes" else inside
    given = {"cluster": client.cluster, "address": client.scheduler.address}.get(kind, client)
    client.gather(client.map(set_torch_threads, range(4), [2] * 4, pure=False))
    before = client.run(threads_and_logs)
    plugins = set(client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.worker_plugins)))
    study = dc.run(folder, tmp_path / "out", SETTINGS, client=given)
    assert not study.failures
    assert bits(study) == expected
    assert client.status == "running"
    assert client.run(threads_and_logs) == before
    after = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.worker_plugins))
    assert set(after) == plugins


def threads_in_a_task(_):
    BOTH_THREADS.wait(60)
    return threads_and_logs()[:2]


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_tasks_of_given_workers_have_the_threads_of_the_settings(where, request):
    """Torch keeps a number for each thread that has used it: setting it elsewhere changes nothing there."""
    client = request.getfixturevalue(where)
    client.gather(client.map(set_torch_threads, range(4), [2] * 4, pure=False))
    with start_workers(ComputeSettings(threads=1), client=client) as workers:
        window = workers.window()
        for i in range(6):
            window.submit(i, threads_in_a_task, i)
        assert set(dict(window).values()) == {(1, "1")}
    left = client.gather(client.map(threads_in_a_task, range(6), pure=False))
    assert {threads for threads, _ in left} == {2}


@pytest.mark.slow
def test_workers_that_come_later_are_set_up_too(outside):
    with LocalCluster(processes=True, **QUIET) as cluster, Client(cluster, set_as_default=False) as client:
        with start_workers(ComputeSettings(threads=3), client=client):
            cluster.scale(2)
            client.wait_for_workers(2, timeout=60)
            assert {found[1] for found in client.run(threads_and_logs).values()} == {"3"}
        assert {found[1] for found in client.run(threads_and_logs).values()} == {"1"}


def test_two_runs_may_share_the_workers(inside):
    with start_workers(client=inside, name="one"):
        with start_workers(ComputeSettings(threads=1), client=inside, name="two"):
            pass
        assert {found[1] for found in inside.run(threads_and_logs).values()} == {"1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("as_address", [False, True])
def test_a_gpu_that_given_workers_do_not_have_is_refused_before_any_work(
    inside, folder, tmp_path, as_address
):
    settings = SETTINGS | {"compute": {"device": "cuda"}}
    given = inside.scheduler.address if as_address else inside
    with pytest.raises(ComputeError, match=r"A GPU was asked for.*compute.device to 'cpu'"):
        dc.run(folder, tmp_path / "out", settings, client=given)
    assert not (tmp_path / "out").exists()


def test_an_error_that_concerns_all_slides_is_not_taken_for_the_death_of_a_worker(
    inside, folder, tmp_path, monkeypatch
):
    from daskcell.pipeline import stages

    def no_gpu_any_more(job, *args):
        raise ComputeError("torch finds no GPU.")

    failing = replace(stages.STAGES["convert"], run=no_gpu_any_more)
    monkeypatch.setitem(stages.STAGES, "convert", failing)
    with pytest.raises(ComputeError, match="torch finds no GPU"):
        dc.run(folder, tmp_path / "out", SETTINGS, client=inside)
    assert not dc.open_study(tmp_path / "out").failures


def test_a_client_that_cannot_be_used_is_refused_in_a_sentence(inside, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("daskcell.compute.given.CONNECT_SECONDS", 0.5)
    closed = Client(inside.cluster, set_as_default=False)
    closed.close()

    async def asynchronous():
        async with Client(inside.scheduler.address, asynchronous=True, set_as_default=False) as client:
            with start_workers(client=client):
                pass

    with pytest.raises(ComputeError, match=r"not connected .it is closed"):
        dc.run(folder, tmp_path / "out", SETTINGS, client=closed)
    with pytest.raises(ComputeError, match=r"client is asynchronous.*asynchronous=False"):
        asyncio.run(asynchronous())
    for wrong in (3, object(), [inside]):
        with pytest.raises(ComputeError, match="client must be a Dask client"):
            dc.run(folder, tmp_path / "out", SETTINGS, client=wrong)
    for wrong in ("tcp://127.0.0.1:9", "nonsense", ""):
        with pytest.raises(ComputeError, match="No Dask scheduler answers"):
            dc.convert(folder / "a.tif", tmp_path / "a.zarr", client=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_client_without_workers_is_waited_for_and_refused_in_a_sentence(folder, tmp_path):
    with LocalCluster(processes=False, **QUIET | {"n_workers": 0}) as cluster, Client(cluster) as client:
        settings = SETTINGS | {"compute": {"wait": 0.2}}
        with pytest.raises(ComputeError, match=r"had no worker within 0 s .compute.wait."):
            dc.run(folder, tmp_path / "out", settings, client=client)
        cluster.adapt(minimum=0, maximum=1)  # starts one as soon as there is a task
        with start_workers(ComputeSettings(wait=60), client=client) as workers:
            assert workers.count == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "sentence"),
    [
        ("__version__ = '0.0.1'", r"has daskcell 0.0.1, and this process"),
        ("import nowhere", "has no daskcell"),
    ],
)
def test_workers_with_another_daskcell_are_refused(package, sentence, folder, tmp_path):
    (tmp_path / "daskcell").mkdir()
    (tmp_path / "daskcell" / "__init__.py").write_text(package)
    options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path)]
    with LocalCluster(processes=False, protocol="tcp", **QUIET | {"n_workers": 0}) as cluster:
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, *options],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            stderr=subprocess.DEVNULL,
        )
        try:
            with Client(cluster, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=60)
                with pytest.raises(ComputeError, match=sentence):
                    dc.convert(folder / "a.tif", tmp_path / "out.zarr", client=client)
        finally:
            worker.kill()
            worker.wait()


def test_versions_are_compared():
    assert version_difference((3, 11, "1"), (3, 11, "1")) is None
    assert version_difference((3, 11, "1"), (3, 12, "1")) == ("Python 3.11", "Python 3.12")
    assert version_difference((3, 11, "1"), (3, 12, "2")) == ("daskcell 1", "daskcell 2")


def run_within_a_task(folder: str, out: str) -> int:
    from distributed import get_client

    # Closed here: Dask keeps the client that it makes for a task while any worker lives in the process.
    with get_client() as client:
        return len(dc.run(folder, out, SETTINGS, client=client).slides)


@pytest.mark.slow
def test_a_run_may_itself_be_a_task_of_the_workers_it_uses(folder, expected, tmp_path):
    with (
        LocalCluster(processes=False, **QUIET | {"threads_per_worker": 1}) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        done = client.submit(run_within_a_task, str(folder), str(tmp_path / "out"))
        assert done.result(timeout=120) == 2
    assert bits(dc.open_study(tmp_path / "out")) == expected
