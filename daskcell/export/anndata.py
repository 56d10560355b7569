"""Cells, features and places for scanpy and squidpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from daskcell.export.registry import Exporter

if TYPE_CHECKING:
    from daskcell.study import Study


def write_anndata(study: Study, slides: list[str], path: Path) -> int:
    """Write the cells of some slides as an HDF5 file of AnnData; see `Study.anndata`."""
    found = study.anndata(slides)
    found.write_h5ad(path)  # features block by block
    return found.n_obs


EXPORTER = Exporter(".h5ad", write_anndata, together=True)
