"""Scores: against brute force, against Cellpose's own, and on cases counted by hand."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from daskcell.config import PreprocessSettings
from daskcell.errors import InputError, InputWarning
from daskcell.evaluation import (
    Counts,
    match_cells,
    overlaps,
    score_folder,
    score_pair,
    score_table,
)
from daskcell.geometry import Box
from daskcell.images import convert, create_labels, open_image, write_labels_block
from daskcell.preprocess import apply_block, freeze
from daskcell.segmentation import segment

label_images = hnp.arrays(np.uint8, (5, 6), elements=st.integers(0, 4))


def brute_force(truth: np.ndarray, found: np.ndarray, threshold: float) -> int:
    """The largest number of pairs, by trying all assignments."""
    a = [truth == i for i in np.unique(truth) if i]
    b = [found == i for i in np.unique(found) if i]
    good = np.array([[(m & n).sum() / (m | n).sum() >= threshold for n in b] for m in a]).reshape(
        len(a), len(b)
    )
    if len(a) > len(b):
        good = good.T
    few, many = good.shape
    return max(
        (
            sum(good[i, j] for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(many), few)
        ),
        default=0,
    )


@settings(max_examples=150, deadline=None)
@given(truth=label_images, found=label_images, threshold=st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.75, 1.0]))
def test_right_cells_are_those_of_the_best_assignment(truth, found, threshold):
    counts = score_pair(truth, found, [threshold])[threshold]
    assert counts.tp == brute_force(truth, found, threshold)
    assert counts.tp + counts.fn == len(np.unique(truth[truth > 0]))
    assert counts.tp + counts.fp == len(np.unique(found[found > 0]))


@settings(max_examples=50, deadline=None)
@given(truth=label_images, found=label_images)
def test_overlaps_are_those_of_the_masks(truth, found):
    pairs = overlaps(truth, found)
    got = {(int(i), int(j)): iou for i, j, iou in zip(pairs.truth, pairs.found, pairs.iou, strict=True)}
    for i in range(1, 5):
        for j in range(1, 5):
            shared = ((truth == i) & (found == j)).sum()
            if shared:
                assert got.pop((i, j)) == shared / ((truth == i) | (found == j)).sum()
    assert not got


def random_cells(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = []
    for shift in (0, 1.5):
        labels = np.zeros((200, 200), np.int32)
        y, x = np.mgrid[:200, :200]
        for i, (cy, cx) in enumerate(itertools.product(range(12, 200, 22), range(12, 200, 22))):
            if rng.random() < 0.9:
                dy, dx = rng.normal(0, shift, 2)
                labels[(y - cy - dy) ** 2 + (x - cx - dx) ** 2 < rng.uniform(60, 100)] = i + 1
        images.append(labels)
    return images[0], images[1]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_same_as_cellpose_counts():
    metrics = pytest.importorskip("cellpose.metrics")
    truth, found = random_cells(0)
    thresholds = [0.5, 0.6, 0.75, 0.9]
    ap, tp, fp, fn = metrics.average_precision(truth, found, threshold=thresholds)
    ours = score_pair(truth, found, thresholds)
    assert [(c.tp, c.fp, c.fn) for c in ours.values()] == list(zip(tp, fp, fn, strict=True))
    np.testing.assert_allclose([c.ap for c in ours.values()], ap, rtol=1e-6)
    assert 0 < ours[0.9].tp < ours[0.5].tp


def test_labels_may_have_gaps_and_be_large():
    truth = np.array([[7, 7, 0, 4_000_000_000]], np.uint32)
    found = np.array([[9, 9, 0, 3]], np.uint16)
    a, b = match_cells(truth, found)
    assert (a.tolist(), b.tolist()) == ([7, 4_000_000_000], [9, 3])


FAR = {1: 5, 2: 2_200_000_000}


def two_cells(dtype=np.uint16, ids=FAR) -> np.ndarray:
    labels = np.zeros((64, 80), np.int64)
    labels[5:20, 5:20], labels[30:50, 30:50] = ids[1], ids[2]
    return labels.astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64, ">u4"])
def test_only_the_number_of_labels_takes_memory_not_their_size(dtype, tmp_path):
    truth, found = two_cells(np.uint16, {1: 1, 2: 2}), two_cells(dtype)
    for name, labels in (("truth", truth), ("found", found)):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "a.tif", labels)
    tracemalloc.start()
    assert score_pair(truth, found)[0.75] == Counts(2, 0, 0)
    assert score_folder(tmp_path / "found", tmp_path / "truth").loc["all", "ap_75"] == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


NO_LABELS = {
    "True and False": (two_cells() > 0, r"skimage\.measure\.label"),
    "floats": (two_cells(np.float32), r"whole numbers, but are float32: .*astype"),
    "negative": (np.where(two_cells() > 0, two_cells(np.int64), -1).astype(np.int32), r"below 0.*background"),
    "colours": (np.stack([two_cells(np.uint8), two_cells(np.uint8) // 2, two_cells(np.uint8)], -1), "colour"),
    "planes": (np.stack([two_cells()] * 12), r"\(Y, X\), but have the shape \(12, 64, 80\)"),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_is_no_label_image_is_one_sentence_that_helps(kind, tmp_path):
    found, sentence = NO_LABELS[kind]
    truth = two_cells(np.uint16, {1: 1, 2: 2})
    with pytest.raises(InputError, match=sentence):
        score_pair(truth, found)
    for name, labels in (("truth", truth), ("found", found)):
        (tmp_path / name).mkdir()
        photometric = "rgb" if kind == "colours" and name == "found" else "minisblack"
        tifffile.imwrite(tmp_path / name / "a.tif", labels, photometric=photometric)
    with pytest.raises(InputError, match=rf"a\.tif.*{sentence}"):
        score_folder(tmp_path / "found", tmp_path / "truth")


def test_a_masked_array_is_refused():
    with pytest.raises(InputError, match="masked"):
        score_pair(two_cells(), np.ma.masked_equal(two_cells(), 5))


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "LA", "I;16"])
def test_labels_in_a_png_are_its_values_whatever_its_colours(mode, tmp_path):
    labels = two_cells(np.uint8, {1: 1, 2: 2})
    picture = Image.fromarray(labels)
    if mode == "P":  # as in PASCAL VOC: the palette's colours are for the eye
        picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    else:
        picture = Image.fromarray(labels.astype(np.uint16)) if mode == "I;16" else picture.convert(mode)
    for name in ("truth", "found"):
        (tmp_path / name).mkdir()
    tifffile.imwrite(tmp_path / "truth" / "a.tif", labels)
    picture.save(tmp_path / "found" / "a.png")
    assert score_folder(tmp_path / "found", tmp_path / "truth").loc["all", "ap_75"] == 1


@pytest.mark.parametrize("value", [1, 255])
def test_one_label_in_several_pieces_is_named(value, tmp_path):
    mask = ((two_cells() > 0) * value).astype(np.uint8)
    with pytest.warns(InputWarning, match=r"one label in 2 pieces.*skimage\.measure\.label"):
        score_pair(two_cells(), mask)
    for name in ("truth", "found"):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "a.tif", mask)
    with pytest.warns(InputWarning, match=r"^a: The labels found are one label in 2 pieces"):
        score_folder(tmp_path / "found", tmp_path / "truth")


def test_two_halves_are_one_right_cell_and_one_surplus():
    truth = np.array([[1, 1, 1, 1]])
    found = np.array([[1, 1, 2, 2]])
    assert score_pair(truth, found, [0.5])[0.5] == Counts(1, 1, 0)


def test_measures_from_counts():
    counts = Counts(6, 2, 4)
    assert (counts.ap, counts.precision, counts.recall, counts.f1) == (6 / 12, 6 / 8, 6 / 10, 12 / 18)
    assert math.isnan(Counts().ap)


def test_counts_are_pooled_not_averaged():
    table = score_table(
        [("a", {0.5: Counts(1, 0, 0)}), ("a", {0.5: Counts(0, 0, 9)}), ("b", {0.5: Counts(2, 2, 0)})]
    )
    assert list(table.index) == ["a", "b", "all"]
    assert table.loc["a", "ap_50"] == 1 / 10
    assert table.loc["all", "ap_50"] == 3 / 14
    assert table.loc["all", "true_cells"] == 12


@pytest.fixture
def pictures(tmp_path):
    for name in ("truth", "found", "images"):
        (tmp_path / name).mkdir()
    for seed, name in enumerate(["one", "two", "three"]):
        truth, found = random_cells(seed)
        tifffile.imwrite(tmp_path / "truth" / f"{name}.tif", truth.astype(np.uint16))
        tifffile.imwrite(tmp_path / "found" / f"{name}.tif", found.astype(np.uint32))
        tifffile.imwrite(tmp_path / "images" / f"{name}.tif", found.astype(np.uint8))
    (tmp_path / "index.csv").write_text("split,name,category\nv,one,fluo\nv,two,fluo\nv,three,stained\n")
    return tmp_path


def test_categories_that_begin_alike_are_pooled():
    names = ["fluo256", "fluo_misc", "fluorophore", "stained"]
    scores = [(name, {0.5: Counts(i + 1, 1, 0)}) for i, name in enumerate(names)]
    table = score_table(scores)
    assert list(table.index) == [*names, "fluo*", "all"]
    assert table.loc["fluo*", "true_cells"] == 1 + 2


def test_labels_of_a_study_are_found_in_its_images(pictures):
    for name in ("one", "two", "three"):
        path = pictures / "study" / f"{name}.zarr"
        convert(pictures / "images" / f"{name}.tif", path)
        labels = tifffile.imread(pictures / "found" / f"{name}.tif")
        create_labels(path, "cells", block=256, dtype=np.uint32)
        write_labels_block(path, "cells", Box(0, 0, 200, 200), labels)
    by_study = score_folder(pictures / "study", pictures / "truth")
    assert by_study.equals(score_folder(pictures / "found", pictures / "truth"))


@pytest.mark.data
@pytest.mark.slow
def test_the_embedded_network_finds_real_nuclei(data_dir):
    folder = data_dir / "dsb2018"
    wanted = [f for f in (folder / "val" / "masks").iterdir() if f.stem.startswith("fluo520")]
    counts = Counts()
    for path in wanted:
        image = np.asarray(open_image(folder / "val" / "images" / f"{path.stem}.png").data)
        image = apply_block(image, freeze(image, PreprocessSettings(), is_rgb=len(image) == 3))
        counts += score_pair(tifffile.imread(path), segment(image, model="tiny", diameter=None))[0.5]
    assert counts.ap > 0.8


def test_a_folder_and_a_method_give_the_same_table(pictures):
    by_folder = score_folder(pictures / "found", pictures / "truth", index=pictures / "index.csv")
    assert list(by_folder.index) == ["fluo", "stained", "all"]
    expected = score_pair(*random_cells(2))
    assert by_folder.loc["stained", "ap_75"] == expected[0.75].ap
    by_method = score_folder(
        lambda picture: picture[0].astype(np.uint32),
        pictures / "truth",
        images=pictures / "images",
        index=pictures / "index.csv",
    )
    assert by_method.equals(by_folder)


def test_missing_results_are_named(pictures):
    (pictures / "found" / "two.tif").unlink()
    with pytest.raises(InputError, match=r"1 of 3 .*'two'"):
        score_folder(pictures / "found", pictures / "truth")
    with pytest.raises(InputError, match="images"):
        score_folder(lambda p: p[0], pictures / "truth")
    (pictures / "index.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="category"):
        score_folder(pictures / "images", pictures / "truth", images=pictures, index=pictures / "index.csv")


@pytest.mark.parametrize(
    ("truth", "found", "named"),
    [
        (np.zeros((3, 4), int), np.zeros((4, 3), int), r"\(3, 4\)"),
        (np.zeros((3, 4)), np.zeros((3, 4), int), "truth .*float64"),
        (np.full((3, 4), -1), np.zeros((3, 4), int), "truth .*below 0"),
    ],
)
def test_what_is_no_label_image_is_refused(truth, found, named):
    with pytest.raises(InputError, match=named):
        score_pair(truth, found)


@pytest.mark.parametrize("threshold", [0, 1.5, -1])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(InputError, match=str(threshold)):
        score_pair(np.ones((2, 2), int), np.ones((2, 2), int), [threshold])


@pytest.mark.parametrize("channels", [1, 2])
def test_the_embedded_network_takes_pictures_of_fewer_channels(channels):
    rng = np.random.default_rng(0)
    picture = np.zeros((channels, 120, 130), np.uint8)
    y, x = np.mgrid[:120, :130]
    for cy, cx in itertools.product(range(20, 110, 30), range(20, 120, 30)):
        picture[0, (y - cy) ** 2 + (x - cx) ** 2 < 90] = 200
    picture[0] += rng.integers(0, 20, (120, 130), dtype=np.uint8)
    full = np.repeat(picture, 3, axis=0) if channels == 1 else np.concatenate([picture, picture[:1] * 0])
    labels = np.asarray(segment(picture, model="tiny", diameter=None))
    assert labels.max() > 5
    np.testing.assert_array_equal(labels, np.asarray(segment(full, model="tiny", diameter=None)))
