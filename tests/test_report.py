"""The page tells what the study holds, needs nothing else, and is the same for the same results."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from daskcell.evaluation.truth import score_study
from daskcell.pipeline import run
from daskcell.pipeline.edit_clusters import edit_clusters
from daskcell.render.thumbnails import Thumbnails, common_side
from daskcell.report import facts, write_report
from daskcell.report.facts import FAR, TYPICAL, gather
from daskcell.study import Study

SETTINGS = {
    "segment": {"method": "watershed"},
    "features": {"measurements": True},
    "cluster": {"k": 3, "use": ["measurements"]},
    "compute": {"kind": "inline", "block": 256},
    "output": {"overlays": []},
}


def discs(seed: int, side: int = 320) -> np.ndarray:
    """Cells of three sizes on a grid; the larger, the darker."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    picture = generator.normal(10, 2, (side, side))
    for i, cy in enumerate(range(20, side - 15, 34)):
        for j, cx in enumerate(range(20, side - 15, 34)):
            kind = (i + 2 * j) % 3
            picture[(y - cy) ** 2 + (x - cx) ** 2 < (6 + 3 * kind) ** 2] += 180 - 45 * kind
    return picture.clip(0, 255).astype(np.uint8)


class Page(HTMLParser):
    """Text by section, pictures, and everything a page could load or run."""

    def __init__(self, html: str):
        super().__init__()
        self.pictures: list[bytes] = []
        self.loads: list[str] = []
        self.titles: list[str] = []
        self.text: dict[str, str] = {"": ""}
        self._section = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "link", "iframe", "object"):
            self.loads.append(tag)
        if tag == "section":
            self._section = values["id"]
        if tag == "img":
            kind, data = values["src"].split(",", 1)
            assert kind == "data:image/jpeg;base64"
            self.pictures.append(base64.b64decode(data))
            self.titles.append(values.get("title", ""))
        self.loads += [v for name, v in attributes if name in ("href", "src") and not v.startswith("data:")]
        self._open.append(tag)

    def handle_data(self, data):
        if "style" not in self._open[-1:]:
            self.text[self._section] = self.text.get(self._section, "") + data

    def handle_endtag(self, tag):
        self.handle_data(" ")
        if tag == "section":
            self._section = ""
        self._open.append("/" + tag)

    def words(self, section: str) -> str:
        return " ".join(self.text[section].split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("one", "two", "three"):
        tifffile.imwrite(
            folder / f"{name}.tif",
            discs(len(name), 560 if name == "three" else 320),
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )
    (folder / "torn.tif").write_bytes(b"")
    return run(folder, tmp_path_factory.mktemp("out") / "study", SETTINGS)


@pytest.fixture
def study(made, tmp_path):
    """A copy, to be changed."""
    shutil.copytree(made.out, tmp_path / "study")
    return Study(tmp_path / "study")


def page_of(study: Study) -> Page:
    return Page(study.paths.report.read_text(encoding="utf-8"))


def test_a_run_leaves_a_page_that_needs_nothing_else(made):
    page = page_of(made)
    assert page.loads == []
    cells = made.cells()
    assert f"{len(cells):,} cells" in page.words("")
    assert "3 clusters" in page.words("")
    for cluster, count in cells["cluster"].value_counts().items():
        assert f"cluster {cluster} {count:,} ·" in page.words("clusters")
    for name in ("one", "two", "three"):
        assert name in page.words("composition")
        assert f"{name}: {(cells['slide'] == name).sum()} cells" in page.words("slides")
    assert "torn" in page.words("set-aside")
    assert made.failures[0]["error"] in page.words("set-aside")
    for picture in page.pictures:
        Image.open(io.BytesIO(picture)).load()
    assert len(page.pictures) == 3 * (TYPICAL + FAR) + 3


def test_no_name_is_taken_for_markup(study):
    edit_clusters(study.out, lambda naming, k: naming.rename(1, "<script>alert(1)</script>", k))
    html = study.paths.report.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_typical_and_far_cells_are_those_of_the_whole_table(made):
    cells = made.cells()
    cells["row"] = np.arange(len(cells))
    whole = cells[~cells["touches_edge"]]
    found = gather(made)
    for cluster in found.clusters:
        mine = whole[whole["cluster"] == cluster.number].sort_values(["distance", "slide", "label"])
        near = [(cell.slide, cell.label) for cell in cluster.typical]
        assert near == list(mine[["slide", "label"]].head(TYPICAL).itertuples(index=False, name=None))
        far = {cell.distance for cell in cluster.far}
        assert far == set(mine["distance"].tail(FAR).astype(float))
        for cell in cluster.typical:
            row = mine[(mine["slide"] == cell.slide) & (mine["label"] == cell.label)].iloc[0]
            assert cell.centre == (row["centroid-0"], row["centroid-1"])


def test_traits_and_areas_are_those_of_the_whole_table(made):
    cells = made.cells()
    found = gather(made)
    assert found.unit == "µm"
    for cluster in found.clusters:
        mine = cells[cells["cluster"] == cluster.number]
        np.testing.assert_allclose(cluster.area, mine["area_um2"].mean(), rtol=1e-9)
        assert cluster.traits, "discs of three sizes differ in something"
        for trait in cluster.traits:
            column = "area_um2" if trait.name == "area" else trait.name
            apart = (mine[column].mean() - cells[column].mean()) / cells[column].std(ddof=0)
            np.testing.assert_allclose(trait.deviations, apart, rtol=1e-6)
            assert abs(apart) >= 0.5
        assert [abs(t.deviations) for t in cluster.traits] == sorted(
            (abs(t.deviations) for t in cluster.traits), reverse=True
        )


def test_no_trait_says_again_what_another_said(made):
    cells = made.cells()
    for cluster in gather(made).clusters:
        names = ["area_um2" if trait.name == "area" else trait.name for trait in cluster.traits]
        together = cells[names].corr().abs().to_numpy()
        assert together[~np.eye(len(names), dtype=bool)].max(initial=0) <= 0.81


def test_small_batches_tell_the_same(made, monkeypatch):
    expected = gather(made)
    monkeypatch.setattr(facts, "_BATCH", 7)
    again = gather(made)
    assert again.clusters[0].typical == expected.clusters[0].typical
    assert [[t.name for t in g.traits] for g in again.clusters] == [
        [t.name for t in g.traits] for g in expected.clusters
    ]


def test_a_cell_is_shown_in_the_middle_with_its_outline(made):
    cluster = gather(made).clusters[0]
    cell = cluster.typical[0]
    side = common_side([typical.side for typical in cluster.typical])
    jpeg = Thumbnails(made.prepared).cell(cell.slide, cell.label, cell.centre, side, "#ff0000")
    drawn = np.asarray(Image.open(io.BytesIO(jpeg)), float)
    red = (drawn[..., 0] > 150) & (drawn[..., 1] < 110)
    y, x = np.nonzero(red)
    scale = drawn.shape[0] / side
    radius = np.hypot(y - drawn.shape[0] / 2, x - drawn.shape[1] / 2) / scale
    assert len(y) > 20
    assert abs(np.median(radius) - cell.side / 2) < 2.5
    assert drawn[drawn.shape[0] // 2, drawn.shape[1] // 2].mean() > 80


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(made, tmp_path):
    inputs = Path(made.record["inputs"][0])
    again = run(inputs, tmp_path / "another" / "name", SETTINGS)
    assert again.paths.report.read_bytes() == made.paths.report.read_bytes()


@pytest.mark.slow
def test_a_page_is_written_again_only_when_it_would_say_something_else(study):
    inputs = study.record["inputs"][0]
    before = study.paths.report.stat().st_mtime_ns
    run(inputs, study.out, SETTINGS)
    assert study.paths.report.stat().st_mtime_ns == before
    study.paths.report.write_text("scribbled over")
    run(inputs, study.out, SETTINGS)
    assert study.paths.report.stat().st_size > 10_000
    edit_clusters(study.out, lambda naming, k: naming.rename(0, "lymphocyte", k))
    assert "lymphocyte" in page_of(study).words("clusters")
    run(inputs, study.out, SETTINGS | {"output": {"overlays": [], "report": False}})
    assert not study.paths.report.exists()


def test_clusters_that_were_joined_are_shown_as_one(study):
    edit_clusters(study.out, lambda naming, k: naming.merge([0, 2], k, "both"))
    found = gather(study)
    assert [cluster.title for cluster in found.clusters] == ["both", "cluster 1"]
    assert sum(cluster.cells for cluster in found.clusters) == len(study.cells())
    assert "both" in page_of(study).words("clusters")


@pytest.mark.slow
def test_known_types_are_compared(study, tmp_path):
    cells = study.cells()
    truth = cells[["slide", "label"]].assign(
        type=np.where(cells["area"] > cells["area"].median(), "big", "small")
    )
    truth.to_csv(tmp_path / "truth.csv", index=False)
    scores = score_study(study, tmp_path / "truth.csv")
    write_report(study)
    words = page_of(study).words("truth")
    assert f"(ARI) {scores['ari']:.3f}" in words
    assert f"(NMI) {scores['nmi']:.3f}" in words
    for kind, counts in zip(scores["types"], scores["contingency"], strict=True):
        numbers = " ".join(str(count) if count else "·" for count in counts)
        assert f"{kind} {sum(counts)} {numbers}" in words
    # Other clusters than those that were compared: the figures would be wrong.
    edit_clusters(study.out, lambda naming, k: naming.merge([0, 1], k))
    assert "truth" not in page_of(study).text


@pytest.mark.slow
def test_the_choice_of_the_number_of_clusters_is_shown(study):
    settings = SETTINGS | {"cluster": {"k": "auto", "use": ["measurements"]}}
    again = run(study.record["inputs"][0], study.out, settings)
    found = gather(again)
    assert facts.best_of(found.curve) == len(found.clusters)
    html = again.paths.report.read_text()
    lines = re.findall(r'<polyline points="([^"]+)"', html)
    assert [len(line.split()) for line in lines] == [len(found.curve)] * 3


def test_seams_are_told(made):
    reports = [made.record.ledger(name).entry("segment")["result"] for name in ("one", "two", "three")]
    assert [report["blocks"] for report in reports] == [4, 4, 9]
    words = page_of(made).words("seams")
    assert f"{len(made.cells())} cells in 17 blocks" in words
    assert "0 pixels were claimed by two cells" in words
    changes, pairs = (sum(report[name] for report in reports) for name in ("seam_changes", "seam_pairs"))
    assert f"{100 * changes / pairs:.2f} % of neighbouring pixels across a seam" in words


def test_a_study_without_clusters_has_a_page_too(tmp_path):
    tifffile.imwrite(tmp_path / "blank.tif", np.full((64, 64), 9, np.uint8))
    study = run(tmp_path / "blank.tif", tmp_path / "out", SETTINGS)
    page = page_of(study)
    assert "0 cells" in page.words("")
    assert "no cell was found" in page.words("set-aside")
    assert page.pictures == []
    assert "clusters" not in page.text


@pytest.mark.slow
def test_slides_of_one_condition_are_added_up(tmp_path):
    rows = []
    for number, name in enumerate(("one", "two", "three")):
        tifffile.imwrite(tmp_path / f"{name}.tif", discs(number, 128))
        rows.append({"path": f"{name}.tif", "condition": "treated" if number else "control"})
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    study = run(tmp_path / "table.csv", tmp_path / "out", SETTINGS)
    found = gather(study)
    assert [(row.name, row.slides) for row in found.conditions] == [("control", 1), ("treated", 2)]
    cells = study.cells()
    for row in found.conditions:
        mine = cells[cells["condition"] == row.name]
        assert row.cells == len(mine)
        assert row.counts == [int((mine["cluster"] == cluster.number).sum()) for cluster in found.clusters]
    assert found.unit == "px"
    assert "treated (2 slides)" in page_of(study).words("composition")
