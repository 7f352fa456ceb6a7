"""What the soak's processes do: the workers of pipes and queues, the tasks of pools, the forks.

What
    `serve_pipe` and `serve_queues` are loops of workers, `work` and `die` are tasks. `Forks` forks
    while the process holds what it received, and sees that the children end well.

How it works
    A forked child verifies all that its parent held, overwrites it, sends itself a message through
    the arena, sometimes forks once more, and looks a second time while the parent goes on.

Lifetime
    A worker ends with its channel, a forked child after some tenths of a second; an alarm ends what
    hangs.

When it cannot
    A worker that finds something wrong ends with a traceback, and an exit code that nobody expects.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import multiprocessing
import os
import re
import signal
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Final, NamedTuple

from _soak_messages import Parcel, Shelf
from numpy.random import SFC64, Generator

import oobpickle

HELD_BY_WORKER: Final = 4
_ALARM_S: Final = 120
_FORKS: Final = 0.04  # of the batches
_OWN_SEED: Final = 1 << 50

#: Ends of channels that belong to a worker which is just being started: a pool's worker that is
#: forked at that moment must not keep them open.
ends_of_others: Final[set[Any]] = set()


class Rest(NamedTuple):
    """What a process has of its own when it holds nothing."""

    rss_nbytes: int
    n_descriptors: int


def prepare_process() -> None:
    """Tracebacks on demand; no warning that a process with threads forks, which is the point."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    warnings.simplefilter("ignore", DeprecationWarning)


def prepare_pool_worker() -> None:
    """The same in a forked worker of a pool, which has inherited what is not its own."""
    prepare_process()
    signal.alarm(_ALARM_S)  # an orphan would wait for ever
    for end in list(ends_of_others):
        end.close()


def own_rest() -> Rest:
    """Return what this process has, after it gave back what it can."""
    gc.collect()
    with contextlib.suppress(oobpickle.ArenaError):  # it is a run without
        oobpickle.statistics()  # gives back what has died: after a fork that is private memory
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    (found,) = re.findall(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return Rest(int(found) * 1024, len(os.listdir("/proc/self/fd")))


def largest_mappings(n: int = 4) -> list[str]:
    """Describe where this process has most private memory: in the arena, a heap, an array?"""
    found: list[tuple[int, str]] = []
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            name = " ".join([*line.split()[1:2], *line.split()[5:]])
        elif line.startswith("Anonymous:"):
            found.append((int(line.split()[1]) * 1024, name))
    return [f"{nbytes / 1e6:.1f} MB {name}" for nbytes, name in sorted(found, reverse=True)[:n]]


# --- forks


class Forks:
    """Forks of this process, and how they ended."""

    def __init__(self) -> None:
        self.n_ended = 0
        self._pids: set[int] = set()

    def fork(self, parcels: list[Parcel], seed: int) -> None:
        """Fork a child that looks at everything that is held here."""
        pid = os.fork()
        if pid:
            self._pids.add(pid)
            return
        status = 1
        try:
            signal.alarm(_ALARM_S)
            _be_child(parcels, seed)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def reap(self, *, wait: bool = False) -> None:
        """Look whether the children have ended; raise `ChildProcessError` if not well."""
        for pid in list(self._pids):
            done, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
            if done:
                self._pids.discard(pid)
                self.n_ended += 1
                code = os.waitstatus_to_exitcode(status)
                if code:
                    raise ChildProcessError(f"a forked child ended with {code}")


def _be_child(parcels: list[Parcel], seed: int) -> None:
    chance = Generator(SFC64(seed))
    # A thread may have been in the middle of writing into one.
    whole = [parcel for parcel in parcels if parcel.digest is not None]
    for parcel in whole:
        parcel.verify()
    grandchildren = Forks()
    if chance.random() < 0.3:
        grandchildren.fork(whole, seed + 1)
    for parcel in whole[::2]:
        parcel.overwrite()
    if chance.random() < 0.5:
        whole.append(_to_myself(seed))
    time.sleep(chance.uniform(0, 0.3))
    for parcel in whole:
        parcel.verify()
    grandchildren.reap(wait=True)


def _to_myself(seed: int) -> Parcel:
    reader, writer = multiprocessing.Pipe(duplex=False)
    fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
    sent = Parcel(seed)
    while sent.nbytes > 500_000:  # should it travel in-band, nobody else empties the pipe
        seed += 1
        sent = Parcel(seed)
    writer.send(sent)
    received: Parcel = reader.recv()
    return received.verify()


# --- workers


class Worker:
    """The life of one worker: what it holds, its chance, its forks."""

    def __init__(self, seed: int, first: list[Parcel]) -> None:
        prepare_process()
        self.chance = Generator(SFC64(seed))
        self.forks = Forks()
        self._shelf = Shelf(HELD_BY_WORKER)
        self._seed = _OWN_SEED + (seed << 20)
        # Out of the list, since `Process` keeps its arguments.
        self._shelf.put(first.pop().verify(), self.chance)

    def take(self, parcel: Parcel) -> None:
        """Verify what arrived, keep it, and fork now and then."""
        self._shelf.put(parcel.verify(), self.chance)
        if self.chance.random() < _FORKS:
            self.forks.fork(self._shelf.parcels, int(self.chance.integers(1 << 40)))
        self.forks.reap()

    def answer(self, parcel: Parcel) -> Parcel:
        """Return what goes back: something new, or what arrived."""
        if self.chance.random() < 0.3:
            # A queue's feeder takes the bytes later: until then nobody may write into it.
            self._shelf.drop(parcel)
            return parcel
        self._seed += 1
        return Parcel(self._seed)

    def rest(self) -> Rest:
        """Drop everything."""
        self.forks.reap(wait=True)
        self._shelf.clear()
        return own_rest()


def serve_pipe(connection: Any, seed: int, first: list[Parcel]) -> None:
    """Receive so many parcels as announced, then send as many; ``None`` ends it, 0 is a rest."""
    worker = Worker(seed, first)
    while (n_parcels := connection.recv()) is not None:
        if n_parcels == 0:
            connection.send(worker.rest())
            continue
        received = [connection.recv() for _ in range(n_parcels)]
        for parcel in received:
            worker.take(parcel)
            connection.send(worker.answer(parcel))
        del parcel, received
    worker.rest()


def serve_queues(tasks: Any, results: Any, seed: int, first: list[Parcel]) -> None:
    """Answer each numbered parcel; ``None`` ends it, 0 is a rest."""
    worker = Worker(seed, first)
    while (task := tasks.get()) is not None:
        if task == 0:
            results.put(worker.rest())
            continue
        number, parcel = task
        worker.take(parcel)
        results.put((number, worker.answer(parcel)))
        del task, parcel
    worker.rest()


def work(seed: int, parcel: Parcel) -> Parcel:
    """A task: verify the argument, make a result; sometimes fork in between."""
    signal.alarm(_ALARM_S)
    parcel.verify()
    chance = Generator(SFC64(seed))
    forks = Forks()
    if chance.random() < _FORKS:
        forks.fork([parcel], seed)
    result = parcel if chance.random() < 0.3 else Parcel(seed)
    forks.reap(wait=True)
    return result


def die(number: int, parcel: Parcel) -> None:
    """A task that ends its worker, while that holds the argument and a message to itself."""
    parcel.verify()
    received = _to_myself(parcel.seed)
    os.kill(os.getpid(), number)
    time.sleep(_ALARM_S)  # the signal comes
    received.verify()
