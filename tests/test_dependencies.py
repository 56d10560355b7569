"""What is imported is declared, and what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = {
    "aiohttp", "openslide-bin", "bioio-czi", "bioio-lif", "bioio-nd2", "s3fs", "napari", "napari-ome-zarr",
}  # fmt: skip
"""Of extras: found by the package they extend, or started by people."""


COMPARED_WITH = {"dask-image"}
"""By the benchmarks."""
distributions_of = cache(packages_distributions)


def imported() -> dict[str, set[str]]:
    """Top-level modules of others, with the files that import them, wherever in a file that is."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "daskcell").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in (name.partition(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name != "daskcell":
                    found.setdefault(name, set()).add(path.name)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def declared() -> tuple[set[str], set[str]]:
    """Distributions that are always installed, and those of the extras for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = {canonical(line) for name, lines in extras.items() if name != "test" for line in lines}
    return {canonical(line) for line in project["dependencies"]}, optional


def distributions(module: str) -> set[str]:
    """Names under which a module is installed; its own where it is not installed here."""
    return {canonical(name) for name in distributions_of().get(module, [module])}


@pytest.mark.slow
def test_what_is_imported_is_declared():
    always, optional = declared()
    names = {"openslide": {"openslide-python"}}
    missing = {
        module: sorted(files)
        for module, files in imported().items()
        if not (names.get(module) or distributions(module)) & (always | optional)
    }
    assert not missing


@pytest.mark.slow
def test_what_is_declared_is_imported():
    always, optional = declared()
    used = {"openslide-python"} | {name for module in imported() for name in distributions(module)}
    assert not always - used - COMPARED_WITH
    assert not optional - used - PLUGINS
