"""The ledger: who has which block. Every method is one step, run under `LedgerMutex`.

**What.** The table of blocks in the ledger file: its free lists, its states, its sums.

**How it works.** A block belongs to nobody (FREE) or to exactly one participant::

    (new) --lease--> LEASED --seal--> IN FLIGHT --claim--> HELD --release--> FREE --lease--> LEASED
    ...
                      |                  |  of the dead: anybody may look if it can be read
                      +---- release -----+------------------------------------^

Each change is one store of the block's commit word. Everything else (free lists, sums, the number
of rows) can be rebuilt from the columns, and is, by whoever finds the dirty word set. `seal`
needs no lock: the block is the sender's alone, and the receiver reads the word after a system
call has ordered both.

Steps return; they do not raise, print, allocate containers of unknown size or call the system.

A faulty process may write anywhere in the file. So nothing that is read from it is believed
unchecked (see `layout`, `rows`): a block whose commit word is not what its index, generation,
owner and state make is QUARANTINED when somebody meets it, and never used again; a link that
leads to a block that is not free makes the lists be rebuilt from the commit words.

**Lifetime.** A generation counts each lease of a block and is never reset, so an old placement is
recognised for ever.

**When it cannot.** `lease` returns a `Shortage`; `claim` returns the position of the first block
that is not what the placement says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from oobpickle import _faults
from oobpickle._memory.layout import (
    ADOPTED,
    BLOCKS_AT,
    C_NEXT,
    FOLLOWS,
    FREE,
    GOING,
    H_EMPTY,
    H_HELD,
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
    WORD_MASK,
    adopted_by,
    checked_word,
    class_of,
    commit_word,
    resident_nbytes,
    resident_word,
)
from oobpickle._memory.rows import Shortage
from oobpickle._memory.table import Table

_AFFINITY_DEPTH: Final = 8
_CLASSES_UP: Final = 4


class Ledger(Table):
    """The steps on the table of blocks.

    Parameters
    ----------
    words : memoryview
        The whole ledger file as 64-bit words.
    """

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
        """Tell whether nobody has loaded the message of the block's lease with that generation.

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
            present = resident_nbytes(index, self.resident[index]) if index >= 0 else 0
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
                if present and self.channel[index] != PREPARED:
                    words[H_SETTLED] = max(0, words[H_SETTLED] - present)
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
        row = self.rows.known.get(index) or self.rows.get(index)
        if row is None or nbytes > row.nbytes:
            return False
        return self.word[index] == commit_word(index, FREE, 0, self.generation[index])

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
        next_at = BLOCKS_AT + C_NEXT * MAX_BLOCKS
        for _ in range(_AFFINITY_DEPTH):
            index = words[link] - 1
            if index >= MAX_BLOCKS:
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

    def adopt(self, index: int, generation: int, incarnation: int) -> None:
        """Note who has read a message that has left its channel, without the lock.

        Only while it says that it reads: nobody frees it meanwhile. The commit word stays as it is:
        somebody else who was sent the same bytes may be claiming the block at this moment.
        """
        if self.is_in_flight(index, generation):
            self.channel[index] = adopted_by(incarnation, generation)

    def readdress(self, index: int, generation: int, slot: int, channel: int) -> bool:
        """Let a message be sent on by `slot`, in another channel; tell whether it is in flight."""
        if not self.is_in_flight(index, generation):
            return False
        self.word[index] = commit_word(index, IN_FLIGHT, slot, generation)
        self.channel[index] = channel
        return True

    def is_unread(self, index: int, generation: int) -> bool:
        """Tell whether nobody is known to have read the message of the block's lease."""
        return self.is_in_flight(index, generation) and not self.channel[index] & ADOPTED

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
            self.next[index] = 0
            _faults.reach("ledger.claim.committed")
            self.words[H_HELD] = self.words[H_HELD] + nbytes & WORD_MASK
            self._settle(self.resident_nbytes(index))
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
            if word != checked_word(index, word & LOW_MASK, generation):
                self.examine(index)  # damaged, or of another lease
                continue
            if word >> OWNER_SHIFT & OWNER_MASK != slot or state in (FREE, QUARANTINED):
                continue
            known = index in self.rows.known or self.rows.get(index)
            if self.generation[index] != generation or not known:
                self.examine(index)
                continue
            if state == HELD:
                self.words[H_HELD] = max(0, self.words[H_HELD] - self.used[index])
            _faults.reach("ledger.release.begun")
            counted = state == HELD and self.next[index] != GOING
            if not counted and self.channel[index] != PREPARED:
                self._settle(self.resident_nbytes(index))
            self._free(index, generation)

    def _settle(self, nbytes: int) -> None:
        """Account for pages that free blocks have more from now on, or will have; or fewer."""
        self.words[H_SETTLED] = max(0, self.words[H_SETTLED] + nbytes) & WORD_MASK

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
                self._settle(self.resident_nbytes(index))
                self._free(index, generation)
                n_freed += 1
        return n_freed

    def forget_unknown(self, slot: int, known: set[int]) -> None:
        """After an interrupted step: free what `slot` owns without the process knowing."""
        for state in (LEASED, HELD):
            for index in self.owned_by(slot, state):
                if index not in known:
                    self.release([(index, self.generation[index])], slot)

    def recover(self, slots: Collection[int]) -> None:
        """Free what dead participants leased or held: one look at all rows, however many died.

        What they sent is left as it is: a reader may be making it its own at this moment, without
        the lock. It is nobody's as long as nobody has the slot, and then its new owner's.
        """
        import numpy as np

        look = self.look()
        had = np.concatenate([look.of_state(LEASED), look.of_state(HELD)])
        owner = look.word[had] >> np.uint64(OWNER_SHIFT) & np.uint64(OWNER_MASK)
        had = had[np.isin(owner, np.array(list(slots), np.uint64))]
        if not len(had):
            return  # the lists and sums are right: whoever died in a step left them to be rebuilt
        generation = self.array(self.generation)[had]
        self.array(self.word)[had] = checked_word(look.rows[had], FREE, generation)
        _faults.reach("ledger.recover.had")
        self.rebuild()

    # --- pages

    def take_idle(
        self, nbytes: int, slot: int, taken: list[int], *, above: int | None = None
    ) -> None:
        """Lease free blocks whose pages add up to `nbytes`, largest first, to punch them.

        With `above` only what all of them would have more than that, and none that is prepared.
        """
        import numpy as np

        if not any(self.words[H_WARM : H_WARM + N_CLASSES]):
            return  # there are none, and many rows take long to look at
        look = self.look()
        resident = self._resident(look)
        idle = look.of_state(FREE)
        idle = idle[resident[idle] > 0]
        if above is not None:
            nbytes = min(nbytes, self.words[H_SETTLED] - above)
            idle = idle[self.array(self.channel)[idle] != PREPARED]
            if nbytes <= 0 or not len(idle):
                return
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
            if self.word[index] & STATE_MASK == HELD and self.next[index] != GOING:
                self._settle(-nbytes)
            self.resident[index] = resident_word(index, 0)
            self.punches[index] = self.punches[index] + 1 & WORD_MASK
            _faults.reach("ledger.punched")

    def mark_prepared(self, blocks: Iterable[tuple[int, int]], slot: int) -> None:
        """Step: keep the pages of leased blocks, once they are free, until a message takes them."""
        for index, generation in blocks:
            if self.word[index] == commit_word(index, LEASED, slot, generation):
                self.channel[index] = PREPARED

    def mark_going(
        self, going: Iterable[tuple[int, int]], staying: Iterable[tuple[int, int]], slot: int
    ) -> None:
        """Step: note of held blocks whether their pages go back to the system at their release."""
        for blocks, mark in ((going, GOING), (staying, 0)):
            for index, generation in blocks:
                is_ours = self.word[index] == commit_word(index, HELD, slot, generation)
                if is_ours and self.next[index] != mark:
                    nbytes = self.resident_nbytes(index)
                    self.next[index] = mark
                    self._settle(-nbytes if mark else nbytes)
