"""Copying: all of it, on one core or two, and no thread afterwards."""

import math
import multiprocessing
import os
import threading

import numpy as np
import pytest

import oobpickle
import samples
from oobpickle import _copying
from oobpickle._copying import copy_array, copy_bytes
from oobpickle._native import core

MIB = 1 << 20


@pytest.mark.parametrize("shape", [(1 << 20,), (7, 300, 211), (1, 1 << 18), (3000, 3, 97), (3,)])
@pytest.mark.parametrize("step", [1, 2, -1])
@pytest.mark.parametrize("has_core", [True, False])
def test_a_copy_is_whole(shape, step, has_core, monkeypatch):
    if not has_core:
        monkeypatch.setattr(_copying, "core", None)
    source = samples.filled("f8", shape)[::step]
    destination = np.zeros(source.shape)

    copy_array(destination, source)

    assert (source == destination).all()


@pytest.mark.parametrize("nbytes", [0, 1, 32 << 10, 100_000, 40 * MIB + 3, 64 * MIB])
@pytest.mark.parametrize("has_core", [True, False])
def test_bytes_of_any_size(nbytes, has_core, monkeypatch):
    if not has_core:
        monkeypatch.setattr(_copying, "core", None)
    source = np.resize(np.arange(251, dtype="u1"), nbytes)
    destination = np.zeros(nbytes, "u1")

    copy_bytes(memoryview(destination), memoryview(source))

    assert (source == destination).all()


@pytest.mark.parametrize("nbytes", [32 * MIB - 1, 32 * MIB, 32 * MIB + 63, 40 * MIB + 64])
@pytest.mark.parametrize("to", [0, 1, 16, 63])
@pytest.mark.parametrize("start", [0, 1, 40])
def test_large_memory_at_any_place(nbytes, to, start):
    """What is before and after it stays as it is."""
    source = np.resize(np.arange(251, dtype="u1"), start + nbytes)[start:]
    destination = np.full(64 + nbytes + 64, 255, "u1")

    core.copy(destination[to : to + nbytes], source)

    assert np.array_equal(destination[to : to + nbytes], source)
    assert (destination[:to] == 255).all()
    assert (destination[to + nbytes :] == 255).all()


_N = 5_000_011


@pytest.mark.skipif(core is None, reason="messages are not taken apart by the core")
@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((2 * _N,), np.s_[::2]),
        ((_N,), np.s_[::-1]),
        ((_N, 2, 2), np.s_[:, 1]),
        ((3, _N), np.s_[:, 1:]),
        ((2, 2, _N), np.s_[:, 1]),
        ((1, _N, 2), np.s_[..., :1]),
        ((4_999, 1_001, 3), np.s_[::-1, :, ::2]),
    ],
)
def test_large_memory_with_gaps_is_whole(shape, part):
    """It is copied piece by piece, by two threads where a core is idle."""
    source = np.arange(math.prod(shape)).reshape(shape)[part]
    read, write = multiprocessing.Pipe(duplex=False)
    with oobpickle.enabled() as arena:
        write.send(source)
        received = read.recv()
        assert arena.statistics().n_messages_out_of_band == 1
    assert np.array_equal(received, source)


def test_no_thread_is_left():
    source, destination = np.ones(64 * MIB, "u1"), np.zeros(64 * MIB, "u1")
    n_threads = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        core.copy(destination, source)
        assert n_threads == len(os.listdir("/proc/self/task"))


def test_other_threads_run_meanwhile():
    source, destination = np.ones(256 * MIB, "u1"), np.zeros(256 * MIB, "u1")
    n_steps, done = 0, threading.Event()

    def count():
        nonlocal n_steps
        while not done.is_set():
            n_steps += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = n_steps
    core.copy(destination, source)
    after = n_steps
    done.set()
    thread.join()

    assert after > before


@pytest.mark.parametrize(
    ("destination", "source", "error"),
    [
        (bytearray(3), b"four", ValueError),
        (b"read", b"only", TypeError),
        (np.zeros(10)[::2], np.zeros(5), TypeError),
        (bytearray(3), "str", TypeError),
    ],
)
def test_what_cannot_be_copied_is_refused(destination, source, error):
    with pytest.raises((error, BufferError)):
        core.copy(destination, source)
