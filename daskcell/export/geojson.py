"""Cells as GeoJSON, as QuPath reads it: outlines, classes with colours, measurements.

A FeatureCollection whose features are QuPath's objects (File > Import objects from file), see
https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html.
"""

from __future__ import annotations

import gzip
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.export.cells import Polygons, rows_with_outlines
from daskcell.export.registry import Exporter

if TYPE_CHECKING:
    import pandas as pd

    from daskcell.study import Study

_NOT_MEASURED = {"label", "cluster", "cluster_name"}
_NAMESPACE = uuid.UUID("7c8f3a52-5d0c-4d3e-9a3e-2f6b1f0d9c11")


def write_geojson(study: Study, slides: list[str], path: Path) -> int:
    """Write the cells of a slide as a gzipped FeatureCollection, in pixels of the image.

    Each feature is a cell: ``geometry`` is its outline along the edges of pixels (x, y), ``properties`` are
    ``objectType`` ("cell"), ``name`` (its label), ``classification`` (name and colour of its cluster) and
    ``measurements`` (all numbers of `Study.cells`). The same study gives the same bytes.
    """
    from daskcell.render import colors

    (slide,) = slides
    count = 0
    with open(path, "wb") as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
        packed.write(b'{"type":"FeatureCollection","features":[')
        for table, outlines in rows_with_outlines(study, slide):
            palette = colors(int(table["cluster"].max()) + 1) if "cluster" in table else None
            for feature in _features(slide, table, outlines, palette):
                packed.write(b",\n" if count else b"\n")
                packed.write(json.dumps(feature, separators=(",", ":"), allow_nan=False).encode())
                count += 1
        packed.write(b"\n]}\n")
    return count


def _features(slide: str, table: pd.DataFrame, outlines: list[Polygons], palette: np.ndarray | None) -> Any:
    measured = [name for name in table.select_dtypes("number").columns if name not in _NOT_MEASURED]
    values = table[measured].to_numpy(np.float64)
    finite = np.isfinite(values)
    labels = table["label"].tolist()
    clusters = table["cluster"].tolist() if "cluster" in table else [-1] * len(table)
    names = table["cluster_name"].tolist() if "cluster_name" in table else [None] * len(table)
    for row, polygons in enumerate(outlines):
        if not polygons:
            continue
        properties: dict[str, Any] = {"objectType": "cell", "name": str(labels[row])}
        if (cluster := clusters[row]) >= 0 and palette is not None:
            title = names[row] or f"cluster {cluster}"
            properties["classification"] = {"name": title, "color": palette[cluster].tolist()}
        properties["measurements"] = {
            name: value
            for name, value, good in zip(measured, values[row].tolist(), finite[row].tolist(), strict=True)
            if good
        }
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMESPACE, f"{slide}/{labels[row]}")),
            "geometry": geometry(polygons),
            "properties": properties,
        }


def geometry(polygons: Polygons) -> dict[str, Any]:
    """A GeoJSON Polygon or MultiPolygon; rings are closed, outer ones counter-clockwise with y upward."""
    # Outer rings run clockwise on the screen, where y is downward: as RFC 7946 has them with y upward.
    parts = [[np.vstack([ring, ring[:1]])[:, ::-1].tolist() for ring in part] for part in polygons]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


EXPORTER = Exporter(".geojson.gz", write_geojson)
