"""What the embedded segmenter is scored with was not trained on: no image, camera field, patient or well."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage.io import imread

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import segmenter_split

from daskcell.training.segmenter_data import list_sources

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def split(data_dir):
    return segmenter_split.split(data_dir)


def used(rows):
    """(image, rows of it) of a part."""
    return {(row.image, row.rows) for row in rows}


def test_no_image_is_in_both_parts(split):
    train, val = (used(split[part]) for part in ("train", "val"))
    assert len(train) == len(split["train"])
    assert not train & val
    for image in {name for name, _ in train} & {name for name, _ in val}:
        (a,), (b,) = ([rows for name, rows in part if name == image] for part in (train, val))
        assert int(a.split(":")[1]) <= int(b.split(":")[0]), f"rows {a} and {b} of {image}"


def test_nothing_kept_back_or_under_a_copyleft_licence_is_trained_on(split):
    names = [row.image for row in split["train"]]
    assert not [name for name in names if name.startswith(("dsb2018/val", "wbc-tecom"))]
    assert sum(name.startswith("dsb2018/train") for name in names) == 80


def test_patients_and_wells_are_in_one_part(split, data_dir):
    for folder in ("tnbc-he", "bbbc039"):
        groups = {r["name"]: r["group"] for r in segmenter_split._index(data_dir / folder)}
        train, val = (
            {groups[Path(r.image).stem] for r in split[part] if r.image.startswith(folder)}
            for part in ("train", "val")
        )
        assert train
        assert val
        assert not train & val


def test_fields_shared_with_val_are_not_trained_on(split, data_dir):
    shared = {
        entry["name"]
        for entry in segmenter_split._index(data_dir / "dsb2018-more")
        if "val" in entry["field_shared_with"]
    }
    assert len(shared) == 30
    assert not shared & {Path(row.image).stem for row in split["train"]}


@pytest.mark.slow
def test_no_trained_image_continues_in_one_that_is_kept(split, data_dir):
    """Tiles of one camera field fit together along their borders: seen in the pixels, not in the tables."""
    sides = {"top": np.s_[0], "bottom": np.s_[-1], "left": np.s_[:, 0], "right": np.s_[:, -1]}
    borders: dict[str, dict[int, list]] = {}
    for part in ("train", "val"):
        for row in split[part]:
            if not row.image.startswith("dsb2018"):
                continue
            pixels = imread(data_dir / row.image).astype(float)
            grey = pixels if pixels.ndim == 2 else pixels.mean(-1)
            for side, cut in sides.items():
                if grey[cut].std() < 1:
                    continue  # empty: fits anything
                borders.setdefault(part, {}).setdefault(len(grey[cut]), []).append(
                    (row.image, side, grey[cut])
                )
    fits = [("top", "bottom"), ("bottom", "top"), ("left", "right"), ("right", "left")]
    checked, joined = 0, []
    for length, val in borders["val"].items():
        train = borders["train"].get(length, [])
        for one, other in fits:
            a, b = ([e for e in part if e[1] == s] for part, s in ((train, one), (val, other)))
            if not a or not b:
                continue
            x, y = (np.stack([e[2] for e in part]) for part in (a, b))
            correlation = _standard(x) @ _standard(y).T / length
            apart = np.abs(x[:, None] - y[None]).mean(-1) / (x.std(1)[:, None] / 2 + y.std(1)[None] / 2)
            checked += correlation.size
            joined += [(a[i][0], b[j][0]) for i, j in np.argwhere((correlation > 0.95) & (apart < 0.17))]
    assert checked > 10_000
    assert not joined


def _standard(lines):
    return (lines - lines.mean(1, keepdims=True)) / np.maximum(lines.std(1, keepdims=True), 1e-6)


def test_the_tables_name_files_that_are_there(split, data_dir, tmp_path):
    segmenter_split.write(data_dir, tmp_path)
    for part in ("train", "val"):
        sources = list_sources(tmp_path / f"{part}.csv")
        assert len(sources) == len(split[part])
        assert all(s.image.is_file() and (s.mask is None or s.mask.is_file()) for s in sources)
        with open(tmp_path / f"{part}.csv", newline="") as file:
            assert {r["group"] for r in csv.DictReader(file)} == {s.group for s in sources}
