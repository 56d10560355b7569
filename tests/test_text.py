"""What is printed survives any terminal: narrow ones, and none."""

from __future__ import annotations

import io

import pytest

from daskcell.pipeline.progress import Bars, Lines
from daskcell.pipeline.stages import SLIDE_STAGES
from daskcell.text import table

ROWS = [
    ["slide", "convert", "fit", "cells", "share"],
    ["a", "done", "-", "1,024", "9.0 %"],
    ["bb", "FAILED", "", "7", "-"],
]


def test_columns_are_even_and_numbers_are_flush_right():
    assert table(ROWS).splitlines() == [
        "slide  convert  fit  cells  share",
        "a      done     -    1,024  9.0 %",
        "bb     FAILED            7      -",
    ]


def test_a_table_that_is_wider_than_the_terminal_is_told_row_by_row():
    lines = table(ROWS, width=20).splitlines()
    assert lines[:4] == ["a", "  convert: done", "  fit: -", "  cells: 1,024"]
    assert lines[5:7] == ["bb", "  convert: FAILED"]


def test_markup_and_brackets_in_names_are_left_alone():
    assert table([["slide"], ["[red]a[/red]"], [":smile:"]]) == "slide\n[red]a[/red]\n:smile:"


@pytest.mark.parametrize("columns", [20, 40, 60, 70, 90, 200])
def test_bars_fit_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Bars(stream) as progress:
        progress.begin(dict.fromkeys("abcdefghij", 1e6), {name: list(SLIDE_STAGES) for name in "abcdefghij"})
        progress.counts("a", 123_456_789, 1_234_567)
        progress.step("a", "segment", 0.5)
        shown = progress.text(columns)
        assert len(shown) <= columns
        assert shown.startswith(f"{progress.fraction:4.0%}")
        progress.say("[a] sentence " + "that is long " * 10)
        rendered = progress._rich.console.render_lines(progress._rich.get_renderable())
    assert len(rendered) == 1
    assert "sentence" in stream.getvalue()


def test_lines_are_whole_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    progress = Lines(1000, stream)
    progress.begin({"a": 1e6}, {"a": list(SLIDE_STAGES)})
    progress.counts("a", 123_456_789, 1_234_567)
    progress.say(progress.line)
    assert "123.5 Mpx, 1,234,567 cells" in stream.getvalue()
