"""Where everything lies: the words of the ledger file, size classes, and buffers within blocks.

**What.** Constants and pure functions, shared by all that read or write the ledger.

**How it works.** The ledger is one array of aligned 64-bit words::

    header        0 ..... HEADER_WORDS     identity, options, counters, free-list heads, totals
    participants  + slot * PARTICIPANT_WORDS        state, incarnation, pid, reading, counters,
                                                    and whose messages it may have as bytes
    blocks        one column after the other, MAX_BLOCKS words each: word, generation, offset, ...

A block's *word* is its commit word; one store of it changes the block's state::

    bits 63..32  check     bits 31..8  slot of the owner     bits 7..0  state

What a faulty process may have overwritten is not believed: the check of a commit word covers the
block's index, its generation, owner and state; the column `C_CHECK` the place and the class of a
row; the number of rows and the bytes that have pages carry a check in the same word; and one word
of the header covers what never changes there.

Blocks come in size classes, four to each doubling, because a range is never split or merged:
address space is free and only pages cost, so a larger block used for less wastes nothing. `plan`
gives each big buffer a block of its own, so that a small survivor pins nothing, and packs small
ones, 64-byte aligned, into blocks of up to 1 MiB.

**Lifetime.** `VERSION` changes with the layout; a process with another one refuses to attach.

**When it cannot.** At most 2**20 blocks and 4,096 participants at a time.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from oobpickle._memory.huge_pages import HUGE_NBYTES
from oobpickle._system import PAGE_NBYTES

MAGIC: Final = int.from_bytes(b"OOBPICKL", "little")
VERSION: Final = 3

# --- header words
H_MAGIC: Final = 0
H_VERSION: Final = 1
H_IDENTITY: Final = 2  # and 3
H_CAPACITY: Final = 4
H_DATA_NBYTES: Final = 5
H_THRESHOLD: Final = 6
H_WAIT_TIMEOUT: Final = 7  # the bits of a double
H_COPY_ON_RECEIVE: Final = 8
H_CLOSED: Final = 9
H_STRANGERS: Final = 10  # a process that cannot join has read messages: none is known to be unread
H_HANDED: Final = 11  # how many ends of channels were passed on
H_HUGE: Final = 12  # how huge pages are to be had: `_huge_pages.policy`
H_CHECK: Final = 13  # of the words that never change
H_DATA_INODE: Final = 14  # which files belong to this ledger
H_LOCKS_INODE: Final = 15
H_DIRTY: Final = 16
H_N_BLOCKS: Final = 17
H_ROWS: Final = 18  # the same number with its check
H_RESIDENT: Final = 19  # bytes that blocks may occupy: reserved, not yet punched
H_HELD: Final = 20
H_N_SLOTS: Final = 21
H_BANK: Final = 22  # which of the two totals is valid
H_INCARNATION: Final = 23
H_SETTLED: Final = 24  # bytes with pages that free blocks have, or will have: see `Table.settled`
H_HANDED_ENDS: Final = 32  # the last of them
N_PASSED_ENDS: Final = 32
H_WARM: Final = 64  # heads of the free lists: blocks with pages
H_EMPTY: Final = 192  # and without
H_TOTALS: Final = 512  # two banks
BANK_WORDS: Final = 128
HEADER_WORDS: Final = 1024

N_CLASSES: Final = 128

# --- participants
MAX_PARTICIPANTS: Final = 4096
PARTICIPANT_WORDS: Final = 128
P_STATE: Final = 0
P_INCARNATION: Final = 1
P_PID: Final = 2
P_READING: Final = 3
P_PID_NAMESPACE: Final = 4
P_KEEPS_SOME: Final = 5  # there is something in `P_KEPT`
P_KEEPS_ALL: Final = 6  # there was more than fits
P_COUNTERS: Final = 8
P_KEPT: Final = 64  # 0, or what `C_CHANNEL` holds for messages that this process may still load
N_KEPT: Final = PARTICIPANT_WORDS - P_KEPT
N_COUNTERS: Final = P_KEPT - P_COUNTERS
VACANT: Final = 0
JOINED: Final = 1

# --- blocks
MAX_BLOCKS: Final = 1 << 20
N_COLUMNS: Final = 11
(
    C_WORD,
    C_GENERATION,
    C_OFFSET,
    C_CLASS,
    C_USED,
    C_RESIDENT,
    C_NEXT,
    C_CHANNEL,
    C_LAST,
    C_PUNCHES,
    C_CHECK,
) = range(N_COLUMNS)
BLOCKS_AT: Final = HEADER_WORDS + MAX_PARTICIPANTS * PARTICIPANT_WORDS
LEDGER_NBYTES: Final = (BLOCKS_AT + N_COLUMNS * MAX_BLOCKS) * 8

FREE: Final = 1
LEASED: Final = 2
IN_FLIGHT: Final = 3
HELD: Final = 4
QUARANTINED: Final = 5
STATE_MASK: Final = 0xFF
OWNER_SHIFT: Final = 8
OWNER_MASK: Final = 0xFFFFFF
LOW_MASK: Final = 0xFFFFFFFF  # of a commit word: owner and state
RESIDENT_MASK: Final = (1 << 48) - 1
WORD_MASK: Final = 0xFFFFFFFF_FFFFFFFF
#: In the channel column of a block in flight: it goes where its message's first block goes, whose
#: index is in the low bits and whose generation is in the next column.
FOLLOWS: Final = 1 << 62
#: In the channel column of the first block of a message that has left its channel; the rest is the
#: incarnation of the participant that has read it, and the low bits of the block's generation.
ADOPTED: Final = 1 << 61
#: Beside a channel that was not made by `multiprocessing.Pipe`: its readers may be no connections.
UNPROVEN: Final = 1 << 60
_INCARNATION_SHIFT: Final = 28
ADOPTION_MASK: Final = (1 << _INCARNATION_SHIFT) - 1
#: In the channel column of a free block: its pages were asked for, and are kept for a message.
PREPARED: Final = 1 << 59
#: In the next column of a block that is held: its pages go back to the system when it is released.
GOING: Final = 1

#: Buffers from this size on get a block each; smaller ones share blocks of at most `PACK_NBYTES`.
OWN_BLOCK_NBYTES: Final = 64 << 10
PACK_NBYTES: Final = 1 << 20
ALIGN_NBYTES: Final = 64


# Checks find faults, not attacks: one multiplication for each number, by odd constants. All of it
# works for columns too, as arrays of uint64 that wrap.
_BY_FIRST: Final = 0x9E3779B97F4A7C15
_BY_SECOND: Final = 0xC2B2AE3D27D4EB4F
_PLUS: Final = 0x165667B19E3779F9
_HIGH_MASK: Final = WORD_MASK - LOW_MASK
_CONSTANT_WORDS: Final = (
    *(H_MAGIC, H_VERSION, H_IDENTITY, H_IDENTITY + 1, H_CAPACITY, H_DATA_NBYTES),
    *(H_THRESHOLD, H_WAIT_TIMEOUT, H_COPY_ON_RECEIVE, H_HUGE, H_DATA_INODE, H_LOCKS_INODE),
)


def commit_word(index: int, state: int, owner: int, generation: int) -> int:
    """Compose the one word that says everything about a block."""
    word: int = checked_word(index, state | owner << OWNER_SHIFT, generation)
    return word


def checked_word(index: Any, low: Any, generation: Any) -> Any:
    """Return the commit word with the given low half: owner and state."""
    return generation * _BY_FIRST + (index << 32 | low) * _BY_SECOND + _PLUS & _HIGH_MASK | low


def adopted_by(incarnation: int, generation: int = 0) -> int:
    """Return what `C_CHANNEL` holds once a participant has read the message of that lease."""
    reader = (incarnation & LOW_MASK) << _INCARNATION_SHIFT
    return ADOPTED | reader | generation & ADOPTION_MASK


def row_check(index: Any, offset: Any, size_class: Any) -> Any:
    """Return what `C_CHECK` must hold for a row with that place and class."""
    return offset * _BY_FIRST + (index << 8 | size_class) * _BY_SECOND + _PLUS & WORD_MASK


def resident_word(index: Any, nbytes: Any) -> Any:
    """Return what `C_RESIDENT` holds for a block of which so many bytes (< 2**48) have pages."""
    return (nbytes * _BY_FIRST + index * _BY_SECOND + _PLUS & WORD_MASK - RESIDENT_MASK) | nbytes


def resident_nbytes(index: int, word: int) -> int:
    """Return how many bytes of a block have pages: 0 if the word is damaged, which harms nobody."""
    nbytes = word & RESIDENT_MASK
    return nbytes if word == resident_word(index, nbytes) else 0


def rows_word(n_rows: int) -> int:
    """Return what `H_ROWS` holds for so many rows; never 0."""
    return (n_rows * _BY_FIRST + _PLUS & _HIGH_MASK) | n_rows


def header_check(words: memoryview) -> int:
    """Return what `H_CHECK` must hold for the words of the header that never change."""
    check = 0
    for word in _CONSTANT_WORDS:
        check = (check ^ words[word]) * _BY_FIRST + _PLUS & WORD_MASK
    return check


def class_of(nbytes: int) -> int:
    """Return the smallest size class whose blocks hold `nbytes` bytes (> 0)."""
    n_pages = -(-nbytes // PAGE_NBYTES)
    if n_pages <= 4:
        return n_pages - 1
    shift = (n_pages - 1).bit_length() - 3
    return 4 * shift + ((n_pages - 1) >> shift)


def class_nbytes(size_class: int) -> int:
    """Return how many bytes a block of the class holds."""
    if size_class < 4:
        return (size_class + 1) * PAGE_NBYTES
    shift, step = divmod(size_class - 4, 4)
    return ((step + 5) << shift) * PAGE_NBYTES


def class_stride(size_class: int) -> int:
    """Return the address space of one block: its bytes, then a hole that an overflow falls into."""
    nbytes = class_nbytes(size_class)
    unit = HUGE_NBYTES if nbytes >= HUGE_NBYTES else PAGE_NBYTES
    return -(-(nbytes + PAGE_NBYTES) // unit) * unit


class Plan(NamedTuple):
    """How the buffers of one message lie in its blocks.

    Attributes
    ----------
    needs : list of int
        Bytes used of each block.
    places : list of (int, int)
        For each buffer: which of the blocks (-1: the buffer is empty), and the offset in it, bytes.
    """

    needs: list[int]
    places: list[tuple[int, int]]


def plan(sizes: list[int]) -> Plan:
    """Lay out buffers of the given nbytes. Sender and receiver compute the same."""
    needs: list[int] = []
    places: list[tuple[int, int]] = []
    pack = -1
    filled = PACK_NBYTES
    for nbytes in sizes:
        if nbytes >= OWN_BLOCK_NBYTES:
            places.append((len(needs), 0))
            needs.append(nbytes)
        elif nbytes == 0:
            places.append((-1, 0))
        else:
            if filled + nbytes > PACK_NBYTES:
                pack, filled = len(needs), 0
                needs.append(0)
            places.append((pack, filled))
            needs[pack] = filled + nbytes
            filled += -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES
    return Plan(needs, places)
