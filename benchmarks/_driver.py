"""One side of a comparison: a process with a ``Pool(1)``, told by the coordinator what to do.

What
    ``main("plain", ...)`` and ``main("oobpickle", ...)`` run the same code; the second one calls
    ``oobpickle.install()`` first. The hooks of oobpickle hold for a whole process, so the plain
    side needs one that they never touch.

How it works
    Requests come as one line of JSON on stdin, ``[command, argument, ...]``, and each gets one
    line of JSON on stdout: ``{"ok": value}`` or ``{"error": text}``. Between two requests a side
    sleeps, so that the sides do not disturb one another.

Lifetime
    The side ends at the end of its stdin. It keeps one model, in the process that sends it, and
    drops what arrives before the next message.

When it cannot
    Anything unexpected is answered with its traceback. What arrives damaged is an error too: its
    text begins with ``MISMATCH``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
import zlib
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
from _kinds import Sample, Small
from numpy.typing import NDArray

Words = NDArray[np.uint64]

MISMATCH = "MISMATCH"
_FOLD_WORDS = 4099  # Prime, so that no two pages, rows or blocks of a model fold onto themselves.


class Model:
    """What people send: random arrays, all their bytes written, and a few small attributes."""

    def __init__(self, nbytes: int, n_arrays: int) -> None:
        generator = np.random.Generator(np.random.SFC64(nbytes + n_arrays))
        n_words = nbytes // n_arrays // 8
        arrays = [generator.integers(0, 1 << 64, n_words, dtype=np.uint64) for _ in range(n_arrays)]
        self.weights: Words | list[Words] = arrays if n_arrays > 1 else arrays[0]
        self.name = "transfer"
        self.n_epochs = 12
        self.loss = 0.125

    def arrays(self) -> list[Words]:
        return self.weights if isinstance(self.weights, list) else [self.weights]

    def checksum(self) -> int:
        """Read every byte, as fast as memory allows."""
        value = 0
        for array in self.arrays():
            value ^= int(np.bitwise_xor.reduce(array))
        return value

    def digest(self) -> int:
        """Read every byte; unlike the checksum, their order and the attributes count."""
        value = zlib.crc32(repr((self.name, self.n_epochs, self.loss)).encode())
        for array in self.arrays():
            n_whole = len(array) // _FOLD_WORDS * _FOLD_WORDS
            folded = np.bitwise_xor.reduce(array[:n_whole].reshape(-1, _FOLD_WORDS), axis=0)
            value = zlib.crc32(folded.tobytes(), value)
            value = zlib.crc32(array[n_whole:].tobytes(), value)
        return value

    def spoil(self) -> None:
        """Overwrite all arrays, which shows whether the sender's copy is a different one."""
        for array in self.arrays():
            array[...] = 0


_model: Model | Sample | None = None


def prepare(nbytes: int, n_arrays: int, kind: str) -> tuple[int, int]:
    """Keep a model in this process; return its checksum and digest."""
    global _model
    _model = Sample(kind, nbytes) if kind else Model(nbytes, n_arrays)
    return _model.checksum(), _model.digest()


def make_result(nbytes: int) -> Model | Sample:
    """In the worker: return the model that is already there."""
    assert _model is not None
    return _model


def take(model: Model | Sample) -> tuple[int, float]:
    """In the worker: read the argument; return its checksum and how long reading took."""
    start_s = time.perf_counter()
    checksum = model.checksum()
    return checksum, time.perf_counter() - start_s


def take_and_spoil(model: Model | Sample) -> int:
    """In the worker: return the digest of the argument, then overwrite it."""
    digest = model.digest()
    model.spoil()
    return digest


def _pin_apart(worker: int) -> None:
    """Keep the threads of this process on one core and the worker on another."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(worker, cores[1:2])
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores[:1])


class Side:
    """The commands; each public method is one."""

    def __init__(self, name: str, start_method: str) -> None:
        self._context = multiprocessing.get_context(start_method)
        self._arena: Any = None
        if name == "oobpickle":
            import oobpickle

            self._arena = oobpickle.install()._memory  # the library's own
        self._pool: Pool | None = None
        self._is_result = True
        self._nbytes = 0
        self._checksum = 0
        self._digest = 0

    def open(
        self, way: str, nbytes: int, n_arrays: int, is_pinned: bool, kind: str = ""
    ) -> dict[str, int]:
        """Start the pool and build the model where it is sent from; return the two pids."""
        self._pool = self._context.Pool(1)
        pids = {"parent": os.getpid(), "worker": self._pool.apply(os.getpid)}
        if is_pinned:
            _pin_apart(pids["worker"])
        self._is_result = way == "result"
        self._nbytes = nbytes
        if self._is_result:
            self._checksum, self._digest = self._pool.apply(prepare, (nbytes, n_arrays, kind))
        else:
            self._checksum, self._digest = prepare(nbytes, n_arrays, kind)
        return pids

    def prepare(self) -> None:
        """Have memory ready for the model, where that can be asked for."""
        if self._arena is not None:
            self._arena.preallocate(nbytes=self._nbytes)

    def send(self, n_messages: int) -> list[tuple[float, float]]:
        """Send the model so often; return the seconds until it arrived, and until it was read."""
        once = self._receive_result if self._is_result else self._send_argument
        return [once() for _ in range(n_messages)]

    def _receive_result(self) -> tuple[float, float]:
        assert self._pool is not None
        start_s = time.perf_counter()
        model = self._pool.apply(make_result, (self._nbytes,))
        arrived_s = time.perf_counter()
        checksum = model.checksum()
        read_s = time.perf_counter()
        self._compare(checksum, self._checksum)
        return arrived_s - start_s, read_s - start_s

    def _send_argument(self) -> tuple[float, float]:
        assert self._pool is not None
        start_s = time.perf_counter()
        checksum, reading_s = self._pool.apply(take, (_model,))
        total_s = time.perf_counter() - start_s
        self._compare(checksum, self._checksum)
        return total_s - reading_s, total_s

    def verify(self) -> None:
        """Send the model once, compare all of it, and overwrite what arrived."""
        assert self._pool is not None
        if self._is_result:
            received = self._pool.apply(make_result, (self._nbytes,))
            digest = take_and_spoil(received)
        else:
            digest = self._pool.apply(take_and_spoil, (_model,))
        self._compare(digest, self._digest)

    def _compare(self, found: int, expected: int) -> None:
        if found != expected:
            raise ValueError(f"{MISMATCH}: sent {expected:#x}, received {found:#x}")

    def counts(self) -> tuple[int, int]:
        """Messages out of band and fallbacks in both processes so far; zeros when plain."""
        if self._arena is None:
            return 0, 0
        assert self._pool is not None
        self._pool.apply(os.getpid)  # A sender counts a message only after it has left.
        counts = self._arena.statistics()
        return counts.n_messages_out_of_band, counts.n_fallbacks

    def time_pickling(self, n_objects: int, n_repeats: int) -> list[tuple[float, float]]:
        """Seconds to pickle many small objects: as multiprocessing does it, and oobpickle."""
        from multiprocessing.reduction import ForkingPickler

        from oobpickle._envelope import tables
        from oobpickle._native import core
        from oobpickle._pickling.serializer import take_apart

        special: dict[type, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        objects = [Small(number) for number in range(n_objects)]
        times = []
        for _ in range(n_repeats):
            start_s = time.perf_counter()
            ForkingPickler.dumps(objects)
            between_s = time.perf_counter()
            take_apart(objects, core.Message(None, 128 << 10, tables(special)), by_value=True)
            times.append((between_s - start_s, time.perf_counter() - between_s))
        return times

    def time_acquire(self, n_live: int, n_repeats: int) -> float:
        """Median seconds of acquire + release of 64 KiB while so many leases of 4 KiB live."""
        live = [self._arena.acquire([4096]) for _ in range(n_live)]
        durations_s = []
        for _ in range(n_repeats):
            start_s = time.perf_counter()
            self._arena.acquire([65536]).release()
            durations_s.append(time.perf_counter() - start_s)
        for lease in live:
            lease.release()
        return statistics.median(durations_s)


def main(name: str, start_method: str, make: type[Side] = Side) -> None:
    """Answer requests, which are methods of what is made, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever else prints must not get among the answers.
    side = make(name, start_method)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = {"ok": getattr(side, command)(*arguments)}
        except Exception as error:
            answer = {"error": f"{error}\n{traceback.format_exc()}"}
        print(json.dumps(answer), file=answers, flush=True)
    if side._pool is not None:
        side._pool.terminate()
        side._pool.join()
