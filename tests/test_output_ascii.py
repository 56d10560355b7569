"""Commands whose output has to pass through an encoding that lacks letters of the names."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tifffile


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", ["channels", "run"])
def test_names_that_the_output_cannot_show_are_escaped(encoding, command, tmp_path):
    """A traceback (``'ascii' codec can't encode``) once all work was done."""
    image = tmp_path / "Größe 中.tif"
    tifffile.imwrite(image, np.zeros((64, 64), np.uint8))
    settings = ["segment.method=watershed", "features.encoder=tiny", "cluster.k=2", "compute.kind=inline"]
    rest = [] if command == "channels" else ["-o", tmp_path / "Ergebnis 中"]
    rest += [part for setting in settings if rest for part in ("-s", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "daskcell", command, image, *rest],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr
    assert b"Traceback" not in done.stderr
    assert b"should not happen" not in done.stderr
    assert rb"\u4e2d" in done.stdout
