"""What the programs of this folder share: messages that verify themselves, watchdogs, the checker
of the table.

**What.** `message` / `verify`, `Model`, `fork` / `reap`, `Token`, `assert_table_in_order`,
`assert_empty`, `main`.

**How it works.** Importing it gives the process, and each of its forked children, an alarm that
kills it after `WATCHDOG_S`, and a SIGUSR1 handler that prints the tracebacks of all threads.

**Lifetime.** Until the process ends.

**When it cannot.** The checker knows the layout of the table; a new layout needs a new checker.
"""

import contextlib
import faulthandler
import functools
import gc
import os
import re
import select
import signal
import sys
import time
import traceback

import numpy as np
from numpy.random import default_rng

from internals import inner
from oobpickle import _faults
from oobpickle._memory import options
from table import HELD, LEASED, Table

# The programs send many messages of 70 to 100 KB; children take over the parent's.
options.DEFAULT_THRESHOLD = 64 << 10

#: How often what only repeats is repeated; the long runs (tests/long/again.py) set it higher.
REPEATS = int(os.environ.get("OOBPICKLE_REPEATS", "1"))
WATCHDOG_S = 150
TOKEN_S = 20
KILLED = -signal.SIGKILL

_point_for_next_child = None
_in_child = []


def _after_in_child():
    # Before oobpickle's own hook, which is registered with the first arena: so a fault can be met
    # while the child joins, and no child inherits the fault of its parent.
    global _point_for_next_child
    signal.alarm(WATCHDOG_S)
    _faults.arm(_point_for_next_child)
    _point_for_next_child = None


faulthandler.register(signal.SIGUSR1, all_threads=True)
signal.alarm(WATCHDOG_S)
os.register_at_fork(after_in_child=_after_in_child)


def main():
    """Run the case that the first argument names, with the others as its arguments."""
    import multiprocessing  # not in the children: it would change the order in which modules end

    # A shell starts its background jobs with Ctrl-C ignored, and so would be all that tests it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not each child of a fork server imports NumPy. It has the main module where CPython's own
    # default is heeded, from 3.12.8 and 3.13.1 on.
    multiprocessing.set_forkserver_preload(["__main__", "numpy"])
    case = sys.modules["__main__"].__dict__[sys.argv[1]]
    case(*sys.argv[2:])


# --- processes


def fork(run, *args, fault=None):
    """Fork a child that runs ``run(*args)`` and exits with 0, or 1 and a traceback.

    `fault` names a point of `oobpickle._faults` that kills the child when it comes there.
    """
    with faulty_children(fault):
        pid = os.fork()
    if pid == 0:
        end_with(run, *args)
    return pid


def end_with(run, *args):
    """Run ``run(*args)`` in a forked child, and exit with 0, or 1 and a traceback."""
    status = 1
    try:
        run(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def faulty_children(fault):
    """Within it, a child that is forked has the given fault and no other."""
    global _point_for_next_child
    _point_for_next_child = fault
    try:
        yield
    finally:
        _point_for_next_child = None


def reap(pid, expected=0, within_s=60):
    """Wait for a child and assert how it ended."""
    found = eventually(lambda: exit_of(pid), within_s=within_s)[0]
    assert found == expected, f"child {pid} ended with {found}, expected {expected}"


def exit_of(pid):
    """Return ``(exit code,)`` of a child that has ended, else ``None``."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return (os.waitstatus_to_exitcode(status),) if done else None


def eventually(condition, *, within_s=20.0):
    """Poll until `condition()` is true; fail at the deadline."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {condition}: {value!r}"
        time.sleep(0.002)
    return value


class Token:
    """A signal from one process to another: `give` once, `take` waits for it."""

    def __init__(self):
        self._read, self._write = os.pipe()

    @property
    def descriptors(self):
        return self._read, self._write

    def give(self):
        os.write(self._write, b"x")

    def take(self):
        assert select.select([self._read], [], [], TOKEN_S)[0], f"no signal within {TOKEN_S} s"
        assert os.read(self._read, 1) == b"x"


# --- data


def content(seed, nbytes):
    """Return `nbytes` bytes that only this seed makes; no two pages are alike."""
    return np.resize(_tile(seed), nbytes)


@functools.lru_cache(maxsize=64)
def _tile(seed):
    return default_rng(seed).integers(0, 256, 4099, np.uint8)


def message(seed, nbytes=1_000_000):
    """Return an object that `verify` knows to be whole."""
    return seed, content(seed, nbytes)


def verify(received, seed=None):
    """Assert that a message arrived as it was made; return it."""
    assert seed is None or received[0] == seed, f"message {received[0]}, expected {seed}"
    found, expected = received[1], content(received[0], received[1].nbytes)
    wrong = np.flatnonzero(found != expected)
    assert not wrong.size, (
        f"message {received[0]}: {wrong.size} of {found.nbytes} bytes are wrong, from {wrong[0]}: "
        f"{found[wrong[0] : wrong[0] + 8]} instead of {expected[wrong[0] : wrong[0] + 8]}"
    )
    return received


class Model:
    """A user's class with big state, nothing special about it."""

    def __init__(self, seed):
        counts = content(seed, 800_000).view(np.uint64)
        self.seed = seed
        self.counts = counts.reshape(100, 1000)
        self.columns = np.asfortranarray(counts.reshape(1000, 100))
        self.alias = self.counts
        self.strided = counts[::7]
        self.when = counts[:5000].astype("datetime64[s]")
        self.names = ["a", None, {"b": (1, 2.5)}]

    def check(self):
        expected = Model(self.seed)
        assert type(self) is Model
        assert self.alias is self.counts
        assert self.columns.flags.f_contiguous
        for name in ("counts", "columns", "strided", "when"):
            found, wanted = getattr(self, name), getattr(expected, name)
            assert type(found) is np.ndarray
            assert found.dtype == wanted.dtype
            assert found.shape == wanted.shape
            assert (found == wanted).all(), name
            assert found.flags.writeable
            assert found.flags.aligned
        assert self.names == expected.names
        return self

    def nbytes(self):
        return sum(a.nbytes for a in (self.counts, self.columns, self.strided, self.when))


class Fitted:
    """A user's class, in a module that every library finds."""

    def __init__(self, seed, nbytes):
        self.seed = seed
        self.counts = content(seed, nbytes).view(np.uint64)
        self.name = f"model {seed}"


def address(array):
    """Return where the data of an array lies."""
    return array.__array_interface__["data"][0]


def is_in_arena(arena, array, *, on_disk=False):
    """Tell whether an array's memory is the arena's, or its file's on disk, seen from here."""
    fd = inner(arena).descriptors[3 if on_disk else 0]
    inode, at = str(os.fstat(fd).st_ino), address(array)
    with open("/proc/self/maps") as file:
        for line in file:
            span, _, _, _, its_inode, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= at < end:
                return its_inode == inode
    return False


def is_private(address):
    """Tell whether the page at an address is private memory of this process."""
    with open("/proc/self/maps") as file:
        for line in file:
            span, permissions, _ = line.split(" ", 2)
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return permissions.endswith("p")
    return False


def our_descriptors():
    """Return what this process has open of any arena."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if "oobpickle" in target:
            found.append(target)
    return found


# --- the table


def owners(arena):
    """Return ``(index, state, slot)`` of each block that is not free."""
    return Table.of(arena).owned()


def owned_by(arena, slot):
    """Return the blocks that a slot leases or holds."""
    return [row for row in owners(arena) if row[2] == slot and row[1] in (LEASED, HELD)]


def assert_table_in_order(arena, pids=()):
    """Compare every sum and every list with a recomputation from the rows.

    Nobody may be working with the arena, but those `pids`, who are stopped for moments. What a
    death has left is mended by whoever comes next. With `pids`, who claim and release without the
    lock while a death is mended, the sums of what is held and idle need not be exact: they are
    right when the lists were made anew.
    """
    table = Table.of(arena)

    def problems_now():
        inner(arena).blocks.reap()
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            problems = table.problems()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        if pids and problems and all(re.match("(held|idle) is", problem) for problem in problems):
            table["dirty"] = 1  # the next one who takes the lock makes them anew
        return problems

    # One that was stopped in the middle of something goes on.
    problems = eventually_none(problems_now, within_s=10.0)
    assert not problems, "the table is out of order:\n" + "\n".join(problems[:20])


def eventually_none(look, within_s=2.0):
    """Return what `look` finds, or nothing if it finds nothing once within that time."""
    deadline = time.monotonic() + within_s
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return found


def assert_empty(arena):
    """Assert that nothing is in use any more, and no page is left.

    Not at once: nothing is reclaimed while some process has descriptors on their way in a socket.
    """

    def is_empty():
        arena.trim()
        statistics = arena.statistics()
        used = any(statistics.nbytes.values()) or statistics.n_published
        return not used and not statistics.nbytes_resident and not statistics.nbytes_on_disk

    gc.collect()
    eventually(is_empty)
    assert_table_in_order(arena)


def descriptors_of(arena):
    """Return this process's descriptors of an arena, its own proof of life among them."""
    locks = os.fstat(inner(arena).descriptors[2])
    found = set(inner(arena).descriptors)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (locks.st_dev, locks.st_ino):
                found.add(fd)
    return sorted(found)


def stop_with_the_lock(arena):
    """Be stopped while this process has the lock of the arena."""
    _faults.arm("lock.taken:1:STOP")
    inner(arena).blocks.reap()
    _faults.arm(None)
