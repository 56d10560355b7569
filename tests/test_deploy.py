"""The deployment examples: settings that can be read, and what the queues are asked for with them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from fake_queue import FakeQueue
from test_compute_jobs import scripts

from daskcell.config import QUEUES, load_config

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
ASKED = {
    "slurm": ("#SBATCH -t 04:00:00", "#SBATCH --cpus-per-task=16", "#SBATCH --gres=gpu:1"),
    "pbs": ("walltime=04:00:00", "select=1:ncpus=16:mem=60GB", "select=1:ncpus=4:ngpus=1:mem=32gb"),
    "lsf": ("#BSUB -W 04:00", "#BSUB -n 16", '#BSUB -gpu "num=1"'),
    "sge": ("h_rt=04:00:00", "#$ -pe smp 16", "#$ -l gpu=1"),
}


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_can_be_read_and_has_a_page(path):
    load_config(path)
    assert path.name in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("kind", QUEUES)
def test_the_examples_ask_for_what_they_say_with_what_is_commented_out_too(kind, tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")
    queue = FakeQueue(kind, tmp_path / "queue")
    monkeypatch.setenv("PATH", str(queue.bin), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    text = (DEPLOY / f"{kind}.yaml").read_text()
    everything = re.sub(r"(?m)^( +)# (?!interface)", r"\1", text)
    assert everything != text
    (tmp_path / "all.yaml").write_text(everything)
    compute = load_config(tmp_path / "all.yaml").compute
    assert (compute.kind, compute.jobs.count, compute.network_device) == (kind, 8, "cuda")
    walltime, cores, gpu = ASKED[kind]
    found = scripts(compute)
    assert walltime in found["cpu"]
    assert cores in found["cpu"]
    assert gpu in found["gpu"]
    assert gpu not in found["cpu"]
    assert "--lifetime 14100s" in found["gpu"]


def test_pages_link_to_files_that_are_there():
    for page in DEPLOY.glob("*.md"):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert (DEPLOY / link).exists(), (page.name, link)
