"""Commands on whole studies: run, demo, status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daskcell.cli.app import (
    Changes,
    Compute,
    ConfigFile,
    Device,
    Diameter,
    Interval,
    Method,
    Model,
    Pattern,
    Quiet,
    RetryFailed,
    Truth,
    WorkerCount,
    app,
    make_progress,
    read_settings,
    this_command,
    word_or_number,
)

if TYPE_CHECKING:
    from daskcell.pipeline.progress import Progress


@app.command()
def run(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, patterns, OME-Zarr, or a CSV.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; continued if it is there.")],
    config: ConfigFile = None,
    changes: Changes = None,
    method: Method = None,
    model: Model = None,
    diameter: Diameter = None,
    encoder: Annotated[str | None, typer.Option(help="tiny, a torchvision name, or a file.")] = None,
    k: Annotated[str | None, typer.Option("-k", help="Number of clusters, or auto.")] = None,
    pattern: Pattern = None,
    workers: WorkerCount = None,
    compute: Compute = None,
    device: Device = None,
    retry_failed: RetryFailed = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all that is done, and make again what is damaged.")
    ] = False,
    truth: Truth = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be done and why, and do nothing.")
    ] = False,
    quiet: Quiet = False,
    interval: Interval = 30.0,
) -> None:
    """Segment, describe and cluster every cell of every image; the same command continues.

    Exit code 0: all done. 2: refused before starting. 3: done, but some slides were set aside.
    """
    settings = read_settings(
        config,
        changes,
        {
            "segment.method": method,
            "segment.model": model,
            "segment.diameter": word_or_number(diameter),
            "features.encoder": encoder,
            "cluster.k": word_or_number(k),
            "input.pattern": pattern,
            "compute.workers": workers,
            "compute.kind": compute,
            "compute.device": device,
        },
    )
    from daskcell.pipeline import api

    if plan:
        print(api.plan(inputs, out, settings))
        return
    with show_progress(quiet, interval) as progress:
        study = api.run(
            inputs,
            out,
            settings,
            progress=progress,
            retry_failed=retry_failed,
            verify=verify,
            truth=truth,
        )
    if not quiet:
        print(ending(study))
    raise typer.Exit(3 if study.failures else 0)


@contextlib.contextmanager
def show_progress(quiet: bool, interval: float) -> Iterator[Progress]:
    """Progress on stderr; after a signal, a sentence says how to continue."""
    try:
        with make_progress(quiet, interval) as progress:
            yield progress
    except (KeyboardInterrupt, SystemExit) as stopped:
        print("daskcell: stopped; the same command continues.", file=sys.stderr)
        if isinstance(stopped, SystemExit):
            raise
        raise typer.Exit(130) from None


def ending(study: Any) -> str:
    """The result of a run in a few lines."""
    from daskcell.pipeline.status import counts, open_first

    total = counts(study)
    clusters = f", {total['clusters']} clusters" if total["clusters"] else ""
    lines = [f"{total['slides']} slides, {total['cells']:,} cells{clusters}: {study.out}"]
    if study.scores:
        from daskcell.evaluation.truth import tell

        lines.append(tell(study.scores))
    lines += open_first(study)
    for failure in study.failures[:10]:
        name = failure["slide"] or "all slides"
        lines.append(f"set aside: {name} ({failure['stage']}): {failure['error']}")
    if len(study.failures) > 10:
        lines.append(f"and {len(study.failures) - 10} more, see {study.out / 'failures.jsonl'}")
    if study.failures:
        lines.append(f"once that is mended, this continues: {this_command()}")
    return "\n".join(lines)


@app.command()
def status(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    every: Annotated[bool, typer.Option("--all", help="All slides, not only the first 50.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it and name files that are damaged.")
    ] = False,
) -> None:
    """Show what is done, running and failed, for each slide and stage.

    Exit code 3: some files are damaged (--verify).
    """
    import json

    from daskcell.pipeline.status import damages, report, table
    from daskcell.study import Study

    found = report(Study(study))
    if verify:
        found["damaged"] = sorted(damages(study))
    print(json.dumps(found, indent=1) if as_json else table(found, None if every else 50))
    raise typer.Exit(3 if found.get("damaged") else 0)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file; the study's own if not.")
    ] = None,
) -> None:
    """Show what was found on one page: clusters and their cells, slides, known types, seams.

    A run writes it by itself (output.report); this is for studies under way, and for a copy elsewhere.
    """
    from daskcell.pipeline.status import remarks
    from daskcell.report import write_report
    from daskcell.study import Study

    found = Study(study)
    print(write_report(found, out, remarks(found)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for images and results.")] = Path("demo"),
    fields: Annotated[int, typer.Option(min=1, help="Data sets to draw.")] = 4,
    size: Annotated[int, typer.Option(min=256, help="Side of each in pixels.")] = 1024,
    workers: WorkerCount = None,
    quiet: Quiet = False,
    interval: Interval = 30.0,
) -> None:
    """Draw data sets of stained cells with known truth, run everything on them, and compare."""
    from daskcell.pipeline import demo as room

    with make_progress(quiet, interval) as progress:
        result = room.demo(out, fields=fields, size=size, workers=workers, progress=progress)
    print(result.text)
    if result.study.failures:
        print(f"once that is mended, this continues: {this_command()}")
    raise typer.Exit(3 if result.study.failures else 0)
