"""What `study.json` and the small files beside it say of a study, and who may write what.

`study.json` lists what daskcell writes into the folder: ``owned``, paths in the study with ``*`` for every
name in ``slides``, and ``arrays``, the files in `inputs/`. A path is entered before anything is written to
it, and only while nothing is there, so what is replaced or removed later never belonged to anybody else.

Knows no images, no networks and no Dask.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from daskcell.study.foreign_files import foreign_sentence, outputs, refuse_foreign
from daskcell.study.ledger import Ledger
from daskcell.study.paths import CLUSTERS, StudyPaths

FORMAT = 2
READABLE = (1, FORMAT)
"""Formats that can be opened; the next run brings an older one up to date."""
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


class Record(Mapping[str, Any]):
    """The entries of `study.json`, and the ledgers, failures and progress of a study.

    Stages write through it; users read a study with `daskcell.study.Study`.

    Parameters
    ----------
    out : Path
        Folder of the study.

    Raises
    ------
    StudyError
        If there is no study in `out`, or one that this version cannot read.
    """

    def __init__(self, out: Path):
        values = read_record(out)
        if values is None:
            raise StudyError(f"{out} holds no study (it has no study.json).")
        self.paths = StudyPaths(out)
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Record {self.paths.record}>"

    @property
    def config(self) -> Config:
        """Settings of the latest run."""
        try:
            return Config.model_validate(self["config"])
        except ValueError as error:
            raise ConfigError(f"{self.paths.record} holds settings of another version: {error}") from None

    def update(self, **values: Any) -> None:
        """Change entries of `study.json`."""
        self._values = self._values | values
        write_json(self.paths.record, self._values)

    def own_outputs(self) -> None:
        """Enter all files that a run with the study's settings writes, as `create_study` does.

        Raises
        ------
        StudyError
            If a file that daskcell did not write has the name of one.
        """
        names = outputs(self.config)
        owned = set(self.get("owned", names))
        refuse_foreign(self.paths.root, names, owned, self["slides"], ())
        if names - owned:
            self.update(owned=sorted(owned | names))

    def own(self, name: str) -> Path:
        """Enter a file as one that daskcell may replace, and return its path.

        Parameters
        ----------
        name : str
            Path in the study.

        Raises
        ------
        StudyError
            If a file of that name is there that daskcell did not write.
        """
        path = self.paths.root / name
        if name not in (owned := self.get("owned", [name])):
            if os.path.lexists(path):
                raise StudyError(foreign_sentence(path))
            self.update(owned=sorted([*owned, name]))
        return path

    def disown(self, name: str) -> None:
        """Remove a file of the study and its entry; a file that was never entered stays."""
        if name in (owned := self.get("owned", [name])):
            (self.paths.root / name).unlink(missing_ok=True)
            self.update(owned=[one for one in owned if one != name])

    # ------------------------------------------------------------------ stages

    def ledger(self, slide: str) -> Ledger:
        """The finished stages of a slide (`CLUSTERS`: of all slides together), read anew."""
        return Ledger(self.paths.ledger(slide), slide)

    @property
    def clusters_key(self) -> str | None:
        """Content key of the clusters with their present names and merges; None before the fit."""
        entry = self.ledger(CLUSTERS).entry("cluster")
        return None if entry is None else self.named_key(entry["key"])

    def named_key(self, key: str) -> str:
        """Content key `key` of the clusters, combined with their present names and merges."""
        names = self.paths.clusters / "names.json"
        said = names.read_bytes() if names.exists() else b""
        return hashlib.sha256(key.encode() + said).hexdigest() if said else key

    @property
    def assigned_key(self) -> str:
        """Hash of the content keys of all cells' clusters."""
        entries = ((name, self.ledger(name).entry("assign")) for name in self["slides"])
        keys = [f"{name} {entry['key']}" for name, entry in entries if entry]
        return hashlib.sha256("\n".join(keys).encode()).hexdigest()

    def assigned_table(self, slide: str) -> Path | None:
        """The file that holds the cluster of each cell of a slide; None before clusters are assigned."""
        if self.ledger(slide).entry("assign") is None:
            return None
        found = self.paths.clusters_table(slide)
        return found if found.exists() else self.paths.table(slide)  # columns of the cells table in format 1

    # ------------------------------------------------------------------ runs

    def write_progress(
        self, fraction: float | None, seconds_left: float | None = None, at: float = 0.0
    ) -> None:
        """Say how far the run at work is, for `status` in another process.

        Parameters
        ----------
        fraction : float or None
            Share of the work that is done, 0 to 1; None: the run has ended.
        seconds_left : float or None
            Estimate at the time `at`.
        at : float
            Seconds since 1970.
        """
        if fraction is None:
            self.paths.progress.unlink(missing_ok=True)
        else:
            write_json(self.paths.progress, {"at": at, "fraction": fraction, "seconds_left": seconds_left})

    def read_progress(self) -> dict[str, Any] | None:
        """What `write_progress` wrote last; None if no run is at work."""
        try:
            progress: dict[str, Any] = json.loads(self.paths.progress.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return progress

    def failures(self) -> list[dict[str, Any]]:
        """Slides that were set aside: slide, stage, error, tries."""
        if not self.paths.failures.exists():
            return []
        lines = self.paths.failures.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    def write_failures(self, failures: Iterable[Mapping[str, Any]]) -> None:
        """Replace `failures.jsonl`; an empty list removes it."""
        lines = [json_bytes(dict(failure)) for failure in failures]
        if lines:
            write_atomic(self.paths.failures, b"".join(lines))
        else:
            self.paths.failures.unlink(missing_ok=True)


def create_record(
    out: str | Path, inputs: Iterable[str | Path], config: Config, slides: Iterable[str] = ()
) -> Record:
    """Begin a study in `out`, or continue the one that is there with these inputs and settings.

    Parameters
    ----------
    out : path
        Folder of the study.
    inputs : iterable of paths
        As the user gave them.
    config : Config
        Settings of the run.
    slides : iterable of str
        Names of the slides that the inputs are now. Those that the study has beside them stay, and are
        listed as ``left``.

    Raises
    ------
    StudyError
        If `out` holds something else, or a file that daskcell did not write has a name that it would write.
    """
    out = Path(out)
    record = check_folder(out)
    slides = set(slides)
    known = set(record["slides"]) if record else set()
    record = {"slides": []} if record is None else record
    names = outputs(config)
    # Before there was a list, names in a study were taken for the study's.
    owned = set(record.get("owned", names if known else ()))
    refuse_foreign(out, names, owned, known, slides)
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
    return Record(out)


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
