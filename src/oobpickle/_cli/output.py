"""Output: tables and progress, for a terminal, a file, or somebody's message.

**What.** `print_table` and `Progress`.

**How it works.** Plain text in columns. On a terminal tables are drawn by rich, if that is
installed.

**Lifetime.** The line of a `Progress` is gone when its block is left.

**When it cannot.** Without a terminal there is no progress.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Final

_AFTER_S: Final = 2.0
Row = Sequence[str]


def print_table(head: Row, rows: Sequence[Row], *, n_left: int = 1) -> None:
    """Print rows in columns, the first `n_left` of them flush left."""
    if sys.stdout.isatty() and _print_rich(head, rows, n_left):
        return
    for line in table_lines(head, rows, n_left=n_left):
        print(line)


def table_lines(head: Row, rows: Sequence[Row], *, n_left: int = 1) -> list[str]:
    """Return the lines of a table in plain text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _print_rich(head: Row, rows: Sequence[Row], n_left: int) -> bool:
    try:
        from rich.console import Console  # type: ignore[import-not-found,unused-ignore]
        from rich.table import Table  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    table: Any = Table()
    for i, cell in enumerate(head):
        table.add_column(cell, justify="left" if i < n_left else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return True


class Progress:
    """One line on standard error that says what is being done, after two seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._is_shown = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def say(self, text: str) -> None:
        """Replace the line."""
        if self._is_shown and time.monotonic() - self._start > _AFTER_S:
            print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
