"""What a stage is, and the loop that brings one up to date.

The stages themselves are in `daskcell.pipeline.stages`; a `Context` is what each is given, and `run_stage` is
the same for all of them: is it done under its content key? If not: begin, run, take checksums, enter it in
the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from daskcell.compute import Workers
from daskcell.config import Config
from daskcell.storage.atomic import remove
from daskcell.study import CLUSTERS, Ledger, Study
from daskcell.study.checksums import checksum
from daskcell.study.keys import content_key
from daskcell.study.results import Result

if TYPE_CHECKING:
    from daskcell.images.sources import Source
    from daskcell.pipeline.reuse_model import PretrainedModel
    from daskcell.preprocess import Plan


@dataclass(frozen=True)
class Files:
    """Files that settings name, and that decide a result: weights, reference images."""

    digest: str
    what: str
    """As in "fitted with the network tiny"."""
    name: str = ""


@dataclass(frozen=True)
class Context:
    """What a stage works on, and with what."""

    study: Study
    config: Config
    ledger: Ledger
    workers: Workers = field(default_factory=Workers)
    key: str = ""
    """Content key of the stage at work."""
    scratch: Path = Path()
    """Folder for what the stage keeps between its tasks, from where a killed run continues. It belongs to the
    slide, the stage and the key; it does not exist yet, and is removed when the stage is done."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Content keys of all stages of the slide that can be done now."""
    weights: Mapping[str, str] = field(default_factory=dict)
    slide: str = ""
    source: Source | None = None
    """The slide's input."""
    slides: tuple[str, ...] = ()
    """Of a stage of the whole study: slides with cells."""
    model: PretrainedModel | None = None
    """A model in the place of a fit."""
    say: Callable[[str], None] = lambda text: None

    @property
    def image(self) -> Path:
        return self.study.paths.image(self.slide)

    @property
    def plan(self) -> Plan:
        """Of the slide's preprocessing."""
        return self.study.prepared(self.slide).plan


def _no_settings(config: Config) -> Any:
    return None


def _no_files(config: Config) -> Files | None:
    return None


def _usual_effort(config: Config) -> float:
    return 1.0


def _no_precision(config: Config) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a study.

    Attributes
    ----------
    name
    run
        Does the work: a thin call into a science room.
    outputs
        Files and folders that are the stage's own, from the context and the result.
    result
        Type of the result.
    needs
        Stages whose output it reads.
    version
        Raised by one when the stage gives another result for the same input and settings: studies redo it.
    scope
        Whether it is done for each slide, or once for all.
    weight
        Share of the work with the default settings, roughly; only the time left depends on it.
    effort
        How much more or less work it is with other settings.
    section
        Of the configuration, where its settings are.
    settings
        The settings that decide its result (JSON-able), and no others.
    files
        The files that decide its result.
    precision
        Number format of its network; None for a stage without one. Where a network runs decides the last bits
        of its outputs, so that is recorded.
    """

    name: str
    run: Callable[[Context], Result]
    outputs: Callable[[Context, Any], Iterable[Path]]
    result: type[Result]
    needs: tuple[Stage, ...] = ()
    version: int = 1
    scope: Literal["slide", "study"] = "slide"
    weight: float = 0.0
    effort: Callable[[Config], float] = _usual_effort
    section: str = ""
    settings: Callable[[Config], Any] = _no_settings
    files: Callable[[Config], Files | None] = _no_files
    precision: Callable[[Config], str | None] = _no_precision

    def key(self, needs: Any, config: Config, digest: str = "", settings: Any = None) -> str:
        """Content key of its result.

        Parameters
        ----------
        needs
            Keys of the stages it needs, or what stands for them (JSON-able).
        digest
            Of its `files`.
        settings
            Those of a part of the stage; None: all that decide its result.
        """
        settings = self.settings(config) if settings is None else settings
        return content_key(self.name, self.version, needs, settings, digest)

    def share(self, config: Config) -> float:
        """Share of the work, roughly."""
        return self.weight * self.effort(config)

    @property
    def late(self) -> bool:
        """Whether it waits for all slides."""
        return self.scope == "study" or any(stage.late for stage in self.needs)

    def ran(self, config: Config) -> dict[str, Any]:
        """Where its network runs, in how many threads and in which precision."""
        precision = self.precision(config)
        if precision is None:
            return {}
        compute = config.compute
        return {"device": compute.network_device, "threads": compute.threads, "precision": precision}


def run_stage(
    stage: Stage,
    context: Context,
    key: str,
    then: str | None = None,
    on_step: Callable[[float | None], None] | None = None,
) -> float | None:
    """Bring a stage up to date; nothing is done if the ledger has it under `key`.

    Parameters
    ----------
    then
        Name of the stage that begins at once.
    on_step
        Called with what part of the stage is done besides, when it begins (0) and after every task.

    Returns
    -------
    float or None
        Seconds it took; None if it was done.
    """
    ledger, study = context.ledger, context.study
    if ledger.is_done(stage.name, key):
        return None
    start = time.perf_counter()
    ledger.begin(stage.name)
    slide = context.slide or CLUSTERS
    scratch = study.paths.scratch(slide, stage.name, key, context.config.compute.block)
    # Those of other keys are of no use any more.
    remove(*(folder for folder in study.paths.scratches(slide, stage.name) if folder != scratch))
    workers = context.workers
    if on_step is not None:
        on_step(0.0)
        workers = workers.metered(on_step)
    context = replace(context, key=key, scratch=scratch)
    result = stage.run(replace(context, workers=workers))
    files = checksum(study.out, stage.outputs(context, result), context.workers)
    remove(scratch)
    seconds = time.perf_counter() - start
    ledger.finish(
        stage.name,
        key,
        result.model_dump(mode="json", exclude_unset=True),
        seconds,
        then,
        files,
        needs=[need.name for need in stage.needs],
        ran=stage.ran(context.config),
        version=stage.version,
    )
    return seconds
