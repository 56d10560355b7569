"""A run from outside: refuse early what cannot work, then hand the slides to `collection`."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from daskcell.config import Config, load_config, parse_config
from daskcell.errors import (
    ConfigError,
    DaskcellError,
    DriftWarning,
    ImageError,
    InputError,
    InputWarning,
    StudyError,
)
from daskcell.evaluation.truth import FILE as SCORES
from daskcell.evaluation.truth import read_truth, score_study
from daskcell.images import find_images
from daskcell.images.reader_process import open_safely
from daskcell.images.sources import Source
from daskcell.pipeline.arrays import given_inputs, keep_arrays, take_back_arrays
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.reporting import bring_report_up_to_date
from daskcell.pipeline.reuse_model import PretrainedModel
from daskcell.pipeline.runner import Run
from daskcell.pipeline.slide import no_room
from daskcell.pipeline.stages import fingerprints
from daskcell.pipeline.status import drift_sentences
from daskcell.pipeline.upgrade import upgrade
from daskcell.storage import paths
from daskcell.storage.atomic import is_full, remove
from daskcell.storage.lock import Lock
from daskcell.study import Study, check_folder, create_study, read_record, sweep
from daskcell.study.keys import identify

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
    """Segment, describe and cluster every cell of every image among `inputs` into the folder `out`.

    Run again, it continues: what is done under the present settings stays. A slide that cannot be worked on
    is set aside with its reason (`Study.failures`), and tried again by the next run.

    A study grows: with more inputs, the new images are worked on beside those that are done, and the clusters
    are fitted anew over all. A slide whose input is no longer given stays in the study with all its results
    and is marked (`Study.left`); it is no failure. The fit is always over the cells of the present inputs, as
    a new study's would be; cells of slides that left get their cluster from it too, so that all tables refer
    to the same clusters. Given again, such a slide takes part again.

    Nothing in `out` is replaced or removed but what daskcell entered in its own list (``study.json``): a
    folder that holds something else is refused, and so is a file of yours in a place where one is to be
    written, before anything is.

    Parameters
    ----------
    inputs
        Files, folders, patterns with ``*``, OME-Zarr images, or tables of images (CSV, Parquet; see
        `daskcell.images.manifest`); one or several. Any iterable of these; or of ``(name, array)``, with
        arrays of ``(Y, X)``, ``(C, Y, X)`` or other axes (`images.axes`; also of xarray, Zarr or torch),
        which are kept in the study's folder ``inputs``. An image is known
        by its name: another file of the name of a slide is refused, unless its content is the same.
    config
        Settings: a `Config`, nested dictionaries, or a YAML file. None: the defaults.
    client
        A Dask client, a cluster object or a scheduler's address, whose workers to use; None: as
        ``config.compute`` says. While the run lasts its workers have ``config.compute.threads``.
    progress
        Who is told how far it is; None: nobody.
    retry_failed
        Work on the slides that were set aside only.
    verify
        Compare the checksums of everything that is done. Without, names and sizes are looked at, and
        checksums of slides that have work left.
    truth
        CSV file of cells with known types, to compare the clusters with; see `evaluation.read_truth`.
        The result is in the study's ``scores.json``.

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
    """Assign the cells of new images to the clusters of a fitted model.

    Cells are found and described as those of the model were. The study holds a copy of the model, is
    continued by the same call, and grows as by `run`. How far the new cells lie from the model's is in the
    study (`drift`), and told by a `DriftWarning` where they are unlike.

    Parameters
    ----------
    inputs, out, client, progress, retry_failed, truth
        As for `run`.
    model
        A study with clusters, or the folder of a saved model.
    config
        Settings of input, output and compute, as for `run`; those of the model cannot be changed.

    Raises
    ------
    DaskcellError
        As for `run`; or settings, an encoder or a network other than the model's.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from daskcell import assign, run
    >>> image = np.zeros((1, 96, 96), np.uint8)
    >>> image[:, 20:34, 20:34] = image[:, 60:80, 50:70] = 200
    >>> folder, here = tempfile.mkdtemp(), {"kind": "inline"}
    >>> settings = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": here}
    >>> study = run([("january", image)], f"{folder}/study", settings)
    >>> new = assign([("june", image)], f"{folder}/new", model=f"{folder}/study", config={"compute": here})
    >>> new.cells("june")["cluster"].equals(study.cells("january")["cluster"])
    True
    """
    given = PretrainedModel.load(model)
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
    model: PretrainedModel | None,
    progress: Progress | None,
    retry_failed: bool,
    truth: str | os.PathLike[str] | None,
    verify: bool = False,
) -> Study:
    given, arrays = given_inputs(inputs, out)
    if not given:
        raise InputError("There is no input: please name files, folders or patterns.")
    out = Path(out)
    known = check_folder(out)
    _check_kind(out, known, model)
    weights = fingerprints(settings)
    tell = progress.say if progress is not None else _warn
    progress = progress or Progress()
    with _nothing_left_behind(out, new=known is None), contextlib.ExitStack() as stack:
        lock = Lock(out)
        files = given
        if arrays is not None:
            stack.enter_context(lock)
            study = create_study(out, given, settings) if known is None else Study(out)
            files = keep_arrays(arrays, study, settings.input.axes, tell)
        sources = name_as_before(find_images(files, settings.input, tell), out, known)
        _check_readable(sources)
        if truth is not None:
            # Before hours of work, not after.
            read_truth(truth, [source.name for source in sources] + (known["slides"] if known else []))
        if arrays is None:
            stack.enter_context(lock)
        upgrade(out)
        study = create_study(out, given, settings, [source.name for source in sources])
        conditions = {name: study.conditions[name] for name in study.left if name in study.conditions}
        conditions |= {source.name: source.condition for source in sources if source.condition is not None}
        study.record.update(weights=weights, groups=conditions)
        if truth is not None:
            study.record.own(SCORES)
        _tell_what_left(study, progress)
        if model is not None:
            study.record.update(model=os.path.abspath(model.folder))
        Run(study, sources, settings, weights, lock, progress, retry_failed, model, verify).go(client)
        if truth is not None and study.record.clusters_key is not None:
            score_study(study, truth)
        sweep(out)
        bring_report_up_to_date(study)
    return Study(out)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, InputWarning, stacklevel=4)


def _check_kind(out: Path, known: Mapping[str, Any] | None, model: PretrainedModel | None) -> None:
    """A study has clusters of its own or those of a given model: neither way replaces the other's unasked."""
    if known is None:
        return
    if model is None and "model" in known:
        raise StudyError(
            f"{out} holds cells assigned to the clusters of {known['model']}. Please continue it with "
            "'assign', or choose another output folder."
        )
    if model is not None and "model" not in known and known["slides"]:
        raise StudyError(
            f"{out} is a study with clusters of its own. Please continue it with 'run', or choose another "
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
    known = check_folder(out)
    _check_kind(out, known, None)
    sources = name_as_before(find_images(given, settings.input), out, known)
    sources.sort(key=lambda source: source.name)
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


def name_as_before(sources: Sequence[Source], out: Path, record: Mapping[str, Any] | None) -> list[Source]:
    """`sources` under the names that a study has for their files, so that growing changes no name.

    Raises
    ------
    InputError
        Another image has the name of a slide.
    """
    if not record or not record["slides"]:
        return list(sources)
    study = Study(out)
    before = {name: study.record.ledger(name).files for name in study.slides}
    made_from = {name: tuple(file["path"] for file in files) for name, files in before.items()}
    like = {name.lower(): name for name in before}  # a study may move to where letter case does not count
    owner = _only({files: name for name, files in made_from.items() if files}, made_from.values())
    present = _only({source.files: source for source in sources}, (source.files for source in sources))
    names = {f: owner[f] for f, source in present.items() if f in owner and _are_alike(source.name, owner[f])}
    taken = {name.lower() for name in names.values()}
    found = []
    for source in sources:
        name = names.get(source.files)
        if name is None:
            name = next(name for name in _numbered(source.name) if name.lower() not in taken)
            name = like.get(name.lower(), name)
            if before.get(name) and not _is_same(source, before[name]):
                raise InputError(
                    f"{source.files[0]} would be slide {name!r}, which {out} made from {made_from[name][0]}. "
                    "Please give the file another name, or choose another output folder."
                )
            taken.add(name.lower())
        found.append(replace(source, name=name))
    return found


def _are_alike(name: str, other: str) -> bool:
    """Whether two names differ by a number or by folders only, and not since somebody chose another."""
    name, other = sorted((re.sub(r"-\d+$", "", one) for one in (name, other)), key=len)
    return name == other or other.endswith(f"_{name}")


def _only(values: dict[Any, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """`values` of those keys that are there once: several planes of one file have names of their own."""
    counts = Counter(keys)
    return {key: value for key, value in values.items() if counts[key] == 1}


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _is_same(source: Source, known: list[dict[str, Any]]) -> bool:
    """Whether a slide of these `known` files is `source`: a file is the same, or they were moved."""
    if {file["path"] for file in known} & set(source.files):
        return True
    if [PurePath(file).name for file in source.files] != [file["name"] for file in known]:
        return False
    found = identify(
        source.files, (one | {"path": file} for one, file in zip(known, source.files, strict=True))
    )
    return [file["digest"] for file in found] == [file["digest"] for file in known]


def _tell_what_left(study: Study, progress: Progress) -> None:
    if study.left:
        shown = ", ".join(study.left[:3]) + (" ..." if len(study.left) > 3 else "")
        progress.say(
            f"{len(study.left)} slides are not among these inputs ({shown}). They stay in the study, marked, "
            "and take no part in the fit."
        )


def _check_readable(sources: Sequence[Source]) -> None:
    """Refuse what cannot be read at all before any work; bad files among many are set aside later."""
    unreadable = [
        next((f for f in source.files if not paths.is_remote(f) and not os.access(f, os.R_OK)), None)
        for source in sources
    ]
    if all(unreadable):
        more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise ImageError(f"{unreadable[0]}{more} cannot be read. Please check links and permissions.")
    if len(sources) == 1:
        open_safely(sources[0]).close()


@contextlib.contextmanager
def _nothing_left_behind(out: Path, *, new: bool) -> Iterator[None]:
    """A new study that was refused before any work (no GPU, no scheduler) leaves no folder behind."""
    existed = out.exists()
    try:
        yield
    except DaskcellError:
        if new and not (out / "ledger").exists() and (record := read_record(out)) is not None:
            take_back_arrays(out, record)
            remove(out / "study.json")
        if new and not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
    except Exception as error:
        if not is_full(error):
            raise
        full = no_room(out, error)
        full.after_start = True  # type: ignore[attr-defined]
        raise full from error
