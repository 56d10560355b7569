"""The command doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daskcell.cli.app import Changes, ConfigFile, app, read_settings


@app.command()
def doctor(
    out: Annotated[Path | None, typer.Argument(help="Folder of the study to come.")] = None,
    config: ConfigFile = None,
    changes: Changes = None,
    compute: Annotated[
        str | None, typer.Option(help="local, gpu, inline, slurm, pbs, lsf, sge, or a scheduler's address.")
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask/--no-ask", help="Ask for workers where a queue or scheduler is set.")
    ] = True,
) -> None:
    """Check this machine, and with jobs or a scheduler its workers too; one line each.

    Exit code 0: a run can start. 2: something would stop it.
    """
    from daskcell.pipeline.doctor import examine

    settings = read_settings(config, changes, {"compute.kind": compute})
    failed = False
    for finding in examine(settings, out, ask=ask):
        print(finding, flush=True)
        failed |= finding.verdict == "fail"
    raise typer.Exit(2 if failed else 0)
