"""The explanation as HTML, for a notebook: a tree that unfolds.

**What.** `as_html`.

**How it works.** Nested ``details`` elements; no script, nothing from elsewhere. Everything that
comes from the object is escaped.

**Lifetime.** No state.

**When it cannot.** What is not among the children is one line with a count.
"""

from __future__ import annotations

from html import escape
from typing import Any

from oobpickle._errors import format_nbytes, format_seconds
from oobpickle._explain.text import heading, notes

Explanation = Any  # of `explanation`, which is above this

_STYLE = "font-family:monospace;margin-left:1.2em"


def as_html(explanation: Explanation) -> str:
    """Return the explanation as a piece of HTML."""
    parts = [f"<p>{'<br>'.join(map(escape, heading(explanation)))}</p>"]
    parts += [_of_child(one, explanation) for one in explanation.children]
    parts += [_of_rest(explanation), *(f"<p>{escape(text)}</p>" for text in notes(explanation))]
    return f'<div style="font-family:monospace">{"".join(parts)}</div>'


def _of_child(one: Explanation, above: Explanation) -> str:
    label = escape(one.path.removeprefix(above.path))
    spent = format_seconds(one.seconds.pickle + one.seconds.load)
    line = (
        f"<b>{label}</b> {escape(one.type)} &middot; {format_nbytes(one.nbytes)} &middot; "
        f"{one.placement} &middot; {spent}"
    )
    why = f"<div>{escape(one.reason)}</div>" if one.reason else ""
    if one.advice:
        why += f"<div><i>&rarr; {escape(one.advice)}</i></div>"
    inner = "".join(_of_child(child, one) for child in one.children)
    return (
        f'<details style="{_STYLE}"><summary>{line}</summary>{why}{inner}{_of_rest(one)}</details>'
    )


def _of_rest(one: Explanation) -> str:
    if one.n_cut <= 0 or not one.children:
        return ""
    return f'<div style="{_STYLE}">{one.n_cut:,} more, {format_nbytes(one.nbytes_cut)}</div>'
