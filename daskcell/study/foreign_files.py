"""Which files of a study daskcell may replace: those it entered in `study.json` before it wrote them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from daskcell.config import Config
from daskcell.errors import StudyError
from daskcell.storage.atomic import temporaries
from daskcell.study.ledger import Ledger
from daskcell.study.paths import CLUSTERS, StudyPaths

_INSIDE = {
    "clusters": re.compile(r"arrays\.npz|model\.json|names\.json"),
    "scratch": re.compile(r".+-([0-9a-f]{16}|labels)-\d+|\.clusters-\w+"),
}
"""What may lie in folders that are replaced or removed whole. Names decide, since a run that was killed
enters nothing."""


def outputs(config: Config) -> set[str]:
    """What a run with these settings writes, as paths in the study; ``*`` stands for a slide's name."""
    names = {"study.json", "failures.jsonl", ".progress.json", "clusters", "scratch", "ledger/.clusters.json"}
    names |= {"ledger/*.json", "images/*.zarr", "features/*.zarr"}
    names |= {f"tables/{kind}/*.parquet" for kind in ("cells", "clusters", "index")}
    names |= {f"overlays/*.{ending}" for ending in config.output.overlays}
    chosen = {
        "report.html": config.output.report,
        "preprocessed/*.tif": config.output.preprocessed,
        "channels/*": config.output.channels,
        "flows/*": config.segment.keep_flows,
    }
    return names | {name for name, wanted in chosen.items() if wanted}


def refuse_foreign(
    out: Path, names: Iterable[str], owned: Iterable[str], known: Iterable[str], slides: Iterable[str]
) -> None:
    """Refuse a study folder that holds files which a run would replace and daskcell did not write.

    Parameters
    ----------
    out : Path
        Folder of the study.
    names : iterable of str
        What the run writes (`outputs`).
    owned : iterable of str
        What is entered already.
    known, slides : iterable of str
        Slides that the study has, and those of the run.

    Raises
    ------
    StudyError
        For a file whose name the run would write and that is not entered, and for one in a folder that is
        replaced whole.
    """
    owned, known = set(owned) | {"study.json"}, set(known)
    slides = known | set(slides)
    for name in sorted(names):
        folder = (out / name).parent
        if folder.exists() and not folder.is_dir():
            raise StudyError(foreign_sentence(folder))
        new = slides - known if name in owned else slides
        written = [out / name.replace("*", slide) for slide in new] if "*" in name else []
        if "*" not in name and name not in owned:
            written = [out / name]
        there = set(os.listdir(folder)) if written and folder.is_dir() else set()
        for path in sorted(written):
            if path.name in there:
                raise StudyError(foreign_sentence(path))
        if name in _INSIDE and (out / name).is_dir():
            mine = {path.name for path in temporaries(out / name)}
            entered = Ledger(StudyPaths(out).ledger(CLUSTERS), CLUSTERS).entered
            for inner in sorted(set(os.listdir(out / name)) - mine):
                if not _INSIDE[name].fullmatch(inner) and f"{name}/{inner}" not in entered:
                    raise StudyError(foreign_sentence(out / name / inner))


def foreign_sentence(path: Path) -> str:
    """Why `path` stops a run."""
    return (
        f"{path} was not written by daskcell, and would be lost. Please move it to another place; the same "
        "command continues."
    )
