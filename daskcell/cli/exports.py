"""Commands that write a study's results for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daskcell.cli.app import app
from daskcell.export.registry import exporters

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


def _add(name: str, what: str) -> None:
    """A command for a format that has no options of its own."""

    def write(
        study: Annotated[Path, typer.Argument(help="Folder of a study.")],
        out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the files.")],
        slide: Annotated[list[str] | None, typer.Option(help="Only this slide; may be given again.")] = None,
    ) -> None:
        from daskcell.export import export_study

        def say(file: str, cells: int) -> None:
            print(f"{file}: {cells:,} cells")

        say(str(out), export_study(study, out, name, slides=slide, progress=say))

    export.command(name, help=f"Write {what}")(write)


for _name, _what in exporters().items():
    _add(_name, _what)
