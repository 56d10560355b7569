"""What is done of a slide: an entry for every finished stage, under the stage's content key.

A stage's entry leaves the ledger before its output is touched and comes back when the output is whole, so a
run that is killed at any moment continues with nothing half-made taken for done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from daskcell.disk import write_json
from daskcell.study.keys import UPSTREAM, descendants


class Ledger:
    """Finished stages of one slide, in one small file that is replaced whole.

    ``entry(stage)`` is ``{"key": content key, "result": what the stage returned, "seconds": ..., "files": see
    `daskcell.study.checksums`}``.

    A stage whose files were damaged is taken out by `lose`, and so is all that was made from it; but that is
    held, and comes back when the stage gives the very files again.
    """

    def __init__(self, path: Path, slide: str):
        self.path, self.slide = path, slide
        try:
            values = json.loads(path.read_bytes())
            self.files: list[dict[str, Any]] = values["files"]
            self.stages: dict[str, dict[str, Any]] = values["stages"]
            self.failure: dict[str, Any] | None = values.get("failure")
            self.tries: int = values.get("tries", 0)
            self.began: str | None = values.get("began")
            self.held: dict[str, dict[str, Any]] = values.get("held", {})
            _refuse_strange_paths(self.stages, self.held)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # A ledger that cannot be read, or names files elsewhere, says nothing is done: work is repeated,
            # never a result invented.
            self.files, self.stages, self.failure, self.tries = [], {}, None, 0
            self.began, self.held = None, {}

    def entry(self, stage: str) -> dict[str, Any] | None:
        return self.stages.get(stage)

    @property
    def entered(self) -> set[str]:
        """Files, as paths in the study, that stages which are done have written."""
        entries = (*self.stages.values(), *self.held.values())
        return {file for entry in entries for file in entry.get("files", ())}

    def result(self, stage: str) -> dict[str, Any]:
        """What `stage` returned; empty if it is not done."""
        return self.stages.get(stage, {}).get("result") or {}

    def is_done(self, stage: str, key: str) -> bool:
        entry = self.stages.get(stage)
        return entry is not None and entry["key"] == key

    def begin(self, stage: str, rewrites: Iterable[str] = ()) -> None:
        """Forget `stage` and all that was made from it. Call before its output is touched.

        `rewrites` are files of earlier stages that it writes again: those no longer vouch for them.
        """
        doomed = {stage} | descendants(stage)
        changed = doomed & set(self.stages) or self.began != stage
        self.stages = {name: entry for name, entry in self.stages.items() if name not in doomed}
        if stage not in self.held:
            self.held = {name: entry for name, entry in self.held.items() if name not in doomed}
        for file in rewrites:
            for entry in self.stages.values():
                if entry.get("files", {}).get(file) is not None:
                    entry["files"][file] = None
                    changed = True
        if changed:
            self.began = stage
            self.save()

    def finish(
        self,
        stage: str,
        key: str,
        result: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        then: str | None = None,
        files: Mapping[str, Any] | None = None,
    ) -> None:
        """Enter `stage` as done. Call when its output, of which `files` are the checksums, is whole; `then`
        is the stage that begins at once."""
        entry = {"key": key, "result": dict(result or {}), "seconds": round(seconds, 3)}
        entry["files"] = dict(files or {})
        self.stages[stage] = entry
        self._take_back(stage)
        self.began = None if then in self.stages else then
        if self.failure is not None and self.failure["stage"] == stage:
            self.failure, self.tries = None, 0
        self.save()

    def lose(self, stage: str) -> None:
        """Take out `stage`, whose files were damaged, and hold what was made from it."""
        for name in {stage} | descendants(stage):
            if name in self.stages:
                self.held[name] = self.stages.pop(name) | {"lost": False}
        if stage in self.held:
            self.held[stage]["lost"] = True
        self.save()

    def _take_back(self, stage: str) -> None:
        """`stage` is done anew: what is held of it comes back if its files are the same, or goes for good."""
        before = self.held.pop(stage, None)
        if before is None:
            return
        entry = self.stages[stage]
        was, now = before.get("files", {}), entry["files"]
        same = before["key"] == entry["key"] and was.keys() == now.keys()
        if not same or any(was[file] not in (None, now[file]) for file in was):
            self.held = {name: kept for name, kept in self.held.items() if name not in descendants(stage)}
            return
        for kept in self.held.values():
            if kept.get("files", {}).keys() & now.keys():  # written again there, and replaced now
                kept["lost"] = True
        came = {stage}
        for name in UPSTREAM:  # in order: a stage comes after the one it reads
            if UPSTREAM[name] in came and name in self.held and not self.held[name]["lost"]:
                self.stages[name] = {key: v for key, v in self.held.pop(name).items() if key != "lost"}
                came.add(name)

    def fail(self, stage: str, error: str, trace: str = "") -> None:
        """Enter why `stage` could not be done; `trace` is for errors that are no user's."""
        self.tries += 1
        self.began = None
        self.failure = {"slide": self.slide, "stage": stage, "error": error, "tries": self.tries}
        if trace:
            self.failure["trace"] = trace
        self.save()

    def save(self) -> None:
        values = {
            "files": self.files,
            "stages": self.stages,
            "began": self.began,
            "failure": self.failure,
            "tries": self.tries,
        }
        if self.held:
            values["held"] = self.held
        write_json(self.path, values, indent=None)


def _refuse_strange_paths(*kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ValueError` where files of a stage lie outside the study: damaged ones are removed."""
    for stages in kinds:
        for entry in stages.values():
            written = entry["result"].get("files")  # of a conversion, their number
            for name in (*entry.get("files", ()), *(written if isinstance(written, list) else ())):
                if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
                    raise ValueError(name)
