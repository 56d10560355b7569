"""What a result looks like on disk: where things are, what is done, and who works on it.

    study/
      study.json                 format, inputs, resolved config, versions, weights
      images/<slide>.zarr        picture, labels/cells, labels/clusters
      tables/cells/<slide>.parquet
      tables/clusters/<slide>.parquet   the cluster of each cell, in the same order
      tables/index/<slide>.parquet      where each label lies
      features/<slide>.zarr
      clusters/                  the fitted model, and names.json: names of clusters
      overlays/  preprocessed/  channels/
      inputs/                    pictures that were given as arrays
      scores.json                the clusters against known types, where a truth was given
      report.html                all of it on one page, for people
      failures.jsonl             slides that were set aside, with the reason
      ledger/<slide>.json        content key and result of every finished stage

Whether a stage is done is told by the ledger (see `daskcell.study.ledger`), never by a file that exists.

`study.json` lists what daskcell writes here: ``owned``, paths in the study with ``*`` for every name in
``slides``, and ``arrays``, the files in `inputs/`. A path is entered before anything is written to it, and
only while nothing is there: so what is replaced or removed later was never somebody else's.

Knows no images, no networks and no Dask.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell.config import Config
from daskcell.errors import ConfigError, StudyError
from daskcell.storage import paths
from daskcell.storage.atomic import (
    json_bytes,
    refuse_impossible,
    remove,
    temporaries,
    write_atomic,
    write_json,
)
from daskcell.study.ledger import Ledger
from daskcell.study.results import Fitted

if TYPE_CHECKING:
    from daskcell.preprocess import PreparedImage

FORMAT = 2
READABLE = (1, FORMAT)
"""Formats that can be opened; the next run brings an older one up to date."""
CLUSTERS = ".clusters"
"""Name of the ledger of what is done for all slides together; no slide's name begins with a dot."""
_PACKAGES = (
    "daskcell",
    "numpy",
    "scipy",
    "scikit-image",
    "scikit-learn",
    "dask",
    "zarr",
    "torch",
    "cellpose",
)

_HARMLESS = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.lock|\.lock-[0-9a-f]{32}|\.lock-breaking")
_INSIDE = {
    "clusters": re.compile(r"arrays\.npz|model\.json|names\.json"),
    "scratch": re.compile(r".+-([0-9a-f]{16}|labels)-\d+|\.clusters-\w+"),
}
"""What is in folders that are replaced or removed whole; their names say it, since a run that was killed
enters nothing."""


class Study:
    """A study's folder. Opening reads nothing but `study.json`; see `Study.create` for a new one."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        record = read_record(self.out)
        if record is None:
            raise StudyError(f"{self.out} holds no study (it has no study.json).")
        self.record = record

    def __repr__(self) -> str:
        return f"<Study {self.out}, {len(self.slides)} slides>"

    @classmethod
    def create(
        cls, out: str | Path, inputs: Iterable[str | Path], config: Config, slides: Iterable[str] = ()
    ) -> Study:
        """A new study in `out`, or the one that is there, which goes on with these inputs and settings.

        Parameters
        ----------
        slides : iterable of str
            Names of the slides that the inputs are now. Those that the study has beside them stay, and are
            `left`.

        Raises
        ------
        StudyError
            `out` holds something else, or a file that is no one of the study's has a name of one.
        """
        out = Path(out)
        record = check_folder(out)
        slides = set(slides)
        known = set(record["slides"]) if record else set()
        record = {"slides": []} if record is None else record
        names = outputs(config)
        # Before there was a list, names in a study were taken for the study's.
        owned = set(record.get("owned", names if known else ()))
        _refuse_foreign(out, names, owned, known, slides)
        out.mkdir(parents=True, exist_ok=True)
        record |= {
            "format": FORMAT,
            "inputs": _absolute(inputs),
            "slides": sorted(known | slides),
            "left": sorted(known - slides),
            "owned": sorted(owned | names),
            "config": config.model_dump(mode="json"),
            "versions": versions(),
        }
        write_json(out / "study.json", record)
        return cls(out)

    # ------------------------------------------------------------------ what is recorded

    @property
    def slides(self) -> list[str]:
        """Names of the slides, sorted; those that `left` are among them."""
        return list(self.record["slides"])

    @property
    def left(self) -> list[str]:
        """Slides that were among the inputs of an earlier run and are not among those of the latest."""
        return list(self.record.get("left", ()))

    @property
    def conditions(self) -> dict[str, str]:
        """Condition of each slide for which the manifest names one (on disk: ``groups``)."""
        return dict(self.record.get("groups") or {})

    @property
    def config(self) -> Config:
        """Settings of the latest run."""
        try:
            return Config.model_validate(self.record["config"])
        except ValueError as error:
            raise ConfigError(
                f"{self.out / 'study.json'} holds settings of another version: {error}"
            ) from None

    def update(self, **values: Any) -> None:
        """Change entries of `study.json`."""
        self.record = self.record | values
        write_json(self.out / "study.json", self.record)

    def own_outputs(self) -> None:
        """Enter all files that the study's settings make, as `create` does for a run.

        Raises
        ------
        StudyError
            A file that is not the study's has the name of one.
        """
        names = outputs(self.config)
        owned = set(self.record.get("owned", names))
        _refuse_foreign(self.out, names, owned, self.slides, ())
        if names - owned:
            self.update(owned=sorted(owned | names))

    def own(self, name: str) -> Path:
        """The path of a file in the study, entered as one that daskcell may replace.

        Raises
        ------
        StudyError
            There is a file of that name that is not the study's.
        """
        if name not in (owned := self.record.get("owned", [name])):
            if os.path.lexists(self.out / name):
                raise StudyError(_foreign(self.out / name))
            self.update(owned=sorted([*owned, name]))
        return self.out / name

    def disown(self, name: str) -> None:
        """Remove a file of the study, and take its name out of the list; one that is not in it stays."""
        if name in (owned := self.record.get("owned", [name])):
            (self.out / name).unlink(missing_ok=True)
            self.update(owned=[one for one in owned if one != name])

    def write_progress(
        self, fraction: float | None, seconds_left: float | None = None, at: float = 0.0
    ) -> None:
        """Write how far a run was `at` a time (seconds since 1970), for `status`; None: it has ended."""
        path = self.out / ".progress.json"
        if fraction is None:
            path.unlink(missing_ok=True)
        else:
            write_json(path, {"at": at, "fraction": fraction, "seconds_left": seconds_left})

    def read_progress(self) -> dict[str, Any] | None:
        """What a run last wrote of its progress; None: no run is at work."""
        try:
            progress: dict[str, Any] = json.loads((self.out / ".progress.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return progress

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Slides that were set aside: slide, stage, error, tries."""
        path = self.out / "failures.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def write_failures(self, failures: Iterable[Mapping[str, Any]]) -> None:
        """Replace `failures.jsonl`; an empty list removes it."""
        lines = [json_bytes(dict(failure)) for failure in failures]
        path = self.out / "failures.jsonl"
        if lines:
            write_atomic(path, b"".join(lines))
        else:
            path.unlink(missing_ok=True)

    @property
    def clusters_key(self) -> str | None:
        """Content key of the clusters with their present names and merges; None before the fit."""
        entry = self.ledger(CLUSTERS).entry("cluster")
        return None if entry is None else self.named_key(entry["key"])

    def named_key(self, key: str) -> str:
        """Content key `key` of the clusters, combined with their present names and merges."""
        names = self.clusters / "names.json"
        said = names.read_bytes() if names.exists() else b""
        return hashlib.sha256(key.encode() + said).hexdigest() if said else key

    @property
    def assigned_key(self) -> str:
        """Hash of the content keys of all cells' clusters."""
        entries = ((name, self.ledger(name).entry("assign")) for name in self.slides)
        keys = [f"{name} {entry['key']}" for name, entry in entries if entry]
        return hashlib.sha256("\n".join(keys).encode()).hexdigest()

    @property
    def scores(self) -> dict[str, Any] | None:
        """Agreement of the present clusters with known types (`evaluation.score_study`), or None."""
        try:
            found = json.loads((self.out / "scores.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if found.get("grouping") != self.clusters_key:
            return None
        return found if found.get("assigned") in (None, self.assigned_key) else None

    def ledger(self, slide: str) -> Ledger:
        """What is done for `slide`."""
        return Ledger(self.out / "ledger" / f"{slide}.json", slide)

    # ------------------------------------------------------------------ where things are

    def image(self, slide: str) -> Path:
        """OME-Zarr of the picture and its labels."""
        return self.out / "images" / f"{slide}.zarr"

    def table(self, slide: str) -> Path:
        """The cells of a slide, a row a cell."""
        return self.out / "tables" / "cells" / f"{slide}.parquet"

    def clusters_table(self, slide: str) -> Path:
        """``cluster``, ``cluster_name`` and ``distance`` of each cell of a slide, in the order of `table`."""
        return self.out / "tables" / "clusters" / f"{slide}.parquet"

    def assigned_table(self, slide: str) -> Path | None:
        """The file whose rows say which cluster each cell belongs to; None as long as none does."""
        if self.ledger(slide).entry("assign") is None:
            return None
        found = self.clusters_table(slide)
        return found if found.exists() else self.table(slide)  # columns of the cells table in format 1

    def index(self, slide: str) -> Path:
        """First pixel, bounding box and area of every label of a slide."""
        return self.out / "tables" / "index" / f"{slide}.parquet"

    def features(self, slide: str) -> Path:
        """``(n, d)`` array, a row a cell, in the table's order."""
        return self.out / "features" / f"{slide}.zarr"

    def flows(self, slide: str) -> Path:
        """Network outputs kept for other thresholds (``segment.keep_flows``)."""
        return self.out / "flows" / slide

    def scratch(self, slide: str, stage: str, key: str, block: int) -> Path:
        """Room for what a stage keeps between its tasks; belongs to one content key and one block size."""
        return self.out / "scratch" / f"{slide}-{stage}-{key[:16]}-{block}"

    def scratches(self, slide: str, stage: str | None = None) -> list[Path]:
        """What there is of a slide's `scratch`, of one stage or of all."""
        name = re.compile(rf"{re.escape(slide)}-{stage or '[a-z]+'}-[0-9a-f]{{16}}-\d+")
        folder = self.out / "scratch"
        return [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []

    @property
    def clusters(self) -> Path:
        """Folder of the fitted model."""
        return self.out / "clusters"

    @property
    def overlays(self) -> Path:
        return self.out / "overlays"

    @property
    def preprocessed(self) -> Path:
        return self.out / "preprocessed"

    @property
    def report(self) -> Path:
        """All of it on one page."""
        return self.out / "report.html"

    @property
    def channels(self) -> Path:
        return self.out / "channels"

    # ------------------------------------------------------------------ reading results

    def cells(self, slide: str | None = None) -> Any:
        """Table of the cells of one slide, or of all, with a column ``slide`` (pandas `DataFrame`); those of
        slides that `left` are among them."""
        import pandas as pd

        if slide is not None:
            if slide not in self.slides or not self.table(slide).exists():
                raise StudyError(f"{self.out} has no cells table of {slide!r}.")
            table, condition = pd.read_parquet(self.table(slide)), self.conditions.get(slide)
            assigned = self.assigned_table(slide)
            if assigned is not None and assigned != self.table(slide):
                table = table.assign(**pd.read_parquet(assigned))
            return table if condition is None else table.assign(condition=condition)
        tables = [self.cells(name).assign(slide=name) for name in self.slides if self.table(name).exists()]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def prepared(self, slide: str) -> PreparedImage:
        """The image of a slide as its preprocessing makes it, read box by box."""
        from daskcell.preprocess import PreparedImage

        fitted = self.ledger(slide).read(Fitted)
        if fitted is None:
            raise StudyError(f"{slide} of {self.out} has not been preprocessed yet. Please run the study.")
        return PreparedImage(str(self.image(slide)), fitted.read_plan())

    def open_image(self, slide: str) -> Any:
        """The picture of a slide, as `daskcell.open_image` gives it."""
        from daskcell.images import open_image

        return open_image(self.image(slide))


def read_record(out: Path) -> dict[str, Any] | None:
    """`study.json` of a folder, or None if there is none; raises `StudyError` if it is not ours."""
    path = out / "study.json"
    refuse_impossible(out)
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read ({error}). Please choose another output folder.") from None
    if not isinstance(record, dict) or not {"format", "inputs", "slides", "config"} <= set(record):
        raise StudyError(f"{path} was not written by daskcell. Please choose another output folder.")
    if record["format"] not in READABLE:
        raise StudyError(
            f"{out} is a study of format {record['format']}, and this version reads formats up to {FORMAT}. "
            "Please use the version of daskcell that made it, or another output folder."
        )
    return record


def check_folder(out: str | Path) -> dict[str, Any] | None:
    """The study record in `out`, None for a new folder; refuses what cannot be used. Writes nothing."""
    paths.refuse_remote(out, "the output of a run")
    out = Path(out)
    refuse_impossible(out)
    if out.exists() and not out.is_dir():
        raise StudyError(f"The output {out} is a file. Please give a folder.")
    record = read_record(out)
    if record is None:
        there = os.listdir(out) if out.is_dir() else []
        strange = sorted(name for name in there if not _HARMLESS.fullmatch(name))
        strange = sorted(set(strange) - {path.name for path in temporaries(out)})
        if strange:
            shown = ", ".join(strange[:3]) + (" ..." if len(strange) > 3 else "")
            raise StudyError(
                f"The output folder {out} holds something else ({shown}). "
                "Please choose a new or empty folder."
            )
    nearest = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise StudyError(f"The output folder {out} cannot be written to. Please choose another.")
    return record


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


def _refuse_foreign(
    out: Path, names: Iterable[str], owned: Iterable[str], known: Iterable[str], slides: Iterable[str]
) -> None:
    """Raise `StudyError` if something has a name in the study that is not `owned`, or lies in a folder that
    is replaced whole."""
    owned, known = set(owned) | {"study.json"}, set(known)
    slides = known | set(slides)
    for name in sorted(names):
        folder = (out / name).parent
        if folder.exists() and not folder.is_dir():
            raise StudyError(_foreign(folder))
        new = slides - known if name in owned else slides
        written = [out / name.replace("*", slide) for slide in new] if "*" in name else []
        if "*" not in name and name not in owned:
            written = [out / name]
        there = set(os.listdir(folder)) if written and folder.is_dir() else set()
        for path in sorted(written):
            if path.name in there:
                raise StudyError(_foreign(path))
        if name in _INSIDE and (out / name).is_dir():
            mine = {path.name for path in temporaries(out / name)}
            entered = Ledger(out / "ledger" / f"{CLUSTERS}.json", CLUSTERS).entered
            for inner in sorted(set(os.listdir(out / name)) - mine):
                if not _INSIDE[name].fullmatch(inner) and f"{name}/{inner}" not in entered:
                    raise StudyError(_foreign(out / name / inner))


def _foreign(path: Path) -> str:
    return (
        f"{path} was not written by daskcell, and would be lost. Please move it to another place; the same "
        "command continues."
    )


def _absolute(inputs: Iterable[str | Path]) -> list[str]:
    return sorted(paths.absolute(os.path.expanduser(os.fspath(path))) for path in inputs)


def sweep(out: Path) -> None:
    """Remove temporary files that a killed run or worker left in the places where we write them."""
    tables = ("tables/cells", "tables/clusters", "tables/index")
    for name in ("", "inputs", "ledger", "overlays", "preprocessed", *tables, "features", "clusters"):
        remove(*temporaries(out / name))


def versions() -> dict[str, str]:
    """Versions of daskcell, Python and the packages that results depend on."""
    import contextlib
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
