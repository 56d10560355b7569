"""A study through a real Slurm, disturbed: the same bytes as without.

Slurm is started here on 127.0.0.1, in folders of its own (see `slurm_here`). Skipped where its programs are
not installed (Debian: slurm-wlm and munge); with ``DASKCELL_REQUIRE_SLURM=1`` that is a failure.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tifffile
import yaml
from slurm_here import missing, slurm_here
from test_survival import finish, results

from daskcell.evaluation.generated import CHANNELS, synthesize_field

pytestmark = [pytest.mark.alone, pytest.mark.cluster]

pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")
COMMON = {"cluster": {"k": 3}}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing():
        text = f"Slurm is not installed here: {', '.join(missing())} missing"
        if os.environ.get("DASKCELL_REQUIRE_SLURM") == "1":
            pytest.fail(text)
        pytest.skip(text)
    with slurm_here(tmp_path_factory.mktemp("slurm") / "here") as slurm:
        yield slurm


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, side in enumerate((256, 800)):
        field = synthesize_field((side, side), seed=number)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(folder / f"field{number}_{channel}.tif", pixels)
    return folder


def start(pictures: Path, out: Path, slurm=None, **compute) -> subprocess.Popen:
    config = out.parent / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump(COMMON | {"compute": {"block": 256, **compute}}))
    command = [sys.executable, "-m", "daskcell", "run", pictures, "-o", out, "-c", config, "--interval", "1"]
    environment = os.environ | (slurm.environment if slurm else {})
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=out.parent,
        env=environment,
    )


def jobs(**more) -> dict:
    return {"cores": 1, "memory": "2GB", "interface": "lo"} | more


def until(ready, process: subprocess.Popen, seconds: float = 200):
    """What `ready` returns once it is true, while the run lasts."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if found := ready():
            return found
        time.sleep(0.1)
    raise AssertionError(f"the run ended too early: {process.communicate()[0]}")


def is_at(out: Path, slide: str, stage: str) -> bool:
    """Whether `stage` of `slide` is being worked on, or is done."""
    try:
        ledger = json.loads((out / "ledger" / f"{slide}.json").read_text())
    except FileNotFoundError:
        return False
    return ledger["began"] == stage or stage in ledger["stages"]


def states(slurm) -> dict[str, str]:
    """What became of every job, by number; Slurm remembers them for five minutes."""
    shown = slurm("scontrol", "show", "job", "--oneliner")
    return dict(re.findall(r"JobId=(\d+) .*?JobState=(\w+)", shown))


@pytest.mark.slow
def test_cancelled_jobs_and_walltimes_change_no_byte(slurm, pictures, tmp_path):
    """One job is cancelled, one reaches its walltime, the others leave before theirs; each is replaced."""
    finish(start(pictures, tmp_path / "local", workers=2))
    out = tmp_path / "slurm"
    # GPU jobs without CUDA: all that counts here is that network tasks go there, and all else elsewhere.
    process = start(
        pictures,
        out,
        slurm,
        kind="slurm",
        device="cpu",
        jobs=jobs(count=2, walltime="00:00:30"),
        gpu_jobs={"count": 1, "walltime": "00:10:00"},
    )
    until(lambda: is_at(out, "field1", "segment"), process)
    # Without its only job for network tasks the run cannot end before the others are replaced.
    held = re.findall(r"^(\d+) .*gpu", slurm("squeue", "-h", "-o", "%i %b"), re.MULTILINE)[0]
    slurm("scontrol", "suspend", held)
    cancelled = until(slurm.running, process)[0]
    slurm("scancel", cancelled)
    timed_out = until(lambda: [job for job in slurm.running() if job != cancelled], process)[0]
    slurm.end_walltime(timed_out)
    until(lambda: len(states(slurm)) >= 5, process)  # three and two in their place
    slurm("scontrol", "resume", held)
    output = finish(process)
    ended = states(slurm)
    assert "no worker" not in output
    assert ended[cancelled] == "CANCELLED"
    assert ended[timed_out] == "TIMEOUT"
    found, expected = results(out), results(tmp_path / "local")
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {"study.json"}  # tells how it ran
    assert json.loads((out / "study.json").read_text())["config"]["compute"]["kind"] == "slurm"
    assert not set(slurm.running()) & set(ended)
