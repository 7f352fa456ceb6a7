"""Membership: this process as a participant of an arena.

**What.** `Membership` joins the table of participants, runs steps under the ledger's mutex,
counts, and says when this process is in the middle of receiving.

**How it works.** Joining opens a description of the locks file of this process's own and takes a
slot. A forked child gives up what it inherited and joins anew; if that fails (no descriptor, no
slot), the next use tries again.

**Lifetime.** Ends with the process; nobody need say goodbye.

**When it cannot.** `run` raises `ArenaFullError` with the reason ``detached`` while this process
cannot join, or if somebody has closed its descriptors, and ``busy`` while the lock cannot be
had."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

from oobpickle._errors import ArenaFullError
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.descriptors import ClosedDescriptorError, close_if, file_of, is_file
from oobpickle._memory.layout import H_STRANGERS, adopted_by
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.locks import LockFile
from oobpickle._memory.mutex import LedgerBusyError, LedgerMutex
from oobpickle._memory.participants import OwnRow, Participants
from oobpickle._memory.unloaded import Unloaded

BUSY_S: Final = 2.0  # how long a step waits for the lock before its caller does without
HURRIED_S: Final = 0.02  # the same for a while after it was waited for in vain
_HURRY_S: Final = 5.0


class Membership:
    """This process's place in an arena.

    Parameters
    ----------
    ledger : Ledger
        The table that all share.
    handle : int
        Descriptor of the locks file, to be passed on and never locked.
    repair : callable
        See `LedgerMutex`.
    """

    def __init__(self, ledger: Ledger, handle: int, repair: Callable[[], None]) -> None:
        self.handle = handle
        self._file = file_of(handle)
        self._ledger = ledger
        self._repair = repair
        self._participants = Participants(ledger)
        self._mutex: LedgerMutex | None = None
        self._own: OwnRow | None = None
        self._patient_at = 0.0
        self._reads_for_ever = False
        self.unloaded = Unloaded()
        self._inherited: list[LockFile] = []  # of the parent, in a forked child
        self.retired = False

    # --- joining

    def join(self) -> None:
        """Become a participant.

        Raises
        ------
        OSError
            If there is no descriptor to be had.
        ArenaFullError
            If the lock or a slot cannot be had.
        """
        if self.retired:
            raise ArenaFullError("this process has left the arena", "detached")
        if self._mutex is None:
            locks = LockFile(self.handle, self._file)
            try:
                self._mutex = LedgerMutex(locks, self._ledger.words, self._repair)
            except BaseException:  # a Ctrl-C
                locks.close()
                raise
        slot = self._mutex.run(BUSY_S, self._participants.join, self._mutex.locks, self.unloaded)
        if slot is None:
            raise ArenaFullError("no slot is left for another participant", "detached")
        self._own = OwnRow(self._ledger.words, slot)
        self.leave_parent()
        if self._reads_for_ever:
            self.read_for_ever()

    def try_join(self) -> bool:
        """Become a participant if possible."""
        try:
            self.join()
        except (OSError, ArenaFullError) as error:
            pass_on_foreign(error)
            if self.leave_parent():
                return self.try_join()  # there is a descriptor to spare now
            if self.unloaded:
                self._ledger.words[H_STRANGERS] = 1  # it cannot say so in a row
            return False
        return True

    @property
    def joined(self) -> bool:
        """Whether this process is a participant now."""
        return self._own is not None

    @property
    def has_handle(self) -> bool:
        """Whether `handle` is still the locks file: children can join by it."""
        return is_file(self.handle, self._file)

    @property
    def has_lost_lock(self) -> bool:
        """Whether this process has joined, and somebody has closed its descriptor of the lock."""
        return self._mutex is not None and not self._mutex.locks.is_intact()

    @property
    def slot(self) -> int:
        """This process's number among the participants."""
        if self._own is None:
            raise ArenaFullError("this process has not joined the arena", "detached")
        return self._own.slot

    @property
    def incarnation(self) -> int:
        """What tells this participant from all others that there were."""
        if self._own is None:
            raise ArenaFullError("this process has not joined the arena", "detached")
        return self._own.incarnation

    def run(self, step: Callable[..., Any], *args: Any) -> Any:
        """Return ``step(*args)``, run under the ledger's mutex.

        Raises
        ------
        ArenaFullError
            With the reason ``busy`` or ``detached``.
        """
        if self.retired or (self._own is None and not self.try_join()):
            raise ArenaFullError(
                f"process {os.getpid()} could not attach to the arena: no descriptor or slot is "
                "left, or the ledger is busy. See ulimit -n.",
                "detached",
            )
        now = time.monotonic()
        try:
            # A stopped holder of the lock is waited for once, not by every message.
            return self.mutex.run(BUSY_S if now >= self._patient_at else HURRIED_S, step, *args)
        except LedgerBusyError as error:
            if not error.is_own:
                self._patient_at = now + _HURRY_S
            raise
        except ClosedDescriptorError as error:
            raise ArenaFullError(str(error), "detached") from error

    @property
    def mutex(self) -> LedgerMutex:
        """The mutex around the ledger; only after `join` was tried with success once."""
        if self._mutex is None:
            raise ArenaFullError("this process has not joined the arena", "detached")
        return self._mutex

    @property
    def mutex_or_none(self) -> LedgerMutex | None:
        """The same, or ``None`` before that."""
        return self._mutex

    # --- the others

    def reap(self) -> int:
        """Recover what dead participants had; return how many there were."""
        return int(self.run(self._reap))

    def _reap(self) -> int:
        return self._participants.reap(self.mutex.locks, self.slot)

    def pids(self) -> list[int]:
        """Return the pids of all participants; a hint for looking at /proc only."""
        return self._participants.pids()

    def others(self) -> list[int]:
        """Return the slots of the other participants, living or not yet reaped."""
        own = self._own.slot if self._own is not None else -1
        return [slot for slot, _ in self._participants.readers() if slot != own]

    def n_others(self) -> int:
        """Return how many other participants there are, living or not yet reaped."""
        return len(self.others())

    def living(self) -> set[int]:
        """Return the pids of all participants, this process among them, by the proof of life."""
        if self._own is None:
            return set()
        return self._participants.living(self.mutex.locks, self._own.slot)

    def sees_all(self) -> bool:
        """Tell whether /proc shows this process all that have joined.

        Not if it is in another pid namespace than one of them, or /proc is hidden from it.
        """
        own = self._own
        return own is not None and self._participants.are_visible(self.mutex.locks, own.slot)

    def anyone_reads(self) -> bool:
        """Tell whether anybody is in the middle of reading a message, or may be unnoticed."""
        return self._ledger.words[H_STRANGERS] != 0 or any(
            n_reading for _, n_reading in self._participants.readers()
        )

    def kept(self) -> tuple[set[int], bool]:
        """Return of which messages somebody may have the bytes; see `Participants.kept`."""
        return self._participants.kept()

    def counters(self) -> list[int]:
        """Step: sum the counters of all participants, living and dead."""
        return self._participants.counters()

    # --- counting and reading

    def count(self, *amounts: tuple[int, int]) -> None:
        """Add to counters of `_statistics`: pairs of counter and amount."""
        if self._own is not None:
            self._own.count(*amounts)

    def reader(self) -> OwnRow | None:
        """Return the row in whose ``readings`` this process says that it takes a message.

        ``None`` if it cannot join; then nothing is reclaimed any more, for its sake.
        """
        if self._own is None and not self.try_join():
            self._ledger.words[H_STRANGERS] = 1
        return self._own

    def read_for_ever(self) -> None:
        """From now on this process, and what it forks, reads without saying when.

        Nothing is reclaimed while one of them lives.
        """
        self._reads_for_ever = True
        own = self.reader()
        if own is not None:
            own.readings.add(self)
            own.publish_readings()

    # --- forking and ending

    def stay_out(self) -> None:
        """Never join, and say that this process may read."""
        self._ledger.words[H_STRANGERS] = 1
        self.retired = True

    def reset_in_child(self, *, has_unloaded: bool = False) -> None:
        """Give up, in a forked child, what is the parent's; `join` comes next.

        Parameters
        ----------
        has_unloaded : bool
            The parent had messages that it had read and not loaded: the child has their bytes too.
        """
        parents = [adopted_by(self._own.incarnation)] if has_unloaded and self._own else []
        inherited = self.unloaded
        self.unloaded = Unloaded([*inherited.sources, *parents], is_any=inherited.is_any)
        if self._mutex is not None:
            self._inherited.append(self._mutex.locks)
        self._mutex = None
        self._own = None
        if not self.unloaded:
            self.leave_parent()

    @property
    def has_parent(self) -> bool:
        """Whether this forked child has its parent's proof of life still."""
        return bool(self._inherited)

    def leave_parent(self) -> bool:
        """Give up the parent's proof of life, in a forked child; tell whether there was one.

        Where the parent had messages that it had read and not loaded, only once the child has said
        that it has their bytes too: the parent may have ended meanwhile.
        """
        had_one = bool(self._inherited)
        while self._inherited:
            self._inherited[-1].abandon()
            self._inherited.pop()
        return had_one

    def close(self) -> None:
        """Leave for good, and close the handle."""
        if self._mutex is not None:
            self._mutex.locks.close()
        self._mutex = None
        self._own = None
        close_if(self.handle, self._file)  # or closed already, by a call that was interrupted
        self.handle = -1
