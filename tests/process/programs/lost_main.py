"""A main module that spawned children cannot import: read as a notebook, a command, a script on
standard input. Its functions and classes go by value to them."""

import dataclasses
import enum
import functools
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

import inside
import numpy as np

import oobpickle
from oobpickle._hook import installed

SCALE = 2
STATE = None
LARGE = np.zeros(1 << 20, np.uint8)


class Counts:
    """What a worker returns."""

    n_made = 0

    def __init__(self, n):
        self.data = np.full(n, SCALE)

    def scaled(self):
        return _scaled(self.data.size)


@dataclasses.dataclass
class Pair:
    one: int
    other: Counts


class Kind(enum.Enum):
    SMALL = 1


class _ScaledError(Exception):
    def __init__(self, counts):
        super().__init__(counts)
        self.counts = counts


def _fail(n):
    raise _ScaledError(Counts(n))


def _scaled(n):
    return SCALE * n


@functools.lru_cache
def _fibonacci(n):
    return n if n < 2 else _fibonacci(n - 1) + _fibonacci(n - 2)


def _made(n):
    Counts.n_made += 1
    return Pair(_fibonacci(10), Counts(n)), Kind.SMALL


def _is_ours(counts):
    return counts.scaled(), type(counts) is Counts


def _initialize(value):
    global STATE
    STATE = value


def _count(_):
    global STATE
    STATE += 1
    return os.getpid(), STATE


def _put(queue, counts):
    queue.put((counts.scaled(), Counts(3)))


def _sum_of_large(_):
    return int(LARGE.sum())


def _assert_whole(pair, kind, n):
    assert isinstance(pair, Pair)
    assert type(pair.other) is Counts
    assert kind is Kind.SMALL
    assert (pair.one, pair.other.data.sum()) == (55, SCALE * n)
    assert Counts.n_made == 0


def everything(method):
    """Pools, executors, queues and processes; small messages and large ones."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        with context.Pool(2, _initialize, (5,)) as pool:
            for n in (3, 100_000):
                pair, kind = pool.apply_async(_made, (n,)).get(60)
                _assert_whole(pair, kind, n)
                assert pool.apply_async(_is_ours, (pair.other,)).get(60) == (2 * n, True)
            assert pool.map_async(lambda n: SCALE * n, range(4)).get(60) == [0, 2, 4, 6]
            try:
                pool.apply_async(_fail, (3,)).get(60)
            except _ScaledError as error:
                failed = error
            assert type(failed.counts) is Counts
            by_worker = {}
            for pid, state in pool.map_async(_count, range(8), chunksize=1).get(60):
                by_worker.setdefault(pid, []).append(state)
            for states in by_worker.values():
                assert sorted(states) == list(range(6, 6 + len(states))), by_worker
            assert STATE is None
            _define_again(pool)
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            _assert_whole(*executor.submit(_made, 100_000).result(60), 100_000)
        queue = context.Queue()
        process = context.Process(target=_put, args=(queue, Counts(4)))
        process.start()
        scaled, counts = queue.get(timeout=60)
        process.join()
        assert process.exitcode == 0
        assert (scaled, type(counts)) == (8, Counts)
        assert arena.statistics().n_fallbacks == 0


def _define_again(pool):
    """As when a cell is run again."""
    names = globals()
    before = {name: names[name] for name in ("Counts", "_scaled", "SCALE")}
    try:
        exec("class Counts(Counts):\n    is_new = True", names)
        exec("def _scaled(n):\n    return -SCALE * n", names)
        names["SCALE"] = 3
        pair, _ = pool.apply_async(_made, (3,)).get(60)
        assert type(pair.other) is Counts is not before["Counts"]
        assert pair.other.is_new
        assert pool.apply_async(_scaled, (3,)).get(60) == -9
    finally:
        names.update(before)


def large_globals_are_warned_of(method):
    context = multiprocessing.get_context(method)
    with (
        warnings.catch_warnings(record=True) as caught,
        oobpickle.enabled(),
        context.Pool(1) as pool,
    ):
        warnings.simplefilter("always")
        assert pool.map_async(_sum_of_large, range(3), chunksize=1).get(60) == [0, 0, 0]
    (text,) = [str(one.message) for one in caught if one.category is UserWarning]
    assert "_sum_of_large" in text, text
    assert "global 'LARGE' has 1048576" in text, text


def by_name_to_forked_children():
    """They have it; and those that cannot be loaded there get the error."""
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled(), context.Pool(1) as pool:
        counts = Counts(100_000)
        assert pool.apply(_scaled, (3,)) == 6
        assert pool.apply(_is_ours, (counts,)) == (200_000, True)
        _assert_whole(*pool.apply(_made, (3,)), 3)
        exec("def later(n):\n    return n", globals())
        try:
            pool.apply_async(globals()["later"], (3,)).get(60)
        except AttributeError as error:
            message = str(error)
        assert "later" in message


def by_name_if_it_is_a_file(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), context.Pool(1) as pool:
        assert pool.apply(_is_found) == "__mp_main__"
        pair, kind = pool.apply(_made, (3,))
        assert type(pair.other) is Counts
        assert kind is Kind.SMALL
        assert pool.apply(_made_until_now) == 1
        assert not installed.current.spawned


def _is_found():
    assert vars(sys.modules["__main__"])["_is_found"] is _is_found
    return __name__


def _made_until_now():
    return Counts.n_made


def to_both_at_once(method):
    """A queue that a spawned and a forked child read."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled():
        tasks, results = context.SimpleQueue(), context.SimpleQueue()
        spawned = context.Process(target=_answer, args=(tasks, results))
        spawned.start()
        for _ in range(3):
            tasks.put((_scaled, Counts(4)))
            assert results.get() == (8, 8)
        tasks.put(None)
        spawned.join()
        forked = multiprocessing.get_context("fork").Process(target=_answer, args=(tasks, results))
        forked.start()
        tasks.put((_scaled, Counts(4)))
        assert results.get() == (8, 8)
        tasks.put(None)
        forked.join()
        assert (spawned.exitcode, forked.exitcode) == (0, 0)


def _answer(tasks, results):
    while (task := tasks.get()) is not None:
        function, counts = task
        results.put((function(4), counts.scaled()))


if __name__ == "__main__":
    inside.main()
