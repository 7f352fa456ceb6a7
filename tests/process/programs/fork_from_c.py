"""Forks by C code that tells Python of them in the child only, or never, as servers do."""

import _imp as imp
import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading

import inside
from inside import Token, is_in_arena, message, reap, verify

import oobpickle
from internals import inner
from oobpickle import _faults
from oobpickle._native import core

MIB = 1 << 20
_libc = ctypes.PyDLL(None)  # with the GIL held, as a server has it
_libc_without_gil = ctypes.CDLL(None)
_after_fork_in_child = ctypes.pythonapi.PyOS_AfterFork_Child
_after_fork_in_child.restype = None


def _fork(run, *args, libc=_libc):
    """Fork a child in C that runs ``run(*args)``."""
    imp.acquire_lock()  # the child releases it, as of CPython 3.13 whether it has it or not

    def run_told():
        _after_fork_in_child()
        run(*args)

    pid = _fork_untold(libc, run_told)
    imp.release_lock()
    return pid


def _fork_beside_threads(run, *args):
    """The same beside other threads: Python is told in C, as servers do.

    A thread may have asked for the GIL just before. An untold child that runs bytecode hands it
    over, and waits for that thread, which it does not have, to take it.
    """
    _tell_every_child()
    imp.acquire_lock()
    pid = _fork_untold(_libc, run, *args)
    imp.release_lock()
    return pid


@functools.cache
def _tell_every_child():
    told = ctypes.cast(ctypes.pythonapi.PyOS_AfterFork_Child, ctypes.c_void_p)
    assert _libc.__register_atfork(None, None, told, None) == 0


def _fork_untold(libc, run, *args):
    """Fork a child in C that runs ``run(*args)``, and no hook of Python's."""
    sys.stdout.flush()
    pid = libc.fork()
    if pid == 0:
        inside.end_with(run, *args)
    return pid


def _received(seed, nbytes=1_000_000):
    read, write = multiprocessing.Pipe(duplex=False)
    write.send(message(seed, nbytes))
    return verify(read.recv(), seed)


def siblings_and_master_write(fork=_fork):
    """0 of 20 writes are seen by anybody else."""
    arena = oobpickle.install(capacity=256 * MIB)
    held = [_received(seed, size) for seed, size in enumerate((70_001, 1_000_000, 5_000_000))]
    assert all(is_in_arena(arena, one[1]) for one in held)
    begun, go, written, checked = ([Token() for _ in range(3)] for _ in range(4))

    def child(n):
        begun[n].give()
        go[n].take()
        for value in range(20):
            for one in held:
                one[1][value::20] = n + 1
        written[n].give()
        checked[n].take()
        assert all((one[1] == n + 1).all() for one in held)

    pids = [fork(child, n) for n in range(3)]
    for token in begun:
        token.take()
    for one in held:
        one[1][:] = 200
    for n in range(3):
        go[n].give()
        written[n].take()
        assert all((one[1] == 200).all() for one in held)
    for token in checked:
        token.give()
    for pid in pids:
        reap(pid)
    assert all((one[1] == 200).all() for one in held)
    assert arena.statistics().n_shared_after_fork == 0
    inside.assert_table_in_order(arena)


def siblings_and_master_write_untold():
    """The first fork makes what the master holds ordinary memory, for all of its children."""
    siblings_and_master_write(functools.partial(_fork_untold, _libc))
    assert oobpickle.statistics().n_copied_at_fork == 3


def siblings_and_master_write_untold_without_the_gil():
    """Each child makes a copy."""
    siblings_and_master_write(functools.partial(_fork_untold, _libc_without_gil))
    assert oobpickle.statistics().n_copied_at_fork == 0


def an_untold_child_has_what_was_there_at_the_fork():
    """The parent overwrites and drops it at once; the block was not on loan to the child."""
    for libc in (_libc, _libc_without_gil):
        with oobpickle.enabled(capacity=256 * MIB, threshold="64 KiB") as arena:
            held = _received(1, 50_000_000)
            assert is_in_arena(arena, held[1])
            pid = _fork_untold(libc, verify, held, 1)
            held[1][:] = 0
            del held
            others = [_received(seed, 50_000_000) for seed in (2, 3)]
            reap(pid)
            del others
            inner(arena).reclaim.reap()
            inside.assert_empty(arena)


def after_the_block():
    """An ended arena's arrays are the child's own, too."""
    for libc in (_libc, _libc_without_gil):
        with oobpickle.enabled(capacity=64 * MIB):
            held = _received(1)
        pids = [_fork_untold(libc, held[1].fill, n) for n in range(2)]
        for pid in pids:
            reap(pid)
        verify(held, 1)


def an_untold_child_dies_while_it_copies():
    """Its parent does not wait for it any longer, and has all that it had."""
    arena = oobpickle.install(capacity=256 * MIB)
    held = _received(1)
    _faults.arm("privatize.step")
    pid = _libc_without_gil.fork()
    _faults.arm(None)
    reap(pid, inside.KILLED)
    verify(held, 1)
    assert is_in_arena(arena, held[1])
    assert inner(arena).blocks.reap() == 1
    inside.assert_table_in_order(arena)


def untold_children_send_and_receive():
    arena = oobpickle.install(capacity=64 * MIB)
    held = _received(1)
    there, back = multiprocessing.Pipe(duplex=False), multiprocessing.Pipe(duplex=False)

    def child():
        for seed in range(10):
            received = verify(there[0].recv(), seed)
            received[1][:] = 0
            back[1].send(message(100 + seed))
        verify(held, 1)

    for libc in (_libc, _libc_without_gil):
        pid = _fork_untold(libc, child)
        for seed in range(10):
            there[1].send(message(seed))
            verify(back[0].recv(), 100 + seed)
        reap(pid)
    verify(held, 1)
    inner(arena).reclaim.reap()
    inside.assert_table_in_order(arena)


def master_releases_and_receives_more():
    """The child keeps its value; the blocks are the master's, and come back when it drops them."""
    arena = oobpickle.install(capacity=64 * MIB)
    held = [_received(seed) for seed in range(3)]
    n_resident = arena.statistics().nbytes_resident
    begun, go = Token(), Token()

    def child():
        begun.give()
        go.take()
        for seed, one in enumerate(held):
            verify(one, seed)
        held.clear()
        gc.collect()
        for seed in range(20, 30):
            assert is_in_arena(oobpickle.install(), _received(seed)[1])

    pid = _fork(child, libc=_libc_without_gil)
    begun.take()
    assert arena.statistics().nbytes_resident >= n_resident  # nobody has punched them
    for seed, one in enumerate(held):
        verify(one, seed)
    held.clear()
    others = [_received(seed) for seed in range(10, 16)]
    go.give()
    reap(pid)
    for seed, one in enumerate(others):
        verify(one, 10 + seed)
    del others, one
    gc.collect()
    inner(arena).reclaim.reap()
    inside.assert_empty(arena)


def children_send_and_receive():
    arena = oobpickle.install(capacity=64 * MIB)
    held = _received(1)
    there, back = multiprocessing.Pipe(duplex=False), multiprocessing.Pipe(duplex=False)

    def child(n):
        for _ in range(10):
            received = verify(there[0].recv())
            received[1][:] = n
            verify(held, 1)
            back[1].send(message(n))

        def grandchild():
            held[1][:] = 5
            back[1].send(message(100 + n))

        reap(inside.fork(grandchild))
        reap(_fork(grandchild))
        verify(held, 1)

    for n in range(2):
        pid = _fork(child, n)
        for seed in range(10):
            there[1].send(message(seed))
            verify(back[0].recv(), n)
        for _ in range(2):
            verify(back[0].recv(), 100 + n)
        reap(pid)
    verify(held, 1)
    assert arena.statistics().n_fallbacks == 0
    inside.assert_table_in_order(arena)


def each_is_killed():
    """What a child had comes back; what the master had stays its children's."""
    oobpickle.install(capacity=64 * MIB)
    begun, dead, checked = Token(), Token(), Token()

    def master():
        arena = oobpickle.install()
        held = _received(1)

        def worker(n):
            own = _received(10 + n)
            begun.give()
            if n == 0:
                signal.pause()
            dead.take()
            verify(held, 1)
            verify(own, 10 + n)
            for seed in range(20, 26):
                _received(seed)[1][:] = 0
            verify(held, 1)
            checked.give()

        victim, _ = _fork(worker, 0), _fork(worker, 1)
        begun.take()
        begun.take()
        os.kill(victim, signal.SIGKILL)
        reap(victim, inside.KILLED)
        inside.eventually(inner(arena).reclaim.reap)
        verify(held, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = inside.fork(master)
    reap(pid, inside.KILLED)
    arena = oobpickle.install()
    inside.eventually(inner(arena).reclaim.reap)
    others = [_received(seed) for seed in range(30, 36)]
    for one in others:
        one[1][:] = 0
    dead.give()
    checked.take()
    inside.eventually(lambda: inner(arena).reclaim.reap() or arena.statistics().n_participants == 1)
    inside.assert_table_in_order(arena)


def in_the_middle_of_another_threads_step():
    """The other thread waits for the lock, and does not exist in the child."""
    arena = oobpickle.install(capacity=64 * MIB)
    held, inside_step = _received(1), threading.Event()

    def work():
        stopped = inside.fork(inside.stop_with_the_lock, arena)
        os.waitpid(stopped, os.WUNTRACED)
        inside_step.set()
        with contextlib.suppress(oobpickle.ArenaFullError):
            inner(arena).acquire([1000], wait_timeout=0)  # waits for the lock, up to two seconds
        os.kill(stopped, signal.SIGCONT)
        reap(stopped)

    thread = threading.Thread(target=work)
    thread.start()
    inside_step.wait(20)
    begun, is_free = Token(), Token()

    def child():
        begun.give()
        held[1][:] = 2
        is_free.take()  # else it finds the lock busy, and there is nothing to see
        assert is_in_arena(arena, _received(2)[1])
        arena.statistics()

    pid = _fork_beside_threads(child)
    begun.take()
    thread.join()
    is_free.give()
    reap(pid)
    verify(held, 1)
    inside.assert_table_in_order(arena)


def by_another_thread():
    """While others send and receive."""
    arena = oobpickle.install(capacity=128 * MIB)
    held, stop, failed = _received(1), threading.Event(), []

    def traffic(seed):
        try:
            while not stop.is_set():
                _received(seed)[1][:] = 0
        except BaseException as error:
            failed.append(error)
            raise

    def child():
        held[1][:] = 3
        for seed in range(5):
            _received(seed)
        assert (held[1] == 3).all()

    def work():
        for _ in range(10):
            reap(_fork_beside_threads(child))
            verify(held, 1)

    threads = [threading.Thread(target=traffic, args=(seed,)) for seed in (50, 51)]
    forking = threading.Thread(target=work)
    for thread in [*threads, forking]:
        thread.start()
    forking.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    verify(held, 1)
    inner(arena).reclaim.reap()
    inside.assert_table_in_order(arena)


def with_descriptors_closed():
    """A server that closes what it does not know, and then forks its workers."""
    arena = oobpickle.install(capacity=64 * MIB)
    held = [_received(seed) for seed in range(2)]
    for fd in inside.descriptors_of(arena):
        os.close(fd)
    opened = [os.memfd_create("theirs") for _ in range(8)]
    begun, go = [Token(), Token()], [Token(), Token()]

    def child(n):
        for one in held:
            one[1][:] = n
        begun[n].give()
        go[n].take()
        assert all((one[1] == n).all() for one in held)
        assert not any(os.fstat(fd).st_size for fd in opened)

    pids = [_fork(child, n) for n in range(2)]
    for token in begun:
        token.take()
    for seed, one in enumerate(held):
        verify(one, seed)
    for token in go:
        token.give()
    for pid in pids:
        reap(pid)
    assert arena.statistics().n_blocks["held"] == 2
    os._exit(0)


def between_forks_of_python():
    """A fork by Python, before and after, is known from one by C, also if it failed."""
    arena = oobpickle.install(capacity=64 * MIB)
    held = _received(1)
    reap(inside.fork(lambda: verify(held, 1)))
    reap(_fork(held[1].fill, 2))
    verify(held, 1)
    more = _received(2)
    reap(_fork(more[1].fill, 3))
    verify(more, 2)
    core.fork_before()  # and the fork fails
    core.fork_in_parent()
    last = _received(3)
    assert is_in_arena(arena, last[1])
    reap(_fork(last[1].fill, 4))
    verify(last, 3)
    for one in (held, more, last):
        reap(inside.fork(one[1].fill, 5))
        verify(one)


if __name__ == "__main__":
    inside.main()
