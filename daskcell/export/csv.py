"""The table of the cells as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from daskcell.export.cells import rows
from daskcell.export.registry import Exporter

if TYPE_CHECKING:
    from daskcell.study import Study


def write_csv(study: Study, slides: list[str], path: Path) -> int:
    """Write the table of the cells of a slide as UTF-8 CSV with a header; see `Study.cells`."""
    (slide,) = slides
    count = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        for part in rows(study, slide):
            part.to_csv(file, index=False, header=count == 0)
            count += len(part)
        if not count:
            study.cells(slide).to_csv(file, index=False)
    return count


EXPORTER = Exporter(".csv", write_csv)
