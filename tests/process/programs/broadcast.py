"""One object, stored once, for many processes: it arrives as itself, and ends with the last."""

import collections
import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import typing
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Client, Listener
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import inside
import numpy as np
from inside import Model, Token, content, eventually, fork, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._native import core

MIB = 1 << 20
_libc = ctypes.CDLL(None)
_kept = []


class _Task:
    """A user's object, with a table somewhere in it."""

    def __init__(self, table):
        self.parts = {"tables": [table], "name": "task"}

    def __call__(self, seed):
        return _sum(self.parts["tables"][0], seed)


def _sum(table, seed):
    assert _is_view(table[1])
    return _sum_by_value(table, seed)


def _sum_by_value(table, seed):
    assert type(table) is tuple, table
    verify(table, seed)
    assert table[1].flags.writeable
    return int(table[1].sum())


def _put(results, table, *, also=None):
    results.put((_sum(table, 1), also is None or _sum(also, 1)))


def _keep(table):
    _kept.append(table)


def _sum_of_kept(seed):
    return _sum(_kept[0], seed)


def _pages(array):
    """Return how many KiB of an array's mapping this process has written, by the system."""
    start, written = inside.address(array), None
    with open("/proc/self/smaps") as file:
        for line in file:
            word = line.split()
            if "-" in word[0] and ":" not in word[0]:
                low, high = (int(part, 16) for part in word[0].split("-"))
                is_its = low <= start < high
            elif word[0] == "Anonymous:" and is_its:
                written = int(word[1])
    return written


def _is_view(array):
    """Whether it lies in a private mapping of an arena's file."""
    start = inside.address(array)
    with open("/proc/self/maps") as file:
        for line in file:
            span, permissions, _, _, _, *path = line.split()
            low, high = (int(part, 16) for part in span.split("-"))
            if low <= start < high:
                return permissions.endswith("p") and "oobpickle" in "".join(path)
    return False


def _published(arena):
    return arena.statistics().n_published


def _is_freed(arena):
    """Whether nothing published is left; who has died is recovered by whoever needs room."""
    gc.collect()
    inner(arena).reclaim.look()
    return not _published(arena) and not arena.statistics().n_references


# --- where it arrives


def everywhere(method):
    """The object comes where the handle was put, whatever the way and the start method."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        table = oobpickle.broadcast(message(1))
        expected = int(content(1, 1_000_000).sum())
        results = context.SimpleQueue()
        process = context.Process(target=_put, args=(results, table), kwargs={"also": table})
        process.start()
        assert results.get() == (expected, expected)
        process.join()
        process = context.Process(
            target=functools.partial(_put, results, also=table), args=(table,)
        )
        process.start()
        assert results.get() == (expected, expected)
        process.join()
        with context.Pool(2, _keep, (table,)) as pool:
            assert pool.map(_sum_of_kept, [1, 1, 1]) == [expected] * 3
            assert pool.map(functools.partial(_sum, table), [1] * 4) == [expected] * 4
            assert pool.apply(_Task(table), (1,)) == expected
            assert pool.starmap(_sum, [(table, 1), (table, 1)]) == [expected] * 2
        with ProcessPoolExecutor(
            1, mp_context=context, initializer=_keep, initargs=(table,)
        ) as executor:
            assert executor.submit(_sum_of_kept, 1).result() == expected
            assert executor.submit(_sum, table, 1).result() == expected
        assert arena.statistics().n_fallbacks == 0
        assert arena.statistics().n_copied_on_receive == 0
        del table, process, pool, executor
        _kept.clear()
        eventually(lambda: _is_freed(arena))


class _Named(typing.NamedTuple):
    table: object
    rest: object


class _Slotted:
    __slots__ = ("missing", "table")

    def __init__(self, table):
        self.table = table


class _Proxy:
    """An object that answers for another one, which is not there."""

    @property
    def __dict__(self):
        raise RuntimeError("no context")

    def __reduce__(self):
        return _Proxy, ()


def _tables_in(obj):
    """What a function finds in the places where handles were put."""
    named, slotted, queue, (mapping, _), itself, deep, _ = obj
    assert itself[0] is itself
    while deep:
        deep = deep[0]
    return [named.table, slotted.table, queue[0], mapping["table"][0], itself[1]]


def _put_sums(results, obj):
    results.put([_sum(table, 24) for table in _tables_in(obj)])


def wherever_a_pickler_comes_to(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled():
        table = oobpickle.broadcast(message(24))
        itself = [None, table]
        itself[0] = itself
        deep = []
        for _ in range(50 if method != "fork" else 5000):
            deep = [deep]
        queue = collections.deque([table])
        mapping = {"table": [table]}
        obj = [_Named(table, 1), _Slotted(table), queue, (mapping, 1), itself, deep, _Proxy()]
        results = context.SimpleQueue()
        process = context.Process(target=_put_sums, args=(results, obj))
        process.start()
        assert results.get() == [_sum(table.value, 24)] * 5
        process.join()
        assert process.exitcode == 0


def what_cannot_be_loaded_raises_in_the_target():
    with oobpickle.enabled():
        table = oobpickle.broadcast([np.ones(100_000), _Unloadable()])
        found = os.pipe()
        pid = fork(_end_as_process, table, found[1])
        os.close(found[1])
        reap(pid, 1)
        with open(found[0]) as said:
            text = said.read()
            assert "RuntimeError: cannot be loaded here" in text, text


def _end_as_process(table, stderr):
    os.dup2(stderr, 2)
    process = multiprocessing.get_context("fork").Process(target=len, args=(table,))
    process.start()
    process.join()
    os._exit(process.exitcode)


class _Unloadable:
    def __reduce__(self):
        return _raise, ("cannot be loaded here",)


def _raise(text):
    raise RuntimeError(text)


def in_a_closure(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        table = oobpickle.broadcast(message(2))

        def check(seed):
            return _sum(table, seed)

        results = context.SimpleQueue()
        with context.Pool(1) as pool:
            assert pool.map(check, [2, 2]) == [_sum(table.value, 2)] * 2
        if method == "fork":

            def put():
                results.put(check(2))

            process = context.Process(target=put)
            process.start()
            assert results.get() == _sum(table.value, 2)
            process.join()
        assert arena.statistics().n_fallbacks == 0


def through_channels(method):
    """Queues, pipes and managers; a handle in a result; an object of several arrays."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        model = oobpickle.broadcast(Model(3))
        queue, (read, write) = context.Queue(), context.Pipe(duplex=False)
        queue.put([model, model])
        one, other = queue.get()
        assert one.check() is other, "the same handle twice is one object"
        write.send({"model": model})
        read.recv()["model"].check()
        queue.close()
        queue.join_thread()
        with context.Pool(1) as pool:
            pool.apply(_make_and_return, (4,)).check()
        assert arena.statistics().n_fallbacks == 0
    with context.Manager() as manager:
        shared = manager.dict(model=model)  # outside: by value
        shared["model"].check()


def _make_and_return(seed):
    return oobpickle.broadcast(Model(seed))


def threads_get_the_handle():
    with oobpickle.enabled():
        table = oobpickle.broadcast(message(5))
        with ThreadPool(2) as pool:
            assert pool.map(lambda handle: handle is table, [table, table]) == [True, True]
            assert pool.map(lambda handle: handle.value is table.value, [table]) == [True]


# --- what arrives is independent, or cannot be written


def _write(table, seed):
    array = table[1]
    array[:] = seed
    return int(array[0]), _pages(array) is None or _pages(array) > 900


def a_private_copy_of_each(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        table = oobpickle.broadcast(message(6))
        with context.Pool(2) as pool:
            assert pool.map(functools.partial(_write, table), [1, 2, 3]) == [
                (1, True),
                (2, True),
                (3, True),
            ]
            assert pool.map(functools.partial(_sum, table), [6] * 3) == [_sum(table.value, 6)] * 3
        table.value[1][:] = 7
        (read, write) = context.Pipe(duplex=False)
        write.send(table)
        verify(read.recv(), 6)
        assert arena.statistics().n_fallbacks == 0


def _is_refused(table):
    array = table[1]
    with contextlib.suppress(ValueError):
        array[0] = 1
        return "written"
    with contextlib.suppress(ValueError):
        array.flags.writeable = True
        return "made writable"
    return verify(table) and array.sum()


def nobody_can_write_what_is_readonly(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        table = oobpickle.broadcast(message(7), readonly=True)
        expected = _is_refused(table.value)
        with context.Pool(2) as pool:
            assert pool.map(_is_refused, [table] * 4) == [expected] * 4
        assert arena.statistics().n_fallbacks == 0


# --- slices of it


def _first_and_place(part):
    assert part.flags.writeable
    first = int(part[0])
    assert _pages(part) == 0, "a page was copied"
    part[0] = 77
    return first, part.nbytes


def slices_are_references(method):
    """Of what cannot be written: in arguments, and on from where they have arrived."""
    context = multiprocessing.get_context(method)
    data = np.arange(1_000_000)
    with oobpickle.enabled() as arena:
        view = oobpickle.broadcast(data, readonly=True).value
        with context.Pool(2) as pool:
            pool.map(len, [[]] * 4)
            before = arena.statistics().nbytes_out_of_band
            parts = np.array_split(view, 8)
            found = pool.map(_first_and_place, parts)
            assert found == [(int(part[0]), part.nbytes) for part in parts]
            assert found == pool.map(_first_and_place, parts), "somebody has written to it"
            assert arena.statistics().nbytes_out_of_band - before < 20_000
        # Strided, reversed, and what was changed, go by value.
        read, write = context.Pipe(duplex=False)
        for part in (view[::2], view[::-1], view.reshape(1000, 1000)[:, :500]):
            write.send(part)
            assert (read.recv() == part).all()
        write.send(view.reshape(1000, 1000).T)
        transposed = read.recv()
        assert (transposed == data.reshape(1000, 1000).T).all()
        transposed[0, 0] = 5
        write.send(transposed)
        assert int(read.recv()[0, 0]) == 5
        writable = oobpickle.broadcast(data).value
        writable[5] = 6
        write.send(writable)
        assert int(read.recv()[5]) == 6
        assert int(view[0]) == 0
        assert arena.statistics().n_fallbacks == 0


def slices_where_the_whole_cannot_be():
    """A process that can neither map nor copy what is published gets the part that it is sent."""
    data = np.arange(8 * MIB)
    with oobpickle.enabled() as arena:
        view = oobpickle.broadcast(data, readonly=True).value
        part = view[5 * MIB :][: len(data) // 100]
        read, write = multiprocessing.Pipe(duplex=False)

        def child():
            there = []
            with open("/proc/self/statm") as file:
                limit = int(file.read().split()[0]) * resource.getpagesize() + 16 * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for _ in range(3):
                there.append(read.recv())
                assert not _is_view(there[-1])
                assert there[-1].flags.writeable
                assert (there[-1] == data[5 * MIB :][: len(data) // 100]).all()
                there[-1][:] = 0
            assert arena.statistics().nbytes_copied_on_receive == 3 * part.nbytes

        pid = fork(child)
        for _ in range(3):
            write.send(part)
        reap(pid)
        assert part[0] == 5 * MIB


# --- when it ends


def with_the_last_of_all():
    """Handle, message, view: in each order."""
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            read, write = multiprocessing.Pipe(duplex=False)
            table = oobpickle.broadcast(message(8))
            write.send(table)
            has = {0: table, 1: read.recv(), 2: table.value}
            del table
            for one in order:
                assert _published(arena)
                del has[one]
                gc.collect()
            assert not _published(arena)
            assert not arena.statistics().n_references
            read.close()
            write.close()
        inside.assert_table_in_order(arena)


def with_a_message_that_nobody_reads():
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        write.send(oobpickle.broadcast(message(9)))
        assert _published(arena)
        read.close()
        write.close()
        eventually(lambda: _is_freed(arena))


def by_close():
    with oobpickle.enabled() as arena:
        with oobpickle.broadcast(message(10)) as table:
            value = table.value
            assert _published(arena)
        assert "closed" in repr(table)
        verify(value, 10)
        assert _published(arena)
        del value
        assert not _published(arena)
        with contextlib.suppress(ValueError):
            table.value  # noqa: B018
            raise AssertionError("a closed handle has a value")


def with_those_that_are_killed(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        table = oobpickle.broadcast(message(11))
        n_own = arena.statistics().n_references
        processes = [context.Process(target=_hold_for_ever, args=(table,)) for _ in range(3)]
        for process in processes:
            process.start()
        # Views of the handle that they inherited, and of what has arrived.
        eventually(lambda: arena.statistics().n_references >= 4 * n_own)
        del table
        gc.collect()
        for process in processes:
            process.kill()
            process.join()
            process._args = ()
        eventually(lambda: _is_freed(arena))


def _hold_for_ever(table):
    _sum(table, 11)
    signal.pause()


def its_memory_is_used_again():
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        for seed in range(20):
            table = oobpickle.broadcast(message(seed, 40 * MIB))
            verify(table.value, seed)
            del table
        assert arena.statistics().nbytes_resident < 100 * MIB
        assert arena.statistics().n_fallbacks == 0
    assert not inside.our_descriptors()


# --- forks


def _overwrite_what_is_free(arena):
    """Have everything that is free used again."""
    read, write = multiprocessing.Pipe(duplex=False)
    for seed in range(8):
        write.send(message(100 + seed, 20 * MIB))
        _kept.append(verify(read.recv()))
    _kept.clear()
    gc.collect()
    arena.trim()


def a_fork_copies_nothing():
    """Of views that are held: read-only ones, writable ones, and what of one is not written."""
    with oobpickle.enabled(capacity=512 * MIB) as arena:
        nbytes, page = 40 * MIB, resource.getpagesize()
        table = oobpickle.broadcast(message(12, nbytes))
        read, write = multiprocessing.Pipe(duplex=False)
        write.send(table)
        views = [
            verify(oobpickle.broadcast(message(12, nbytes), readonly=True).value, 12)[1],
            verify(table.value, 12)[1],
            verify(read.recv(), 12)[1],
        ]
        views[2][0] = 12
        written = [0, 0, page >> 10]
        total = [int(view.sum()) for view in views]
        assert list(map(_pages, views)) == written, [*map(_pages, views)]
        _kept.extend(views)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(_pages_and_sums_of_kept, range(4)) == [(written, total)] * 4
            assert pool.map(_pages_and_sum, [table] * 2) == [(0, total[1])] * 2
            assert list(map(_pages, views)) == written, [*map(_pages, views)]
            assert arena.statistics().n_copied_at_fork == 0
            assert arena.statistics().nbytes["held"] == 0
        pid = fork(_write_one_page, views[1])
        reap(pid)
        assert _pages(views[1]) == 0
        verify(table.value, 12)


def _pages_and_sums_of_kept(_):
    sums = [int(view.sum()) for view in _kept]
    return list(map(_pages, _kept)), sums


def _write_one_page(view):
    view[0] += 1
    assert _pages(view) == resource.getpagesize() >> 10


def _pages_and_sum(table):
    total = int(table[1].sum())
    return _pages(table[1]), total


def _start(has, dropped, checked):
    """Fork a child that looks at what it has inherited when its parent has dropped that."""

    def look():
        dropped.take()
        verify(has["value"])
        has["value"][1][:100] = 0
        checked.give()

    return fork(look)


def a_child_outlives_what_its_parent_has():
    """What it inherited stays, although parent and arena have gone on."""
    dropped, checked = Token(), Token()
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        has = {"handle": oobpickle.broadcast(message(13, 10 * MIB))}
        has["value"] = has["handle"].value
        pid = _start(has, dropped, checked)
        has.clear()
        gc.collect()
        _overwrite_what_is_free(arena)
        assert _published(arena) == 1
        dropped.give()
        checked.take()
        reap(pid)
        eventually(lambda: _is_freed(arena))


def a_child_outlives_the_block():
    dropped, checked = Token(), Token()
    with oobpickle.enabled(capacity=256 * MIB):
        has = {"value": oobpickle.broadcast(message(14, 10 * MIB)).value}
    # The block has ended; the view has not, nor what is forked with it now.
    pid = _start(has, dropped, checked)
    has.clear()
    gc.collect()
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        _overwrite_what_is_free(arena)
    dropped.give()
    checked.take()
    reap(pid)
    assert not inside.our_descriptors()


def a_child_outlives_its_parent():
    dropped, checked, ended = Token(), Token(), Token()
    with oobpickle.enabled(capacity=256 * MIB) as arena:

        def be_parent():
            has = {"value": oobpickle.broadcast(message(15, 10 * MIB)).value}
            _start(has, dropped, checked)

        reap(fork(be_parent))
        inner(arena).reclaim.look()
        _overwrite_what_is_free(arena)
        assert _published(arena) == 1
        dropped.give()
        checked.take()
        ended.give()
        eventually(lambda: _is_freed(arena))


def a_child_that_runs_no_hook():
    """Of a fork by C: it has no references, and what it may look at stays as long as it lives."""
    dropped, checked = Token(), Token()
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        has = {"value": oobpickle.broadcast(message(16, 10 * MIB)).value}
        pid = _libc.fork()
        if pid == 0:
            try:
                dropped.take()
                verify(has["value"], 16)
                checked.give()
            finally:
                while True:
                    _libc.pause()
        has.clear()
        gc.collect()
        _overwrite_what_is_free(arena)
        assert _published(arena) == 1
        dropped.give()
        checked.take()
        os.kill(pid, signal.SIGKILL)
        reap(pid, inside.KILLED)
        eventually(lambda: _is_freed(arena))


def a_child_that_cannot_be_known():
    """Without a proof of life for it nothing that is published is freed until the arena ends."""
    dropped, checked = Token(), Token()
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        has = {"value": oobpickle.broadcast(message(17, 10 * MIB)).value}
        core.arm("birth.open", 1, -24)  # EMFILE
        pid = _start(has, dropped, checked)
        core.arm(None, 0, 0)
        has.clear()
        gc.collect()
        _overwrite_what_is_free(arena)
        assert _published(arena) == 1
        dropped.give()
        checked.take()
        reap(pid)
    assert not inside.our_descriptors()


def many_forks_with_many_views():
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        handles = [oobpickle.broadcast(message(seed, 100_000)) for seed in range(20)]
        values = [handle.value for handle in handles]
        pids = [fork(_verify_all, values, handles) for _ in range(10)]
        del handles[::2]
        del values[1::2]
        for pid in pids:
            reap(pid)
        handles.clear()
        values.clear()
        eventually(lambda: _is_freed(arena))
        inside.assert_table_in_order(arena)


def _verify_all(values, handles):
    for value, handle in zip(values, handles, strict=True):
        verify(value)
        verify(handle.value)


# --- in a forked process


class _Named(NamedTuple):
    table: object
    number: int


class _Slotted:
    __slots__ = ("table",)

    def __init__(self, table):
        self.table = table


class _Runs:
    def __init__(self, table, results):
        super().__init__()
        self._table, self._results = table, results

    def run(self):
        self._results.put(int(self._table[1].sum()))


class _Forked(_Runs, multiprocessing.get_context("fork").Process):
    pass


class _Spawned(_Runs, multiprocessing.get_context("spawn").Process):
    pass


def _put_type(results, table):
    results.put(type(getattr(table, "table", None) or table[0]).__name__)


def whatever_it_is_in(method):
    """Under fork, too, where nothing is pickled."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled():
        table = oobpickle.broadcast(message(24))
        results = context.SimpleQueue()
        for found in (_Named(table, 1), _Slotted(table), collections.deque([table])):
            process = context.Process(target=_put_type, args=(results, found))
            process.start()
            assert results.get() == "tuple"
            process.join()
        if method != "forkserver":
            process = (_Forked if method == "fork" else _Spawned)(table, results)
            process.start()
            assert results.get() == int(content(24, 1_000_000).sum())
            process.join()


def what_was_stored_and_not_the_parents_own(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled():
        table = oobpickle.broadcast(message(1))
        table.value[1][:] = 0
        results = context.SimpleQueue()
        process = context.Process(target=_put, args=(results, table))
        process.start()
        process.join()
        assert results.get() == (int(content(1, 1_000_000).sum()), True)


def what_is_too_deep_or_gone_stays_as_it_is():
    """What a forked process may have in its arguments is more than what pickles."""
    context = multiprocessing.get_context("fork")
    gone = weakref.proxy(_Task(None))
    deep = []
    for _ in range(10_000):
        deep = [deep]
    with oobpickle.enabled():
        table = oobpickle.broadcast(message(1))
        results = context.SimpleQueue()
        process = context.Process(target=_put_after, args=(results, deep, gone, table))
        process.start()
        assert results.get() == int(content(1, 1_000_000).sum())
        process.join()


def _put_after(results, _deep, _gone, table):
    results.put(_sum(table, 1))


# --- without


def by_value_without_a_block():
    table = oobpickle.broadcast(message(18))
    assert pickle.loads(pickle.dumps(table))[0] == 18
    code = "import sys, pickle; table = pickle.loads(sys.stdin.buffer.read()); "
    code += "table[1][0] = 1; assert 'oobpickle' not in sys.modules; print(len(table[1]))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import site; site.main(); " + code],
        input=pickle.dumps(table),
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"1000000\n"
    original = message(18)
    table = oobpickle.broadcast(original)
    original[1][:] = 0  # is not seen
    verify(table.value, 18)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_sum_by_value, (table, 18))
    with oobpickle.enabled(), multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_sum_by_value, (table, 18))


def by_value_where_there_is_no_room():
    read, write = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with oobpickle.enabled(capacity=8 * MIB, wait_timeout=0) as arena:
            table = oobpickle.broadcast(message(19, 20 * MIB))
            verify(table.value, 19)
            assert arena.statistics().fallbacks["full"].n_messages == 1
    assert "full" in str(said[0].message)
    read.close()
    write.close()


def in_band_and_still_right():
    """A message with a handle that has to travel in-band brings the object."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with oobpickle.enabled(capacity=64 * MIB) as arena:
            table = oobpickle.broadcast(message(20))
            readonly = oobpickle.broadcast(message(21), readonly=True)
            with Listener(("localhost", 0)) as listener:
                pid = fork(_receive_over_tcp, listener.address)
                with listener.accept() as connection:
                    connection.send([content(3, 200_000), table, content(4, 200_000), readonly])
                    reap(pid)
            assert arena.statistics().fallbacks["channel"].n_messages == 1
    assert "in-band" in str(said[0].message)


def _receive_over_tcp(address):
    with Client(address) as connection:
        first, table, second, readonly = connection.recv()
    assert (first == content(3, 200_000)).all()
    assert (second == content(4, 200_000)).all()
    assert verify(table, 20)[1].flags.writeable
    assert not verify(readonly, 21)[1].flags.writeable


def loaded_twice():
    with oobpickle.enabled():
        read, write = multiprocessing.Pipe(duplex=False)
        write.send(oobpickle.broadcast(message(21)))
        raw = read.recv_bytes()
        verify(pickle.loads(raw), 21)
        with contextlib.suppress(oobpickle.StaleEnvelopeError):
            pickle.loads(raw)
            raise AssertionError("loaded twice")


def after_its_block():
    with oobpickle.enabled():
        table = oobpickle.broadcast(message(22))
    verify(table.value, 22)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_sum_by_value, (table, 22))
    with oobpickle.enabled(), multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_sum_by_value, (table, 22))  # of another arena: by value
    del table, pool
    gc.collect()
    with oobpickle.enabled():
        pass
    assert not inside.our_descriptors()


def with_descriptors_closed():
    with oobpickle.enabled():
        table = oobpickle.broadcast(message(23))
        value = table.value
        read, write = multiprocessing.Pipe(duplex=False)
        write.send(table)
        pid = fork(_close_all_and_look, table, value, read)
        reap(pid)


def _close_all_and_look(table, value, read):
    os.closerange(3, read.fileno())
    os.closerange(read.fileno() + 1, 200)
    verify(read.recv(), 23)
    verify(value, 23)
    verify(table.value, 23)
    verify(pickle.loads(pickle.dumps(table)), 23)


if __name__ == "__main__":
    inside.main()
