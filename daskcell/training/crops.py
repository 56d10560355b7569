"""Crops of a study's own cells, on disk, to train an encoder on.

Each slide's cells are cut once, as the study's settings cut them for its encoder, into one file; the training
reads a batch at a time from there. Cells are drawn evenly over the slides, so neither the memory nor the
files grow with the collection.

    study/tables/cells  ->  which cells  ->  images/<slide>.zarr, block by block  ->  crops/<key>.npy

A file belongs to the segmentation it was cut from and is used again as long as that holds. The folder's
`files.json` lists those we wrote: no other file there is touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import StudyError
from daskcell.geometry import Box, Grid
from daskcell.storage.atomic import remove, save_parts, temporaries, write_json

if TYPE_CHECKING:
    from daskcell.config import FeatureSettings
    from daskcell.preprocess import PreparedImage
    from daskcell.study import Study

BLOCK = 2048
SMALLEST = 40
"""Cells of fewer pixels show nothing."""
_SET = 512
"""Slides of fewer cells are put together: cells of one set are compared with each other."""
_VERSION = 1


@dataclass(frozen=True)
class SlideCells:
    """Some cells of one slide that are to be cut."""

    image: PreparedImage
    table: Path
    settings: FeatureSettings
    count: int
    """Of cells to cut at most."""
    key: str

    def records(self) -> np.ndarray:
        """Whole cells of a useful size, drawn at random, as `features.cell_index.RECORD`."""
        import pyarrow.parquet as pq

        from daskcell.features.cell_index import RECORD

        boxes = [f"bbox-{i}" for i in range(4)]
        table = pq.read_table(self.table, columns=["label", *boxes, "area", "touches_edge"])
        values = {name: table[name].to_numpy() for name in table.column_names}
        good = np.flatnonzero((values["area"] >= SMALLEST) & ~values["touches_edge"])
        if len(good) > self.count:
            good = np.sort(np.random.default_rng(0).choice(good, self.count, replace=False))
        records = np.zeros(len(good), RECORD)
        for name, column in zip(("label", "y0", "x0", "y1", "x1"), ("label", *boxes), strict=True):
            records[name] = values[column][good]
        # Any point of a cell will do to say which block cuts it.
        records["anchor_y"], records["anchor_x"] = records["y0"], records["x0"]
        records["area"] = values["area"][good]
        return records

    def labels(self, box: Box) -> np.ndarray:
        from daskcell.images import read_labels

        return read_labels(self.image.path, "cells", box)

    def cut(self) -> Iterator[np.ndarray]:
        """Crops ``(m, 3, side, side)`` uint8 of all cells that were drawn, some at a time."""
        from daskcell.features.cell_index import plan_reads
        from daskcell.features.crops import background_sample, crop_batches, fit_framing, sample_boxes
        from daskcell.models.encoder import SIZE

        chosen = self.settings
        boxes, step = sample_boxes(self.image.shape)
        framing = fit_framing(
            [background_sample(self.image.read(box), self.labels(box), step) for box in boxes],
            size=SIZE,
            margin=chosen.margin,
            window=chosen.window,
            mask=True,  # the encoder must see where the cell ends
            channels=chosen.channels,
        )
        grid = Grid.regular(self.image.shape, BLOCK)
        for reads in plan_reads(self.records(), grid, chosen.margin, chosen.window).values():
            for read in reads:
                pixels, labels = self.image.read(read.box), self.labels(read.box)
                for crops in crop_batches(pixels, labels, read.box, read.records, framing):
                    yield np.rint(crops * 255).astype(np.uint8)


def study_crops(
    studies: Sequence[Study],
    folder: str | Path,
    cells: int = 100_000,
    report: Callable[[str], None] = print,
) -> tuple[list[Joined], str]:
    """Crops of cells of some studies as files in `folder`, read when they are asked for.

    Parameters
    ----------
    cells
        At most, over all slides (12 KB each).

    Returns
    -------
    sets : list of `Joined`
        ``(n, 3, 64, 64)`` uint8 each, from one study.
    key : str
        Changes with the cells that are in them.

    Raises
    ------
    StudyError
        No study has enough cells.
    """
    folder = Path(folder)
    mine = _Crops(folder)
    found = [_slides(study) for study in studies]
    most = _fair([count for slides in found for _, count in slides], cells)
    sets: list[Joined] = []
    keys = []
    for study, slides in zip(studies, found, strict=True):
        files = []
        for name, count in slides:
            slide = _slide_cells(study, name, min(count, most))
            files.append(_on_disk(slide, mine, f"{study.out.name}/{name}", report))
            keys.append(slide.key)
        sets += join([file for file in files if len(file)], _SET)
    sets = [one for one in sets if len(one) >= 16]
    if not sets:
        names = ", ".join(str(study.out) for study in studies)
        raise StudyError(f"{names} has no 16 whole cells to learn from. Please run the study first.")
    mine.keep(keys)
    return sets, hashlib.sha256(" ".join(keys).encode()).hexdigest()


def _slides(study: Study) -> list[tuple[str, int]]:
    """Slides that are described, and how many cells each has."""
    import pyarrow.parquet as pq

    done = [name for name in study.slides if "describe" in study.record.ledger(name).stages]
    return [(name, pq.read_metadata(study.paths.table(name)).num_rows) for name in done]


def _fair(counts: Sequence[int], total: int) -> int:
    """The largest number such that taking at most so many of each gives at most `total`."""
    low, high = 0, max(counts, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(c, middle) for c in counts) <= total else (low, middle - 1)
    return max(low, 1)


def _slide_cells(study: Study, name: str, count: int) -> SlideCells:
    settings = study.config.features
    entry = study.record.ledger(name).entry("segment")
    assert entry is not None
    cut: list[Any] = [_VERSION, entry["key"], count, settings.margin, settings.window, settings.channels]
    key = hashlib.sha256(json.dumps(cut).encode()).hexdigest()[:32]
    return SlideCells(study.prepared(name), study.paths.table(name), settings, count, key)


class _Crops:
    """A folder of crops, and the list of those in it that we wrote."""

    def __init__(self, folder: Path):
        self.folder, self.list = folder, folder / "files.json"
        try:
            self.names: list[str] = json.loads(self.list.read_bytes())["crops"]
        except FileNotFoundError:
            self.names = []
        except (ValueError, KeyError, TypeError):
            raise StudyError(
                f"{self.list} is no list of crops that daskcell wrote. Please choose another folder."
            ) from None
        folder.mkdir(parents=True, exist_ok=True)

    def enter(self, key: str) -> None:
        """Enter a file that is to be written."""
        if key not in self.names:
            self.names.append(key)
            write_json(self.list, {"crops": self.names})

    def keep(self, keys: Sequence[str]) -> None:
        """Remove our files of other cells, and what runs that were killed left."""
        remove(*(self.folder / f"{key}.npy" for key in self.names if key not in keys))
        remove(*temporaries(self.folder))
        self.names = [key for key in self.names if key in keys]
        write_json(self.list, {"crops": self.names})


def _on_disk(slide: SlideCells, crops: _Crops, name: str, report: Callable[[str], None]) -> np.ndarray:
    """A slide's crops, memory-mapped; cut now if they are not there."""
    from daskcell.models.encoder import SIZE

    path = crops.folder / f"{slide.key}.npy"
    if not path.exists():
        crops.enter(slide.key)
        count = len(slide.records())
        save_parts(path, (count, 3, SIZE, SIZE), np.uint8, slide.cut() if count else [])
        report(f"{name}: {count} cells cut")
    # An empty file cannot be mapped.
    return np.load(path, mmap_mode="r") if path.stat().st_size > 512 else np.load(path)


class Joined:
    """Arrays of the same row shape as one, read where rows are asked for."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.shape = (int(self.ends[-1]), *self.parts[0].shape[1:])
        self.ndim, self.dtype = len(self.shape), self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Joined({self.shape} {self.dtype}, {len(self.parts)} files)"

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        which = np.searchsorted(self.ends, rows, side="right")
        for i in np.unique(which):
            some = which == i
            start = self.ends[i] - len(self.parts[i])
            out[some] = self.parts[i][rows[some] - start]
        return out


def join(files: Sequence[np.ndarray], least: int) -> list[Joined]:
    """Files put together, in order, to sets of at least `least` rows; what is left over joins the last."""
    sets: list[list[np.ndarray]] = []
    for file in files:
        if sets and sum(map(len, sets[-1])) < least:
            sets[-1].append(file)
        else:
            sets.append([file])
    if len(sets) > 1 and sum(map(len, sets[-1])) < least:
        sets[-2:] = [sets[-2] + sets[-1]]
    return [Joined(parts) for parts in sets]
