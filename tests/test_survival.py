"""Killed at any moment, the same command continues and ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tifffile

from daskcell.study import Study
from daskcell.synthetic import CHANNELS, synthesize_field

OPTIONS = ["--set", "cluster.k=3", "--set", "compute.block=256", "--set", "output.preprocessed=true"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, side in enumerate((256, 256, 900)):  # the last is driven block by block
        field = synthesize_field((side, side), seed=number)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(folder / f"field{number}_{channel}.tif", pixels)
    return folder


def start(pictures: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "daskcell", "run", str(pictures), "-o", str(out), "--interval", "1"]
    return subprocess.Popen(
        [*command, *OPTIONS, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


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
    begin = time.monotonic()
    finish(start(pictures, out, "--workers", "2"))
    return results(out), time.monotonic() - begin


@pytest.mark.slow
def test_one_process_gives_the_same_bytes_as_workers(pictures, undisturbed, tmp_path):
    finish(start(pictures, tmp_path / "study", "--compute", "inline"))
    found = results(tmp_path / "study")
    expected = undisturbed[0]
    assert found.keys() == expected.keys()
    changed = {name for name in found if found[name] != expected[name]}
    assert changed == {"study.json"}  # it tells how the run was computed


@pytest.mark.slow
@pytest.mark.parametrize("fractions", [(0.35, 0.5), (0.6, 0.75), (0.9,)])
def test_a_killed_run_continues_to_the_same_bytes(pictures, undisturbed, tmp_path, fractions):
    expected, seconds = undisturbed
    out = tmp_path / "study"
    killed = 0
    for fraction in fractions:
        process = start(pictures, out, "--workers", "2")
        time.sleep(fraction * seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate(timeout=60)
    assert killed
    finish(start(pictures, out, "--workers", "2"))
    assert results(out) == expected


@pytest.mark.slow
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
    assert results(out) == undisturbed[0]


@pytest.mark.slow
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
    finish(start(pictures, out, "--workers", "2"))
    assert results(out) == undisturbed[0]
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
