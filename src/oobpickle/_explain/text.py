"""The text of an explanation: a table of 80 columns, the largest parts first.

**What.** `as_text`.

**How it works.** A heading with the totals; a line for each part, indented as it is nested; below
it what to do. What a part has not among its children is one line with a count.

**Lifetime.** No state.

**When it cannot.** Long paths and types are cut in the middle, so that each line fits.
"""

from __future__ import annotations

import textwrap
from typing import Any, Final

from oobpickle._errors import format_nbytes, format_seconds

Explanation = Any  # of `explanation`, which is above this

WIDTH: Final = 80
_MOST_LINES: Final = 40  # parts
_MOST_CHILDREN: Final = 8
_SHOWN_SHARE: Final = 0.005
_INDENT: Final = 34


def cut(text: str, most: int) -> str:
    """Return a text with its middle left out, if it is too long."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return text[:half] + "..." + text[len(text) - (most - 3 - half) :]


def heading(explanation: Explanation) -> list[str]:
    """Return the totals, in lines."""
    one = explanation
    stream = one.nbytes - one.nbytes_out_of_band
    lines = [
        f"{one.path}: {one.type}",
        f"{format_nbytes(one.nbytes)} in {one.n_parts:,} object{'s' * (one.n_parts > 1)}: "
        f"{format_nbytes(one.nbytes_out_of_band)} out of band, {format_nbytes(stream)} in the "
        "stream",
        f"from sender to receiver: {format_seconds(one.seconds.plain)} plain, "
        f"{format_seconds(one.seconds.oobpickle)} with oobpickle (predicted); "
        f"copied {one.n_copies[0]} and {one.n_copies[1]} times",
        one.reason,
    ]
    wrapped = [text for line in lines for text in textwrap.wrap(line, WIDTH) or [""]]
    if one.advice:
        wrapped += textwrap.wrap(f"-> {one.advice}", WIDTH, subsequent_indent="   ")
    return wrapped


def notes(explanation: Explanation) -> list[str]:
    """Return what holds for the whole: what is refused, and what is sent twice."""
    texts = [f"pickle cannot take {cut(path, 200)}" for path in explanation.refused]
    texts += [
        f"the same memory twice, {format_nbytes(one.nbytes)}: {cut(one.paths[0], 100)} and "
        f"{cut(one.paths[1], 100)}; each is sent, and arrives by itself"
        for one in explanation.duplicates
    ]
    return texts


def as_text(explanation: Explanation) -> str:
    """Return the explanation for a terminal."""
    lines = heading(explanation)
    if explanation.children:
        lines += ["", f"{'size':>9}  {'where':<11}  {'seconds':>7}  part"]
        rows: list[str] = []
        _add_rows(rows, explanation, explanation, 0)
        lines += rows
    if texts := notes(explanation):
        lines += [
            "",
            *(t for text in texts for t in textwrap.wrap(text, WIDTH, subsequent_indent="  ")),
        ]
    return "\n".join(lines)


def _add_rows(rows: list[str], root: Explanation, part: Explanation, depth: int) -> None:
    shown = [
        one
        for i, one in enumerate(part.children[:_MOST_CHILDREN])
        if (i < 3 and part is root)
        or one.nbytes > _SHOWN_SHARE * root.nbytes
        or one.placement == "refused"
    ]
    for one in shown:
        if len(rows) > _MOST_LINES or depth > 6:
            break
        rows += _row(one, part, depth)
        _add_rows(rows, root, one, depth + 1)
    n_cut = part.n_parts - 1 - sum(one.n_parts for one in shown)
    nbytes = max(0, part.nbytes - sum(one.nbytes for one in shown))
    if n_cut > 0 and shown and (part is root or nbytes > _SHOWN_SHARE * root.nbytes):
        indent = "  " * depth
        rows.append(f"{format_nbytes(nbytes):>9}  {'':<11}  {'':>7}  {indent}{n_cut:,} more")


def _row(one: Explanation, above: Explanation, depth: int) -> list[str]:
    spent = format_seconds(one.seconds.pickle + one.seconds.load)
    label = one.path.removeprefix(above.path)
    start = f"{format_nbytes(one.nbytes):>9}  {one.placement:<11}  {spent:>7}  {'  ' * depth}"
    room = WIDTH - len(start)
    text = f"{cut(label, room // 2)}: " if label else ""
    rows = [start + text + cut(one.type, room - len(text))]
    wanted = [f"{one.reason}"] if one.placement == "refused" or not one.children else []
    wanted += [f"-> {one.advice}"] if one.advice else []
    indent = " " * (WIDTH - room + 2)
    for line in wanted:
        rows += textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return rows
