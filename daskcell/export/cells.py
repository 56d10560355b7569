"""A slide's cells in portions that fit in memory: rows of the table, and outlines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from daskcell.geometry import Box

if TYPE_CHECKING:
    import pandas as pd

    from daskcell.study import Study

ROWS = 1 << 15
"""Cells at a time."""
PIXELS = 1 << 24
"""Pixels of labels to read at a time, but for cells that are larger."""

Polygons = list[list[np.ndarray]]
"""Parts of a cell, each its outer ring and then those of its holes: ``(n, 2)`` int32 (y, x)."""


def rows(study: Study, slide: str) -> Iterator[pd.DataFrame]:
    """Portions of the rows of `Study.cells`, in order."""
    import pandas as pd
    import pyarrow.parquet as pq

    path, assigned = study.paths.table(slide), study.record.assigned_table(slide)
    clusters = None if assigned in (None, path) else pd.read_parquet(assigned)
    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS):
            table = batch.to_pandas()
            if clusters is not None:
                own = clusters.iloc[start : start + len(table)].reset_index(drop=True)
                table = table.assign(**own)
            yield table
            start += len(table)


def rows_with_outlines(study: Study, slide: str) -> Iterator[tuple[pd.DataFrame, list[Polygons]]]:
    """Portions of the rows of `Study.cells`, and the outlines of the cells in each.

    Outlines are polygons along the edges of pixels, in pixels of the whole image (see
    `daskcell.render.outlines`); none for a label that no pixel has.
    """
    from daskcell.segmentation.index import read_index

    records = read_index(study.paths.index(slide))
    records = records[np.argsort(records["label"])]
    for table in rows(study, slide):
        labels = table["label"].to_numpy()
        at = np.searchsorted(records["label"], labels)
        there = np.flatnonzero(records["label"][np.minimum(at, len(records) - 1)] == labels)
        found: list[Polygons] = [[] for _ in labels]
        for places, polygons in _traced(study, slide, records[at[there]]):
            for place, own in zip(places, polygons, strict=True):
                found[there[place]] = own
        yield table, found


def _traced(study: Study, slide: str, records: np.ndarray) -> Iterator[tuple[np.ndarray, list[Polygons]]]:
    """Places in `records` and their outlines, read band by band of the image."""
    from daskcell.images import image_info, read_labels
    from daskcell.render.outlines import trace

    image = study.paths.image(slide)
    height = max(64, PIXELS // image_info(image).shape[-1])
    # A cell that is taller than a band is read by itself.
    tall = records["y1"] - records["y0"] > height
    bands = np.where(tall, -1 - np.arange(len(records)), records["y0"] // height)
    for band in np.unique(bands):
        places = np.flatnonzero(bands == band)
        own = records[places]
        box = Box(own["y0"].min(), own["x0"].min(), own["y1"].max(), own["x1"].max())
        corner = np.array([box.y0, box.x0] * 2)
        boxes = np.column_stack([own[name] for name in ("y0", "x0", "y1", "x1")]) - corner
        traced = trace(read_labels(image, "cells", box), own["label"], boxes, (box.y0, box.x0))
        yield places, [traced.polygons(place) for place in range(len(places))]
