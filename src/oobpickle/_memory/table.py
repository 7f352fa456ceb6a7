"""The table of blocks: its columns, and looks at all of its rows.

**What.** `Table` has a column for each field of a block's entry, rebuilds what can be recomputed
from them, and counts.

**How it works.** A look at all rows is a few vector operations on the columns, and tells which
entries are in order. Under the lock `rebuild` makes the free lists and sums anew from it, frees
what was being leased when its owner died, and quarantines what is damaged. `census` and `in_flight`
need no lock: others change entries and make rows meanwhile.

**Lifetime.** As long as the mapping of the ledger file; `close` lets go of it.

**When it cannot.** After `close` every use raises ``ValueError``."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final, NamedTuple

from oobpickle._memory.huge_pages import HUGE_NBYTES, NEVER
from oobpickle._memory.layout import (
    ADOPTED,
    ADOPTION_MASK,
    BLOCKS_AT,
    C_CHANNEL,
    C_CHECK,
    C_CLASS,
    C_GENERATION,
    C_LAST,
    C_NEXT,
    C_OFFSET,
    C_PUNCHES,
    C_RESIDENT,
    C_USED,
    C_WORD,
    FOLLOWS,
    FREE,
    GOING,
    H_CAPACITY,
    H_EMPTY,
    H_HELD,
    H_HUGE,
    H_RESIDENT,
    H_SETTLED,
    H_WARM,
    HELD,
    IN_FLIGHT,
    LEASED,
    LOW_MASK,
    MAX_BLOCKS,
    N_CLASSES,
    OWNER_MASK,
    OWNER_SHIFT,
    PREPARED,
    QUARANTINED,
    RESIDENT_MASK,
    STATE_MASK,
    UNPROVEN,
    checked_word,
    resident_nbytes,
    resident_word,
    row_check,
)
from oobpickle._memory.rows import Rows
from oobpickle._memory.segment import page_round

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_N_LOOKS: Final = 3


class Census(NamedTuple):
    """Blocks and bytes in use by state, and damaged blocks, from one look at all rows."""

    n_blocks: dict[str, int]
    nbytes: dict[str, int]
    n_quarantined: int


class Look(NamedTuple):
    """One look at all rows. `sound`: the entry is in order; `torn`: but for a lease begun."""

    rows: NDArray[np.uint64]
    word: NDArray[np.uint64]
    state: NDArray[np.uint64]
    sound: NDArray[np.bool_]
    torn: NDArray[np.bool_]

    @property
    def damaged(self) -> NDArray[np.bool_]:
        """The entries that are in no order that any step leaves."""
        return ~(self.sound | self.torn)

    def of_state(self, state: int) -> NDArray[np.intp]:
        """Return the indices of the sound rows in that state."""
        import numpy as np

        return np.flatnonzero((self.state == state) & self.sound)


STATE_NAMES: Final = {FREE: "free", LEASED: "leased", IN_FLIGHT: "in_flight", HELD: "held"}


class Table:
    """The columns of the blocks, over the ledger's words.

    Parameters
    ----------
    words : memoryview
        The whole ledger file as 64-bit words.
    """

    def __init__(self, words: memoryview) -> None:
        self.words = words
        self.word = self._column(C_WORD)
        self.generation = self._column(C_GENERATION)
        self.offset = self._column(C_OFFSET)
        self.size_class = self._column(C_CLASS)
        self.used = self._column(C_USED)
        self.resident = self._column(C_RESIDENT)
        self.next = self._column(C_NEXT)
        self.channel = self._column(C_CHANNEL)
        self.last = self._column(C_LAST)
        self.punches = self._column(C_PUNCHES)
        self.check = self._column(C_CHECK)
        self.rows = Rows(words)
        self.capacity = words[H_CAPACITY]
        self.huge = words[H_HUGE]

    def close(self) -> None:
        """Let go of the mapping: any use after this raises ``ValueError``."""
        for column in (
            *(self.word, self.generation, self.offset, self.size_class, self.used),
            *(self.resident, self.next, self.channel, self.last, self.punches, self.check),
            self.words,
        ):
            column.release()

    def _column(self, number: int) -> memoryview:
        start = BLOCKS_AT + number * MAX_BLOCKS
        return self.words[start : start + MAX_BLOCKS]

    def array(self, column: memoryview, n_rows: int | None = None) -> NDArray[np.uint64]:
        import numpy as np

        return np.frombuffer(column, np.uint64)[: self.rows.n_rows if n_rows is None else n_rows]

    def pages_nbytes(self, nbytes: int) -> int:
        """Return how many bytes the pages under the first `nbytes` bytes of a block take."""
        if nbytes >= HUGE_NBYTES and self.huge != NEVER:
            return -(-nbytes // HUGE_NBYTES) * HUGE_NBYTES
        return page_round(nbytes)

    def resident_nbytes(self, index: int) -> int:
        """Return how many bytes of a block have pages; 0 if that is damaged, which harms nobody."""
        return resident_nbytes(index, self.resident[index])

    def pages_of(self, index: int) -> tuple[int, int]:
        """Return offset and nbytes of the pages of a block of this process, never of another."""
        offset = self.rows.offset(index)
        return offset, min(self.resident_nbytes(index), self.rows.known[index].end - offset)

    # --- the whole table

    def look(self) -> Look:
        """Look at all rows, and check each."""
        import numpy as np

        n_rows = self.rows.n_rows  # once: without the lock there can be more at any moment
        index = np.arange(n_rows, dtype=np.uint64)
        # A copy: others seal and adopt meanwhile.
        word = self.array(self.word, n_rows).copy()
        generation = self.array(self.generation, n_rows)
        offset, size_class = self.array(self.offset, n_rows), self.array(self.size_class, n_rows)
        state = word & np.uint64(STATE_MASK)
        placed = self.array(self.check, n_rows) == row_check(index, offset, size_class)
        placed &= size_class < N_CLASSES
        sound = placed & (word == checked_word(index, word & np.uint64(LOW_MASK), generation))
        # A generation that was counted but not committed.
        before = checked_word(index, FREE, generation - np.uint64(1))
        return Look(index, word, state, sound, placed & ~sound & (word == before))

    def _resident(self, look: Look) -> NDArray[np.uint64]:
        import numpy as np

        word = self.array(self.resident, len(look.rows))
        nbytes = word & np.uint64(RESIDENT_MASK)
        return np.where(word == resident_word(look.rows, nbytes), nbytes, np.uint64(0))

    def rebuild(self) -> None:
        """Recompute the free lists and sums from the columns, and quarantine what is damaged."""
        self.rows.recount()
        self._mend_rows()
        look = self.look()
        resident = self._resident(look)
        self._rebuild_sums(look, resident)
        self._rebuild_lists(look, resident)

    def _mend_rows(self) -> None:
        import numpy as np

        look = self.look()
        word, generation = self.array(self.word), self.array(self.generation)
        torn = look.torn  # the generation stays used up
        word[torn] = checked_word(look.rows[torn], FREE, generation[torn])
        bad = look.damaged
        if bad.any():
            # Written again where it is quarantined already.
            word[bad] = checked_word(look.rows[bad], np.uint64(QUARANTINED), generation[bad])

    def _rebuild_sums(self, look: Look, resident: NDArray[np.uint64]) -> None:
        used = self.array(self.used)[look.of_state(HELD)]
        self.words[H_HELD] = int(used.sum())
        self.words[H_RESIDENT] = int(resident.sum())
        self.words[H_SETTLED] = self.settled(look, resident)

    def settled(self, look: Look, resident: NDArray[np.uint64]) -> int:
        """Return the bytes with pages that free blocks have if all that is held is dropped.

        Without those of blocks that are held and `GOING`, or free and `PREPARED`.
        """
        free, held = look.of_state(FREE), look.of_state(HELD)
        free = free[self.array(self.channel)[free] == PREPARED]
        held = held[self.array(self.next)[held] == GOING]
        # What is damaged counts: it has its pages, and may be held.
        others = (free, held, look.of_state(LEASED), look.of_state(IN_FLIGHT))
        return int(resident.sum()) - sum(int(resident[rows].sum()) for rows in others)

    def _rebuild_lists(self, look: Look, resident: NDArray[np.uint64]) -> None:
        import numpy as np

        words = self.words
        for size_class in range(N_CLASSES):
            words[H_WARM + size_class] = words[H_EMPTY + size_class] = 0
        free = look.of_state(FREE)
        warm = resident[free] > 0
        link = self.array(self.size_class)[free].astype(np.int16)  # few bits: a sort in one pass
        link += np.where(warm, H_WARM, H_EMPTY).astype(np.int16)
        # Lists lie one after another, and each in the order of addresses, the lowest at its head.
        order = np.argsort(link, kind="stable")
        free, link = free[order], link[order]
        following = np.zeros(len(free), np.uint64)
        following[:-1] = np.where(link[:-1] == link[1:], free[1:] + 1, 0)
        self.array(self.next)[free] = following
        first = np.flatnonzero(np.diff(link, prepend=-1))
        for at, index in zip(link[first].tolist(), free[first].tolist(), strict=True):
            words[at] = index + 1

    def census(self) -> Census:
        """Count blocks and bytes in use by state, and what is or must be quarantined."""
        look = self.look()
        used, resident = self.array(self.used, len(look.rows)), self._resident(look)
        n_blocks, nbytes = {}, {}
        for code, name in STATE_NAMES.items():
            chosen = look.of_state(code)
            n_blocks[name] = len(chosen)
            nbytes[name] = int((resident if code == FREE else used)[chosen].sum())
        n_bad = len(look.of_state(QUARANTINED)) + self._n_damaged(look)
        return Census(n_blocks, nbytes, n_bad)

    def _n_damaged(self, look: Look) -> int:
        """Return how many entries are in disorder: without the lock, one may be half written."""
        damaged = look.damaged
        for _ in range(_N_LOOKS):
            if not damaged.any():
                break
            damaged &= self.look().damaged[: len(damaged)]
        return int(damaged.sum())

    def owned_by(self, slot: int, state: int) -> list[int]:
        """Return the blocks of a participant that are in a state."""
        import numpy as np

        low = np.uint64(OWNER_MASK << OWNER_SHIFT | STATE_MASK)
        word = self.array(self.word)
        return [int(i) for i in np.flatnonzero((word & low) == slot << OWNER_SHIFT | state)]

    def in_flight(
        self, others: Collection[int], kept: Collection[int] = (), *, keeps_all: bool = False
    ) -> list[tuple[int, int, int]]:
        """Return ``(index, word, channel)`` of blocks in flight that may be nobody's.

        Those are the blocks of the dead, and of the caller who leaves its own slot out; and those
        of messages whose reader is not among `kept`, whoever sent them.

        Parameters
        ----------
        others : collection of int
            Slots of participants who may still be writing what they sent.
        kept : collection of int
            Channels, and `adopted_by` of incarnations, whose messages somebody may still load.
        keeps_all : bool
            Somebody may load the messages of any channel.
        """
        import numpy as np

        index, word = self._sent()
        channel, generation = (self.array(c)[index] for c in (self.channel, self.generation))
        mask = np.uint64(ADOPTION_MASK)
        is_read = channel & np.uint64(ADOPTED | FOLLOWS) == ADOPTED
        # An adoption that came too late, for an earlier lease of the block, says nothing.
        is_of_lease = (channel ^ generation) & mask == 0
        owner = word >> np.uint64(OWNER_SHIFT) & np.uint64(OWNER_MASK)
        nobodys = ~_are_among(owner, others)
        if keeps_all:
            nobodys &= channel & np.uint64(FOLLOWS) != 0
        source = np.where(is_read, channel & ~mask, channel & ~np.uint64(UNPROVEN))
        chosen = np.where(is_read, is_of_lease, nobodys)
        chosen &= ~_are_among(source, kept)
        columns = (column[chosen].tolist() for column in (index, word, channel))
        return list(zip(*columns, strict=True))

    def _sent(self) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
        """Return index and word of the blocks in flight, from one look: others change them."""
        import numpy as np

        word = self.array(self.word).copy()
        index = np.flatnonzero((word & np.uint64(STATE_MASK)) == IN_FLIGHT)
        return index, word[index]

    def sources(self) -> set[int]:
        """Return where messages in flight are: channels, and `adopted_by` of who has read them."""
        channels = {self.channel[index] for index in self._sent()[0].tolist()}
        is_read = {channel for channel in channels if channel & (FOLLOWS | ADOPTED) == ADOPTED}
        return {channel & ~ADOPTION_MASK for channel in is_read} | {
            channel & ~UNPROVEN for channel in channels - is_read
        }

    def abandoned(self) -> list[tuple[int, int]]:
        """Return ``(index, word)`` of blocks in flight that follow a first block which is gone.

        Nobody can load the rest of such a message, whoever sent it.
        """
        import numpy as np

        index, word = self._sent()
        channel = self.array(self.channel)[index]
        head = channel & ~np.uint64(FOLLOWS)
        # A link that leads beyond the rows is damaged: whoever loads the message frees it.
        follows = (channel & np.uint64(FOLLOWS) != 0) & (head < self.rows.n_rows)
        index, word, head = index[follows], word[follows], head[follows].astype(np.intp)
        state = self.array(self.word)[head] & np.uint64(STATE_MASK)
        gone = (state == FREE) | (state == QUARANTINED)
        gone |= self.array(self.generation)[head] != self.array(self.next)[index]
        return list(zip(index[gone].tolist(), word[gone].tolist(), strict=True))


def _are_among(numbers: NDArray[np.uint64], values: Collection[int]) -> NDArray[np.bool_]:
    """Return ``numpy.isin(numbers, values)``, which imports more of NumPy as it goes."""
    import numpy as np

    if not values:
        return np.zeros(len(numbers), np.bool_)
    known = np.sort(np.array(list(values), np.uint64))
    at = np.searchsorted(known, numbers)
    found: NDArray[np.bool_] = known[np.minimum(at, len(known) - 1)] == numbers
    return found
