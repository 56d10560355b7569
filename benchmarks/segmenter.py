"""Cells found by a model in development images it was not trained on, image by image as ``daskcell run``.

    python benchmarks/segmenter.py [DATA] [--model tiny] [--only NAME] [--most 16] [--json FILE]

AP = TP / (TP + FP + FN), pooled over the images of a category, at IoU 0.5 and 0.75, with all settings at
their defaults. For white blood cells: the mean IoU of the cell in the middle, and the share of images where
it is at least 0.8. StarDist's published AP50 on its own split of dsb2018's fluorescence images is 0.835.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from segmenter_split import TOUCHES_TRAIN, Row, split
from skimage.io import imread

from daskcell.config import Config
from daskcell.evaluation import Counts, score_pair

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
Find = Callable[[np.ndarray], np.ndarray]


def category(row: Row) -> str:
    """Row of the table an image counts in."""
    name = Path(row.image).stem
    if name in TOUCHES_TRAIN:
        return "val images whose neighbours the first tiny saw"
    if row.group.startswith("fluo"):
        return "fluorescence nuclei"
    if row.group.startswith("purple"):
        return "stained tissue"
    return {
        "he_tnbc": "H&E, patients not trained on",
        "bbbc039": "U2OS screen, 16 bit",
        "pbc": "blood smears (against masks by watershed)",
        "rbc12": "red cells (against masks by watershed)",
    }.get(row.group, row.group)


def default_run(model: str) -> Find:
    """From channels ``(C, Y, X)`` to labels, as a run with default settings."""
    from daskcell.preprocess import apply_block, fit_plan
    from daskcell.segmentation import segment

    settings = Config()
    chosen = settings.segment.model_dump(exclude={"watershed", "tissue_mask", "keep_flows", "precision"})
    chosen["model"] = model

    def find(channels: np.ndarray) -> np.ndarray:
        plan = fit_plan(channels, settings.preprocess, is_rgb=len(channels) == 3)
        return np.asarray(segment(apply_block(channels, plan), **chosen))

    return find


def score_rows(find: Find, data: Path, rows: list[Row]) -> dict[str, float]:
    """AP of images of one category."""
    low, high = Counts(), Counts()
    for row in rows:
        channels, truth = read_row(data, row)
        at_half, at_most = score_pair(truth, find(channels)).values()
        low, high = low + at_half, high + at_most
    return {"images": len(rows), "cells": low.tp + low.fn, "AP50": low.ap, "AP75": high.ap}


def read_row(data: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Channels ``(C, Y, X)`` and labels."""
    pixels = imread(data / row.image) if not row.image.endswith(".tif") else tifffile.imread(data / row.image)
    channels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels[..., :3], -1, 0)
    if row.mask:
        truth = tifffile.imread(data / row.mask)
    else:
        from daskcell.training.smears import outline_smear

        truth = outline_smear(np.moveaxis(channels, 0, -1), float(row.white_cell))[0]
    start, _, stop = row.rows.partition(":")
    used = slice(int(start or 0), int(stop) if stop else None)
    return np.ascontiguousarray(channels[:, used]), truth[used].astype(np.int32)


def score_white_cells(find: Find, data: Path, most: int | None = None) -> dict[str, float]:
    """The cell in the middle of each image of `wbc-tecom`, nucleus and cytoplasm."""
    ious = []
    for file in sorted((data / "wbc-tecom" / "images").glob("*.png"))[
        :: 1 if most is None else max(1, 150 // most)
    ]:
        truth = tifffile.imread(data / "wbc-tecom" / "masks" / f"{file.stem}.tif") > 0
        found = find(np.moveaxis(imread(file)[..., :3], -1, 0))
        cell = middle_cell(found)
        ious.append((cell & truth).sum() / (cell | truth).sum())
    return {
        "images": len(ious),
        "IoU": float(np.mean(ious)),
        "IoU>=0.8": float(np.mean(np.array(ious) >= 0.8)),
    }


def middle_cell(labels: np.ndarray) -> np.ndarray:
    """Mask of the cell with most pixels in the middle 12 %, empty if there is none."""
    y, x = (slice(round(0.44 * n), round(0.56 * n) + 1) for n in labels.shape)
    sizes = np.bincount(labels[y, x].ravel())
    sizes[0] = 0
    return labels == sizes.argmax() if sizes.any() else np.zeros(labels.shape, bool)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--model", default="tiny", help="Name or file of weights.")
    parser.add_argument("--only", default="", help="Part of a category's name.")
    parser.add_argument("--most", type=int, help="Images of a category at most; all if not given.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    find = default_run(options.model)
    rows: dict[str, list[Row]] = {}
    for row in split(options.data)["val"]:
        rows.setdefault(category(row), []).append(row)
    table = {}
    for name, members in rows.items():
        if options.only in name:
            table[name] = score_rows(find, options.data, members[: options.most])
            show(name, table[name])
    if options.only in "white cells":
        table["white cells"] = score_white_cells(find, options.data, options.most)
        show("white cells", table["white cells"])
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


def show(name: str, row: dict[str, float]) -> None:
    """A line of the table."""
    numbers = (
        f"{key} {value:d}" if isinstance(value, int) else f"{key} {value:.3f}" for key, value in row.items()
    )
    print(f"{name:48s}", *numbers, flush=True)


if __name__ == "__main__":
    main()
