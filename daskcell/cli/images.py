"""Commands on single images: convert, segment, channels, score."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from daskcell.cli.app import (
    Changes,
    ConfigFile,
    Diameter,
    Method,
    Model,
    Pattern,
    app,
    read_settings,
    word_or_number,
)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A picture, or a folder with one file per channel.")],
    target: Annotated[
        str, typer.Argument(help="OME-Zarr to write, such as slide.zarr or s3://bucket/slide.zarr.")
    ],
    config: ConfigFile = None,
    changes: Changes = None,
    ome_zarr: Annotated[
        str | None, typer.Option(help="Version to write: 0.5, or 0.4 for old viewers.")
    ] = None,
) -> None:
    """Write a picture as OME-Zarr with pyramid, channel names and pixel size."""
    from daskcell.compute import start_workers
    from daskcell.images import convert_slide, image_info
    from daskcell.images.reader_process import open_safely
    from daskcell.storage.staging import refuse_existing

    settings = read_settings(config, changes, {"input.ome_zarr": ome_zarr})
    found = _one_image(source, settings)
    refuse_existing(target)
    open_safely(found).close()  # what cannot be read is told before workers are started
    with start_workers(settings.compute) as workers:
        report = convert_slide(found, target, workers, settings.input)
    print(*(f"{note}\n" for note in report.get("notes", ())), sep="", end="", file=sys.stderr)
    print(f"{target}: {image_info(target)!r}")


@app.command()
def flat(
    pictures: Annotated[str, typer.Argument(help="Folder or pattern of pictures one camera took.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")] = Path("flat.tif"),
    dark: Annotated[float, typer.Option(min=0.0, help="What the camera gives without light.")] = 0.0,
) -> None:
    """Find how a microscope's light falls off, from many pictures; for preprocess.background.flat."""
    import tifffile

    from daskcell.preprocess import estimate_flat
    from daskcell.storage.atomic import replacing
    from daskcell.storage.staging import refuse_existing

    refuse_existing(out)
    field = estimate_flat(pictures, dark)
    with replacing(out) as part:
        tifffile.imwrite(part, field, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    print(f"{out}: use it with -s preprocess.background.flat={out} -s preprocess.background.dark={dark:g}")


@app.command()
def segment(
    source: Annotated[str, typer.Argument(help="A picture, or a folder with one file per channel.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="OME-Zarr to write; the cells are labels/cells.")],
    config: ConfigFile = None,
    changes: Changes = None,
    method: Method = None,
    model: Model = None,
    diameter: Diameter = None,
) -> None:
    """Find the cells of one picture."""
    import tempfile

    from daskcell.compute import start_workers
    from daskcell.images import convert_slide
    from daskcell.pipeline import fingerprints
    from daskcell.pipeline.worker_pool import comfortable_memory, refuse_small_workers
    from daskcell.preprocess import freeze_slide
    from daskcell.segmentation.engine import segment_slide
    from daskcell.storage.atomic import remove

    settings = read_settings(
        config,
        changes,
        {"segment.method": method, "segment.model": model, "segment.diameter": word_or_number(diameter)},
    )
    found = _one_image(source, settings)
    _refuse_existing(out)
    fingerprints(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch,
        start_workers(settings.compute, memory=comfortable_memory(settings)) as workers,
    ):
        refuse_small_workers(workers, settings)
        whole = Path(scratch) / out.name
        notes = convert_slide(found, whole, workers, settings.input).get("notes", ())
        print(*(f"{note}\n" for note in notes), sep="", end="", file=sys.stderr)
        plan = freeze_slide(whole, settings.preprocess, workers)
        block = settings.compute.block
        rest = Path(scratch) / "scratch"
        device = settings.compute.network_device
        report = segment_slide(whole, "cells", settings.segment, plan, workers, block, rest, device=device)
        remove(rest)
        whole.rename(out)
    print(f"{out}: {report['cells']:,} cells in labels/cells")


@app.command()
def channels(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders or patterns with *.")],
    pattern: Pattern = None,
    split: Annotated[
        Path | None, typer.Option(help="Write every channel as a picture of its own into this folder.")
    ] = None,
) -> None:
    """Show which files become which channel of which image."""
    from daskcell.config import InputSettings
    from daskcell.images import describe_sources, find_images
    from daskcell.storage.paths import printable

    notes: list[str] = []
    sources = find_images(inputs, InputSettings(pattern=pattern), notes.append)
    rows = [["image", "channel", "file"]]
    rows += [[row["image"], row["channel"], row["file"]] for row in describe_sources(sources)]
    from daskcell.text import table

    print(printable(table(rows)))
    print(*notes, sep="\n", end="\n" if notes else "")
    if split is not None:
        from daskcell.images.export_channels import channel_files, split_channels
        from daskcell.storage.staging import refuse_existing

        for source in sources:  # all are looked at before the first is written
            for path in channel_files(source, split):
                refuse_existing(path)
        for source in sources:
            for path in split_channels(source, split):
                print(path)


@app.command()
def score(
    found: Annotated[Path, typer.Argument(help="A study, a folder of label images, or one of pictures.")],
    truth: Annotated[
        Path,
        typer.Argument(
            help="Folder of true label images of the same names; for a study's clusters a CSV of cells with "
            "known types: slide; label, or y and x; type."
        ),
    ],
    segment: Annotated[
        bool, typer.Option("--segment", help="The first folder holds pictures: find their cells first.")
    ] = False,
    index: Annotated[
        Path | None, typer.Option(help="CSV with columns name and category; rows are pooled by category.")
    ] = None,
    config: ConfigFile = None,
    changes: Changes = None,
    method: Method = None,
    model: Model = None,
    diameter: Diameter = None,
) -> None:
    """Compare found cells with known ones: AP, precision, recall and F1 at IoU 0.5 and 0.75.

    Or a study's clusters with known types: ARI, NMI, and how the types fall into the clusters.
    """
    if truth.suffix.lower() == ".csv":
        from daskcell.evaluation.truth import score_study, tell
        from daskcell.study import Study

        study = Study(found)
        print(tell(score_study(study, truth)))
        if study.paths.report.exists():
            from daskcell.pipeline.status import remarks
            from daskcell.report import write_report

            write_report(study, warnings=remarks(study))
        return
    from daskcell.compute import threads_limited
    from daskcell.evaluation import score_folder

    settings = read_settings(
        config,
        changes,
        {"segment.method": method, "segment.model": model, "segment.diameter": word_or_number(diameter)},
    )
    if segment:
        with threads_limited(settings.compute.threads):
            table = score_folder(_method(settings), truth, images=found, index=index)
    else:
        inside = found / "images" if (found / "study.json").exists() else found
        table = score_folder(inside, truth, index=index)
    print(table.round(3).to_string())


def _method(settings: Any) -> Any:
    """From a picture ``(C, Y, X)`` to its cells, as a run with these settings finds them."""
    import numpy as np

    from daskcell.preprocess import apply_block, freeze
    from daskcell.segmentation import segment

    chosen = settings.segment.model_dump(exclude={"watershed", "options", "tissue_mask", "keep_flows"})
    if settings.segment.method != "cellpose":
        own = settings.segment.options
        if settings.segment.method == "watershed":
            own = settings.segment.watershed.model_dump()
        chosen = {name: chosen[name] for name in ("method", "channels", "min_size", "max_size_fraction")}
        chosen |= own
    else:
        chosen["device"] = settings.compute.network_device

    def find(picture: Any) -> Any:
        plan = freeze(picture, settings.preprocess, is_rgb=len(picture) == 3)
        return np.asarray(segment(apply_block(picture, plan), **chosen))

    return find


def _one_image(source: str, settings: Any) -> Any:
    from daskcell.images.image import find_image

    return find_image(source, settings.input, tell=partial(print, file=sys.stderr))


def _refuse_existing(target: Path) -> None:
    from daskcell.errors import InputError
    from daskcell.storage.atomic import refuse_impossible

    refuse_impossible(target)
    if target.exists():
        raise InputError(f"{target} exists already. Please remove it or choose another name.")
