"""The arena as a program sees it: what `enabled` yields, and no more than that.

**What.** `Arena`, and `AbsentArena`, which is yielded where there is no shared memory to be had.

**How it works.** It asks the arena of the library (`_memory.arena`), which serves messages.

**Lifetime.** The statistics can be had as long as somebody refers to it, also after the block.

**When it cannot.** `AbsentArena` answers as an arena in which nothing has happened.
"""

from __future__ import annotations

from oobpickle import _statistics
from oobpickle._memory import arena as inner
from oobpickle._memory.options import Options
from oobpickle._statistics import Statistics


class Arena:
    """Shared memory for the messages between the processes that have joined.

    Yielded by `enabled` and returned by `install`; not made by its constructor.

    Attributes
    ----------
    identity : bytes
        16 random bytes that name the arena in its envelopes.
    options : Options
        Capacity, threshold, wait_timeout, copy_on_receive and spill_dir in force.
    """

    def __init__(self, memory: inner.SharedArena) -> None:
        self._memory = memory
        self.identity = memory.identity
        self.options = memory.options

    @property
    def closed(self) -> bool:
        """Whether nothing new is sent through it: its block was left."""
        return self._memory.closed

    def statistics(self) -> Statistics:
        """Return the sums over all participants, living and dead.

        Returns
        -------
        Statistics
            A frozen snapshot; bytes and counts.
        """
        return self._memory.statistics()

    def preallocate(
        self, like: object = None, *, nbytes: int | None = None, count: int = 1
    ) -> None:
        """Allocate memory for messages before the first of them comes.

        Blocks until the pages are there: about half a second for each GB of ordinary pages. The
        memory is kept until a message takes it, `trim`, or the end of the block.

        Parameters
        ----------
        like : object, optional
            An object such as those that will be sent. It is pickled, and not copied.
        nbytes : int, optional
            Instead of `like`: the bytes of the one buffer of such a message.
        count : int
            How many such messages there will be at the same time.

        Raises
        ------
        ArenaFullError
            If there is no room for all of them, or no memory. What could be allocated is kept.
        TypeError, ValueError
            If neither or both of `like` and `nbytes` are given, or a number is out of range.

        Examples
        --------
        >>> import numpy as np, oobpickle
        >>> with oobpickle.enabled() as arena:
        ...     arena.preallocate(np.empty(1_000_000), count=2)
        ...     arena.statistics().n_blocks["free"]
        2
        """
        self._memory.preallocate(like, nbytes=nbytes, count=count)

    def trim(self) -> None:
        """Give the pages of all free blocks back to the system."""
        self._memory.trim()


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

    @property
    def closed(self) -> bool:
        """Always true: nothing is sent through it."""
        return True

    def statistics(self) -> Statistics:
        """Return zeros."""
        return _statistics.nothing()

    def preallocate(
        self, like: object = None, *, nbytes: int | None = None, count: int = 1
    ) -> None:
        """Do nothing, if what was said could be done."""
        inner.check_preparation(like, nbytes, count)

    def trim(self) -> None:
        """Do nothing."""
