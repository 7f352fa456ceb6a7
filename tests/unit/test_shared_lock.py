"""The lock of a shared object, in one process: two arenas over the same files, two participants."""

import errno
import os
import pickle
import signal
import threading
import time

import pytest

from conftest import eventually
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._memory.sending import Lease
from oobpickle._native import core

PAGE = 4096


class LateError(Exception):
    pass


class Told:
    """What Python is told; it raises where that is an end."""

    def __init__(self):
        self.said = []

    def __call__(self, what, pid, timeout):
        self.said.append(what)
        if what != "died":
            raise LateError(what, pid, timeout)


class Side:
    """A participant, and its lock."""

    def __init__(self, arena, block):
        self.arena, self.block = arena, block
        assert block.share()
        self.lock, self.told = core.SharedLock(block), Told()
        self.looked, self.fails, self.entered = [], None, None

    def look(self, error):
        self.looked.append(error)
        if self.fails:
            raise self.fails

    def writing(self, timeout=0.0):
        return self.lock.holding(self, True, timeout, self.told, self.look)

    def reading(self, timeout=0.0):
        return self.lock.holding(self, False, timeout, self.told, None)

    def enter(self, context=None):
        """Enter a turn, and do not leave it."""
        self.entered = context or self.writing()
        self.entered.__enter__()

    def is_free(self):
        """Whether it can have the lock at once."""
        try:
            with self.reading():
                return True
        except LateError:
            return False

    def die(self):
        self.arena.blocks.abandon()


def published(arena):
    memory = arena.acquire([2 * PAGE])
    memory.destinations[0][:] = bytes(2 * PAGE)
    (block,) = arena.blocks.publish(memory.blocks)
    return block


def sent(block, arena, other):
    """Send a reference to a shared view to the other arena, and return the view there."""
    (reference,) = block.refer([block])
    lease = Lease(arena.blocks, [reference])
    pairs = lease.pairs
    lease.seal(7)
    lease.depart()
    lease.settle()
    (view,) = other.blocks.claim(pairs, [0], False)
    return view


def end(arena):
    arena.close()
    arena.detach()
    if arena.blocks.joined:
        assert arena.try_destroy()
    elif arena.blocks.end():  # it has died
        arena._files.close()


@pytest.fixture
def sides():
    first = SharedArena.create(Options(capacity=16 << 20))
    second = SharedArena.attach(*(os.dup(fd) for fd in first.descriptors))
    one = Side(first, published(first))
    other = Side(second, sent(one.block, first, second))
    yield [one, other]
    for side in (other, one):
        side.lock = side.block = side.entered = None
        end(side.arena)


@pytest.fixture
def one(sides):
    return sides[0]


@pytest.fixture
def other(sides):
    return sides[1]


# --- memory


def test_what_one_writes_the_other_sees(one, other):
    memoryview(one.block)[PAGE] = 7

    assert memoryview(other.block)[PAGE] == 7


def test_a_shared_view_is_never_frozen_and_nobody_gets_a_private_one(one):

    assert not one.block.freeze()
    assert one.block.again() is None
    assert not memoryview(one.block).readonly


def test_what_lies_in_a_shared_view_is_sent_by_value(one):
    message = core.Message(None, 0, ({}, {}, {}, lambda *_: None), one.arena.blocks)
    message.take(pickle.PickleBuffer(memoryview(one.block)))

    assert message.references == []


def test_a_message_that_cannot_become_a_pickle_has_the_sizes_that_it_had(one):
    message = core.Message(None, 0, ({}, {}, {}, lambda *_: None), one.arena.blocks)
    for reference in one.block.refer([one.block, one.block]):
        message.take(message.stand_in(reference))
    sizes = message.sizes
    with pytest.raises(TypeError, match="cannot be sent in this message"):
        message.to_pickle(b"", b"", b"")

    assert message.sizes == sizes
    assert len(sizes) == 32


def test_a_reference_has_no_memory_before_it_is_received(one):
    (reference,) = one.block.refer([one.block])
    with pytest.raises(BufferError, match="not mapped before it is received"):
        memoryview(reference)


def test_a_view_that_cannot_be_mapped_shared_is_none(one):
    block = published(one.arena)
    core.arm("view.share", 1, -errno.ENOMEM)
    try:
        assert not block.share()
    finally:
        core.arm(None, 0, 0)
    assert block.share()


def test_only_a_shared_view_has_a_lock(one):
    with pytest.raises(ValueError, match="shared view"):
        core.SharedLock(published(one.arena))
    with pytest.raises(TypeError, match="shared views of this arena"):
        one.block.refer([published(one.arena)])


def test_the_last_reference_frees_the_memory(one, other):
    before = one.arena.statistics().n_references
    references = one.block.refer([one.block])

    assert one.arena.statistics().n_references == before + 1
    del references
    assert one.arena.statistics().n_references == before


# --- the lock


def test_it_gives_the_object(one):
    with one.writing() as obj:
        assert obj is one
        assert one.lock.is_held
    assert not one.lock.is_held


def test_it_excludes_the_other(one, other):
    for mine in (one.writing, one.reading):
        with mine():
            assert not other.is_free()
        assert other.is_free()
    assert other.told.said == ["late", "late"]


def test_who_is_late_is_told_who_has_it(one, other):
    with one.reading(), pytest.raises(LateError) as caught, other.writing(timeout=0.05):
        pass

    assert caught.value.args == ("late", os.getpid(), 0.05)


def test_it_can_be_entered_again_by_the_same_thread(one, other):
    with one.writing(), one.reading(), one.writing():
        assert not other.is_free()
    assert other.is_free()
    assert one.lock.version == 1


def test_writing_within_reading_ends_with_itself(one, other):
    with one.reading():
        with one.writing():
            pass
        assert one.lock.version == 1
        assert not other.is_free()
    assert one.lock.version == 1


def test_a_context_is_entered_once(one):
    context = one.writing()
    with context, pytest.raises(RuntimeError, match="entered already"):
        context.__enter__()
    with pytest.raises(RuntimeError, match="has not entered"):
        context.__exit__(None, None, None)


def test_a_turn_that_is_dropped_is_over(one, other):
    """As by a `with` statement that was interrupted as it entered."""
    one.enter()
    assert not other.is_free()
    one.entered = None
    assert other.is_free()
    assert one.looked == []
    assert one.lock.version == 1


def test_threads_of_one_process_exclude_each_other(one):
    entered, n = [], 0

    def enter():
        nonlocal n
        for _ in range(300):
            with one.writing(timeout=20):
                entered.append(threading.current_thread().name)
                seen = n
                os.sched_yield()
                n = seen + 1

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert n == one.lock.version == 900
    assert len(set(entered)) == 3


def test_a_thread_does_not_leave_what_another_has_entered(one, other):
    context = one.writing()
    context.__enter__()
    errors = []

    def leave():
        try:
            context.__exit__(None, None, None)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()

    assert errors == ["a thread leaves what it has not entered"]
    assert not other.is_free()
    context.__exit__(None, None, None)
    assert other.is_free()


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1"])
def test_a_timeout_is_seconds_or_none(one, timeout):
    with pytest.raises((ValueError, TypeError)):
        one.writing(timeout=timeout)


def test_an_endless_wait_ends_when_it_is_free(one, other):
    context = one.writing()
    context.__enter__()
    got = []

    def wait():
        with other.reading(timeout=None):
            got.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    assert not other.is_free()
    context.__exit__(None, None, None)
    thread.join(20)

    assert got == [True]


# --- looking and telling


def test_only_who_writes_is_looked_at_and_only_once(one):
    with one.reading():
        pass
    assert one.looked == []
    with one.writing(), one.writing():
        pass
    assert one.looked == [None]


def test_it_is_given_back_whatever_the_look_raises(one, other):
    one.fails = KeyError("odd")
    with pytest.raises(KeyError, match="odd"), one.writing():
        pass

    assert other.is_free()
    assert one.lock.version == 1


def test_an_error_within_is_shown_to_the_look_and_passed_on(one, other):
    error = ValueError("within")
    with pytest.raises(ValueError, match="within"), one.writing():
        raise error

    assert one.looked == [error]
    assert other.is_free()


# --- the dead


def test_the_lock_of_the_dead_is_taken_over_and_the_next_is_told(one, other):
    other.enter()
    other.die()

    with one.writing(timeout=5):
        assert one.told.said == ["died"]
        assert one.lock.owner_died
    assert not one.lock.owner_died
    with one.writing():
        pass
    assert one.told.said == ["died"]


def test_who_died_reading_has_changed_nothing(one, other):
    other.enter(other.reading())
    other.die()

    with one.writing(timeout=5):
        assert not one.lock.owner_died
    assert one.told.said == []


def test_all_are_told_until_somebody_has_written_without_an_error(one, other):
    other.enter()
    other.die()
    with one.reading(timeout=5):
        pass
    with pytest.raises(KeyError), one.writing():
        raise KeyError
    with one.reading():
        pass
    assert one.told.said == ["died"] * 3
    with one.writing():
        pass
    with one.reading():
        pass

    assert one.told.said == ["died"] * 4


def test_it_is_given_back_if_telling_raises(one, other):
    other.enter()
    other.die()

    def refuse(what, pid, timeout):
        raise RuntimeWarning(what)

    context = one.lock.holding(None, True, 5, refuse, one.look)
    with pytest.raises(RuntimeWarning, match="died"):
        context.__enter__()
    assert one.is_free()
    assert one.lock.version == 0
    assert one.lock.owner_died


def test_a_slot_that_is_used_again_is_not_its_predecessor(sides):
    one, other = sides
    slot = other.arena.blocks.slot
    other.enter()
    other.die()
    assert one.arena.blocks.reap() == 1
    third = SharedArena.attach(*(os.dup(fd) for fd in one.arena.descriptors))
    try:
        assert third.blocks.slot == slot
        with one.writing(timeout=5):
            assert one.told.said == ["died"]
    finally:
        end(third)


def test_who_has_left_the_arena_cannot_have_it(one, other):
    other.die()

    with pytest.raises(LateError, match="detached"):
        other.writing().__enter__()


# --- versions


def test_a_version_counts_the_ends_of_writing(one, other):
    for n in range(3):
        assert (one.lock.version, other.lock.version) == (n, n)
        with other.writing():
            assert one.lock.version == n
        with one.reading():
            pass

    assert one.lock.wait(2, None, one.told) == 3


def test_waiting_ends_with_the_next_version(one, other):
    found = []
    thread = threading.Thread(target=lambda: found.append(one.lock.wait(0, None, one.told)))
    thread.start()
    assert other.lock.wait(0, 0.01, other.told) is None
    with other.writing():
        pass
    thread.join(20)

    assert found == [1]


def test_many_versions_wake_who_waits_for_each(one, other):
    """A writer that only counts on, and one that waits for each next version."""
    found, n = [0], 500

    def follow():
        while found[-1] < n:
            found.append(one.lock.wait(found[-1], 20, one.told))

    thread = threading.Thread(target=follow)
    thread.start()
    for _ in range(n):
        with other.writing(timeout=20):
            pass
    thread.join(30)

    assert found[-1] == n
    assert found == sorted(set(found))


def test_waiting_for_a_version_in_time(one):
    begun = time.monotonic()

    assert one.lock.wait(0, 0.05, one.told) is None
    assert 0.05 <= time.monotonic() - begun < 10


def test_a_version_beyond_32_bits(one, other):
    memoryview(one.block)[64:72] = ((1 << 32) - 2).to_bytes(8, "little")
    thread_found = []
    known = (1 << 32) - 1
    thread = threading.Thread(
        target=lambda: thread_found.append(one.lock.wait(known, 20, one.told))
    )
    thread.start()
    eventually(lambda: memoryview(one.block)[28])  # it has said that it waits
    for _ in range(2):
        with other.writing(timeout=5):
            pass
    thread.join(20)

    assert one.lock.version == 1 << 32
    assert thread_found == [1 << 32]


# --- signals and forks


class AlarmError(Exception):
    pass


class Alarm:
    """A signal that comes again and again, and raises where it may."""

    def __init__(self):
        self.may_raise = False

    def ring(self, *_):
        if self.may_raise:
            self.may_raise = False
            raise AlarmError

    def ends(self, call):
        """Whether it ends a call, and not after the fact."""
        try:
            self.may_raise = True
            call()
            self.may_raise = False
        except AlarmError:
            return True
        return False


@pytest.fixture
def alarm():
    alarm = Alarm()
    before = signal.signal(signal.SIGALRM, alarm.ring)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.0003)
    yield alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_ends_the_wait_for_the_lock(one, other, alarm):
    with one.writing():
        assert alarm.ends(other.writing(timeout=None).__enter__)
    assert other.is_free()


def test_a_handler_that_raises_ends_the_wait_for_a_version(one, other, alarm):
    assert alarm.ends(lambda: one.lock.wait(0, None, one.told))
    with one.writing():
        pass
    assert other.is_free()


def test_an_interrupt_never_leaves_the_lock_taken(one, other, alarm):
    def turn():
        with one.writing():
            pass

    n_raised, until = 0, time.monotonic() + 1
    while time.monotonic() < until:
        n_raised += alarm.ends(turn)
        assert not one.lock.is_held

    assert n_raised > 10
    assert other.is_free()


def in_child(call):
    """Run it in a forked child; return its exit code."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = call()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_that_is_forked_in_a_turn_has_not_the_lock(one, other):
    context = one.writing()
    context.__enter__()

    def child():
        held = one.lock.is_held
        free = one.is_free()
        context.__exit__(None, None, None)
        return 10 * held + free

    assert in_child(child) == 0
    assert one.lock.is_held
    assert not other.is_free()
    context.__exit__(None, None, None)
    assert one.lock.version == 1


def test_a_child_has_the_lock_in_its_turn(one, other):
    def child():
        with one.writing(timeout=20):
            memoryview(one.block)[PAGE] += 1
        return one.lock.version

    assert [in_child(child) for _ in range(3)] == [1, 2, 3]
    assert memoryview(other.block)[PAGE] == 3


def test_a_handler_that_forks_while_we_wait(one, other):
    """Parent and child both go on waiting, each as itself."""
    pids = []

    def split(*_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        pids.append(os.fork())

    context = other.writing()
    context.__enter__()
    before = signal.signal(signal.SIGALRM, split)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(LateError):
            one.writing(timeout=0.2).__enter__()
    finally:
        signal.signal(signal.SIGALRM, before)
        if pids == [0]:
            # The child: the lock is the parent's other participant's, whom it still waits for.
            os._exit(0 if not one.is_free() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
    context.__exit__(None, None, None)
    assert one.is_free()
