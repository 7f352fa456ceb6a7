"""Marks of those who are about to start a program."""

import os

import pytest

from oobpickle._hook.passing import Mark, marked
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options

MIB = 1 << 20


@pytest.fixture
def arena():
    arena = SharedArena.create(Options(capacity=64 * MIB))
    yield arena
    arena.close()
    arena.detach()
    assert arena.try_destroy()


class Child:
    """A forked participant, which lives in the block."""

    def __enter__(self):
        stay, self._end = os.pipe()
        lives, say = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._end)
            os.write(say, b"x")
            os.read(stay, 1)
            os._exit(0)
        os.read(lives, 1)  # its pid is in the row by then
        for fd in (stay, lives, say):
            os.close(fd)
        return self

    def __exit__(self, *_):
        os.close(self._end)
        os.waitpid(self.pid, 0)


def test_who_has_set_a_mark_is_marked_until_it_is_cleared(arena):
    first, second = Mark(arena.blocks), Mark(arena.blocks)
    for mark in (first, second):
        mark.set()
    assert {os.getpid()} == marked(arena)
    first.clear()
    assert {os.getpid()} == marked(arena)
    second.clear()

    assert set() == marked(arena)


def test_what_is_kept_is_no_mark(arena):
    for source in (1, 1 << 63 | 1 << 60 | 5, 3 << 60, 1 << 59, 5 << 60):
        arena.blocks.keep(source)

    assert set() == marked(arena)


def test_a_child_has_its_parents_mark_for_as_long_as_the_parent(arena):
    mark = Mark(arena.blocks)
    mark.set()
    with Child() as child:
        assert {os.getpid(), child.pid} == marked(arena)
        mark.clear()
        assert set() == marked(arena)


def test_a_child_that_does_nothing_but_exec_keeps_its_mark(arena):
    mark = Mark(arena.blocks, of_children=True)
    mark.set()
    with Child() as child:
        assert {os.getpid(), child.pid} == marked(arena)
        mark.clear()
        with Child():
            assert {child.pid} == marked(arena)

    assert set() == marked(arena)


def test_who_is_dead_is_not_marked_though_a_program_may_have_its_pid(arena):
    pid = os.fork()
    if not pid:
        Mark(arena.blocks).set()
        os._exit(0)
    os.waitpid(pid, 0)
    assert pid in [its for _, its, _ in arena.blocks.participants()]

    assert set() == marked(arena)


def test_where_the_list_is_full_there_is_no_mark(arena):
    for source in range(1, 65):
        assert arena.blocks.keep(source)
    mark = Mark(arena.blocks)
    mark.set()
    assert set() == marked(arena)
    mark.clear()

    assert not arena.blocks.keep(65)
