"""A watch: what becomes of blocks when the object that has them dies.

**What.** `Watch` is a weak reference to an anchor or a lease, with the blocks that go back;
`Reference` one that calls the system.

**How it works.** The callback of either is one call of C: a frame of Python would be one in which a
pending Ctrl-C is raised, printed and lost. Of several references to one object the one that was
made last is called first.

**Lifetime.** `Holdings` keeps a watch until what it says has been done.

**When it cannot.** It cannot fail."""

from __future__ import annotations

import weakref
from typing import Any

Blocks = list[tuple[int, int]]


class Reference(weakref.ref[Any]):
    """A weak reference that a foreign function can be called with."""

    __slots__ = ()

    _as_parameter_ = 0


class Watch(weakref.ref[Any]):
    """A weak reference that remembers which blocks go back when its object dies.

    Attributes
    ----------
    blocks : list of (int, int)
        Index and generation of each.
    anchored : bool
        The object is the memory of the (one) block.
    settles : bool
        The blocks do not go back: from then on they belong to a message in flight.
    unclaimed_word : int or None
        The block was never claimed; its commit word.
    epoch : int
        Of the process that watches.
    frees : tuple of weakref.ref
        What gives the pages back, see `Holdings.free_at_death`.
    going : bool
        The pages go back to the system at its death, or may have gone.
    number : int
        Of the watch, in the order in which they were made.
    """

    __slots__ = (
        "anchored",
        "blocks",
        "epoch",
        "frees",
        "going",
        "number",
        "settles",
        "unclaimed_word",
    )

    anchored: bool
    blocks: Blocks
    epoch: int
    frees: tuple[weakref.ref[Any], ...]
    going: bool
    number: int
    settles: bool
    unclaimed_word: int | None


class Keeper:
    """Watched on behalf of a block that is only copied, so that it cannot be lost."""

    __slots__ = ("__weakref__",)
