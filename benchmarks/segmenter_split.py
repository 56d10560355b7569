"""Which development images the embedded segmenter is trained on, and which are kept to score it.

    python benchmarks/segmenter_split.py DATA OUT

Writes ``OUT/train.csv`` and ``OUT/val.csv``, tables for ``daskcell train segmenter``. Split by camera field
and patient: no field, patient or well has images in both. Where a set is one field, the lower rows are kept.
White cells of `wbc-tecom` (GPL) are in neither.
"""

from __future__ import annotations

import argparse
import csv
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path

TOUCHES_VAL = {
    "fluo256_6bd18a21", "fluo256_a246bcaa", "fluo256_a6593632", "fluo360_63d981a1", "fluo360_66236902",
    "fluo360_f9ea1a11", "fluo512_80632d6b", "fluo520_193ffaa5", "purple_on_purple_f952cc65",
}  # fmt: skip
"""Images of dsb2018/train whose borders continue in an image of dsb2018/val (correlation above 0.95)."""
TOUCHES_TRAIN = {
    "fluo256_16c3d593", "fluo256_6fb82031", "fluo256_ba3997ed", "fluo360_06c77933", "fluo360_bbce7ebc",
    "fluo512_ad9d305c", "fluo520_150b0ffa", "purple_on_purple_65c8527c",
}  # fmt: skip
"""Their neighbours in dsb2018/val."""
PATIENTS = {"patient 02", "patient 09"}
"""Kept out of training, with all their images."""
WELLS = {"fluo_u2os_I01_s4", "fluo_u2os_O15_s6", "fluo_u2os_N12_s7", "fluo_u2os_B24_s9"}
GHOSTS = {"26", "36", "102", "198"}
"""Smears of rbc12 whose cells are too pale or too dark for the watershed that outlines them."""
WHITE_CELL = {"pbc": 130, "rbc12": 65}
"""Diameter in pixels."""


@dataclass(frozen=True)
class Row:
    """A row of a table (`daskcell.training.segmenter_data.list_sources`)."""

    image: str
    mask: str
    group: str
    white_cell: str = ""
    rows: str = ""


def split(data: Path) -> dict[str, list[Row]]:
    """Rows to train on (``train``) and to score with (``val``), files relative to `data`."""
    rows: dict[str, list[Row]] = {"train": [], "val": []}

    def add(part: str, folder: str, name: str, group: str, part_rows: str = "", ending: str = "png") -> None:
        rows[part].append(
            Row(f"{folder}/images/{name}.{ending}", f"{folder}/masks/{name}.tif", group, "", part_rows)
        )

    for entry in _index(data / "dsb2018"):
        part, name = entry["split"], entry["name"]
        if name not in TOUCHES_VAL:
            add(part, f"dsb2018/{part}", name, entry["category"])
    for entry in _index(data / "dsb2018-more"):
        if "val" not in entry["field_shared_with"]:
            add("train", "dsb2018-more", entry["name"], entry["category"])
    for entry in _index(data / "tnbc-he"):
        add("val" if entry["group"] in PATIENTS else "train", "tnbc-he", entry["name"], "he_tnbc")
    for entry in _index(data / "bbbc039"):
        add("val" if entry["name"] in WELLS else "train", "bbbc039", entry["name"], "bbbc039")
    for folder in ("cellbindb", "yeast-phase", "membrane-epithelium", "membrane-ovule"):
        for entry in _index(data / folder):
            group = entry["name"] if folder == "cellbindb" else folder
            cut = int(0.65 * int(entry["height"]))
            add("train", folder, entry["name"], group, f"0:{cut}")
            add("val", folder, entry["name"], group, f"{cut}:{entry['height']}")
    for file in sorted((data / "t98g-phase" / "images").glob("*.tif")):
        add("val" if file.stem == "t98g_16" else "train", "t98g-phase", file.stem, "t98g", ending="tif")
    smears = {folder: sorted((data / folder / "images").rglob("*.jpg")) for folder in WHITE_CELL}
    for folder, files in smears.items():
        files = [f for f in files if not (folder == "rbc12" and f.stem in GHOSTS)]
        for i, file in enumerate(files):
            name = file.relative_to(data).as_posix()
            rows["val" if i % 4 == 3 else "train"].append(Row(name, "", folder, str(WHITE_CELL[folder])))
    return rows


def _index(folder: Path) -> list[dict[str, str]]:
    with open(folder / "index.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(data: Path, out: Path) -> None:
    """Write the two tables."""
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in split(data).items():
        with open(out / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(f.name for f in fields(Row))
            for row in rows:
                image, mask, *rest = astuple(row)
                files = [os.path.relpath(data / name, out) if name else "" for name in (image, mask)]
                table.writerow([*files, *rest])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write(options.data, options.out)
