"""Neighbours of the clusters of a study: the counts of its label images, summed over slides."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile
from typer.testing import CliRunner

import daskcell as dc
from daskcell.cli import app
from daskcell.errors import InputError, StudyError
from daskcell.pipeline.neighbours import study_neighbours


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Small dim cells on the left, large bright ones on the right, in two slides."""
    folder = tmp_path_factory.mktemp("neighbours")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        image = rng.poisson(10, (200, 400)).astype(np.uint8)
        for y in range(10, 190, 20):
            for x in range(10, 390, 20):
                side = 7 if x < 200 else 13
                image[y : y + side, x : x + side] = (180 if x < 200 else 240) + rng.integers(-5, 6)
        tifffile.imwrite(folder / "in" / f"{name}.tif", image)
    settings = {
        "segment": {"method": "watershed"},
        "cluster": {"k": 2, "use": ["measurements"]},
        "output": {"report": False},
        "compute": {"kind": "inline"},
    }
    return dc.run(folder / "in", folder / "study", settings)


def test_counts_are_those_of_the_label_images_and_add_up(study):
    found = study_neighbours(study, radius=25)
    for slide in study.slides:
        own = found[found["slide"] == slide].pivot_table(index="cluster", columns="other", values="count")
        types = study.cells(slide)["cluster_name"]
        expected = dc.neighbours(study.labels(slide), types, radius=25)
        np.testing.assert_array_equal(own, expected.counts)
    slides, total = found[found["slide"] != "all"], found[found["condition"] == "all"]
    for column in ("count", "expected", "variance"):
        sums = slides.groupby(["cluster", "other"])[column].sum().to_numpy()
        np.testing.assert_allclose(total[column], sums)
    same = total["cluster"] == total["other"]
    assert (total.loc[same, "enrichment"] > 5).all()
    assert (total.loc[~same, "enrichment"] < -5).all()


def test_the_command_prints_and_writes_them(study, tmp_path):
    out = tmp_path / "near.csv"
    command = ["neighbours", str(study.out), "--radius", "25", "-o", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "cluster 0" in done.output
    expected = study_neighbours(study, radius=25).fillna({"condition": ""})
    written = pd.read_csv(out).fillna({"condition": ""})
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, InputError)
    touching = CliRunner().invoke(app, ["neighbours", str(study.out)])
    assert touching.exit_code == 0, touching.output


def test_what_has_no_clusters_or_is_no_slide_is_refused(study, tmp_path):
    with pytest.raises(InputError, match="has no slide 'c'"):
        study_neighbours(study, radius=25, slides=["c"])
    with pytest.raises(InputError, match="one of radius, k and gap"):
        study_neighbours(study)
    with pytest.raises(StudyError):
        study_neighbours(tmp_path, radius=25)
