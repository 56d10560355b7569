"""The application object, and what several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from daskcell.config import Config
    from daskcell.pipeline.progress import Progress

ORDER = [
    "demo",
    "run",
    "status",
    "report",
    "assign",
    "clusters",
    "neighbours",
    "export",
    "score",
    "channels",
    "convert",
    "flat",
    "segment",
    "weights",
    "train",
    "doctor",
]
"""Order of the commands in the help: the ones used first come first."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From microscope images to every cell segmented, described and clustered by type. "
    "Any command takes --debug to show where an error comes from.",
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings as YAML; see configs/.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="NAME=VALUE", help="Change one setting, such as segment.diameter=20."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors only.")]
Method = Annotated[str | None, typer.Option(help="cellpose, watershed, or the name of an installed method.")]
Model = Annotated[str | None, typer.Option(help="tiny, cpsam_v2, or a file of weights.")]
Diameter = Annotated[str | None, typer.Option(help="Cell diameter in pixels; auto: estimated.")]
Pattern = Annotated[
    str | None, typer.Option(help="Names of files with one channel each, as {field}_{channel}.tif.")
]
WorkerCount = Annotated[int | None, typer.Option(help="Worker processes; one per core unless given.")]
Compute = Annotated[
    str | None, typer.Option(help="auto, local, gpu, inline, slurm, pbs, lsf, sge, or a scheduler's address.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Work only on slides that were set aside.")]
Truth = Annotated[
    Path | None, typer.Option(help="CSV of cells with known types: slide; label, or y and x; type.")
]
Interval = Annotated[
    float, typer.Option(min=0.1, help="Seconds between progress lines where there is no terminal.")
]


NOTHING = object()
"""Stands for None given on the command line."""


def read_settings(
    config: Path | None,
    changes: list[str] | None,
    shortcuts: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
) -> Config:
    """Settings from a file, then ``--set``, then the options that name a setting (None: not given).

    `defaults` hold where the file says nothing.
    """
    import yaml

    from daskcell.config import load_config, parse_config
    from daskcell.errors import ConfigError

    values: dict[str, Any] = {}
    if config is not None:
        # What the file says, not what it leaves to the defaults.
        values = load_config(config).model_dump(mode="json", exclude_unset=True)
    for name, value in (defaults or {}).items():
        _put(values, name, value, replace=False)
    for change in changes or []:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {change!r} should be NAME=VALUE, such as segment.diameter=20.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {change!r}: the value is not YAML.") from None
        _put(values, name, value)
    for name, value in (shortcuts or {}).items():
        if value is not None:
            _put(values, name, None if value is NOTHING else value)
    return parse_config(values, str(config or "command line"))


def _put(values: dict[str, Any], name: str, value: Any, *, replace: bool = True) -> None:
    from daskcell.errors import ConfigError

    *sections, last = name.split(".")
    for section in sections:
        inside = values.setdefault(section, {})
        if inside is None:
            inside = values[section] = {}
        if not isinstance(inside, dict):
            raise ConfigError(f"{name} cannot be set: {section} holds {inside!r}.")
        values = inside
    if replace or last not in values:
        values[last] = value


def word_or_number(text: str | None) -> Any:
    """``auto`` stays a word, ``20`` is a number, ``none`` is `NOTHING`; None: the option was not given."""
    import yaml

    if text is None:
        return None
    return NOTHING if text.lower() in ("none", "null", "") else yaml.safe_load(text)


def this_command() -> str:
    """The command as it was typed, to be repeated."""
    import shlex
    import sys

    return shlex.join(["daskcell", *sys.argv[1:]])


def make_progress(quiet: bool, interval: float) -> Progress:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    import sys

    from daskcell.pipeline.progress import Bars, Lines, Progress

    if quiet:
        return Progress()
    return Bars() if sys.stderr.isatty() else Lines(interval)


def _version(value: bool) -> None:
    if value:
        from daskcell._version import __version__

        print(f"daskcell {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
