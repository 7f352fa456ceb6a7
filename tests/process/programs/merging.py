"""merge on pools and executors of processes: what comes out, what goes wrong, what is left."""

import collections
import contextlib
import functools
import gc
import io
import multiprocessing
import operator
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.pool import MaybeEncodingError
from pathlib import Path

import inside
import numpy as np
from inside import eventually

import oobpickle
from oobpickle._merge import merging

MIB = 1 << 20
LARGE = 300_000


@contextlib.contextmanager
def _pool(method, n_workers=2, **options):
    with multiprocessing.get_context(method).Pool(n_workers, **options) as pool:
        yield pool
        pool.close()
        pool.join()


@contextlib.contextmanager
def _executor(method, n_workers=2):
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context(method)) as executor:
        yield executor


def _each(method):
    for open_engine in (_pool, _executor):
        for block in (contextlib.nullcontext, oobpickle.enabled):
            with block(), open_engine(method) as engine:
                yield engine


def _raised(kind, *args, **kwargs):
    try:
        oobpickle.merge(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


# --- what is run


class _Model:
    def __init__(self, seed):
        self.counts = np.full(LARGE, seed)
        self.pieces = [seed]

    def __iadd__(self, other):
        self.counts += other.counts
        self.pieces += other.pieces
        other.counts[:] = -1  # nobody relies on it
        return self


def _listed(*items):
    return list(items)


def _number(x):
    return x


_kept = {0: [0], 1: [1], 2: [2], 3: [3]}


def _what_is_kept(seed):
    return _kept[seed]


# --- what comes out


def models(method):
    expected = sum(range(11))
    for engine in _each(method):
        for options in ({}, {"chunksize": 1}, {"buffersize": 1}, {"ordered": False}):
            total = oobpickle.merge(engine, _Model, range(11), op=operator.iadd, **options)
            assert (total.counts == expected).all()
            assert sorted(total.pieces) == list(range(11))
            assert total.pieces == list(range(11)) or not options.get("ordered", True)
            assert total.counts.flags.writeable


def initial_is_first_and_stays_as_it_is(method):
    for engine in _each(method):
        for pieces, n in ((range(9), 9), (iter(range(9)), 9), ([], 0), (iter([]), 0)):
            initial = _Model(100)
            total = oobpickle.merge(engine, _Model, pieces, op=operator.iadd, initial=initial)
            assert total.pieces == [100, *range(n)]
            assert initial.pieces == [100]
            assert (initial.counts == 100).all()
            assert (total is initial) == (n == 0)


def several_iterables_of_different_length(method):
    with _pool(method) as pool:
        total = oobpickle.merge(pool, _listed, range(5), "abcdefg", iter(range(100)))
        assert total == [
            x for triple in zip(range(5), "abcde", range(5), strict=True) for x in triple
        ]
        assert str(_raised(TypeError, pool, _listed, [], "ab")) == (
            "merge() of no pieces with no initial value"
        )


def what_func_keeps_is_not_changed(method):
    for engine in _each(method):
        for _ in range(3):
            total = oobpickle.merge(
                engine, _what_is_kept, [0, 1, 2, 3, 0, 1], op=operator.iadd, chunksize=3
            )
            assert total == [0, 1, 2, 3, 0, 1]


def a_result_that_is_an_exception(method):
    for engine in _each(method):
        found = oobpickle.merge(engine, ValueError, range(7), op=_first)
        assert type(found) is ValueError
        assert found.args == (0,)


def _first(left, _):
    return left


def _nested(seed):
    return oobpickle.merge(None, _listed, range(seed), op=operator.iadd, initial=[])


def merge_in_a_worker(method):
    for engine in _each(method):
        assert oobpickle.merge(engine, _nested, range(5)) == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]


def calls_that_end_early(method):
    merging._LEAST_S = 0
    for engine in _each(method):
        told = []
        progress = functools.partial(_tell, told)
        total = oobpickle.merge(engine, _by_itself, range(40), op=operator.iadd, progress=progress)
        assert total == [*range(40)]
        assert len(told) > 4, told  # the beginning, two calls, and the end


def _tell(told, *numbers):
    told.append(numbers)


def _by_itself(seed):
    """Take more than 100 times as long as to append to a list."""
    np.full(LARGE, seed).sum()
    return [seed]


def inputs_are_read_ahead_by_no_more_than_was_said(method):
    with _pool(method) as pool, tempfile.TemporaryDirectory() as folder:
        for buffersize in (1, 3, 8):
            most = []

            def pieces(most, folder=folder):
                for n in range(20):
                    most.append(n - len(os.listdir(folder)))
                    yield f"{folder}/{n}"

            total = oobpickle.merge(pool, _touched, pieces(most), buffersize=buffersize)
            assert total == 20
            assert max(most) < buffersize, most
            for path in Path(folder).iterdir():
                path.unlink()


def _touched(path):
    Path(path).touch()
    return 1


# --- what goes wrong


def _fails(piece):
    if piece == 5:
        raise ValueError("five")
    return [piece]


def func_raises(method):
    for engine in _each(method):
        error = _raised(ValueError, engine, _fails, range(20), op=operator.iadd)
        assert type(error) is ValueError
        assert error.args == ("five",)
        assert error.__notes__[-1] == "oobpickle.merge: raised in func, piece 5"
        assert oobpickle.merge(engine, _listed, range(4)) == [0, 1, 2, 3]


def _fails_at(n, left, right):
    if len(left) + len(right) == n:
        raise KeyError(n)
    return left + right


def op_raises_at_each_level(method):
    with _pool(method) as pool:
        for n, level in ((2, 0), (4, 1), (8, None)):
            op = functools.partial(_fails_at, n)
            error = _raised(KeyError, pool, _listed, range(8), op=op, chunksize=2)
            (note,) = [
                x for x in error.__notes__ if x.startswith("oobpickle.merge: raised in op, ")
            ]
            assert level is None or f"(level {level})" in note, (n, note)
            assert oobpickle.merge(pool, _listed, range(4)) == [0, 1, 2, 3]


def op_returns_none(method):
    with _pool(method) as pool:
        for options in ({}, {"chunksize": 1}):
            error = _raised(TypeError, pool, _as_dict, range(4), op=dict.update, **options)
            assert "op dict.update returned None for a dict and a dict" in str(error)


def _as_dict(n):
    return {n: n}


def iterables_raise(method):
    def pieces():
        yield from range(3)
        raise OSError(5, "no more")

    with _pool(method) as pool:
        error = _raised(OSError, pool, _listed, pieces())
        assert error.args == (5, "no more")
        assert error.__notes__ == ["oobpickle.merge: raised by an iterable, after piece 2"]
        assert oobpickle.merge(pool, _listed, range(4)) == [0, 1, 2, 3]


def _with_a_lock(_):
    return threading.Lock()


def what_cannot_be_pickled(method):
    with _pool(method) as pool:
        _raised(Exception, pool, lambda x: x, range(4))
        _raised(Exception, pool, _listed, range(4), op=lambda a, b: a + b)
        _raised(MaybeEncodingError, pool, _with_a_lock, range(4), op=_first, chunksize=1)
        _raised(TypeError, pool, _listed, [threading.Lock()])
        assert oobpickle.merge(pool, _listed, range(4)) == [0, 1, 2, 3]
    with oobpickle.enabled(), _pool(method) as pool:  # where functions go by value
        assert oobpickle.merge(pool, lambda x: [x], range(9), op=lambda a, b: a + b) == [*range(9)]


def _dies(how, piece):
    if piece == 3:
        how(os.getpid())
    return [piece]


def _by_kill(pid):
    os.kill(pid, signal.SIGKILL)


def _by_exit(_):
    os._exit(0)


def a_worker_dies(method):
    for how, said in ((_by_kill, "signal 9, SIGKILL"), (_by_exit, "exit code 0")):
        for chunksize in (1, None):
            with multiprocessing.get_context(method).Pool(2) as pool:
                func = functools.partial(_dies, how)
                error = _raised(BrokenProcessPool, pool, func, range(8), chunksize=chunksize)
                assert said in str(error), error
                assert threading.active_count() <= 4  # the pool's


def a_worker_dies_that_waits_for_work(method):
    """It has the lock of the pool's queue, for which `terminate` of the pool waits then."""
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context(method).Pool(2) as pool,
    ):
        lock = pool._inqueue._rlock
        killer = threading.Thread(target=_kill_who_waits, args=(pool, lock, folder))
        killer.start()
        error = _raised(BrokenProcessPool, pool, functools.partial(_says_who, folder), [0])
        killer.join()
        assert "signal 9, SIGKILL" in str(error), error
        assert not lock.acquire(timeout=0)
        lock.release()


def _kill_who_waits(pool, lock, folder):
    eventually(lambda: os.listdir(folder))
    eventually(lambda: not (lock.acquire(block=False) and lock.release() is None))
    (busy,) = map(int, os.listdir(folder))
    (other,) = {process.pid for process in pool._pool} - {busy}
    os.kill(other, signal.SIGKILL)
    eventually(lambda: other not in {process.pid for process in list(pool._pool)})


def _says_who(folder, _):
    Path(folder, str(os.getpid())).touch()
    eventually(lambda: not os.path.exists(folder))  # until the merge has failed


class _NotLoaded:
    def __reduce__(self):
        return _raise_when_loaded, ()


def _raise_when_loaded():
    raise ValueError("not loaded")


def _not_loaded(_):
    return _NotLoaded()


def a_result_that_cannot_be_loaded(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        with contextlib.redirect_stderr(io.StringIO()):  # where the pool's thread complains
            error = _raised(BrokenProcessPool, pool, _not_loaded, range(3), chunksize=1)
        assert "a result could not be loaded" in str(error)
    with oobpickle.enabled(), _pool(method) as pool:  # where it is told to the call
        error = _raised(ValueError, pool, _large_and_not_loaded, range(3), chunksize=1)
        assert error.args == ("not loaded",)


def _large_and_not_loaded(_):
    return np.zeros(LARGE), _NotLoaded()


def an_executors_worker_dies(method):
    with _executor(method) as executor:
        func = functools.partial(_dies, _by_kill)
        _raised(BrokenProcessPool, executor, func, range(8))


def a_worker_dies_in_op(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        op = functools.partial(_op_that_dies, os.getpid())
        _raised(BrokenProcessPool, pool, _listed, range(80), op=op, chunksize=2)


def _op_that_dies(parent, left, right):
    if os.getpid() != parent and 61 in right:
        _by_kill(os.getpid())
    return left + right


def _exits(piece):
    if piece == 3:
        sys.exit(4)
    return [piece]


def a_worker_calls_exit(method):
    with _pool(method, maxtasksperchild=2) as pool:
        error = _raised(RuntimeError, pool, _exits, range(8))
        assert str(error) == "sys.exit(4) was called in a worker"
        assert oobpickle.merge(pool, _listed, range(4)) == [0, 1, 2, 3]


def workers_that_are_replaced(method):
    with _pool(method, maxtasksperchild=1) as pool:
        total = oobpickle.merge(pool, _Model, range(10), op=operator.iadd, chunksize=1)
        assert total.pieces == [*range(10)]


def _slow(folder, piece):
    if piece == 0:
        eventually(lambda: len(os.listdir(folder)) > 2)
        raise ValueError("stop")
    Path(f"{folder}/{piece}").touch()
    time.sleep(0.01)
    return [piece]


def the_rest_is_called_off(method):
    for engine in _each(method):
        with tempfile.TemporaryDirectory() as folder:
            func = functools.partial(_slow, folder)
            error = _raised(ValueError, engine, func, range(4000), chunksize=1000)
            assert str(error) == "stop"
            # It waits behind all that was queued.
            assert oobpickle.merge(engine, _listed, range(4), chunksize=1) == [0, 1, 2, 3]
            assert len(os.listdir(folder)) < 900


def an_interrupt_in_the_parent(method):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again
    for engine in _each(method):
        with tempfile.TemporaryDirectory() as folder:
            threading.Thread(target=_interrupt_when_begun, args=(folder, engine)).start()
            func = functools.partial(_slowly, folder)
            _raised(KeyboardInterrupt, engine, func, range(4000), chunksize=1000)
            assert oobpickle.merge(engine, _listed, range(4), chunksize=1) == [0, 1, 2, 3]
            assert len(os.listdir(folder)) < 900
        assert not _names_of_ours(os.getpid())


def _interrupt_again(unraisable):
    # CPython ignores what is raised in the callback of a weak reference.
    assert unraisable.exc_type is KeyboardInterrupt, unraisable
    signal.setitimer(signal.ITIMER_REAL, 0.01)  # not now: it would be raised in here


def _interrupt_when_begun(folder, engine):
    # An executor that is interrupted while it starts a worker does not know that one. It takes the
    # sentinel of another one, for which the shutdown waits for ever, also without us.
    workers = getattr(engine, "_pool", None)
    eventually(lambda: os.listdir(folder) and len(workers or engine._processes) == 2)
    os.kill(os.getpid(), signal.SIGINT)


def _slowly(folder, piece):
    Path(f"{folder}/{piece}").touch()
    time.sleep(0.01)
    return [piece]


def _names_of_ours(pid):
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return [name for name in found if "oobpickle-merge" in name]


def the_parent_is_killed(method):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        child = inside.fork(_merge_for_ever, method, folder)
        eventually(lambda: os.listdir(folder))
        os.kill(child, signal.SIGKILL)
        inside.reap(child, inside.KILLED)
        # The harness waits ten seconds for all processes to end; a chunk takes a hundred.


def _merge_for_ever(method, folder):
    with _pool(method) as pool:
        oobpickle.merge(pool, functools.partial(_slowly, folder), range(10_000), chunksize=10_000)


def a_pool_that_is_closed(method):
    with _pool(method) as pool:
        pool.close()
        assert "not running" in str(_raised(ValueError, pool, _listed, range(3)))
    with _executor(method) as executor:
        executor.shutdown()
        assert "shutdown" in str(_raised(RuntimeError, executor, _listed, range(3)))


def a_pool_that_is_terminated_meanwhile(method):
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context(method).Pool(2) as pool,
    ):
        threading.Thread(target=_terminate_when_begun, args=(pool, folder)).start()
        func = functools.partial(_slowly, folder)
        error = _raised(BrokenProcessPool, pool, func, range(4000), chunksize=1000)
        assert "SIGTERM" in str(error) or "the pool was terminated" in str(error), error


def _terminate_when_begun(pool, folder):
    eventually(lambda: os.listdir(folder))
    pool.terminate()


def _counts_descriptors(_):
    return _names_of_ours(os.getpid())


def nothing_is_left(method):
    before = sorted(os.listdir("/proc/self/fd"))
    n_threads = threading.active_count()
    with oobpickle.enabled() as arena:
        with _pool(method, maxtasksperchild=1) as pool:
            n_before = len(os.listdir("/proc/self/fd"))
            for _ in range(3):
                assert oobpickle.merge(pool, _counts_descriptors, range(6), chunksize=1) == []
            eventually(lambda: len(os.listdir("/proc/self/fd")) <= n_before)
            total = oobpickle.merge(pool, _Model, range(6), op=operator.iadd)
        del total
        gc.collect()
        nbytes = arena.statistics().nbytes
        assert nbytes["held"] + nbytes["leased"] + nbytes["in_flight"] == 0, nbytes
    assert threading.active_count() == n_threads
    del arena, pool
    gc.collect()
    if method == "fork":  # the others have started a helper of multiprocessing
        assert sorted(os.listdir("/proc/self/fd")) == before


# --- memory


def _large(seed):
    return np.full(2 * MIB, float(seed))  # 16 MiB


def memory(method):
    """Workers x (total + one piece) + partial results on their way: one of each worker."""
    nbytes, n_workers = 16 * MIB, 2
    merging._LEAST_S = 1000  # no call ends early, however slow the machine
    with oobpickle.enabled() as arena, _pool(method, n_workers) as pool:
        pool.map(_number, range(20))
        pids = [process.pid for process in pool._pool]
        before, before_here = _private_nbytes(pids), _private_nbytes([os.getpid()])
        is_over, peaks = threading.Event(), collections.Counter()
        most = collections.Counter()  # partial results

        def watch():
            while not is_over.wait(0.001):
                usage = arena.statistics().nbytes
                peaks["arena"] = max(peaks["arena"], sum(usage.values()) - usage["free"])
                in_workers = _private_nbytes(pids) - before
                here = _private_nbytes([os.getpid()]) - before_here
                peaks["workers"] = max(peaks["workers"], in_workers)
                peaks["here"] = max(peaks["here"], here)

        thread = threading.Thread(target=watch)
        thread.start()
        for options in ({}, {"chunksize": 1}):
            total = oobpickle.merge(pool, _large, range(40), op=operator.iadd, **options)
            assert total[0] == sum(range(40))
            most["chunksize" in options] = peaks["arena"]
            del total
        is_over.set()
        thread.join()
    assert nbytes < peaks["workers"] <= n_workers * 2 * nbytes + 8 * MIB, peaks
    assert peaks["here"] < 4 * MIB, peaks  # what is here is in the arena
    assert nbytes < most[False] <= n_workers * nbytes + 2 * MIB, most
    # Two more while this process sends a pair, which it has until it is copied.
    assert nbytes < most[True] <= (2 * n_workers + 1 + 2) * nbytes + 2 * MIB, most


def _private_nbytes(pids):
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    inside.main()
