"""Names in the code are the field's: `docs/glossary.md` says which word stands for which thing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "told": "read_progress, remote_errors",
    "is_of_the_way": "is_transport_error",
    "sheets": "shared_buffers",
    "sandbox": "reader_process",
    "lend": "acquire",
    "freeze": "fit",
    "freezing": "fit",
    "mates": "enclosing",
    "further": "extra_tiles",
    "Look": "segment_box",
    "held": "grown, suspended",
    "Permit": "WorkersRef",
    "former": "orphans",
    "overtime": "timeouts",
    "Postponed": "Reschedule",
    "keeper": "autoscaler",
    "Care": "WorkerSetup",
    "company": "merged_with",
    "grouping": "clusters_key",
    "regroup": "edit_clusters",
    "began": "in_progress",
    "picture": "image",
    "pictures": "images",
    "crumbs": "small cells",
}
"""Names of an older dialect, and what is said now; without underscores at their ends."""
PARTS = {"told", "sheets", "sandbox", "mates", "former", "overtime", "company", "permit", "crumbs", "regroup"}
"""Words that are not part of a longer name either."""


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that code defines or uses, and their lines; not words of docstrings and messages."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, line
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name, line
            case ast.keyword(arg=str(name)):
                yield name, line
            case ast.alias(name=name, asname=asname):
                yield from ((part, line) for part in (asname or name).split("."))


def words(name: str) -> list[str]:
    """``LazyWorkers_of`` as lazy, workers, of."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]


def old_words(source: str) -> set[tuple[str, int]]:
    """Names in a module that are of the old dialect, or have a word of it, with their lines."""
    found = set()
    for name, line in identifiers(ast.parse(source)):
        if name.strip("_") in NAMES or set(words(name)) & PARTS:
            found.add((name, line))
    return found


@pytest.mark.slow
def test_no_name_is_of_the_old_dialect():
    offenders = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in sorted((ROOT / "daskcell").rglob("*.py"))
        for name, line in sorted(old_words(file.read_text(encoding="utf-8")), key=lambda one: one[1])
    ]
    assert not offenders, "\n".join(["see NAMES for what is said now", *offenders])


def test_names_are_found_wherever_they_stand():
    source = "def f(told, *, _held=1):\n  import a.sandbox\n  x.wait_for_former(lend=told)\nclass Care: ..."
    found = {name for name, _ in old_words(source)}
    assert found == {"told", "_held", "sandbox", "wait_for_former", "lend", "Care"}
    assert not old_words("'told'  # sandbox\nbeheld(care=1)")


def test_no_word_that_is_said_now_is_an_old_one():
    now = {word for said in NAMES.values() for word in re.findall(r"[A-Za-z_]+", said)}
    assert not now & set(NAMES)


def test_every_term_of_the_glossary_is_explained_once():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [term for line in text.splitlines() for term in re.findall(r"^\*\*(.+?)\*\*", line)]
    assert len(terms) == len(set(terms)) > 40
    assert not set(NAMES) & {term.lower() for term in terms}
