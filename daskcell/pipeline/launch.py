"""A run from outside: refuse early what cannot work, then hand the slides to `collection`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell import places
from daskcell.config import Config, load_config, parse_config
from daskcell.disk import is_full, remove
from daskcell.errors import ConfigError, DaskcellError, DriftWarning, ImageError, InputError, StudyError
from daskcell.images import find_images
from daskcell.images.sources import Source
from daskcell.pipeline.arrays import given_inputs, keep_arrays
from daskcell.pipeline.collection import Run
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.reporting import bring_report_up_to_date
from daskcell.pipeline.slide import no_room
from daskcell.pipeline.stages import fingerprints
from daskcell.pipeline.status import drift_sentences
from daskcell.pipeline.transfer import Given
from daskcell.pipeline.upgrade import upgrade
from daskcell.scoring.truth import read_truth, score_study
from daskcell.study import Study, check_folder, sweep
from daskcell.study.lock import Lock

if TYPE_CHECKING:
    from distributed import Client

    from daskcell.pipeline.plan import RunPlan

Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | tuple[str, Any]]


def run(
    inputs: Inputs,
    out: str | os.PathLike[str],
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    client: Client | None = None,
    *,
    progress: Progress | None = None,
    retry_failed: bool = False,
    verify: bool = False,
    truth: str | os.PathLike[str] | None = None,
) -> Study:
    """Segment, describe and group every cell of every image among `inputs` into the folder `out`.

    Run again with the same inputs, it continues: what is done under the present settings stays. A slide that
    cannot be worked on is set aside with its reason (`Study.failures`), and tried again by the next run.

    Parameters
    ----------
    inputs
        Files, folders, patterns with ``*``, OME-Zarr images, or tables of images (CSV, Parquet; see
        `daskcell.images.manifest`); one or several. Any iterable of these; or of ``(name, array)``, with
        ``(Y, X)`` or ``(C, Y, X)`` arrays, which are kept in the study's folder ``inputs``.
    config
        Settings: a `Config`, nested dictionaries, or a YAML file. None: the defaults.
    client
        A Dask client whose workers to use; None: as ``config.compute`` says.
    progress
        Who is told how far it is; None: nobody.
    retry_failed
        Work on the slides that were set aside only.
    verify
        Compare the checksums of everything that is done. Without, names and sizes are looked at, and
        checksums of slides that have work left.
    truth
        CSV file of cells with known types, to compare the groups with; see `scoring.read_truth`. The result
        is in the study's ``scores.json``.

    Raises
    ------
    DaskcellError
        Refused before any work (settings, inputs, weights, output folder, machine), or something concerns
        all slides, such as a full disk; the same call continues once it is mended.
    """
    return _go(inputs, out, as_config(config), client, None, progress, retry_failed, truth, verify)


def assign(
    inputs: Inputs,
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    client: Client | None = None,
    progress: Progress | None = None,
    retry_failed: bool = False,
    truth: str | os.PathLike[str] | None = None,
) -> Study:
    """Give the cells of new images the groups of a model that was fitted before.

    Cells are found and described as those of the model were. The study holds a copy of the model, and is
    continued by the same call. How far the new cells lie from the model's is in the study (`drift`), and told
    by a `DriftWarning` where they are unlike.

    Parameters
    ----------
    inputs, out, client, progress, retry_failed, truth
        As for `run`.
    model
        A study with groups, or the folder of a saved model.
    config
        Settings of input, output and compute, as for `run`; those of the model cannot be changed.

    Raises
    ------
    DaskcellError
        As for `run`; or settings, an encoder or a network other than the model's.
    """
    given = Given.load(model)
    settings = given.settings(as_config(config))
    given.check(settings, fingerprints(settings))
    study = _go(inputs, out, settings, client, given, progress, retry_failed, truth)
    for sentence in (given.outdated(), *drift_sentences(study)):
        if sentence:
            warnings.warn(sentence, DriftWarning, stacklevel=2)
    return study


def _go(
    inputs: Inputs,
    out: str | os.PathLike[str],
    settings: Config,
    client: Client | None,
    model: Given | None,
    progress: Progress | None,
    retry_failed: bool,
    truth: str | os.PathLike[str] | None,
    verify: bool = False,
) -> Study:
    given, arrays = given_inputs(inputs, out)
    if not given:
        raise InputError("There is no input: please name files, folders or patterns.")
    out = Path(out)
    known = check_folder(out, given)
    _check_kind(out, known, model)
    keep_arrays(arrays, out)
    sources = find_images(given, settings.input)
    _check_readable(sources)
    if truth is not None:
        read_truth(truth, [source.name for source in sources])  # before hours of work, not after
    weights = fingerprints(settings)
    progress = progress or Progress()
    with _nothing_left_behind(out, new=known is None), Lock(out) as lock:
        upgrade(out)
        study = Study.create(out, given, settings)
        groups = {source.name: source.group for source in sources if source.group is not None}
        study.update(slides=sorted(source.name for source in sources), weights=weights, groups=groups)
        if model is not None:
            study.update(model=os.path.abspath(model.folder))
        Run(study, sources, settings, weights, lock, progress, retry_failed, model, verify).go(client)
        if truth is not None and study.grouping is not None:
            score_study(study, truth)
        sweep(out)
        bring_report_up_to_date(study)
    return Study(out)


def _check_kind(out: Path, known: Mapping[str, Any] | None, model: Given | None) -> None:
    """A study has groups of its own or those of a given model: neither way replaces the other's unasked."""
    if known is None:
        return
    if model is None and "model" in known:
        raise StudyError(
            f"{out} holds cells assigned to the groups of {known['model']}. Please continue it with "
            "'assign', or choose another output folder."
        )
    if model is not None and "model" not in known and known["slides"]:
        raise StudyError(
            f"{out} is a study with groups of its own. Please continue it with 'run', or choose another "
            "output folder."
        )


def plan(
    inputs: Inputs,
    out: str | os.PathLike[str],
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> RunPlan:
    """What `run` would do with the same arguments, and why; does nothing and writes nothing.

    Raises
    ------
    DaskcellError
        What `run` would be refused for before any work.
    """
    from daskcell.pipeline.plan import make_plan
    from daskcell.pipeline.slide import Job

    settings, out = as_config(config), Path(out)
    given, _ = given_inputs(inputs, out)
    known = check_folder(out, given)
    _check_kind(out, known, None)
    sources = sorted(find_images(given, settings.input), key=lambda source: source.name)
    weights = fingerprints(settings)
    jobs = [Job(str(out), source, settings, weights) for source in sources]
    return make_plan(Study(out) if known else None, out, jobs, settings)


def open_study(out: str | os.PathLike[str]) -> Study:
    """The study in the folder `out`; raises `StudyError` if there is none."""
    return Study(Path(out))


def as_config(config: Config | Mapping[str, Any] | str | os.PathLike[str] | None) -> Config:
    """Settings from any of the ways to give them."""
    if config is None:
        return Config()
    if isinstance(config, Config):
        return config
    if isinstance(config, (str, os.PathLike)):
        return load_config(Path(config))
    if isinstance(config, Mapping):
        return parse_config(dict(config))
    raise ConfigError(f"config must be a Config, a mapping or a YAML file, not a {type(config).__name__}.")


def _check_readable(sources: Sequence[Source]) -> None:
    """Refuse what cannot be read at all before any work; one bad file among many is set aside later."""
    local = [file for source in sources for file in source.files if not places.is_remote(file)]
    unreadable = [file for file in local if not os.access(file, os.R_OK)]
    if unreadable:
        more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise ImageError(f"{unreadable[0]}{more} cannot be read. Please check the permissions.")
    if len(sources) == 1:
        sources[0].open().close()


@contextlib.contextmanager
def _nothing_left_behind(out: Path, *, new: bool) -> Iterator[None]:
    """A new study that was refused before any work (no GPU, no scheduler) leaves no folder behind."""
    existed = out.exists()
    try:
        yield
    except DaskcellError:
        if new and not (out / "ledger").exists():
            remove(out / "study.json")
            if not existed and out.is_dir() and not any(out.iterdir()):
                out.rmdir()
        raise
    except Exception as error:
        if not is_full(error):
            raise
        full = no_room(out, error)
        full.after_start = True  # type: ignore[attr-defined]
        raise full from error
