"""Parts: what a walk makes of an object.

**What.** `Part`, and the styles of the labels that it may have.

**How it works.** A part refers to the part that it is in, so that its path can be made when it is
asked for, which is seldom.

**Lifetime.** Until the walk forgets it.

**When it cannot.** It is only data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oobpickle._explain import amounts as of

#: How a label is to be shown: see `naming`.
ROOT, INDEX, ENTRY, KEY, ATTRIBUTE, ARGUMENT, STATE, WHOLE = range(8)
Item = tuple[int, Any, Any]  # one of these, a label, an object


class Part:
    """What one object takes, with all that is in it.

    Attributes
    ----------
    obj : object
        The object.
    style, label
        Where it is in its `parent`.
    amounts : list of int
        See `amounts`.
    kept : list of (int, int, Part)
        A heap of the largest parts: nbytes, a serial number, the part.
    refusal : str
        Why it cannot be pickled; empty if it can.
    is_own : bool
        Whether code of its class took it apart.
    """

    __slots__ = (
        *("amounts", "depth", "is_own", "items", "kept", "label", "obj", "parent", "refusal"),
        "style",
    )

    def __init__(self, obj: Any, parent: Part | None, style: int, label: Any) -> None:
        self.obj = obj
        self.parent = parent
        self.style = style
        self.label = label
        self.amounts = of.none()
        self.amounts[of.PARTS] = 1
        self.items: Iterator[Item] | None = None
        self.kept: list[tuple[int, int, Part]] = []
        self.refusal = ""
        self.is_own = False
        self.depth: int = 0 if parent is None else parent.depth + 1

    @property
    def nbytes(self) -> int:
        """In the stream and beside it, bytes."""
        return self.amounts[of.STREAM] + self.amounts[of.OUT]
