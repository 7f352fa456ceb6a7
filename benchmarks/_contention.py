"""Contention: many processes that send to one another, and what they spend at the ledger's lock.

What
    `ping_pong` starts pairs of processes that send one array back and forth, `take_blocks` starts
    processes that only take a block and give it back, which is all lock and no copy. Both return a
    `Load`: what was done a second and, if asked, how long the lock was waited for and held.

How it works
    All processes work until they are warm, meet at a barrier, and stop at a moment that they are
    told: a new process has to enter the ledger and the blocks of all others in its page tables.
    `watch_lock` wraps methods of `LedgerMutex` in the process that calls it: the wait is what
    `_wait` takes, the hold is from the lock's taking to the end of `run_owned`. That costs a
    microsecond a step, so rates come from runs without it.

Lifetime
    The processes end with the call; one that does not is killed after `_PATIENCE_S`.

When it cannot
    A hold is measured by the clock: on a machine with fewer cores than processes the time during
    which the holder has no core is in it, as it is in what the others wait for.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

_PATIENCE_S = 60.0
_BLOCK_NBYTES = 64 << 10
_N_WARM = 40  # operations of each process before anything is counted

#: Works until the clock says so, but not more often than the second number; returns how often.
Work = Callable[[float, float], int]


@dataclass
class Load:
    """What all processes did together."""

    n_processes: int
    seconds: float
    n_done: float = 0
    n_steps: float = 0
    n_waited: float = 0
    wait_timeout: float = 0
    hold_s: float = 0

    @property
    def each_s(self) -> float:
        """Seconds for each operation, of all processes together."""
        return self.seconds / self.n_done

    def stored(self) -> dict[str, float]:
        """What one operation takes at the lock, and which share of the time goes there."""
        return {
            "operations_per_s": self.n_done / self.seconds,
            "steps_per_operation": self.n_steps / self.n_done,
            "share_of_steps_that_waited": self.n_waited / max(1, self.n_steps),
            "share_of_time_waiting": self.wait_timeout / (self.n_processes * self.seconds),
            "held_s_per_operation": self.hold_s / self.n_done,
            "share_of_time_held": self.hold_s / self.seconds,
        }


class _Watched:
    """Sums over the steps of this process."""

    def __init__(self) -> None:
        self.n_steps = self.n_waited = 0
        self.wait_timeout = self.hold_s = 0.0
        self.locked_at_s = 0.0


def watch_lock() -> _Watched:
    """From now on measure every step of this process."""
    from oobpickle._memory import locks, mutex

    seen = _Watched()
    run_owned, wait = mutex.LedgerMutex.run_owned, mutex.LedgerMutex._wait
    try_lock = locks.LockFile.try_lock
    clock = time.perf_counter

    def timed_lock(self: Any) -> bool:
        is_locked = try_lock(self)
        seen.locked_at_s = clock()
        return is_locked

    def timed_wait(self: Any, timeout_s: float) -> None:
        start_s = clock()
        seen.n_waited += 1
        try:
            wait(self, timeout_s)
        finally:
            seen.wait_timeout += clock() - start_s

    def timed_run(self: Any, *args: Any) -> Any:
        try:
            return run_owned(self, *args)
        finally:
            seen.hold_s += clock() - seen.locked_at_s
            seen.n_steps += 1

    locks.LockFile.try_lock = timed_lock  # type: ignore[method-assign]
    mutex.LedgerMutex._wait = timed_wait  # type: ignore[method-assign]
    mutex.LedgerMutex.run_owned = timed_run  # type: ignore[method-assign, assignment]
    return seen


def ping_pong(n_processes: int, nbytes: int, seconds: float, *, watched: bool = False) -> Load:
    """Let pairs of processes send an array of `nbytes` bytes back and forth.

    One process alone sends to itself, which only works if the message does not fill the pipe.
    """
    ends: list[tuple[Connection, bool]] = []
    if n_processes == 1:
        return _run([partial(_to_itself, nbytes)], seconds, watched)
    for _ in range(n_processes // 2):
        one, other = multiprocessing.Pipe()
        ends += [(one, True), (other, False)]

    works = [partial(_back_and_forth, end, is_first, nbytes) for end, is_first in ends]
    try:
        return _run(works, seconds, watched)
    finally:
        for end, _ in ends:
            end.close()


def _to_itself(nbytes: int, until_s: float, most: float) -> int:
    reader, writer = multiprocessing.Pipe(duplex=False)
    array, n_done = np.ones(nbytes // 8), 0
    while time.monotonic() < until_s and n_done < most:
        writer.send(array)
        n_done += len(reader.recv()) > 0
    return n_done


def _back_and_forth(
    end: Connection, is_first: bool, nbytes: int, until_s: float, most: float
) -> int:
    array, n_done = np.ones(nbytes // 8), 0
    if is_first:
        while time.monotonic() < until_s and n_done < most:
            end.send(array)
            n_done += 1 + (len(end.recv()) > 0)
        end.send(None)
        return n_done  # both ways: its partner counts nothing
    while end.recv() is not None:
        end.send(array)
    return 0


def take_blocks(arena: Any, n_processes: int, seconds: float, *, watched: bool = False) -> Load:
    """Let processes take a block and give it back, without writing."""

    def work(until_s: float, most: float) -> int:
        n_done = 0
        while time.monotonic() < until_s and n_done < most:
            arena.acquire([_BLOCK_NBYTES]).release()
            n_done += 1
        return n_done

    return _run([work] * n_processes, seconds, watched)


def _run(works: Sequence[Work], seconds: float, watched: bool) -> Load:
    context = multiprocessing.get_context("fork")
    ready, until_s = context.Barrier(len(works) + 1), context.Value("d", 0.0, lock=False)
    reader, writer = context.Pipe(duplex=False)

    def main(work: Work) -> None:
        work(math.inf, _N_WARM)
        seen = watch_lock() if watched else _Watched()
        ready.wait(_PATIENCE_S)  # all are there; then the parent says until when
        ready.wait(_PATIENCE_S)
        n_done = work(until_s.value, math.inf)
        tally = [n_done, seen.n_steps, seen.n_waited, seen.wait_timeout, seen.hold_s]
        # One write(2), so that the tallies of several processes do not mix.
        writer.send_bytes(np.array(tally, np.float64).tobytes())
        os._exit(0)

    processes = [context.Process(target=main, args=(work,)) for work in works]
    for process in processes:
        process.start()
    try:
        ready.wait(_PATIENCE_S)
        until_s.value = time.monotonic() + seconds
        ready.wait(_PATIENCE_S)
        load = Load(len(works), seconds)
        for _ in works:
            if not reader.poll(seconds + _PATIENCE_S):
                raise TimeoutError(f"no answer of all {len(works)} processes")
            tally = np.frombuffer(reader.recv_bytes())
            load.n_done += tally[0]
            load.n_steps += tally[1]
            load.n_waited += tally[2]
            load.wait_timeout += tally[3]
            load.hold_s += tally[4]
        return load
    finally:
        for process in processes:
            process.join(_PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
        for end in (reader, writer):
            with contextlib.suppress(OSError):
                end.close()
