"""Imports run one way: a room imports those before it, at the top of a module or within a function."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "daskcell"
ROOMS = [
    ["_version", "errors", "allocator", "text"],
    ["config", "geometry"],
    ["storage"],
    ["compute"],
    ["images"],
    ["preprocess"],
    ["models"],
    ["segmentation"],
    ["features"],
    ["clustering"],
    ["render"],
    ["study"],
    ["evaluation"],
    ["training"],
    ["export", "report"],
    ["pipeline"],
    ["cli"],
]
ORDER = {name: place for place, names in enumerate(ROOMS) for name in names}
SCIENCE = ["preprocess", "segmentation", "features", "clustering", "render"]


def imported(file: Path) -> Iterator[str]:
    """Modules of daskcell that a file imports anywhere, but for annotations."""
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "daskcell":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "daskcell")
        waiting += ast.iter_child_nodes(node)


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_place():
    found = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert set(ORDER) == found - {"__init__", "__main__"}


@pytest.mark.slow
def test_imports_run_one_way():
    against = {
        (str(file.relative_to(PACKAGE)), module)
        for file in PACKAGE.rglob("*.py")
        if file.parent != PACKAGE or file.stem in ORDER
        for module in imported(file)
        if room(module) != (own := file.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        and ORDER[room(module)] >= ORDER[own]
    }
    assert against == set()


def test_no_modules_of_a_room_import_each_other():
    """Imports at the top of modules make no ring."""
    graph = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(("daskcell", *file.relative_to(PACKAGE).with_suffix("").parts))
        top = ast.Module([n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ImportFrom)], [])
        graph[name.removesuffix(".__init__")] = {
            f"{n.module}.{alias.name}"
            for n in top.body
            for alias in n.names
            if n.module.startswith("daskcell")
        }
    edges = {
        name: {
            next((m for m in (target, target.rpartition(".")[0]) if m in graph), name) for target in targets
        }
        - {name}
        for name, targets in graph.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())


HEAVY = ("dask", "distributed", "torch", "daskcell.study", "daskcell.pipeline")
SCRIPT = f"""
import importlib, sys
for name in {SCIENCE}:
    importlib.import_module(f"daskcell.{{name}}")
    for heavy in sys.modules.keys() & {set(HEAVY)}:
        print(f"{{name}} imports {{heavy}}")
        del sys.modules[heavy]
"""


def test_block_functions_know_neither_dask_nor_studies():
    """Importing the rooms of science imports no Dask, no study, no network library."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
