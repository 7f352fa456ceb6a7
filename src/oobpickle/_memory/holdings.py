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

from collections import deque
from collections.abc import Iterable, Iterator

from oobpickle import _copying, _faults
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.mutex import LedgerBusyError, ThreadLock
from oobpickle._memory.segment import NoMappingError, Segment, page_round
from oobpickle._memory.watch import Blocks, Reference, Watch


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
    n_watches : int
        How many there were.
    usual_age : int
        How many watches were made in the lifetime of an anchor, at most, of late.
    unclaimed_readers : set
        Tokens of threads that copy a message which they do not own.
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
        self.n_watches = 0
        self.usual_age = 0
        self.unclaimed_readers: set[object] = set()
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
        watch.anchored = watch.settles = watch.going = False
        self.n_watches = watch.number = self.n_watches + 1
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

    def anchors(self) -> Iterator[Watch]:
        """Yield the watches of the anchors that are alive, the oldest first."""
        for watch in list(self._watches.values()):
            if watch.anchored and watch.blocks and watch() is not None:
                yield watch

    def free_pages_at_death(self) -> None:
        """Give pages back at the death of every anchor, since nobody may come by to do it."""
        for watch in self.anchors():
            if not watch.frees:
                self.free_at_death(watch)

    def free_at_death(self, watch: Watch) -> bool:
        """Give pages back at the death of this anchor; tell whether it lives.

        The calls come before the one that says that it has died: of several weak references the one
        that was made last is called first. So the block is still this process's.
        """
        anchor = watch()
        if anchor is None:
            return False
        ((index, _),) = watch.blocks
        offset, resident = self._ledger.pages_of(index)
        watch.going = True
        calls = (  # in the opposite order
            self._data.closing_call(offset, self._ledger.rows.known[index].end - offset),
            *self._data.freeing_calls(offset, max(anchor.nbytes, resident)),
        )
        watch.frees = tuple(Reference(anchor, call) for call in calls)
        return True

    def keep_at_death(self, watch: Watch) -> None:
        """Keep the pages of this anchor, as if `free_at_death` had not been."""
        watch.frees = ()
        if watch() is not None:  # else they may have gone
            watch.going = False

    def settle_all_at_death(self) -> None:
        """Leave every sealed lease to its envelope, since nobody will say when that has left."""
        for watch in list(self._watches.values()):
            if getattr(watch(), "sealed", False):  # a lease; anchors are arrays
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

    def uses(self, index: int) -> bool:
        """Tell whether this process has a block, or the range is private to it."""
        return index in self.leased or index in self.held or index in self.private

    def leave(self, index: int, nbytes: int) -> None:
        """Take a block that this process does not use out of its page tables."""
        with ignoring(LedgerBusyError):
            # No other thread can be forking meanwhile, and a range is made private by a fork only.
            self._collecting.run(0, self._leave, index, nbytes)

    def _leave(self, index: int, nbytes: int) -> None:
        if not self.uses(index):
            self._data.leave(self._ledger.rows.offset(index), nbytes)

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
                    age = self.n_watches - watch.number
                    self.usual_age = max(age, 7 * self.usual_age // 8)
                    self._account_gone(watch, index, generation)
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

    def _account_gone(self, watch: Watch, index: int, generation: int) -> None:
        # Not if an interrupted call has come further: then the block may be somebody else's by now.
        # And if a fork has made it private, that has accounted for it.
        is_held = self.held.get(index, (None, 0))[0] == generation
        if watch.going and is_held and index not in self.private:
            self._data.forget(self._ledger.rows.offset(index))
            with ignoring(OSError):  # madvise(2) does nothing to locked memory
                self._data.punch(*self._ledger.pages_of(index))
            self._punched.append(index)

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
                self._keep_shared(index)
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

    def _keep_shared(self, index: int) -> None:
        # Its death in the child, in a hook that comes before ours, would free what the parent has.
        for watch in self.anchors():
            if watch.blocks[0][0] == index:
                self.keep_at_death(watch)

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
        for watch in self._watches.values():
            # A range that had to stay shared is the parent's, whatever becomes of this copy.
            watch.frees = ()
            if watch.going and watch() is None:
                self._data.forget(self._ledger.rows.offset(watch.blocks[0][0]))
        # Kept, not cleared: to drop what they refer to would copy the pages that it lies in.
        self._inherited = self.leased, self.held, self.adopted, self._returning
        self.leased, self.held, self.adopted, self._returning = {}, {}, {}, set()
        self._pending.clear()
        self._unlocked.clear()
        self._punched.clear()
        self._failed.clear()
        self._collecting.reset_in_child()
