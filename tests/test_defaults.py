"""The Python API and the settings have the same words and the same defaults, and give the same bits."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

import daskcell as dc
from daskcell import config
from daskcell.geometry import Box
from daskcell.images import read_labels

PAIRS = {
    # function: (its settings, arguments that are no settings, settings that are no arguments)
    "segment": (
        config.SegmentSettings,
        {"image", "device", "block", "halo", "return_report", "options"},
        {"watershed", "options", "keep_flows"},  # given as **options; of a study
    ),
    "embed": (
        config.FeatureSettings,
        {"image", "labels", "limits", "device", "threads"},
        {"measurements"},  # of `measure`
    ),
    "fit_clusters": (
        config.ClusterSettings,
        {"features", "random_state", "info"},
        {"use"},  # the features are given
    ),
    "adjust_histogram": (config.HistogramSettings, {"x"}, set()),
    "correct_background": (config.BackgroundSettings, {"x"}, set()),
    "adjust_stains": (config.StainSettings, {"x"}, set()),
    "gaussian": (config.GaussianSettings, {"x"}, set()),
    "reconstruct": (config.ReconstructSettings, {"channels"}, set()),
}
WITHOUT_SETTINGS = {
    "assign", "convert", "estimate_flat", "expand", "export_crops", "load_clusters", "load_config",
    "load_encoder", "load_network", "measure", "neighbours", "open_image", "open_study", "overlay", "pair",
    "prepare", "run",
}  # fmt: skip


def test_every_public_function_is_compared_with_its_settings():
    functions = {name for name in dc.__all__ if inspect.isfunction(getattr(dc, name))}
    assert functions == set(PAIRS) | WITHOUT_SETTINGS


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_and_settings_have_the_same_names_and_defaults(name):
    settings, only_arguments, only_settings = PAIRS[name]
    arguments = dict(inspect.signature(getattr(dc, name)).parameters)
    only_arguments = only_arguments | ({"axes"} & set(arguments))  # a setting of the input
    assert only_arguments <= set(arguments)
    assert only_settings <= set(settings.model_fields)
    assert set(arguments) - only_arguments == set(settings.model_fields) - only_settings
    for field, about in settings.model_fields.items():
        if field not in only_settings:
            assert arguments[field].default == about.get_default(call_default_factory=True), field


README = Path(__file__).resolve().parents[1] / "README.md"


def readme_code() -> list[str]:
    """The indented blocks of README's section on Python."""
    section = README.read_text().split("## In Python", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", section, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks if block.strip()]


SIDE = 256
"""Of corners of pictures: enough cells for eleven clusters, and quickly segmented."""


def stained(data_dir: Path, folder: Path) -> Path:
    file = folder / "stained.png"
    iio.imwrite(file, iio.imread(data_dir / "tnbc-he" / "images" / "he_tnbc_01_1.png")[:SIDE, :SIDE, :3])
    return file


def fluorescent(data_dir: Path, folder: Path) -> Path:
    """A folder with one file per channel."""
    for path in (data_dir / "channels" / "human").iterdir():
        tifffile.imwrite(folder / path.name, tifffile.imread(path)[-SIDE:, -SIDE:])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", [fluorescent, stained])
def test_the_readmes_python_gives_what_run_gives(kind, data_dir, tmp_path):
    (tmp_path / "pictures").mkdir()
    pictures = kind(data_dir, tmp_path / "pictures")
    chain = readme_code()[0].replace('"resnet152"', '"tiny"')
    assert chain.count('"slide.svs"') == 1
    assert "resnet" not in chain
    here: dict = {}
    exec(chain.replace('"slide.svs"', repr(str(pictures))), here)

    command = [sys.executable, "-m", "daskcell", "run", str(pictures), "-o", str(tmp_path / "study")]
    command += ["--compute", "inline"]  # where it runs changes no result
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    study = dc.open_study(tmp_path / "study")
    (slide,) = study.slides
    labels = np.asarray(here["labels"])
    assert labels.max() >= 15
    np.testing.assert_array_equal(
        labels, read_labels(study.paths.image(slide), "cells", Box(0, 0, *labels.shape))
    )
    np.testing.assert_array_equal(here["features"], zarr.open_array(study.paths.features(slide))[:])
    table = study.cells()
    expected = here["cells"]
    shared = [name for name in table.columns if name in expected.columns]
    assert set(expected.columns) <= set(table.columns)
    pd.testing.assert_frame_equal(
        expected[shared].reset_index(drop=True), table[shared].reset_index(drop=True), check_exact=True
    )
    np.testing.assert_array_equal(here["model"].predict(here["features"]), table["cluster"])
