"""Tables on a terminal: the one place where columns are laid out."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

_UNLIMITED = 100_000


def terminal_width() -> int:
    """Columns of the terminal that stdout writes to; unlimited where it writes to a file or pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED


def table(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Rows, of which the first is the header, as lines with even columns; numbers are flush right.

    Where that is wider than `width` (None: the terminal), each row becomes a block of lines, one a column.

    >>> print(table([["slide", "cells"], ["a", "12"], ["bee", "7"]]))
    slide  cells
    a         12
    bee        7
    >>> print(table([["slide", "cells"], ["a", "12"]], width=8))
    a
      cells: 12
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = terminal_width() if width is None else width
    grid = Table.grid(padding=(0, 2, 0, 0))
    for cells in zip(*rows, strict=True):
        numbers = [_is_number(cell) for cell in cells[1:] if cell not in ("", "-")]
        grid.add_column(justify="right" if numbers and all(numbers) else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=_UNLIMITED, color_system=None)
    if console.measure(grid).maximum - 2 <= width:
        with console.capture() as shown:
            console.print(grid)
        return "\n".join(line.rstrip() for line in shown.get().splitlines())
    head = rows[0]
    lines: list[str] = []
    for row in rows[1:]:
        lines.append(row[0])
        lines += [f"  {name}: {cell}" for name, cell in zip(head[1:], row[1:], strict=True) if cell]
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell.rstrip(" %").replace(",", "").replace(".", "", 1).lstrip("-").isdigit()
