"""What users read of a study: its tables, arrays and model as data, and its files as paths."""

from __future__ import annotations

import html
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.config import Config
from daskcell.errors import IncompleteWarning, StudyError
from daskcell.study.paths import CLUSTERS, StudyPaths
from daskcell.study.record import Record, create_record
from daskcell.study.results import Assigned, Clustered, Converted, Described, Fitted, Result, Segmented

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

    from daskcell.clustering import ClusterModel
    from daskcell.images import Image
    from daskcell.preprocess import PreparedImage

_SHOWN = 1200
"""Pixels that the longest side of a shown image has at most, where its pyramid allows."""


class Study:
    """The results of `daskcell.run` in a folder, read when they are asked for.

    A study that is incomplete (a run at work, slides that were set aside) gives what is there. Where the
    cells of all slides are asked for and some have none yet, an `IncompleteWarning` names those.

    Parameters
    ----------
    out : str or Path
        Folder of the study.

    Raises
    ------
    StudyError
        If the folder holds no study that this version can read.

    Attributes
    ----------
    out : Path
        Folder of the study.
    paths : StudyPaths
        Where its files are: ``paths.image(slide)``, ``paths.table(slide)``, ``paths.report``, ...
    record : Record
        What daskcell keeps for itself: ledgers, content keys. No part of the public interface.

    Examples
    --------
    >>> study = dc.open_study("study")
    >>> study.slides
    ['one', 'two']
    >>> cells = study.cells()
    >>> cells.groupby("slide")["area"].count().to_dict()
    {'one': 16, 'two': 16}
    >>> study.features().shape
    (32, 96)
    >>> int(study.labels("one").max())
    16
    >>> study.paths.table("one").as_posix()
    'study/tables/cells/one.parquet'
    """

    def __init__(self, out: str | os.PathLike[str]):
        self.out = Path(out)
        self.record = Record(self.out)

    def __repr__(self) -> str:
        return f"<Study {self.out}: {len(self.slides)} slides>"

    def _repr_html_(self) -> str:
        cells = sum(described.cells for _, described in self._read(Described))
        clustered = self.record.ledger(CLUSTERS).read(Clustered)
        parts = [f"{len(self.slides)} slides", f"{cells:,} cells"]
        parts += [f"{clustered.k} clusters"] if clustered else []
        parts += [f"{len(self.failures)} set aside"] if self.failures else []
        return f"<b>Study</b> <code>{html.escape(str(self.out))}</code>: {', '.join(parts)}"

    @property
    def paths(self) -> StudyPaths:
        return self.record.paths

    # ------------------------------------------------------------------ what was run

    @property
    def slides(self) -> list[str]:
        """Names of the slides, sorted; those in `left` are among them."""
        return list(self.record["slides"])

    @property
    def left(self) -> list[str]:
        """Slides that an earlier run was given and the latest was not; their results stay."""
        return list(self.record.get("left", ()))

    @property
    def conditions(self) -> dict[str, str]:
        """Condition of each slide for which the manifest names one (on disk: ``groups``)."""
        return dict(self.record.get("groups") or {})

    @property
    def config(self) -> Config:
        """Settings of the latest run."""
        return self.record.config

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Slides that were set aside, each with ``slide``, ``stage``, ``error`` and ``tries``."""
        return self.record.failures()

    @property
    def scores(self) -> dict[str, Any] | None:
        """How the present clusters agree with known types (``daskcell score``); None if not compared."""
        try:
            found = json.loads(self.paths.scores.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if found.get("grouping") != self.record.clusters_key:
            return None
        return found if found.get("assigned") in (None, self.record.assigned_key) else None

    # ------------------------------------------------------------------ cells

    def cells(self, slide: str | None = None) -> pd.DataFrame:
        """The cells, one row per cell: place, shape, intensities, and the cluster where there is one.

        Parameters
        ----------
        slide : str, optional
            One slide; None: all, in the order of `slides`, with a column ``slide``.

        Returns
        -------
        DataFrame
            Row i of a slide is label i + 1. Lengths in pixels, and in micrometres in columns ending in
            ``_um`` and ``_um2``; ``condition`` where the manifest names one.

        Raises
        ------
        StudyError
            If the slide has no cells table yet; for all slides, if none has.
        """
        import pandas as pd

        if slide is not None:
            self._require(slide, Described, "cells table")
            return self._cells_of(slide)
        tables = [self._cells_of(name).assign(slide=name) for name in self._described()]
        return pd.concat(tables, ignore_index=True)

    def features(self, slide: str | None = None) -> da.Array:
        """The features of the cells, in the rows and order of `cells`.

        Parameters
        ----------
        slide : str, optional
            One slide; None: all, in the order of `slides`.

        Returns
        -------
        dask array ``(n_cells, d)``
            float32 or float16 (``features.dtype``), read when computed.

        Raises
        ------
        StudyError
            If the slide has no features yet; for all slides, if none has, or if they were made with
            different settings and cannot stand in one array.
        """
        import dask.array as da

        from daskcell.study.arrays import lazy_rows

        if slide is not None:
            self._require(slide, Described, "features")
            return lazy_rows(self.paths.features(slide))
        names = self._described()
        arrays = [lazy_rows(self.paths.features(name)) for name in names]
        kinds = {(array.shape[1], array.dtype): name for array, name in zip(arrays, names, strict=True)}
        if len(kinds) > 1:
            (one, first), (other, second) = list(kinds.items())[:2]
            raise StudyError(
                f"The slides of {self.out} have different features: {one[0]} per cell in {one[1]} ({first}), "
                f"{other[0]} in {other[1]} ({second}). Please continue the run, or read one slide at a time."
            )
        return da.concatenate(arrays)

    def anndata(self, slides: Iterable[str] | None = None) -> Any:
        """Cells and features as an `anndata.AnnData`, for scanpy and squidpy.

        Parameters
        ----------
        slides : list of str, optional
            None: all that have cells.

        Returns
        -------
        AnnData ``(n_cells, d)``
            ``X`` the features, a lazy dask array; ``obs`` the columns of `cells`, with ``slide`` and
            ``cluster`` as categories and names ``<slide>-<label>``; ``obsm["spatial"]`` the centres (x, y) in
            pixels; ``uns["cluster_colors"]`` the colours of the clusters.

        Raises
        ------
        StudyError
            If anndata is not installed, or a slide has no cells yet.
        """
        try:
            from anndata import AnnData
        except ImportError:
            raise StudyError(
                "Study.anndata needs anndata, which is not installed: pip install 'daskcell[anndata]'."
            ) from None
        import dask.array as da
        import pandas as pd

        names = self._described() if slides is None else list(slides)
        table = pd.concat([self.cells(name).assign(slide=name) for name in names], ignore_index=True)
        features = da.concatenate([self.features(name) for name in names])
        # As objects: AnnData's files have no strings of pandas 3.
        table.index = pd.Index((table["slide"] + "-" + table["label"].astype(str)).tolist(), dtype=object)
        table["slide"] = pd.Categorical(table["slide"], pd.Index(names, dtype=object))
        for column in table.select_dtypes(["object", "string"]):
            table[column] = pd.Categorical(table[column].astype(object))
        places = table[["centroid-1", "centroid-0"]].to_numpy()
        found = AnnData(features, obs=table, obsm={"spatial": places})
        encoder = self.config.features.encoder
        found.var_names = pd.Index([f"{encoder}-{i}" for i in range(features.shape[1])], dtype=object)
        if "cluster" in table:
            from daskcell.render import colors

            known = sorted(table["cluster"].unique())
            found.obs["cluster"] = pd.Categorical(
                [str(i) for i in table["cluster"]], pd.Index([str(i) for i in known], dtype=object)
            )
            palette = colors(max(known, default=-1) + 1)
            found.uns["cluster_colors"] = [
                "#{:02x}{:02x}{:02x}".format(*(palette[i] if i >= 0 else (128, 128, 128))) for i in known
            ]
        return found

    # ------------------------------------------------------------------ images

    def image(self, slide: str, level: int = 0) -> da.Array:
        """The pixels of a slide as they were read, before preprocessing.

        Parameters
        ----------
        slide : str
            One of `slides`.
        level : int
            Of the pyramid: 0 is the image itself, each next level half as large.

        Returns
        -------
        dask array ``(C, Y, X)``
            In the dtype of the input. `open_image` has the channels' names and the pixel size, `prepared`
            the pixels after preprocessing.

        Raises
        ------
        StudyError
            If the slide has not been converted yet.
        """
        from daskcell.study.arrays import lazy_image

        path = self._image_path(slide, level)
        return lazy_image(path, level)

    def labels(self, slide: str, name: str = "cells", level: int = 0) -> da.Array:
        """A label image of a slide.

        Parameters
        ----------
        slide : str
            One of `slides`.
        name : str
            ``"cells"``: label i + 1 is row i of `cells`; ``"clusters"``: cluster + 1, 0 for none.
        level : int
            Of the pyramid, as in `image`.

        Returns
        -------
        dask array ``(Y, X)``
            uint32 for cells.

        Raises
        ------
        StudyError
            If there is no finished label image of that name.
        """
        from daskcell.images import image_info
        from daskcell.study.arrays import lazy_labels

        path = self._image_path(slide, level)
        there = image_info(path).labels
        if name not in there:
            raise StudyError(
                f"{slide} of {self.out} has no labels {name!r} yet; it has {_listed(there)}. "
                "Please run the study."
            )
        return lazy_labels(self.paths.labels(slide, name), level)

    def open_image(self, slide: str) -> Image:
        """The image of a slide with its channels and pixel size, as `daskcell.open_image` gives it."""
        from daskcell.images import open_image

        return open_image(self._image_path(slide))

    def prepared(self, slide: str) -> PreparedImage:
        """The image of a slide after preprocessing; ``.read(box)`` gives the pixels of a box.

        Raises
        ------
        StudyError
            If the slide has not been preprocessed yet.
        """
        from daskcell.preprocess import PreparedImage

        fitted = self.record.ledger(slide).read(Fitted)
        if fitted is None:
            raise StudyError(f"{slide} of {self.out} has not been preprocessed yet. Please run the study.")
        return PreparedImage(str(self.paths.image(slide)), fitted.read_plan())

    # ------------------------------------------------------------------ clusters and report

    @property
    def clusters(self) -> ClusterModel:
        """The model that the cells were grouped with: ``.predict(features)``, ``.centers_``, ``.k``.

        Raises
        ------
        StudyError
            If no model has been fitted yet.
        """
        from daskcell.clustering import load_clusters

        if self.record.ledger(CLUSTERS).read(Clustered) is None:
            raise StudyError(f"{self.out} has no clusters yet. {self._why([None])}")
        return load_clusters(self.paths.clusters)

    @property
    def report(self) -> str:
        """The report, one page of HTML with everything it shows (``paths.report`` is the file).

        Raises
        ------
        StudyError
            If it has not been written.
        """
        if not self.paths.report.exists():
            raise StudyError(f"{self.out} has no report yet. Please write it: daskcell report {self.out}")
        return self.paths.report.read_text(encoding="utf-8")

    def show(self, slide: str, ax: Any = None) -> Any:
        """Draw the cells of a slide, coloured by cluster, over its preprocessed image.

        Parameters
        ----------
        slide : str
            One of `slides`, with cells. Without clusters, outlines are drawn in one colour.
        ax : matplotlib Axes, optional
            Where to draw; None: a new figure.

        Returns
        -------
        matplotlib Axes

        Raises
        ------
        StudyError
            If matplotlib is missing, or the slide has no cells yet.
        """
        try:
            from matplotlib import pyplot
        except ImportError:
            raise StudyError(
                "Study.show draws with matplotlib, which is not installed: pip install 'daskcell[plot]'."
            ) from None
        overlay = self._overlay(slide)
        if ax is None:
            _, ax = pyplot.subplots()
        ax.imshow(overlay)
        ax.set_title(slide)
        ax.set_axis_off()
        return ax

    def _overlay(self, slide: str) -> np.ndarray:
        """``(Y, X, 3)`` uint8, from the first level of the pyramid that is small enough."""
        from daskcell.geometry import Box
        from daskcell.images import read_labels
        from daskcell.render import overlay

        self._require(slide, Segmented, "cells")
        image = self.prepared(slide)
        levels = image.levels
        level = next((i for i, shape in enumerate(levels) if max(shape) <= _SHOWN), len(levels) - 1)
        whole = Box(0, 0, *levels[level])
        labels = read_labels(image.path, "cells", whole, level)
        if self.record.ledger(slide).read(Assigned) is None:
            clusters, opacity = np.zeros(int(labels.max()), np.int32), 0.0
        else:
            clusters, opacity = self.cells(slide)["cluster"].to_numpy(), 0.5
        return np.asarray(overlay(image.read(whole, level), labels, clusters, opacity=opacity))

    # ------------------------------------------------------------------ what is there

    def _cells_of(self, slide: str) -> pd.DataFrame:
        import pandas as pd

        path, assigned = self.paths.table(slide), self.record.assigned_table(slide)
        table = pd.read_parquet(path)
        if assigned is not None and assigned != path:
            table = table.assign(**pd.read_parquet(assigned))
        condition = self.conditions.get(slide)
        return table if condition is None else table.assign(condition=condition)

    def _read(self, kind: type[Result]) -> Iterable[tuple[str, Any]]:
        """Slides for which a stage is done, with its result."""
        found = ((name, self.record.ledger(name).read(kind)) for name in self.slides)
        return [(name, result) for name, result in found if result is not None]

    def _described(self) -> list[str]:
        """Slides with cells and features; warns of those without."""
        names = [name for name, _ in self._read(Described)]
        missing = [name for name in self.slides if name not in set(names)]
        if not names:
            raise StudyError(f"{self.out} has no cells yet. {self._why(missing)}")
        if missing:
            warnings.warn(
                f"{len(missing)} of {len(self.slides)} slides of {self.out} have no cells yet "
                f"({_listed(missing)}) and are left out. {self._why(missing)}",
                IncompleteWarning,
                stacklevel=3,
            )
        return names

    def _require(self, slide: str, kind: type[Result], what: str) -> None:
        if slide not in self.slides:
            raise StudyError(f"{self.out} has no slide {slide!r}; it has {_listed(self.slides)}.")
        if self.record.ledger(slide).read(kind) is None:
            raise StudyError(f"{slide} of {self.out} has no {what} yet. {self._why([slide])}")

    def _why(self, slides: Iterable[str | None]) -> str:
        """Why slides are not done, as far as is known, and what to do."""
        slides = set(slides)
        for failure in self.failures:
            if failure["slide"] in slides:
                return f"{failure['slide'] or 'Clustering'} was set aside: {failure['error']}"
        return "Please run the study."

    def _image_path(self, slide: str, level: int = 0) -> Path:
        from daskcell.images import image_info

        self._require(slide, Converted, "image")
        path = self.paths.image(slide)
        if not 0 <= level < (count := len(image_info(path).levels)):
            raise StudyError(f"{slide} of {self.out} has levels 0 to {count - 1}, not {level}.")
        return path


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "") if names else "none"


def create_study(
    out: str | Path, inputs: Iterable[str | Path], config: Config, slides: Iterable[str] = ()
) -> Study:
    """Begin a study, or continue the one that is there: see `create_record`."""
    create_record(out, inputs, config, slides)
    return Study(out)
