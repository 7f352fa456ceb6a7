"""The table of an arena, read from its file by somebody who has not joined.

**What.** `Table`: who has joined, whose each block is, and the counters, at one moment.

**How it works.** With ``pread``, so that nothing is mapped and no hole of the file gets a page, and
without the lock. A row whose checks do not match is read again, since it may be half written; after
that it is damaged. Where a word is, `oobpickle._core` says; the rest is that of ``layout.h``.

**Lifetime.** What was read stays as it was. The descriptor is the caller's.

**When it cannot.** An `ArenaError` if it is none, or of another version. The processes go on
meanwhile, so numbers of one look may differ by what happened during it."""

from __future__ import annotations

import os
import struct
from typing import Any, Final, NamedTuple

from oobpickle._errors import ArenaError
from oobpickle._native import core

FREE, LEASED, IN_FLIGHT, HELD, RELEASED, EMPTIED, QUARANTINED, PUBLISHED = range(1, 9)
_JOINED: Final = 1
_WORD: Final = struct.Struct("<Q")
_ROW_NBYTES: Final = 64
_PARTICIPANT_NBYTES: Final = 1024
_LOW: Final = (1 << 32) - 1
_SLOT: Final = (1 << 24) - 1
_LOCK_SLOT: Final = (1 << 31) - 1
_PLACE_BITS: Final = 40
_ON_DISK: Final = 0x80
_RESIDENT: Final = (1 << 48) - 1
_NAMES: Final = 1 << 63
_BY_FIRST: Final = 0x9E3779B97F4A7C15
_BY_SECOND: Final = 0xC2B2AE3D27D4EB4F
_PLUS: Final = 0x165667B19E3779F9
_N_LOOKS: Final = 3

Amount = tuple[int, int]  # how many, and their bytes


class Joined(NamedTuple):
    """The row of a participant."""

    slot: int
    pid: int
    pid_namespace: int
    incarnation: int
    counters: tuple[int, ...]


class Table:
    """A table as it was when this was made, and its rows as they were when they were asked for.

    Parameters
    ----------
    fd : int
        Of the table file; needed as long as rows may be asked for.

    Attributes
    ----------
    identity : bytes
        Of the arena.
    capacity, data_inode, locks_inode : int
        What the header says of the arena and its other files.
    is_closed : bool
        Whether its block was left.
    lock_slot : int or None
        Who had the lock.
    resident, on_disk : int
        Bytes that blocks may occupy in memory, and on disk.
    n_ever : int
        How many have joined so far.
    joined : list of Joined
        By slot.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._head = os.pread(fd, core.HEADER_NBYTES, 0)
        try:
            words = core.constants(self._head)
        except ValueError as error:
            raise ArenaError(str(error)) from error
        if (nbytes := os.fstat(fd).st_size) != core.TABLE_NBYTES:
            raise ArenaError(f"the table has {nbytes} bytes, expected {core.TABLE_NBYTES}")
        self.identity, self.capacity = words[:2]
        self.data_inode, self.locks_inode = words[7:9]
        self.is_closed = bool(self._word("closed"))
        self.resident, self.on_disk = self._word("resident"), self._word("on_disk")
        self.n_ever = self._word("incarnation")
        holder = self._word("lock") & _LOCK_SLOT
        self.lock_slot = holder - 1 if holder else None
        self.joined = self._joined()

    def _word(self, name: str) -> int:
        return int(_WORD.unpack_from(self._head, core.LAYOUT[f"header.{name}"])[0])

    def counters(self) -> list[int]:
        """Return the sums over all participants, living and dead."""
        n, size = core.N_COUNTERS, _WORD.size
        at = core.LAYOUT["header.totals"] + (self._word("bank") & 1) * (n + 1) * size
        *sums, absorbed = struct.unpack_from(f"<{n + 1}Q", self._head, at)
        for one in self.joined:
            if one.incarnation != absorbed:  # else it is counted there already
                sums = [a + b for a, b in zip(sums, one.counters, strict=True)]
        return sums

    def rows(self) -> Rows:
        """Read the rows of the blocks."""
        return Rows(self._fd, min(self._word("n_rows") & _LOW, core.MOST_BLOCKS))

    def _joined(self) -> list[Joined]:
        start = core.LAYOUT["table.participants"]
        n_most = (core.LAYOUT["table.rows"] - start) // _PARTICIPANT_NBYTES
        n_slots = min(self._word("n_slots"), n_most)
        memory = os.pread(self._fd, n_slots * _PARTICIPANT_NBYTES, start)
        rows = struct.iter_unpack(f"<{_PARTICIPANT_NBYTES // _WORD.size}Q", memory)
        found = ((slot, _Words(row)) for slot, row in enumerate(rows))
        return [
            Joined(
                *(slot, row.word("pid"), row.word("pid_namespace"), row.word("incarnation")),
                row.words("counters", core.N_COUNTERS),
            )
            for slot, row in found
            if row.word("state") == _JOINED
        ]


class Rows:
    """The rows of all blocks.

    Attributes
    ----------
    state, owner, nbytes, kept, channel : ndarray of uint64
        Of each block; `nbytes` are those of messages, `kept` those that have pages.
    is_reference, is_on_disk : ndarray of bool
        Whether it names a published block, if it is in use; whether it lies in ``spill_dir``.
    """

    def __init__(self, fd: int, n_rows: int) -> None:
        import numpy as np

        damaged = np.arange(n_rows, dtype=np.uint64)
        for _ in range(_N_LOOKS):  # without the lock, one may be half written
            memory = os.pread(fd, n_rows * _ROW_NBYTES, core.LAYOUT["table.rows"])
            rows = np.frombuffer(memory, np.uint64).reshape(-1, _ROW_NBYTES // _WORD.size)
            damaged = damaged[~_are_sound(rows[damaged], damaged)]
        commit, used, kept, place, self.channel = (
            rows[:, core.LAYOUT[f"row.{name}"] // _WORD.size]
            for name in ("commit", "used", "resident", "place", "channel")
        )
        self.state = commit & np.uint64(0xFF)
        self.state[damaged] = QUARANTINED
        self.owner = commit >> np.uint64(8) & np.uint64(_SLOT)
        self.is_reference = used >= np.uint64(_NAMES)
        self.is_on_disk = place & np.uint64(_ON_DISK) != 0
        self.nbytes = np.where(self.is_reference, np.uint64(0), used)
        self.kept = kept & np.uint64(_RESIDENT)

    def amount(self, which: Any) -> Amount:
        """Return how many blocks of a selection there are, and the bytes in them."""
        return int(which.sum()), int(self.nbytes[which].sum())


class _Words:
    """The words of a participant's row."""

    def __init__(self, words: tuple[int, ...]) -> None:
        self._words = words

    def words(self, name: str, n: int) -> tuple[int, ...]:
        at = core.LAYOUT[f"participant.{name}"] // _WORD.size
        return self._words[at : at + n]

    def word(self, name: str) -> int:
        return self.words(name, 1)[0]


def _are_sound(rows: Any, index: Any) -> Any:
    """Tell of each row whether the checks of its commit word and its place match."""
    import numpy as np

    commit, generation, place = (
        rows[:, core.LAYOUT[f"row.{name}"] // _WORD.size]
        for name in ("commit", "generation", "place")
    )
    low, at = commit & np.uint64(_LOW), place & np.uint64((1 << _PLACE_BITS) - 1)
    first, second, plus = map(np.uint64, (_BY_FIRST, _BY_SECOND, _PLUS))

    def is_of(low: Any, generation: Any) -> Any:
        mixed = generation * first + (index << np.uint64(32) | low) * second + plus
        return commit == (mixed & ~np.uint64(_LOW) | low)

    # A generation that was counted and not committed: its owner died, or is in the middle of it.
    is_torn = is_of(np.full_like(low, FREE), generation - np.uint64(1))
    mixed = at * first + index * second + plus
    is_placed = place == (mixed >> np.uint64(_PLACE_BITS) << np.uint64(_PLACE_BITS) | at)
    return (is_of(low, generation) | is_torn) & is_placed
