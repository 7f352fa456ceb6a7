"""A ledger without an arena, and the check that a table is in order."""

import mmap
from collections import Counter

from oobpickle._memory import layout
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.mutex import LedgerMutex


class FakeLocks:
    """Locks that a test grants: which slots are alive, and whether somebody else has the ledger."""

    def see_to_loss(self):
        pass

    def __init__(self):
        self.alive = set()
        self.taken_elsewhere = False
        self.n_tries = 0

    unlock_call = (-1, 0, None)

    def try_lock(self):
        self.n_tries += 1
        return not self.taken_elsewhere

    def hold(self, slot):
        if slot in self.alive:
            return False
        self.alive.add(slot)
        return True

    def is_alive(self, slot):
        return slot in self.alive


def make_words(capacity=64 << 20):
    """Return the words of an empty ledger in anonymous memory."""
    words = memoryview(mmap.mmap(-1, layout.LEDGER_NBYTES)).cast("B").cast("Q")
    words[layout.H_CAPACITY] = capacity
    words[layout.H_DATA_NBYTES] = 1 << 40
    words[layout.H_ROWS] = layout.rows_word(0)
    return words


def make_ledger(capacity=64 << 20):
    return Ledger(make_words(capacity))


def make_mutex(ledger, locks=None, repair=None):
    return LedgerMutex(locks or FakeLocks(), ledger.words, repair or ledger.rebuild)


def state_of(ledger, index):
    return ledger.word[index] & layout.STATE_MASK


def owner_of(ledger, index):
    return ledger.word[index] >> layout.OWNER_SHIFT & layout.OWNER_MASK


def is_settled(ledger, index):
    """Tell whether a block's pages stay if all that is held is dropped, and count as free."""
    if state_of(ledger, index) == layout.FREE:
        return ledger.channel[index] != layout.PREPARED
    return state_of(ledger, index) == layout.HELD and ledger.next[index] != layout.GOING


def assert_in_order(ledger):
    """Free lists, sums and ranges are what the columns say."""
    words = ledger.words
    n_blocks = words[layout.H_N_BLOCKS]
    expected = {}
    for index in range(n_blocks):
        assert ledger.is_sound(index), f"row {index} is damaged"
        if state_of(ledger, index) == layout.FREE:
            base = layout.H_WARM if ledger.resident_nbytes(index) else layout.H_EMPTY
            expected[index] = base + ledger.size_class[index]
    found = {}
    for head in range(layout.H_WARM, layout.H_EMPTY + layout.N_CLASSES):
        link = words[head]
        while link:
            assert link - 1 not in found, f"block {link - 1} is in the free lists twice"
            found[link - 1] = head
            link = ledger.next[link - 1]

    assert expected == found
    states = Counter(state_of(ledger, index) for index in range(n_blocks))
    assert set(states) <= {layout.FREE, layout.LEASED, layout.IN_FLIGHT, layout.HELD}
    held = sum(ledger.used[i] for i in range(n_blocks) if state_of(ledger, i) == layout.HELD)
    assert held == words[layout.H_HELD]
    assert sum(map(ledger.resident_nbytes, range(n_blocks))) == words[layout.H_RESIDENT]
    assert words[layout.H_RESIDENT] <= words[layout.H_CAPACITY]
    settled = [i for i in range(n_blocks) if is_settled(ledger, i)]
    assert sum(map(ledger.resident_nbytes, settled)) == words[layout.H_SETTLED]
    end = 0
    for index in range(n_blocks):
        assert ledger.offset[index] >= end, f"block {index} overlaps the one before it"
        assert ledger.used[index] <= layout.class_nbytes(ledger.size_class[index])
        end = ledger.offset[index] + layout.class_stride(ledger.size_class[index])
    assert end <= words[layout.H_DATA_NBYTES]
    assert words[layout.H_ROWS] == layout.rows_word(n_blocks)
