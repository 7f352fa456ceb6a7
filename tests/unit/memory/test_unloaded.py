"""The list of what a process may have read unseen: what others find in its row."""

import pytest

from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from table import Table

MIB = 1 << 20
N_KEPT = 64


@pytest.fixture
def arena():
    arena = SharedArena.create(Options(capacity=64 * MIB))
    yield arena
    arena.close()
    assert arena.try_destroy()


def listed(arena):
    row = Table.of(arena).participant(arena.blocks.slot)
    return {int(source) for source in row.kept if source}, bool(row.keeps_all[0])


def test_what_was_noted_is_found(arena):
    assert not arena.unloaded

    arena.unloaded.note(5)
    arena.unloaded.note(6)

    assert arena.unloaded
    assert ({5, 6}, False) == listed(arena)


def test_what_is_not_open_any_more_makes_place(arena):
    for channel in range(1, N_KEPT + 1):
        arena.unloaded.note(channel)
    assert N_KEPT == len(listed(arena)[0])

    arena.unloaded.note(1000)

    assert ({1000}, False) == listed(arena)


def test_more_than_fits_is_everything(arena, monkeypatch):
    monkeypatch.setattr("oobpickle._memory.unloaded.open_channels", lambda: set(range(1, 100)))
    for channel in range(1, N_KEPT + 2):
        arena.unloaded.note(channel)

    assert listed(arena)[1]


def test_a_descriptor_that_was_asked_for_and_passed_on_is_not_noted(arena):
    for _ in range(2):
        arena.unloaded.note(7)

    arena.unloaded.passed_on(7)
    assert ({7}, False) == listed(arena)
    arena.unloaded.passed_on(7)
    arena.unloaded.passed_on(7)

    assert (set(), False) == listed(arena)
