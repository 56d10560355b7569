"""A method of another package: installed beside daskcell, named in a study's settings and in Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from blobs import blobs
from scipy import ndimage
from skimage.segmentation import relabel_sequential

import daskcell as dc
from daskcell.config import parse_config
from daskcell.errors import ConfigError, InputError
from daskcell.geometry import Box
from daskcell.images import read_labels
from daskcell.pipeline.stages import SEGMENT
from daskcell.segmentation.methods import Method, installed, sample
from daskcell.study import create_study

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "daskcell-plugin"
SHAPE = (300, 330)


@pytest.fixture(scope="module")
def image():
    """Cells whose brightness drifts: percentiles of a block are not those of the image."""
    pixels = np.clip(blobs(SHAPE, 3), 0, 1) * np.linspace(90, 250, SHAPE[1])
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the example installed in it."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, folder / "source")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", folder / "site", folder / "source"], check=True, timeout=300)
    return folder / "site"


@pytest.fixture
def plugin(site, monkeypatch):
    """The example, installed for this process."""
    monkeypatch.syspath_prepend(site)
    installed._entry_point.cache_clear()
    yield
    installed._entry_point.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "daskcell_plugin"]:
        del sys.modules[name]


def without_holes(labels):
    """Labels in reading order, each with what lies within it, as daskcell gives cells."""
    out = labels.copy()
    for cell in range(1, labels.max() + 1):
        out[ndimage.binary_fill_holes(out == cell)] = cell
    return relabel_sequential(out)[0]


@pytest.fixture
def whole(plugin, image):
    """The method's own labels, without blocks: fitted and asked once."""
    from daskcell_plugin.bright import Bright

    def labels(**options):
        method, box = Bright(**options), Box(0, 0, *SHAPE)
        params = method.fit(method.observe(image[None], box, SHAPE), SHAPE)
        return without_holes(method.segment(image[None], params))

    return labels


def segment(image, **options):
    options = {"method": "bright", "min_size": 0, "max_size_fraction": 1.0} | options
    return dc.segment(image, **options).compute(scheduler="synchronous")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"level": 0.6, "sigma": 2.5}])
def test_blocks_give_the_labels_of_the_method_on_the_whole_image(whole, image, options):
    expected = whole(**options)
    assert expected.max() > 20
    for block, halo in ((512, None), (100, None), (64, 8)):
        np.testing.assert_array_equal(segment(image, block=block, halo=halo, **options), expected)


@pytest.mark.slow
def test_a_filter_that_reaches_farther_than_it_says_cuts_cells(whole, image, monkeypatch):
    """The control: `reach` is what makes blocks exact."""
    from daskcell_plugin.bright import Bright

    expected = whole(sigma=2.5)
    blind = type("Blind", (Bright,), {"reach": 0})
    blind.segment = lambda self, block, params: Bright(self.level, self.sigma).segment(block, params)
    labels = segment(image, method=blind(sigma=2.5), block=40, halo=2)
    assert not np.array_equal(labels, expected)


def run(site, folder, level, *more):
    """`daskcell run` by a process that finds the example."""
    settings = ["compute.kind=inline", "compute.block=256", "cluster.k=2", "features.measurements=false"]
    settings += ["output.overlays=[]", "output.report=false", "preprocess.reconstruct=null"]
    settings += ["preprocess.histogram=null", "segment.min_size=0", f"segment.options.level={level}"]
    command = [sys.executable, "-m", "daskcell", "run", folder / "a.tif", "-o", folder / "out"]
    command += ["--method", "bright", *more]
    for change in settings:
        command += ["--set", change]
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_study_runs_the_method_and_redoes_it_when_its_options_or_version_change(
    site, whole, image, tmp_path
):
    tifffile.imwrite(tmp_path / "a.tif", image)
    run(site, tmp_path, 0.6)
    labels = read_labels(tmp_path / "out" / "images" / "a.zarr", "cells", Box(0, 0, *SHAPE))
    np.testing.assert_array_equal(labels, whole(level=0.6))

    assert "0 of 1 slides have work left" in run(site, tmp_path, 0.6, "--plan")
    assert "segment.options.level was 0.6 and is 0.5" in run(site, tmp_path, 0.5, "--plan")
    shutil.copytree(site, tmp_path / "site")
    module = tmp_path / "site" / "daskcell_plugin" / "bright.py"
    module.write_text(module.read_text().replace('version = "1"', 'version = "2"'))
    assert "another version of the method" in run(tmp_path / "site", tmp_path, 0.6, "--plan")


def test_a_study_can_be_read_where_its_method_is_not_installed(tmp_path):
    config = parse_config({})
    config = config.model_copy(update={"segment": config.segment.model_copy(update={"method": "gone"})})
    create_study(tmp_path, ["a.tif"], config)
    assert dc.open_study(tmp_path).config.segment.method == "gone"


def test_a_method_that_is_not_installed_is_refused_with_those_that_are(image):
    with pytest.raises(ConfigError, match=r"'segment.method' cannot be 'magic'.*cellpose, watershed"):
        parse_config({"segment": {"method": "magic"}})
    with pytest.raises(InputError, match=r"No segmentation method 'magic' is installed.*cellpose, watershed"):
        segment(image, method="magic")


def test_an_installed_method_is_one_of_the_choices(plugin, image):
    assert parse_config({"segment": {"method": "bright"}}).segment.method == "bright"
    with pytest.raises(ConfigError, match=r"cellpose, watershed, bright"):
        parse_config({"segment": {"method": "magic"}})
    with pytest.raises(InputError, match=r"'bright' has no option 'spline'; it has level, sigma"):
        segment(image, spline=1)


def test_the_key_of_the_stage_covers_name_version_and_options(plugin, monkeypatch):
    def key(**settings):
        config = parse_config({"segment": {"method": "bright"} | settings})
        files = SEGMENT.files(config)
        return SEGMENT.key(["fit"], config, files.digest)

    plain = key()
    assert key() == plain
    assert key(options={"level": 0.7}) != plain
    assert key(min_size=3) != plain
    assert key(watershed={"opening": 5}, model="cpsam_v2", diameter=12.0) == plain
    monkeypatch.setattr("daskcell.segmentation.methods.method_version", lambda name: "2", raising=False)
    assert key() != plain


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch, image):
    information = tmp_path / "broken-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[daskcell.methods]\nbroken = absent_module:Find\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"'broken' .* cannot be loaded: No module named 'absent_module'"):
        segment(image, method="broken")
    installed._entry_point.cache_clear()


class Threshold(Method):
    """Half way between the darkest and the brightest pixel of the image."""

    def observe(self, block, box, shape):
        return [np.array([block.min(), block.max()])]

    def fit(self, observed, shape):
        return {"level": observed[0].mean(), "range": np.array([observed[0].min(), observed[0].max()])}

    def segment(self, block, params):
        assert isinstance(params["range"], list), "as JSON has it, in memory too"
        from skimage.measure import label

        return label(block[0] > sum(params["range"]) / 2)


def test_facts_of_the_image_are_the_same_for_any_blocks(image):
    expected = segment(image, method=Threshold(), block=1024)
    assert expected.max() > 10
    for block in (64, 128):
        np.testing.assert_array_equal(segment(image, method=Threshold(), block=block), expected)


def test_facts_that_json_cannot_hold_are_refused(image):
    method = Threshold()
    method.fit = lambda observed, shape: {1 + 2j}
    with pytest.raises(InputError, match=r"Threshold.fit must return what JSON can hold"):
        segment(image, method=method)


def test_a_sample_is_the_same_for_any_blocks():
    values = np.arange(4000 * 3000, dtype=np.float32).reshape(1, 4000, 3000)
    shape = values.shape[1:]
    (expected,) = sample(values, Box(0, 0, *shape), shape)
    assert 224**2 <= len(expected) < 300**2
    parts = []
    for y in range(0, 4000, 1024):
        for x in range(0, 3000, 1024):
            box = Box(y, x, y + 1024, x + 1024).clip(shape)
            parts += sample(values[(slice(None), *box.slices)], box, shape)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(expected))
