"""What users read of a study: tables and arrays as data, files under `paths`, and clear words where a part is
missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr

import daskcell as dc

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def study(small_study: Path) -> dc.Study:
    return dc.open_study(small_study)


@pytest.fixture
def unfinished(small_study: Path, tmp_path: Path) -> dc.Study:
    """The study while its second slide is described again."""
    shutil.copytree(small_study, tmp_path / "study")
    study = dc.open_study(tmp_path / "study")
    study.record.ledger("two").begin("describe")
    return study


def test_features_of_all_slides_have_the_rows_of_the_cells_table(study):
    cells, features = study.cells(), study.features()
    assert isinstance(features, da.Array)
    assert len(features) == len(cells)
    rows = features.compute()
    start = 0
    for slide in study.slides:
        own = cells[cells["slide"] == slide].drop(columns="slide").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, study.cells(slide))
        assert own["label"].tolist() == list(range(1, len(own) + 1))
        expected = zarr.open_array(study.paths.features(slide), mode="r")[:]
        np.testing.assert_array_equal(rows[start : start + len(own)], expected)
        np.testing.assert_array_equal(study.features(slide), expected)
        assert study.features(slide).dtype == expected.dtype
        start += len(own)
    assert cells["slide"].drop_duplicates().tolist() == study.slides == ["one", "two"]
    assert start == len(rows)


def test_the_model_gives_each_cell_the_cluster_of_its_row(study):
    assert isinstance(study.clusters, dc.ClusterModel)
    np.testing.assert_array_equal(study.clusters.predict(study.features()), study.cells()["cluster"])


def test_images_and_labels_are_lazy_and_those_on_disk(study):
    image, labels = study.image("one"), study.labels("one")
    opened = study.open_image("one")
    assert isinstance(image, da.Array)
    assert isinstance(labels, da.Array)
    assert (image.shape, image.dtype) == (opened.shape, opened.dtype)
    assert (labels.shape, labels.dtype) == (opened.shape[1:], np.dtype(np.uint32))
    np.testing.assert_array_equal(image, opened.data)
    np.testing.assert_array_equal(labels, zarr.open_array(study.paths.labels("one") / "0", mode="r")[:])
    assert int(labels.max()) == len(study.cells("one"))
    clusters = np.append(-1, study.cells("one")["cluster"])
    np.testing.assert_array_equal(study.labels("one", "clusters"), clusters[labels.compute()] + 1)


def test_levels_of_the_pyramid_are_read(tmp_path, small_study):
    shutil.copytree(small_study, tmp_path / "study")
    study = dc.open_study(tmp_path / "study")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 1200, 1300)).astype(np.uint8)
    shutil.rmtree(study.paths.image("one"))
    np.save(tmp_path / "large.npy", pixels)
    dc.convert(tmp_path / "large.npy", study.paths.image("one"))
    assert study.image("one", level=1).shape == (2, 600, 650)
    whole = zarr.open_array(study.paths.image("one") / "1", mode="r")[:]
    np.testing.assert_array_equal(study.image("one", level=1), whole)
    with pytest.raises(dc.StudyError, match="levels 0 to 1, not 2"):
        study.image("one", level=2)


def test_an_array_read_after_the_slide_was_redone_is_new(study, tmp_path):
    shutil.copytree(study.out, tmp_path / "study")
    copy = dc.open_study(tmp_path / "study")
    first = copy.features("one")
    assert first.name == copy.features("one").name
    assert first.name != copy.features("two").name
    shutil.rmtree(copy.paths.features("one"))
    shutil.copytree(copy.paths.features("two"), copy.paths.features("one"))
    assert copy.features("one").name != first.name


def test_paths_are_files_of_the_study(study):
    paths = study.paths
    there = [paths.record, paths.clusters]
    there += [of("one") for of in (paths.image, paths.labels, paths.table, paths.clusters_table)]
    there += [of("one") for of in (paths.index, paths.features, paths.ledger)]
    assert all(path.exists() for path in there)
    assert paths.report == study.out / "report.html"


def test_a_study_says_in_one_line_what_it_is(study):
    assert repr(study) == f"<Study {study.out}: 2 slides>"
    assert repr(study.record) == f"<Record {study.out / 'study.json'}>"
    assert study._repr_html_() == (
        f"<b>Study</b> <code>{study.out}</code>: 2 slides, {len(study.cells())} cells, 2 clusters"
    )


def test_a_part_that_is_missing_is_left_out_with_a_warning(unfinished):
    with pytest.warns(dc.IncompleteWarning, match=r"1 of 2 slides of .* have no cells yet \(two\)"):
        cells = unfinished.cells()
    assert set(cells["slide"]) == {"one"}
    with pytest.warns(dc.IncompleteWarning):
        assert len(unfinished.features()) == len(cells)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfinished.cells("one")
        unfinished.labels("two")


@pytest.mark.parametrize("ask", ["cells", "features"])
def test_what_one_slide_does_not_have_is_one_sentence(unfinished, ask):
    with pytest.raises(dc.StudyError, match=r"two of .* has no .* yet. Please run the study"):
        getattr(unfinished, ask)("two")
    with pytest.raises(dc.StudyError, match="has no slide 'three'; it has one, two"):
        getattr(unfinished, ask)("three")


def test_why_a_slide_was_set_aside_is_said(unfinished):
    unfinished.record.ledger("two").fail("describe", "the disk is full")
    unfinished.record.write_failures([unfinished.record.ledger("two").failure])
    with pytest.raises(dc.StudyError, match="two was set aside: the disk is full"):
        unfinished.cells("two")
    assert "1 set aside" in unfinished._repr_html_()


def test_a_study_without_any_cell_clusters_or_report_says_so(tmp_path, small_study):
    shutil.copytree(small_study, tmp_path / "study")
    study = dc.open_study(tmp_path / "study")
    shutil.rmtree(study.out / "ledger")
    for ask in (study.cells, study.features):
        with pytest.raises(dc.StudyError, match="has no cells yet"):
            ask()
    with pytest.raises(dc.StudyError, match="has no clusters yet"):
        _ = study.clusters
    with pytest.raises(dc.StudyError, match="has no report yet"):
        _ = study.report
    with pytest.raises(dc.StudyError, match="has no image yet"):
        study.image("one")
    with pytest.raises(dc.StudyError, match="no cells yet"):
        study._overlay("one")
    assert "0 cells" in study._repr_html_()


def test_labels_of_another_name_are_refused(study):
    with pytest.raises(dc.StudyError, match="no labels 'nuclei' yet; it has cells, clusters"):
        study.labels("one", "nuclei")


def test_features_made_with_different_settings_do_not_stand_in_one_array(unfinished):
    ledger = unfinished.record.ledger("two")
    shutil.rmtree(unfinished.paths.features("two"))
    rows = np.zeros((3, 7), np.float16)
    zarr.create_array(unfinished.paths.features("two"), data=rows)
    ledger.finish("describe", "other", {"cells": 3})
    with pytest.raises(dc.StudyError, match=r"different features: 96 per cell .*, 7 in float16 \(two\)"):
        unfinished.features()
    np.testing.assert_array_equal(unfinished.features("two"), rows)


def test_the_report_is_the_page(study, tmp_path):
    shutil.copytree(study.out, tmp_path / "study")
    copy = dc.open_study(tmp_path / "study")
    copy.paths.report.write_text("<html>å</html>", encoding="utf-8")
    assert copy.report == "<html>å</html>"


def test_what_the_readme_shows_of_a_study_can_be_called(tmp_path, small_study, monkeypatch):
    shutil.copytree(small_study, tmp_path / "study")
    (tmp_path / "study" / "report.html").write_text("<html></html>")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dc.Study, "show", lambda self, slide: self.labels(slide))
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    (code,) = (textwrap.dedent(block) for block in blocks if "dc.open_study(" in block)
    exec(code.replace('"a"', '"one"'), {"dc": dc})


# ---------------------------------------------------------------------- pictures


class Axes:
    def __init__(self):
        self.shown = self.title = None

    def imshow(self, picture):
        self.shown = picture

    def set_title(self, title):
        self.title = title

    def set_axis_off(self):
        pass


def test_show_draws_the_overlay_on_given_axes_or_its_own(study, monkeypatch):
    own, given = Axes(), Axes()
    pyplot = SimpleNamespace(subplots=lambda: (None, own))
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    assert study.show("one") is own
    assert study.show("one", given) is given
    assert given.title == "one"
    assert given.shown.shape == (*study.labels("one").shape, 3)
    assert given.shown.dtype == np.uint8
    image = study.prepared("one")
    expected = dc.overlay(image.read(_whole(image)), study.labels("one"), study.cells("one")["cluster"])
    np.testing.assert_array_equal(given.shown, expected)


def _whole(image):
    from daskcell.geometry import Box

    return Box(0, 0, *image.shape)


def test_without_clusters_cells_are_outlined(unfinished):
    coloured = unfinished._overlay("one")
    unfinished.record.ledger("one").begin("assign")
    assert (unfinished._overlay("one") != coloured).any()


def test_without_matplotlib_show_says_what_to_install(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(dc.StudyError, match=r"pip install 'daskcell\[plot\]'"):
        study.show("one")


# ---------------------------------------------------------------------- the package's face


def test_studies_errors_and_warnings_are_exported():
    from daskcell import errors

    raised = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert raised <= set(dc.__all__)
    assert "Study" in dc.__all__
    assert all(issubclass(getattr(dc, name), (dc.DaskcellError, UserWarning)) for name in raised)


SCRIPT = """
    # mypy: disallow-any-generics, disallow-subclassing-any, disallow-untyped-calls, disallow-untyped-defs
    # mypy: disallow-untyped-decorators, warn-return-any, no-implicit-reexport, strict-equality, extra-checks
    import numpy as np
    import pandas as pd

    import daskcell as dc


    def analyse(out: str) -> pd.DataFrame:
        study: dc.Study = dc.open_study(out)
        try:
            model = study.clusters
        except dc.StudyError as error:
            raise SystemExit(str(error)) from error
        clusters = np.asarray(model.predict(study.features()))
        for slide in study.slides:
            print(slide, study.labels(slide).shape, study.paths.image(slide).name)
        return study.cells().assign(again=clusters)


    def by_hand(path: str) -> int:
        image: dc.Image = dc.open_image(path)
        x = dc.prepare(image)
        labels = dc.segment(x, method="watershed")
        cells: pd.DataFrame = dc.measure(labels, image.data)
        features = dc.embed(x, labels, encoder="tiny")
        model: dc.ClusterModel = dc.fit_clusters(features, k=2, random_state=0)
        print(dc.overlay(x, labels, model.predict(features)).shape)
        return len(cells)


    config: dc.Config = dc.load_config("settings.yaml")
    study = dc.run(["a.tif"], "out", config)
    print(len(study.failures), analyse("out"), by_hand("a.tif"))
"""


@pytest.mark.slow
def test_a_script_that_uses_the_public_names_passes_a_strict_type_check(tmp_path):
    """The flags are those of ``mypy --strict``; given in the file, what `make lint` keeps is used."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).lstrip())
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    script.write_text(script.read_text().replace("-> int", "-> str"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Incompatible return value" in done.stdout, "control: errors are found"
