"""What is done, running and failed in a study, from its ledgers and other small files."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from daskcell import text
from daskcell.compute import Workers
from daskcell.pipeline.progress import clock, seconds_left
from daskcell.pipeline.slide import counts as slide_counts
from daskcell.pipeline.stages import SLIDE_STAGES, slide_keys
from daskcell.storage.lock import holder
from daskcell.study import CLUSTERS, Ledger, Study
from daskcell.study.checksums import verify
from daskcell.study.ledger import FORMAT
from daskcell.study.results import Assigned, Clustered, Converted, Fitted, Segmented

FAR = 5.0
"""A slide is unlike the model if this many times more cells than expected lie beyond the fit's 99th
percentile."""
_FAR_CELLS = 5
_MARKS = {"done": "done", "failed": "FAILED", "running": "running", "old": "old", "": "-"}


def report(study: Study) -> dict[str, Any]:
    """State of every slide and stage, with counts (JSON-able).

    A stage is ``done``, ``running``, ``failed``, ``old`` (done under other settings, to be redone) or empty.
    A slide that ``left`` is no longer among the inputs, and is not redone.
    """
    config, weights = study.config, study.record.get("weights", {})
    owner = holder(study.out)
    progress = study.record.read_progress()
    if progress is not None:
        progress["seconds_left"] = seconds_left(progress, time.time())
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    cluster = study.record.clusters_key
    notes: list[str] = []
    rows, left = [], set(study.left)
    for slide in study.slides:
        ledger = study.record.ledger(slide)
        keys = slide_keys(config, ledger.files, weights, cluster)
        segmented, fitted = ledger.read(Segmented), ledger.read(Fitted)
        notes += fitted.notes if fitted else ()
        rows.append(
            {
                "slide": slide,
                "left": slide in left,
                "stages": {stage: _state(stage, keys.get(stage), ledger, owner) for stage in SLIDE_STAGES},
                "cells": segmented.cells if segmented else None,
                "pixels": _pixels(ledger),
                "seconds": round(sum(entry["seconds"] for entry in ledger.stages.values()), 1),
                "seams": segmented.model_dump() if segmented else {},
                "error": ledger.failure["error"] if ledger.failure else None,
            }
        )
    return {
        "study": str(study.out),
        "running": owner and owner | {"progress": progress},
        "slides": rows,
        "model": study.record.get("model"),
        "drift": drift(study),
        "warnings": remarks(study),
        "notes": notes,
        "scores": study.scores,
        "clusters": clustered and clustered.k,
        "failures": study.failures,
        "totals": counts(study),
    }


def damages(out: str | Path, workers: Workers | None = None) -> set[str]:
    """Files of a study that are missing or whose bytes changed since they were written; reads all of it."""
    study = Study(out)
    found: set[str] = set()
    for name in (*study.slides, CLUSTERS):
        for entry in study.record.ledger(name).stages.values():
            found.update(verify(study.out, entry.get("files", {}), workers or Workers()))
    return found


def drift(study: Study) -> dict[str, dict[str, Any]]:
    """By slide: how far its cells lie from those of the model they were assigned to."""
    if "model" not in study.record:
        return {}
    found = {slide: study.record.ledger(slide).read(Assigned) for slide in study.slides}
    return {slide: assigned.drift for slide, assigned in found.items() if assigned and assigned.drift}


def drift_sentences(study: Study) -> list[str]:
    """For each slide whose cells are unlike the model's: how many are far, and in which cluster."""
    return [
        f"{slide}: {100 * values['far']:.0f} % of {values['cells']:,} cells lie farther from their cluster's "
        f"centre than 99 % of the model's cells do ({100 * values['expected']:.0f} % is expected)"
        f"{_worst(study, slide, values)}."
        for slide, values in drift(study).items()
        if values["far"] > FAR * values["expected"] and values["far"] * values["cells"] >= _FAR_CELLS
    ]


def mixed(study: Study) -> list[str]:
    """A sentence for each kind of network whose results come from several devices, numbers of threads or
    precisions: such results differ in the last bits."""
    found: dict[str, Counter[str]] = {}
    for slide in study.slides:
        for name, entry in study.record.ledger(slide).stages.items():
            if ran := entry.get("ran"):
                how = f"on {ran['device']} with {_many(ran['threads'], 'thread')} in {ran['precision']}"
                found.setdefault(name, Counter())[how] += 1
    return [
        f"The stage {name} ran in different ways, so results differ in their last bits: "
        + ", ".join(f"{_many(slides, 'slide')} {how}" for how, slides in sorted(ways.items()))
        + "."
        for name, ways in sorted(found.items())
        if len(ways) > 1
    ]


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def remarks(study: Study) -> list[str]:
    """Sentences at the top of a study's report."""
    return [*drift_sentences(study), *mixed(study)]


def _worst(study: Study, slide: str, values: dict[str, Any]) -> str:
    shares = values["far_by_cluster"]
    cluster = max(range(len(shares)), key=lambda i: shares[i] or 0.0)
    assigned = study.record.ledger(slide).read(Assigned)
    name = assigned and assigned.names.get(str(cluster))
    return f", most in cluster {cluster}{f' ({name})' if name else ''}: {100 * shares[cluster]:.0f} %"


def counts(study: Study) -> dict[str, int]:
    """Slides, cells, pixels and clusters of a study."""
    cells = pixels = failed = 0
    left = set(study.left)
    for slide in study.slides:
        ledger = study.record.ledger(slide)
        some, more = slide_counts(ledger)
        pixels, cells = pixels + some, cells + more
        failed += ledger.failure is not None and slide not in left
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    k = clustered.k if clustered else 0
    return {"slides": len(study.slides), "cells": cells, "pixels": pixels, "clusters": k, "failed": failed}


def table(found: dict[str, Any], limit: int | None = None) -> str:
    """A `report` as text: the first `limit` slides, and the totals."""
    rows = [["slide", *SLIDE_STAGES, "Mpx", "cells", "seams"]]
    for row in found["slides"][:limit]:
        pixels, cells = row["pixels"], row["cells"]
        rows.append(
            [
                row["slide"] + (" (left)" if row["left"] else ""),
                *(_MARKS[row["stages"][stage]] for stage in SLIDE_STAGES),
                "-" if pixels is None else f"{pixels / 1e6:.1f}",
                "-" if cells is None else f"{cells:,}",
                seams(row["seams"]),
            ]
        )
    lines = [text.table(rows)]
    if limit is not None and len(found["slides"]) > limit:
        lines.append(f"and {len(found['slides']) - limit} more slides (--all shows them)")
    total = found["totals"]
    done = sum(all(row["stages"][s] == "done" for s in SLIDE_STAGES) for row in found["slides"])
    lines.append(
        f"{done} of {total['slides']} slides done, {total['pixels'] / 1e6:.1f} Mpx, {total['cells']:,} cells"
        + (f", {total['clusters']} clusters" if total["clusters"] else "")
    )
    left = sum(row["left"] for row in found["slides"])
    if left:
        lines.append(f"{left} of them left: no longer among the inputs, kept, and no part of the fit")
    if "damaged" in found:
        lines += [f"damaged: {file}" for file in found["damaged"]] or ["every file is as it was written"]
        if found["damaged"]:
            lines.append("(the command that made the study makes them again when given --verify)")
    if found["running"]:
        owner = found["running"]
        line = f"a run is at work (process {owner.get('pid')} on {owner.get('host')})"
        word = owner.get("progress")
        if word:
            line += f": {word['fraction']:.0%} done"
            line += "" if word["seconds_left"] is None else f", about {clock(word['seconds_left'])} left"
        lines.append(line)
    scores = found["scores"]
    if scores and scores["ari"] is not None:
        lines.append(
            f"clusters against {scores['truth']}: ARI {scores['ari']:.3f}, NMI {scores['nmi']:.3f} "
            f"({scores['matched']:,} of {scores['cells']:,} cells)"
        )
    if found["drift"]:
        cells = sum(values["cells"] for values in found["drift"].values())
        far, usual = (
            sum(values["cells"] * values[name] for values in found["drift"].values()) / max(cells, 1)
            for name in ("far", "expected")
        )
        lines.append(
            f"assigned to the model {found['model']}: {100 * far:.1f} % of the cells lie far "
            f"({100 * usual:.1f} % is expected)"
        )
    lines += found["warnings"]
    lines += found["notes"][:limit]
    if limit is not None and len(found["notes"]) > limit:
        lines.append(f"and {len(found['notes']) - limit} more notes on what preprocessing left out (--all)")
    for failure in found["failures"]:
        lines.append(
            f"set aside: {failure['slide'] or 'all slides'} ({failure['stage']}): {failure['error']}"
        )
    return "\n".join(lines)


def open_first(study: Study) -> list[str]:
    """What to open first in a study, as absolute paths."""
    named = [("open first", study.paths.report), ("overlays", study.paths.overlays)]
    return [f"{name}: {path.resolve()}" for name, path in named if path.exists()]


def seams(result: dict[str, Any]) -> str:
    """The seam report in a few words: ``cut 0.0 %, 0 conflicts, 0 redone``; the first two should read 0.

    Cut is how much more often labels change across the seams than beside them, up to chance.
    """
    parts = [f"{result[name]} {name}" for name in ("conflicts", "redone") if name in result]
    if result.get("cut_rate") is not None:
        parts.insert(0, f"cut {100 * max(0.0, result['cut_rate']):.1f} %")
    return ", ".join(parts) or "-"


def _state(stage: str, key: str | None, ledger: Ledger, owner: dict[str, Any] | None) -> str:
    entry = ledger.entry(stage)
    if entry is not None:
        # Keys of an older format are brought up to date by the next run.
        return "done" if entry["key"] == key or ledger.format != FORMAT else "old"
    if owner is not None and ledger.in_progress == stage:
        return "running"
    if ledger.failure is not None and ledger.failure["stage"] == stage:
        return "failed"
    return ""


def _pixels(ledger: Ledger) -> int | None:
    converted = ledger.read(Converted)
    return None if converted is None else converted.pixels


__all__ = ["counts", "drift", "drift_sentences", "mixed", "open_first", "remarks", "report", "seams", "table"]
