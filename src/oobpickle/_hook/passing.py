"""Passing on: which participants are about to start a program, or to become one.

**What.** `Mark` says so in the row of this process, and `marked` tells whose rows say so.

**How it works.** Who inherits a descriptor can be seen when a program runs: it is no participant,
and has the channel open. But there is a moment before that in which the process that starts it, or
becomes it, is a living participant still. A mark that is in the row from before that moment until
the program runs, or could not be started, covers it. It ends with the proof of life at an exec, not
a moment earlier, since the row is written anew by whoever has the slot next. A mark is a number in
the list of sources that a participant keeps, and no channel has it::

    bit 60    bit 59: of children    bits 32 to 55: a serial number    bits 0 to 31: the pid

A forked child inherits its parent's list. There a mark of the parent counts as long as the parent
has it; one *of children* counts in the child alone, and for good, since that does nothing but exec.

**Lifetime.** That of the row.

**When it cannot.** If the list is full there is no mark; a message that another process sends in
that moment reaches the program as an envelope. A child that another thread forks in the middle of
an ``os.spawnv`` has a mark of children for life, and gets its messages in-band."""

from __future__ import annotations

import itertools
import os
import struct
from typing import Final

from oobpickle._memory.arena import SharedArena
from oobpickle._native import core

_MARK: Final = 1 << 60
_OF_CHILDREN: Final = 1 << 59
_CHANNELS: Final = 7 << 61  # of bits, one of which is set in what is no mark
_SERIALS: Final = 1 << 24
_PIDS: Final = (1 << 32) - 1

_ROW_NBYTES: Final = 1024
_KEPT: Final = struct.Struct("64Q")
#: Of the list in the first row of the table; without the core nobody has a table.
_AT: Final = (
    core.LAYOUT["table.participants"] + core.LAYOUT["participant.kept"] if core is not None else 0
)
_serials: Final = itertools.count()


class Mark:
    """What says that this process is passing descriptors on.

    Parameters
    ----------
    blocks : Blocks
        Has the row.
    of_children : bool
        Whether those that are forked meanwhile do nothing but exec.
    """

    def __init__(self, blocks: core.Blocks, *, of_children: bool = False) -> None:
        self._blocks = blocks
        number = _MARK | next(_serials) % _SERIALS << 32 | os.getpid()
        self._numbers = [number, number | _OF_CHILDREN] if of_children else [number]

    def set(self) -> None:
        """Write it into the row, before the ends are passed on."""
        for number in self._numbers:
            self._blocks.keep(number)

    def clear(self) -> None:
        """Take it out of the row, once it can be seen who has inherited them."""
        for number in self._numbers:
            self._blocks.forget(number)


def marked(arena: SharedArena) -> set[int]:
    """Return the pids of the participants whose rows say so.

    To be asked before who lives: whoever has lost his mark by an exec is dead by then.
    """
    table, blocks = arena.descriptors[1], arena.blocks
    rows = list[tuple[int, int, set[int]]]()
    for slot, pid, _ in blocks.participants():
        kept = os.pread(table, _KEPT.size, _AT + slot * _ROW_NBYTES)
        if len(kept) == _KEPT.size:
            marks = {n for n in _KEPT.unpack(kept) if n & _MARK and not n & _CHANNELS}
            rows.append((slot, pid, marks))
    current = {mark for _, pid, marks in rows for mark in marks if mark & _PIDS == pid}
    # A program has the pid of the dead participant that has become it, and may have joined.
    return {
        pid
        for slot, pid, marks in rows
        if (marks & current or any(n & _OF_CHILDREN and n & _PIDS != pid for n in marks))
        and blocks.is_alive(slot)
    }
