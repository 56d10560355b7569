"""A whole study on one worker labelled GPU and two labelled CPU: every task runs where it belongs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import tifffile
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.diagnostics.plugin import SchedulerPlugin

from daskcell.compute import Window
from daskcell.evaluation.generated import CHANNELS, synthesize_field
from daskcell.pipeline import run

pytestmark = pytest.mark.cluster


class Log(SchedulerPlugin):
    """Which function ran on which worker, how often."""

    def __init__(self, name: str):
        self.name = name
        self.ran: dict[str, Counter[str]] = {}

    def transition(self, key, start, finish, *args, worker=None, **kwargs):
        if finish == "memory":
            function = str(key).rsplit("-", 2)[0]
            self.ran.setdefault(function, Counter())[worker] += 1


def pretend_gpu() -> None:
    """Let this process believe that it has a GPU; what is asked for there is computed on the CPU."""
    import torch

    from daskcell.features import encoders, feature_maps
    from daskcell.models import loading

    network = loading._build_network
    torch.cuda.is_available = lambda: True
    loading._build_network = lambda path, device, dtype: network(path, "cpu", dtype)
    for module in (encoders, feature_maps):
        load = module._load
        module._load = lambda spec, load=load: load(replace(spec, device="cpu"))


def pretend_no_gpu() -> None:
    import torch

    torch.cuda.is_available = lambda: False


def labelled() -> SpecCluster:
    """A worker process labelled GPU and two labelled CPU."""
    options = {"host": "127.0.0.1", "nthreads": 1, "dashboard": False}
    spec = {
        name: {"cls": Nanny, "options": options | {"resources": {label: 1}}}
        for name, label in (("gpu", "GPU"), ("cpu-0", "CPU"), ("cpu-1", "CPU"))
    }
    quiet = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    return SpecCluster(workers=spec, scheduler={"cls": Scheduler, "options": quiet})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for number, side in enumerate((400, 90)):
        field = synthesize_field((side, side), seed=number + 3)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(folder / f"f{number}_{channel}.tif", pixels)
    return folder


@pytest.fixture(scope="module")
def client():
    """Of workers that believe to have a GPU where they are labelled for one."""
    with labelled() as cluster, Client(cluster) as client:
        client.wait_for_workers(3)
        labels = labels_of(client)
        client.run(pretend_no_gpu, workers=[name for name, label in labels.items() if label == "CPU"])
        client.run(pretend_gpu, workers=[name for name, label in labels.items() if label == "GPU"])
        yield client


@pytest.fixture
def log(client, request):
    log = Log(request.node.name)
    client.cluster.scheduler.add_plugin(log)
    yield log
    client.cluster.scheduler.remove_plugin(log.name)


def labels_of(client: Client) -> dict[str, str]:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {address: next(iter(worker["resources"])) for address, worker in workers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["crop", "mask"])
def test_only_workers_labelled_gpu_need_one(client, log, pictures, tmp_path, monkeypatch, pooling):
    """The process that drives the run and the CPU workers find no GPU, as on a cluster's login node."""
    import torch

    settings = {"cluster": {"k": 2}, "features": {"pooling": pooling}}
    expected = run(pictures, tmp_path / "cpu", settings | {"compute": {"block": 256, "kind": "inline"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = [address for address, label in labels_of(client).items() if label == "GPU"]
    compute = {"block": 256, "device": "cuda", "kind": client.cluster.scheduler_address}
    study = run(pictures, tmp_path / "gpu", settings | {"compute": compute})
    # The small slide is one task, which sends away nothing but its network work; the other has four blocks.
    assert log.ran["label_block"].total() == 4
    assert log.ran["run_tiles"].total() > 4
    assert set(log.ran["run_tiles"]) == set(gpu)
    assert not set(log.ran["process_batch"]) & set(gpu)
    assert study.failures == []
    assert set(study.slides) == {"f0", "f1"}
    found, wanted = study.cells(), expected.cells()
    assert len(found) > 50
    assert found.equals(wanted)


@pytest.mark.slow
def test_network_tasks_run_on_gpu_workers_and_all_others_on_cpu_workers(client, log, tmp_path, monkeypatch):
    field = synthesize_field((400, 400), seed=3)
    (tmp_path / "in").mkdir()
    for channel, pixels in zip(CHANNELS, field.channels, strict=True):
        tifffile.imwrite(tmp_path / "in" / f"f_{channel}.tif", pixels)
    kinds: dict[str, set[str]] = {"cpu": set(), "network": set()}
    submit = Window.submit

    def noted(self, key, function, *args, kind="cpu"):
        kinds[kind].add(f"{function.__module__}.{function.__name__}")
        submit(self, key, function, *args, kind=kind)

    monkeypatch.setattr(Window, "submit", noted)
    labels = labels_of(client)
    study = run(tmp_path / "in", tmp_path / "out", {"cluster": {"k": 2}, "compute": {"block": 256}}, client)
    assert study.failures == []
    assert any("_encode" in name for name in kinds["network"])
    assert any("_measure" in name for name in kinds["cpu"])
    names = {kind: {name.rpartition(".")[2] for name in found} for kind, found in kinds.items()}
    assert not names["cpu"] & names["network"]  # else this test could not tell them apart
    seen = {"cpu": set(), "network": set()}
    for function, ran in log.ran.items():
        for kind, found in names.items():
            if function in found:
                seen[kind] |= {labels[worker] for worker in ran}
    assert seen == {"cpu": {"CPU"}, "network": {"GPU"}}
    assert names["network"] | names["cpu"] <= set(log.ran)
