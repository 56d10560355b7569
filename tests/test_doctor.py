"""`daskcell doctor`: each thing that is wrong is one line that says what to do."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from fake_queue import FakeQueue
from typer.testing import CliRunner

from daskcell.cli import app
from daskcell.config import parse_config
from daskcell.models import loading
from daskcell.pipeline import doctor

JOBS = {"cores": 1, "memory": "2GB", "interface": "lo"}


def lines(out: Path | None = None, ask: bool = True, **config) -> dict[str, list[str]]:
    """Findings by what they are about, as printed."""
    found: dict[str, list[str]] = {}
    for finding in doctor.examine(parse_config(config), out, ask=ask):
        found.setdefault(finding.about, []).append(str(finding))
    return found


def test_where_all_is_well_there_are_only_good_lines_and_nothing_is_left(tmp_path):
    out = tmp_path / "new" / "study"
    result = CliRunner().invoke(app, ["doctor", str(out)])
    assert result.exit_code == 0, result.output
    about = [line.split()[1] for line in result.output.splitlines()]
    assert about == ["versions", "GPU", "weights", "scratch", "room", "output", "ports"]
    assert "fail" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_asked_for_and_absent_is_a_failure_with_exit_code_2(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["doctor", "--compute", "gpu"])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("fail")]
    assert "none is visible here. Please" in line
    assert lines()["GPU"] == ["ok    GPU       none here; not needed (compute.device is cpu)"]


def test_weights_that_are_missing_are_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (line,) = lines(features={"encoder": "resnet152"})["weights"]
    assert line.startswith("fail")
    assert "daskcell weights fetch resnet152" in line


@pytest.mark.parametrize("damaged", [False, True])
def test_weights_whose_name_holds_their_hash_are_compared_with_it(damaged, tmp_path, monkeypatch):
    content = b"weights"
    beginning = hashlib.sha256(content).hexdigest()[:8]
    file = tmp_path / f"some-{beginning}.pth"
    file.write_bytes(content + b"!" * damaged)
    monkeypatch.setattr("daskcell.models.registry.find_encoder", lambda name: file)
    found = doctor._damaged_encoder("some")
    assert (found is not None) == damaged
    assert not damaged or "some" in found


def test_networks_in_a_precision_that_the_processor_only_emulates_are_a_warning(tmp_path, monkeypatch):
    (tmp_path / "cpsam_v2").write_bytes(b"some weights")
    sam = {"model": str(tmp_path / "cpsam_v2")}
    asked = {"precision": "bfloat16"}
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: False)
    assert "precision" not in lines()
    assert "precision" not in lines(segment=sam | {"precision": "float32"})
    assert "precision" not in lines(segment=asked | {"method": "watershed"})
    for settings, names in [
        ({"segment": sam}, "segment.precision"),
        ({"segment": asked, "features": asked}, "segment.precision and features.precision"),
    ]:
        (line,) = lines(**settings)["precision"]
        assert line.startswith("warn")
        assert f"Please set {names} to float32." in line
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: True)
    assert "precision" not in lines(segment=sam)


def test_an_output_folder_that_cannot_be_written_to_is_a_failure(tmp_path):
    (tmp_path / "file").touch()
    assert lines(tmp_path / "file" / "study")["output"][0].startswith("fail")


def test_little_room_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: _Usage())
    assert lines(tmp_path)["room"] == [
        f"warn  room      5 GB free in {tmp_path}, which is little. Please make room, or choose another."
    ]


class _Usage:
    free = 5e9


def test_a_package_that_is_too_old_is_a_failure(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["zarr>=99", "napari>=1; extra == 'x'"])
    (line,) = lines()["versions"]
    assert line.startswith("fail")
    assert "zarr>=99 (here: 3" in line
    assert "napari" not in line


def test_the_file_system_of_a_folder_is_told_by_its_mount():
    assert doctor.file_system(Path("/proc/self")) == "proc"
    assert doctor.file_system(Path("/dev/shm/not/there/yet")) == "tmpfs"


def test_a_worker_of_another_environment_is_a_failure():
    answer = {"host": "node7", "versions": doctor.installed(), "gpu": None, "sees_output": True}
    assert doctor._judge("w", answer).verdict == "ok"
    other = answer | {"versions": doctor.installed() | {"zarr": "3.0.0"}}
    assert "w on node7 has zarr 3.0.0, here is" in doctor._judge("w", other).text
    assert "does not see the output" in doctor._judge("w", answer | {"sees_output": False}).text
    assert "daskcell installed" in doctor._judge("w", ImportError("No module named 'daskcell'")).text


def test_an_unknown_network_interface_is_a_failure():
    found = lines(ask=False, compute={"kind": "slurm", "jobs": JOBS | {"interface": "ib7"}})
    assert found["interface"][0].startswith("fail")
    assert "ib7" in found["interface"][0]


def test_a_scheduler_that_does_not_answer_is_a_failure(monkeypatch):
    monkeypatch.setattr("daskcell.compute.given.CONNECT_SECONDS", 0.5)
    (line,) = lines(compute={"kind": "tcp://127.0.0.1:9"})["scheduler"]
    assert line.startswith("fail")
    assert "No Dask scheduler answers at tcp://127.0.0.1:9" in line


@pytest.fixture
def queue(tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")
    fake = FakeQueue("slurm", tmp_path / "queue")
    monkeypatch.setenv("PATH", str(fake.bin), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    yield fake
    fake.close()


@pytest.mark.slow
@pytest.mark.cluster
def test_one_job_is_asked_for_and_looks_around(queue, tmp_path):
    found = lines(tmp_path / "study", compute={"kind": "slurm", "jobs": JOBS | {"count": 50}})
    assert len(queue.jobs) == 1
    assert found["jobs"] == ["ok    jobs      slurm gave 1 worker"]
    (line,) = found["worker"]
    assert line.startswith("ok")
    assert "same versions, sees the output folder" in line
    assert "all nodes see it" in found["output"][1] or "is on" in found["output"][1]
    assert not list(tmp_path.glob(".daskcell*"))


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_that_does_not_come_is_a_failure_in_time(queue):
    (queue.folder / "hold").touch()
    found = lines(compute={"kind": "slurm", "jobs": JOBS, "wait": 1})
    assert found["jobs"][0].startswith("fail")
    assert "within 1 s (compute.wait); jobs: 1 PENDING" in found["jobs"][0]
