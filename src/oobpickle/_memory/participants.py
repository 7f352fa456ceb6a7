"""The participants of an arena: one slot each, with its proof of life and its counters.

**What.** The table of participants in the ledger file. Methods named as steps run under
`LedgerMutex`.

**How it works.** A participant holds byte ``1 + slot`` of the locks file for life. A slot whose
state is JOINED but whose byte is free belongs to a dead process: no pids, no clocks. Its counters
are added to the totals, which exist twice: the sum is written into the bank that is not valid,
with a note of whom it includes, and one store makes it the valid one. So a death in the middle
neither loses nor counts twice.

**Lifetime.** A slot is reused only after the blocks of its dead owner were recovered. A
participant that leaves cleanly does nothing: the kernel releases the byte.

**When it cannot.** `join` returns ``None`` when all 4,096 slots are held by living processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Final

from oobpickle import _faults
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.layout import (
    BANK_WORDS,
    H_BANK,
    H_INCARNATION,
    H_N_SLOTS,
    H_TOTALS,
    HEADER_WORDS,
    JOINED,
    MAX_PARTICIPANTS,
    N_COUNTERS,
    N_KEPT,
    P_COUNTERS,
    P_INCARNATION,
    P_KEEPS_ALL,
    P_KEEPS_SOME,
    P_KEPT,
    P_PID,
    P_PID_NAMESPACE,
    P_READING,
    P_STATE,
    PARTICIPANT_WORDS,
    VACANT,
    WORD_MASK,
    adopted_by,
)
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.locks import LockFile
from oobpickle._memory.unloaded import Unloaded

_REAP_EVERY: Final = 16
_BANK_INCLUDES: Final = N_COUNTERS  # a bank's word after its counters: the incarnation it includes


class Participants:
    """The table of participants over the ledger's words."""

    def __init__(self, ledger: Ledger) -> None:
        self.words = ledger.words
        self._ledger = ledger

    def _row(self, slot: int) -> int:
        return HEADER_WORDS + slot * PARTICIPANT_WORDS

    def join(self, locks: LockFile, unloaded: Unloaded | None = None) -> int | None:
        """Step: take a slot for this process and hold its byte for life.

        Parameters
        ----------
        locks : LockFile
            Of this process.
        unloaded : Unloaded, optional
            What the row says from the beginning.
        """
        words = self.words
        n_slots = self.n_slots
        slot = self._take_vacant(n_slots, locks)
        if slot is None and n_slots % _REAP_EVERY == 0 and self.reap(locks):
            slot = self._take_vacant(n_slots, locks)
        if slot is None:
            # The next one; further ones if the number of slots was overwritten.
            slots = range(n_slots, MAX_PARTICIPANTS)
            slot = next((slot for slot in slots if locks.hold(slot)), None)
        if slot is None:
            return None
        _faults.reach("participants.held")
        row = self._row(slot)
        for word in range(P_READING, PARTICIPANT_WORDS):
            words[row + word] = 0
        words[H_INCARNATION] = words[H_INCARNATION] + 1 & WORD_MASK
        words[row + P_INCARNATION] = words[H_INCARNATION]
        words[row + P_PID] = os.getpid()
        words[row + P_PID_NAMESPACE] = pid_namespace()
        words[H_N_SLOTS] = max(n_slots, slot + 1)
        if unloaded is not None:
            unloaded.show(words, row)
        words[row + P_STATE] = JOINED
        _faults.reach("participants.joined")
        return slot

    @property
    def n_slots(self) -> int:
        """How many slots were ever used, never more than there are."""
        return min(MAX_PARTICIPANTS, self.words[H_N_SLOTS])

    def _take_vacant(self, n_slots: int, locks: LockFile) -> int | None:
        for slot in range(n_slots):
            # A living one holds its byte, whatever was written over its state.
            if self.words[self._row(slot) + P_STATE] == VACANT and locks.hold(slot):
                return slot
        return None

    def reap(self, locks: LockFile, own_slot: int | None = None) -> int:
        """Step: recover every dead participant; return how many there were."""
        slots = range(self.n_slots)
        dead = [slot for slot in slots if slot != own_slot and self._is_dead(slot, locks)]
        if dead:
            self._ledger.recover(dead)
        for slot in dead:
            self._absorb(slot)
            self.words[self._row(slot) + P_STATE] = VACANT
            _faults.reach("participants.reaped")
        return len(dead)

    def _is_dead(self, slot: int, locks: LockFile) -> bool:
        return self.words[self._row(slot) + P_STATE] != VACANT and not locks.is_alive(slot)

    def _absorb(self, slot: int) -> None:
        words, row = self.words, self._row(slot)
        incarnation = words[row + P_INCARNATION]
        bank = words[H_BANK] & 1
        old, new = H_TOTALS + bank * BANK_WORDS, H_TOTALS + (1 - bank) * BANK_WORDS
        if words[old + _BANK_INCLUDES] == incarnation:
            return  # the process that reaped it died right after this
        for k in range(N_COUNTERS):
            words[new + k] = words[old + k] + words[row + P_COUNTERS + k] & WORD_MASK
        words[new + _BANK_INCLUDES] = incarnation
        _faults.reach("participants.summed")
        words[H_BANK] = 1 - bank
        _faults.reach("participants.absorbed")

    def counters(self) -> list[int]:
        """Step: sum the counters of all participants, living and dead."""
        words = self.words
        bank = H_TOTALS + (words[H_BANK] & 1) * BANK_WORDS
        sums = list(words[bank : bank + N_COUNTERS])
        for slot in range(self.n_slots):
            row = self._row(slot)
            if words[row + P_STATE] == JOINED and (
                words[row + P_INCARNATION] != words[bank + _BANK_INCLUDES]
            ):
                for k in range(N_COUNTERS):
                    sums[k] += words[row + P_COUNTERS + k]
        return sums

    def pids(self) -> list[int]:
        """Return the pids of all that joined and were not reaped; a hint for looking at /proc
        only."""
        rows = (self._row(slot) for slot in range(self.n_slots))
        return [self.words[row + P_PID] for row in rows if self.words[row + P_STATE] == JOINED]

    def living(self, locks: LockFile, own_slot: int) -> set[int]:
        """Return the pids, as /proc has them, of all that have joined and are alive.

        Those of other pid namespaces are left out.
        """
        namespace = pid_namespace()
        if namespace == 0:
            return set()
        found = {os.getpid()}
        for slot in range(self.n_slots):
            row = self._row(slot)
            joined = slot != own_slot and self.words[row + P_STATE] == JOINED
            if joined and self.words[row + P_PID_NAMESPACE] == namespace:
                pid = self.words[row + P_PID]
                if locks.is_alive(slot):
                    found.add(pid)
        return found

    def are_visible(self, locks: LockFile, own_slot: int) -> bool:
        """Tell whether /proc shows all that have joined and are alive."""
        namespace = pid_namespace()
        for slot in range(self.n_slots):
            row = self._row(slot)
            if self.words[row + P_STATE] != JOINED:
                continue
            is_ours = namespace != 0 and self.words[row + P_PID_NAMESPACE] == namespace
            if not (is_ours and os.path.exists(f"/proc/{self.words[row + P_PID]}")) and (
                slot == own_slot or locks.is_alive(slot)
            ):
                return False
        return True

    def kept(self) -> tuple[set[int], bool]:
        """Return of which messages in flight somebody may have the bytes, and load them.

        Returns
        -------
        kept : set of int
            `adopted_by` for each participant, living or not yet reaped, and what they list.
        keeps_all : bool
            There is more than could be listed.
        """
        words, kept, keeps_all = self.words, set[int](), False
        for slot in range(self.n_slots):
            row = self._row(slot)
            if words[row + P_STATE] == JOINED:
                kept.add(adopted_by(words[row + P_INCARNATION]))
                if words[row + P_KEEPS_SOME]:
                    kept.update(words[row + P_KEPT : row + P_KEPT + N_KEPT])
                    keeps_all = keeps_all or words[row + P_KEEPS_ALL] != 0
        kept.discard(0)
        return kept, keeps_all

    def readers(self) -> Iterable[tuple[int, int]]:
        """Yield ``(slot, number of messages it is in the middle of reading)``."""
        for slot in range(self.n_slots):
            row = self._row(slot)
            if self.words[row + P_STATE] == JOINED:
                yield slot, self.words[row + P_READING]


def pid_namespace() -> int:
    """Return what tells this process's pid namespace from others; 0 if /proc is not of it."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return 0
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        pass_on_foreign(error)
        return 0


class OwnRow:
    """This process's own row: counters and the reading word; only this process writes it."""

    def __init__(self, words: memoryview, slot: int) -> None:
        self._words = words
        self._row = HEADER_WORDS + slot * PARTICIPANT_WORDS
        self.incarnation = words[self._row + P_INCARNATION]
        # Re-entrant: a signal handler may send a message while this thread counts one.
        self._lock = threading.RLock()
        self.readings: set[object] = set()
        self.slot = slot

    def count(self, *amounts: tuple[int, int]) -> None:
        """Add to counters: pairs of counter and amount."""
        with self._lock:
            for counter, amount in amounts:
                at = self._row + P_COUNTERS + counter
                self._words[at] = self._words[at] + amount & WORD_MASK

    def publish_readings(self) -> None:
        """Write into the row how many messages may be between their channel and this process."""
        with self._lock:
            self._words[self._row + P_READING] = len(self.readings)
