"""Commands on clusters: assign, clusters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daskcell.cli.app import (
    Changes,
    Compute,
    ConfigFile,
    Device,
    Interval,
    Pattern,
    Quiet,
    RetryFailed,
    Truth,
    WorkerCount,
    app,
    read_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from daskcell.clustering.names import ClusterNames

clusters = typer.Typer(no_args_is_help=True, help="Show, name and merge the clusters of a study or model.")
app.add_typer(clusters, name="clusters")

Where = Annotated[Path, typer.Argument(help="A study, or the folder of a saved model.")]


@app.command()
def assign(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, patterns with *, or OME-Zarr images.")],
    model: Annotated[
        Path, typer.Option("--model", help="A study with clusters, or the folder of a saved model.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; continued if it is there.")],
    config: ConfigFile = None,
    changes: Changes = None,
    truth: Truth = None,
    pattern: Pattern = None,
    workers: WorkerCount = None,
    compute: Compute = None,
    device: Device = None,
    retry_failed: RetryFailed = False,
    quiet: Quiet = False,
    interval: Interval = 30.0,
) -> None:
    """Assign the cells of new images to the clusters of an earlier study; the same command continues.

    Cells are found and described like those of the model. Exit codes as for run.
    """
    import sys
    import warnings

    from daskcell import pipeline
    from daskcell.cli.studies import ending, show_progress
    from daskcell.errors import DriftWarning

    settings = read_settings(
        config,
        changes,
        {
            "input.pattern": pattern,
            "compute.workers": workers,
            "compute.kind": compute,
            "compute.device": device,
        },
    )
    with warnings.catch_warnings(record=True) as caught, show_progress(quiet, interval) as progress:
        warnings.simplefilter("always", DriftWarning)
        study = pipeline.assign(
            inputs,
            out,
            model=model,
            config=settings,
            progress=progress,
            retry_failed=retry_failed,
            truth=truth,
        )
    for warning in caught:
        if issubclass(warning.category, DriftWarning):
            print(f"daskcell: {warning.message}", file=sys.stderr)
    if not quiet:
        print(ending(study))
    raise typer.Exit(3 if study.failures else 0)


@clusters.command()
def show(where: Where) -> None:
    """List the clusters: names, numbers of cells, and the fitted clusters merged into each."""
    from daskcell.pipeline.edit_clusters import cluster_rows

    rows = [["cluster", "name", "cells", "share", "merged from"]]
    for row in cluster_rows(where):
        parts = " + ".join(map(str, row["parts"])) if len(row["parts"]) > 1 else ""
        rows.append(
            [str(row["cluster"]), row["name"], f"{row['cells']:,}", f"{100 * row['share']:.1f} %", parts]
        )
    from daskcell.text import table

    print(table(rows))


@clusters.command()
def rename(
    where: Where,
    cluster: Annotated[str, typer.Argument(help="Its number or present name.")],
    name: Annotated[str, typer.Argument(help="New name; '' removes the name.")],
    quiet: Quiet = False,
) -> None:
    """Name a cluster, in the model, tables, labels and images."""
    _change(where, lambda naming, k: naming.rename(cluster, name, k), quiet)


@clusters.command()
def merge(
    where: Where,
    clusters: Annotated[list[str], typer.Argument(help="Numbers or names of the clusters to merge.")],
    name: Annotated[str | None, typer.Option(help="Name of the merged cluster.")] = None,
    quiet: Quiet = False,
) -> None:
    """Merge clusters into one, in the model, tables, labels and images; undone by split."""
    _change(where, lambda naming, k: naming.merge(clusters, k, name), quiet)


@clusters.command()
def split(
    where: Where,
    cluster: Annotated[
        str, typer.Argument(help="A merged cluster, or the number of one that was merged into it.")
    ],
    quiet: Quiet = False,
) -> None:
    """Undo a merge: all of it, or for one of its clusters."""
    _change(where, lambda naming, k: naming.split(cluster, k), quiet)


def _change(where: Path, change: Callable[[ClusterNames, int], ClusterNames], quiet: bool) -> None:
    from daskcell.cli.studies import show_progress
    from daskcell.pipeline.edit_clusters import edit_clusters

    with show_progress(quiet, 30.0) as progress:
        edit_clusters(where, change, progress)
    if not quiet:
        show(where)
