"""Where the files of a study are.

    study/
      study.json                 format, inputs, resolved settings, versions, weights
      images/<slide>.zarr        the image, labels/cells, labels/clusters
      tables/cells/<slide>.parquet
      tables/clusters/<slide>.parquet   the cluster of each cell, in the same order
      tables/index/<slide>.parquet      where each label lies
      features/<slide>.zarr
      clusters/                  the fitted model, and names.json: names of clusters
      overlays/  preprocessed/  channels/  flows/      when asked for
      inputs/                    images that were given as arrays
      scores.json                the clusters against known types, where a truth was given
      report.html                the whole study on one page
      failures.jsonl             slides that were set aside, with the reason
      ledger/<slide>.json        content key and result of every finished stage

Whether a stage is done is told by the ledger (see `daskcell.study.ledger`), never by a file that exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CLUSTERS = ".clusters"
"""Name of the ledger of what is done for all slides together; no slide's name begins with a dot."""


@dataclass(frozen=True)
class StudyPaths:
    """Paths of a study's files; nothing is read, and a file need not exist.

    Attributes
    ----------
    root : Path
        Folder of the study.

    Examples
    --------
    >>> from pathlib import Path
    >>> paths = StudyPaths(Path("study"))
    >>> paths.table("a").as_posix()
    'study/tables/cells/a.parquet'
    >>> paths.labels("a").as_posix()
    'study/images/a.zarr/labels/cells'
    """

    root: Path

    @property
    def record(self) -> Path:
        """Inputs, settings and versions (JSON)."""
        return self.root / "study.json"

    def ledger(self, slide: str) -> Path:
        """Finished stages of a slide (JSON)."""
        return self.root / "ledger" / f"{slide}.json"

    def image(self, slide: str) -> Path:
        """OME-Zarr of the image and its labels."""
        return self.root / "images" / f"{slide}.zarr"

    def labels(self, slide: str, name: str = "cells") -> Path:
        """A label image within the OME-Zarr of the slide."""
        return self.image(slide) / "labels" / name

    def table(self, slide: str) -> Path:
        """The cells of a slide, one row per cell (Parquet)."""
        return self.root / "tables" / "cells" / f"{slide}.parquet"

    def clusters_table(self, slide: str) -> Path:
        """``cluster``, ``cluster_name`` and ``distance`` of each cell, in the order of `table` (Parquet)."""
        return self.root / "tables" / "clusters" / f"{slide}.parquet"

    def index(self, slide: str) -> Path:
        """First pixel, bounding box and area of every label (Parquet)."""
        return self.root / "tables" / "index" / f"{slide}.parquet"

    def features(self, slide: str) -> Path:
        """Zarr array ``(n, d)``, one row per cell in the order of `table`."""
        return self.root / "features" / f"{slide}.zarr"

    def flows(self, slide: str) -> Path:
        """Network outputs kept for other thresholds (``segment.keep_flows``)."""
        return self.root / "flows" / slide

    def scratch(self, slide: str, stage: str, key: str, block: int) -> Path:
        """Folder for what a stage keeps between its tasks, for one content key and one block size."""
        return self.root / "scratch" / f"{slide}-{stage}-{key[:16]}-{block}"

    def scratches(self, slide: str, stage: str | None = None) -> list[Path]:
        """The `scratch` folders of a slide that exist, of one stage or of all."""
        name = re.compile(rf"{re.escape(slide)}-{stage or '[a-z]+'}-[0-9a-f]{{16}}-\d+")
        folder = self.root / "scratch"
        return [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []

    @property
    def clusters(self) -> Path:
        """Folder of the fitted model."""
        return self.root / "clusters"

    @property
    def overlays(self) -> Path:
        """Folder of images of the slides with their cells coloured by cluster."""
        return self.root / "overlays"

    @property
    def preprocessed(self) -> Path:
        """Folder of preprocessed images (``output.preprocessed``)."""
        return self.root / "preprocessed"

    @property
    def channels(self) -> Path:
        """Folder of single channels (``output.channels``)."""
        return self.root / "channels"

    @property
    def report(self) -> Path:
        """The whole study on one HTML page."""
        return self.root / "report.html"

    @property
    def failures(self) -> Path:
        """Slides that were set aside (JSON lines)."""
        return self.root / "failures.jsonl"

    @property
    def progress(self) -> Path:
        """How far the run at work is (JSON)."""
        return self.root / ".progress.json"

    @property
    def scores(self) -> Path:
        """Agreement of the clusters with known types (JSON)."""
        return self.root / "scores.json"
