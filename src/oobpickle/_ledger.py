"""The ledger: who has which block. Every method is one step, run under `LedgerMutex`.

**What.** The table of blocks in the ledger file: its free lists, its states, its sums.

**How it works.** A block belongs to nobody (FREE) or to exactly one participant::

    NONE --lease--> LEASED --seal--> IN FLIGHT --claim--> HELD --release--> FREE --lease--> LEASED
    ...
                      |                  |  of the dead: anybody may look if it can be read
                      +---- release -----+------------------------------------^

Each change is one store of the block's commit word. Everything else (free lists, sums, the number
of rows) can be rebuilt from the columns, and is, by whoever finds the dirty word set. `seal`
needs no lock: the block is the sender's alone, and the receiver reads the word after a system
call has ordered both.

Steps return; they do not raise, print, allocate containers of unknown size or call the system.

**Lifetime.** Rows are made when first needed and never destroyed; a generation counts each lease
of a block and is never reset, so an old placement is recognised for ever.

**When it cannot.** `lease` returns a `Shortage`; `claim` returns the index of the first block
that is not what the placement says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from oobpickle import _faults
from oobpickle._huge_pages import HUGE_NBYTES, NEVER
from oobpickle._layout import (
    BLOCKS_AT,
    C_CHANNEL,
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
    GENERATION_SHIFT,
    H_CAPACITY,
    H_DATA_NBYTES,
    H_EMPTY,
    H_FRONTIER,
    H_HELD,
    H_HUGE,
    H_N_BLOCKS,
    H_RESIDENT,
    H_WARM,
    HELD,
    IN_FLIGHT,
    LEASED,
    MAX_BLOCKS,
    N_CLASSES,
    NONE,
    OWNER_MASK,
    OWNER_SHIFT,
    STATE_MASK,
    class_nbytes,
    class_of,
    class_stride,
    commit_word,
)
from oobpickle._segment import page_round

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AFFINITY_DEPTH: Final = 8
_CLASSES_UP: Final = 4


class Shortage(NamedTuple):
    """Why blocks could not be leased: a reason of `_statistics.REASONS`, and the numbers."""

    reason: str
    need_nbytes: int
    room_nbytes: int


class Census(NamedTuple):
    """Blocks and bytes in use by state, from one look at all rows."""

    n_blocks: dict[str, int]
    nbytes: dict[str, int]


STATE_NAMES: Final = {FREE: "free", LEASED: "leased", IN_FLIGHT: "in_flight", HELD: "held"}


class Ledger:
    """The table of blocks over the ledger's words.

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

    def close(self) -> None:
        """Let go of the mapping: any use after this raises ``ValueError``."""
        for column in (
            *(self.word, self.generation, self.offset, self.size_class, self.used),
            *(self.resident, self.next, self.channel, self.last, self.punches, self.words),
        ):
            column.release()

    def _column(self, number: int) -> memoryview:
        start = BLOCKS_AT + number * MAX_BLOCKS
        return self.words[start : start + MAX_BLOCKS]

    def _array(self, column: memoryview) -> NDArray[np.uint64]:
        import numpy as np

        return np.frombuffer(column, np.uint64)[: self.words[H_N_BLOCKS]]

    def pages_nbytes(self, nbytes: int) -> int:
        """Return how many bytes the pages under the first `nbytes` bytes of a block take."""
        if nbytes >= HUGE_NBYTES and self.words[H_HUGE] != NEVER:
            return -(-nbytes // HUGE_NBYTES) * HUGE_NBYTES
        return page_round(nbytes)

    # --- leasing

    def lease(
        self, needs: Sequence[int], slot: int, taken: list[tuple[int, int]]
    ) -> Shortage | None:
        """Lease a block for each of the `needs` (bytes); append ``(index, nbytes present)``.

        Pages are accounted here but reserved later, by the holder, without the lock. On a
        shortage what was taken before it stays in `taken`, leased.
        """
        words = self.words
        for nbytes in needs:
            size_class = class_of(nbytes)
            index, link = self._find(size_class, nbytes, slot)
            present = self.resident[index] if index >= 0 else 0
            grow = self.pages_nbytes(nbytes) - present
            if grow > 0:
                room = words[H_CAPACITY] - words[H_RESIDENT]
                if grow > room:
                    return Shortage("full", nbytes, max(0, room))
            if index < 0:
                index = words[H_N_BLOCKS]
                shortage = self._make_row(index, size_class, nbytes)
                if shortage is not None:
                    return shortage
            else:
                words[link] = self.next[index]
                _faults.reach("ledger.lease.unlinked")
            if grow > 0:
                self.resident[index] += grow
                words[H_RESIDENT] += grow
            self._commit_lease(index, nbytes, slot)
            taken.append((index, present))
        return None

    def _commit_lease(self, index: int, nbytes: int, slot: int) -> None:
        generation = self.generation[index] + 1
        self.generation[index] = generation
        self.used[index] = nbytes
        self.channel[index] = 0
        self.last[index] = slot
        _faults.reach("ledger.lease.written")
        self.word[index] = commit_word(LEASED, slot, generation)
        _faults.reach("ledger.lease.committed")

    def _find(self, size_class: int, nbytes: int, slot: int) -> tuple[int, int]:
        """Return a free block and the word that links to it: warm, then empty; (-1, 0) if none."""
        words = self.words
        link = H_WARM + size_class
        if words[link]:
            return self._nearest(link, nbytes, slot)
        for up in range(link + 1, min(link + 1 + _CLASSES_UP, H_WARM + N_CLASSES)):
            if words[up] and self.resident[words[up] - 1] >= nbytes:
                return words[up] - 1, up
        link = H_EMPTY + size_class
        return (words[link] - 1, link) if words[link] else (-1, 0)

    def _nearest(self, first_link: int, nbytes: int, slot: int) -> tuple[int, int]:
        # What this process wrote last is in its page tables: 4 times the rate of the others.
        words, link = self.words, first_link
        next_at = BLOCKS_AT + C_NEXT * MAX_BLOCKS
        for _ in range(_AFFINITY_DEPTH):
            index = words[link] - 1
            if self.last[index] == slot and self.resident[index] >= nbytes:
                return index, link
            link = next_at + index
            if not words[link]:
                break
        return words[first_link] - 1, first_link

    def _make_row(self, index: int, size_class: int, nbytes: int) -> Shortage | None:
        words = self.words
        if index >= MAX_BLOCKS:
            return Shortage("table", nbytes, 0)
        offset = words[H_FRONTIER]
        if class_nbytes(size_class) >= HUGE_NBYTES:
            offset = -(-offset // HUGE_NBYTES) * HUGE_NBYTES
        end = offset + class_stride(size_class)
        if end > words[H_DATA_NBYTES]:
            return Shortage("table", nbytes, 0)
        self.offset[index] = offset
        self.size_class[index] = size_class
        self.resident[index] = 0
        _faults.reach("ledger.row.written")
        words[H_FRONTIER] = end
        words[H_N_BLOCKS] = index + 1
        _faults.reach("ledger.row.counted")
        return None

    # --- passing on

    def seal(self, blocks: Sequence[tuple[int, int]], slot: int, channel: int) -> None:
        """LEASED to IN FLIGHT, without the lock: the envelope is about to leave."""
        head, head_generation = blocks[0]
        for index, generation in blocks:
            self.channel[index] = channel if index == head else FOLLOWS | head
            self.next[index] = head_generation
            self.word[index] = commit_word(IN_FLIGHT, slot, generation)

    def adopt(self, index: int, generation: int, slot: int) -> None:
        """Make a reader the owner of a message that has left its channel, without the lock.

        Only inside `Membership.reading`: nobody frees it meanwhile.
        """
        if index < MAX_BLOCKS and self._is(index, generation, IN_FLIGHT):
            self.word[index] = commit_word(IN_FLIGHT, slot, generation)

    def claim(
        self, blocks: Sequence[tuple[int, int]], needs: Sequence[int], slot: int
    ) -> int | None:
        """IN FLIGHT to HELD for all ``(index, generation)``, or for none of them.

        Returns
        -------
        int or None
            The position of the first block that is not in flight with that generation and that
            many bytes, else ``None``.
        """
        for position, (index, generation) in enumerate(blocks):
            if not self._is(index, generation, IN_FLIGHT) or self.used[index] != needs[position]:
                return position
        for index, generation in blocks:
            self.word[index] = commit_word(HELD, slot, generation)
            _faults.reach("ledger.claim.committed")
            self.words[H_HELD] += self.used[index]
        return None

    def _is(self, index: int, generation: int, state: int) -> bool:
        return (
            index < self.words[H_N_BLOCKS]
            and self.generation[index] == generation
            and self.word[index] & STATE_MASK == state
        )

    # --- giving back

    def release(self, blocks: Iterable[tuple[int, int]], slot: int) -> None:
        """Free each ``(index, generation)`` that `slot` still owns; others are left alone."""
        for index, generation in blocks:
            word = self.word[index]
            state = word & STATE_MASK
            owner = word >> OWNER_SHIFT & OWNER_MASK
            if owner != slot or self.generation[index] != generation or state in (NONE, FREE):
                continue
            if state == HELD:
                self.words[H_HELD] = max(0, self.words[H_HELD] - self.used[index])
            _faults.reach("ledger.release.begun")
            self._free(index, generation)

    def _free(self, index: int, generation: int) -> None:
        self.word[index] = commit_word(FREE, 0, generation)
        _faults.reach("ledger.release.committed")
        link = (H_WARM if self.resident[index] else H_EMPTY) + self.size_class[index]
        self.next[index] = self.words[link]
        _faults.reach("ledger.release.linked")
        self.words[link] = index + 1

    def free_unread(self, words: Sequence[tuple[int, int]]) -> int:
        """Free blocks in flight whose commit word is still what the caller saw; return how many."""
        n_freed = 0
        for index, seen in words:
            if self.word[index] == seen and seen & STATE_MASK == IN_FLIGHT:
                self._free(index, self.generation[index])
                n_freed += 1
        return n_freed

    def forget_unknown(self, slot: int, known: set[int]) -> None:
        """After an interrupted step: free what `slot` owns without the process knowing."""
        for state in (LEASED, HELD):
            for index in self._owned(slot, state):
                if index not in known:
                    self.release([(index, self.generation[index])], slot)

    def _owned(self, slot: int, state: int) -> list[int]:
        import numpy as np

        low = np.uint64(OWNER_MASK << OWNER_SHIFT | STATE_MASK)
        word = self._array(self.word)
        return [int(i) for i in np.flatnonzero((word & low) == slot << OWNER_SHIFT | state)]

    def recover(self, slots: Collection[int]) -> None:
        """Free what dead participants leased or held: one look at all rows, however many died.

        What they sent is left as it is: a reader may be making it its own at this moment, without
        the lock. It is nobody's as long as nobody has the slot, and then its new owner's.
        """
        import numpy as np

        word = self._array(self.word)
        state = word & np.uint64(STATE_MASK)
        had = np.flatnonzero((state == LEASED) | (state == HELD))
        owner = word[had] >> np.uint64(OWNER_SHIFT) & np.uint64(OWNER_MASK)
        had = had[np.isin(owner, np.array(list(slots), np.uint64))]
        if not len(had):
            return  # the lists and sums are right: whoever died in a step left them to be rebuilt
        generation = word[had] & ~np.uint64((1 << 32) - 1)
        word[had] = generation | np.uint64(FREE)
        _faults.reach("ledger.recover.had")
        self.rebuild()

    # --- pages

    def take_idle(self, nbytes: int, slot: int, taken: list[int]) -> None:
        """Lease free blocks whose pages add up to `nbytes`, largest first, to punch them."""
        import numpy as np

        word, resident = self._array(self.word), self._array(self.resident)
        idle = np.flatnonzero(((word & np.uint64(STATE_MASK)) == FREE) & (resident > 0))
        idle = idle[np.argsort(resident[idle])[::-1]]
        enough = int(np.searchsorted(np.cumsum(resident[idle]), nbytes)) + 1
        for index in idle[:enough].tolist():
            self._commit_lease(index, 0, slot)
            taken.append(index)
        self.rebuild()

    def mark_punched(self, indices: Iterable[int]) -> None:
        """Account for blocks whose pages went back to the system."""
        for index in indices:
            self.words[H_RESIDENT] -= self.resident[index]
            self.resident[index] = 0
            self.punches[index] += 1
            _faults.reach("ledger.punched")

    # --- the whole table

    def rebuild(self) -> None:
        """Recompute the row count, the sums and the free lists from the columns."""
        words = self.words
        n = words[H_N_BLOCKS]
        while n < MAX_BLOCKS and self.word[n] & STATE_MASK != NONE:
            n += 1
        words[H_N_BLOCKS] = n
        self._mend_free_rows()
        self._rebuild_sums()
        self._rebuild_lists()

    def _mend_free_rows(self) -> None:
        # A row whose first lease was never committed becomes a free one, without pages; and a
        # generation that was counted but not committed stays used up.
        import numpy as np

        word = self._array(self.word)
        state = word & np.uint64(STATE_MASK)
        self._array(self.resident)[state == NONE] = 0
        free = state <= FREE
        generation = self._array(self.generation)[free]
        word[free] = generation << np.uint64(GENERATION_SHIFT) | np.uint64(FREE)

    def _rebuild_sums(self) -> None:
        import numpy as np

        words, word = self.words, self._array(self.word)
        held = (word & np.uint64(STATE_MASK)) == HELD
        words[H_HELD] = int(self._array(self.used)[held].sum())
        words[H_RESIDENT] = int(self._array(self.resident).sum())
        n = words[H_N_BLOCKS]
        if n:
            end = self.offset[n - 1] + class_stride(self.size_class[n - 1])
            words[H_FRONTIER] = max(words[H_FRONTIER], end)

    def _rebuild_lists(self) -> None:
        import numpy as np

        words = self.words
        for size_class in range(N_CLASSES):
            words[H_WARM + size_class] = words[H_EMPTY + size_class] = 0
        free = np.flatnonzero((self._array(self.word) & np.uint64(STATE_MASK)) == FREE)
        warm = self._array(self.resident)[free] > 0
        link = self._array(self.size_class)[free].astype(np.int16)  # few bits: a sort in one pass
        link += np.where(warm, H_WARM, H_EMPTY).astype(np.int16)
        # Lists lie one after another, and each in the order of addresses, the lowest at its head.
        order = np.argsort(link, kind="stable")
        free, link = free[order], link[order]
        following = np.zeros(len(free), np.uint64)
        following[:-1] = np.where(link[:-1] == link[1:], free[1:] + 1, 0)
        self._array(self.next)[free] = following
        first = np.flatnonzero(np.diff(link, prepend=-1))
        for at, index in zip(link[first].tolist(), free[first].tolist(), strict=True):
            words[at] = index + 1

    def census(self) -> Census:
        """Count blocks and bytes in use by state."""
        import numpy as np

        word, used, resident = (self._array(c) for c in (self.word, self.used, self.resident))
        state = word & np.uint64(STATE_MASK)
        n_blocks, nbytes = {}, {}
        for code, name in STATE_NAMES.items():
            chosen = state == code
            n_blocks[name] = int(chosen.sum())
            nbytes[name] = int((resident if code == FREE else used)[chosen].sum())
        return Census(n_blocks, nbytes)

    def is_abandoned(self, index: int) -> bool:
        """Tell whether a following block's message is gone: its first block is in other hands."""
        head = self.channel[index] & ~FOLLOWS
        return self.generation[head] != self.next[index] or self.word[head] & STATE_MASK == FREE

    def in_flight(self, others: Collection[int]) -> list[tuple[int, int, int]]:
        """Return ``(index, word, channel)`` of blocks in flight whose owner is not among `others`.

        Those are the blocks of the dead, and of the caller who leaves its own slot out.
        """
        import numpy as np

        # One look at all rows: others change them meanwhile.
        word = self._array(self.word).copy()
        owner = word >> np.uint64(OWNER_SHIFT) & np.uint64(OWNER_MASK)
        chosen = (word & np.uint64(STATE_MASK)) == IN_FLIGHT
        chosen &= ~np.isin(owner, np.array(list(others), np.uint64))
        return [(i, int(word[i]), self.channel[i]) for i in np.flatnonzero(chosen).tolist()]
