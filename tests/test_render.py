"""Cells are coloured where they are, in their cluster's colour, the same for any blocks; files open
elsewhere."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import skimage.io
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from daskcell import images
from daskcell.compute import Workers
from daskcell.config import PreprocessSettings
from daskcell.errors import InputError
from daskcell.geometry import Grid
from daskcell.preprocess import PreparedImage, fit_slide
from daskcell.render import (
    CLUSTER_COLORS,
    add_legend,
    colors,
    overlay,
    paint,
    write_cluster_labels,
    write_overlay,
)
from daskcell.render.paint import borders


def scene(side: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = np.zeros((side, side), np.uint32)
    labels[5:25, 5:25], labels[5:25, 25:45], labels[30:50, 10:40] = 1, 2, 3
    image = np.random.default_rng(0).integers(0, 255, (3, side, side)).astype(np.uint8)
    return image, labels, np.array([1, 0, -1])


def test_cells_are_outlined_in_their_clusters_colour_and_the_rest_is_the_picture():
    image, labels, clusters = scene()
    picture = overlay(image, labels, clusters)
    assert picture.shape == (60, 60, 3)
    assert picture.dtype == np.uint8
    for label in (1, 2):
        edge = borders(labels, 1) & (labels == label)
        assert (picture[edge] == CLUSTER_COLORS[clusters[label - 1]]).all()
    untouched = (labels == 0) | (labels == 3)
    np.testing.assert_array_equal(picture[untouched], np.moveaxis(image, 0, -1)[untouched])


def test_texture_stays_visible_inside_a_cell():
    image, labels, clusters = scene()
    inside = (labels == 1) & ~borders(labels, 1)
    tinted = overlay(image, labels, clusters)[inside].mean(axis=1)
    original = np.moveaxis(image, 0, -1)[inside].max(axis=1)
    assert np.corrcoef(tinted, original)[0, 1] > 0.7
    flat = overlay(np.full_like(image, 128), labels, clusters)[inside]
    assert np.argmax(flat.mean(axis=0)) == np.argmax(CLUSTER_COLORS[1]), "and so does the type"


def test_touching_cells_of_one_cluster_are_kept_apart():
    _, labels, _ = scene()
    picture = overlay(np.zeros((3, 60, 60), np.uint8), labels, np.array([2, 2, 2]))
    assert (picture[15, 24] == CLUSTER_COLORS[2]).all()
    assert (picture[15, 25] == CLUSTER_COLORS[2]).all()
    assert (picture[15, 20] != CLUSTER_COLORS[2]).any()


@pytest.mark.slow
@given(st.integers(11, 60), st.integers(11, 60), st.integers(0, 3), st.booleans())
@settings(max_examples=12, deadline=None)
def test_no_pixel_depends_on_the_chunks(rows, columns, outline, deep):
    image, labels, clusters = scene()
    image = image.astype(np.float32) * 7 if deep else image
    expected = overlay(image, labels, clusters, outline=outline)
    lazy = overlay(
        da.from_array(image, chunks=(2, columns, rows)),
        da.from_array(labels, chunks=(rows, columns)),
        clusters,
        outline=outline,
    )
    assert isinstance(lazy, da.Array)
    assert lazy.shape == (60, 60, 3)
    np.testing.assert_array_equal(lazy.compute(), expected)


def test_borders_lie_inside_both_cells_and_not_at_the_pictures_border():
    labels = np.zeros((9, 9), int)
    labels[:, 4:] = 1
    assert borders(labels, 1).any(axis=0).nonzero()[0].tolist() == [3, 4]
    assert borders(labels, 2).any(axis=0).nonzero()[0].tolist() == [2, 3, 4, 5]
    assert not borders(np.ones((5, 5), int), 2).any()


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
def test_any_number_of_channels_makes_a_picture(channels):
    _, labels, clusters = scene()
    image = np.random.default_rng(0).integers(0, 4000, (channels, 60, 60)).astype(np.uint16)
    outside = overlay(image, labels, clusters)[labels == 0]
    assert outside.max() > 200
    assert outside.min() < 60
    if channels == 1:
        assert (outside == outside[:, :1]).all()


def test_one_bright_speck_does_not_darken_the_picture():
    image = np.random.default_rng(0).normal(100, 10, (60, 60))
    image[3, 3] = 60000
    assert overlay(image, np.zeros((60, 60), int), np.zeros(0, int)).mean() > 80


def test_a_dark_picture_is_made_bright_and_a_bright_one_left_alone():
    dark = np.random.default_rng(0).integers(0, 40, (3, 60, 60)).astype(np.uint8)
    assert overlay(dark, np.zeros((60, 60), int), np.zeros(0, int)).max() > 240
    bright = dark + 200
    shown = overlay(bright, np.zeros((60, 60), int), np.zeros(0, int))
    np.testing.assert_array_equal(np.moveaxis(shown, -1, 0), bright)


def test_missing_pixels_and_empty_pictures_are_black():
    image = np.full((1, 20, 20), np.nan)
    assert overlay(image, np.zeros((20, 20), int), np.zeros(0, int)).max() == 0


@pytest.mark.parametrize(
    ("image", "labels", "clusters", "words"),
    [
        (np.zeros((3, 5, 5)), np.zeros((5, 4), int), np.zeros(1, int), "shapes"),
        (np.zeros((3, 5, 5)), np.full((5, 5), 2), np.zeros(1, int), "cell 2, but clusters of 1"),
        (np.zeros((3, 5, 5)), np.zeros((5, 5), int), np.zeros(1), "whole number per cell"),
    ],
)
def test_what_does_not_fit_is_refused(image, labels, clusters, words):
    with pytest.raises(InputError, match=words):
        overlay(image, labels, clusters)


def test_labels_below_0_have_no_colour_of_another_cell():
    image, labels, clusters = scene()
    below = da.from_array(np.where(labels == 0, -1, labels.astype(int)))
    with pytest.raises(InputError, match="below 0"):
        overlay(image, below, clusters).compute(scheduler="synchronous")


@pytest.mark.parametrize("cluster", [70_000, 2_200_000_000, 2**63 + 5])
def test_clusters_far_beyond_their_number_say_how_to_renumber_them(cluster):
    image, labels, _ = scene()
    with pytest.raises(InputError, match=rf"{cluster}.*np\.unique"):
        overlay(image, labels, np.array([0, 1, cluster], np.uint64))


@pytest.mark.parametrize(
    "options",
    [
        {"palette": np.zeros((1, 3), np.uint8)},
        {"palette": np.zeros((3, 4), np.uint8)},
        {"palette": np.full((3, 3), 0.5)},
        {"palette": np.full((3, 3), 256)},
        {"opacity": 7},
        {"opacity": float("nan")},
        {"outline": -1},
    ],
)
def test_options_that_cannot_be_are_named(options):
    image, labels, clusters = scene()
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        overlay(image, labels, clusters, **options)


def test_colours_are_stable_and_can_be_told_apart():
    from skimage.color import rgb2lab

    assert (colors(300)[:11] == colors(11)).all()
    assert len(np.unique(colors(200), axis=0)) == 200
    lab = rgb2lab(colors(11)[None] / 255)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(11)
    assert distance.min() > 25
    assert 25 < lab[:, 0].min() < lab[:, 0].max() < 96, "neither black nor white"


def test_colours_can_be_told_apart_without_red_or_green_cones():
    from skimage.color import rgb2lab

    linear = (colors(11) / 255) ** 2.2
    views = {
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }
    for matrix in views.values():
        lab = rgb2lab(np.clip(linear @ np.array(matrix).T, 0, 1)[None] ** (1 / 2.2))[0]
        assert (np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(11)).min() > 12


@pytest.mark.parametrize(("side", "k"), [(64, 3), (300, 11), (200, 60)])
def test_the_legend_stands_beside_an_unchanged_picture(side, k):
    picture = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    out = add_legend(picture, colors(k), np.arange(k))
    np.testing.assert_array_equal(out[:side, :side], picture)
    shown = {tuple(pixel) for pixel in out[:, side:].reshape(-1, 3).tolist()}
    count = sum(tuple(color) in shown for color in colors(k).tolist())
    assert count == k if k <= 11 else count > 3


def test_a_block_is_painted_by_the_lookup():
    labels = np.array([[1, 1, 2]])
    out = paint(np.zeros((1, 3, 3), np.float32), labels, np.array([0, 2, 0]), colors(2), outline=0, opacity=1)
    assert (out[0, 0] > 0).any()
    assert (out[0, 2] == 0).all()


# -- from disk to disk --------------------------------------------------------------------------------


def prepared(path, **settings) -> PreparedImage:
    nothing = {"reconstruct": None, "histogram": None}
    plan = fit_slide(path, PreprocessSettings.model_validate(nothing | settings))
    return PreparedImage(str(path), plan)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlay")
    rng = np.random.default_rng(0)
    labels = np.kron(np.arange(1, 121).reshape(10, 12), np.ones((120, 110), int)).astype(np.uint32)
    labels[::10] = 0
    image = rng.integers(0, 4000, (2, *labels.shape)).astype(np.uint16)
    tifffile.imwrite(folder / "s.tif", image, metadata={"axes": "CYX"}, photometric="minisblack")
    path = folder / "s.zarr"
    images.convert(folder / "s.tif", path)
    images.create_labels(path, "cells", block=512, dtype=np.uint32)
    for index in (grid := Grid.regular(labels.shape, 512)):
        images.write_labels_block(path, "cells", grid.core(index), labels[grid.core(index).slices])
    images.build_label_pyramid(path, "cells")
    clusters = rng.integers(-1, 3, 120).astype(np.int32)
    table = folder / "s.parquet"
    pd.DataFrame({"label": np.arange(1, 121), "area": 12000, "cluster": clusters}).to_parquet(table)
    return path, table, image, labels, clusters


def test_the_label_image_of_clusters_has_values_colours_and_counts(slide):
    from ome_zarr_models.v05 import ImageLabel

    path, table, _, labels, clusters = slide
    counts = write_cluster_labels(path, table, 3, Workers(), 512, names=["round", "long", "flat"])
    assert counts == [(clusters == i).sum() for i in range(3)]
    got = np.asarray(zarr.open_array(path / "labels" / "clusters" / "0", mode="r"))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.concatenate([[0], clusters + 1])[labels])
    label = ImageLabel.from_zarr(
        zarr.open_group(path / "labels" / "clusters", mode="r")
    ).ome_attributes.image_label
    assert [(c.label_value, c.rgba[:3]) for c in label.colors] == [
        (i + 1, tuple(c)) for i, c in enumerate(colors(3).tolist())
    ]
    properties = dict(zarr.open_group(path / "labels" / "clusters", mode="r").attrs)["ome"]["image-label"]
    assert [entry["name"] for entry in properties["properties"]] == ["round", "long", "flat"]
    assert [entry["count"] for entry in properties["properties"]] == counts
    assert "clusters" in images.image_info(path).labels


def test_many_clusters_get_a_wider_type(slide):
    path, table, _, _, _ = slide
    write_cluster_labels(path, table, 300, Workers(), 512)
    assert zarr.open_array(path / "labels" / "clusters" / "0", mode="r").dtype == np.uint16


@pytest.mark.slow
def test_overlay_files_open_elsewhere_and_show_the_overlay(slide, tmp_path):
    path, table, image, labels, clusters = slide
    files = write_overlay(prepared(path), table, table, tmp_path, "s", 3, Workers())
    assert [file.name for file in files] == ["s.tif", "s.png"]
    expected = overlay(image, labels, clusters, outline=2)
    with tifffile.TiffFile(files[0]) as tif:
        assert tif.pages[0].is_tiled
        assert tif.pages[0].compression != 1
        np.testing.assert_array_equal(tif.asarray(), expected)
    np.testing.assert_array_equal(skimage.io.imread(files[0]), expected)
    png = skimage.io.imread(files[1])
    np.testing.assert_array_equal(png[: expected.shape[0], : expected.shape[1]], expected)
    assert png.shape[1] > expected.shape[1], "legend"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.png", "s.tif"]


def test_a_large_image_is_shown_at_a_level_of_its_pyramid(slide, tmp_path):
    path, table, _, _, _ = slide
    image = prepared(path, gaussian={"sigma": 2.0})
    (file,) = write_overlay(image, table, table, tmp_path, "s", 3, Workers(), formats=["tif"], side=700)
    picture = tifffile.imread(file)
    assert picture.shape == (*images.image_info(path).levels[1], 3)
    assert picture.std() > 20


def test_a_slide_without_cells_is_shown_as_it_is(slide, tmp_path):
    image = np.full((1, 300, 300), 7, np.uint8)
    image[0, 100:200] = 99
    tifffile.imwrite(tmp_path / "e.tif", image[0])
    images.convert(tmp_path / "e.tif", tmp_path / "e.zarr")
    images.create_labels(tmp_path / "e.zarr", "cells", block=512, dtype=np.uint32)
    path, table = tmp_path / "e.zarr", tmp_path / "e.parquet"
    pd.read_parquet(slide[1]).iloc[:0].to_parquet(table)
    assert write_cluster_labels(path, table, 3, Workers(), 512) == [0, 0, 0]
    for file in write_overlay(prepared(path), table, table, tmp_path, "e", 3, Workers()):
        assert np.unique(skimage.io.imread(file)[:300, :300]).tolist() == [0, 255]


def test_a_table_without_clusters_is_refused(slide, tmp_path):
    path = slide[0]
    pd.DataFrame({"label": [1], "area": [2]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="no column 'cluster'"):
        write_cluster_labels(path, tmp_path / "t.parquet", 3, Workers(), 512)
