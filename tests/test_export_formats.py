"""Each format holds every cell, and opens in a library of those who read it."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import tifffile
from typer.testing import CliRunner

import daskcell as dc
from daskcell.cli import app
from daskcell.errors import InputError
from daskcell.export import cells, export_study, registry
from daskcell.export.registry import Exporter


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two small images of bright shapes, one with a hole in each cell, segmented and clustered."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        image = rng.poisson(10, (300, 340)).astype(np.uint8)
        for y in range(20, 280, 40):
            for x in range(20, 320, 40):
                side = int(rng.integers(12, 20))
                image[y : y + side, x : x + side] = rng.integers(90, 240)
                if name == "b":
                    image[y + 4 : y + 8, x + 4 : x + 8] = 10
        tifffile.imwrite(folder / "in" / f"{name}.tif", image, resolution=(20000, 20000), resolutionunit=3)
    settings = {
        "preprocess": {"gaussian": None},
        "segment": {"method": "watershed"},
        "cluster": {"k": 3},
        "output": {"report": False},
        "compute": {"kind": "inline", "block": 256},
    }
    return dc.run(folder / "in", folder / "study", settings)


def needed(format):
    """Skips a test where the package that a format needs is not installed."""
    for name in {"anndata": ["anndata"], "rois": ["roifile"]}.get(format, []):
        pytest.importorskip(name)


def labels_of(study, slide) -> np.ndarray:
    return study.labels(slide).compute(scheduler="sync")


@pytest.mark.slow
def test_geojson_has_the_outline_cluster_and_measurements_of_every_cell(study, tmp_path, monkeypatch):
    shapely = pytest.importorskip("shapely")
    monkeypatch.setattr(cells, "ROWS", 10)
    monkeypatch.setattr(cells, "PIXELS", 64 * 340)
    count = export_study(study, tmp_path / "out", "geojson")
    assert count == len(study.cells())
    for slide in study.slides:
        found = json.loads(gzip.decompress((tmp_path / "out" / f"{slide}.geojson.gz").read_bytes()))
        table, labels = study.cells(slide), labels_of(study, slide)
        assert found["type"] == "FeatureCollection"
        assert len(found["features"]) == len(table)
        y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
        drawn = np.zeros(labels.shape, int)
        for row, feature in enumerate(found["features"]):
            shape = shapely.from_geojson(json.dumps(feature["geometry"]))
            assert shape.is_valid
            assert shape.area == table["area"][row]
            drawn[shapely.contains_xy(shape, x, y)] = row + 1
            properties = feature["properties"]
            assert properties["objectType"] == "cell"
            assert properties["classification"]["name"] == f"cluster {table['cluster'][row]}"
            assert len(properties["classification"]["color"]) == 3
            assert properties["measurements"]["area"] == table["area"][row]
            assert "label" not in properties["measurements"]
        np.testing.assert_array_equal(drawn, labels)
        assert len({feature["id"] for feature in found["features"]}) == len(table)


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    for format in registry.exporters():
        if format in ("anndata", "rois"):  # HDF5 and ZIP files have their time in them
            continue
        for out in ("one", "two"):
            export_study(study, tmp_path / out / format, format, slides=["a"])
        (one,), (two,) = ((tmp_path / out / format).iterdir() for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), format


def test_masks_have_the_labels_and_the_pixel_size(study, tmp_path):
    export_study(study, tmp_path / "out", "masks")
    for slide in study.slides:
        with tifffile.TiffFile(tmp_path / "out" / f"{slide}.tif") as file:
            page = file.pages[0]
            np.testing.assert_array_equal(page.asarray(), labels_of(study, slide))
            assert page.dtype == np.uint16
            assert page.get_resolution("micrometer") == pytest.approx((2.0, 2.0))


def test_masks_of_many_cells_have_32_bits(study, tmp_path, monkeypatch):
    from daskcell.segmentation import index

    original = index.read_index

    def many(path):
        records = original(path)
        records["label"][-1] = 70_000
        return records

    monkeypatch.setattr(index, "read_index", many)
    export_study(study, tmp_path / "out", "masks", slides=["a"])
    assert tifffile.imread(tmp_path / "out" / "a.tif").dtype == np.uint32


def test_csv_is_the_table(study, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROWS", 7)
    export_study(study, tmp_path / "out", "csv")
    for slide in study.slides:
        pd.testing.assert_frame_equal(
            pd.read_csv(tmp_path / "out" / f"{slide}.csv"), study.cells(slide), check_dtype=False
        )


def test_rois_open_in_roifile_and_hold_the_cells(study, tmp_path):
    roifile, shapely = pytest.importorskip("roifile"), pytest.importorskip("shapely")
    export_study(study, tmp_path / "out", "rois")
    for slide in study.slides:
        table, labels = study.cells(slide), labels_of(study, slide)
        rois = roifile.roiread(tmp_path / "out" / f"{slide}.zip")
        assert sorted(int(roi.name) for roi in rois) == table["label"].tolist()
        for roi in rois:
            rings = roi.coordinates(multi=True)
            area = sum(shapely.Polygon(ring).area for ring in rings[:1])
            area -= sum(shapely.Polygon(ring).area for ring in rings[1:])
            assert area == np.count_nonzero(labels == int(roi.name))
            assert roi.group == table["cluster"][int(roi.name) - 1] + 1


@pytest.mark.slow
def test_a_cell_with_holes_and_parts_is_a_composite_roi():
    roifile = pytest.importorskip("roifile")
    from daskcell.export.rois import _roi
    from daskcell.render.outlines import trace_all

    labels = np.zeros((9, 12), np.uint8)
    labels[1:6, 1:6] = labels[7, 8:11] = 1
    labels[3, 3] = 0
    _, outlines = trace_all(labels)
    found = roifile.ImagejRoi.frombytes(_roi(outlines.polygons(0), "1", np.array([1, 2, 3]), 0))
    assert [len(ring) for ring in found.coordinates(multi=True)] == [5, 5, 5]
    assert (found.left, found.top, found.right, found.bottom) == (1, 1, 11, 8)


def test_cellposes_own_reader_reads_seg_files(study, tmp_path):
    from cellpose.io import imread

    export_study(study, tmp_path / "out", "seg")
    for slide in study.slides:
        file = tmp_path / "out" / f"{slide}_seg.npy"
        found = np.load(file, allow_pickle=True).item()
        np.testing.assert_array_equal(found["masks"], labels_of(study, slide))
        assert found["filename"].endswith(f"{slide}.tif")
        assert set(np.unique(found["outlines"])) == set(np.unique(found["masks"]))
        np.testing.assert_array_equal(imread(str(file)), found["masks"])


def test_anndata_has_features_table_and_places_in_one_order(study, tmp_path):
    anndata = pytest.importorskip("anndata")
    export_study(study, tmp_path / "out", "anndata")
    found = anndata.read_h5ad(tmp_path / "out" / "cells.h5ad")
    table = study.cells()
    np.testing.assert_array_equal(found.X, study.features().compute(scheduler="sync"))
    assert found.obs_names.tolist() == [
        f"{s}-{n}" for s, n in zip(table["slide"], table["label"], strict=True)
    ]
    np.testing.assert_array_equal(found.obs["area"], table["area"])
    np.testing.assert_array_equal(found.obsm["spatial"], table[["centroid-1", "centroid-0"]])
    assert found.obs["cluster"].astype(int).tolist() == table["cluster"].tolist()
    assert len(found.uns["cluster_colors"]) == len(found.obs["cluster"].cat.categories)
    assert found.obs["slide"].cat.categories.tolist() == study.slides


def test_an_export_that_was_cut_off_is_continued_and_no_foreign_file_is_touched(study, tmp_path, monkeypatch):
    written = []
    original = registry.find_exporter("csv")

    def stops(study, slides, path):
        written.extend(slides)
        if written == ["a", "b"]:
            raise KeyboardInterrupt
        return original.write(study, slides, path)

    monkeypatch.setattr(registry, "find_exporter", lambda name: Exporter(".csv", stops))
    with pytest.raises(KeyboardInterrupt):
        export_study(study, tmp_path / "out", "csv")
    assert export_study(study, tmp_path / "out", "csv") == len(study.cells("b"))
    assert written == ["a", "b", "b"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.csv", "b.csv"]
    with pytest.raises(InputError, match="exists already"):
        export_study(study, tmp_path / "out", "csv")


def test_formats_that_are_none_are_refused(study, tmp_path):
    with pytest.raises(InputError, match=r"no format 'svg' to export to\. There are: anndata, csv"):
        export_study(study, tmp_path / "out", "svg")
    with pytest.raises(InputError, match="has no slide 'c'"):
        export_study(study, tmp_path / "out", "csv", slides=["c"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", sorted(registry.exporters()))
def test_every_format_is_a_command(study, tmp_path, format):
    needed(format)
    done = CliRunner().invoke(app, ["export", format, str(study.out), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"{len(study.cells()):,} cells" in done.output
    assert len(list((tmp_path / "out").iterdir())) == (1 if format == "anndata" else 2)


def test_another_package_may_bring_a_format(study, tmp_path, monkeypatch):
    package = tmp_path / "packages"
    (package / "brought-1.0.dist-info").mkdir(parents=True)
    (package / "brought-1.0.dist-info" / "METADATA").write_text("Name: brought\nVersion: 1.0\n")
    (package / "brought-1.0.dist-info" / "entry_points.txt").write_text(
        "[daskcell.exporters]\nnames = brought:NAMES\nwrong = brought:write\nlost = brought:nothing\n"
    )
    (package / "brought.py").write_text(
        "from daskcell.export import Exporter\n"
        "def write(study, slides, path):\n    path.write_text(' '.join(slides))\n    return len(slides)\n"
        "NAMES = Exporter('.txt', write, together=True)\n"
    )
    monkeypatch.syspath_prepend(package)
    assert export_study(study, tmp_path / "out", "names") == 2
    assert (tmp_path / "out" / "cells.txt").read_text() == "a b"
    with pytest.raises(InputError, match=r"'wrong' is no daskcell\.export\.Exporter"):
        export_study(study, tmp_path / "wrong", "wrong")
    with pytest.raises(InputError, match=r"'lost' cannot be loaded from brought:nothing"):
        export_study(study, tmp_path / "lost", "lost")
