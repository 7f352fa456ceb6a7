"""Forks of a process that holds more blocks than the system allows mappings."""

import ctypes
import errno
import mmap
import multiprocessing
import os
import time

import inside
import numpy as np
from inside import Token, address, fork, reap

import oobpickle
from internals import inner

MIB = 1 << 20
N_MANY = 20_000  # each block mapped apart would need two of vm.max_map_count = 65,530


def _many(n_arrays, base):
    """Return the arrays of messages with a block for each array."""
    read, write = multiprocessing.Pipe(duplex=False)
    held = []
    for first in range(base, base + n_arrays, 400):
        write.send([np.full(4096, n) for n in range(first, first + 400)])
        held += read.recv()
    return held


def _assert_many(arrays, base, step=1):
    found = np.array([(one[0], one[2000], one[-1]) for one in arrays])
    expected = np.arange(base, base + step * len(arrays), step)
    assert (found == expected[:, None]).all()


def twenty_thousand_held_blocks():
    """Also if copying out is forbidden: what a fork cannot make private is copied nevertheless."""
    arena = oobpickle.install(capacity=1024 * MIB, threshold=1, copy_on_receive=False)
    held = _many(N_MANY, 0)
    n_held = arena.statistics().n_blocks["held"]
    assert n_held > 15_000, n_held
    arena.trim()
    written, recycled, ready = Token(), Token(), Token()

    def child():
        written.take()
        _assert_many(held, 0)
        for one in held[::2]:
            one[:] = -1
        ready.give()
        recycled.take()
        _assert_many(held[1::2], 1, 2)
        assert all((one == -1).all() for one in held[::200])

    pid = fork(child)
    assert os.fstat(inner(arena).descriptors[0]).st_blocks * 512 < MIB
    for one in held[1::2]:
        one += N_MANY
    written.give()
    ready.take()
    _assert_many(held[::2], 0, 2)
    _assert_many(held[1::2], 1 + N_MANY, 2)
    # Half of them go, and what comes then lies in their blocks, in between of the others.
    del held[::2]
    held += _many(N_MANY // 2, 5 * N_MANY)
    recycled.give()
    reap(pid)
    reap(fork(_assert_many, held[N_MANY // 2 :], 5 * N_MANY))
    _assert_many(held[: N_MANY // 2], 1 + N_MANY, 2)
    _assert_many(held[N_MANY // 2 :], 5 * N_MANY)
    statistics = arena.statistics()
    assert statistics.n_shared_after_fork == 0, statistics
    assert not statistics.fallbacks, statistics
    held.clear()
    arena.trim()
    assert not arena.statistics().n_blocks["held"]
    inside.assert_table_in_order(arena)


def one_message_of_more_blocks_than_a_fork_can_make_private():
    arena = oobpickle.install(capacity=512 * MIB, threshold=1, copy_on_receive=False)
    inner(arena).receiving._most_held = 300
    held = _many(400, 0)
    assert arena.statistics().n_copied_on_receive == 400
    reap(fork(held[0].fill, 9))
    _assert_many(held, 0)


def a_program_that_has_used_up_its_mappings():
    """The system allows no more: what stays shared is counted, and the fork does not take long."""
    arena = oobpickle.install(capacity=512 * MIB, threshold=1)
    held = _many(2_000, 0)
    ballast = mmap.mmap(-1, 70_000 * mmap.PAGESIZE)
    libc, first = ctypes.CDLL(None, use_errno=True), address(np.frombuffer(ballast, np.uint8))
    page = first
    while not libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, mmap.PROT_READ):
        page += 2 * mmap.PAGESIZE
    assert ctypes.get_errno() == errno.ENOMEM
    # Room for some hundred of them.
    usual = mmap.PROT_READ | mmap.PROT_WRITE
    assert not libc.mprotect(ctypes.c_void_p(first), 2_000 * mmap.PAGESIZE, usual)
    start_s = time.monotonic()
    reap(fork(lambda: None))
    took_s = time.monotonic() - start_s
    statistics = arena.statistics()
    assert 0 < statistics.n_shared_after_fork < 2_000, statistics
    assert statistics.n_shared_after_fork + statistics.n_copied_at_fork == 2_000, statistics
    assert took_s < 10, took_s
    _assert_many(held, 0)


if __name__ == "__main__":
    inside.main()
