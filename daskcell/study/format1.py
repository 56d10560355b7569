"""Ledgers of studies of format 1, translated to the present format.

In format 1 an entry did not name what it was made from, and the stage ``fit`` was called ``freeze``. The
cluster of a cell was a column of the cells table, so the entry of ``assign`` had the checksum of the table
that ``describe`` wrote, whose own checksum was None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"freeze": "fit"}
"""Present names of stages that had another name."""
NEEDS = {
    "convert": [],
    "fit": ["convert"],
    "export": ["fit"],
    "segment": ["fit"],
    "describe": ["segment"],
    "cluster": ["describe"],
    "assign": ["describe", "cluster"],
    "paint": ["assign"],
    "report": ["cluster"],
}


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A ledger of format 1 with today's entries, under the content keys that it had."""
    stages = {NAMES.get(name, name): dict(entry) for name, entry in values["stages"].items()}
    later: dict[str, Any] = {}
    for entry in stages.values():
        later |= {name: known for name, known in entry.get("files", {}).items() if known is not None}
    for name, entry in stages.items():
        entry["needs"] = NEEDS[name]
        entry["files"] = {file: later.get(file) for file in entry.get("files", {})}
    if "segment" in stages:  # the list of label images belongs to the last who writes to it
        files = stages["segment"]["files"]
        stages["segment"]["files"] = {name: files[name] for name in files if not _is_list_of_labels(name)}
    if None in stages.get("describe", {"files": {}})["files"].values():
        for name in ("describe", "assign", "paint"):  # begun to be assigned, and not finished
            stages.pop(name, None)
    failure = values.get("failure")
    if failure is not None:
        failure = failure | {"stage": NAMES.get(failure["stage"], failure["stage"])}
    in_progress = values.get("began") or ""
    return {
        "files": values["files"],
        "stages": stages,
        "failure": failure,
        "tries": values.get("tries", 0),
        "began": NAMES.get(in_progress, in_progress) or None,
    }


def _is_list_of_labels(file: str) -> bool:
    return file.split("/")[-2:-1] == ["labels"]
