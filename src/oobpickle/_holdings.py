"""What this process has of an arena: leases, held blocks, private ranges, and what is on its way
back.

**What.** `Holdings` is the process's own book, next to the ledger that all share. It turns the
death of an anchor into the release of its block, and held blocks into ordinary memory before a
fork.

**How it works.** A watched object (an anchor or a lease) has a weak reference whose callback is
``deque.append``: nothing can interrupt it, in a GC pass, a signal handler or at exit. `collect`
moves what was dropped to ``pending``; the step `release_pending` frees it. Each entry leaves its
queue only after it is dealt with, and dealing with it twice is harmless. ::

    anchor dies -> dropped -> collect: (private? map shared again) -> pending -> release_pending:
    FREE

**Lifetime.** After a fork the child owns nothing: its epoch changes, and watches of an older
epoch only say when an inherited private range may be mapped shared again.

**When it cannot.** If the system allows no further mapping, a held block stays shared with a
forked child; it is counted."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from oobpickle import _copying, _faults
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._lease import Lease
from oobpickle._ledger import Ledger
from oobpickle._mutex import LedgerBusyError, ThreadLock
from oobpickle._segment import NoMappingError, Segment, page_round

Blocks = list[tuple[int, int]]


class _Reference(weakref.ref[Any]):
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
        What gives the pages back, see `free_pages_at_death`.
    """

    __slots__ = ("anchored", "blocks", "epoch", "frees", "settles", "unclaimed_word")

    anchored: bool
    blocks: Blocks
    epoch: int
    frees: tuple[weakref.ref[Any], ...]
    settles: bool
    unclaimed_word: int | None


class Keeper:
    """Watched on behalf of a block that is only copied, so that it cannot be lost."""

    __slots__ = ("__weakref__",)


class Holdings:
    """This process's part of an arena.

    Attributes
    ----------
    leased : dict of int to int
        Index to generation of the blocks that a sender of this process writes.
    held : dict of int to (int, int)
        Index to ``(generation, nbytes)`` of the blocks under received arrays.
    private : dict of int to int
        Index to nbytes of ranges that are private memory here since a fork.
    adopted : dict of int to int
        Index to generation of the first blocks of messages that were read, but not yet loaded.
    epoch : int
        Counts the forks between the first participant and this process.
    dropped : deque
        What has died and was not collected yet.
    """

    def __init__(self, ledger: Ledger, data: Segment) -> None:
        self.leased: dict[int, int] = {}
        self.held: dict[int, tuple[int, int]] = {}
        self.private: dict[int, int] = {}
        self.adopted: dict[int, int] = {}
        self.epoch = 0
        self._ledger = ledger
        self._data = data
        self._complete: set[int] = set()  # of `private`: copied as a whole
        self._failed: set[int] = set()  # of `held`, in a fork: had to stay shared
        self._returning: set[int] = set()
        self._watches: dict[int, Watch] = {}
        self.dropped: deque[Watch] = deque()
        self._pending: deque[tuple[int, int]] = deque()
        self._unlocked: deque[tuple[int, int]] = deque()
        self._punched: deque[int] = deque()
        self._collecting = ThreadLock()
        self._inherited: tuple[object, ...] = ()

    # --- watching

    def watch(
        self,
        obj: object,
        blocks: Blocks,
        *,
        unclaimed_word: int | None = None,
    ) -> Watch:
        """Give the blocks back when `obj` is collected.

        Parameters
        ----------
        obj : object
            An anchor, a lease, or the copy of a block that is still needed.
        blocks : list of (int, int)
            Index and generation of each; more may be added, so that there is a watch before there
            is a block, and an interrupt loses none.
        unclaimed_word : int, optional
            The block is in flight, with this commit word, and was never claimed.
        """
        watch = Watch(obj, self.dropped.append)
        watch.anchored = watch.settles = False
        watch.unclaimed_word = unclaimed_word
        watch.blocks = blocks
        watch.epoch = self.epoch
        watch.frees = ()
        self._watches[id(watch)] = watch
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Forget a watch whose blocks went another way."""
        watch.blocks = []
        self._watches.pop(id(watch), None)

    def free_pages_at_death(self) -> None:
        """Give pages back at the death of every anchor, since nobody may come by to do it."""
        for watch in list(self._watches.values()):
            anchor = watch()
            if anchor is not None and watch.anchored and not watch.frees:
                ((index, _),) = watch.blocks
                offset, resident = self._ledger.pages_of(index)
                calls = self._data.freeing_calls(offset, max(anchor.nbytes, resident))
                watch.frees = tuple(_Reference(anchor, call) for call in calls)

    def settle_all_at_death(self) -> None:
        """Leave every sealed lease to its envelope, since nobody will say when that has left."""
        for watch in list(self._watches.values()):
            lease = watch()
            if isinstance(lease, Lease) and lease.sealed:
                watch.settles = True

    # --- giving back

    @property
    def has_returns(self) -> bool:
        """Whether `release_pending` has something to do."""
        return bool(self._pending or self._unlocked or self._punched)

    def owes(self, nbytes: int) -> bool:
        """Whether that is at least so many bytes of blocks."""
        used = self._ledger.used
        blocks = [block for watch in list(self.dropped) for block in watch.blocks]
        return sum(used[index] for index, _ in blocks) >= nbytes

    @property
    def is_empty(self) -> bool:
        """Whether no object of this process depends on the mapping."""
        busy = (self._watches, self.dropped, self.leased, self.held, self._returning)
        return not any(busy)

    def known(self) -> set[int]:
        """Return the indices of all blocks that this process knows to be its own."""
        return {*self.leased, *self.held, *self._returning}

    def note_punched(self, index: int) -> None:
        """Queue a leased block for the account: its pages have gone back to the system."""
        self._punched.append(index)

    def give_back(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Queue blocks for release."""
        for index, generation in blocks:
            self._returning.add(index)
            self.forget(index, generation)
            self._pending.append((index, generation))

    def forget_lease(self, index: int, generation: int) -> None:
        """Take a lease out of the book; the block may be held by now, in this very process."""
        if self.leased.get(index) == generation:
            self.leased.pop(index, None)

    def forget(self, index: int, generation: int) -> None:
        """Take a block out of both books, unless they speak of a later lease of it."""
        self.forget_lease(index, generation)
        if self.held.get(index, (None, 0))[0] == generation:
            self.held.pop(index, None)

    def consume(self, index: int, generation: int, word: int, when_dead: object | None) -> None:
        """Queue a block in flight that was copied out unclaimed: now, or when an object dies."""
        if when_dead is None:
            self._unlocked.append((index, word))
        else:
            self.watch(when_dead, [(index, generation)], unclaimed_word=word)

    def collect(self) -> None:
        """Queue the blocks of everything that has died."""
        if self.dropped:
            # Somebody else (or this thread, below a finalizer) may be doing it right now: fine.
            try:  # noqa: SIM105  here a context manager shows in the time of each message
                self._collecting.run(0, self._collect)
            except LedgerBusyError:
                pass

    def _collect(self) -> None:
        dropped = self.dropped
        while dropped:
            watch = dropped[0]
            is_own = watch.epoch == self.epoch
            if is_own and not watch.anchored and _copying.is_busy():
                return  # perhaps an interrupted copy into this lease; it goes on for moments only
            for index, generation in watch.blocks if watch.anchored else ():
                if is_own:
                    # Before it is mapped shared: a fork in another thread must not undo that.
                    self._returning.add(index)
                    self.forget(index, generation)
                self._share(index)
            if not is_own:
                pass
            elif watch.settles:
                for index, generation in watch.blocks:
                    self.forget_lease(index, generation)
            elif watch.unclaimed_word is not None:
                self._unlocked.append((watch.blocks[0][0], watch.unclaimed_word))
            else:
                self.give_back(watch.blocks)
            self._watches.pop(id(watch), None)
            dropped.popleft()

    def share_unanchored(self, index: int) -> None:
        """Map a range shared again that a fork made private before it got an anchor."""
        self._share(index)

    def _share(self, index: int) -> None:
        # Only the death of the anchor may do this: while it lives, the private pages are its value.
        nbytes = self.private.get(index)
        if nbytes is not None:
            try:
                self._data.share(self._ledger.rows.offset(index), nbytes)
            except OSError as error:
                pass_on_foreign(error)
                return  # stays private here; what is sent in this block is copied from the file
            self._complete.discard(index)
            self.private.pop(index, None)

    def release_pending(self, slot: int) -> list[int]:
        """Step: free what is queued; return the indices."""
        freed = []
        pending = self._pending
        while self._punched:
            self._ledger.mark_punched((self._punched[0],))
            self._punched.popleft()
        while pending:
            block = pending[0]
            _faults.reach("holdings.releasing")
            self._ledger.release((block,), slot)
            self._returning.discard(block[0])
            freed.append(block[0])
            pending.popleft()
        while self._unlocked:
            self._ledger.free_unread((self._unlocked[0],))
            self._unlocked.popleft()
        return freed

    # --- forking

    def privatize(self) -> tuple[int, int, int]:
        """Turn every held block into ordinary memory; call again after an interrupt.

        Returns
        -------
        n_blocks : int
            How many; that their file pages are gone is accounted by the next `release_pending`.
        nbytes : int
            Their size.
        n_failed : int
            Blocks that had to stay shared: the system allows no further mapping. Each once a fork.
        """
        n_done, total, n_failed = 0, 0, 0
        for index, (_, nbytes) in list(self.held.items()):
            if index in self._complete or index not in self.held:
                continue
            # In the book first: an interrupt after the mapping must not lose that it is private.
            resume = index in self.private
            self.private[index] = nbytes
            offset, resident = self._ledger.pages_of(index)
            try:
                self._data.privatize(offset, nbytes, resume=resume)
                self._complete.add(index)
                if resident > page_round(nbytes):  # of a larger message before
                    with ignoring(OSError):
                        tail = page_round(nbytes)
                        self._data.punch(offset + tail, resident - tail)
            except OSError as error:
                pass_on_foreign(error)
                # To look is slow where there are many mappings, and so may be these errors.
                if not isinstance(error, NoMappingError) and self._data.is_private(offset):
                    raise  # of a signal handler, and too late to undo it: call again
                if not getattr(error, "n_done", 0):
                    self.private.pop(index, None)  # else the next fork goes on with it
                n_failed += index not in self._failed
                self._failed.add(index)
                continue
            _faults.reach("fork.privatized")
            self._punched.append(index)
            n_done += 1
            total += nbytes
        return n_done, total, n_failed

    def privatize_in_child(self) -> int:
        """Turn what the parent holds into ordinary memory of the child, after an unprepared fork.

        The file's pages and the blocks stay the parent's. Call it before `reset_in_child`, and
        again after an interrupt; it returns how many blocks had to stay shared.
        """
        for index, (generation, nbytes) in list(self.held.items()):
            if index in self._complete or index in self._failed:
                continue
            resume = index in self.private
            self.private[index] = nbytes
            offset = self._ledger.rows.offset(index)
            try:
                self._data.privatize(offset, nbytes, resume=resume, keep_file=True)
            except OSError as error:
                pass_on_foreign(error)
                if not isinstance(error, NoMappingError) and self._data.is_private(offset):
                    raise
                if not getattr(error, "n_done", 0):
                    self.private.pop(index, None)
                self._failed.add(index)
                continue
            self._complete.add(index)
            if self._ledger.generation[index] != generation:
                self._failed.add(index)  # the parent had let go of it already
        return len(self._failed)

    def enter_fork(self) -> None:
        """Keep other threads from collecting until `leave_fork`: they would map ranges shared."""
        self._collecting.enter_fork()

    def leave_fork(self) -> None:
        """Let them collect again."""
        self._failed.clear()
        self._collecting.leave_fork()

    def reset_in_child(self) -> None:
        """Start anew in a forked child: what was inherited is the parent's."""
        self.epoch += 1
        # Kept, not cleared: to drop what they refer to would copy the pages that it lies in.
        self._inherited = self.leased, self.held, self.adopted, self._returning
        self.leased, self.held, self.adopted, self._returning = {}, {}, {}, set()
        self._pending.clear()
        self._unlocked.clear()
        self._punched.clear()
        self._failed.clear()
        self._collecting.reset_in_child()
