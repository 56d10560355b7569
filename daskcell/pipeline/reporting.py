"""Keeps the report of a study up to date."""

from __future__ import annotations

from daskcell.pipeline.slide import damage
from daskcell.pipeline.stage import Context, run_stage
from daskcell.pipeline.stages import STAGES
from daskcell.pipeline.status import remarks
from daskcell.report import page_inputs
from daskcell.study import CLUSTERS, Study


def bring_report_up_to_date(study: Study) -> None:
    """Write ``report.html`` unless it is up to date (``output.report``)."""
    if not study.config.output.report:
        study.record.disown(study.paths.report.name)
        return
    ledger, stage = study.record.ledger(CLUSTERS), STAGES["report"]
    if stage.name in damage(ledger, study):
        ledger.invalidate(stage.name)
    key = stage.key(page_inputs(study, remarks(study)), study.config)
    run_stage(stage, Context(study, study.config, ledger), key)
