"""Workers as jobs of a queue: what is asked for, what happens when jobs end, fail or do not come."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest
from fake_queue import FakeQueue

from daskcell.compute import autoscaler as autoscaler_module
from daskcell.compute import start_workers
from daskcell.compute.autoscaler import JobAutoscaler
from daskcell.compute.jobqueue import job_cluster, job_options, job_specs, lifetime, walltime_seconds
from daskcell.config import ComputeSettings, parse_config
from daskcell.errors import ComputeError, ConfigError

pytestmark = [pytest.mark.alone, pytest.mark.cluster]

pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")
TESTS = str(Path(__file__).parent)


def settings(kind="slurm", **compute):
    jobs = {"cores": 2, "memory": "2GB", "interface": "lo"} | compute.pop("jobs", {})
    return ComputeSettings(kind=kind, jobs=jobs, **compute)


@pytest.fixture
def queue(request, tmp_path, monkeypatch):
    """A fake queue; its kind is the test's parameter `kind`, else Slurm."""
    kind = request.node.callspec.params.get("kind", "slurm") if hasattr(request.node, "callspec") else "slurm"
    fake = FakeQueue(kind, tmp_path / "queue")
    monkeypatch.setenv("PATH", str(fake.bin), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", TESTS)
    monkeypatch.chdir(tmp_path)
    yield fake
    fake.close()


@pytest.fixture
def hurried(monkeypatch):
    """A autoscaler that looks more often than is polite."""
    for name in ("_ASK_SECONDS", "_LOOK_SECONDS", "_AGAIN_SECONDS"):
        monkeypatch.setattr(autoscaler_module, name, 0.1)


def scripts(settings: ComputeSettings) -> dict[str, str]:
    """Job scripts by kind of job; nothing is submitted."""
    cluster = job_cluster(settings)
    try:
        specs = job_specs(settings, cluster)
        return {
            label: jobs[0][1]["cls"]("tcp://1.2.3.4:5", name="n", **jobs[0][1]["options"]).job_script()
            for label, jobs in specs.items()
        }
    finally:
        cluster.close()


def threads_here(_):
    import numba
    import torch
    from threadpoolctl import threadpool_info

    pools = {pool["num_threads"] for pool in threadpool_info()}
    return os.getpid(), torch.get_num_threads(), pools, numba.config.NUMBA_NUM_THREADS


# -- what is asked for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "seconds"),
    [
        ("slurm", "04:00:00", 14400),
        ("slurm", "1-00:30:00", 88200),
        ("slurm", "2-00", 172800),
        ("slurm", "90:30", 5430),  # minutes and seconds
        ("slurm", "90", 5400),
        ("lsf", "04:00", 14400),  # hours and minutes
        ("lsf", "90", 5400),
        ("pbs", "04:00:00", 14400),
        ("pbs", "90:00", 5400),
        ("sge", "3600", 3600),
    ],
)
def test_walltimes_are_read_as_the_queue_reads_them(kind, text, seconds):
    assert walltime_seconds(kind, text) == seconds


@pytest.mark.parametrize("text", ["soon", "4h", "1:2:3:4", "-1", "x-1:00", ""])
def test_a_walltime_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="is not a time such as 04:00:00"):
        walltime_seconds("slurm", text)


@pytest.mark.parametrize("total", [60, 600, 14400, 172800])
def test_workers_leave_before_their_walltime(total):
    options = lifetime(total)
    middle, spread = (int(options[i].removesuffix("s")) for i in (1, 3))
    assert total > middle + spread > middle - spread > 0


def test_cpu_and_gpu_jobs_ask_for_what_was_said_and_join_one_scheduler(queue):
    own = {"cores": 8, "memory": "20GB", "account": "me", "queue": "day", "walltime": "04:00:00"}
    asked = settings(threads=2, jobs=own, gpu_jobs={"queue": "gpu", "memory": "40GB"})
    found = scripts(asked)
    for line in (
        "#SBATCH -A me",
        "#SBATCH -p day",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=19G",
        "#SBATCH -t 04:00:00",
        "--nworkers 4",
        "--resources CPU=1",
        "--lifetime 14100s",
        "export NUMBA_NUM_THREADS=2",
    ):
        assert line in found["cpu"]
    for line in (
        "#SBATCH -A me",
        "#SBATCH -p gpu",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --mem=38G",
        "#SBATCH --gres=gpu:1",
        "--resources GPU=1",
        "export OMP_NUM_THREADS=2",
        "export DASKCELL_NEEDS_GPU=1",
    ):
        assert line in found["gpu"]
    assert "--nworkers" not in found["gpu"]
    assert "NEEDS_GPU" not in found["cpu"]
    for script in found.values():  # the last one counts
        assert re.findall(r"--nthreads (\d+)", script)[-1] == "1"


def test_without_gpu_jobs_no_worker_is_labelled(queue):
    assert "--resources" not in scripts(settings())["cpu"]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("pbs", ["#PBS -q day", "#PBS -A me", "#PBS -l walltime=01:00:00", "select=1:ncpus=2:mem=1908MB"]),
        ("lsf", ["#BSUB -q day", '#BSUB -P "me"', "#BSUB -W 01:00", "#BSUB -n 2"]),
        ("sge", ["#$ -q day", "#$ -P me", "#$ -l h_rt=01:00:00"]),
    ],
)
def test_other_queues_are_asked_in_their_own_words(kind, lines, queue):
    walltime = "01:00" if kind == "lsf" else "01:00:00"
    found = scripts(settings(kind, jobs={"queue": "day", "account": "me", "walltime": walltime}))["cpu"]
    for line in [*lines, "--lifetime 3300s"]:
        assert line in found


@pytest.mark.parametrize("kind", ["pbs", "sge"])
def test_where_there_is_no_common_way_to_ask_for_a_gpu_it_must_be_said(kind, queue):
    with pytest.raises(ConfigError, match="How a GPU is asked for on"):
        scripts(settings(kind, gpu_jobs={}))
    spec = "select=1:ncpus=1:ngpus=1:mem=8gb"
    assert spec in scripts(settings(kind, gpu_jobs={"options": {"resource_spec": spec}}))["gpu"]


def test_the_size_of_a_job_must_be_said_somewhere(queue):
    with pytest.raises(ConfigError, match=r"compute.jobs.cores, or cores in the section jobqueue.slurm"):
        job_options(ComputeSettings(kind="slurm"), ComputeSettings().jobs, gpu=False)
    with dask.config.set({"jobqueue.slurm.cores": 4, "jobqueue.slurm.memory": "8GB"}):
        options = job_options(ComputeSettings(kind="slurm"), ComputeSettings().jobs, gpu=False)
    assert (options["cores"], options["processes"], options["memory"]) == (4, 4, "8GB")


YAML = """\
jobqueue:
  slurm:
    cores: 6
    memory: 12GB
    queue: sites-own
    account: sites-account
    walltime: '02:00:00'
    job-script-prologue: [module load something]
    job-extra-directives: [--qos=low]
    worker-extra-args: [--preload, sites_module]
    scheduler-options: {dashboard_address: ':8790'}
distributed:
  nanny:
    pre-spawn-environ: {SITES_OWN: '1'}
"""


def test_the_sites_yaml_is_honoured_and_never_written_to(queue, tmp_path):
    folder = tmp_path / "dask"
    folder.mkdir()
    (folder / "site.yaml").write_text(YAML)
    before = (folder / "site.yaml").stat().st_mtime_ns
    code = (
        "import dask, os, sys\n"
        "from test_compute_jobs import scripts\n"
        "from daskcell.compute.jobqueue import job_cluster\n"
        "from daskcell.compute import start_workers\n"
        "from daskcell.config import ComputeSettings\n"
        "settings = ComputeSettings(kind='slurm', jobs={'account': 'mine'})\n"
        "print(scripts(settings)['cpu'])\n"
        "print('dashboard', job_cluster(settings).scheduler_spec['options'])\n"
        "if __name__ == '__main__':\n"
        "    with start_workers(ComputeSettings(workers=1)) as workers:\n"
        "        print('worker has', *workers.client.run(os.getenv, 'SITES_OWN').values())\n"
        "    print('kept', dask.config.get('distributed.nanny.pre-spawn-environ'))\n"
    )
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"DASK_CONFIG": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "#SBATCH -p sites-own",
        "#SBATCH -A mine",
        "--cpus-per-task=6",
        "-t 02:00:00",
        "module load something",
        "--qos=low",
        "--preload sites_module",
        "'dashboard_address': ':8790'",
        "worker has 1",
        "kept {'SITES_OWN': '1'",
    ):
        assert text in done.stdout
    assert (folder / "site.yaml").read_text() == YAML
    assert (folder / "site.yaml").stat().st_mtime_ns == before
    assert "daskcell" not in "".join(path.read_text() for path in folder.iterdir())


# -- jobs that run -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "pbs", "lsf", "sge"])
def test_jobs_become_workers_and_are_cancelled_at_the_end(kind, queue):
    """On every queue; with threads as asked for in each worker, whatever the environment says."""
    os.environ["OMP_NUM_THREADS"] = "7"  # put back by `queue`'s monkeypatch of the environment
    gpu = {"job_extra_directives": ["-l gpu=1"]} if kind == "slurm" else None
    asked = settings(kind, threads=2, device="cpu", gpu_jobs=gpu, jobs={"cores": 4})
    with start_workers(asked) as workers:
        assert workers.labels == ({"CPU", "GPU"} if gpu else set())
        workers.client.wait_for_workers(2 + bool(gpu), timeout=60)
        window = workers.window(3)
        for number in range(12):
            window.submit(number, threads_here, number)
        found = [result for _, result in window]
        assert len(queue.alive) == 1 + bool(gpu)
    assert {result[1:3] for result in ((p, t, tuple(n), b) for p, t, n, b in found)} == {(2, (2,))}
    assert {numba for *_, numba in found} == {2}
    assert len({pid for pid, *_ in found}) == 2  # the GPU job takes none of these
    deadline = time.monotonic() + 10
    while queue.alive and time.monotonic() < deadline:
        time.sleep(0.1)
    assert queue.alive == []


def test_local_workers_leave_nothing_that_silences_jobs(queue):
    """A nanny puts variables into its parent's environment; jobs started after it would inherit them."""
    before = dict(os.environ)
    with start_workers(ComputeSettings(workers=1)):
        assert os.environ["DASK_LOGGING__DISTRIBUTED"] == "critical"  # control: it is there meanwhile
    assert dict(os.environ) == before


def test_a_queue_that_is_not_here_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ComputeError, match="the command sbatch is not here"), start_workers(settings()):
        pass


def test_a_job_that_is_refused_is_an_error_in_the_queues_words(queue):
    (queue.folder / "refuse").write_text("sbatch: error: invalid partition specified: nowhere\n")
    with pytest.raises(ComputeError, match=r"invalid partition specified: nowhere\. Please check"):
        start_workers(settings()).__enter__()
    assert queue.jobs == []


def test_jobs_that_stay_in_the_queue_are_an_error_after_a_while(queue):
    (queue.folder / "hold").touch()
    told = []
    started = time.monotonic()
    with pytest.raises(ComputeError) as caught:
        start_workers(settings(wait=2), told.append).__enter__()
    assert 2 <= time.monotonic() - started < 12
    assert "no worker on slurm within 2 s (compute.wait); jobs: 1 PENDING None" in str(caught.value)
    assert not list(queue.folder.glob("*.held"))  # cancelled


def test_jobs_that_end_at_once_are_an_error_before_any_work(queue, hurried):
    with pytest.raises(ComputeError, match=r"3 CPU jobs of slurm failed .* before a worker came up. Please"):
        start_workers(settings(jobs={"options": {"python": "/bin/false"}})).__enter__()
    assert len(queue.jobs) == 3


@pytest.mark.slow
def test_a_run_whose_jobs_come_no_more_ends_with_the_reason(queue, hurried):
    with start_workers(settings(jobs={"cores": 1})) as workers:
        (queue.folder / "refuse").write_text("sbatch: error: the account is used up\n")
        queue.close()
        window = workers.window()
        window.submit(1, threads_here, 1)
        with pytest.raises(ComputeError, match=r"3 CPU jobs of slurm .* the account is used up. The same"):
            list(window)
        assert not workers.alive


# -- what the autoscaler does, without processes -----------------------------------------------------------


class Cluster:
    """Does what the autoscaler needs of a dask-jobqueue cluster; jobs are numbers."""

    def __init__(self):
        self.worker_spec = {}
        self.workers = {}
        self.submitted = 0
        self.scheduler = SimpleNamespace(workers={}, unrunnable={}, queued=[])

    def sync(self, function):
        return asyncio.run(function())

    def __await__(self):
        for name in set(self.workers) - set(self.worker_spec):
            del self.workers[name]
        for name in sorted(set(self.worker_spec) - set(self.workers)):
            self.submitted += 1
            self.workers[name] = SimpleNamespace(job_id=str(self.submitted))
        return self
        yield

    def arrive(self, *names, busy=0):
        for name in names:
            tasks = [SimpleNamespace(resource_restrictions=None)] * busy
            self.scheduler.workers[name] = SimpleNamespace(name=name, processing=tasks)

    def leave(self, *names):
        for name in names:
            del self.scheduler.workers[name]


class World:
    """A autoscaler over a fake cluster, queue and clock."""

    def __init__(self, monkeypatch, minimum=2, maximum=2):
        self.cluster, self.now, self.gone, self.told, self.answers = Cluster(), 1000.0, set(), [], True
        specs = {"cpu": [(f"cpu-{number}", {}) for number in range(maximum)]}
        monkeypatch.setattr(autoscaler_module, "listed_jobs", self.listed)
        monkeypatch.setattr(autoscaler_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.autoscaler = JobAutoscaler(self.cluster, "slurm", specs, {"cpu": minimum}, self.told.append)
        self.gave_up = []
        self.autoscaler.give_up = lambda: self.gave_up.append(True)
        self.autoscaler.ask()

    def listed(self, kind):
        jobs = {job.job_id: "RUNNING" for job in self.cluster.workers.values()}
        return {n: s for n, s in jobs.items() if n not in self.gone} if self.answers else None

    def look(self, seconds=6.0):
        self.now += seconds
        self.autoscaler.look()

    @property
    def jobs(self):
        return {name: job.job_id for name, job in sorted(self.cluster.workers.items())}


@pytest.fixture
def world(monkeypatch):
    return lambda **given: World(monkeypatch, **given)


def test_a_job_that_waits_in_the_queue_is_left_alone(world):
    here = world()
    for _ in range(100):
        here.look(60)
    assert here.jobs == {"cpu-0": "1", "cpu-1": "2"}
    assert here.autoscaler.trouble is None
    assert "No CPU worker at present; jobs: 2 RUNNING." in here.told


def test_a_job_that_ended_is_asked_for_again(world):
    here = world()
    here.cluster.arrive("cpu-0", "cpu-1")
    here.look()
    here.cluster.leave("cpu-1")
    here.look()
    assert here.jobs == {"cpu-0": "1", "cpu-1": "2"}  # its nanny may yet restart it
    here.gone.add("2")
    here.look()
    assert here.jobs == {"cpu-0": "1", "cpu-1": "3"}


def test_where_the_queue_does_not_answer_a_job_is_gone_after_two_minutes(world):
    here = world()
    here.cluster.arrive("cpu-0", "cpu-1")
    here.look()
    here.answers = False
    here.cluster.leave("cpu-1")
    here.look(100)
    assert here.jobs["cpu-1"] == "2"
    here.look(30)
    assert here.jobs["cpu-1"] == "3"


def test_jobs_that_fail_are_asked_for_ever_less_often_and_then_no_more(world):
    here = world(minimum=1, maximum=1)
    times = []
    while here.autoscaler.trouble is None:
        here.gone.add(str(here.cluster.submitted))
        before = here.cluster.submitted
        here.look(1.0)
        if here.cluster.submitted > before:
            times.append(here.now)
    assert here.cluster.submitted == 3
    assert "3 CPU jobs of slurm failed" in here.autoscaler.trouble
    assert here.gave_up


def test_failing_jobs_are_no_trouble_while_others_work(world):
    here = world()
    here.cluster.arrive("cpu-0")
    for _ in range(200):
        here.gone.add(here.jobs.get("cpu-1"))
        here.look(10)
    assert here.autoscaler.trouble is None
    assert 3 < here.cluster.submitted < 20  # over 2000 s


def test_jobs_follow_the_work_between_fewest_and_all(world):
    here = world(minimum=1, maximum=4)
    assert list(here.jobs) == ["cpu-0"]
    here.cluster.arrive("cpu-0", busy=3)
    here.look()
    assert list(here.jobs) == ["cpu-0", "cpu-1", "cpu-2"]
    here.cluster.arrive("cpu-0", "cpu-1", "cpu-2", busy=9)
    here.look()
    assert len(here.jobs) == 4
    here.cluster.arrive("cpu-0", "cpu-1", "cpu-3")
    here.cluster.arrive("cpu-2", busy=1)
    here.look(30)
    assert len(here.jobs) == 4  # work may come back
    here.look(61)
    assert list(here.jobs) == ["cpu-2"]  # the one that is at work


def test_the_queue_is_not_asked_while_all_workers_are_there(queue, hurried):
    with start_workers(settings(jobs={"cores": 1})):
        time.sleep(1)
        asked = queue.folder / "asked"
        before = asked.read_text() if asked.exists() else ""
        time.sleep(1)
        assert (asked.read_text() if asked.exists() else "") == before


def test_gpus_on_a_queue_need_gpu_jobs():
    with pytest.raises(ConfigError, match="device 'cuda' on slurm needs gpu_jobs"):
        parse_config({"compute": {"kind": "slurm", "device": "cuda"}})
