"""The absent arena: what a program is given where there is no shared memory to be had.

**What.** `AbsentArena` answers as an arena in which nothing has happened, and has no room.

**How it works.** It overrides what users of an arena call; nothing is ever sent through it, since
no hook is put in.

**Lifetime.** As long as somebody refers to it.

**When it cannot.** `acquire` always raises `ArenaFullError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from oobpickle import _statistics
from oobpickle._errors import ArenaFullError
from oobpickle._memory.arena import Arena, check_preparation
from oobpickle._memory.options import Options
from oobpickle._statistics import Statistics


class AbsentArena(Arena):
    """An arena without memory, always closed; its statistics are zeros.

    Parameters
    ----------
    options : Options
        What was said.
    """

    def __init__(self, options: Options) -> None:
        self.options = options.resolve()
        self.identity = bytes(16)
        self.blocks = None  # type: ignore[assignment]

    @property
    def closed(self) -> bool:
        """Always true: nothing is sent through it."""
        return True

    def acquire(self, needs: Sequence[int], wait_timeout: float | None = None) -> NoReturn:
        """Raise `ArenaFullError`."""
        raise ArenaFullError("there is no arena on this system", "detached")

    def statistics(self) -> Statistics:
        """Return zeros."""
        return _statistics.nothing()

    def preallocate(
        self, like: object = None, *, nbytes: int | None = None, count: int = 1
    ) -> None:
        """Do nothing, if what was said could be done."""
        check_preparation(like, nbytes, count)

    def trim(self) -> None:
        """Do nothing."""
