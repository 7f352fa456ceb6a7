"""An onlooker: the arenas of another process, as one sees them who has not joined.

**What.** `arenas_of` finds the arenas whose files a process has open; `Seen` says who has joined,
whether they live, what each of them has, and what waits in which channel.

**How it works.** The files are opened through ``/proc/PID/fd``, for reading only. Whether a
participant lives is asked of the kernel (F_OFD_GETLK), as its fellows do. A message in flight is
shown where it waits, not as its sender's, whose slot may be a newcomer's by now.

**Lifetime.** Descriptors are closed before `arenas_of` returns.

**When it cannot.** An `OSError` if there is no such process, or it may not be looked into;
`ArenaError` if what it has is of another version."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from typing import Final

from oobpickle import _statistics
from oobpickle._foreign import ignoring
from oobpickle._memory.descriptors import File
from oobpickle._memory.reclaim import ADOPTED, FOLLOWS, UNPROVEN
from oobpickle._memory.table import (
    EMPTIED,
    FREE,
    HELD,
    IN_FLIGHT,
    LEASED,
    PUBLISHED,
    QUARANTINED,
    RELEASED,
    Amount,
    Joined,
    Rows,
    Table,
)
from oobpickle._native import core
from oobpickle._statistics import Statistics

_TABLE_NAME: Final = "/memfd:oobpickle-table"
_F_OFD_GETLK: Final = 36
_LOCK: Final = struct.Struct("hhqqi4x")
_NONE: Final[Amount] = (0, 0)
_ADOPTION_SHIFT: Final = 28
_INCARNATION: Final = (1 << 32) - 1
#: A descriptor that can do nothing but tell what the file is, and the file.
Found = dict[File, tuple[int, os.stat_result]]


@dataclass(frozen=True, slots=True)
class Participant:
    """A process that has joined.

    Attributes
    ----------
    pid, pid_namespace : int
        As the table has them: the pid is that of its namespace.
    is_alive : bool or None
        By the proof of life; ``None`` if it cannot be asked.
    has_the_lock : bool
        Of the table.
    leased, held : (int, int)
        Blocks that it writes a message into, and that it has received; their bytes.
    read : (int, int)
        Blocks of messages that it has taken from their channel and not loaded yet; their bytes.
    n_references : int
        Of the leased and held ones, those that name a published block.
    """

    pid: int
    pid_namespace: int
    is_alive: bool | None
    has_the_lock: bool
    leased: Amount
    read: Amount
    held: Amount
    n_references: int

    @property
    def nbytes(self) -> int:
        """Bytes of all that it has."""
        return self.leased[1] + self.read[1] + self.held[1]


@dataclass(frozen=True, slots=True)
class Seen:
    """An arena at one moment.

    Attributes
    ----------
    identity : bytes
        16 bytes that name it.
    is_closed : bool
        Whether its block was left.
    n_gone : int
        How many have joined and ended, besides those of `participants` that are dead.
    participants : tuple of Participant
        By slot.
    unread : dict of int to (int, int)
        Messages in flight, and their bytes, by the channel in which they wait (see
        `pipes.channel_id`); 0 where that is not known.
    statistics : Statistics
        As a participant would see them.
    """

    identity: bytes
    is_closed: bool
    n_gone: int
    participants: tuple[Participant, ...]
    unread: dict[int, Amount]
    statistics: Statistics


def arenas_of(pid: int) -> list[Seen]:
    """Return the arenas whose files a process has open; none if it has none.

    Raises
    ------
    OSError
        If there is no such process, or this one may not look into it.
    ArenaError
        If it has an arena of another version.
    """
    found: Found = {}
    try:
        tables = _look_for(pid, found)
        return [_seen(path, found) for path in tables]
    finally:
        for path, _ in found.values():
            os.close(path)


def _look_for(pid: int, found: Found) -> list[int]:
    """Fill in the nameless files that the process has open; return which are tables."""
    tables = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with ignoring(FileNotFoundError):  # closed meanwhile
            name = os.readlink(f"/proc/{pid}/fd/{number}")
            # To look is all that can be done with such a descriptor: to open a strange file can
            # have effects.
            path = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
            status = os.fstat(path)
            file = status.st_dev, status.st_ino
            if file in found or not stat.S_ISREG(status.st_mode) or status.st_nlink:
                os.close(path)
                continue
            found[file] = path, status
            if status.st_size == core.TABLE_NBYTES or name.startswith(_TABLE_NAME):
                tables.append(path)
    return tables


def _seen(path: int, found: Found) -> Seen:
    fd = _opened(path)
    try:
        table = Table(fd)
        rows = table.rows()
    finally:
        os.close(fd)
    by_inode = {inode: one for (_, inode), one in found.items()}
    locks = by_inode.get(table.locks_inode)
    data = by_inode.get(table.data_inode)
    unread, read = _in_flight(rows)
    fd = -1 if locks is None else _opened(locks[0])
    try:
        participants = tuple(
            _participant(one, rows, _is_alive(fd, one.slot), table.lock_slot, read)
            for one in table.joined
        )
    finally:
        if fd >= 0:
            os.close(fd)
    resident = table.resident if data is None else data[1].st_blocks * 512
    statistics = _statistics_of(table, rows, resident)
    n_gone = max(0, table.n_ever - len(table.joined))
    return Seen(table.identity, table.is_closed, n_gone, participants, unread, statistics)


def _opened(path: int) -> int:
    return os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC)


def _is_alive(locks: int, slot: int) -> bool | None:
    wanted = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 1 + slot, 1, 0)
    with ignoring(OSError):  # a file that is not there, or has no such locks
        return bool(_LOCK.unpack(fcntl.fcntl(locks, _F_OFD_GETLK, wanted))[0] != fcntl.F_UNLCK)
    return None


def _participant(
    one: Joined,
    rows: Rows,
    is_alive: bool | None,
    lock_slot: int | None,
    read: dict[int, Amount],
) -> Participant:
    is_its = rows.owner == one.slot
    leased, held = is_its & (rows.state == LEASED), is_its & (rows.state == HELD)
    return Participant(
        pid=one.pid,
        pid_namespace=one.pid_namespace,
        is_alive=is_alive,
        has_the_lock=lock_slot == one.slot,
        leased=rows.amount(leased),
        read=read.get(one.incarnation & _INCARNATION, _NONE),
        held=rows.amount(held),
        n_references=int(((leased | held) & rows.is_reference).sum()),
    )


def _in_flight(rows: Rows) -> tuple[dict[int, Amount], dict[int, Amount]]:
    """Return messages by the channel that they wait in, and blocks by who has read them."""
    unread: dict[int, Amount] = {}
    read: dict[int, Amount] = {}
    n_rows = len(rows.channel)
    for index in (rows.state == IN_FLIGHT).nonzero()[0]:
        own = channel = int(rows.channel[index])
        nbytes = int(rows.nbytes[index])
        if own & FOLLOWS:  # the message's first block says where it is
            first = own & (core.MOST_BLOCKS - 1)
            channel = int(rows.channel[first]) if first < n_rows else 0
        if channel & FOLLOWS:  # that one is another message's by now
            channel = 0
        if channel & ADOPTED:
            _add(read, channel >> _ADOPTION_SHIFT & _INCARNATION, 1, nbytes)
        else:
            _add(unread, channel & ~UNPROVEN, 0 if own & FOLLOWS else 1, nbytes)
    return unread, read


def _add(amounts: dict[int, Amount], key: int, n: int, nbytes: int) -> None:
    n_before, nbytes_before = amounts.get(key, _NONE)
    amounts[key] = n_before + n, nbytes_before + nbytes


def _statistics_of(table: Table, rows: Rows, resident: int) -> Statistics:
    state = rows.state
    is_free = (state == FREE) | (state == RELEASED) | (state == EMPTIED)
    nbytes_kept = int(rows.kept[is_free & (state != EMPTIED) & ~rows.is_on_disk].sum())
    is_used = (state == LEASED) | (state == IN_FLIGHT) | (state == HELD)

    def amount(one: int) -> Amount:
        """Of blocks in that state, and the bytes of those in memory."""
        return rows.amount(state == one)[0], rows.amount((state == one) & ~rows.is_on_disk)[1]

    amounts = {
        "free": (int(is_free.sum()), nbytes_kept),
        "leased": amount(LEASED),
        "in_flight": amount(IN_FLIGHT),
        "held": amount(HELD),
    }
    n_published, nbytes_published = rows.amount(state == PUBLISHED)
    return _statistics.summed(
        table.counters(),
        n_participants=len(table.joined),
        n_quarantined=int((state == QUARANTINED).sum()),
        n_blocks={name: amounts[name][0] for name in _statistics.STATES},
        nbytes={name: amounts[name][1] for name in _statistics.STATES},
        n_published=n_published,
        nbytes_published=nbytes_published,
        n_references=int(((is_used | (state == PUBLISHED)) & rows.is_reference).sum()),
        nbytes_resident=resident,
        nbytes_on_disk=table.on_disk,
        nbytes_huge=0,
        capacity=table.capacity,
    )
