"""Encoders of other packages, named under the entry point group ``daskcell.encoders``.

An entry point is a function without arguments that returns the encoder: a torch module, or a function from
crops ``(n, 3, size, size)`` float32 from 0 to 1 to vectors ``(n, d)``. The encoder may have the attributes
``size`` (side of the crops in pixels, else 224), ``mean`` and ``std`` (taken off the crops first); the entry
point may have ``version``, which says that vectors differ; else the version of its package does.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from daskcell.errors import WeightsError


@cache
def installed_encoders() -> dict[str, EntryPoint]:
    """Entry points by name."""
    return {point.name: point for point in entry_points(group="daskcell.encoders")}


def installed_file(name: str) -> Path:
    """The file of the module that makes the encoder."""
    point = installed_encoders()[name]
    try:
        spec = find_spec(point.module)
    except Exception as error:
        raise _unusable(point, error) from error
    if spec is None or spec.origin is None:
        raise _unusable(point, f"there is no module {point.module}")
    return Path(spec.origin)


def installed_fingerprint(name: str) -> str:
    """sha256 over name and version."""
    point = installed_encoders()[name]
    version = getattr(_loaded(name), "version", None) or (point.dist and point.dist.version)
    return hashlib.sha256(f"{name} {point.value} {version}".encode()).hexdigest()


def make_installed(name: str) -> Any:
    """The encoder of an installed name: a torch module or a function.

    Raises
    ------
    WeightsError
        The package cannot be loaded, or what it names is no encoder.
    """
    point = installed_encoders()[name]
    try:
        encoder = _loaded(name)()
    except WeightsError:
        raise
    except Exception as error:
        raise _unusable(point, error) from error
    if not callable(encoder):
        raise _unusable(point, f"it gives a {type(encoder).__name__}, and no network or function")
    return encoder


def _loaded(name: str) -> Any:
    point = installed_encoders()[name]
    try:
        return point.load()
    except Exception as error:
        raise _unusable(point, error) from error


def _unusable(point: EntryPoint, reason: object) -> WeightsError:
    return WeightsError(f"The encoder '{point.name}' ({point.value}) cannot be used: {reason}.")
