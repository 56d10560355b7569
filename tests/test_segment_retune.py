"""Other thresholds from kept flows, by command: no tile goes through the network again."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest
import tifffile
from blobs import blobs

from daskcell.geometry import Box
from daskcell.images import read_labels
from daskcell.segmentation.methods import CellposeMethod


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process, which ends with 0; returns what it printed."""
    from daskcell.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["daskcell", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    return call


@pytest.fixture
def tiles(monkeypatch):
    """Counts tiles that go through the network."""
    counts, run = Counter(), CellposeMethod.run

    def counted(self, read, frozen, tiles):
        counts["all"] += len(tiles)
        return run(self, read, frozen, tiles)

    monkeypatch.setattr(CellposeMethod, "run", counted)
    return counts


def test_thresholds_are_changed_by_command_without_the_network(command, tiles, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", (np.clip(blobs((300, 320), 11, radius=11), 0, 1) * 200).astype("u1"))
    plain = ["--compute", "inline", "-k", 2, "--quiet", "--set", "compute.block=256", "--diameter", "none"]
    changed = ["segment.cellprob_threshold=1", "segment.flow_threshold=0.3", "segment.min_size=60"]
    changed = [word for change in changed for word in ("--set", change)]

    def run(study, *settings):
        tiles.clear()
        command("run", tmp_path / "a.tif", "-o", tmp_path / study, *plain, *settings)
        return read_labels(tmp_path / study / "images" / "a.zarr", "cells", Box(0, 0, 300, 320))

    first = run("kept", "--set", "segment.keep_flows=true")
    assert tiles["all"] == 4
    again = run("kept", "--set", "segment.keep_flows=true", *changed)
    assert tiles["all"] == 0
    assert 0 < again.max() != first.max()
    fresh = run("fresh", *changed)
    assert tiles["all"] == 4
    np.testing.assert_array_equal(again, fresh)

    assert "0 conflicts, 0 redone" in command("status", tmp_path / "kept")
    (slide,) = json.loads(command("status", tmp_path / "kept", "--json"))["slides"]
    assert slide["seams"]["cells"] == again.max()
    assert slide["seams"]["blocks"] == 4
    assert slide["seams"]["tiles"] == 0
    assert slide["seams"]["seam_pairs"] > 0
    assert abs(slide["seams"]["cut_rate"]) < 0.2
