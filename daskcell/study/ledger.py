"""What is done of a slide: an entry for every finished stage, under the stage's content key.

A stage's entry leaves the ledger before its output is touched and comes back when the output is whole, so a
run that is killed at any moment continues with nothing half-made taken for done.
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
    """Finished stages of one slide, in one small file that is replaced whole.

    ``entry(stage)`` is ``{"key": content key, "needs": stages whose output it was made from, "result": what
    the stage returned, "seconds": ..., "files": see `daskcell.study.checksums`}``, and ``"ran"``, the device,
    threads and precision of a stage that runs a network. A ledger knows the stages by these entries alone.

    A stage whose files were damaged is taken out by `invalidate`, and so is all that was made from it; but
    that is `held`, and restored when the stage gives the very files again.
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
            # A ledger that cannot be read, or names files elsewhere, says nothing is done: work is repeated,
            # never a result invented.
            self.format = FORMAT
            self.files, self.stages, self.failure, self.tries = [], {}, None, 0
            self.in_progress, self.suspended = None, {}

    def entry(self, stage: str) -> dict[str, Any] | None:
        return self.stages.get(stage)

    @property
    def entered(self) -> set[str]:
        """Files, as paths in the study, that stages which are done have written."""
        entries = (*self.stages.values(), *self.suspended.values())
        return {file for entry in entries for file in entry.get("files", ())}

    def read(self, kind: type[R]) -> R | None:
        """What a stage returned; None if it is not done."""
        entry = self.stages.get(kind.stage)
        return None if entry is None else kind.model_validate(entry["result"])

    def is_done(self, stage: str, key: str) -> bool:
        entry = self.stages.get(stage)
        return entry is not None and entry["key"] == key

    def dependents(self, stage: str) -> set[str]:
        """Stages that were made, at first or second hand, from the output of `stage`."""
        needs = {name: set(entry["needs"]) for name, entry in (self.suspended | self.stages).items()}
        found: set[str] = set()
        while more := {name for name, of in needs.items() if of & (found | {stage})} - found:
            found |= more
        return found

    def begin(self, stage: str) -> None:
        """Forget `stage` and all that was made from it. Call before its output is touched."""
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
        """Enter `stage` as done. Call when its output is whole.

        Parameters
        ----------
        files
            Checksums of its output.
        needs
            Stages whose output it was made from.
        ran
            Where it ran, as far as results depend on that in the last bit.
        version
            Of the stage.
        then
            The stage that begins at once.
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
        """Take out `stage`, whose files were damaged, and hold what was made from it."""
        for name in {stage} | self.dependents(stage):
            if name in self.stages:
                self.suspended[name] = self.stages.pop(name) | {"damaged": False}
        if stage in self.suspended:
            self.suspended[stage]["damaged"] = True
        self.save()

    def _restore(self, stage: str) -> None:
        """Restore what is held with `stage`, now done anew, if its files are the same; else forget it."""
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
        """Whether nothing that an entry was made from waits to be made anew."""
        return not set(entry["needs"]) & set(self.suspended)

    def fail(self, stage: str, error: str, trace: str = "") -> None:
        """Enter why `stage` could not be done; `trace` is for errors that are no user's."""
        self.tries += 1
        self.in_progress = None
        self.failure = {"slide": self.slide, "stage": stage, "error": error, "tries": self.tries}
        if trace:
            self.failure["trace"] = trace
        self.save()

    def save(self) -> None:
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
    """Raise `ValueError` where files of a stage lie outside the study: damaged ones are removed."""
    for stages in kinds:
        for entry in stages.values():
            written = entry["result"].get("files")  # of a conversion, their number
            for name in (*entry.get("files", ()), *(written if isinstance(written, list) else ())):
                if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
                    raise ValueError(name)
