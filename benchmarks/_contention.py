"""Contention: many processes that send to one another, or take blocks and give them back.

What
    `ping_pong` starts pairs of processes that send one array back and forth, `take_blocks` starts
    processes that only take a block and give it back, which is all lock and no copy. Both return a
    `Load`: what was done in how long.

How it works
    All processes work until they are warm, meet at a barrier, and stop at a moment that they are
    told: a new process has to enter the table and the blocks of all others in its page tables.

Lifetime
    The processes end with the call; one that does not is killed after `_PATIENCE_S`.

When it cannot
    On a machine with fewer cores than processes the time without a core is in it.
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

    @property
    def each_s(self) -> float:
        """Seconds for each operation, of all processes together."""
        return self.seconds / self.n_done


def ping_pong(n_processes: int, nbytes: int, seconds: float) -> Load:
    """Let pairs of processes send an array of `nbytes` bytes back and forth.

    One process alone sends to itself, which only works if the message does not fill the pipe.
    """
    ends: list[tuple[Connection, bool]] = []
    if n_processes == 1:
        return _run([partial(_to_itself, nbytes)], seconds)
    for _ in range(n_processes // 2):
        one, other = multiprocessing.Pipe()
        ends += [(one, True), (other, False)]

    works = [partial(_back_and_forth, end, is_first, nbytes) for end, is_first in ends]
    try:
        return _run(works, seconds)
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


def take_blocks(arena: Any, n_processes: int, seconds: float) -> Load:
    """Let processes take a block and give it back, without writing."""

    def work(until_s: float, most: float) -> int:
        n_done = 0
        while time.monotonic() < until_s and n_done < most:
            arena.acquire([_BLOCK_NBYTES]).release()
            n_done += 1
        return n_done

    return _run([work] * n_processes, seconds)


def _run(works: Sequence[Work], seconds: float) -> Load:
    context = multiprocessing.get_context("fork")
    ready, until_s = context.Barrier(len(works) + 1), context.Value("d", 0.0, lock=False)
    reader, writer = context.Pipe(duplex=False)

    def main(work: Work) -> None:
        work(math.inf, _N_WARM)
        ready.wait(_PATIENCE_S)  # all are there; then the parent says until when
        ready.wait(_PATIENCE_S)
        n_done = work(until_s.value, math.inf)
        # One write(2), so that the tallies of several processes do not mix.
        writer.send_bytes(np.array([n_done], np.float64).tobytes())
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
            load.n_done += float(np.frombuffer(reader.recv_bytes())[0])
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
