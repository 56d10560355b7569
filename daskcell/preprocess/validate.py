"""What preprocessing settings name - colours, files - checked before any work."""

from __future__ import annotations

import hashlib
from pathlib import Path

from daskcell.config import PreprocessSettings
from daskcell.errors import ConfigError, InputError
from daskcell.preprocess.colors import color_rgb
from daskcell.storage.atomic import digest


def check_names(settings: PreprocessSettings) -> str | None:
    """A digest of all files the settings name, None if they name none.

    Raises
    ------
    ConfigError
        For a file that cannot be read, or a colour nobody knows.
    """
    if settings.reconstruct is not None and settings.reconstruct.colors != "auto":
        for color in settings.reconstruct.colors:
            try:
                color_rgb(color)
            except InputError as error:
                raise ConfigError(f"preprocess.reconstruct.colors: {error}") from None
    found = []
    for where, path in named_files(settings):
        try:
            found.append(digest(Path(path).expanduser()))
        except OSError as error:
            raise ConfigError(f"preprocess.{where} {path} cannot be read: {error.strerror}.") from None
    return hashlib.sha256(" ".join(found).encode()).hexdigest() if found else None


def named_files(settings: PreprocessSettings) -> list[tuple[str, str]]:
    """Settings and the images they name."""
    files = []
    if settings.background is not None and settings.background.flat is not None:
        files.append(("background.flat", settings.background.flat))
    if settings.stains is not None and settings.stains.reference is not None:
        files.append(("stains.reference", settings.stains.reference))
    if settings.histogram is not None and settings.histogram.reference:
        names = settings.histogram.reference
        files += [("histogram.reference", name) for name in ([names] if isinstance(names, str) else names)]
    return files
