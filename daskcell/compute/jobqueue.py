"""Workers as jobs of a batch queue, through dask-jobqueue: what is requested, and what the queue reports.

CPU jobs and GPU jobs are entries of one cluster's specification, so both join one scheduler. Whatever the
settings leave open is as the site's Dask YAML says (``jobqueue.slurm`` ...), which is read and never written.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from typing import Any

from daskcell.compute.local import dashboard_options
from daskcell.compute.process import NEEDS_GPU, THREAD_VARIABLES
from daskcell.config import ComputeSettings, JobSettings
from daskcell.errors import ComputeError, ConfigError

SUBMIT = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub", "sge": "qsub"}
_LIST = {
    "slurm": ("squeue", "-h", "-o", "%i %T %r", "-u"),
    "pbs": ("qstat", "-u"),
    "lsf": ("bjobs", "-noheader", "-o", "jobid stat", "-u"),
    "sge": ("qstat", "-u"),
}
"""Commands that list a user's unfinished jobs, the number first; the user's name follows."""
_ONE_GPU = {"slurm": ["--gres=gpu:1"], "lsf": ['-gpu "num=1"']}
"""How a job asks for a GPU where nothing else is said; PBS and SGE have no common way."""
_LONGEST_MARGIN_SECONDS = 300


def job_cluster(settings: ComputeSettings) -> Any:
    """A dask-jobqueue cluster that has no jobs yet: `job_specs` go into its ``worker_spec``.

    Raises
    ------
    ComputeError
        dask-jobqueue or the queue's commands are not here.
    ConfigError
        Neither the settings nor the site's YAML say how large a job is.
    """
    kind = settings.kind
    jobqueue = _jobqueue()
    if shutil.which(SUBMIT[kind]) is None:
        raise ComputeError(
            f"compute.kind is {kind!r}, but the command {SUBMIT[kind]} is not here. Please run on a machine "
            "that may submit jobs."
        )
    options = job_options(settings, settings.jobs, gpu=False)
    scheduler = dict(_site(kind, "scheduler-options") or {})
    if settings.dashboard is not None or "dashboard_address" not in scheduler:
        scheduler |= dashboard_options(settings.dashboard)
    return getattr(jobqueue, f"{kind.upper()}Cluster")(
        **options, scheduler_options=scheduler, name=f"daskcell-{os.getpid()}"
    )


def job_specs(settings: ComputeSettings, cluster: Any) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """For ``cpu`` and ``gpu``: names of the jobs and what `distributed.SpecCluster` makes them from."""
    specs = {"cpu": [(f"cpu-{number}", cluster.new_spec) for number in range(settings.jobs.count)]}
    if settings.gpu_jobs is not None:
        asked = _inherit(settings.gpu_jobs, settings.jobs)
        # Network, protocol and certificates are the cluster's.
        options = cluster.new_spec["options"] | job_options(settings, asked, gpu=True)
        spec = {"cls": cluster.new_spec["cls"], "options": options}
        specs["gpu"] = [(f"gpu-{number}", spec) for number in range(asked.count)]
    return specs


def job_options(settings: ComputeSettings, job: JobSettings, *, gpu: bool) -> dict[str, Any]:
    """Keyword arguments of dask-jobqueue's cluster (CPU) or job (GPU) class."""
    kind, threads = settings.kind, settings.threads
    _jobqueue()  # brings its defaults into Dask's configuration
    cores = job.cores or (threads if gpu else _site(kind, "cores"))
    memory = job.memory or _site(kind, "memory")
    for name, value in (("cores", cores), ("memory", memory)):
        if value is None:
            raise ConfigError(
                f"How large a {kind} job is must be said: please set compute.jobs.{name}, or {name} in the "
                f"section jobqueue.{kind} of your Dask settings (~/.config/dask/jobqueue.yaml)."
            )
    if cores < threads:
        raise ConfigError(f"A job has {cores} cores, but compute.threads is {threads}. Please change one.")
    prologue = _given(job.job_script_prologue, kind, "job-script-prologue", "env-extra")
    if gpu and settings.network_device == "cuda":
        prologue.append(f"export {NEEDS_GPU}=1")
    directives = _given(job.job_extra_directives, kind, "job-extra-directives", "job-extra")
    if gpu:
        directives = [*directives, *_gpu_directives(settings)]
    options: dict[str, Any] = {
        "cores": cores,
        "processes": 1 if gpu else cores // threads,
        "memory": memory,
        "walltime": job.walltime,
        "queue": job.queue,
        "project" if kind in ("lsf", "sge") else "account": job.account,
        "interface": job.interface,
        "log_directory": job.log_directory
        or _site(kind, "log-directory")
        or os.path.abspath("daskcell-jobs"),
        "job_extra_directives": directives,
        # Ours come last, since many a module sets OMP_NUM_THREADS to all cores.
        "job_script_prologue": [*prologue, *(f"export {name}={threads}" for name in THREAD_VARIABLES)],
        "worker_extra_args": _worker_arguments(settings, job, gpu),
    } | job.options
    return {name: value for name, value in options.items() if value is not None}


def _worker_arguments(settings: ComputeSettings, job: JobSettings, gpu: bool) -> list[str]:
    kind = settings.kind
    arguments = _given(None, kind, "worker-extra-args", "extra")
    # The last one counts. One task at a time, whatever the number of threads.
    arguments += ["--nthreads", "1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    arguments += ["--worker-class", "daskcell.compute._distributed.JobWorker"]
    walltime = job.walltime or _site(kind, "walltime")
    if walltime is not None and "--lifetime" not in arguments:
        arguments += lifetime(walltime_seconds(kind, str(walltime)))
    if settings.gpu_jobs is not None:
        arguments += ["--resources", "GPU=1" if gpu else "CPU=1"]
    return arguments


def _gpu_directives(settings: ComputeSettings) -> list[str]:
    own = settings.gpu_jobs
    if own is None or own.job_extra_directives or "resource_spec" in own.options:
        return []
    if settings.kind not in _ONE_GPU:
        raise ConfigError(
            f"How a GPU is asked for on {settings.kind} must be said: please set "
            "compute.gpu_jobs.job_extra_directives or compute.gpu_jobs.options.resource_spec."
        )
    return _ONE_GPU[settings.kind]


def lifetime(seconds: int) -> list[str]:
    """Options that stop a worker in good order before the walltime; staggered, so that some are left."""
    margin = min(_LONGEST_MARGIN_SECONDS, seconds // 5)
    return ["--lifetime", f"{seconds - margin}s", "--lifetime-stagger", f"{margin // 2}s"]


def walltime_seconds(kind: str, text: str) -> int:
    """A walltime as the queue `kind` reads it.

    >>> [walltime_seconds("slurm", text) for text in ("90", "90:00", "04:00:00", "1-00:30")]
    [5400, 5400, 14400, 88200]
    >>> walltime_seconds("lsf", "04:00"), walltime_seconds("pbs", "90")
    (14400, 90)
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text.strip())
    if found is None:
        raise ConfigError(f"The walltime {text!r} is not a time such as 04:00:00.")
    days, parts = found[1], found[2].split(":")
    # What the first number counts: hours, or with fewer numbers what the queue says.
    if len(parts) == 3 or (days and kind == "slurm") or (kind == "lsf" and len(parts) == 2):
        units = [3600, 60, 1]
    elif kind in ("slurm", "lsf") or len(parts) == 2:
        units = [60, 1]
    else:
        units = [1]
    clock_seconds = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 86400 + clock_seconds


def listed_jobs(kind: str) -> dict[str, str] | None:
    """What the queue says of this user's unfinished jobs, by number; None if it does not answer."""
    try:
        done = subprocess.run(
            [*_LIST[kind], getpass.getuser()], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    rows = re.findall(r"^\s*(\d+)\S*[ \t]*(.*?)\s*$", done.stdout, re.MULTILINE)
    return dict(rows)


def reason(error: BaseException) -> str:
    """What the queue's own command said, out of dask-jobqueue's longer text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[lines.index("stderr:") + 1 :] if "stderr:" in lines else lines[:1]
    return " ".join(said)[:300].rstrip(".") or type(error).__name__


def _inherit(job: JobSettings, base: JobSettings) -> JobSettings:
    """`job`, with `base` where it says nothing; how many there are and of how many cores is its own."""
    own = {name: value for name, value in job if value is not None}
    taken = base.model_dump(exclude={"cores", "minimum"})
    return JobSettings.model_validate(taken | own | {"options": base.options | job.options})


def _given(own: list[str] | None, kind: str, name: str, old_name: str) -> list[str]:
    """A list from the settings, else from the site's YAML, under its present or its former name."""
    return list(own if own is not None else _site(kind, name) or _site(kind, old_name) or [])


def _site(kind: str, name: str) -> Any:
    import dask

    return dask.config.get(f"jobqueue.{kind}.{name}", None)


def _jobqueue() -> Any:
    try:
        import dask_jobqueue
    except ImportError:
        raise ComputeError(
            "Jobs need dask-jobqueue, which is not installed. Please do: pip install 'daskcell[hpc]'."
        ) from None
    return dask_jobqueue
