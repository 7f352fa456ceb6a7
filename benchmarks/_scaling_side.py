"""The side that is measured by ``scaling.py``: a process that fills an arena and times operations.

What
    `ScalingSide` adds commands to `_driver.Side`: fill the arena with blocks in some state, time
    one operation beside them, stream messages through a channel, let many processes work at once.

How it works
    Every timing command returns the mean seconds of one operation in a batch. The blocks are the
    smallest that there are, one page each, taken in the way in which messages take them.

Lifetime
    As `_driver.Side`. What a command has filled stays until it is dropped by another command.

When it cannot
    A command whose blocks are not there, or did not become what they should, raises: the figure
    would be that of something else.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import _contention
import numpy as np
from _driver import Side

_MADV_POPULATE_WRITE = 23
_PAGE_NBYTES = 4096
_MESSAGE_NBYTES = 200_000


class ScalingSide(Side):
    """The commands; each public method is one.

    The side with the name ``page`` sends a message of a page out of band.
    """

    def __init__(self, name: str, start_method: str) -> None:
        super().__init__("plain", start_method)
        if name != "plain":
            import oobpickle

            threshold = _PAGE_NBYTES if name == "page" else None
            self._arena = oobpickle.install(threshold=threshold)._memory
        self._leases: list[Any] = []
        self._held: list[Any] = []
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)
        self._lost_reader, self._lost_writer = multiprocessing.Pipe(duplex=False)
        self._page, self._array = np.ones(_PAGE_NBYTES // 8), np.ones(_MESSAGE_NBYTES // 8)

    # --- filling

    def lease(self, n_leases: int) -> float:
        """Have so many leases; return the seconds that each new one took."""
        n_new = n_leases - len(self._leases)
        gc.disable()  # else what is measured later is the collector, looking at our own list
        start_s = time.perf_counter()
        while len(self._leases) < n_leases:
            self._leases.append(self._arena.acquire([_PAGE_NBYTES]))
        elapsed_s = time.perf_counter() - start_s
        gc.freeze()
        gc.enable()
        return elapsed_s / max(1, n_new)

    def pages(self, n_pages: int) -> float:
        """Give so many pages of a file to it one by one, with a hole between; seconds for each.

        What the system takes for it, without an arena.
        """
        fd = os.memfd_create("pages")
        os.truncate(fd, 2 * _PAGE_NBYTES * n_pages)
        with mmap.mmap(fd, 2 * _PAGE_NBYTES * n_pages) as mapping:
            start_s = time.perf_counter()
            for offset in range(0, 2 * _PAGE_NBYTES * n_pages, 2 * _PAGE_NBYTES):
                os.posix_fallocate(fd, offset, _PAGE_NBYTES)
                mapping.madvise(_MADV_POPULATE_WRITE, offset, _PAGE_NBYTES)
            elapsed_s = time.perf_counter() - start_s
        os.close(fd)
        return elapsed_s / n_pages

    def free(self) -> float:
        """Release all leases; return the seconds that each took."""
        n_leases = len(self._leases)
        start_s = time.perf_counter()
        for lease in self._leases:
            lease.release()
        elapsed_s = time.perf_counter() - start_s
        self._leases.clear()
        return elapsed_s / max(1, n_leases)

    def send_unread(self, n_messages: int) -> float:
        """Put so many messages in flight whose envelopes nobody will read; seconds for each.

        All but the bytes in the pipe is what `Connection.send` does: a pipe holds only some 180
        envelopes. One byte stands for them, for as long as the messages are not to be reclaimed.
        """
        from oobpickle._memory import pipes

        os.write(self._lost_writer.fileno(), b"\0")
        channel = pipes.channel_id(self._lost_writer.fileno())
        start_s = time.perf_counter()
        for _ in range(n_messages):
            lease = self._arena.acquire([_PAGE_NBYTES])
            lease.seal(channel)
            lease.depart()
            lease.settle()
        elapsed_s = time.perf_counter() - start_s
        self._expect("in_flight", n_messages)
        return elapsed_s / n_messages

    def receive(self, n_arrays: int) -> float:
        """Receive and keep so many arrays of a page; return the seconds of each message."""
        n_new = n_arrays - len(self._held)
        gc.disable()
        start_s = time.perf_counter()
        while len(self._held) < n_arrays:
            self._writer.send(self._page)
            self._held.append(self._reader.recv())
        elapsed_s = time.perf_counter() - start_s
        gc.enable()
        return elapsed_s / max(1, n_new)

    def drop(self) -> float:
        """Drop all that was received, and give the blocks back; return the seconds of each."""
        n_held = len(self._held)
        start_s = time.perf_counter()
        self._held.clear()
        self._arena.blocks.reap()
        elapsed_s = time.perf_counter() - start_s
        self._expect("held", 0)
        return elapsed_s / max(1, n_held)

    def _expect(self, state: str, n_blocks: int) -> None:
        found = self._arena.statistics().n_blocks[state]
        if found != n_blocks:
            raise ValueError(f"{found} blocks are {state}, expected {n_blocks}")

    # --- timing one operation

    def time(self, operation: str, n_repeats: int) -> float:
        """Mean seconds of one operation beside what was filled."""
        operations: dict[str, Callable[[], object]] = {
            "acquire": lambda: self._arena.acquire([_PAGE_NBYTES]).release(),
            "message": self._message,
            "fork": lambda: _end_of(os.fork()),
            # The same without any hook: the child may do nothing but end.
            "bare fork": lambda: _end_of(ctypes.PyDLL(None).fork()),
            "statistics": lambda: self._arena.statistics(),
            "look": lambda: self._arena.reclaim.reclaim(),
        }
        call = operations[operation]
        start_s = time.perf_counter()
        for _ in range(n_repeats):
            call()
        return (time.perf_counter() - start_s) / n_repeats

    def _message(self) -> None:
        self._writer.send(self._array)
        self._reader.recv()

    def reclaim(self, n_messages: int) -> float:
        """Seconds of reclaiming so many messages that nobody can read."""
        self._lost_reader.close()
        self._lost_writer.close()
        start_s = time.perf_counter()
        n_freed = self._arena.reclaim.reclaim()
        elapsed_s = time.perf_counter() - start_s
        self._lost_reader, self._lost_writer = multiprocessing.Pipe(duplex=False)
        if n_freed != n_messages:
            raise ValueError(f"{n_freed} blocks reclaimed, expected {n_messages}")
        return elapsed_s

    def make_room(self) -> float:
        """Seconds of giving the pages of one free block back, as for a message of another size."""
        self._message()
        self._arena.blocks.reap()  # so that there is one
        start_s = time.perf_counter()
        if not self._arena.reclaim.punch_idle(_PAGE_NBYTES):
            raise ValueError("no block was free")
        return time.perf_counter() - start_s

    def trim(self) -> float:
        """Seconds of giving the pages of all free blocks back."""
        start_s = time.perf_counter()
        self._arena.trim()
        return time.perf_counter() - start_s

    def bury(self, n_dead: int, n_leases: int) -> float:
        """Seconds of recovering what so many killed processes had, so many leases each."""
        self._arena.reclaim.reap()
        for _ in range(n_dead):
            pid = os.fork()
            if pid == 0:
                self._arena.reclaim._look_again_at = float("inf")  # it must not bury its sisters
                kept = [self._arena.acquire([_PAGE_NBYTES]) for _ in range(n_leases)]
                os.kill(os.getpid(), signal.SIGKILL)
                del kept
            os.waitpid(pid, 0)
        start_s = time.perf_counter()
        n_found = self._arena.reclaim.reap()
        elapsed_s = time.perf_counter() - start_s
        if n_found > n_dead or not n_found:
            raise ValueError(f"{n_found} dead were found, expected {n_dead}")
        self._expect("leased", len(self._leases))
        return elapsed_s

    def crowd(self, n_processes: int) -> None:
        """Have so many idle participants, and a message in a channel that only they have open.

        So whoever looks what can be reclaimed has to ask all of them.
        """
        self.send_unread(1)
        reader, self._crowd = os.pipe()
        for _ in range(n_processes):
            if os.fork() == 0:
                os.close(self._crowd)
                os.read(reader, 1)  # until the parent ends
                os._exit(0)
        self._lost_reader.close()
        self._lost_writer.close()

    # --- many processes

    def ping_pong(self, n_processes: int, nbytes: int, seconds: float) -> dict[str, float]:
        return self._load(_contention.ping_pong, n_processes, nbytes, seconds)

    def take_blocks(self, n_processes: int, seconds: float) -> dict[str, float]:
        return self._load(_contention.take_blocks, self._arena, n_processes, seconds)

    def _load(self, run: Callable[..., _contention.Load], *args: Any) -> dict[str, float]:
        return {"each_s": run(*args).each_s}

    # --- the rate of messages

    def stream(self, channel: str, nbytes: int, n_messages: int) -> float:
        """Mean seconds of each message, one after another in one direction."""
        data = np.ones(nbytes // 8)
        if channel == "pool":
            return self._through_pool(data, n_messages)
        queue: Any = multiprocessing.Queue() if channel == "queue" else None
        reader, writer = multiprocessing.Pipe(duplex=False)
        put = writer.send if queue is None else queue.put
        get = reader.recv if queue is None else queue.get
        answer, done = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.Process(target=_take_all, args=(get, n_messages, done))
        child.start()
        put(data)
        answer.recv()
        start_s = time.perf_counter()
        for _ in range(n_messages):
            put(data)
        n_received = answer.recv()
        elapsed_s = time.perf_counter() - start_s
        child.join()
        if n_received != n_messages * data.nbytes:
            raise ValueError(f"{n_received} bytes arrived of {n_messages * data.nbytes}")
        return elapsed_s / n_messages

    def _through_pool(self, data: Any, n_messages: int) -> float:
        if self._pool is None:
            self._pool = self._context.Pool(1)
        self._pool.apply(len, (data,))
        start_s = time.perf_counter()
        n_received = sum(self._pool.imap(len, (data for _ in range(n_messages))))
        elapsed_s = time.perf_counter() - start_s
        if n_received != n_messages * len(data):
            raise ValueError(f"{n_received} items arrived of {n_messages * len(data)}")
        return elapsed_s / n_messages


def _take_all(get: Callable[[], Any], n_messages: int, done: Any) -> None:
    get()
    done.send(None)
    done.send(sum(get().nbytes for _ in range(n_messages)))


def _end_of(pid: int) -> None:
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
