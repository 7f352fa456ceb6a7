"""Under a madvise(2) that does nothing and reports success, as under qemu-user: see the test."""

import mmap
import multiprocessing
import os
import signal

import inside
from inside import Token, content, fork, is_in_arena, message, reap, verify

import oobpickle
from internals import inner

MIB = 1 << 20


def is_ignored():
    """The premise of the others."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 1
    page.madvise(9)  # MADV_REMOVE
    assert page[0] == 1


def values_of_a_fork():
    with oobpickle.enabled(capacity=256 * MIB, copy_on_receive=False) as arena:
        queue = multiprocessing.SimpleQueue()
        queue.put(message(1, 2_000_000))
        held = queue.get()
        assert is_in_arena(arena, held[1])
        go = Token()

        def child(held=held):
            verify(held, 1)
            go.take()
            verify(held, 1)

        pid = fork(child)
        verify(held, 1)
        held = None
        for seed in range(2, 6):  # in the same blocks, if they are free
            queue.put(message(seed, 2_000_000))
            verify(queue.get(), seed)
        go.give()
        reap(pid)


def pages_that_go_back():
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        queue = multiprocessing.SimpleQueue()
        queue.put(content(1, 4_000_000))
        queue.get()
        assert arena.statistics().nbytes_resident > 0
        arena.trim()
        assert arena.statistics().nbytes_resident == 0


def _slots(arena):
    """By pid."""
    return {pid: slot for slot, pid, _ in inner(arena).blocks.participants()}


def a_death_that_a_child_outlives():
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        told, go = Token(), Token()
        read, write = os.pipe()

        def child():
            grandchild = fork(go.take)
            os.write(write, f"{grandchild}\n".encode())
            told.give()
            signal.pause()

        pid = fork(child)
        told.take()
        grandchild = int(os.read(read, 32))
        inside.eventually(lambda: {pid, grandchild} <= set(_slots(arena)))
        slots = _slots(arena)
        os.kill(pid, signal.SIGKILL)
        reap(pid, inside.KILLED)
        assert not inner(arena).blocks.is_alive(slots[pid])
        assert inner(arena).blocks.is_alive(slots[grandchild])
        go.give()
        inside.eventually(lambda: not inner(arena).blocks.is_alive(slots[grandchild]))
        os.close(read)
        os.close(write)


if __name__ == "__main__":
    inside.main()
