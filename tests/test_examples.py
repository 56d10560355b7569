"""Examples in docstrings of public functions, and in the pages for users, give what they show.

An example may use ``dc``, ``np``, ``da``, the arrays of `namespace`, and files of the present folder:
``slide.tif``, ``images/`` with two of them, and where it names one, ``study``, a finished study.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]


def documented(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Dotted names and docstrings of the public functions, classes and methods of a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{name}.{node.name}", ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                yield from documented(node, f"{name}.{node.name}")


def examples() -> dict[str, tuple[str, str]]:
    """Module and docstring of everything public whose docstring has an example."""
    found = {}
    for file in sorted((ROOT / "daskcell").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if any(part.startswith("_") for part in parts):
            continue
        module = ".".join(parts)
        for name, text in documented(ast.parse(file.read_text(encoding="utf-8")), module):
            if ">>>" in text:
                found[name] = module, text
    return found


EXAMPLES = examples()


def namespace() -> dict[str, Any]:
    """What examples may use: an image ``(C, Y, X)`` of two square cells, their labels, features of cells."""
    import dask.array as da

    import daskcell as dc

    image = np.zeros((2, 64, 64), np.uint8)
    labels = np.zeros((64, 64), np.uint32)
    for number, (y, x) in enumerate([(8, 8), (36, 40)], 1):
        image[:, y : y + 16, x : x + 16] = 200
        labels[y : y + 16, x : x + 16] = number
    features = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    features[::2] += 6
    return {"dc": dc, "np": np, "da": da, "image": image, "labels": labels, "features": features}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder of an example."""
    import tifffile

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("slide.tif", "images/a.tif", "images/b.tif"):
        tifffile.imwrite(tmp_path / name, namespace()["image"], photometric="minisblack")
    return tmp_path


def run(name: str, text: str, names: dict[str, Any], file: str) -> None:
    test = doctest.DocTestParser().get_doctest(text, names, name, file, 0)
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append, clear_globs=False).failed
    assert not failed, "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_a_docstring_gives_what_it_shows(name, folder, request):
    module, text = EXAMPLES[name]
    names = vars(importlib.import_module(module)) | namespace()
    if "study" in text:
        names["study"] = _study(folder, request)
    run(name, text, names, module)


@pytest.mark.parametrize("page", PAGES)
def test_an_example_of_a_page_gives_what_it_shows(page, folder, request):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("```"))
    if ">>>" not in text:
        return
    names = namespace()
    if "study" in text:
        names["study"] = _study(folder, request)
    run(page, text, names, page)


def _study(folder: Path, request: pytest.FixtureRequest) -> Any:
    import daskcell as dc

    shutil.copytree(request.getfixturevalue("small_study"), folder / "study")
    return dc.open_study("study")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:daskcell|tests|docs|configs|deploy)/[\w./-]+)`", text))
    named |= {str(Path(page).parent / link) for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)}
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing


def test_a_wrong_example_fails():
    with pytest.raises(AssertionError, match=r"Expected:\n\s+3"):
        run("sum", ">>> 1 + 1\n3\n", {}, "")


@pytest.mark.slow
def test_every_public_name_that_is_called_is_among_those_looked_at():
    """The scan sees what `daskcell` exports: its examples cannot be forgotten."""
    import daskcell as dc

    seen = set()
    for file in (ROOT / "daskcell").rglob("*.py"):
        seen |= {name.rpartition(".")[2] for name, _ in documented(ast.parse(file.read_text()), "")}
    assert {name for name in dc.__all__ if not name.startswith("_")} <= seen
