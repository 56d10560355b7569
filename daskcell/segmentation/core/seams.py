"""The seam report: did cutting the image into blocks leave a trace?

A cell that is cut at a block border, doubled or missing on one side shows as a change of label exactly there.
Counted over all neighbouring pixels of which at least one belongs to a cell, such changes are as frequent
across the border of two blocks as across the lines beside it if, and only if, the border did nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from daskcell.geometry import Box
from daskcell.segmentation.core.cells import Cells, paint

NEAR = 8
"""Lines beside a seam that it is compared with."""
_STORED = {"halo_retries": "redone"}
"""Names in studies where they differ."""


@dataclass
class SeamReport:
    """Sums over blocks; add two reports with ``+``."""

    blocks: int = 0
    cells: int = 0
    halo_retries: int = 0
    """Blocks that were labelled again with a larger halo, for a cell that reached beyond it."""
    tiles: int = 0
    """Tiles that went through the network."""
    repeated: int = 0
    """Of these, tiles that went through it again for a larger halo."""
    skipped: int = 0
    """Tiles without tissue, not computed."""
    conflicts: int = 0
    """Pixels that two cells claimed."""
    seam_pairs: int = 0
    seam_changes: int = 0
    near_pairs: int = 0
    near_changes: int = 0

    def __add__(self, other: SeamReport) -> SeamReport:
        return SeamReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def seam_rate(self) -> float:
        """Share of label changes among neighbouring pixels across a block border; NaN without one."""
        return self.seam_changes / self.seam_pairs if self.seam_pairs else float("nan")

    @property
    def near_rate(self) -> float:
        """The same across the lines beside the borders."""
        return self.near_changes / self.near_pairs if self.near_pairs else float("nan")

    @property
    def cut_rate(self) -> float:
        """How much more often labels change at seams than beside them; 0 up to chance if nothing was cut."""
        return self.seam_rate - self.near_rate

    def to_json(self) -> dict[str, Any]:
        """Counts, and the rates that follow from them (None in place of NaN)."""
        rates = {"seam_rate": self.seam_rate, "near_rate": self.near_rate, "cut_rate": self.cut_rate}
        values = {_STORED.get(name, name): value for name, value in asdict(self).items()}
        return values | {name: None if np.isnan(rate) else rate for name, rate in rates.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SeamReport:
        """The report that `to_json` gave; other values, and rates, are left out."""
        names = {field.name: _STORED.get(field.name, field.name) for field in fields(cls)}
        return cls(**{name: values[stored] for name, stored in names.items() if stored in values})


def paint_core(
    parts: list[tuple[Cells, np.ndarray]], core: Box, shape: tuple[int, int]
) -> tuple[np.ndarray, SeamReport]:
    """Labels ``(h, w)`` uint32 of a block from the cells and ids reaching into it; what its seams show."""
    grown = Box(core.y0, core.x0, core.y1 + 1, core.x1 + 1).clip(shape)
    labels, conflicts = paint(parts, grown)
    report = count_changes(labels, core)
    report.conflicts = conflicts
    return labels[: core.shape[0], : core.shape[1]], report


def count_changes(labels: np.ndarray, core: Box) -> SeamReport:
    """Label changes across the right and lower border of `core`, and across lines just inside it.

    The lines of comparison are the `NEAR` next ones: they pass through the same cells as the border itself.

    Parameters
    ----------
    labels : (h, w)
        Labels of the core and, but at the image's border, of one more row and column after it.
    """
    report = SeamReport()
    down, across = core.shape
    for part, last in ((labels[:, :across], down), (labels[:down].T, across)):
        if part.shape[0] == last:
            continue  # the image ends here
        part = part[max(0, last - NEAR - 1) :]
        first, second = part[:-1], part[1:]
        pairs, changes = (first > 0) | (second > 0), first != second
        report.near_pairs += int(pairs[:-1].sum())
        report.near_changes += int(changes[:-1].sum())
        report.seam_pairs += int(pairs[-1].sum())
        report.seam_changes += int(changes[-1].sum())
    return report
