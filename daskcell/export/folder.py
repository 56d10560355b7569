"""The folder of an export: begun once, continued by the same call, never one with files of somebody else."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell.errors import InputError, StudyError
from daskcell.storage.atomic import refuse_impossible, remove, temporaries, write_json

if TYPE_CHECKING:
    from daskcell.study import Study

SCRATCH = ".daskcell-export-"
"""Beginning of the names of folders that an export needs only while it works."""


def choose(study: Study, slides: Sequence[str] | None) -> list[str]:
    """Names of the slides to export, None: all of them.

    Raises
    ------
    InputError
        There is no such slide.
    StudyError
        The cells of one have not been described yet.
    """
    slides = [slides] if isinstance(slides, str) else slides
    chosen = study.slides if slides is None else list(slides)
    for name in chosen:
        if name not in study.slides:
            raise InputError(f"{study.out} has no slide {name!r}.")
        if study.record.ledger(name).entry("describe") is None or not study.paths.table(name).exists():
            raise StudyError(f"The cells of {name} have not been described yet. Please run the study first.")
    return chosen


def begin(out: Path, study: Study, asked: dict[str, Any]) -> Path:
    """The note in `out` of what is being exported, there until all is: who finds his own goes on."""
    refuse_impossible(out)
    note = out / ".unfinished.json"
    content = asked | {
        "study": str(study.out.absolute()),
        "keys": {name: _keys(study, name) for name in asked["slides"]},
        "block": study.config.compute.block,  # which cells are in which task
    }
    if note.exists() and json.loads(note.read_text()) != content:
        raise InputError(
            f"{out} holds an export that was not finished, of other cells or with other options. Please "
            "remove it or choose another name."
        )
    if not note.exists():
        # A run that was killed at its very start has left nothing but half a note.
        if os.path.lexists(out) and (not out.is_dir() or set(out.iterdir()) - set(temporaries(out))):
            raise InputError(f"{out} exists already. Please remove it or choose another name.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(note, content)
    remove(*out.glob(f"{SCRATCH}*"), *temporaries(out))
    return note


def _keys(study: Study, slide: str) -> dict[str, str]:
    """Content keys of what a slide's crops are made of."""
    entries = {name: study.record.ledger(slide).entry(name) for name in ("describe", "assign")}
    return {name: entry["key"] for name, entry in entries.items() if entry}
