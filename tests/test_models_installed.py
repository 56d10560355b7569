"""Encoders of other packages: the plug-in of ``examples/`` is installed, and used by its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from daskcell.errors import InputError, WeightsError
from daskcell.models import installed, registry

PLUGIN = Path(__file__).resolve().parents[1] / "examples" / "daskcell-plugin"

STUDY = """
import sys
import numpy as np
import daskcell as dc

image = np.zeros((2, 96, 96), np.uint8)
labels = np.zeros((96, 96), np.uint32)
for i in range(9):
    y, x = divmod(i, 3)
    labels[32 * y + 6 : 32 * y + 24, 32 * x + 6 : 32 * x + 24] = i + 1
image[0][labels % 2 == 1], image[1][labels > 0] = 200, 150

def run(**settings):
    config = {"segment": {"method": "watershed"}, "features": {"encoder": "colour"} | settings,
              "cluster": {"k": 2}, "compute": {"kind": "inline"}}
    return dc.run([("a", image)], sys.argv[1], config)

study = run()
assert not study.failures
assert dc.load_encoder("colour").size == 32
assert dc.embed(image, labels, encoder="colour").shape == (9, 6)
print(study.record.ledger("a").entry("describe")["result"])

import daskcell_plugin.encoder as plugin
from daskcell.models import encoder_fingerprint
before = encoder_fingerprint("colour")
plugin.colour.version = "2"
assert encoder_fingerprint("colour") != before
print("another version, another key")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a process that finds the plug-in, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    path = os.pathsep.join([str(folder / "site"), str(PLUGIN.parents[1])])
    return os.environ | {"PYTHONPATH": path}


@pytest.mark.slow
def test_a_study_uses_an_installed_encoder_and_keys_hold_its_version(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STUDY, str(tmp_path / "study")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'features': 6" in done.stdout
    assert done.stdout.splitlines()[-1] == "another version, another key"


def test_the_list_of_weights_names_installed_encoders(environment):
    done = subprocess.run(
        [sys.executable, "-m", "daskcell", "weights", "list"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("colour")]
    assert "daskcell-plugin" in line


def made(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name, target, "daskcell.encoders")
    monkeypatch.setattr(installed, "installed_encoders", lambda: {name: point})
    monkeypatch.setattr(registry, "installed_encoders", lambda: {name: point})


def test_an_unknown_name_lists_what_is_installed(monkeypatch):
    made("colour", "test_models_installed:encoder", monkeypatch)
    with pytest.raises(WeightsError, match=r"There is no encoder 'color'.*'tiny', 'colour'"):
        registry.find_encoder("color")


def encoder():
    return lambda crops: crops[:, :, 0, 0]


def no_encoder():
    return 3


def fails():
    raise RuntimeError("no licence")


@pytest.mark.parametrize(
    ("target", "reason"),
    [("nowhere_at_all:x", "nowhere_at_all"), ("no_encoder", "gives a int"), ("fails", "no licence")],
)
def test_a_plug_in_that_does_not_work_is_one_sentence(monkeypatch, target, reason):
    from daskcell.models import load_encoder

    made("theirs", target if ":" in target else f"test_models_installed:{target}", monkeypatch)
    with pytest.raises(WeightsError, match=f"The encoder 'theirs' .*cannot be used: .*{reason}"):
        load_encoder("theirs")


def test_embed_takes_an_installed_name(monkeypatch):
    from daskcell.features import embed

    made("theirs", "test_models_installed:encoder", monkeypatch)
    labels = np.zeros((40, 40), np.uint32)
    labels[10:30, 10:30] = 1
    assert embed(np.ones((1, 40, 40)), labels, "theirs").shape == (1, 3)
    for options, words in (
        ({"pooling": "mask"}, "accessible feature maps"),
        ({"layer": "pool"}, "one output"),
    ):
        with pytest.raises(InputError, match=words):
            embed(np.ones((1, 40, 40)), labels, "theirs", **options)
