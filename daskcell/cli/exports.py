"""Commands that write a study's results for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daskcell.cli.app import app

export = typer.Typer(help="Write a study's results for other programs.", no_args_is_help=True)
app.add_typer(export, name="export")


@export.command()
def crops(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the images.")],
    format: Annotated[
        str, typer.Option(help="parquet: shards for training; png: a folder per cluster.")
    ] = "parquet",
    size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; default: the encoder's.")] = None,
    slide: Annotated[list[str] | None, typer.Option(help="Only this slide; may be repeated.")] = None,
) -> None:
    """Write every cell as a small image, with its slide, label, position and cluster."""
    from daskcell.compute import start_workers
    from daskcell.export import export_crops
    from daskcell.study import Study

    found = Study(study)
    with start_workers(found.config.compute) as workers:
        count = export_crops(
            found,
            out,
            format=format,
            size=size,
            slides=slide,
            workers=workers.claim(out, print),
        )
    print(f"{out}: {count:,} cells")
