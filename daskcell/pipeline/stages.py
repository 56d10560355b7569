"""The stages of a study, each as one value: all there is to say of a stage is said here.

    each slide: convert ── fit ─┬─ export
                                └─ segment ── describe ─┐         ┌─ assign ── paint
                                                        └ cluster ┘ (one for all slides)
                                                                  └─ report

A stage reads what the stages it needs have written, and writes files of its own. Content keys, progress,
status, and what a model was made with are all asked of the stages. The loop is in `daskcell.pipeline.stage`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from daskcell.config import METHODS, Config
from daskcell.pipeline.stage import Context, Files, Stage
from daskcell.storage.atomic import remove
from daskcell.study import CLUSTERS, Study
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
    Segmented,
)

LABELS = "cells"


def _dump(settings: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(leave_out))


# -- convert -------------------------------------------------------------------------------------------
def _convert(context: Context) -> Converted:
    from daskcell.images import convert_slide
    from daskcell.storage.staging import refuse_foreign

    image = context.image
    refuse_foreign(image)
    labels, kept = image / "labels", context.study.paths.scratch(context.slide, "labels", "0" * 16, 0)
    if context.ledger.suspended and labels.is_dir():
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
    from daskcell.preprocess import freeze_slide

    plan = freeze_slide(context.image, context.config.preprocess, context.workers)
    return Fitted(plan=plan.to_json())


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
    version=2,
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
        files += split_channels(context.image, study.paths.channels / context.slide, overwrite=True)
    if output.preprocessed:
        target = study.paths.preprocessed / f"{context.slide}.tif"
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
    "installed": ("options",),
}
"""Settings that only one method looks at, or those that other packages install."""


def _segment_settings(config: Config) -> dict[str, Any]:
    method = config.segment.method if config.segment.method in METHODS else "installed"
    others = {name for other, names in _OF_METHOD.items() if other != method for name in names}
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
    return context.study.paths.flows(context.slide) / key[:16]


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
        index=study.paths.index(context.slide),
    )
    return Segmented.model_validate(report)


def _network(config: Config) -> Files | None:
    """Weights of Cellpose's network; of a method of another package, its version."""
    method, name = config.segment.method, config.segment.model
    if method == "cellpose":
        from daskcell.models import network_fingerprint

        return Files(network_fingerprint(name), "network", name)
    if method in METHODS:
        return None
    from daskcell.segmentation.methods import method_version

    return Files(content_key("method", 1, method, method_version(method)), "version of the method", method)


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
        context.study.paths.index(context.slide),
        context.study.paths.flows(context.slide),
    ],
    Segmented,
    needs=(FIT,),
    version=3,
    weight=0.6,
    effort=lambda config: 0.1 if config.segment.method == "watershed" else 1.0,
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
    table, features = study.paths.table(slide), study.paths.features(slide)
    remove_zarr(features)
    remove(table)
    if ASSIGN.name not in context.ledger.suspended:
        remove(study.paths.clusters_table(slide))  # its rows belong to those of the table
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
        index=study.paths.index(slide),
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
    lambda context, result: [
        context.study.paths.table(context.slide),
        context.study.paths.features(context.slide),
    ],
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
    file, named = study.paths.clusters / names.FILE, b""
    if context.ledger.suspended.get(CLUSTER.name, {}).get("key") == context.key and file.exists():
        named = file.read_bytes()  # the damaged clusters come back as they were
    else:
        set_named_aside(study, context.say)
    if context.model is not None:
        model = context.model.model
    else:
        model = fit_features(
            [study.paths.features(name) for name in context.slides],
            config.cluster,
            context.workers,
            context.scratch,
            [study.paths.table(name) for name in context.slides],
        )
        model.origin = origin(config, study.record.get("weights", {}))
    model.save(study.paths.clusters)
    if named:
        write_atomic(file, named)
    return Clustered(k=model.k, counts=model.counts_.tolist(), given=context.model is not None)


def _cluster_files(context: Context, result: Clustered) -> list[Path]:
    from daskcell.clustering import names

    # Not the names, which people change.
    return [path for path in context.study.paths.clusters.iterdir() if path.name != names.FILE]


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
        study.paths.features(slide),
        study.paths.table(slide),
        study.paths.clusters,
        study.paths.clusters_table(slide),
    )
    return Assigned.model_validate(report)


ASSIGN = Stage(
    "assign",
    _assign,
    lambda context, result: [context.study.paths.clusters_table(context.slide)],
    Assigned,
    needs=(DESCRIBE, CLUSTER),
    version=2,
    weight=0.02,
)


# -- paint ---------------------------------------------------------------------------------------------
def _paint(context: Context) -> Painted:
    from daskcell.clustering.names import ClusterNames
    from daskcell.images.labels import list_labels
    from daskcell.render import write_cluster_labels, write_overlay

    study, slide, config = context.study, context.slide, context.config
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    assert clustered is not None
    names = ClusterNames.load(study.paths.clusters).titles(clustered.k)
    table, clusters = study.paths.table(slide), study.paths.clusters_table(slide)
    list_labels(context.image, LABELS)
    counts = write_cluster_labels(
        context.image, clusters, clustered.k, context.workers, config.compute.block, names=names
    )
    files = write_overlay(
        study.prepared(slide),
        table,
        clusters,
        study.paths.overlays,
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
    lambda context, result: [context.study.paths.report],
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
        `Record.clusters_key`; None: there are no clusters, so stages that need them have no key.
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
