"""Run a study on a Slurm cluster through dask-jobqueue; see slurm.md.

python deploy/slurm.py PICTURES -o STUDY --jobs 8 --walltime 04:00:00
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from daskcell import pipeline
from daskcell.errors import DaskcellError
from daskcell.progress import Lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("-c", "--config", help="settings of daskcell (YAML)")
    parser.add_argument("--jobs", type=int, default=4, help="most CPU jobs at a time")
    parser.add_argument("--cores", type=int, default=8, help="cores of a CPU job: so many worker processes")
    parser.add_argument("--memory", default="32GB", help="memory of a CPU job")
    parser.add_argument("--gpu-jobs", type=int, default=0, help="GPU jobs, one GPU each")
    parser.add_argument("--gpu-partition", help="partition of the GPU jobs")
    parser.add_argument("--gpu-memory", default="32GB")
    parser.add_argument("--walltime", default="04:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--interface", help="network interface that the nodes share, such as ib0")
    parser.add_argument(
        "--kind", default="slurm", choices=["slurm", "local"], help="local: jobs are processes here"
    )
    parser.add_argument("--print", action="store_true", help="show the job scripts and submit nothing")
    return parser.parse_args(arguments)


def seconds(walltime: str) -> int:
    """``HH:MM:SS`` or ``D-HH:MM:SS`` in seconds."""
    days, _, clock = walltime.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    while len(parts) < 3:
        parts.append(0)
    return int(days or 0) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def lifetime(walltime: str) -> list[str]:
    """Options that stop a worker in good order before Slurm kills it; staggered, so that some are left."""
    total = seconds(walltime)
    margin = min(300, total // 5)
    return ["--lifetime", f"{total - margin}s", "--lifetime-stagger", f"{margin // 2}s"]


def cpu_options(args: argparse.Namespace) -> dict[str, Any]:
    """What dask-jobqueue is told about CPU jobs; None leaves it to the site's own YAML."""
    extra = lifetime(args.walltime)
    if args.gpu_jobs:
        # With GPU workers on the same scheduler, all other work must be told where to go.
        extra += ["--resources", "CPU=1"]
    options = {
        "cores": args.cores,
        "processes": args.cores,
        "memory": args.memory,
        "walltime": args.walltime,
        "queue": args.partition,
        "account": args.account,
        "interface": args.interface,
        "worker_extra_args": extra,
        "scheduler_options": {"dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }
    return {name: value for name, value in options.items() if value is not None}


def gpu_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same for GPU jobs: one worker and one GPU each."""
    options = cpu_options(args) | {
        "cores": 1,
        "processes": 1,
        "memory": args.gpu_memory,
        "queue": args.gpu_partition or args.partition,
        "worker_extra_args": [*lifetime(args.walltime), "--resources", "GPU=1"],
        "job_extra_directives": ["--gres=gpu:1"],
    }
    return {name: value for name, value in options.items() if value is not None}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    from dask_jobqueue import SLURMCluster
    from dask_jobqueue.local import LocalCluster
    from distributed import Client

    kind: Any = SLURMCluster if args.kind == "slurm" else LocalCluster
    cpu = cpu_options(args)
    if args.kind == "local":
        cpu = {name: value for name, value in cpu.items() if name not in ("walltime", "queue", "account")}
    with kind(**cpu) as cluster:
        scripts = [gpu_script(kind, args, cluster.scheduler_address)] if args.gpu_jobs else []
        if args.print:
            print("\n".join([cluster.job_script(), *scripts]))
            return 0
        for script in scripts:
            submit(script, args.gpu_jobs)
        cluster.adapt(minimum_jobs=1, maximum_jobs=args.jobs)
        with Client(cluster) as client, Lines(30) as progress:
            try:
                study = pipeline.run(args.inputs, args.out, args.config, client, progress=progress)
            except DaskcellError as error:
                print(f"daskcell: {error}", file=sys.stderr)
                return 2
    print(f"{len(study.slides)} slides: {study.out}")
    return 3 if study.failures else 0


def gpu_script(kind: Any, args: argparse.Namespace, address: str) -> str:
    """Job script of a GPU worker that joins the scheduler at `address`."""
    with kind(**gpu_options(args)) as other:
        script = other.job_script().replace(other.scheduler_address, address)
    # All jobs run this script, and a scheduler refuses a second worker of one name.
    return script.replace(" --name dummy-name", "")


def submit(script: str, count: int) -> None:
    """Hand a job script to Slurm, `count` times."""
    import subprocess

    for _ in range(count):
        subprocess.run(["sbatch"], input=script, text=True, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
