"""How the buffers of a message lie in its blocks."""

import random

from oobpickle._memory.plan import ALIGN_NBYTES, OWN_BLOCK_NBYTES, PACK_NBYTES, plan


def test_a_large_buffer_has_a_block_of_its_own():
    sizes = [OWN_BLOCK_NBYTES, 10, OWN_BLOCK_NBYTES + 1, 0]

    assert (
        [OWN_BLOCK_NBYTES, 10, OWN_BLOCK_NBYTES + 1],
        [(0, 0), (1, 0), (2, 0), (-1, 0)],
    ) == plan(sizes)


def test_small_buffers_share_blocks_and_do_not_overlap():
    chance = random.Random(1)
    for _ in range(50):
        sizes = [chance.randrange(OWN_BLOCK_NBYTES) for _ in range(chance.randrange(1, 200))]
        needs, places = plan(sizes)
        ends = dict.fromkeys(range(len(needs)), 0)
        for (block, at), nbytes in zip(places, sizes, strict=True):
            if nbytes:
                assert at >= ends[block]
                assert at % ALIGN_NBYTES == 0
                ends[block] = at + nbytes
        assert needs == list(ends.values())
        assert all(need <= PACK_NBYTES for need in needs)
        assert len(needs) <= 1 + sum(sizes) // (PACK_NBYTES - OWN_BLOCK_NBYTES)
