"""A run from outside: refuse early what cannot work, then hand the slides to `collection`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell.collection import Run
from daskcell.config import Config, load_config, parse_config
from daskcell.disk import remove
from daskcell.errors import ConfigError, DaskcellError, ImageError, InputError, StudyError
from daskcell.images import find_images
from daskcell.images.sources import Source
from daskcell.keys import digest
from daskcell.lock import Lock
from daskcell.progress import Progress
from daskcell.study import Study, check_folder, sweep

if TYPE_CHECKING:
    from distributed import Client

Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def run(
    inputs: Inputs,
    out: str | os.PathLike[str],
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    client: Client | None = None,
    *,
    progress: Progress | None = None,
    retry_failed: bool = False,
) -> Study:
    """Segment, describe and group every cell of every image among `inputs` into the folder `out`.

    Run again with the same inputs, it continues: what is done under the present settings stays. A slide that
    cannot be worked on is set aside with its reason (`Study.failures`), and tried again by the next run.

    Parameters
    ----------
    inputs
        Files, folders, patterns with ``*``, or OME-Zarr images; one or several.
    config
        Settings: a `Config`, nested dictionaries, or a YAML file. None: the defaults.
    client
        A Dask client whose workers to use; None: as ``config.compute`` says.
    progress
        Who is told how far it is; None: nobody.
    retry_failed
        Work on the slides that were set aside only.

    Raises
    ------
    DaskcellError
        Refused before any work (settings, inputs, weights, output folder, machine), or something concerns
        all slides, such as a full disk; the same call continues once it is mended.
    """
    settings = as_config(config)
    given = [os.fspath(path) for path in ([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs)]
    if not given:
        raise InputError("There is no input: please name files, folders or patterns.")
    out = Path(out)
    known = check_folder(out, given)
    sources = find_images(given, settings.input)
    _check_readable(sources)
    weights = fingerprints(settings)
    progress = progress or Progress()
    with _nothing_left_behind(out, new=known is None), Lock(out) as lock:
        study = Study.create(out, given, settings)
        study.update(slides=sorted(source.name for source in sources), weights=weights)
        sweep(out)
        Run(study, sources, settings, weights, lock, progress, retry_failed).go(client)
    return Study(out)


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


def fingerprints(config: Config) -> dict[str, str]:
    """Hashes of the weights a run needs; raises `WeightsError` for those that are not here."""
    from daskcell.features.encoders import encoder_spec

    found = {}
    if config.segment.method == "cellpose":
        from daskcell.models import network_fingerprint

        found["segment"] = network_fingerprint(config.segment.model)
    histogram = config.preprocess.histogram
    if histogram is not None and histogram.reference is not None:
        # Not weights, but all the same a file that the settings only name.
        found["freeze"] = reference_digest(histogram.reference)
    features = config.features
    found["describe"] = encoder_spec(features.encoder, layer=features.layer, size=features.size).fingerprint
    return found


def reference_digest(path: str) -> str:
    """Hash of the picture whose histogram is taken over; raises `ConfigError` if it cannot be read."""
    try:
        return digest(Path(path))
    except OSError as error:
        raise ConfigError(
            f"preprocess.histogram.reference {path} cannot be read: {error.strerror}."
        ) from None


def _check_readable(sources: Sequence[Source]) -> None:
    """Refuse what cannot be read at all before any work; one bad file among many is set aside later."""
    unreadable = [file for source in sources for file in source.files if not os.access(file, os.R_OK)]
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


__all__ = ["Study", "StudyError", "as_config", "fingerprints", "open_study", "run"]
