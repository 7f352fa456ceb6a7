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

A faulty process may write anywhere in the file. So nothing that is read from it is believed
unchecked (see `_layout`, `_rows`): a block whose commit word is not what its index, generation,
owner and state make is QUARANTINED when somebody meets it, and never used again; a link that
leads to a block that is not free makes the lists be rebuilt from the commit words.

**Lifetime.** A generation counts each lease of a block and is never reset, so an old placement is
recognised for ever.

**When it cannot.** `lease` returns a `Shortage`; `claim` returns the position of the first block
that is not what the placement says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from oobpickle import _faults
from oobpickle._huge_pages import HUGE_NBYTES, NEVER
from oobpickle._layout import (
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
    H_CAPACITY,
    H_EMPTY,
    H_HELD,
    H_HUGE,
    H_RESIDENT,
    H_WARM,
    HELD,
    IN_FLIGHT,
    LEASED,
    LOW_MASK,
    MAX_BLOCKS,
    N_CLASSES,
    OWNER_MASK,
    OWNER_SHIFT,
    QUARANTINED,
    RESIDENT_MASK,
    STATE_MASK,
    WORD_MASK,
    checked_word,
    class_of,
    commit_word,
    resident_nbytes,
    resident_word,
    row_check,
)
from oobpickle._rows import Rows, Shortage
from oobpickle._segment import page_round

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AFFINITY_DEPTH: Final = 8
_CLASSES_UP: Final = 4
_N_LOOKS: Final = 3


class Census(NamedTuple):
    """Blocks and bytes in use by state, and damaged blocks, from one look at all rows."""

    n_blocks: dict[str, int]
    nbytes: dict[str, int]
    n_quarantined: int


class _Look(NamedTuple):
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

    def _array(self, column: memoryview, n_rows: int | None = None) -> NDArray[np.uint64]:
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

    # --- what is believed

    def is_sound(self, index: int) -> bool:
        """Tell whether a block's entry is in order, and not quarantined."""
        if not (self.rows.known.get(index) or self.rows.get(index)):
            return False
        word = self.word[index]
        return word & STATE_MASK != QUARANTINED and word == checked_word(
            index, word & LOW_MASK, self.generation[index]
        )

    def is_in_flight(self, index: int, generation: int) -> bool:
        """Tell whether the message of the block's lease with that generation is unread.

        Needs no lock.
        """
        if not (self.rows.known.get(index) or self.rows.get(index)):
            return False
        word = self.word[index]
        return (
            word & STATE_MASK == IN_FLIGHT
            and self.generation[index] == generation
            and word == checked_word(index, word & LOW_MASK, generation)
        )

    def examine(self, index: int) -> bool:
        """Step: quarantine a block that is damaged; tell whether it is, or was before."""
        if index >= self.rows.n_rows or self.is_sound(index):
            return False
        self.word[index] = commit_word(index, QUARANTINED, 0, self.generation[index])
        return True

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
            if index >= 0 and not self._is_free(index, nbytes):
                index, link = self._find_anew(size_class, nbytes, slot)
            present = self.resident_nbytes(index) if index >= 0 else 0
            grow = self.pages_nbytes(nbytes) - present
            if grow > 0:
                room = self.capacity - words[H_RESIDENT]
                if grow > room:
                    return Shortage("full", nbytes, max(0, room))
            if index < 0:
                made = self.rows.make(size_class, nbytes)
                if isinstance(made, Shortage):
                    return made
                index = made
            else:
                words[link] = self.next[index]
                _faults.reach("ledger.lease.unlinked")
            if grow > 0:
                self.resident[index] = resident_word(index, present + grow)
                words[H_RESIDENT] += grow
            self._commit_lease(index, nbytes, slot)
            taken.append((index, present))
        return None

    def _commit_lease(self, index: int, nbytes: int, slot: int) -> None:
        generation = self.generation[index] + 1 & WORD_MASK
        self.generation[index] = generation
        self.used[index] = nbytes
        self.channel[index] = 0
        self.last[index] = slot
        _faults.reach("ledger.lease.written")
        self.word[index] = commit_word(index, LEASED, slot, generation)
        _faults.reach("ledger.lease.committed")

    def _find_anew(self, size_class: int, nbytes: int, slot: int) -> tuple[int, int]:
        self.rebuild()  # a link, or what it leads to, was overwritten
        index, link = self._find(size_class, nbytes, slot)
        return (index, link) if index >= 0 and self._is_free(index, nbytes) else (-1, 0)

    def _is_free(self, index: int, nbytes: int) -> bool:
        return self.fits(index, nbytes) and self.word[index] == checked_word(
            index, FREE, self.generation[index]
        )

    def _find(self, size_class: int, nbytes: int, slot: int) -> tuple[int, int]:
        """Return a free block and the word that links to it: warm, then empty; (-1, 0) if none."""
        words = self.words
        link = H_WARM + size_class
        if words[link]:
            return self._nearest(link, nbytes, slot)
        for up in range(link + 1, min(link + 1 + _CLASSES_UP, H_WARM + N_CLASSES)):
            if words[up]:
                index = words[up] - 1
                if index >= MAX_BLOCKS or self.resident[index] & RESIDENT_MASK >= nbytes:
                    return index, up
        link = H_EMPTY + size_class
        return (words[link] - 1, link) if words[link] else (-1, 0)

    def _nearest(self, first_link: int, nbytes: int, slot: int) -> tuple[int, int]:
        # What this process wrote last is in its page tables: 4 times the rate of the others.
        words, link = self.words, first_link
        next_at, n_rows = BLOCKS_AT + C_NEXT * MAX_BLOCKS, self.rows.n_rows
        for _ in range(_AFFINITY_DEPTH):
            index = words[link] - 1
            if index >= n_rows:
                return index, link  # damaged
            if self.last[index] == slot and self.resident[index] & RESIDENT_MASK >= nbytes:
                return index, link
            link = next_at + index
            if not words[link]:
                break
        return words[first_link] - 1, first_link

    # --- passing on

    def seal(self, blocks: Sequence[tuple[int, int]], slot: int, channel: int) -> None:
        """LEASED to IN FLIGHT, without the lock: the envelope is about to leave."""
        head, head_generation = blocks[0]
        for index, generation in blocks:
            self.channel[index] = channel if index == head else FOLLOWS | head
            self.next[index] = head_generation
            self.word[index] = commit_word(index, IN_FLIGHT, slot, generation)

    def adopt(self, index: int, generation: int, slot: int) -> None:
        """Make a reader the owner of a message that has left its channel, without the lock.

        Only inside `Membership.reading`: nobody frees it meanwhile.
        """
        if self.is_in_flight(index, generation):
            self.word[index] = commit_word(index, IN_FLIGHT, slot, generation)

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
            if not self.is_of(index, generation, needs[position]):
                self.examine(index)
                return position
        for (index, generation), nbytes in zip(blocks, needs, strict=True):
            self.word[index] = commit_word(index, HELD, slot, generation)
            _faults.reach("ledger.claim.committed")
            self.words[H_HELD] = self.words[H_HELD] + nbytes & WORD_MASK
        return None

    def is_of(self, index: int, generation: int, nbytes: int) -> bool:
        """Tell whether the block is in flight with that generation and so many bytes."""
        return (
            self.is_in_flight(index, generation)
            and self.used[index] == nbytes
            and self.fits(index, nbytes)
        )

    def fits(self, index: int, nbytes: int) -> bool:
        """Tell whether the block exists and holds so many bytes."""
        row = self.rows.known.get(index) or self.rows.get(index)
        return row is not None and nbytes <= row.nbytes

    # --- giving back

    def release(self, blocks: Iterable[tuple[int, int]], slot: int) -> None:
        """Free each ``(index, generation)`` that `slot` still owns; others are left alone."""
        for index, generation in blocks:
            word = self.word[index]
            state = word & STATE_MASK
            owner = word >> OWNER_SHIFT & OWNER_MASK
            found = self.generation[index]
            if word != checked_word(index, word & LOW_MASK, found) or not self.rows.get(index):
                self.examine(index)
                continue
            if owner != slot or found != generation or state in (FREE, QUARANTINED):
                continue
            if state == HELD:
                self.words[H_HELD] = max(0, self.words[H_HELD] - self.used[index])
            _faults.reach("ledger.release.begun")
            self._free(index, generation)

    def _free(self, index: int, generation: int) -> None:
        self.word[index] = commit_word(index, FREE, 0, generation)
        _faults.reach("ledger.release.committed")
        warm = self.resident[index] & RESIDENT_MASK
        link = (H_WARM if warm else H_EMPTY) + self.rows.known[index].size_class
        self.next[index] = self.words[link]
        _faults.reach("ledger.release.linked")
        self.words[link] = index + 1

    def free_unread(self, words: Sequence[tuple[int, int]]) -> int:
        """Free blocks in flight whose commit word is still what the caller saw; return how many."""
        n_freed = 0
        for index, seen in words:
            generation = self.generation[index]
            if self.word[index] == seen and self.is_in_flight(index, generation):
                self._free(index, generation)
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

        look = self._look()
        had = np.concatenate([look.of_state(LEASED), look.of_state(HELD)])
        owner = look.word[had] >> np.uint64(OWNER_SHIFT) & np.uint64(OWNER_MASK)
        had = had[np.isin(owner, np.array(list(slots), np.uint64))]
        if not len(had):
            return  # the lists and sums are right: whoever died in a step left them to be rebuilt
        generation = self._array(self.generation)[had]
        self._array(self.word)[had] = checked_word(look.rows[had], FREE, generation)
        _faults.reach("ledger.recover.had")
        self.rebuild()

    # --- pages

    def take_idle(self, nbytes: int, slot: int, taken: list[int]) -> None:
        """Lease free blocks whose pages add up to `nbytes`, largest first, to punch them."""
        import numpy as np

        look = self._look()
        resident = self._resident(look)
        idle = look.of_state(FREE)
        idle = idle[resident[idle] > 0]
        idle = idle[np.argsort(resident[idle])[::-1]]
        enough = int(np.searchsorted(np.cumsum(resident[idle]), nbytes)) + 1
        for index in idle[:enough].tolist():
            self._commit_lease(index, 0, slot)
            taken.append(index)
        self.rebuild()

    def mark_punched(self, indices: Iterable[int]) -> None:
        """Account for blocks whose pages went back to the system."""
        for index in indices:
            nbytes = self.resident_nbytes(index)
            self.words[H_RESIDENT] = max(0, self.words[H_RESIDENT] - nbytes)
            self.resident[index] = resident_word(index, 0)
            self.punches[index] = self.punches[index] + 1 & WORD_MASK
            _faults.reach("ledger.punched")

    # --- the whole table

    def _look(self) -> _Look:
        """Look at all rows, and check each."""
        import numpy as np

        n_rows = self.rows.n_rows  # once: without the lock there can be more at any moment
        index = np.arange(n_rows, dtype=np.uint64)
        # A copy: others seal and adopt meanwhile.
        word = self._array(self.word, n_rows).copy()
        generation = self._array(self.generation, n_rows)
        offset, size_class = self._array(self.offset, n_rows), self._array(self.size_class, n_rows)
        state = word & np.uint64(STATE_MASK)
        placed = self._array(self.check, n_rows) == row_check(index, offset, size_class)
        placed &= size_class < N_CLASSES
        sound = placed & (word == checked_word(index, word & np.uint64(LOW_MASK), generation))
        # A generation that was counted but not committed.
        before = checked_word(index, FREE, generation - np.uint64(1))
        return _Look(index, word, state, sound, placed & ~sound & (word == before))

    def _resident(self, look: _Look) -> NDArray[np.uint64]:
        import numpy as np

        word = self._array(self.resident, len(look.rows))
        nbytes = word & np.uint64(RESIDENT_MASK)
        return np.where(word == resident_word(look.rows, nbytes), nbytes, np.uint64(0))

    def rebuild(self) -> None:
        """Recompute the free lists and sums from the columns, and quarantine what is damaged."""
        self.rows.recount()
        self._mend_rows()
        look = self._look()
        resident = self._resident(look)
        self._rebuild_sums(look, resident)
        self._rebuild_lists(look, resident)

    def _mend_rows(self) -> None:
        import numpy as np

        look = self._look()
        word, generation = self._array(self.word), self._array(self.generation)
        torn = look.torn  # the generation stays used up
        word[torn] = checked_word(look.rows[torn], FREE, generation[torn])
        bad = look.damaged
        if bad.any():
            # Written again where it is quarantined already.
            word[bad] = checked_word(look.rows[bad], np.uint64(QUARANTINED), generation[bad])

    def _rebuild_sums(self, look: _Look, resident: NDArray[np.uint64]) -> None:
        used = self._array(self.used)[look.of_state(HELD)]
        self.words[H_HELD] = int(used.sum())
        self.words[H_RESIDENT] = int(resident.sum())

    def _rebuild_lists(self, look: _Look, resident: NDArray[np.uint64]) -> None:
        import numpy as np

        words = self.words
        for size_class in range(N_CLASSES):
            words[H_WARM + size_class] = words[H_EMPTY + size_class] = 0
        free = look.of_state(FREE)
        warm = resident[free] > 0
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
        """Count blocks and bytes in use by state, and what is or must be quarantined."""
        look = self._look()
        used, resident = self._array(self.used, len(look.rows)), self._resident(look)
        n_blocks, nbytes = {}, {}
        for code, name in STATE_NAMES.items():
            chosen = look.of_state(code)
            n_blocks[name] = len(chosen)
            nbytes[name] = int((resident if code == FREE else used)[chosen].sum())
        n_bad = len(look.of_state(QUARANTINED)) + self._n_damaged(look)
        return Census(n_blocks, nbytes, n_bad)

    def _n_damaged(self, look: _Look) -> int:
        """Return how many entries are in disorder: without the lock, one may be half written."""
        damaged = look.damaged
        for _ in range(_N_LOOKS):
            if not damaged.any():
                break
            damaged &= self._look().damaged[: len(damaged)]
        return int(damaged.sum())

    def is_abandoned(self, index: int) -> bool:
        """Tell whether a following block's message is gone: its first block is in other hands."""
        head = self.channel[index] & ~FOLLOWS
        if head >= self.rows.n_rows:
            return False  # damaged: whoever loads it frees it
        gone = self.word[head] & STATE_MASK in (FREE, QUARANTINED)
        return gone or self.generation[head] != self.next[index]

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
