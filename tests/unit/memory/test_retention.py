"""Retention: what free blocks keep is bounded, without another call, and streams stay warm."""

import _imp
import ctypes
import gc
import os
import threading
import weakref
from collections import deque

import numpy as np
import pytest

from ledger_tools import assert_in_order
from oobpickle._memory import headroom, layout, retention
from oobpickle._memory.arena import Arena
from oobpickle._memory.options import Options
from oobpickle._memory.segment import NoMappingError, Segment

MIB = 1 << 20
LIMIT = 4 * MIB


@pytest.fixture
def make_arena(monkeypatch):
    monkeypatch.setattr(retention, "_LEAST_NBYTES", LIMIT)
    monkeypatch.setattr(headroom, "limit_nbytes", lambda: 8 * LIMIT)
    arenas = []

    def make(**options):
        options.setdefault("capacity", 64 * MIB)
        arenas.append(Arena.create(Options(**options)))
        return arenas[-1]

    yield make
    gc.collect()
    for arena in arenas:
        arena.drain()
        arena.membership.run(assert_in_order, arena.ledger)
        arena.close()
        arena.detach()
        assert arena.try_destroy(), "a test left a lease, an array or a message"


@pytest.fixture
def arena(make_arena):
    return make_arena()


def send(arena, value, nbytes=MIB):
    lease = arena.acquire([nbytes])
    lease.destinations[0][:] = bytes([value]) * nbytes
    lease.seal(0)
    lease.settle()
    return lease.blocks, [nbytes]


def receive(arena, value=1, nbytes=MIB):
    (view,) = arena.intake.claim(*send(arena, value, nbytes))
    return np.frombuffer(view, np.uint8)


def resident(arena):
    return arena.data.resident_nbytes()


def n_punches(arena):
    return sum(arena.ledger.punches[index] for index in range(arena.ledger.rows.n_rows))


def going(arena):
    return [watch for watch in arena.holdings.anchors() if watch.going]


def assert_accounted(arena):
    """After a call of ours the account is what the system says."""
    arena.drain()
    assert resident(arena) == arena.ledger.words[layout.H_RESIDENT]
    arena.membership.run(assert_in_order, arena.ledger)


@pytest.mark.parametrize("order", ["first to last", "last to first", "inside out"])
def test_what_was_held_goes_back_without_a_call(arena, order):
    held = [receive(arena, value) for value in range(9)]
    assert resident(arena) == 9 * MIB
    assert all((array == value).all() for value, array in enumerate(held))
    order = {"first to last": range(9), "last to first": range(8, -1, -1)}.get(
        order, [4, 5, 3, 6, 2, 7, 1, 8, 0]
    )
    for position in order:
        held[position] = None

    assert resident(arena) <= LIMIT
    assert_accounted(arena)


def test_what_stays_below_the_limit_is_kept(arena):
    held = [receive(arena) for _ in range(4)]
    del held

    assert resident(arena) == LIMIT
    assert n_punches(arena) == 0


def test_one_that_is_kept_for_ever_keeps_no_other(arena):
    held = [receive(arena, value) for value in range(9)]
    kept = held[0][100:200]
    del held

    assert resident(arena) <= LIMIT + MIB
    assert (kept == 0).all()
    assert_accounted(arena)


def test_one_that_was_going_is_right_until_it_dies(arena):
    held = [receive(arena, value) for value in range(9)]
    survivor = held[8]
    del held

    assert (survivor == 8).all()
    survivor[:] = 77
    arena.drain()
    others = [receive(arena, value) for value in range(3)]
    assert (survivor == 77).all()
    assert all((array == value).all() for value, array in enumerate(others))


@pytest.mark.parametrize("n_held", [1, 5, 8])
def test_a_stream_that_holds_a_few_is_warm(arena, n_held):
    held = deque(maxlen=n_held)
    for value in range(20):
        held.append(receive(arena, value))
    before = n_punches(arena)
    for value in range(30):
        held.append(receive(arena, value))
        assert (held[-1] == value).all()

    assert n_punches(arena) == before
    held.clear()
    assert resident(arena) <= LIMIT
    assert_accounted(arena)


@pytest.mark.parametrize("n_kept", [2, 4, 7])
def test_a_stream_beside_what_is_held_for_long_is_warm(arena, n_kept):
    kept = [receive(arena) for _ in range(n_kept)]
    for value in range(20):
        array = receive(arena, value)
    before = n_punches(arena)
    for value in range(20):
        array = receive(arena, value)
        assert (array == value).all()

    assert n_punches(arena) == before
    del kept, array
    assert resident(arena) <= LIMIT


def test_an_array_in_a_cycle(arena):
    gc.disable()
    try:
        for value in range(9):
            cycle = [receive(arena, value)]
            cycle.append(cycle)
        del cycle
        gc.collect()
    finally:
        gc.enable()

    assert resident(arena) <= LIMIT


def test_arrays_that_die_in_another_thread(arena):
    held = [receive(arena, value) for value in range(9)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()

    assert resident(arena) <= LIMIT
    assert_accounted(arena)


def test_nobody_gets_a_block_before_its_pages_have_gone(arena):
    """The order of the callbacks: else the pages of the next message would go."""
    for _ in range(9):
        held = [receive(arena, value) for value in range(9)]
        del held
        again = [receive(arena, value) for value in range(9)]
        assert all((array == value).all() for value, array in enumerate(again))
        del again


def test_the_death_is_queued_after_the_pages_have_gone(arena):
    seen = []
    held = [receive(arena, value) for value in range(9)]
    watch = going(arena)[-1]

    class Spy(weakref.ref):
        __slots__ = ()

    anchor = watch()
    first = Spy(anchor, lambda _: seen.append((resident(arena), len(arena.holdings.dropped))))
    arena.holdings.keep_at_death(watch)
    assert arena.holdings.free_at_death(watch)
    held = [array for array in held if array.base.obj is not anchor]
    del anchor

    assert len(held) == 8
    # Ours were made after it, and are called before it; what queues the death is older.
    assert seen == [(8 * MIB, 0)]
    assert first() is None
    assert len(arena.holdings.dropped) == 1


@pytest.mark.parametrize("copy_on_receive", [True, None])
def test_what_is_copied_out_goes_back_when_nothing_is_on_its_way(make_arena, copy_on_receive):
    arena = make_arena(copy_on_receive=copy_on_receive, capacity=16 * MIB)
    sent = [send(arena, value) for value in range(9)]
    received = [np.frombuffer(arena.intake.claim(*one)[0], np.uint8) for one in sent]
    assert all((array == value).all() for value, array in enumerate(received))
    del received

    assert resident(arena) <= LIMIT
    assert_accounted(arena)


def test_a_stream_that_is_copied_out_beside_what_is_held_is_warm(make_arena):
    arena = make_arena(capacity=8 * MIB)
    kept = [receive(arena) for _ in range(4)]
    for value in range(4):
        receive(arena, value)
    before = n_punches(arena)
    for value in range(20):
        assert (receive(arena, value) == value).all()

    assert n_punches(arena) == before
    assert arena.statistics().n_copied_on_receive >= 20
    del kept
    assert resident(arena) <= LIMIT
    assert_accounted(arena)


def test_nothing_goes_back_while_much_is_on_its_way(make_arena):
    arena = make_arena(copy_on_receive=True)
    sent = [send(arena, value) for value in range(12)]
    for one in sent[:6]:
        arena.intake.claim(*one)

    assert n_punches(arena) == 0
    for one in sent[6:]:
        arena.intake.claim(*one)
    assert resident(arena) <= LIMIT


def test_what_was_given_up_goes_back(arena):
    leases = [arena.acquire([MIB]) for _ in range(9)]
    while leases:
        leases.pop().release()

    assert resident(arena) <= LIMIT
    assert_accounted(arena)


def test_what_is_prepared_is_kept_until_a_message_takes_it(arena):
    arena.preallocate(nbytes=8 * MIB, count=2)
    for _ in range(3):
        held = [receive(arena) for _ in range(9)]
        del held
        arena.drain()
    assert 16 * MIB <= resident(arena) <= 16 * MIB + LIMIT
    before = n_punches(arena)
    array = receive(arena, 3, 8 * MIB)

    assert n_punches(arena) == before, "it was not there any more"
    del array
    assert resident(arena) <= 8 * MIB + LIMIT
    arena.preallocate(nbytes=8 * MIB, count=2)
    assert resident(arena) >= 16 * MIB
    arena.trim()
    assert resident(arena) == 0
    assert_accounted(arena)


def test_many_arrays_of_one_message(arena):
    sizes = [MIB] * 9
    lease = arena.acquire(sizes)
    for value, destination in enumerate(lease.destinations):
        destination[:] = bytes([value]) * MIB
    lease.seal(0)
    lease.settle()
    del destination
    views = arena.intake.claim(lease.blocks, sizes)
    assert [view[5] for view in views] == list(range(9))
    del views, lease

    assert resident(arena) <= LIMIT
    assert_accounted(arena)


def test_the_marks_survive_a_repair(arena):
    held = [receive(arena, value) for value in range(9)]
    arena.membership.run(arena.ledger.rebuild)
    arena.membership.run(assert_in_order, arena.ledger)
    settled = arena.ledger.words[layout.H_SETTLED]

    assert settled == LIMIT
    del held
    assert resident(arena) <= LIMIT


def test_one_that_dies_while_it_is_kept_after_all_is_accounted(arena):
    held = [receive(arena, value) for value in range(9)]
    watch = going(arena)[0]
    position = next(k for k, array in enumerate(held) if array.base.obj is watch())
    held[position] = None
    arena.holdings.keep_at_death(watch)
    del held

    assert_accounted(arena)


def refuse(*_args, **_keywords):
    raise NoMappingError(12, "no more mappings")


@pytest.mark.parametrize("in_child", ["dies", "sends"])
def test_a_child_frees_nothing_of_its_parent(arena, monkeypatch, in_child):
    """Also where the system allowed no private mapping, so that both have the same pages."""
    held = [receive(arena, value) for value in range(9)]
    assert going(arena)
    monkeypatch.setattr(Segment, "privatize", refuse)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            held = None
            gc.collect()
            if in_child == "sends":
                arena.drain()
                assert (receive(arena, 200) == 200).all()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    monkeypatch.undo()

    assert all((array == value).all() for value, array in enumerate(held))


def test_what_had_to_stay_shared_in_a_fork_is_not_going(arena, monkeypatch):
    """A hook of the child that runs before ours may drop it."""
    held = [receive(arena, value) for value in range(9)]
    monkeypatch.setattr(Segment, "privatize", refuse)
    arena.before_fork()
    still_going = going(arena)
    arena.after_fork_in_parent()

    assert still_going == []
    del held
    assert_accounted(arena)


def test_a_child_that_c_code_has_forked_frees_nothing(arena):
    """It runs the hooks of the child (PyOS_AfterFork_Child), and no others."""
    held = [receive(arena, value) for value in range(9)]
    _imp.acquire_lock()  # the child releases it, as of CPython 3.13 whether it has it or not
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        held = None
        gc.collect()
        os._exit(0)
    _imp.release_lock()
    assert os.waitpid(pid, 0)[1] == 0

    assert all((array == value).all() for value, array in enumerate(held))


def test_private_memory_of_a_fork_goes_back_too(arena):
    held = [receive(arena, value) for value in range(9)]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all((a == value).all() for value, a in enumerate(held)) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    del held

    assert_accounted(arena)
    again = [receive(arena, value) for value in range(9)]
    assert all((array == value).all() for value, array in enumerate(again))


def test_the_limit_is_looked_up_only_where_it_matters(arena):
    for value in range(20):
        receive(arena, value)
    assert arena.retention._look_again_at == 0
    held = [receive(arena, value) for value in range(5)]

    assert arena.retention._look_again_at > 0
    del held
