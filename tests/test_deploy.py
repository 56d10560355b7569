"""The deployment examples: job scripts, and a run through dask-jobqueue with jobs as processes here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")
SLURM = Path(__file__).resolve().parents[1] / "deploy" / "slurm.py"


@pytest.fixture(scope="module")
def slurm():
    spec = importlib.util.spec_from_file_location("deploy_slurm", SLURM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("walltime", "expected"),
    [("04:00:00", 14400), ("1-00:30:00", 88200), ("00:10:00", 600), ("90:00", 324000)],
)
def test_walltimes_are_understood(slurm, walltime, expected):
    assert slurm.seconds(walltime) == expected


def test_workers_stop_before_their_walltime(slurm):
    options = slurm.lifetime("04:00:00")
    stop = int(options[1].removesuffix("s"))
    stagger = int(options[3].removesuffix("s"))
    assert stop + stagger < 4 * 3600
    options = slurm.lifetime("00:10:00")
    assert int(options[1].removesuffix("s")) + int(options[3].removesuffix("s")) < 600


def test_job_scripts_ask_slurm_for_what_was_asked_and_label_workers(slurm, capsys):
    arguments = ["in", "-o", "out", "--print", "--jobs", "3", "--cores", "4", "--memory", "20GB"]
    arguments += ["--account", "me", "--partition", "day", "--gpu-jobs", "2", "--gpu-partition", "gpu"]
    assert slurm.main(arguments) == 0
    cpu, gpu = capsys.readouterr().out.split("#!/usr/bin/env bash")[1:]
    for line in ("#SBATCH -A me", "#SBATCH -p day", "#SBATCH --cpus-per-task=4", "#SBATCH -t 04:00:00"):
        assert line in cpu
    assert "--nthreads 1" in cpu
    assert "--nworkers 4" in cpu
    assert "--resources CPU=1" in cpu
    for line in ("#SBATCH -p gpu", "#SBATCH --gres=gpu:1", "#SBATCH --cpus-per-task=1"):
        assert line in gpu
    assert "--resources GPU=1" in gpu
    assert "--name" not in gpu
    address = [word for word in cpu.split() if word.startswith("tcp://")]
    assert address == [word for word in gpu.split() if word.startswith("tcp://")]


def test_without_gpus_no_worker_is_labelled(slurm, capsys):
    slurm.main(["in", "-o", "out", "--print"])
    assert "--resources" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_runs_through_jobqueue(tmp_path):
    (tmp_path / "in").mkdir()
    generator = np.random.default_rng(0)
    picture = np.zeros((200, 200), np.uint8)
    for y, x in ((40, 40), (40, 120), (120, 50), (140, 140)):
        yy, xx = np.ogrid[:200, :200]
        picture[(yy - y) ** 2 + (xx - x) ** 2 < 15**2] = 200
    picture += generator.integers(0, 20, picture.shape, np.uint8)
    tifffile.imwrite(tmp_path / "in" / "a.tif", picture)
    (tmp_path / "c.yaml").write_text("segment: {method: watershed}\ncluster: {k: 2}\n")
    command = [sys.executable, SLURM, tmp_path / "in", "-o", tmp_path / "out", "-c", tmp_path / "c.yaml"]
    command += ["--kind", "local", "--jobs", "1", "--cores", "2", "--memory", "2GB", "--interface", "lo"]
    # Dask's nannies leave variables for their children in the environment of whoever started them before.
    clean = {
        name: value for name, value in os.environ.items() if "DASK" not in name and "HASHSEED" not in name
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, cwd=tmp_path, env=clean
    )
    assert done.returncode == 0, done.stderr
    assert "1 slides" in done.stdout
    assert len(tifffile.imread(tmp_path / "in" / "a.tif")) == 200
    from daskcell.study import Study

    assert len(Study(tmp_path / "out").cells("a")) == 4
