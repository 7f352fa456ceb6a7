"""What a program sees of an arena."""

import numpy as np
import pytest

import oobpickle
from oobpickle._arena import AbsentArena
from oobpickle._memory.options import Options


def test_it_shows_what_is_documented_and_nothing_else():
    with oobpickle.enabled() as arena:
        names = {name for name in dir(arena) if not name.startswith("_")}
    documented = {"identity", "options", "closed", "statistics", "preallocate", "trim"}
    assert documented == names == {name for name in dir(AbsentArena(Options())) if name[0] != "_"}


def test_it_is_the_same_in_nested_blocks_and_for_install():
    with oobpickle.enabled() as outer:
        with oobpickle.enabled() as inner:
            assert outer is inner
        assert oobpickle.install() is outer
        oobpickle.uninstall()


def test_it_says_what_was_done_after_its_block():
    with oobpickle.enabled(capacity=1 << 30) as arena:
        arena.preallocate(nbytes=1_000_000)
        assert not arena.closed
        assert arena.statistics().n_blocks["free"] == 1
        arena.trim()
        assert arena.statistics().nbytes_resident == 0
    assert arena.closed
    assert arena.statistics().capacity == arena.options.capacity == 1 << 30
    assert len(arena.identity) == 16


def test_an_absent_arena_prepares_nothing():
    arena = AbsentArena(Options())
    arena.preallocate(np.zeros(10))
    arena.trim()
    assert arena.closed
    assert 0 == arena.statistics().nbytes_resident
    with pytest.raises(TypeError, match="not both"):
        arena.preallocate()
