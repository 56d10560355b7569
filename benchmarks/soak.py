"""Kill a study again and again, at random moments, and compare every file with an undisturbed run.

A worker, the scheduler or the client is killed with SIGKILL; after each death the same command is given again
(with a new scheduler, where that died), until the study is done. ``--local``: workers and scheduler are the
run's own; else they are processes of their own (`dask scheduler`, `dask worker`), as on a cluster.

    python benchmarks/soak.py --kills 30
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tifffile

from daskcell.evaluation.generated import CHANNELS, synthesize_field

WORKERS = 2
SETTINGS = ["cluster.k=3", "compute.block=256", "output.preprocessed=true"]


def pictures(folder: Path, sides: list[int]) -> Path:
    folder.mkdir(parents=True)
    for number, side in enumerate(sides):
        field = synthesize_field((side, side), seed=number)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(folder / f"field{number}_{channel}.tif", pixels)
    return folder


def digests(out: Path) -> dict[str, str]:
    """Digest of every file but the ledger, which holds times, and the settings, which tell where it ran."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] not in ("ledger", "study.json")
    }


class Cluster:
    """A scheduler and workers as processes of their own."""

    def __init__(self, scratch: Path):
        self.file = scratch / "scheduler.json"
        self.scratch = scratch
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        self.repair()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def repair(self) -> None:
        """Start what is not there; without its scheduler, a worker is no use."""
        scheduler = self.processes.get("scheduler")
        if scheduler is None or scheduler.poll() is not None:
            self.__exit__()
            self.file.unlink(missing_ok=True)
            self.start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
            while not self.file.exists():
                time.sleep(0.1)
        for number in range(WORKERS):
            worker = self.processes.get(f"worker{number}")
            if worker is None or worker.poll() is not None:
                options = ("--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard")
                self.start(f"worker{number}", "worker", *options, "--local-directory", str(self.scratch))

    def start(self, name: str, kind: str, *options: str) -> None:
        command = [sys.executable, "-m", "distributed.cli.dask_" + kind, "--scheduler-file", str(self.file)]
        self.processes[name] = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    @property
    def address(self) -> str:
        return json.loads(self.file.read_text())["address"]

    def victim(self, kind: str, chance: random.Random) -> int | None:
        if kind == "scheduler":
            return self.processes["scheduler"].pid
        nanny = self.processes[f"worker{chance.randrange(WORKERS)}"].pid
        return chance.choice([nanny, *children(nanny)])  # the nanny, or the process that works


def children(pid: int) -> list[int]:
    """Processes that `pid` started to work for it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == pid and "spawn_main" in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
    return found


def run(folder: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "daskcell", "run", str(folder), "-o", str(out), "--quiet", *options]
    for setting in SETTINGS:
        command += ["--set", setting]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def soak(
    kills: int, seed: int, sides: list[int], local: bool, kinds: Sequence[str] = ()
) -> dict[str, object]:
    """Kill until `kills` have struck, `kinds` in turn or any; returns counts, and files that differ."""
    chance = random.Random(seed)
    struck: Counter[str] = Counter()
    different: set[str] = set()
    studies = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        folder = pictures(scratch / "in", sides)
        whole = run(folder, scratch / "whole", "--workers", str(WORKERS))
        output, _ = whole.communicate()
        if whole.returncode:
            raise SystemExit(output)
        calm = time.monotonic() - began
        expected = digests(scratch / "whole")
        cluster = None if local else stack.enter_context(Cluster(scratch))
        while struck.total() < kills:
            out = scratch / f"study{studies}"
            studies += 1
            done, fresh = False, True
            while not done:
                if cluster is not None:
                    cluster.repair()
                where = ("--workers", str(WORKERS)) if cluster is None else ("--compute", cluster.address)
                start = time.monotonic()
                process = run(folder, out, *where)
                until = start + chance.uniform(0.15, 1.1) * calm
                while process.poll() is None and time.monotonic() < until:
                    time.sleep(0.05)
                if process.poll() is not None:
                    if fresh:  # nobody was struck: we waited too long
                        calm = min(calm, time.monotonic() - start)
                elif struck.total() < kills:
                    any_kind = ["worker", "client"] + ["scheduler"] * (cluster is not None)
                    kind = kinds[struck.total() % len(kinds)] if kinds else chance.choice(any_kind)
                    victim = process.pid
                    if kind != "client":
                        victims = children(process.pid) if cluster is None else None
                        victim = (
                            cluster.victim(kind, chance) if cluster else chance.choice(victims or [victim])
                        )
                        kind = "client" if victim == process.pid else kind
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                        struck[kind] += 1
                    print(f"{time.monotonic() - began:6.0f} s  {kind} killed", file=sys.stderr, flush=True)
                output, _ = process.communicate()
                done, fresh = process.returncode == 0, False
                if process.returncode not in (0, 1, 2, -signal.SIGKILL) or "Traceback" in output:
                    failures = out / "failures.jsonl"
                    output += failures.read_text() if failures.exists() else ""
                    raise SystemExit(f"exit code {process.returncode}:\n{output}")
            found = digests(out)
            wrong = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
            print(f"study {studies} is done, {len(wrong)} files differ", file=sys.stderr, flush=True)
            different |= wrong
    return {
        "kills": dict(struck),
        "studies": studies,
        "files": len(expected),
        "different": sorted(different),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], choices=["worker", "scheduler", "client"])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 256, 600])
    parser.add_argument("--local", action="store_true", help="the run's own workers, no scheduler of its own")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = soak(options.kills, options.seed, options.sides, options.local, options.kinds)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:10} {value}")
    raise SystemExit(bool(result["different"]))


if __name__ == "__main__":
    main()
