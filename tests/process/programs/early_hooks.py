"""Hooks of forks that were registered before ours: what they do, we find done, or see too late."""

# ruff: noqa: E402
import ctypes
import os
import threading

_libc = ctypes.CDLL(None)
_before_the_fork = [lambda: None]
_in_the_child = [lambda: None]


@ctypes.CFUNCTYPE(None)
def _prepare():  # what is registered first runs last
    _before_the_fork[0]()


_libc.__register_atfork(_prepare, None, None, None)
os.register_at_fork(after_in_child=lambda: _in_the_child[0]())

import gc
import multiprocessing

import inside
from inside import Token, eventually, fork, message, reap, verify

import oobpickle
from internals import inner

MIB = 1 << 20


def _is_freed(arena):
    gc.collect()
    inner(arena).reclaim.look()
    return not arena.statistics().n_published


def a_child_that_drops_what_it_inherits():
    """It has no views when our hook looks, and does not hold back what others drop."""
    ended = Token()
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        has = {"value": oobpickle.broadcast(message(1, 10 * MIB)).value}
        _in_the_child[0] = has.clear
        pid = fork(ended.take)
        has.clear()
        eventually(lambda: _is_freed(arena))
        ended.give()
        reap(pid)


def a_view_that_comes_while_c_forks():
    """The child has it, and is known to have it, although it was prepared before."""
    dropped, checked, go = Token(), Token(), multiprocessing.get_context("fork").Event()
    about_to_fork = threading.Event()
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        read, write = multiprocessing.get_context("fork").Pipe()

        def send():
            write.send(oobpickle.broadcast(message(2, 10 * MIB)))
            go.wait()

        sender, has = fork(send), []
        eventually(read.poll)

        def receive():
            about_to_fork.wait()
            has.append(read.recv())

        thread = threading.Thread(target=receive)
        thread.start()
        _before_the_fork[0] = lambda: (about_to_fork.set(), thread.join())
        pid = _libc.fork()
        if pid == 0:
            try:
                dropped.take()
                verify(has[0], 2)
                checked.give()
            finally:
                os._exit(0)
        _before_the_fork[0] = lambda: None
        has.clear()
        go.set()
        reap(sender)
        gc.collect()
        inner(arena).reclaim.look()
        assert arena.statistics().n_published == 1
        dropped.give()
        checked.take()
        reap(pid)
        eventually(lambda: _is_freed(arena))


if __name__ == "__main__":
    inside.main()
