"""The facts on the page, from the small files of a study and one pass over its tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.clustering.names import ClusterNames
from daskcell.clustering.tables import shared_columns
from daskcell.errors import InputError
from daskcell.render.paint import colors, titled
from daskcell.study import CLUSTERS, Study
from daskcell.study.results import Assigned, Clustered, Converted, Fitted, Segmented

if TYPE_CHECKING:
    import pyarrow as pa

TYPICAL = 10
"""Number of cells shown that are nearest to a cluster's centre."""
FAR = 4
"""Number of cells shown that are farthest from it."""
_BATCH = 1 << 16
_MAX_TRAITS = 4
_MIN_DEVIATION = 0.5
_REDUNDANT = 0.8
"""Absolute correlation above which two measurements are considered redundant."""
_SAMPLE = 4000


@dataclass(frozen=True)
class Cell:
    """A cell to show."""

    slide: str
    label: int
    centre: tuple[float, float]
    """``(y, x)`` in pixels."""
    side: int
    """Longer side of its bounding box, in pixels."""
    distance: float


@dataclass(frozen=True)
class Trait:
    """A measurement in which a cluster differs from all cells."""

    name: str
    deviations: float
    """Mean of the cluster minus mean of all cells, in standard deviations of all cells."""


@dataclass
class Cluster:
    """A cluster as it is shown, after merges."""

    number: int
    title: str
    color: str
    """``#rrggbb``."""
    cells: int = 0
    share: float = 0.0
    area: float | None = None
    """Mean area, in the unit of `Facts.unit` squared."""
    traits: list[Trait] = field(default_factory=list)
    typical: list[Cell] = field(default_factory=list)
    far: list[Cell] = field(default_factory=list)


@dataclass
class SlideRow:
    """A slide, or all slides of one condition."""

    name: str
    slides: int
    cells: int
    counts: list[int]
    """Cells of each of `Facts.clusters`."""
    megapixels: float


@dataclass
class Facts:
    """Everything on the page except images."""

    slides: list[SlideRow]
    conditions: list[SlideRow]
    """The slides of each condition in the manifest together; empty if it names none."""
    clusters: list[Cluster]
    unassigned: int
    """Cells without a cluster, because a feature is missing or infinite."""
    unit: str
    """``µm``, or ``px`` if the pixel size of some slide is unknown."""
    seams: dict[str, Any]
    curve: list[dict[str, float]]
    """Scores by number of clusters, if ``cluster.k`` was ``auto``."""
    notes: list[str] = field(default_factory=list)
    """What the preprocessing of slides left out, such as padding."""

    @property
    def cells(self) -> int:
        return sum(row.cells for row in self.slides)

    @property
    def megapixels(self) -> float:
        return sum(row.megapixels for row in self.slides)


def gather(study: Study) -> Facts:
    """Read the facts of a study; slides that were set aside and missing clusters are left out."""
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    k = clustered.k if clustered else 0
    titles = titled(ClusterNames.load(study.paths.clusters).titles(k), k) if k else []
    palette = colors(k)
    clusters = [Cluster(i, title, "#" + bytes(palette[i]).hex()) for i, title in titles]
    rows, reports, assigned_slides, sizes, unassigned = [], [], [], [], 0
    notes: list[str] = []
    for name in study.slides:
        ledger = study.record.ledger(name)  # one at a time: thousands of them fill the memory
        converted, assigned = ledger.read(Converted), ledger.read(Assigned)
        if converted is None:
            continue
        reports.append(ledger.read(Segmented) or Segmented())
        fitted = ledger.read(Fitted)
        notes += fitted.notes if fitted else ()
        counts = assigned.counts if assigned else (0,) * k
        rows.append(
            SlideRow(name, 1, reports[-1].cells, [counts[g.number] for g in clusters], converted.pixels / 1e6)
        )
        if assigned is not None:
            unassigned += assigned.unassigned
            assigned_slides.append(name)
            sizes.append(converted.pixel_size)
    for i, cluster in enumerate(clusters):
        cluster.cells = sum(row.counts[i] for row in rows)
    total = sum(cluster.cells for cluster in clusters)
    for cluster in clusters:
        cluster.share = cluster.cells / max(total, 1)
    facts = Facts(
        rows,
        _conditions(study, rows),
        clusters,
        unassigned,
        "px" if None in sizes else "µm",
        seams(reports),
        _curve(study) if k else [],
        notes,
    )
    _add_cells(study, assigned_slides, facts)
    return facts


def _conditions(study: Study, rows: Sequence[SlideRow]) -> list[SlideRow]:
    found: dict[str, SlideRow] = {}
    for row in rows:
        name = study.conditions.get(row.name)
        if name is None:
            continue
        one = found.setdefault(str(name), SlideRow(str(name), 0, 0, [0] * len(row.counts), 0.0))
        one.slides += 1
        one.cells += row.cells
        one.megapixels += row.megapixels
        one.counts = [a + b for a, b in zip(one.counts, row.counts, strict=True)]
    return [found[name] for name in sorted(found)]


def seams(reports: Sequence[Segmented]) -> dict[str, Any]:
    """Combine the seam reports of many slides: sums, and the rate of label changes at and beside seams."""
    from daskcell.segmentation.core.seams import SeamReport

    return sum((report.seams for report in reports), SeamReport()).to_json()


def _curve(study: Study) -> list[dict[str, float]]:
    from daskcell.clustering import load_clusters

    return list(load_clusters(study.paths.clusters).curve_ or [])


# -- cells -------------------------------------------------------------------------------------------------
class _Tally:
    """Sums of measurements by cluster, the nearest and farthest cells of each, and a sample: every `step`-th
    cell."""

    def __init__(self, columns: Sequence[str], size: int, step: int):
        self.columns = list(columns)
        self.counts = np.zeros((size, len(columns)))
        self.sums = np.zeros((size, len(columns)))
        self.squares = np.zeros((size, len(columns)))
        self.near: list[list[Cell]] = [[] for _ in range(size)]
        self.far: list[list[Cell]] = [[] for _ in range(size)]
        self.sample: list[np.ndarray] = []
        self._step, self._seen = step, 0

    def add(self, slide: str, start: int, batch: pa.RecordBatch, cluster: np.ndarray) -> None:
        values = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
        good = cluster >= 0
        every = slice(-self._seen % self._step, None, self._step)
        self.sample.append(
            np.stack([values[name][every].astype(np.float64) for name in self.columns], axis=1)
        )
        self._seen += len(cluster)
        for i, name in enumerate(self.columns):
            numbers = values[name].astype(np.float64)
            there = good & np.isfinite(numbers)
            where, numbers = cluster[there], numbers[there]
            size = len(self.sums)
            self.counts[:, i] += np.bincount(where, minlength=size)
            self.sums[:, i] += np.bincount(where, numbers, minlength=size)
            self.squares[:, i] += np.bincount(where, numbers**2, minlength=size)
        # Cells cut by the border of the image are not shown.
        whole = good & ~values["touches_edge"] if "touches_edge" in values else good
        for number in np.unique(cluster[whole]):
            rows = np.flatnonzero(whole & (cluster == number))
            order = rows[np.lexsort((rows, values["distance"][rows]))]
            for kept, some, sign in (
                (self.near, order[:TYPICAL], 1.0),
                (self.far, order[::-1][:FAR], -1.0),
            ):
                best = kept[number] + [self._cell(slide, start, row, values) for row in some]
                best.sort(key=lambda cell: (sign * cell.distance, cell.slide, cell.label))
                kept[number] = best[: TYPICAL if kept is self.near else FAR]

    @staticmethod
    def _cell(slide: str, start: int, row: int, values: dict[str, np.ndarray]) -> Cell:
        side = max(
            values["bbox-2"][row] - values["bbox-0"][row], values["bbox-3"][row] - values["bbox-1"][row]
        )
        centre = float(values["centroid-0"][row]), float(values["centroid-1"][row])
        return Cell(slide, start + int(row) + 1, centre, int(side), float(values["distance"][row]))


_PLACES = ("centroid-0", "centroid-1", "bbox-0", "bbox-1", "bbox-2", "bbox-3", "touches_edge")


def _add_cells(study: Study, slides: Sequence[str], facts: Facts) -> None:
    """Fill in the areas, traits and cells to show, from the tables."""
    if not slides or not facts.clusters:
        return
    area = "area_um2" if facts.unit == "µm" else "area"
    try:
        columns = [
            name for name in shared_columns([study.paths.table(name) for name in slides]) if name != "area"
        ]
    except InputError:  # slides with different channels, or without measurements
        columns = []
    size = max(cluster.number for cluster in facts.clusters) + 1
    tally = _Tally([area, *columns], size, -(-max(facts.cells, 1) // _SAMPLE))
    for name in slides:
        for start, batch in _batches(study, name, [*tally.columns, *_PLACES]):
            cluster = batch.column("cluster").to_numpy(zero_copy_only=False).astype(np.int64)
            tally.add(name, start, batch, cluster)
    counts, sums = tally.counts.sum(axis=0), tally.sums.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / counts
        deviation = np.sqrt(np.maximum(tally.squares.sum(axis=0) / counts - mean**2, 0))
        means = tally.sums / tally.counts
        apart = np.where(deviation > 1e-9 * np.abs(mean), (means - mean) / deviation, 0.0)
        sample = np.concatenate(tally.sample)
        sample = sample[np.isfinite(sample).all(axis=1)]
        together = np.abs(np.corrcoef(sample.T)) if len(sample) > 1 else np.eye(len(mean))
    for cluster in facts.clusters:
        cluster.typical, cluster.far = tally.near[cluster.number], tally.far[cluster.number]
        cluster.far = [cell for cell in cluster.far if cell not in cluster.typical]
        value = means[cluster.number, 0]
        cluster.area = float(value) if np.isfinite(value) else None
        cluster.traits = _traits(tally.columns, np.nan_to_num(apart[cluster.number]), together)


def _traits(columns: Sequence[str], apart: np.ndarray, together: np.ndarray) -> list[Trait]:
    """The measurements in which a cluster differs most, leaving out redundant ones."""
    found: list[int] = []
    for i in np.lexsort((np.arange(len(columns)), -np.abs(apart))):
        if abs(apart[i]) < _MIN_DEVIATION or len(found) == _MAX_TRAITS:
            break
        if not any(together[i, j] > _REDUNDANT for j in found):
            found.append(int(i))
    return [Trait(columns[i].removesuffix("_um2"), float(apart[i])) for i in found]


def _batches(study: Study, slide: str, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A slide's cells in batches of rows, with their ``cluster`` and ``distance``."""
    import pyarrow.parquet as pq

    assigned = study.record.assigned_table(slide)
    assert assigned is not None
    of_cluster = pq.read_table(assigned, columns=["cluster", "distance"]).combine_chunks()
    with pq.ParquetFile(study.paths.table(slide)) as table:
        names = set(table.schema_arrow.names) - set(of_cluster.column_names)
        start = 0
        for batch in table.iter_batches(_BATCH, columns=[name for name in columns if name in names]):
            some = of_cluster.slice(start, len(batch)).combine_chunks()
            for name in some.column_names:
                batch = batch.append_column(name, some[name].chunk(0))
            yield start, batch
            start += len(batch)


def best_of(curve: Sequence[dict[str, float]]) -> int | None:
    """The number of clusters with the best score; of equal ones, the lower."""
    return int(max(curve, key=lambda one: (one["score"], -one["k"]))["k"]) if curve else None


def points(
    curve: Sequence[dict[str, float]], name: str, width: float, height: float
) -> list[tuple[float, float]]:
    """A column of `curve`, from 0 to 1, as points ``(x, y)`` of a chart `width` by `height`, y downwards."""
    first, last = curve[0]["k"], curve[-1]["k"]
    return [
        (
            round((one["k"] - first) / max(last - first, 1) * width, 1),
            round((1 - min(max(one[name], 0.0), 1.0)) * height, 1),
        )
        for one in curve
    ]


__all__ = ["Cell", "Cluster", "Facts", "SlideRow", "Trait", "best_of", "gather", "points", "seams"]
