"""The plan of a message: how its buffers lie in its blocks.

**What.** `plan`, which sender and receiver compute alike from the sizes.

**How it works.** Each big buffer gets a block of its own, so that a small survivor pins nothing;
small ones are packed, 64-byte aligned, into blocks of up to 1 MiB.

**Lifetime.** No state.

**When it cannot.** It cannot fail.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: Buffers from this size on get a block each; smaller ones share blocks of at most `PACK_NBYTES`.
OWN_BLOCK_NBYTES: Final = 64 << 10
PACK_NBYTES: Final = 1 << 20
ALIGN_NBYTES: Final = 64


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


def views(blocks: list[memoryview], layout: Plan, sizes: list[int]) -> list[memoryview]:
    """Return the memory of each buffer within that of the blocks."""
    return [
        blocks[block][at : at + nbytes] if block >= 0 else memoryview(bytearray())
        for (block, at), nbytes in zip(layout.places, sizes, strict=True)
    ]
