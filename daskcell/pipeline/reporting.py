"""The page that tells what a study found, kept in step with the study."""

from __future__ import annotations

from daskcell.compute import Workers
from daskcell.pipeline.status import drift_sentences
from daskcell.report import report_key, write_report
from daskcell.study import CLUSTERS, Study
from daskcell.study.checksums import damaged, sums

STAGE = "report"


def bring_report_up_to_date(study: Study) -> None:
    """Write ``report.html`` anew unless it is there and says what it should (``output.report``)."""
    ledger = study.ledger(CLUSTERS)
    if not study.config.output.report:
        study.disown(study.report.name)
        return
    warnings = drift_sentences(study)
    key = report_key(study, warnings)
    entry = ledger.entry(STAGE)
    if entry is not None and entry["key"] == key and not damaged(study.out, entry["files"]):
        return
    write_report(study, warnings=warnings)
    ledger.finish(STAGE, key, files=sums(study.out, [study.report], Workers()))
