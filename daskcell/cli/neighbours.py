"""The command neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daskcell.cli.app import app


@app.command()
def neighbours(
    study: Annotated[Path, typer.Argument(help="Folder of a study with clusters.")],
    radius: Annotated[
        float | None, typer.Option(help="Cells are neighbours whose centres are this many pixels apart.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", help="Cells are neighbours of their k nearest, by their centres.")
    ] = None,
    gap: Annotated[
        float | None, typer.Option(help="Cells are neighbours that touch (0) or are this many pixels apart.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="CSV file to write, with every slide and condition.")
    ] = None,
    slide: Annotated[list[str] | None, typer.Option(help="Only this slide; may be given again.")] = None,
) -> None:
    """Count which clusters live beside which, and compare with chance (random labels, in closed form).

    Prints standard deviations above what chance gives, for all slides together. Without --radius, -k or
    --gap, cells are neighbours that touch or have one pixel between them.
    """
    from daskcell.errors import InputError
    from daskcell.pipeline.neighbours import ALL, study_neighbours
    from daskcell.storage.atomic import atomic_path

    if out is not None and out.exists():
        raise InputError(f"{out} exists already. Please remove it or choose another name.")
    if radius is None and k is None and gap is None:
        gap = 1.0
    found = study_neighbours(study, radius, k=k, gap=gap, slides=slide)
    if out is not None:
        with atomic_path(out) as temporary:
            found.to_csv(temporary, index=False)
    total = found[(found["slide"] == ALL) & (found["condition"] == ALL)]
    print(f"{int(total.loc[total['cluster'] <= total['other'], 'count'].sum()):,} pairs of neighbours")
    table = total.pivot_table(index="cluster", columns="other", values="enrichment", dropna=False)
    print(table.to_string(float_format="{:+.1f}".format, na_rep="-"))
    if out is not None:
        print(out)
