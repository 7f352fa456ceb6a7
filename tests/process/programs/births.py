"""A forked child is a participant from the moment of the fork, whatever it does first."""

import ctypes
import errno
import multiprocessing
import os
import signal
import threading

import inside
from inside import Token, fork, is_in_arena, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._native import core

MIB = 1 << 20
_libc = ctypes.CDLL(None)  # without the GIL, as by a C library
_blocking = []


def _wait_where_hooks_run():
    if _blocking:
        started, go = _blocking
        started.give()
        go.take()


# Before oobpickle's own hook, which is registered with the first arena.
os.register_at_fork(after_in_child=_wait_where_hooks_run)


def _slots(arena, pid):
    """The slots of the participants with a pid."""
    return [slot for slot, its, _ in inner(arena).blocks.participants() if its == pid]


def _fork_from_c(*then):
    """Fork a child that runs none of Python's hooks, does that in C, and waits to be killed."""
    pid = _libc.fork()
    if pid:
        return pid
    for call, *arguments in then:
        call(*arguments)
    while True:
        _libc.pause()


def _kill(pid):
    os.kill(pid, signal.SIGKILL)
    reap(pid, inside.KILLED)


def _is_alive(arena, pid):
    (slot,) = _slots(arena, pid)
    return inner(arena).blocks.is_alive(slot)


def before_its_hooks_run():
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        started, go = Token(), Token()
        _blocking[:] = started, go

        def child():
            assert oobpickle.statistics().n_participants == 2
            go.take()

        pid = fork(child)
        started.take()
        _blocking.clear()
        assert _is_alive(arena, pid)
        (slot,) = _slots(arena, pid)
        go.give()
        go.give()
        reap(pid)
        assert not inner(arena).blocks.is_alive(slot)
        assert inner(arena).blocks.reap() == 1
        assert oobpickle.statistics().n_participants == 1


def that_never_runs_python():
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        pid = _fork_from_c()
        inside.eventually(lambda: _slots(arena, pid))
        (slot,) = _slots(arena, pid)
        assert inner(arena).blocks.is_alive(slot)
        assert inner(arena).reclaim.sees_all()
        _kill(pid)
        assert not inner(arena).blocks.is_alive(slot)
        assert inner(arena).blocks.reap() == 1
        assert len(inner(arena).blocks.participants()) == 1


def that_closes_all_descriptors():
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        read, write = os.pipe()
        closed = ctypes.create_string_buffer(b"closed")
        pid = _fork_from_c(
            (_libc.dup2, write, 100),
            (_libc.close_range, 3, 99, 0),
            (_libc.close_range, 101, 1 << 20, 0),
            (_libc.write, 100, closed, 6),
        )
        assert os.read(read, 6) == b"closed"
        assert _is_alive(arena, pid)
        _kill(pid)
        assert inner(arena).blocks.reap() == 1
        os.close(read)
        os.close(write)


def of_threads_that_fork_at_once():
    """No child keeps a sibling alive, nor its parent."""
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        pids = []
        barrier = threading.Barrier(4)

        def fork_some():
            barrier.wait()
            for _ in range(10):
                pids.append(_fork_from_c())

        threads = [threading.Thread(target=fork_some) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        inside.eventually(lambda: all(_slots(arena, pid) for pid in pids))
        slots = {pid: _slots(arena, pid)[0] for pid in pids}
        assert len(set(slots.values())) == 40
        for n, pid in enumerate(pids):
            assert all(inner(arena).blocks.is_alive(slots[other]) for other in pids[n:])
            _kill(pid)
            assert not inner(arena).blocks.is_alive(slots[pid])
        assert inner(arena).blocks.reap() == 40


def a_parent_that_dies_first():
    """Its proof of life is not inherited: what it had comes back although its child lives."""
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        read, write = os.pipe()

        def parent():
            lease = inner(arena).acquire([10 * MIB])
            os.write(write, b"%d\n" % _fork_from_c())
            signal.pause()
            del lease

        pid = fork(parent)
        child = int(os.read(read, 20))
        assert arena.statistics().nbytes["leased"] == 10 * MIB
        _kill(pid)
        inside.eventually(lambda: inner(arena).blocks.reap() == 1)
        assert arena.statistics().nbytes["leased"] == 0
        assert _is_alive(arena, child)
        os.kill(child, signal.SIGKILL)
        inside.eventually(lambda: not _is_alive(arena, child))
        os.close(read)
        os.close(write)


def a_child_of_one_that_runs_no_hooks():
    """It lives on when its parent, which has not joined by itself, is dead."""
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        read, write = os.pipe()
        middle = _libc.fork()
        if middle == 0:
            _fork_from_c((lambda: os.write(write, b"%d\n" % os.getpid()),))
            while True:
                _libc.pause()
        child = int(os.read(read, 20))
        assert _is_alive(arena, middle), "its child has ended it"
        assert not _slots(arena, child)
        _kill(middle)
        assert inner(arena).blocks.reap() == 1, "its child has its proof of life"
        os.kill(child, signal.SIGKILL)
        os.close(read)
        os.close(write)


def without_a_descriptor_for_it():
    """Then it joins by itself, as who is older than the arena does."""
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        read, write = multiprocessing.Pipe(duplex=False)

        def child():
            assert inner(arena).blocks.joined
            write.send(message(1, MIB))

        core.arm("birth.open", 1, -errno.EMFILE)
        pid = fork(child)
        core.arm(None, 0, 0)
        assert is_in_arena(arena, verify(read.recv(), 1)[1])
        reap(pid)


def many_that_end_soon():
    """Their slots are used again."""
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        for _ in range(200):
            reap(fork(lambda: None))
        slots = [slot for slot, _, _ in inner(arena).blocks.participants()]
        assert max(slots) < 20, slots
        reap(fork(lambda: None))
        inner(arena).reclaim.reap()
        assert oobpickle.statistics().n_participants == 1


def after_the_end():
    """Who is forked when the arena is closed is not counted, but while it copies what is held."""
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        pass
    assert inner(arena).blocks.ended
    pid = _fork_from_c()
    _kill(pid)
    arena = oobpickle.install()
    held = None
    read, write = multiprocessing.Pipe(duplex=False)
    write.send(message(1, MIB))
    held = verify(read.recv(), 1)
    oobpickle.uninstall()
    assert not inner(arena).blocks.ended
    reap(fork(verify, held, 1))
    assert len(inner(arena).blocks.participants()) <= 1
    del held


if __name__ == "__main__":
    inside.main()
