"""Outlines as regions of interest for ImageJ."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from daskcell.errors import InputError
from daskcell.export.cells import Polygons, rows_with_outlines
from daskcell.export.registry import Exporter

if TYPE_CHECKING:
    from daskcell.study import Study


def write_rois(study: Study, slides: list[str], path: Path) -> int:
    """Write the cells of a slide as a ZIP file of ImageJ's ROIs, named by their labels, coloured by cluster.

    A cell in one part without holes is a polygon, any other a composite. ImageJ: File > Open, or More > Open
    in the ROI manager.

    Raises
    ------
    InputError
        roifile is not installed.
    """
    try:
        import roifile  # noqa: F401
    except ImportError:
        raise InputError(
            "ImageJ's ROIs are written with roifile, which is not installed: pip install 'daskcell[rois]'."
        ) from None
    from daskcell.render import colors

    (slide,) = slides
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for table, outlines in rows_with_outlines(study, slide):
            clusters = table["cluster"].to_numpy() if "cluster" in table else np.full(len(table), -1)
            palette = colors(int(clusters.max(initial=-1)) + 1)
            for label, cluster, polygons in zip(table["label"].tolist(), clusters, outlines, strict=True):
                if polygons:
                    color = palette[cluster] if cluster >= 0 else np.array([255, 255, 0])
                    file.writestr(f"{label}.roi", _roi(polygons, str(label), color, int(cluster)))
                    count += 1
    return count


def _roi(polygons: Polygons, name: str, color: np.ndarray, cluster: int) -> bytes:
    import roifile

    rings = [ring[:, ::-1] for part in polygons for ring in part]
    if len(rings) == 1:
        roi = roifile.ImagejRoi.frompoints(rings[0], name=name)
    else:
        # As java.awt.geom.PathIterator: 0 move to, 1 line to, 4 close.
        steps: list[float] = []
        for ring in rings:
            for place, (x, y) in enumerate(ring.tolist()):
                steps += [0.0 if place == 0 else 1.0, x, y]
            steps.append(4.0)
        points = np.concatenate(rings)
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        roi = roifile.ImagejRoi(
            roitype=roifile.ROI_TYPE.RECT,
            name=name,
            left=int(left),
            top=int(top),
            right=int(right),
            bottom=int(bottom),
            shape_roi_size=len(steps),
            multi_coordinates=np.array(steps, np.float32),
        )
    roi.stroke_color = bytes([255, *color.tolist()])
    roi.group = min(cluster + 1, 255)
    return roi.tobytes()


EXPORTER = Exporter(".zip", write_rois)
