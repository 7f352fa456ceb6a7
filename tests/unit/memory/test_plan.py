"""How the buffers of a message lie in its blocks."""

import random
import struct
import sys

import numpy as np
import pytest

from oobpickle._native import core

KIB, MIB = 1 << 10, 1 << 20
OWN_NBYTES = 32 * KIB
ALIGN_NBYTES = 64
MARK = 1 << 63  # of a reference; its offset follows


def packed(sizes):
    return struct.pack(f"<{len(sizes)}Q", *sizes)


def lie(sizes):
    """Return the bytes used of each block, and where in which block each buffer lies."""
    needs = core.plan(packed(sizes))
    starts = np.cumsum([0, *needs])
    memory = np.zeros(starts[-1] + 1, np.uint8)  # of all blocks, one after the other
    views = [memoryview(memory[at : at + n]) for at, n in zip(starts, needs, strict=False)]
    places = []
    for part, nbytes in zip(core.spread(views, packed(sizes), False), sizes, strict=True):
        assert len(part) == nbytes
        if not nbytes:
            places.append(None)
            continue
        at = np.frombuffer(part, np.uint8).ctypes.data - memory.ctypes.data
        block = int(np.searchsorted(starts, at, side="right")) - 1
        places.append((block, int(at - starts[block])))
    return needs, places


def test_a_large_buffer_has_a_block_of_its_own():
    sizes = [OWN_NBYTES, 5000, OWN_NBYTES + 1, 0, 3 * MIB]

    expected = [OWN_NBYTES, 5000, OWN_NBYTES + 1, 3 * MIB], [(0, 0), (1, 0), (2, 0), None, (3, 0)]
    assert expected == lie(sizes)


def test_small_buffers_share_blocks_and_do_not_overlap():
    chance = random.Random(1)
    for _ in range(20):
        most = chance.choice([100, 4000, OWN_NBYTES])
        sizes = [chance.randrange(most) for _ in range(chance.randrange(1, 200))]
        needs, places = lie(sizes)
        ends = dict.fromkeys(range(len(needs)), 0)
        for place, nbytes in zip(places, sizes, strict=True):
            if nbytes:
                block, at = place
                assert at >= ends[block]
                assert at % ALIGN_NBYTES == 0
                ends[block] = at + nbytes
        assert needs == list(ends.values())


def test_what_survives_pins_at_most_sixteen_times_itself():
    sizes = [4 * KIB, 10_000, 100, 20_000, 4095, 31 * KIB] * 100
    needs, places = lie(sizes)

    for (block, _), nbytes in zip(places, sizes, strict=True):
        assert needs[block] <= 16 * nbytes or nbytes < 4 * KIB  # which is copied


def test_many_of_the_smallest_take_few_blocks():
    assert 1 + 100 == len(core.plan(packed([1 * KIB] * 102_400)))


def test_what_is_received_is_memory_of_its_own_if_it_is_small():
    blocks = [bytearray(range(100)), bytearray(5000)]
    small, large = core.spread([memoryview(one) for one in blocks], packed([100, 5000]), True)
    blocks[0][:] = bytes(100)

    assert (bytearray(range(100)), memoryview) == (small, type(large))


def test_before_the_message_is_there_whole_chunks_are_leased():
    assert [64 * KIB, OWN_NBYTES] == core.plan(packed([100, OWN_NBYTES]), True)


@pytest.mark.parametrize("blocks", [[], [memoryview(bytearray(99))], [5], [None, None]])
def test_blocks_that_do_not_fit_are_refused(blocks):
    with pytest.raises((ValueError, IndexError, TypeError)):
        core.spread(blocks, packed([100]), True)


def test_a_block_that_ends_before_the_second_of_two_is_refused():
    with pytest.raises(ValueError, match="smaller than what lies in it"):
        core.spread([memoryview(bytearray(217))], packed([90, 90]), True)
    assert [90, 90] == list(
        map(len, core.spread([memoryview(bytearray(218))], packed([90, 90]), True))
    )


class Changes:
    """Exports memory, and changes what it was passed in when it is asked for it."""

    def __init__(self, blocks, sizes):
        self.blocks, self.sizes = blocks, sizes

    def __buffer__(self, flags):
        self.blocks.clear()
        self.sizes[:] = packed([MARK | 5, 0, MARK | 5, 0])
        return memoryview(b"x" * 100)

    def __getitem__(self, part):
        return part.stop


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no class in Python exports memory")
def test_who_is_asked_for_memory_may_change_what_was_passed():
    blocks, sizes = [], bytearray(packed([5, 5, MARK | 5, 0]))
    blocks += [Changes(blocks, sizes), Changes(blocks, sizes)]
    with pytest.raises((IndexError, ValueError)):
        core.spread(blocks, sizes, False)
