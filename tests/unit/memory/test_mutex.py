"""The locks around the ledger: exclusion, repair, and no way to leave one locked."""

import ctypes
import threading

import pytest

from conftest import eventually
from ledger_tools import FakeLocks, make_words
from oobpickle._memory.layout import H_DIRTY
from oobpickle._memory.mutex import LedgerBusyError, LedgerMutex, ThreadLock, fork_wheel


@pytest.fixture
def words():
    return make_words()


def mutex_of(words, locks=None, repair=lambda: None):
    return LedgerMutex(locks or FakeLocks(), words, repair)


def test_a_step_returns_its_value(words):
    assert 5 == mutex_of(words).run(1.0, lambda a, b: a + b, 2, 3)


def test_the_dirty_word_is_set_exactly_during_a_step(words):
    seen = mutex_of(words).run(1.0, lambda: words[H_DIRTY])

    assert (1, 0) == (seen, words[H_DIRTY])


def test_a_failed_step_is_repaired_by_the_next(words):
    repairs = []
    mutex = mutex_of(words, repair=lambda: repairs.append(words[H_DIRTY]))

    with pytest.raises(ZeroDivisionError):
        mutex.run(1.0, lambda: 1 // 0)
    assert [] == repairs
    mutex.run(1.0, lambda: None)
    mutex.run(1.0, lambda: None)

    assert [1] == repairs


def test_what_another_process_left_dirty_is_repaired(words):
    repairs = []
    words[H_DIRTY] = 1

    mutex_of(words, repair=lambda: repairs.append(1)).run(1.0, lambda: None)

    assert [1] == repairs


def test_the_same_thread_cannot_enter_twice(words):
    mutex = mutex_of(words)

    with pytest.raises(LedgerBusyError, match="this very thread"):
        mutex.run(1.0, mutex.run, 1.0, lambda: None)

    assert "free" == mutex.run(1.0, lambda: "free")


def test_another_process_makes_it_busy_after_the_bound(words):
    locks = FakeLocks()
    locks.taken_elsewhere = True
    mutex = mutex_of(words, locks)

    with pytest.raises(LedgerBusyError, match="another process") as caught:
        mutex.run(0.01, lambda: None)

    assert "busy" == caught.value.reason
    assert locks.n_tries > 1
    locks.taken_elsewhere = False
    assert "free" == mutex.run(0.01, lambda: "free")


def test_another_thread_makes_it_busy_after_the_bound(words):
    mutex, entered, leave = mutex_of(words), threading.Event(), threading.Event()

    def step():
        entered.set()
        assert leave.wait(20)

    thread = threading.Thread(target=mutex.run, args=(1.0, step))
    thread.start()
    assert entered.wait(20)
    try:
        with pytest.raises(LedgerBusyError, match="another thread"):
            mutex.run(0.01, lambda: None)
    finally:
        leave.set()
        thread.join()

    assert "free" == mutex.run(1.0, lambda: "free")


def test_threads_exclude_each_other(words):
    mutex, counts = mutex_of(words), [0]

    def step():
        value = counts[0]
        for _ in range(50):
            pass
        counts[0] = value + 1

    def work():
        for _ in range(300):
            mutex.run(20.0, step)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [1200] == counts


def raise_in(thread_id, exception):
    n_set = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(exception)
    )
    assert n_set == 1


class Interrupt(BaseException):
    """Stands for a KeyboardInterrupt; can be raised in a chosen thread."""


def test_interrupts_at_any_moment_leave_no_lock_behind(words):
    """A storm of asynchronous exceptions: the lock is free after each of them."""
    lock, done, n_rounds, n_caught = ThreadLock(), threading.Event(), [0], [0]

    def tick():
        n_rounds[0] += 1

    def rounds():
        while not done.is_set():
            lock.run(5.0, tick)

    def work():
        while not done.is_set():
            try:
                rounds()
            except Interrupt:
                n_caught[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    for n_wanted in range(1, 100):
        seen = n_rounds[0]
        eventually(lambda seen=seen: n_rounds[0] > seen + 1)  # it is inside its try again
        raise_in(thread.ident, Interrupt)
        eventually(lambda n=n_wanted: n_caught[0] >= n)
        lock.run(5.0, lambda: None)
    done.set()
    thread.join()

    assert [99] == n_caught


def test_a_fork_keeps_other_threads_out_and_its_own_finalizers_too(words):
    mutex = mutex_of(words)
    mutex.threads.enter_fork()
    mutex.threads.enter_fork()  # after an interrupt
    results = []

    def other():
        try:
            mutex.run(0.01, lambda: None)
        except LedgerBusyError as error:
            results.append(error.reason)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    with pytest.raises(LedgerBusyError):
        mutex.run(0.01, lambda: None)
    mutex.threads.leave_fork()
    mutex.threads.leave_fork()

    assert ["busy"] == results
    assert "free" == mutex.run(0.01, lambda: "free")


def test_a_fork_whose_own_hooks_were_aborted_leaves_no_lock_behind(words):
    mutex = mutex_of(words)
    mutex.threads.enter_fork()
    fork_wheel.rotate()  # what the hook that nothing interrupts does

    assert "free" == mutex.run(0.01, lambda: "free")
    assert "free" == mutex.run(0.01, lambda: "free")
