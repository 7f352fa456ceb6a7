"""How much memory a broadcast array takes with its readers, and what a fork copies of its views.

What
    `measure` returns figures as parts of the array's size: ``beside`` is what comes on top when the
    array is broadcast and four workers have read it, ``in_all`` what there is when the original is
    gone, ``copied_read_only`` and ``copied_writable`` what forked workers that inherit a view and
    read it have copied of it.

How it works
    Sampled all the time, the most counts: the proportional set size of this process and its
    workers, without shared memory, and the pages of the arena. What a fork has copied are the
    anonymous pages of the mapping, by the system's count. A barrier sees to it that each
    worker reads.

Lifetime
    The arena and the workers end with the call.

When it cannot
    A peak that is shorter than a sample takes, some 30 ms for 1 GB, may be missed.
"""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
from _peer_memory import Tree

import oobpickle

_N_WORKERS = 4
_inherited: list[Any] = []


def _begin(barrier: Any) -> None:
    _inherited.append(barrier)


def _read(array: Any) -> float:
    total = float(array.sum())
    _inherited[-1].wait(120)
    return total


def _copied(at: int) -> int:
    """Return the bytes of anonymous pages in the mapping of an inherited array."""
    array, nbytes = _inherited[at], 0
    array.sum()
    _inherited[-1].wait(120)
    start, is_its = array.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            low, high = (int(part, 16) for part in words[0].split("-"))
            is_its = low <= start < high
        elif is_its and words[0] == "Anonymous:":
            nbytes = int(words[1]) << 10
    return nbytes


class _Peak:
    """The most that this process, its workers and the arena have had at once, bytes."""

    def __init__(self, arena: Any) -> None:
        self._arena = arena
        self._tree = Tree(multiprocessing.current_process().pid or 0, "of nobody")
        self._is_over = threading.Event()
        self.nbytes = 0

    def now(self) -> int:
        shared = int(self._arena.statistics().nbytes_resident)
        return self._tree.private_nbytes() + shared

    def _watch(self) -> None:
        while not self._is_over.wait(0.001):
            self.nbytes = max(self.nbytes, self.now())

    def __enter__(self) -> _Peak:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.nbytes = max(self.nbytes, self.now())
        self._is_over.set()
        self._thread.join()


def measure(nbytes: int) -> dict[str, float]:
    """Return the figures for an array of so many bytes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(_N_WORKERS)
    with oobpickle.enabled(capacity=3 * nbytes + (256 << 20)) as arena:
        with context.Pool(_N_WORKERS, _begin, (barrier,)) as pool:
            before = _Peak(arena).now()
            array = np.arange(nbytes // 8, dtype=np.float64)
            with _Peak(arena) as beside:
                handle = oobpickle.broadcast(array)
                pool.map(_read, [handle] * _N_WORKERS, chunksize=1)
            del array
            with _Peak(arena) as in_all:
                pool.map(_read, [handle] * _N_WORKERS, chunksize=1)
        frozen = oobpickle.broadcast(handle.value, readonly=True)
        _inherited[:] = [frozen.value, handle.value]
        with context.Pool(_N_WORKERS, _begin, (barrier,)) as pool:
            copied = [sum(pool.map(_copied, [at] * _N_WORKERS, chunksize=1)) for at in range(2)]
        _inherited.clear()
    found = (beside.nbytes - before - nbytes, in_all.nbytes - before, *copied)
    names = ("beside", "in_all", "copied_read_only", "copied_writable")
    return {name: one / nbytes for name, one in zip(names, found, strict=True)}
