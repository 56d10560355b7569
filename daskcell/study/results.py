"""Results of the stages, as the ledger keeps them: one type per stage.

``Ledger.read(Segmented)`` gives the result of a stage, or None if it is not done. Lists of files hold paths
in the study.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from daskcell.preprocess import Plan
    from daskcell.segmentation.core.seams import SeamReport


class Result(BaseModel):
    """Base of all results: small, and JSON in the ledger."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    stage: ClassVar[str]
    """Name of the stage."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""


class Converted(Result):
    stage = "convert"
    shape: tuple[int, int, int]
    """``(C, Y, X)``."""
    dtype: str = ""
    channels: tuple[str, ...] = ()
    pixel_size: tuple[float, float] | None = None
    """In micrometres, ``(y, x)``."""
    is_rgb: bool = False
    files: int = 0
    """Number of files of the image."""
    fingerprint: str = ""
    """Hash of the pixels."""

    @property
    def pixels(self) -> int:
        """Number of pixels of one channel."""
        return self.shape[1] * self.shape[2]


class Fitted(Result):
    stage = "fit"
    plan: dict[str, Any]
    """`daskcell.preprocess.Plan` as JSON."""

    def read_plan(self) -> Plan:
        from daskcell.preprocess import Plan

        return Plan.from_json(self.plan)


class Exported(Result):
    stage = "export"
    files: tuple[str, ...] = ()


class Segmented(Result):
    """On disk, the counts of the seam report stand beside the other values."""

    model_config = ConfigDict(frozen=True, extra="allow")
    stage = "segment"
    cells: int = 0
    diameter: float | None = None
    """In pixels, as the network's images were rescaled by; None: they were not rescaled."""
    skipped_fraction: float | None = None
    """Share of the tiles that were skipped as bare glass; None: no tissue mask."""

    @property
    def seams(self) -> SeamReport:
        from daskcell.segmentation.core.seams import SeamReport

        return SeamReport.from_json(self.model_dump())


class Described(Result):
    stage = "describe"
    cells: int = 0
    features: int = 0
    """Features of each cell."""
    missing: int = 0
    """Number of labels below the largest that have no pixel."""


class Clustered(Result):
    stage = "cluster"
    k: int
    counts: tuple[int, ...] = ()
    """Cells of each cluster in the fit."""
    given: bool = False
    """Whether the model was fitted elsewhere."""


class Assigned(Result):
    stage = "assign"
    counts: tuple[int, ...] = ()
    """Cells of each cluster."""
    names: dict[str, str] = {}
    """By number of the cluster, of those that have one."""
    unassigned: int = 0
    drift: dict[str, Any] = {}
    """See `daskcell.clustering.ClusterModel.drift`."""


class Painted(Result):
    stage = "paint"
    counts: tuple[int, ...] = ()
    files: tuple[str, ...] = ()


class Reported(Result):
    stage = "report"
