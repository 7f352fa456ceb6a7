"""What the programs of this folder share: messages that verify themselves, watchdogs, the checker
of the ledger.

**What.** `message` / `verify`, `Model`, `fork` / `reap`, `Token`, `assert_ledger_consistent`,
`assert_empty`, `main`.

**How it works.** Importing it gives the process, and each of its forked children, an alarm that
kills it after `WATCHDOG_S`, and a SIGUSR1 handler that prints the tracebacks of all threads.

**Lifetime.** Until the process ends.

**When it cannot.** The checker knows the layout of the ledger; a new layout needs a new checker.
"""

import contextlib
import faulthandler
import functools
import gc
import os
import select
import signal
import sys
import threading
import time
import traceback

import numpy as np
from numpy.random import default_rng

from oobpickle import _copying, _faults
from oobpickle._memory import layout, options

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
    # A shell starts its background jobs with Ctrl-C ignored, and so would be all that tests it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    case = sys.modules["__main__"].__dict__[sys.argv[1]]
    case(*sys.argv[2:])


# --- processes


def fork(run, *args, fault=None):
    """Fork a child that runs ``run(*args)`` and exits with 0, or 1 and a traceback.

    `fault` names a point of `oobpickle._faults` that kills the child when it comes there.
    """
    with faulty_children(fault):
        pid = os.fork()
    if pid:
        return pid
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


def copy_with_slow_helpers(piece_nbytes):
    """From 1 MiB on a helper thread takes some of the pieces, and is late with the last one."""
    copyto = np.copyto

    def slow_copyto(destination, source):
        # Not to wait for something: to be slow, without the GIL. A helper is no thread of
        # `threading`.
        is_helper = threading.current_thread().name.startswith("Dummy")
        time.sleep(0.004 if is_helper else 0.0003)
        copyto(destination, source)

    _copying._LEAST_NBYTES, _copying._PIECE_NBYTES = 1 << 20, piece_nbytes
    _copying._is_a_core_idle = lambda: True
    np.copyto = slow_copyto


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


def is_in_arena(arena, array):
    """Tell whether an array's memory is a block of the arena, as seen from this process."""
    start = arena.data._address
    return start <= address(array) < start + arena.data.nbytes


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


# --- the ledger


def owners(arena):
    """Return ``(index, state, slot)`` of each block that is not free."""
    ledger = arena.ledger
    found = []
    for index in range(ledger.words[layout.H_N_BLOCKS]):
        word = ledger.word[index]
        state = word & layout.STATE_MASK
        if state != layout.FREE:
            found.append((index, state, word >> layout.OWNER_SHIFT & layout.OWNER_MASK))
    return found


def owned_by(arena, slot):
    """Return the blocks that a slot leases or holds."""
    mine = (layout.LEASED, layout.HELD)
    return [row for row in owners(arena) if row[2] == slot and row[1] in mine]


def assert_ledger_consistent(arena):
    """Take the mutex and compare every sum and every list with a recomputation from the columns."""
    problems = arena.membership.run(_problems, arena.ledger)
    assert not problems, "the ledger is inconsistent:\n" + "\n".join(problems[:20])


def assert_empty(arena):
    """Assert that nothing is in use any more, and no page is left.

    Not at once: nothing is reclaimed while some process has descriptors on their way in a socket.
    """

    def is_empty():
        arena.trim()
        statistics = arena.statistics()
        return not any(statistics.nbytes.values()) and not statistics.nbytes_resident

    gc.collect()
    eventually(is_empty)
    assert_ledger_consistent(arena)


_ROWS_BEYOND = 4096


def _problems(ledger):
    words = ledger.words
    n = words[layout.H_N_BLOCKS]
    columns = {
        name: np.frombuffer(getattr(ledger, name), np.uint64)[:n].astype(np.int64)
        for name in ("offset", "size_class", "used", "generation", "channel", "next")
    }
    columns["resident"] = np.array([ledger.resident_nbytes(i) for i in range(n)], np.int64)
    # A copy: others seal and adopt meanwhile, without the lock.
    word = np.frombuffer(ledger.word, np.uint64)[: n + _ROWS_BEYOND].copy()
    state = (word[:n] & np.uint64(layout.STATE_MASK)).astype(np.int64)
    return [
        *_row_problems(ledger, columns, word, state),
        *_list_problems(ledger, columns, state),
        *_sum_problems(words, columns, state),
        *_range_problems(words, columns),
        *_owner_problems(words, word[:n], state),
    ]


def _row_problems(ledger, columns, word, state):
    n = len(state)
    known = (layout.FREE, layout.LEASED, layout.IN_FLIGHT, layout.HELD)
    yield from (f"row {i}: state {state[i]}" for i in range(n) if state[i] not in known)
    # One that is free was made by somebody who died before it was counted.
    beyond = np.flatnonzero((word[n:] & np.uint64(layout.STATE_MASK)) > layout.FREE)
    yield from (f"row {n + i} is in use beyond the {n} rows" for i in beyond)
    low = word[:n] & np.uint64(layout.LOW_MASK)
    index, generation = np.arange(n, dtype=np.uint64), columns["generation"].astype(np.uint64)
    differ = np.flatnonzero(layout.checked_word(index, low, generation) != word[:n])
    yield from (f"row {i}: the check of its word is wrong" for i in differ)
    for i in range(n):
        room = layout.class_nbytes(int(columns["size_class"][i]))
        if state[i] != layout.FREE and columns["used"][i] > room:
            yield f"row {i}: {columns['used'][i]} bytes used of {room}"
        if columns["resident"][i] > ledger.pages_nbytes(room) or columns["resident"][i] % 4096:
            yield f"row {i}: {columns['resident'][i]} bytes resident of {room}"


def _list_problems(ledger, columns, state):
    words, seen = ledger.words, {}
    for first, warm in ((layout.H_WARM, True), (layout.H_EMPTY, False)):
        for size_class in range(layout.N_CLASSES):
            link = words[first + size_class]
            while link:
                index = link - 1
                where = f"list {'warm' if warm else 'empty'} {size_class}"
                if index >= len(state):
                    yield f"{where}: block {index} of {len(state)}"
                    break
                if index in seen:
                    yield f"{where}: block {index} is also in {seen[index]}"
                    break
                seen[index] = where
                if state[index] != layout.FREE:
                    yield f"{where}: block {index} has state {state[index]}"
                if columns["size_class"][index] != size_class:
                    yield f"{where}: block {index} is of class {columns['size_class'][index]}"
                if (columns["resident"][index] > 0) != warm:
                    yield f"{where}: block {index} has {columns['resident'][index]} bytes of pages"
                link = ledger.next[index]
    free = {int(i) for i in np.flatnonzero(state == layout.FREE)}
    yield from (f"block {i} is free and in no list" for i in sorted(free - set(seen)))


def _settled(columns, state):
    free = (state == layout.FREE) & (columns["channel"] != layout.PREPARED)
    return free | (state == layout.HELD) & (columns["next"] != layout.GOING)


def _sum_problems(words, columns, state):
    for name, at, sum_now in (
        ("H_RESIDENT", layout.H_RESIDENT, columns["resident"].sum()),
        ("H_HELD", layout.H_HELD, columns["used"][state == layout.HELD].sum()),
        ("H_SETTLED", layout.H_SETTLED, columns["resident"][_settled(columns, state)].sum()),
    ):
        if words[at] != sum_now:
            yield f"{name} is {words[at]}, the column adds up to {sum_now}"
    if words[layout.H_RESIDENT] > words[layout.H_CAPACITY]:
        yield f"{words[layout.H_RESIDENT]} bytes resident, capacity {words[layout.H_CAPACITY]}"


def _range_problems(words, columns):
    order = np.argsort(columns["offset"], kind="stable")
    end, previous = 0, None
    for i in order.tolist():
        start = int(columns["offset"][i])
        if start < end:
            yield f"blocks {previous} and {i} overlap at {start}"
        end = start + layout.class_stride(int(columns["size_class"][i]))
        previous = i
    if not end <= words[layout.H_DATA_NBYTES]:
        yield f"last block ends at {end} of {words[layout.H_DATA_NBYTES]}"


def _owner_problems(words, word, state):
    slots = words[layout.H_N_SLOTS]
    for i in np.flatnonzero(state != layout.FREE).tolist():
        owner = int(word[i]) >> layout.OWNER_SHIFT & layout.OWNER_MASK
        if state[i] == layout.IN_FLIGHT:
            continue  # of somebody who has died, or a newcomer in the same slot
        row = layout.HEADER_WORDS + owner * layout.PARTICIPANT_WORDS
        if owner >= slots or words[row + layout.P_STATE] != layout.JOINED:
            yield f"block {i} (state {state[i]}) belongs to slot {owner}, which nobody has"
