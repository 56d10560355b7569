"""From the command line to the network: how many calls, in how many files, and what one small image costs."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import tifffile

import daskcell
from daskcell import cli

ROOT = str(Path(daskcell.__file__).parent)
MOST_FRAMES = 15
MOST_ABOVE_A_STAGE = 10
UNNEEDED = (
    "distributed",
    "dask",
    "dask_ml",
    "dask_image",
    "skimage",
    "torchvision",
    "cellpose",
    "matplotlib",
)
"""What no run with the default settings needs in one process."""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "one.tif"
    y, x = np.mgrid[:128, :160]
    light = np.sin(y / 9.0) * np.sin(x / 9.0) * 90 + 120
    light += np.random.default_rng(0).normal(0, 6, y.shape)
    tifffile.imwrite(path, light.astype(np.uint8))
    return path


def test_few_calls_lead_from_the_command_line_to_the_network(image, tmp_path, monkeypatch, capsys):
    from daskcell.models.unet import TinyUNet

    stacks = []
    forward = TinyUNet.forward

    def recorded(self, *args):
        stacks.append([frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)])
        return forward(self, *args)

    monkeypatch.setattr(TinyUNet, "forward", recorded)
    arguments = [
        "run",
        str(image),
        "-o",
        str(tmp_path / "S"),
        "-q",
        "-s",
        "cluster.k=2",
        "-s",
        "segment.diameter=30",
    ]
    monkeypatch.setattr(sys, "argv", ["daskcell", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, capsys.readouterr().err
    frames = max(stacks, key=len)
    shown = [f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}" for frame in frames]
    stage = max(i for i, name in enumerate(shown) if name.startswith("pipeline/"))
    assert stage + 1 <= MOST_ABOVE_A_STAGE, "\n".join(shown)
    assert len(frames) <= MOST_FRAMES, "\n".join(shown)


def run_apart(*arguments):
    """Exit code of the command in a process of its own, and the modules that were loaded in it."""
    code = (
        "import json, sys\n"
        "from daskcell.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=500
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_small_image_is_worked_on_here_without_workers_or_what_only_they_need(image, tmp_path):
    code, modules = run_apart("run", image, "-o", tmp_path / "S", "-q", "-s", "cluster.k=2")
    assert code == 0
    assert not set(UNNEEDED) & set(modules)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_small_image_has_the_same_bits_with_workers(image, tmp_path):
    from test_pipeline import contents

    for name, options in {"here": (), "workers": ("--workers", "1")}.items():
        code, modules = run_apart("run", image, "-o", tmp_path / name, "-q", "-s", "cluster.k=2", *options)
        assert code == 0
        assert ("distributed" in modules) == (name == "workers")
    assert contents(tmp_path / "here") == contents(tmp_path / "workers")
