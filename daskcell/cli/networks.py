"""Commands on networks: weights, train."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from daskcell.cli.app import (
    app,
)

weights = typer.Typer(no_args_is_help=True, help="List and fetch weights of networks.")
train = typer.Typer(no_args_is_help=True, help="Train the embedded kinds of networks on your own pictures.")
app.add_typer(weights, name="weights")
app.add_typer(train, name="train")


@weights.command("list")
def list_all() -> None:
    """Show which weights there are, and which are on this machine."""
    from daskcell.models import list_weights

    rows = [["name", "here", "what", "licence"]]
    rows += [[w.name, "yes" if w.present else "no", w.what, w.licence] for w in list_weights()]
    from daskcell.text import table

    print(table(rows))


@weights.command()
def fetch(name: Annotated[str, typer.Argument(help="cpsam_v2, resnet152, ...")]) -> None:
    """Bring weights onto this machine, checked by their hash."""
    from daskcell.models import fetch_weights

    print(fetch_weights(name))


@train.command()
def segmenter(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders with images/ and masks/ of the same names, or tables (.csv) with the columns "
            "image, mask, group; for stained blood without masks white_cell, the diameter in pixels."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for segmenter.npz and checkpoints.")
    ] = Path("segmenter"),
    minutes: Annotated[float, typer.Option(min=0.0, help="Training time.")] = 60.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, in place of a time.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Weights to start from: tiny, cpsam_v2, a file; else random ones.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 2e-3,
    side: Annotated[int, typer.Option(min=16, help="Side of a tile in pixels; 256 for cpsam_v2.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Tiles a step.")] = 8,
    generated: Annotated[int, typer.Option(min=0, help="Generated images of either kind.")] = 40,
    validate: Annotated[
        list[Path] | None,
        typer.Option(help="Folders or tables not to learn from: the best weights on them are kept."),
    ] = None,
    patience: Annotated[int, typer.Option(min=1, help="Validations without gain before it stops.")] = 10,
    prepared: Annotated[
        Path | None, typer.Option(help="Folder that keeps prepared images for other trainings.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    seed: int = 0,
) -> None:
    """Train a small segmentation network; the same command continues."""
    from rich.progress import Progress

    from daskcell.training import Recipe, train_segmenter

    recipe = Recipe(
        minutes=minutes,
        steps=steps,
        start=start,
        rate=rate,
        side=side,
        batch=batch,
        generated=generated,
        patience=patience,
        seed=seed,
    )
    with Progress(transient=True) as bar:
        task = bar.add_task("training", total=1.0)
        trained = train_segmenter(
            sources or [],
            out,
            recipe,
            validate=validate or [],
            prepared=prepared,
            device=device,
            report=partial(bar.console.print, markup=False, highlight=False),
            progress=lambda done: bar.update(task, completed=done),
        )
    print(f"{trained.path}: use it with --model {trained.path}")


@train.command()
def encoder(
    studies: Annotated[list[Path], typer.Argument(help="Studies whose cells to learn from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for encoder.npz and checkpoints.")] = Path(
        "encoder"
    ),
    minutes: Annotated[float, typer.Option(min=0.0, help="Training time.")] = 20.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, in place of a time.")] = None,
    cells: Annotated[
        int, typer.Option(min=16, help="Most cells to learn from; 12 KB of disk each.")
    ] = 100_000,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    seed: int = 0,
) -> None:
    """Train a small encoder on your own cells, without labels; the same command continues."""
    from rich.progress import Progress

    from daskcell.study import Study
    from daskcell.training import EncoderRecipe, train_encoder
    from daskcell.training.crops import study_crops

    found = [Study(path) for path in studies]
    with Progress(transient=True) as bar:

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False)

        crops, key = study_crops(found, out / "crops", cells, say)
        recipe = EncoderRecipe(minutes=minutes, steps=steps, seed=seed, cells=key)
        task = bar.add_task("training", total=1.0)
        trained = train_encoder(
            crops,
            out,
            recipe,
            device=device,
            report=say,
            progress=lambda done: bar.update(task, completed=done),
        )
    print(f"{trained.path}: use it with --encoder {trained.path}")
