"""Killed at any moment, the same command continues and ends with the same bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tifffile

from daskcell.evaluation.generated import CHANNELS, synthesize_field
from daskcell.study import Study

OPTIONS = ["--set", "cluster.k=3", "--set", "compute.block=256", "--set", "output.preprocessed=true"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, side in enumerate((256, 256, 600)):  # the last is driven block by block
        field = synthesize_field((side, side), seed=number)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(folder / f"field{number}_{channel}.tif", pixels)
    return folder


def start(
    pictures: Path, out: Path, *options: str, python: Sequence[str] = ("-m", "daskcell")
) -> subprocess.Popen:
    command = [sys.executable, *python, "run", str(pictures), "-o", str(out), "--interval", "1"]
    return subprocess.Popen(
        [*command, *OPTIONS, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


KILLING_ITSELF = """
import os, signal, sys
from daskcell.cli import main
from daskcell.pipeline.progress import Progress

slide, stage, least = sys.argv.pop(1), sys.argv.pop(1), float(sys.argv.pop(1))
reached = Progress.reached

def killing(self, *at):
    if at[:2] == (slide, stage) and at[2] >= least:
        os.kill(os.getpid(), signal.SIGKILL)
    reached(self, *at)

Progress.reached = killing
main()
"""


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def results(out: Path) -> dict[str, str]:
    """Digest of every file of a study but the ledger, which holds times."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] != "ledger"
    }


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "study"
    finish(start(pictures, out, "--workers", "2"))
    return results(out)


def finish_here_and_compare(pictures: Path, out: Path, undisturbed: dict[str, str]) -> None:
    """Without workers, which is faster and gives the same bytes."""
    finish(start(pictures, out, "--compute", "inline"))
    found = results(out)
    assert found.keys() == undisturbed.keys()
    changed = {name for name in found if found[name] != undisturbed[name]}
    assert changed == {"study.json"}  # it tells how the run was computed


@pytest.mark.slow
def test_one_process_gives_the_same_bytes_as_workers(pictures, undisturbed, tmp_path):
    finish_here_and_compare(pictures, tmp_path / "study", undisturbed)


KILLS = [
    ("inline", "field0", "segment", 0.2),
    ("inline", "field2", "convert", 0.0),
    ("local", "field2", "segment", 0.6),
    ("inline", "field2", "describe", 0.01),
    ("inline", "", "cluster", 0.01),
    ("inline", "field1", "paint", 0.3),
]
"""Where the run works; slide and stage that is being worked on, and the part of it that is done."""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(pictures, undisturbed, tmp_path):
    out = tmp_path / "study"
    for kind, slide, stage, part in KILLS:
        killing = ["-c", KILLING_ITSELF, slide, stage, str(part)]
        process = start(pictures, out, "--compute", kind, "--workers", "2", python=killing)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, output
    finish(start(pictures, out, "--workers", "2"))
    assert results(out) == undisturbed


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_worker_changes_nothing(pictures, undisturbed, tmp_path):
    out = tmp_path / "study"
    process = start(pictures, out, "--workers", "2")
    killed = 0
    deadline = time.monotonic() + 120
    while not killed and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        ledgers = out / "ledger"
        if ledgers.is_dir() and any(ledgers.iterdir()):
            victims = workers_of(process.pid)
            for victim in victims[:1]:
                os.kill(victim, signal.SIGKILL)
                killed += 1
    finish(process)
    assert killed
    assert results(out) == undisturbed


@pytest.mark.slow
@pytest.mark.cluster
def test_a_terminated_run_says_so_and_frees_the_lock(pictures, undisturbed, tmp_path):
    out = tmp_path / "study"
    process = start(pictures, out, "--workers", "2")
    while not (out / "ledger").is_dir() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert not (out / ".lock").exists()
    finish_here_and_compare(pictures, out, undisturbed)
    assert Study(out).failures == []


def workers_of(pid: int) -> list[int]:
    """Processes below `pid` that run a Dask worker."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if "spawn_main" in command:
                children.setdefault(int(fields[1]), []).append(int(folder.name))
    return sorted(children.get(pid, []))


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of half a megabyte, and how to make it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if shutil.which("mount") is None or not mount("size=512k"):
        pytest.skip("only root can mount a small disk")
    yield disk, lambda size: mount(f"remount,size={size}k")
    subprocess.run(["umount", str(disk)], check=False)


def refused_for_room(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    told = [line for line in output.splitlines() if line.startswith("daskcell:")]
    assert len(told) == 1, output
    assert "make room; the same command continues" in told[0]
    return output


def finished_stages(out: Path) -> set[tuple[str, str, str]]:
    """Slide, stage and key of everything that the ledgers of a study call done."""
    ledgers = {file.stem: json.loads(file.read_text()) for file in (out / "ledger").glob("*.json")}
    return {
        (slide, stage, entry["key"])
        for slide, ledger in ledgers.items()
        for stage, entry in ledger["stages"].items()
    }


@pytest.mark.slow
@pytest.mark.cluster
def test_a_full_disk_is_one_sentence_and_after_making_room_it_goes_on(pictures, undisturbed, small_disk):
    disk, resize = small_disk
    out = disk / "study"
    done: set[tuple[str, str, str]] = set()
    for size, kind in ((512, "local"), (2048, "inline")):  # where it stops depends on which slide comes first
        resize(size)
        refused_for_room(start(pictures, out, "--compute", kind, "--workers", "2"))
        before, done = done, finished_stages(out)
        assert before <= done  # nothing that was finished is lost
    assert done
    resize(1 << 18)
    finish_here_and_compare(pictures, out, undisturbed)


# ---------------------------------------------------------------------- a scheduler of its own


@pytest.mark.slow
@pytest.mark.cluster
def test_a_scheduler_and_a_worker_that_are_killed_change_nothing():
    """As `benchmarks/soak.py`, which does it at random, thirty times and more."""
    path = Path(__file__).parents[1] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    found = soak.soak(2, seed=3, sides=[256], local=False, kinds=("scheduler", "worker"))
    assert found["kills"] == {"scheduler": 1, "worker": 1}
    assert found["different"] == []
    assert found["files"] > 20
