"""Which clusters of a study live beside which: counts and chance per slide, per condition, over all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from daskcell.errors import InputError, StudyError

if TYPE_CHECKING:
    import pandas as pd

    from daskcell.study import Study

ALL = "all"
"""Slide and condition of the rows that add up all slides."""


def study_neighbours(
    study: Study | str | os.PathLike[str],
    radius: float | None = None,
    *,
    k: int | None = None,
    gap: float | None = None,
    slides: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Count how often cells of the clusters of a study are neighbours, and compare with chance.

    Parameters
    ----------
    study : Study or path
        With clusters.
    radius, k, gap
        One of them; who is whose neighbour, in pixels of each slide: see `daskcell.neighbours`.
    slides : list of str, optional
        Only these.

    Returns
    -------
    DataFrame
        A row for every slide and every two clusters that the slide has: ``slide``, ``condition`` (where a
        manifest names it), ``cluster`` and ``other`` (names), ``count`` (pairs of neighbours), ``expected``
        and ``variance`` under random labelling within the slide, and ``enrichment``, standard deviations
        above the expected. Then the same for each condition, and last for all slides, where slide is "all":
        sums over slides, which chance treats one by one.

    Raises
    ------
    StudyError
        The study or a slide has no clusters yet.
    InputError
        There is no such slide, or none or two of `radius`, `k`, `gap`.
    """
    import pandas as pd

    from daskcell.clustering import neighbours
    from daskcell.study import Study

    study = study if isinstance(study, Study) else Study(study)
    for name in slides or ():
        if name not in study.slides:
            raise InputError(f"{study.out} has no slide {name!r}.")
    parts = []
    for name in study.slides if slides is None else slides:
        cells = study.cells(name)
        if "cluster" not in cells:
            raise StudyError(f"The cells of {name} have no clusters yet. Please run the study first.")
        types = cells["cluster_name"].where(cells["cluster"] >= 0, None)
        found = neighbours(study.labels(name), types, radius, k=k, gap=gap)
        part = found.table()
        condition = cells["condition"].iloc[0] if "condition" in cells and len(cells) else None
        parts.append(part.rename(columns={"type": "cluster"}).assign(slide=name, condition=condition))
    every = pd.concat(parts, ignore_index=True)
    numbers = ["count", "expected", "variance"]
    sums = [every]
    if every["condition"].notna().any():
        by = every.groupby(["condition", "cluster", "other"], as_index=False)[numbers].sum()
        sums.append(by.assign(slide=ALL))
    total = every.groupby(["cluster", "other"], as_index=False)[numbers].sum()
    sums.append(total.assign(slide=ALL, condition=ALL))
    every = pd.concat(sums, ignore_index=True)
    every["enrichment"] = (every["count"] - every["expected"]) / every["variance"].where(
        every["variance"] > 0
    ) ** 0.5
    return every[["slide", "condition", "cluster", "other", *numbers, "enrichment"]]
