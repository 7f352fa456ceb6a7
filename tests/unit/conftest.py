"""Arenas of this process, with nothing in them when a test is done."""

import gc

import pytest

from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._native import core

MIB = 1 << 20


@pytest.fixture
def make_arena():
    arenas = []

    def make(**options):
        options.setdefault("capacity", 64 * MIB)
        arenas.append(SharedArena.create(Options(**options)))
        return arenas[-1]

    yield make
    from table import Table  # not above: without the extension module it cannot be imported

    core.arm(None, 0, 0)
    gc.collect()
    for arena in arenas:
        if arena.blocks.ended:
            continue
        arena.reclaim.reap()
        Table.of(arena).assert_in_order()
        arena.close()
        arena.detach()
        assert arena.try_destroy(), "a test left a lease, an array or a message"


@pytest.fixture
def arena(make_arena):
    return make_arena()
