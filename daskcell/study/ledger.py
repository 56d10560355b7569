"""Which stages of a slide are done: an entry for every finished stage, under its content key.

The entry of a stage is removed before its output is touched, and written again when the output is complete.
So a run that is killed at any moment never takes incomplete output for finished.

    begin(stage)       remove its entry and those of stages made from it
    finish(stage)      enter it, and restore what was suspended for it
    invalidate(stage)  its files are damaged: suspend the stages made from it
    fail(stage)        enter why it could not be done
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from daskcell.storage.atomic import write_json
from daskcell.study.format1 import upgraded
from daskcell.study.results import Result

R = TypeVar("R", bound=Result)
FORMAT = 2


class Ledger:
    """Finished stages of one slide, in one small JSON file that is replaced as a whole.

    ``entry(stage)`` is ``{"key": content key, "needs": stages whose output it was made from, "result": what
    the stage returned, "seconds": ..., "files": see `daskcell.study.checksums`}``, and ``"ran"``, the device,
    threads and precision of a stage that runs a network. A ledger knows of stages only what is entered.

    A stage whose files are damaged is taken out by `invalidate`. The stages that were made from it are
    `suspended`, and restored if the stage gives exactly the same files again.

    Parameters
    ----------
    path : Path
        The file; it need not exist.
    slide : str
        Name of the slide, for `failure`.
    """

    def __init__(self, path: Path, slide: str):
        self.path, self.slide = path, slide
        try:
            values = json.loads(path.read_bytes())
            self.format: int = values.get("format", 1)
            if self.format == 1:
                values = upgraded(values)
            self.files: list[dict[str, Any]] = values["files"]
            self.stages: dict[str, dict[str, Any]] = values["stages"]
            self.failure: dict[str, Any] | None = values.get("failure")
            self.tries: int = values.get("tries", 0)
            self.in_progress: str | None = values.get("began")
            self.suspended: dict[str, dict[str, Any]] = values.get("held", {})
            _refuse_strange_paths(self.stages, self.suspended)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            # A ledger that cannot be read, or names files outside the study, counts as empty: work is
            # repeated, but no result is invented.
            self.format = FORMAT
            self.files, self.stages, self.failure, self.tries = [], {}, None, 0
            self.in_progress, self.suspended = None, {}

    def entry(self, stage: str) -> dict[str, Any] | None:
        """The entry of a stage; None if it is not done."""
        return self.stages.get(stage)

    @property
    def entered(self) -> set[str]:
        """Files, as paths in the study, that finished and suspended stages have written."""
        entries = (*self.stages.values(), *self.suspended.values())
        return {file for entry in entries for file in entry.get("files", ())}

    def read(self, kind: type[R]) -> R | None:
        """The result of the stage whose result has the type `kind`; None if it is not done."""
        entry = self.stages.get(kind.stage)
        return None if entry is None else kind.model_validate(entry["result"])

    def is_done(self, stage: str, key: str) -> bool:
        """Whether a stage was finished under this content key."""
        entry = self.stages.get(stage)
        return entry is not None and entry["key"] == key

    def dependents(self, stage: str) -> set[str]:
        """Stages that were made, directly or indirectly, from the output of `stage`."""
        needs = {name: set(entry["needs"]) for name, entry in (self.suspended | self.stages).items()}
        found: set[str] = set()
        while more := {name for name, of in needs.items() if of & (found | {stage})} - found:
            found |= more
        return found

    def begin(self, stage: str) -> None:
        """Remove `stage` and all that was made from it. Call before its output is touched."""
        doomed = {stage} | self.dependents(stage)
        changed = doomed & set(self.stages) or self.in_progress != stage
        self.stages = {name: entry for name, entry in self.stages.items() if name not in doomed}
        if stage not in self.suspended:
            self.suspended = {name: entry for name, entry in self.suspended.items() if name not in doomed}
        if changed:
            self.in_progress = stage
            self.save()

    def finish(
        self,
        stage: str,
        key: str,
        result: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        then: str | None = None,
        files: Mapping[str, Any] | None = None,
        needs: Iterable[str] = (),
        ran: Mapping[str, Any] | None = None,
        version: int | None = None,
    ) -> None:
        """Enter `stage` as done. Call when its output is complete.

        Parameters
        ----------
        stage : str
        key : str
            Its content key.
        result : mapping, optional
            What it returned (JSON).
        seconds : float
            How long it took.
        then : str, optional
            The stage that begins at once.
        files : mapping, optional
            Checksums of its output.
        needs : iterable of str
            Stages whose output it was made from.
        ran : mapping, optional
            Device, threads and precision, on which the last bits of its result depend.
        version : int, optional
            Of the stage.
        """
        entry = {"key": key, "needs": list(needs), "result": dict(result or {}), "seconds": round(seconds, 3)}
        entry["files"] = dict(files or {})
        if ran:
            entry["ran"] = dict(ran)
        if version is not None:
            entry["version"] = version
        self.stages[stage] = entry
        self._restore(stage)
        self.in_progress = None if then in self.stages else then
        if self.failure is not None and self.failure["stage"] == stage:
            self.failure, self.tries = None, 0
        self.save()

    def invalidate(self, stage: str) -> None:
        """Take out `stage`, whose files are damaged, and suspend what was made from it."""
        for name in {stage} | self.dependents(stage):
            if name in self.stages:
                self.suspended[name] = self.stages.pop(name) | {"damaged": False}
        if stage in self.suspended:
            self.suspended[stage]["damaged"] = True
        self.save()

    def _restore(self, stage: str) -> None:
        """Restore what was suspended for `stage`, now done again, if its files are the same; else drop it."""
        before, entry = self.suspended.pop(stage, None), self.stages[stage]
        if before is None:
            return
        if (before["key"], before["files"]) != (entry["key"], entry["files"]):
            doomed = self.dependents(stage)
            self.suspended = {name: kept for name, kept in self.suspended.items() if name not in doomed}
            return
        while ready := [
            name
            for name, kept in self.suspended.items()
            if not kept["damaged"] and set(kept["needs"]) & set(self.stages) and self._whole(kept)
        ]:
            for name in ready:
                self.stages[name] = {
                    key: v for key, v in self.suspended.pop(name).items() if key != "damaged"
                }

    def _whole(self, entry: Mapping[str, Any]) -> bool:
        """Whether nothing that an entry was made from is still suspended."""
        return not set(entry["needs"]) & set(self.suspended)

    def fail(self, stage: str, error: str, trace: str = "") -> None:
        """Enter why `stage` failed; `trace` is the traceback of an error that no user can correct."""
        self.tries += 1
        self.in_progress = None
        self.failure = {"slide": self.slide, "stage": stage, "error": error, "tries": self.tries}
        if trace:
            self.failure["trace"] = trace
        self.save()

    def save(self) -> None:
        """Replace the file; ``began`` and ``held`` are the names in studies of format 2."""
        values = {
            "format": self.format,
            "files": self.files,
            "stages": self.stages,
            "began": self.in_progress,
            "failure": self.failure,
            "tries": self.tries,
        }
        if self.suspended:
            values["held"] = self.suspended
        write_json(self.path, values, indent=None)


def _refuse_strange_paths(*kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ValueError` if an entry names files outside the study, since damaged files are removed."""
    for stages in kinds:
        for entry in stages.values():
            written = entry["result"].get("files")  # of a conversion, their number
            for name in (*entry.get("files", ()), *(written if isinstance(written, list) else ())):
                if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
                    raise ValueError(name)
