"""The arena: shared memory for the messages of one tree of processes, and the policy of its use.

**What.** `Arena` gives destinations to senders (`acquire`), recycles blocks, keeps within its
capacity, and says what it did. Its `intake` is for receivers.

**How it works.** Over three nameless files (`files`). Memory that was used is kept for the next
message: fresh pages cost ten times more than a copy. A receiver's block comes back when the last
array over it is collected: a weak reference on an exact ndarray, the *anchor*, queues it, and
whoever next works with the ledger frees it.

**Lifetime.** Created by `create` (the owner), inherited by `attach` and by fork. `close` ends it:
free blocks go back to the system at once, blocks under living arrays when those die. However
processes die, the kernel frees the files with the last of them; what a dead participant had is
recovered by whoever next needs room.

**When it cannot.** `acquire` raises `ArenaFullError` with a reason of `_fallback.REASONS`; the
caller then sends in-band."""

from __future__ import annotations

import operator
import os
import time
from typing import TYPE_CHECKING, Final, NamedTuple, SupportsIndex

from oobpickle import _copying, _faults, _statistics, _system
from oobpickle._errors import ArenaError, ArenaFullError, format_nbytes
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._memory import fork
from oobpickle._memory.files import Files, name_of, open_by_name
from oobpickle._memory.holdings import Holdings
from oobpickle._memory.intake import Intake
from oobpickle._memory.layout import (
    BLOCKS_AT,
    H_CAPACITY,
    H_CLOSED,
    H_RESIDENT,
    HEADER_WORDS,
    MAX_BLOCKS,
    N_COLUMNS,
    Plan,
    plan,
)
from oobpickle._memory.lease import Lease
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.membership import HURRIED_S, Membership
from oobpickle._memory.options import Options
from oobpickle._memory.passed_ends import PassedEnds
from oobpickle._memory.retention import Retention
from oobpickle._memory.room import Room
from oobpickle._memory.rows import Shortage
from oobpickle._memory.table import Census
from oobpickle._statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PLAIN_NBYTES_PER_S: Final = (
    0.3e9  # what a message through a pipe takes, for the default wait_timeout
)
_FIRST_PAUSE_S: Final = 0.2e-3
_LAST_PAUSE_S: Final = 5e-3
_STEP_BLOCKS: Final = 64  # blocks per step, so that nobody waits long for the lock
_EVERYTHING: Final = 1 << 62
_COUNT_EVERY_S: Final = 0.1
_PAUSE_COUNTS: Final = 4  # what messages find full one after the other is not counted each time
_ROWS_AHEAD: Final = 448  # with a step, one page of each column

Block = tuple[int, int]  # index and generation


class _Patience(NamedTuple):
    """Until when a sender waits for room; 0: not at all, since that was in vain.

    `nbytes` of its message, if it waits by default; else `None`: that says nothing about others.
    """

    deadline: float
    nbytes: int | None = None


#: Tokens of the threads that are inside an operation on some arena: none may be unmapped.
users: Final[set[object]] = set()


class Arena:
    """Shared memory for the messages between the processes that have joined.

    Made by `oobpickle.install` or `oobpickle.enabled`; not by its constructor.

    Attributes
    ----------
    identity : bytes
        16 random bytes that name the arena in its envelopes.
    options : Options
        Capacity, threshold, wait_timeout and copy_on_receive in force.
    """

    _kept = True

    def __init__(self, files: Files) -> None:
        words = files.words
        self.data = files.data
        self.ledger = Ledger(words)
        self.holdings = Holdings(self.ledger, self.data)
        self.membership = Membership(self.ledger, files.locks.fd, self._repair)
        self.room = Room(self.ledger, self.data, self.holdings, self.membership)
        self.retention = Retention(self.ledger, self.holdings, self.membership, self.room)
        self.passed_ends = PassedEnds(words, self.membership)
        self._table = files.table
        self.words = words
        self.identity = files.identity
        self.options = Options.read(words)
        self._capacity = words[H_CAPACITY]
        self._pid = os.getpid()
        self._inside_step = False
        self._has_lost_files = False
        self._askers: set[object] = set()  # tokens, as in `users`, for this arena
        self._n_rows = 0  # of the ledger that have pages
        self._vain_nbytes = _EVERYTHING  # so large a message has waited for room in vain
        self._census: Census | None = None  # the last one that an error has told
        self._count_again_at = 0.0
        self._kept = self.data.kept
        self._final: Statistics | None = None  # valid once it is retired
        self.intake = Intake(self)
        self.sizes_of: Callable[[object], list[int]] = _cannot_pickle
        fork.watch(self)

    @classmethod
    def create(cls, options: Options) -> Arena:
        """Create an arena, with this process as its first participant.

        Raises
        ------
        ArenaError
            If the system cannot provide it; the text says why.
        """
        if lacking := _system.lacking():
            raise ArenaError(lacking)
        files = arena = None
        try:
            files = Files.create(options.resolve())
            arena = cls(files)
            files.locks.kept = True  # the membership's from now on
            arena._reserve_rows(0)
            arena.room.keeps_everything = True
            arena.membership.join()
        except BaseException as error:
            if arena is not None:
                arena.membership.close()
            if files is not None:
                files.close()
            pass_on_foreign(error)
            if not isinstance(error, (OSError, ArenaFullError)):
                raise
            raise ArenaError(f"the arena cannot be created: {error}") from error
        return arena

    def keep(self) -> None:
        """From now on it ends by `try_destroy`, not when it is dropped."""
        self._kept = self.data.kept = self._table.kept = True

    def __del__(self) -> None:
        if not self._kept:  # made by `create`, and interrupted before anybody used it
            with ignoring(OSError):
                self.membership.close()

    @classmethod
    def attach(cls, data_fd: int, ledger_fd: int, locks_fd: int) -> Arena:
        """Join the arena behind inherited descriptors.

        Raises
        ------
        ArenaError
            If they are no files of an arena, or of another version.
        """
        files = Files.inherited(data_fd, ledger_fd, locks_fd)
        arena = cls(files)
        _faults.reach("arena.mapped")
        if files.table.mapped:
            arena.membership.try_join()
        else:  # no address space: it can load messages, and copies them out of the file
            arena.membership.stay_out()
        return arena

    @classmethod
    def find(cls, name: bytes) -> Arena:
        """Join the arena with the given `name`, through the process that sent it.

        Raises
        ------
        OSError, ArenaError
            If that process is gone, is another user's, or has not got this arena.
        """
        fds = open_by_name(name)
        try:
            return cls.attach(*fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    @property
    def name(self) -> bytes:
        """32 bytes: the identity, and where this process has the files."""
        return name_of(self.identity, self.descriptors)

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """What a child must inherit to attach: data, ledger, locks."""
        return self.data.fd, self._table.fd, self.membership.handle

    def can_be_inherited(self) -> bool:
        """Tell whether the `descriptors` are still those of the arena.

        If somebody has closed one, this process sends nothing through the arena any more: what it
        starts from now on cannot join.
        """
        is_whole = self.data.is_ours() and self._table.is_ours() and self.membership.has_handle
        self._has_lost_files = self._has_lost_files or not is_whole
        return not self._has_lost_files

    @property
    def closed(self) -> bool:
        """Whether the owner has closed it: nothing new is sent through it."""
        return self.words[H_CLOSED] != 0

    def _repair(self) -> None:
        self.ledger.rebuild()
        if self.membership.joined:
            self.ledger.forget_unknown(self.membership.slot, self.holdings.known())

    # --- sending

    def acquire(self, sizes: Sequence[int], wait_timeout: float | None = None) -> Lease:
        """Lease destinations for buffers of the given sizes.

        Parameters
        ----------
        sizes : sequence of int
            nbytes of each buffer, >= 0.
        wait_timeout : float, optional
            How long to wait for room that others hold, seconds. Default: the arena's option, else
            as long as a pipe would take for as many bytes; not at all while a message that was
            not larger has waited in vain, and none as large has found room since.

        Raises
        ------
        ArenaFullError
            If there is no room, memory or lock; nothing stays leased. Its ``reason`` says which.
        """
        if self.closed:
            raise ArenaFullError("the arena is closed", "detached")
        if self._has_lost_files:
            raise ArenaFullError(
                f"descriptors of the arena were closed in process {os.getpid()}. Do not close "
                "descriptors that you did not open (os.closerange).",
                "detached",
            )
        if not self.data.mapped:
            raise ArenaFullError("no address space to map the arena; see ulimit -v", "detached")
        sizes = list(sizes)
        layout = plan(sizes)
        least = sum(map(self.ledger.pages_nbytes, layout.needs))
        if least > self._capacity:
            raise self._full(Shortage("full", least, self._capacity))
        taken: list[tuple[int, int]] = []
        _faults.reach("arena.acquiring")
        lease = Lease(self, layout)
        try:
            patience = self._patience(layout, wait_timeout)
            self._take(layout, taken, lease, patience)
            fresh_nbytes = _fresh_nbytes(taken, layout)
            if fresh_nbytes and self.room.look_for_lost(fresh_nbytes):
                self._return(taken)
                lease.blocks.clear()
                self._take(layout, taken, lease, patience)
            for (index, present), nbytes in zip(taken, layout.needs, strict=True):
                if index not in self.holdings.private:
                    self.room.furnish(index, nbytes, present)
            self.room.leave_others(least)
            lease.lay_out(sizes)
        except BaseException as error:
            self._return(taken, punch=isinstance(error, ArenaFullError))
            self.holdings.unwatch(lease.watch)
            raise
        return lease

    def _return(self, taken: list[tuple[int, int]], *, punch: bool = True) -> None:
        """Give back blocks that were not written; `punch` those whose pages were not reserved."""
        indices = [index for index, _ in taken]
        if punch:
            self.room.punch_unreserved(indices)
        self.give_back([(index, self.ledger.generation[index]) for index in indices])
        taken.clear()

    def _patience(self, layout: Plan, wait_timeout: float | None) -> _Patience:
        if wait_timeout is None:
            wait_timeout = self.options.wait_timeout
        if wait_timeout is not None:
            return _Patience(time.monotonic() + wait_timeout)
        nbytes = sum(layout.needs)
        # What others hold for long is waited for once, not by every message.
        if nbytes >= self._vain_nbytes:
            return _Patience(0.0, nbytes)
        return _Patience(time.monotonic() + nbytes / _PLAIN_NBYTES_PER_S, nbytes)

    def _take(
        self, layout: Plan, taken: list[tuple[int, int]], lease: Lease, patience: _Patience
    ) -> None:
        needs, pause_s = layout.needs, _FIRST_PAUSE_S
        while len(taken) < len(needs):
            step = needs[len(taken) : len(taken) + _STEP_BLOCKS]
            self.holdings.collect()
            self._reserve_rows(len(step))
            shortage = self.membership.run(self._exchange, step, taken, lease)
            again = not patience.deadline or pause_s > _FIRST_PAUSE_S
            if shortage is None or self.room.make(shortage, again=again):
                continue
            if time.monotonic() >= patience.deadline:
                if patience.nbytes is not None:
                    self._vain_nbytes = min(self._vain_nbytes, patience.nbytes)
                raise self._full(shortage, again=not patience.deadline)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        if sum(needs) >= self._vain_nbytes:
            self._vain_nbytes = _EVERYTHING  # there is room again

    def _reserve_rows(self, n_more: int) -> None:
        """Give the next rows of the ledger their pages: on a full mount a fault would be fatal."""
        n_rows = self.ledger.rows.n_rows + n_more + 1  # whoever rebuilds looks one further
        if n_rows <= self._n_rows or n_rows > MAX_BLOCKS:
            return
        first, n_rows = self._n_rows, min(MAX_BLOCKS, n_rows + _ROWS_AHEAD)
        try:
            for column in range(N_COLUMNS):
                start = BLOCKS_AT + column * MAX_BLOCKS + first
                self._table.reserve(8 * start, 8 * (n_rows - first))
        except ArenaError as error:  # somebody closed the descriptor
            raise ArenaFullError(str(error), "detached") from error
        except OSError as error:
            pass_on_foreign(error)
            raise ArenaFullError(f"no room for the table of blocks: {error}", "space") from error
        self._n_rows = n_rows

    def _exchange(
        self, needs: list[int], taken: list[tuple[int, int]], lease: Lease
    ) -> Shortage | None:
        """Step: give back what died, then lease."""
        start, slot = len(taken), self.membership.slot
        self.holdings.release_pending(slot)
        shortage = self.ledger.lease(needs, slot, taken)
        for index, _ in taken[start:]:
            generation = self.ledger.generation[index]
            # First what gives it back: an interrupt can come in between.
            lease.blocks.append((index, generation))
            self.holdings.leased[index] = generation
        return shortage

    def _full(self, shortage: Shortage, *, again: bool = False) -> ArenaFullError:
        census, now = self._census, time.monotonic()
        if not again or census is None or now >= self._count_again_at:
            census = self._census = self.ledger.census()
            took_s = time.monotonic() - now
            self._count_again_at = now + max(_COUNT_EVERY_S, _PAUSE_COUNTS * took_s)
        uses = ", ".join(f"{format_nbytes(n)} {state}" for state, n in census.nbytes.items() if n)
        return ArenaFullError(
            f"arena full: need {format_nbytes(shortage.need_nbytes)}, "
            f"{format_nbytes(shortage.room_nbytes)} left of {format_nbytes(self._capacity)} "
            f"({uses or 'nothing in use'}). Pass enabled(capacity=...) or drop results earlier.",
            shortage.reason,
        )

    def settle(self, lease: Lease) -> None:
        """Forget a lease: its blocks belong to the envelope now, or go back another way."""
        self.holdings.unwatch(lease.watch)
        for block in lease.blocks:
            self.holdings.forget_lease(*block)

    # --- giving back

    def give_back(self, blocks: Sequence[Block]) -> None:
        """Release blocks now, or, if the ledger is busy, with the next step of this process."""
        self.holdings.give_back(blocks)
        self.drain()

    def drain(self) -> None:
        """Release what has died in this process. Never raises for want of a lock."""
        holdings = self.holdings
        holdings.collect()
        while holdings.has_returns:
            try:
                freed = self.membership.run(self._release)
                if not self.closed:
                    self.retention.released()
                elif freed:
                    self.room.punch_idle(_EVERYTHING)
            except (ArenaFullError, OSError) as error:
                pass_on_foreign(error)
                return
            holdings.collect()

    def _release(self) -> list[int]:
        return self.holdings.release_pending(self.membership.slot)

    # --- counting

    def statistics(self) -> Statistics:
        """Return the sums over all participants, living and dead.

        Returns
        -------
        Statistics
            A frozen snapshot; bytes and counts.
        """
        token = object()
        try:
            self._askers.add(token)
            return self._statistics()
        finally:
            self._askers.discard(token)

    def _statistics(self) -> Statistics:
        if self.membership.retired and self._final is not None:
            return self._final
        self.drain()
        try:
            counters, census = self.membership.run(self._look)
        except (ArenaFullError, OSError) as error:
            pass_on_foreign(error)
            counters, census = self._look()
        return _statistics.summed(
            counters,
            n_participants=self.membership.n_others() + self.membership.joined,
            n_blocks=census.n_blocks,
            nbytes=census.nbytes,
            nbytes_resident=self._resident_nbytes(),
            nbytes_huge=self.data.huge_nbytes() if self.ledger.huge else 0,
            capacity=self._capacity,
            n_quarantined=census.n_quarantined,
        )

    def _resident_nbytes(self) -> int:
        try:
            return self.data.resident_nbytes()
        except ArenaError:  # somebody has closed the descriptor
            return self.words[H_RESIDENT]

    def _look(self) -> tuple[list[int], Census]:
        return self.membership.counters(), self.ledger.census()

    # --- before the first message, and after the last

    def preallocate(
        self, like: object = None, *, nbytes: int | None = None, count: int = 1
    ) -> None:
        """Have memory ready for messages before the first of them comes.

        Blocks until the pages are there: about half a second for each GB of ordinary pages. What is
        prepared is kept until a message takes it, `trim`, or the end of the block.

        Parameters
        ----------
        like : object, optional
            Such a message is to come. It is pickled, and not copied.
        nbytes : int, optional
            Instead: a message with one buffer of so many bytes is to come.
        count : int
            How many of them should find their memory ready at the same time.

        Raises
        ------
        ArenaFullError
            If there is no room for all of them, or no memory. What could be prepared is ready.
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
        check_preparation(like, nbytes, count)
        sizes = self.sizes_of(like) if nbytes is None else [operator.index(nbytes)]
        token, leases = object(), []
        try:
            users.add(token)
            for _ in range(count):
                leases.append(self.acquire(sizes, wait_timeout=0))
                _faults.reach("arena.preallocated")
        finally:
            blocks = [block for lease in leases for block in lease.blocks]
            with ignoring(ArenaFullError, OSError):  # then they are kept like any others
                self.membership.run(self.ledger.mark_prepared, blocks, self.membership.slot)
            try:
                for lease in leases:
                    lease.release()
            finally:
                users.discard(token)

    # --- ending

    def trim(self) -> None:
        """Give the pages of all free blocks back to the system."""
        token = object()
        try:
            self._askers.add(token)
            if not self.membership.retired:
                self.drain()
                self.membership.reap()
                self.room.reclaim()
                self.room.punch_idle(_EVERYTHING)
                self.room.punch_uncounted()
        except ArenaFullError as error:
            if error.reason != "detached":
                raise
        finally:
            self._askers.discard(token)

    def close(self) -> None:
        """End the arena: nothing new is sent; free memory is back with the system on return.

        Received arrays stay valid, and messages on their way can still be loaded. `detach` comes
        next, then `try_destroy`.
        """
        try:
            self.drain()
            self.membership.reap()
            self.room.reclaim()  # before it is closed: after that nobody says when he reads
            self.words[H_CLOSED] = 1
            self.room.punch_idle(_EVERYTHING)
            self.room.punch_uncounted()
        except (ArenaFullError, OSError) as error:
            pass_on_foreign(error)
            self.words[H_CLOSED] = 1  # a stuck lock: the kernel frees it with the processes

    def detach(self) -> None:
        """Stop sending from this process. Pages of what it holds go back as soon as that dies."""
        self.holdings.free_pages_at_death()
        self.holdings.settle_all_at_death()
        self.drain()

    def try_destroy(self) -> bool:
        """Unmap and close everything if nobody needs it any more; the statistics stay.

        That is when it is closed, this process is the last in it, no array, lease or message is
        left, and no thread is inside an operation (`users`).
        """
        if not self.closed:
            return False
        if self.membership.retired:
            self._destroy()  # an earlier call was interrupted
            return True
        self.drain()
        try:
            self.membership.reap()
            self.room.reclaim()
            self.room.punch_idle(_EVERYTHING)
            self._final = self._statistics()
            if not self.membership.run(self._retire):
                return False
        except (ArenaFullError, OSError) as error:
            pass_on_foreign(error)
            return False
        self._destroy()
        return True

    def _destroy(self) -> None:
        fork.unwatch(self)
        # Other threads may still look: whoever starts a program is in no operation of the arena.
        self.words = memoryview(bytearray(bytes(self.words[:HEADER_WORDS]))).cast("Q")
        self.passed_ends.words = self.words
        self.membership.close()
        self.ledger.close()
        self.data.close()
        self._table.close()

    def _retire(self) -> bool:
        """Step: the last one, if nobody needs the arena."""
        in_use = {state: n for state, n in self.ledger.census().n_blocks.items() if n}
        in_use.pop("free", None)
        if (
            users
            or self._askers
            or in_use
            or self.membership.n_others()
            or not self.holdings.is_empty
        ):
            return False
        self.membership.retired = True
        return True

    # --- forking

    def before_fork(self) -> None:
        """Turn what this process holds into ordinary memory, and keep its other threads out.

        May be called again after an interrupt.
        """
        if not self.membership.joined:
            return
        self._inside_step = self.membership.mutex.threads.in_use_below
        self.drain()
        self.holdings.enter_fork()
        self.membership.mutex.threads.enter_fork()
        n_blocks, nbytes, n_shared = self.holdings.privatize()
        self.membership.count(
            (_statistics.N_COPIED_AT_FORK, n_blocks),
            (_statistics.NBYTES_COPIED_AT_FORK, nbytes),
            (_statistics.N_SHARED_AFTER_FORK, n_shared),
        )
        if self.holdings.has_returns and not self._inside_step:
            with ignoring(ArenaFullError, OSError):  # then the next step accounts
                self.membership.mutex.run_owned(HURRIED_S, self._release)

    def after_fork_in_parent(self) -> None:
        """Let the other threads of this process go on."""
        if self.membership.joined:
            self.membership.mutex.threads.leave_fork()
            self.holdings.leave_fork()

    def after_fork_in_child(self, *, prepared: bool = True) -> None:
        """Become a participant of its own, who owns nothing yet; once.

        Parameters
        ----------
        prepared : bool
            Whether `before_fork` was called for this very fork: not if it was made by C code that
            tells Python of it afterwards only.
        """
        if self._pid == os.getpid():
            if self.membership.has_parent:  # an earlier call was interrupted
                self._join_in_child()
            return
        n_shared = 0
        if not prepared:
            mutex = self.membership.mutex_or_none
            if mutex is not None:  # else this was interrupted, and is not done for the first time
                self._inside_step = mutex.threads.in_use_below
            n_shared = self.holdings.privatize_in_child()
        self.membership.reset_in_child(has_unloaded=bool(self.holdings.adopted))
        self.holdings.reset_in_child()
        self.room.forget()
        _copying.forget()
        self._askers.clear()
        users.clear()  # of threads that do not exist here
        if self._inside_step:
            # A signal handler or finalizer has forked in the middle of a step: that goes on in the
            # parent, and must not go on here too.
            self.membership.stay_out()
            self._table.isolate()
        self._pid = os.getpid()
        self._join_in_child()
        if n_shared:
            self.membership.count((_statistics.N_SHARED_AFTER_FORK, n_shared))

    def _join_in_child(self) -> None:
        if not self.closed:
            self.membership.try_join()
        self.membership.leave_parent()


def _cannot_pickle(_obj: object) -> list[int]:
    raise ArenaError("this arena is not in use by any channel")  # `_envelope` knows how to


def check_preparation(like: object, nbytes: int | None, count: int) -> None:
    """Raise `TypeError` or `ValueError` for what `Arena.preallocate` cannot take."""
    if (like is None) == (nbytes is None):
        raise TypeError(
            "preallocate() takes a message like those to come, or nbytes=, and not both"
        )
    for name, value, least in (("nbytes", nbytes, 1), ("count", count, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")


def _fresh_nbytes(taken: list[tuple[int, int]], layout: Plan) -> int:
    """Return how many bytes of the needs lie in pages that leased blocks do not have yet."""
    fresh_nbytes = 0
    for (_, present), nbytes in zip(taken, layout.needs, strict=True):
        if nbytes > present:
            fresh_nbytes += nbytes - present
    return fresh_nbytes
