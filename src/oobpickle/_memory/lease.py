"""A lease: the right of a sender to write into blocks until its message has left.

**What.** `Lease` holds the blocks of one message, and one destination for each of its buffers.

**How it works.** Write into ``destinations``, then `seal` (the blocks are IN FLIGHT), then hand
the envelope on, then `settle`. Up to `settle` the lease gives its blocks back when it is
collected or `release` is called, so an exception anywhere on the way leaves nothing leased::

    acquire -> Lease -> write -> seal -> [envelope is written to the pipe] -> settle
                 \\-------- collected, or release(): blocks are free again --------/

**Lifetime.** Belongs to one process: in a forked child a copy of it means nothing. If the process
dies before `seal`, the blocks come back at once; after it they come back when the envelope turns
out to be unreadable.

**When it cannot.** A range that is private in this process since a fork cannot be written through
the mapping; its buffers are collected aside and written to the file by `seal`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from oobpickle import _faults
from oobpickle._memory.holdings import Holdings
from oobpickle._memory.layout import Plan
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.membership import Membership
from oobpickle._memory.segment import Segment
from oobpickle._memory.watch import Watch


class Lessor(Protocol):
    """Where a lease comes from, and goes back to."""

    data: Segment
    ledger: Ledger
    holdings: Holdings
    membership: Membership

    def settle(self, lease: Lease) -> None:
        """The lease is no more: it was sealed, or its blocks are going back."""

    def give_back(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Nobody needs the blocks any more."""


class Lease:
    """Blocks leased for one message.

    Attributes
    ----------
    destinations : list of memoryview
        One writable view of bytes for each buffer, in order; until `seal`.
    blocks : list of (int, int)
        ``(index, generation)`` of each block: with the sizes of the buffers, the placements.
    watch : Watch
        What gives the blocks back when the lease is collected.
    """

    __slots__ = (
        "__weakref__",
        "_arena",
        "_aside",
        "_epoch",
        "_plan",
        "blocks",
        "destinations",
        "sealed",
        "watch",
    )

    def __init__(self, arena: Lessor, plan: Plan) -> None:
        self._arena = arena
        self._epoch = arena.holdings.epoch
        self._plan = plan
        self._aside: list[tuple[int, bytearray]] = []
        self.blocks: list[tuple[int, int]] = []
        self.destinations: list[memoryview] = []
        self.sealed = False
        self.watch: Watch = arena.holdings.watch(self, self.blocks)

    def lay_out(self, sizes: list[int]) -> None:
        """Make the destinations, once the blocks are there."""
        plan = self._plan
        views = [
            self._view(index, nbytes)
            for (index, _), nbytes in zip(self.blocks, plan.needs, strict=True)
        ]
        self.destinations = [
            views[block][at : at + nbytes] if block >= 0 else memoryview(bytearray())
            for (block, at), nbytes in zip(plan.places, sizes, strict=True)
        ]

    def _view(self, index: int, nbytes: int) -> memoryview:
        arena = self._arena
        if index in arena.holdings.private:
            aside = bytearray(nbytes)
            self._aside.append((index, aside))
            return memoryview(aside)
        offset = arena.ledger.rows.offset(index)
        return arena.data.bytes(offset, nbytes)

    def seal(self, channel: int) -> None:
        """Finish writing: from here on a receiver may claim the blocks.

        Parameters
        ----------
        channel : int
            `_pipes.channel_id` of where the envelope goes, recorded so that the blocks come back
            if nobody can read it any more; 0 if unknown.
        """
        arena = self._arena
        for index, aside in self._aside:
            arena.data.write(arena.ledger.rows.offset(index), memoryview(aside))
        _faults.reach("lease.written")
        arena.ledger.seal(self.blocks, arena.membership.slot, channel)
        self.sealed = True
        if self._aside:
            # In the file now. A queue's feeder keeps the lease until its next message.
            self._aside.clear()
            self.destinations = [memoryview(b"")] * len(self.destinations)
        _faults.reach("lease.sealed")

    def depart(self) -> None:
        """The envelope is about to be written: from now on nothing but `release` frees the blocks.

        Before the write, since an interrupt can come right after it.
        """
        if self._epoch == self._arena.holdings.epoch:
            self.watch.settles = True

    def settle(self) -> None:
        """The envelope has left, or may have: the blocks are no longer this process's to free."""
        if self._epoch == self._arena.holdings.epoch:
            self._arena.settle(self)

    def release(self) -> None:
        """Give the blocks back: the envelope has not left."""
        if self._epoch == self._arena.holdings.epoch:
            self._arena.settle(self)
            self._arena.give_back(self.blocks)
