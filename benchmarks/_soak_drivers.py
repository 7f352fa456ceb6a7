"""The soak's four kinds of channels, each with a thread that keeps two workers busy.

What
    `PipeDriver`, `QueueDriver` (one worker each), `PoolDriver` and `ExecutorDriver` (two each) send
    parcels, verify what comes back, hold some of it, and start their workers anew after a death.

How it works
    Workers of pipes and queues are struck at any moment, from outside: nobody else uses their
    channels. A pool and an executor do not survive that without oobpickle either (a worker that
    dies with a lock of the shared queue hangs the others), so there a task ends its own worker.

Lifetime
    A driver is a thread. It rests when it is told to, with nothing held and nothing on its way.

When it cannot
    A wrong message, a worker that died unasked, or an answer that does not come ends the driver;
    its ``failure`` says why.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

from _soak_messages import Parcel, Shelf
from _soak_workers import (
    Rest,
    die,
    ends_of_others,
    prepare_pool_worker,
    prepare_process,
    serve_pipe,
    serve_queues,
    work,
)
from numpy.random import SFC64, Generator

HELD_BY_DRIVER: Final = 6
SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV)
_WINDOW: Final = 4
_TASKS_PER_CHILD: Final = 15
_ANSWER_S: Final = 90
_JOIN_S: Final = 30
_UNKNOWN_CODE: Final = 255

# One at a time: what is open for the one worker must not be inherited or passed on to another.
_starting = threading.Lock()


class Driver(threading.Thread):
    """A thread that keeps workers busy.

    Attributes
    ----------
    n_messages, nbytes : int
        What was verified: parcels that arrived here, and those that were answered.
    n_lost : int
        Messages that were with a worker, or on their way to or from it, when it was killed.
    n_struck, n_replaced, n_survived : int
        Kills, those after which there was a new worker, and those after which that answered.
    progress_at : float
        When something arrived last, ``time.monotonic()``.
    failure : str
        What went wrong; empty if nothing did.
    """

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.chance = Generator(SFC64(seed))
        self.shelf = Shelf(HELD_BY_DRIVER)
        self.n_messages = self.nbytes = self.n_lost = 0
        self.n_struck = self.n_replaced = self.n_survived = 0
        self.progress_at = time.monotonic()
        self.failure = ""
        self.rests: list[Rest] = []
        self.resting, self._wanted, self._resume = (threading.Event() for _ in range(3))
        self._done = False
        self._seed = seed << 24

    def run(self) -> None:
        try:
            self.start_workers()
            while not self._done:
                if self._wanted.is_set():
                    self._rest()
                else:
                    self.step()
            self.drain()
            self.stop_workers()
        except BaseException:
            self.failure = traceback.format_exc()
        finally:
            self.resting.set()

    def ask_to_rest(self) -> None:
        """Let it finish what is on its way, and drop what it holds; then it sets ``resting``."""
        self._resume.clear()
        self._wanted.set()

    def go_on(self, *, until_end: bool = False) -> None:
        """End the rest, or the driver."""
        self._done = until_end
        self.resting.clear()
        self._wanted.clear()
        self._resume.set()

    def _rest(self) -> None:
        self.drain()
        self.rests = self.ask_workers_to_rest()
        self.shelf.clear()
        gc.collect()
        self.resting.set()
        self._resume.wait()
        self.progress_at = time.monotonic()

    def new_parcel(self) -> Parcel:
        self._seed += 1
        return Parcel(self._seed)

    def arrived(self, parcel: Parcel, sent_nbytes: int) -> None:
        """Verify an answer, and keep it for a while."""
        self.n_messages += 2
        self.nbytes += parcel.verify().nbytes + sent_nbytes
        self.is_alive_again()
        self.shelf.put(parcel, self.chance)

    def is_alive_again(self) -> None:
        """Something came, from a worker that was started after the last death."""
        self.n_survived = self.n_replaced
        self.progress_at = time.monotonic()

    def strike(self, number: int) -> bool:
        """Kill one of the workers, now or soon; tell whether there is one to kill."""
        raise NotImplementedError

    def start_workers(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def drain(self) -> None:
        raise NotImplementedError

    def ask_workers_to_rest(self) -> list[Rest]:
        raise NotImplementedError

    def stop_workers(self) -> None:
        raise NotImplementedError


# --- a worker with channels of its own


class _Mortal:
    """A worker process that can be struck at any moment, by any thread."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._lock = threading.Lock()
        self._struck: set[int] = set()

    def strike(self, number: int) -> bool:
        with self._lock:
            if self._pidfd < 0:
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
                self._struck.add(-number)
                return True
            return False

    def end(self, *, well: bool) -> None:
        """Wait for its end; raise `ChildProcessError` unless it is the expected one."""
        self.process.join(_JOIN_S)
        with self._lock:
            os.close(self._pidfd)
            self._pidfd = -1
            code = self.process.exitcode
            expected = {0} if well and not self._struck else {*self._struck}
            if self._struck:
                # `Process.start` in another thread has read the fork server's word on how it ended.
                expected.add(_UNKNOWN_CODE)
            if code not in expected:
                raise ChildProcessError(f"a worker ended with {code}, struck by {self._struck}")
            self.process.close()


class _MortalDriver(Driver):
    """One worker, started with a parcel as an argument, and channels that only it uses."""

    def __init__(self, name: str, seed: int, method: str) -> None:
        super().__init__(name, seed)
        # Not `_context`: threads have an attribute of that name from CPython 3.14 on.
        self._multiprocessing: Any = multiprocessing.get_context(method)
        self._worker: _Mortal | None = None
        self.n_started = 0

    def strike(self, number: int) -> bool:
        worker = self._worker
        if worker is None or not worker.strike(number):
            return False
        self.n_struck += 1
        return True

    def start_workers(self) -> None:
        self.n_started += 1
        first = self.new_parcel()
        with _starting:
            target, ends, channels = self.open_channels()
            ends_of_others.update(ends)
            args = (*channels, self._seed % (1 << 30), [first])
            process = self._multiprocessing.Process(target=target, args=args, daemon=True)
            process.start()
            for end in ends:
                end.close()
            ends_of_others.clear()
        self._worker = _Mortal(process)
        self.n_messages += 1
        self.nbytes += first.nbytes

    def replace(self) -> None:
        """The worker is dead: see that it was struck, and start another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end(well=False)
        self.n_replaced = self.n_struck
        self.close_channels()
        self.start_workers()

    def stop_workers(self) -> None:
        self.say_goodbye()
        if self._worker is not None:
            self._worker.end(well=True)
        self.close_channels()

    def open_channels(self) -> tuple[Any, list[Any], tuple[Any, ...]]:
        """Return what the worker runs, which ends are its own, and its arguments."""
        raise NotImplementedError

    def close_channels(self) -> None:
        raise NotImplementedError

    def say_goodbye(self) -> None:
        raise NotImplementedError


class PipeDriver(_MortalDriver):
    """Batches of one to three parcels there, then as many back, over a pipe or a socket."""

    def open_channels(self) -> tuple[Any, list[Any], tuple[Any, ...]]:
        self._end, other = multiprocessing.Pipe()
        return serve_pipe, [other], (other,)

    def step(self) -> None:
        sent = [self.new_parcel() for _ in range(int(self.chance.integers(1, 4)))]
        n_answers = 0
        try:
            self._end.send(len(sent))
            for parcel in sent:
                self._end.send(parcel)
            for parcel in sent:
                self.arrived(self._end.recv(), parcel.nbytes)
                n_answers += 1
        except (EOFError, OSError):
            self.n_lost += 2 * (len(sent) - n_answers)
            self.replace()

    def drain(self) -> None:
        pass  # nothing is on its way between two steps

    def ask_workers_to_rest(self) -> list[Rest]:
        while True:
            try:
                self._end.send(0)
                rest = self._end.recv()
                self.is_alive_again()
                return [rest]
            except (EOFError, OSError):
                self.replace()

    def say_goodbye(self) -> None:
        with contextlib.suppress(OSError):
            self._end.send(None)

    def close_channels(self) -> None:
        self._end.close()


class QueueDriver(_MortalDriver):
    """Up to four parcels on their way, numbered, through two queues with their feeder threads."""

    def open_channels(self) -> tuple[Any, list[Any], tuple[Any, ...]]:
        self._tasks, self._results = self._multiprocessing.Queue(), self._multiprocessing.Queue()
        # As the executor of the standard library does: the worker may be dead.
        self._tasks._ignore_epipe = True
        self._sent: deque[tuple[int, int]] = deque()
        self._number = 0
        ends = [self._tasks._reader, self._results._writer]
        return serve_queues, ends, (self._tasks, self._results)

    def step(self) -> None:
        if len(self._sent) >= _WINDOW:
            self._receive()
            return
        parcel = self.new_parcel()
        self._number += 1
        self._sent.append((self._number, parcel.nbytes))
        self._tasks.put((self._number, parcel))

    def _receive(self) -> None:
        try:
            number, parcel = self._results.get()
        except (EOFError, OSError):
            self.n_lost += 2 * len(self._sent)
            self.replace()
            return
        expected, nbytes = self._sent.popleft()
        if number != expected:
            raise ChildProcessError(f"answer {number} came, expected {expected}")
        self.arrived(parcel, nbytes)

    def drain(self) -> None:
        while self._sent:
            self._receive()

    def ask_workers_to_rest(self) -> list[Rest]:
        while True:
            try:
                for _ in range(2):  # a feeder keeps the bytes of its last message until the next
                    self._tasks.put(0)
                    rest = self._results.get()
                self.is_alive_again()
                return [rest]
            except (EOFError, OSError):
                self.replace()

    def say_goodbye(self) -> None:
        self._tasks.put(None)

    def close_channels(self) -> None:
        self._tasks.close()
        self._tasks.join_thread()
        self._results.close()


# --- pools


class _TaskDriver(Driver):
    """Up to four tasks on their way; now and then one that ends its worker."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed)
        self._to_strike: deque[int] = deque()
        self._sent: deque[tuple[Any, int, int]] = deque()

    def ask_workers_to_rest(self) -> list[Rest]:
        # New ones after each rest: forked workers keep open whatever this process had open, and so
        # the messages that nobody has read of an executor that broke.
        self.stop_workers()
        return []

    def go_on(self, *, until_end: bool = False) -> None:
        self.start_workers()
        super().go_on(until_end=until_end)

    def strike(self, number: int) -> bool:
        self._to_strike.append(number)
        return True

    def step(self) -> None:
        if self._to_strike and not self._wanted.is_set():
            self.n_struck += 1
            self.n_lost += 2
            self.submit_death(self._to_strike.popleft())
        if len(self._sent) >= _WINDOW:
            self._receive()
            return
        self._send()

    def _send(self) -> None:
        parcel = self.new_parcel()
        answer = self.submit(self._seed + (1 << 52), parcel)
        self._sent.append((answer, parcel.nbytes, self.n_struck))

    def _receive(self) -> None:
        answer, nbytes, n_struck = self._sent.popleft()
        parcel = self.result_of(answer)
        if parcel is not None:
            self.n_replaced = n_struck
            self.arrived(parcel, nbytes)

    def drain(self) -> None:
        while self._sent or self.n_survived < self.n_struck:
            if not self._sent:
                self._send()  # to see that there are workers again
            self._receive()

    def submit(self, seed: int, parcel: Parcel) -> Any:
        raise NotImplementedError

    def submit_death(self, number: int) -> None:
        raise NotImplementedError

    def result_of(self, answer: Any) -> Parcel | None:
        """Wait for a result; ``None`` if it was lost with its worker."""
        raise NotImplementedError


class PoolDriver(_TaskDriver):
    """A forked pool that replaces its workers all the time, while the parent holds results."""

    def start_workers(self) -> None:
        context = multiprocessing.get_context("fork")
        self._n_deaths = 0
        self._pool = context.Pool(2, prepare_pool_worker, maxtasksperchild=_TASKS_PER_CHILD)

    def submit(self, seed: int, parcel: Parcel) -> Any:
        return self._pool.apply_async(work, (seed, parcel))

    def submit_death(self, number: int) -> None:
        self._n_deaths += 1
        self._pool.apply_async(die, (number, self.new_parcel()))

    def result_of(self, answer: Any) -> Parcel | None:
        parcel: Parcel = answer.get(_ANSWER_S)
        return parcel

    def stop_workers(self) -> None:
        if self._n_deaths:
            self._pool.terminate()  # to close it would wait for the tasks that died
        else:
            self._pool.close()
        self._pool.join()


class ExecutorDriver(_TaskDriver):
    """An executor of the fork server; a new one after each death, which breaks the old one."""

    def start_workers(self) -> None:
        with _starting:
            context = multiprocessing.get_context("forkserver")
            self._executor = concurrent.futures.ProcessPoolExecutor(
                2, context, initializer=prepare_process
            )
        self._is_to_break = False

    def submit(self, seed: int, parcel: Parcel) -> Any:
        try:
            return self._executor.submit(work, seed, parcel)
        except BrokenProcessPool:
            self._replace()
            return self._executor.submit(work, seed, parcel)

    def submit_death(self, number: int) -> None:
        self._is_to_break = True
        with contextlib.suppress(BrokenProcessPool):
            self._executor.submit(die, number, self.new_parcel())

    def result_of(self, answer: Any) -> Parcel | None:
        try:
            parcel: Parcel = answer.result(_ANSWER_S)
            return parcel
        except BrokenProcessPool:
            if not self._is_to_break:
                raise
            self.n_lost += 2
            return None

    def _replace(self) -> None:
        if not self._is_to_break:
            raise ChildProcessError("the executor broke, and nobody has struck it")
        while self._sent:
            self._receive()  # what was lost with it
        self._executor.shutdown()
        self.start_workers()

    def stop_workers(self) -> None:
        self._executor.shutdown()
