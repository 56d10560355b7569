"""The stages of a study, each as one value: all there is to say of a stage is said here.

    each slide: convert ── fit ─┬─ export
                                └─ segment ── describe ─┐         ┌─ assign ── paint
                                                        └ cluster ┘ (one for all slides)
                                                                  └─ report

A stage reads what the stages it needs have written, and writes files of its own. `do` is the loop's body for
all of them: done under this content key? else begin, run, take checksums, enter. Which keys there are is
asked of the stages (`slide_keys`); so are progress, status and what a model was made with.
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
from daskcell.study.checksums import sums
from daskcell.study.keys import content_key, identity
from daskcell.study.results import (
    Assigned,
    Clustered,
    Converted,
    Described,
    Exported,
    Fitted,
    Painted,
    Reported,
    Result,
    Segmented,
)

if TYPE_CHECKING:
    from daskcell.images.sources import Source
    from daskcell.pipeline.reuse_model import Given
    from daskcell.preprocess import Plan

LABELS = "cells"


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
    """Folder for what the stage keeps between its tasks, so that a killed run goes on from there. It belongs
    to the slide, the stage and the key, is not made yet, and is removed once the stage is done."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Content keys of all stages of the slide that can be done now."""
    weights: Mapping[str, str] = field(default_factory=dict)
    slide: str = ""
    source: Source | None = None
    """The slide's input."""
    slides: tuple[str, ...] = ()
    """Of a stage of the whole study: slides with cells."""
    model: Given | None = None
    """A model in the place of a fit."""
    say: Callable[[str], None] = lambda text: None

    @property
    def image(self) -> Path:
        return self.study.image(self.slide)

    @property
    def plan(self) -> Plan:
        """Of the slide's preprocessing."""
        return self.study.prepared(self.slide).plan


def _no_settings(config: Config) -> Any:
    return None


def _no_files(config: Config) -> Files | None:
    return None


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
        Share of the work, roughly; only the estimate of the time left hangs on it.
    section
        Of the configuration, where its settings are.
    settings
        The settings that decide its result (JSON-able), and no others.
    files
        The files that decide its result.
    precision
        What its network computes in, None for a stage without one. Where a network runs decides the last
        bits of its outputs, so that is recorded.
    """

    name: str
    run: Callable[[Context], Result]
    outputs: Callable[[Context, Any], Iterable[Path]]
    result: type[Result]
    needs: tuple[Stage, ...] = ()
    version: int = 1
    scope: Literal["slide", "study"] = "slide"
    weight: float = 0.0
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

    @property
    def late(self) -> bool:
        """Whether it waits for all slides."""
        return self.scope == "study" or any(stage.late for stage in self.needs)

    def ran(self, config: Config) -> dict[str, Any]:
        """Where its network runs, and how."""
        precision = self.precision(config)
        if precision is None:
            return {}
        compute = config.compute
        return {"device": compute.network_device, "threads": compute.threads, "precision": precision}


def _dump(settings: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(leave_out))


# -- convert -------------------------------------------------------------------------------------------
def _convert(context: Context) -> Converted:
    from daskcell.images import convert_slide
    from daskcell.storage.staging import refuse_foreign

    image = context.image
    refuse_foreign(image)
    labels, kept = image / "labels", context.study.scratch(context.slide, "labels", "0" * 16, 0)
    if context.ledger.held and labels.is_dir():
        # The image was damaged, not they: they stay if it becomes the same again.
        remove(kept)
        kept.parent.mkdir(parents=True, exist_ok=True)
        labels.rename(kept)
    assert context.source is not None
    report = convert_slide(context.source, image, context.workers, context.config.input, overwrite=True)
    if kept.is_dir():
        kept.rename(labels)
    return Converted.model_validate(report)


def _converted_files(context: Context, result: Converted) -> list[Path]:
    # Not the labels below the image, which later stages write (and a repair keeps).
    image = context.image
    return [path for path in image.iterdir() if path.name != "labels"] if image.is_dir() else []


CONVERT = Stage(
    "convert",
    _convert,
    _converted_files,
    Converted,
    version=3,
    weight=0.04,
    section="input",
    settings=lambda config: _dump(config.input, {"scenes"}),  # which of a file are taken
)


# -- fit -----------------------------------------------------------------------------------------------
def _fit(context: Context) -> Fitted:
    from daskcell.preprocess import fit_slide

    plan = fit_slide(context.image, context.config.preprocess, context.workers)
    return Fitted(plan=plan.to_json(), notes=tuple(f"{context.slide}: {note}." for note in plan.notes))


def _reference_images(config: Config) -> Files | None:
    from daskcell.preprocess.validate import check_names

    digest = check_names(config.preprocess)
    return None if digest is None else Files(digest, "images that preprocessing refers to")


FIT = Stage(
    "fit",
    _fit,
    lambda context, result: [],
    Fitted,
    needs=(CONVERT,),
    version=3,
    weight=0.02,
    section="preprocess",
    settings=lambda config: _dump(config.preprocess),
    files=_reference_images,
)


# -- export --------------------------------------------------------------------------------------------
def _export(context: Context) -> Exported:
    from daskcell.images.export_channels import split_channels
    from daskcell.preprocess import write_prepared_tiff

    study, output, files = context.study, context.config.output, []
    if output.channels:
        # Under the slide's own folder: two slides may have channels of one name.
        files += split_channels(context.image, study.channels / context.slide, overwrite=True)
    if output.preprocessed:
        target = study.preprocessed / f"{context.slide}.tif"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_prepared_tiff(study.prepared(context.slide), target)
        files.append(target)
    return Exported(files=_inside(study, files))


def _inside(study: Study, files: Iterable[Path]) -> tuple[str, ...]:
    return tuple(str(file.relative_to(study.out)) for file in files)


def _listed(context: Context, result: Exported | Painted) -> list[Path]:
    return [context.study.out / name for name in result.files]


EXPORT = Stage(
    "export",
    _export,
    _listed,
    Exported,
    needs=(FIT,),
    weight=0.02,
    section="output",
    settings=lambda config: {
        "channels": config.output.channels,
        "preprocessed": config.output.preprocessed,
    },
)


# -- segment -------------------------------------------------------------------------------------------
_ONLY_MASKS = ("cellprob_threshold", "flow_threshold", "niter", "min_size", "max_size_fraction")
"""Settings that come into play once the network's outputs and the image parameters are there."""
_OF_METHOD = {
    "cellpose": (
        "model",
        "precision",
        "normalize",
        "diameter",
        "cellprob_threshold",
        "flow_threshold",
        "niter",
        "batch_size",
        "tissue_mask",
    ),
    "watershed": ("watershed",),
}
"""Settings that only one method looks at."""


def _segment_settings(config: Config) -> dict[str, Any]:
    others = {
        name for method, names in _OF_METHOD.items() if method != config.segment.method for name in names
    }
    return _dump(config.segment, {"keep_flows", *others})


def flows_folder(context: Context) -> Path:
    """Folder of what is kept so that masks can be made anew without the network.

    Its key is that of the segmentation without the settings that only matter to masks, and with the side of
    the blocks, which are what is kept is cut into.
    """
    config, needs = context.config, [context.keys[FIT.name]]
    settings = {k: v for k, v in SEGMENT.settings(config).items() if k not in _ONLY_MASKS}
    settings["block"] = config.compute.block
    key = SEGMENT.key(needs, config, context.weights.get(SEGMENT.name, ""), settings)
    return context.study.flows(context.slide) / key[:16]


def _segment(context: Context) -> Segmented:
    from daskcell.segmentation.engine import segment_slide

    study, config, flows = context.study, context.config, flows_folder(context)
    if flows.parent.is_dir():
        # Of another image or under other settings: they are large, and seldom come back.
        remove(*(folder for folder in flows.parent.iterdir() if folder != flows))
    report = segment_slide(
        context.image,
        LABELS,
        config.segment,
        context.plan,
        context.workers,
        config.compute.block,
        context.scratch,
        flows=flows if config.segment.keep_flows else None,
        device=config.compute.network_device,
        index=study.index(context.slide),
    )
    return Segmented.model_validate(report)


def _network(config: Config) -> Files | None:
    from daskcell.models import network_fingerprint

    if config.segment.method != "cellpose":
        return None
    name = config.segment.model
    return Files(network_fingerprint(name), "network", name)


def _network_precision(config: Config) -> str | None:
    from daskcell.models import find_network

    settings = config.segment
    if settings.method != "cellpose":
        return None
    own = "float32" if find_network(settings.model).suffix == ".npz" else "bfloat16"
    return settings.precision or own


SEGMENT = Stage(
    "segment",
    _segment,
    lambda context, result: [
        context.image / "labels" / LABELS,
        context.study.index(context.slide),
        context.study.flows(context.slide),
    ],
    Segmented,
    needs=(FIT,),
    version=3,
    weight=0.6,
    section="segment",
    settings=_segment_settings,
    files=_network,
    precision=_network_precision,
)


# -- describe ------------------------------------------------------------------------------------------
def _describe(context: Context) -> Described:
    from daskcell.features.engine import describe_slide
    from daskcell.storage.staging import remove_zarr

    study, slide, config = context.study, context.slide, context.config
    table, features = study.table(slide), study.features(slide)
    remove_zarr(features)
    remove(table)
    if ASSIGN.name not in context.ledger.held:
        remove(study.clusters_table(slide))  # its rows belong to those of the table
    for path in (table, features):
        path.parent.mkdir(parents=True, exist_ok=True)
    report = describe_slide(
        context.image,
        table,
        features,
        config.features,
        context.plan,
        context.workers,
        config.compute.block,
        context.scratch,
        device=config.compute.network_device,
        index=study.index(slide),
    )
    return Described.model_validate(report)


def _encoder(config: Config) -> Files | None:
    from daskcell.features.encoders import encoder_spec

    features = config.features
    spec = encoder_spec(features.encoder, layer=features.layer, size=features.size, pooling=features.pooling)
    return Files(spec.fingerprint, "encoder", features.encoder)


DESCRIBE = Stage(
    "describe",
    _describe,
    lambda context, result: [context.study.table(context.slide), context.study.features(context.slide)],
    Described,
    needs=(SEGMENT,),
    version=2,
    weight=0.2,
    section="features",
    settings=lambda config: _dump(config.features),
    files=_encoder,
    precision=lambda config: config.features.precision,
)


# -- cluster -------------------------------------------------------------------------------------------
def _cluster(context: Context) -> Clustered:
    from daskcell.clustering import fit_features, names
    from daskcell.pipeline.reuse_model import origin, set_named_aside
    from daskcell.storage.atomic import write_atomic

    study, config = context.study, context.config
    file, named = study.clusters / names.FILE, b""
    if context.ledger.held.get(CLUSTER.name, {}).get("key") == context.key and file.exists():
        named = file.read_bytes()  # the damaged clusters come back as they were
    else:
        set_named_aside(study, context.say)
    if context.model is not None:
        model = context.model.model
    else:
        model = fit_features(
            [study.features(name) for name in context.slides],
            config.cluster,
            context.workers,
            context.scratch,
            [study.table(name) for name in context.slides],
        )
        model.origin = origin(config, study.record.get("weights", {}))
    model.save(study.clusters)
    if named:
        write_atomic(file, named)
    return Clustered(k=model.k, counts=model.counts_.tolist(), given=context.model is not None)


def _cluster_files(context: Context, result: Clustered) -> list[Path]:
    from daskcell.clustering import names

    # Not the names, which people change.
    return [path for path in context.study.clusters.iterdir() if path.name != names.FILE]


CLUSTER = Stage(
    "cluster",
    _cluster,
    _cluster_files,
    Clustered,
    needs=(DESCRIBE,),
    version=2,
    scope="study",
    weight=0.02,
    section="cluster",
    settings=lambda config: _dump(config.cluster),
)
"""Its `needs` in the key are the keys of the described slides, in any order."""


# -- assign --------------------------------------------------------------------------------------------
def _assign(context: Context) -> Assigned:
    from daskcell.clustering import predict_slide

    study, slide = context.study, context.slide
    report = predict_slide(
        study.features(slide), study.table(slide), study.clusters, study.clusters_table(slide)
    )
    return Assigned.model_validate(report)


ASSIGN = Stage(
    "assign",
    _assign,
    lambda context, result: [context.study.clusters_table(context.slide)],
    Assigned,
    needs=(DESCRIBE, CLUSTER),
    version=2,
    weight=0.02,
)


# -- paint ---------------------------------------------------------------------------------------------
def _paint(context: Context) -> Painted:
    from daskcell.clustering.names import Naming
    from daskcell.images.labels import list_labels
    from daskcell.render import write_cluster_labels, write_overlay

    study, slide, config = context.study, context.slide, context.config
    clustered = study.ledger(CLUSTERS).read(Clustered)
    assert clustered is not None
    names = Naming.load(study.clusters).titles(clustered.k)
    table, clusters = study.table(slide), study.clusters_table(slide)
    list_labels(context.image, LABELS)
    counts = write_cluster_labels(
        context.image, clusters, clustered.k, context.workers, config.compute.block, names=names
    )
    files = write_overlay(
        study.prepared(slide),
        table,
        clusters,
        study.overlays,
        slide,
        clustered.k,
        context.workers,
        formats=config.output.overlays,
        side=config.output.overlay_side,
        names=names,
    )
    return Painted(counts=tuple(counts), files=_inside(study, files))


def _painted_files(context: Context, result: Painted) -> list[Path]:
    labels = context.image / "labels"
    lists = [labels / name for name in ("zarr.json", ".zattrs", ".zgroup")]  # of OME-Zarr 0.5 or 0.4
    return [labels / "clusters", *lists, *_listed(context, result)]


PAINT = Stage(
    "paint",
    _paint,
    _painted_files,
    Painted,
    needs=(ASSIGN,),
    weight=0.1,
    section="output",
    settings=lambda config: {
        "overlays": config.output.overlays,
        "overlay_side": config.output.overlay_side,
    },
)


# -- report --------------------------------------------------------------------------------------------
def _report(context: Context) -> Reported:
    from daskcell.pipeline.status import remarks
    from daskcell.report import write_report

    write_report(context.study, warnings=remarks(context.study))
    return Reported()


REPORT = Stage(
    "report",
    _report,
    lambda context, result: [context.study.report],
    Reported,
    needs=(CLUSTER, PAINT),
    version=2,
    scope="study",
)
"""Its `needs` in the key are all that the page says (`daskcell.report.page_inputs`)."""


STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (CONVERT, FIT, EXPORT, SEGMENT, DESCRIBE, CLUSTER, ASSIGN, PAINT, REPORT)
}
"""All stages, each after those it needs."""
SLIDE_STAGES = tuple(name for name, stage in STAGES.items() if stage.scope == "slide")
EARLY = tuple(name for name in SLIDE_STAGES if not STAGES[name].late)
"""Stages of a slide that need no other slide."""
LATE = tuple(name for name in SLIDE_STAGES if STAGES[name].late)
"""Stages of a slide that wait for the clusters of all."""


def slide_keys(
    config: Config,
    files: Iterable[Mapping[str, Any]],
    weights: Mapping[str, str],
    clusters: str | None = None,
) -> dict[str, str]:
    """Content keys of the stages of a slide.

    Parameters
    ----------
    files
        Identity of the input, as `daskcell.study.keys.identify` gives it.
    weights
        Digests of the files of stages, as `fingerprints` gives them.
    clusters
        Key of the clusters (`Study.grouping`); None: there are none, so stages that need them have no key.
    """
    known = {} if clusters is None else {CLUSTER.name: clusters}
    keys: dict[str, str] = {}
    for name in SLIDE_STAGES:
        stage = STAGES[name]
        before = keys | known
        if all(need.name in before for need in stage.needs):
            needs: list[Any] = [before[need.name] for need in stage.needs] or [identity(files)]
            keys[name] = stage.key(needs, config, weights.get(name, ""))
    return keys


def fingerprints(config: Config) -> dict[str, str]:
    """Digests of the files that decide results, by stage; raises `WeightsError` where they are not here."""
    found = {name: stage.files(config) for name, stage in STAGES.items()}
    return {name: files.digest for name, files in found.items() if files is not None}


def do(
    stage: Stage,
    context: Context,
    key: str,
    then: str | None = None,
    on_step: Callable[[float | None], None] | None = None,
) -> float | None:
    """Bring a stage up to date: nothing is done if it is done under `key`.

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
    scratch = study.scratch(slide, stage.name, key, context.config.compute.block)
    remove(*(folder for folder in study.scratches(slide, stage.name) if folder != scratch))  # of other keys
    team = context.workers
    if on_step is not None:
        on_step(0.0)
        team = team.metered(on_step)
    context = replace(context, key=key, scratch=scratch)
    result = stage.run(replace(context, workers=team))
    files = sums(study.out, stage.outputs(context, result), context.workers)
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
