"""multiprocessing inside ``enabled()``: the same values, by value, and out of band."""

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.reduction
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from multiprocessing.managers import BaseManager
from multiprocessing.pool import MaybeEncodingError
from multiprocessing.reduction import ForkingPickler

import inside
import numpy as np
from inside import Model, content, is_in_arena, message, verify

import oobpickle
from internals import inner

MIB = 1 << 20


def _callables():
    """Return every function and class of multiprocessing, by where it is found."""
    owners = [m for name, m in sys.modules.items() if name.startswith("multiprocessing")]
    owners.append(multiprocessing.connection.Connection)
    return {
        (owner.__name__, name): value
        for owner in owners
        for name, value in vars(owner).items()
        if callable(value)
    }


_originals = _callables()


def _replaced():
    """Return what is not what it was before anything was installed."""
    now = _callables()
    return sorted(where for where, value in _originals.items() if now.get(where) is not value)


class Signal:
    """A class that only a registered reducer sends out of band."""

    def __init__(self, samples):
        self.samples = samples

    def __reduce__(self):
        raise TypeError("only the registered reducer may be used")


class OtherSignal(Signal):
    pass


def _rebuild_signal(samples):
    return Signal(samples)


def _reduce_signal(signal):
    return _rebuild_signal, (pickle.PickleBuffer(signal.samples),)


def _rebuild_other(samples):
    return OtherSignal(samples)


def _reduce_other(signal):
    return _rebuild_other, (signal.samples,)


oobpickle.register(Signal, _reduce_signal)
ForkingPickler.register(OtherSignal, _reduce_other)

_kept = None
_initialized = None


def _initialize(value):
    global _initialized
    _initialized = value


def _next_model(model):
    assert _initialized == "yes"
    model.check()
    model.counts[:] = 0  # it is ours
    return Model(model.seed + 1)


def _new_model(seed):
    return Model(seed)


def _echo(obj):
    return obj


# --- the ways through a pool


def _keep_and_return(array):
    global _kept
    _kept = array
    return array


def _overwrite_kept(value):
    _kept[:] = value


def _sum_of_kept():
    return int(_kept.sum(dtype=np.int64))


def neither_side_sees_later_writes(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), context.Pool(1) as pool:
        sent = content(1, 1_000_000)
        returned = pool.apply(_keep_and_return, (sent,))
        sent[:] = 0
        assert pool.apply(_sum_of_kept) == content(1, 1_000_000).sum(dtype=np.int64)
        assert (returned == content(1, 1_000_000)).all()
        pool.apply(_overwrite_kept, (7,))
        assert (returned == content(1, 1_000_000)).all()
        returned[:] = 9
        assert pool.apply(_sum_of_kept) == 7_000_000
        # What the worker got is its own while other messages come and go in recycled blocks.
        for seed in range(10):
            verify(pool.apply(_echo, (message(seed),)), seed)
        assert pool.apply(_sum_of_kept) == 7_000_000
        assert (returned == 9).all()
        pool.close()
        pool.join()


def sent_object_changes_right_after_send(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled():
        queue = context.SimpleQueue()
        read, write = context.Pipe(duplex=False)
        for put, get in ((queue.put, queue.get), (write.send, read.recv)):
            one = message(3)
            for _ in range(3):
                put(one)
                one[1][:] = 1
                verify(get(), 3)
                one = message(3)


# --- other channels


def _relay_bytes(source, target, n):
    for _ in range(n):
        target.send_bytes(source.recv_bytes())


def messages_relayed_as_bytes():
    """A proxy that never loads what it passes on; others look for room all the while."""
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled(capacity=16 * MIB) as arena:
        ends = [context.Pipe(duplex=False) for _ in range(3)]
        relays = [
            context.Process(target=_relay_bytes, args=(one[0], other[1], 20))
            for one, other in pairwise(ends)
        ]
        for process in relays:
            process.start()
        for seed in range(20):
            ends[0][1].send(message(seed))
            arena.trim()
            if seed % 2 == 0:
                inner(arena).acquire([10 * MIB]).release()
            verify(ends[-1][0].recv(), seed)
        for process in relays:
            process.join()
            assert process.exitcode == 0
        arena.trim()
        assert arena.statistics().n_fallbacks == 0
        assert arena.statistics().n_blocks["in_flight"] == 0, arena.statistics()
        inside.assert_table_in_order(arena)


def bounded_queue():
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled(capacity=8 * MIB) as arena:
        queue = context.Queue(maxsize=2)
        process = context.Process(target=_put_many, args=(queue, 40))
        process.start()
        for seed in range(40):
            verify(queue.get(), seed)
        process.join()
        assert process.exitcode == 0
        assert arena.statistics().n_fallbacks == 0


def _put_many(queue, n):
    for seed in range(n):
        queue.put(message(seed))


_READER = """
import sys
sys.modules["oobpickle"] = None  # not installed there
from multiprocessing.connection import Connection
read = Connection(int(sys.argv[1]), writable=False)
for seed in range(3):
    found, array = read.recv()
    assert found == seed and array.flags.writeable
    array[:1] = 0
    print(int(array.sum()))
"""


def program_that_inherits_a_connection_and_has_not_got_the_library():
    """By ``pass_fds``, as its stdin, or with everything that is inheritable."""
    with warnings.catch_warnings(), oobpickle.enabled() as arena:
        warnings.simplefilter("ignore")
        ways = ("pass_fds", "stdin", "inheritable", "iterator")
        for n_before, way in zip(range(0, 12, 3), ways, strict=True):
            read, write = multiprocessing.Pipe(duplex=False)
            fd = read.fileno()
            os.set_inheritable(fd, way == "inheritable")
            program = subprocess.Popen(
                [sys.executable, "-c", _READER, "0" if way == "stdin" else str(fd)],
                pass_fds={"pass_fds": [fd], "iterator": iter([fd])}.get(way, []),
                stdin=fd if way == "stdin" else None,
                close_fds=way != "inheritable",
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            sent = [message(seed, 200_000) for seed in range(3)]
            for one in sent:
                write.send(one)
            printed, complaints = program.communicate(timeout=30)
            assert program.returncode == 0, complaints
            assert complaints == b"", complaints
            assert [int(n) for n in printed.split()] == [int(one[1][1:].sum()) for one in sent]
            statistics = arena.statistics()
            assert statistics.n_messages_out_of_band == 0
            assert statistics.fallbacks["channel"].n_messages == n_before + 3


def _start_a_reader(read, has_started):
    code = _READER.replace("print", "").replace("range(3)", "range(1)")
    command = [sys.executable, "-c", code, str(read.fileno())]
    program = subprocess.Popen(command, pass_fds=[read.fileno()])
    read.close()
    has_started.send(program.pid)
    assert program.wait(60) == 0


def program_that_a_worker_lets_inherit_a_connection(method):
    """The worker knows, and so does the parent, who made the pipe."""
    context = multiprocessing.get_context(method)
    with warnings.catch_warnings(), oobpickle.enabled() as arena:
        warnings.simplefilter("ignore")
        read, write = context.Pipe(duplex=False)
        has_started, say = context.Pipe(duplex=False)
        process = context.Process(target=_start_a_reader, args=(read, say))
        process.start()
        read.close()
        assert has_started.recv() > 0
        write.send(message(0))
        process.join(60)
        assert process.exitcode == 0
        assert arena.statistics().fallbacks["channel"].n_messages == 1


def programs_without_connections_change_nothing():
    with oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        handed, pipe = inner(arena).blocks.n_passed, subprocess.PIPE
        for more in ({"stderr": subprocess.STDOUT}, {"close_fds": False}, {"stdin": pipe}):
            command = [sys.executable, "-c", "print(1)"]
            subprocess.run(command, stdout=pipe, check=True, **more)
        assert inner(arena).blocks.n_passed == handed
        write.send(message(1))
        verify(read.recv(), 1)
        assert arena.statistics().n_messages_out_of_band == 1


# --- what stays as it was


def small_objects_are_untouched():
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled() as arena, context.Pool(1) as pool:
        for obj in (1, "text", None, [b"x" * 65_000], content(1, 60_000), {"a": np.arange(1000)}):
            returned = pool.apply(_echo, (obj,))
            assert type(returned) is type(obj)
            assert pickle.dumps(returned) == pickle.dumps(obj)
        statistics = arena.statistics()
        assert statistics.n_messages_out_of_band == 0, statistics
        assert statistics.n_fallbacks == 0, statistics
        assert statistics.nbytes_resident == 0


class _Unpicklable:
    def __init__(self):
        self.array = content(1, 1_000_000)
        self.lock = threading.Lock()


def _make_unpicklable(_):
    return _Unpicklable()


class _FailsLate:
    def __init__(self):
        self.array = content(1, 1_000_000)

    def __getstate__(self):
        raise RuntimeError("late")


class _FailsToLoad:
    def __init__(self):
        self.array = content(1, 1_000_000)

    def __setstate__(self, state):
        assert state["array"].nbytes == 1_000_000
        raise RuntimeError("in __setstate__")


def _raises_with_data(seed):
    raise ValueError("no", Model(seed))


def errors_arrive_as_today():
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled() as arena:
        read, write = context.Pipe(duplex=False)
        with context.Pool(1) as pool:
            for _ in range(3):
                error = _assert_raises(ValueError, pool.apply, _raises_with_data, (1,))
                assert error.args[0] == "no"
                error.args[1].check()
                del error
                for bad, kind in ((_Unpicklable(), TypeError), (_FailsLate(), RuntimeError)):
                    _assert_raises(kind, pool.apply, _echo, (([Model(1)], bad),))
                    _assert_raises(kind, write.send, [content(2, 10**6), bad])
                _assert_raises(MaybeEncodingError, pool.apply, _make_unpicklable, (1,))
                write.send([content(2, 10**6), _FailsToLoad()])
                _assert_raises(RuntimeError, read.recv)
            assert pool.apply(_echo, (Model(5),)).check()
        gc.collect()
        arena.trim()
        statistics = arena.statistics()
        assert statistics.n_blocks["leased"] == 0, statistics
        assert statistics.n_blocks["in_flight"] == 0, statistics
        assert statistics.n_blocks["held"] == 0, statistics
        inside.assert_table_in_order(arena)


def _call(function, *args):
    return function(*args)


def _call_into(function, connection):
    connection.send(function())


def what_only_cloudpickle_can_take(method):
    """Lambdas, closures and local classes, with the arrays in them out of band."""
    context = multiprocessing.get_context(method)
    big = content(3, 1_000_000)

    class Local:
        def __init__(self, seed):
            self.model = Model(seed)

    def make(seed):
        return Local(seed), big

    with oobpickle.enabled() as arena, context.Pool(1) as pool:
        assert pool.map(lambda x: 2 * x, range(5)) == [0, 2, 4, 6, 8]
        one, returned = pool.apply(_call, (make, 4))
        assert type(one) is Local
        one.model.check()
        assert (returned == content(3, 1_000_000)).all()
        assert returned.flags.writeable
        done = arena.statistics()
        assert done.n_fallbacks == 0, done
        assert done.n_messages_out_of_band == 2, done
        assert done.nbytes_out_of_band >= 2 * big.nbytes + one.model.nbytes()
        lock = threading.Lock()
        for bad in (_Unpicklable(), lambda: lock):
            plain = _assert_raises(Exception, pickle.dumps, bad)
            error = _assert_raises(type(plain), pool.apply, _call, (bad,))
            assert type(error) is type(plain), (error, plain)
        read, write = context.Pipe(duplex=False)
        process = context.Process(target=_call_into, args=(lambda: big[:3].tolist(), write))
        process.start()
        assert read.recv() == big[:3].tolist()
        process.join()
        assert process.exitcode == 0
        process = context.Process(target=_call, args=(_Unpicklable(),))
        if method != "fork":
            _assert_raises(TypeError, process.start)
        process = context.Process(target=_put_back, args=(write, Model(2)))
        process.start()
        read.recv().check()
        process.join()
        del one, returned
    assert pickle.dumps(3) == pickle.dumps(3)


def _put_back(connection, model):
    connection.send(model)


def _assert_raises(kind, call, *args):
    try:
        call(*args)
    except kind as error:
        return error.with_traceback(None)
    raise AssertionError(f"{call} did not raise {kind}")


def too_little_room_loses_nothing(method):
    """A FallbackWarning is an exception here: it comes once, at the end of the block."""
    context = multiprocessing.get_context(method)
    received, statistics = [], None

    def block():
        nonlocal received, statistics
        with oobpickle.enabled(capacity=MIB, wait_timeout=0) as arena, context.Pool(2) as pool:
            received = pool.map(_echo, [message(seed, 3 * MIB) for seed in range(6)], chunksize=1)
            statistics = arena.statistics()
            pool.close()
            pool.join()

    warning = _assert_raises(oobpickle.FallbackWarning, block)
    assert "none was lost" in str(warning)
    assert statistics.fallbacks["full"].n_messages == 12, statistics
    for seed, one in enumerate(received):
        verify(one, seed)
        one[1][:] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with (
            oobpickle.enabled(capacity=MIB, wait_timeout=0),
            oobpickle.enabled(),
            context.Pool(1) as pool,
        ):
            for seed in range(3):
                verify(pool.apply(_echo, (message(seed, 3 * MIB),)))
    assert _n_fallback_warnings(caught) == 1
    (caught,) = [warning for warning in caught if warning.category is oobpickle.FallbackWarning]
    assert caught.filename == __file__, caught.filename


def _n_fallback_warnings(caught):
    return [warning.category for warning in caught].count(oobpickle.FallbackWarning)


# --- in and out


def nested_blocks_and_options():
    with oobpickle.enabled(capacity=64 * MIB, threshold=100_000) as outer:
        with oobpickle.enabled() as inner:
            assert inner is outer
        with oobpickle.enabled(capacity=64 * MIB) as inner:
            assert inner is outer
        assert oobpickle.install() is outer
        for wrong in (
            {"capacity": 65 * MIB},
            {"threshold": 0},
            {"wait_timeout": 1.0},
            {"copy_on_receive": True},
        ):
            error = _assert_raises(ValueError, oobpickle.enabled(**wrong).__enter__)
            assert next(iter(wrong)) in str(error)
        oobpickle.uninstall()
        assert _replaced()
        assert not outer.closed
    assert not _replaced()
    assert outer.closed
    for wrong in (
        {"capacity": 10},
        {"threshold": -1},
        {"wait_timeout": -1.0},
        {"capacity": 1 << 60},
    ):
        _assert_raises(ValueError, functools.partial(oobpickle.install, **wrong))
        assert not _replaced()


def _ask():
    return os.getpid(), _replaced()


def everything_is_restored_here_and_in_workers(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled():
        replaced = _replaced()
        assert ("multiprocessing.queues", "_ForkingPickler") in replaced
        assert ("Connection", "_send_bytes") in replaced
        pool = context.Pool(2)
        pool.map(_echo, [Model(1), Model(2)])
        assert pool.apply(_ask)[1] == replaced
    assert not _replaced()
    answers = {}
    for _ in range(20):
        pid, left = pool.apply(_ask)
        answers.setdefault(pid, []).append(left)
    for left in answers.values():
        # A worker sees it when it takes or returns its first task after the block.
        assert not any(left[1:]), answers
    # And the pool goes on as a plain one, which is said once.
    warnings.simplefilter("ignore", oobpickle.FallbackWarning)
    for seed, model in enumerate(pool.map(_echo, [Model(n) for n in range(4)], chunksize=1)):
        assert model.check().seed == seed
    pool.close()
    pool.join()


def pool_before_inside_and_after_a_block(method):
    context = multiprocessing.get_context(method)
    older = context.Pool(1)
    older.apply(_echo, (1,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with oobpickle.enabled() as arena:
            for seed in range(4):
                assert older.apply(_echo, (Model(seed),)).check().seed == seed
                done = arena.statistics()
                # The first task brings an invitation to join; its result is out of band already.
                assert done.n_messages_out_of_band == 1 + 2 * seed, done
                (fallback,) = done.fallbacks.values()
                assert fallback.n_messages == 1, done
                assert 1_000_000 < fallback.nbytes < 3_000_000, fallback
            pool = context.Pool(1)
            assert pool.apply(_echo, (Model(7),)).check().seed == 7
            assert arena.statistics().n_messages_out_of_band == 9
    assert _n_fallback_warnings(caught) == 1
    warnings.simplefilter("ignore", oobpickle.FallbackWarning)  # of what `pool` sends from now on
    for seed in range(4):
        assert older.apply(_echo, (Model(seed),)).check().seed == seed
        assert pool.apply(_echo, (Model(seed),)).check().seed == seed
    with oobpickle.enabled() as arena:
        third = context.Pool(1)
        for one in (third, pool, older):
            with warnings.catch_warnings():
                assert one.apply(_echo, (Model(9),)).check().seed == 9
        assert arena.statistics().n_messages_out_of_band == 4
        assert arena.statistics().fallbacks["channel"].n_messages == 2
        for one in (older, pool, third):
            one.close()
            one.join()
        warnings.simplefilter("ignore")


class _Shelf:
    """What a manager serves by itself."""

    def __init__(self):
        self._models = {}

    def put(self, key, model):
        self._models[key] = model.check()

    def get(self, key):
        return self._models[key].check()


class _Library(BaseManager):
    pass


_Library.register("Shelf", _Shelf)


def queues_older_than_the_block(method):
    """They are used once all who can read there have joined: this process, its children."""
    context = multiprocessing.get_context(method)
    tasks, results = context.Queue(), context.SimpleQueue()
    with oobpickle.enabled() as arena:
        process = context.Process(target=_work_on_queues, args=(tasks, results))
        process.start()
        assert results.get() == "ready"  # a child that is only being started has not joined yet
        for seed in range(3):
            tasks.put(Model(seed))
            assert results.get().check().seed == seed
        tasks.put(None)
        process.join()
        done = arena.statistics()
        assert (done.n_messages_out_of_band, done.n_fallbacks) == (6, 0), done


def _work_on_queues(tasks, results):
    results.put("ready")
    while (model := tasks.get()) is not None:
        results.put(model.check())


def _lower_limit(kind):
    if kind == "library":
        sys.modules["oobpickle._api"] = None  # as where it is not installed
        return
    limit, value = {
        "descriptors": (resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd")))),
        "address space": (resource.RLIMIT_AS, 2 << 30),
    }[kind]
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def offers_that_cannot_be_accepted(method):
    """No message is lost, and no pool hangs: it goes on in-band, and all is counted."""
    context = multiprocessing.get_context(method)
    for kind in ("library", "descriptors", "address space"):
        with context.Pool(1) as older, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            older.apply(_lower_limit, (kind,))
            with oobpickle.enabled() as arena:
                for seed in range(4):
                    assert older.apply(_echo, (Model(seed),)).check().seed == seed
                done = arena.statistics()
                if kind == "library":
                    assert done.n_messages_out_of_band == 0, done
                assert done.n_messages_out_of_band + done.n_fallbacks == 8, done
            assert older.apply(_echo, (Model(9),)).check().seed == 9
            older.close()
            older.join()


def older_pools_and_executors(method):
    """Several workers each: as soon as each has had a message, everything is out of band."""
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool, ProcessPoolExecutor(2, context) as executor:
        pool.map(_echo, range(4))
        list(executor.map(_echo, range(4)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with oobpickle.enabled() as arena:
                runs = (pool.map, executor.map)
                # Under fork the workers of the one have inherited the pipes of the other.
                inside.eventually(
                    lambda: [_all_out_of_band(arena, run) for run in runs] == [True] * 2
                )
        pool.close()
        pool.join()


def _make(seed):
    return Model(seed)


def _make_slowly(seed):
    time.sleep(0.002)  # so that no worker takes all tasks
    return Model(seed)


def _answer(connection):
    while (seed := connection.recv()) is not None:
        connection.send(Model(seed))


def _answer_through(tasks, results):
    while (seed := tasks.get()) is not None:
        results.put(Model(seed))


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with oobpickle.enabled() as arena:
            yield arena


def _until_all_out_of_band(arena, *ways):
    """Work until a round of results travels out of band in each of the ways, all of them right.

    Under fork the workers of the one have inherited the pipes of the other.
    """

    def n_in_band(work):
        before = arena.statistics().n_messages_out_of_band
        n_results = 0
        for seed, model in enumerate(work()):
            assert model.check().seed == seed
            n_results += 1
        return n_results - (arena.statistics().n_messages_out_of_band - before)

    inside.eventually(lambda: [n_in_band(work) for work in ways] == [0] * len(ways))


def older_workers_that_only_return(method):
    """Their tasks are small: the next one after a large result asks them to join."""
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool, ProcessPoolExecutor(2, context) as executor:
        pool.map(_make_slowly, range(4))
        list(executor.map(_make_slowly, range(4)))
        ways = (
            lambda: pool.map(_make_slowly, range(4), chunksize=1),
            lambda: list(pool.imap(_make_slowly, range(4))),
            lambda: [pool.apply(_make_slowly, (seed,)) for seed in range(4)],
            lambda: list(executor.map(_make_slowly, range(4))),
        )
        with _quiet() as arena:
            _until_all_out_of_band(arena, *ways)
        pool.close()
        pool.join()


def older_processes_that_only_return(method):
    """By a pipe, by queues, and a pool of which a worker is replaced meanwhile."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    tasks, results = context.Queue(), context.Queue()
    processes = [
        context.Process(target=_answer, args=(there,)),
        context.Process(target=_answer_through, args=(tasks, results)),
    ]
    for process in processes:
        process.start()
    there.close()

    def over_a_pipe():
        for seed in range(2):
            here.send(seed)
            yield here.recv()

    def through_queues():
        for seed in range(2):
            tasks.put(seed)
            yield results.get()

    with context.Pool(1, maxtasksperchild=3) as pool, _quiet() as arena:
        replaced = [worker.pid for worker in pool._pool]
        _until_all_out_of_band(
            arena,
            over_a_pipe,
            through_queues,
            lambda: [pool.apply(_make, (seed,)) for seed in range(8)],
        )
        assert replaced != [worker.pid for worker in pool._pool]
    here.send(None)
    tasks.put(None)
    for process in processes:
        process.join()
        assert process.exitcode == 0


def older_workers_that_cannot_follow(method):
    """They stay silent, go on in-band, and are not asked for ever."""
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool, _quiet() as arena:
        pool.apply(_lower_limit, ("library",))
        for seed in range(100):
            assert pool.apply(np.full, (30_000, seed))[-1] == seed
        hook = oobpickle._hook.installed.current
        assert arena.statistics().fallbacks["channel"].n_messages == 100
        asked = [n_asked for _, n_asked, _ in hook.channels._asked.values()]
        assert max(asked) < 60, asked
        assert hook.n_asking > 0
        pool.close()
        pool.join()


def older_workers_with_small_messages_only(method):
    """They are never asked: nothing is imported there."""
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        before = pool.apply(_replaced)
        with oobpickle.enabled() as arena:
            for _ in range(20):
                assert pool.apply(_echo, (1,)) == 1
            assert pool.apply(_replaced) == before == []
            assert arena.statistics().n_participants == 1
        pool.close()
        pool.join()


def _all_out_of_band(arena, run):
    before = arena.statistics()
    for seed, model in enumerate(run(_slow_echo, [Model(n) for n in range(4)], chunksize=1)):
        assert model.check().seed == seed
    after = arena.statistics()
    n_sent = after.n_messages_out_of_band - before.n_messages_out_of_band
    assert n_sent + after.n_fallbacks - before.n_fallbacks == 8, after
    return n_sent == 8


def _slow_echo(model):
    threading.Event().wait(0.01)  # so that the other worker gets one too
    return model


def _receive(connection):
    return verify(connection.recv())[0]


def connection_given_to_an_older_worker(method):
    context = multiprocessing.get_context(method)
    with context.Pool(1) as older:
        older.apply(_echo, (1,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with oobpickle.enabled():
                for duplex in (False, True):
                    read, write = context.Pipe(duplex)
                    result = older.apply_async(_receive, (read,))
                    write.send(message(3))
                    assert result.get(20) == 3
        older.close()
        older.join()


def arrays_outlive_their_block(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena, context.Pool(2) as pool:
        models = pool.map(_new_model, range(4), chunksize=1)
        pool.close()
        pool.join()
    for seed, model in enumerate(models):
        assert model.check().seed == seed
        assert is_in_arena(arena, model.counts)
        model.counts[:] = 3
    del model
    nbytes = arena.statistics().nbytes_resident
    assert nbytes >= 4 * models[0].counts.nbytes
    part = models[2].counts[5:7]
    for n in range(4):
        models.pop()
        gc.collect()
        left = arena.statistics().nbytes_resident
        assert left < nbytes or n == 1, (left, nbytes)  # `part` keeps a block of models[2]
        nbytes = left
    gc.collect()
    assert 0 < arena.statistics().nbytes_resident <= 900_000
    assert (part == 3).all()
    del part
    gc.collect()
    assert arena.statistics().nbytes_resident == 0
    # A second block is a new arena, and takes the first away.
    with oobpickle.enabled() as second, context.Pool(1) as pool:
        assert second is not arena
        pool.apply(_echo, (Model(1),)).check()
    gc.collect()
    oobpickle.install()
    oobpickle.uninstall()
    assert inside.our_descriptors() == []


# --- objects


def _check_signal(signal):
    kind = type(signal)
    assert (np.frombuffer(signal.samples, np.uint8) == content(4, 500_000)).all()
    np.frombuffer(signal.samples, np.uint8)[:] = 1
    return kind(content(5, 500_000))


def descriptors_in_a_message_that_is_taken_apart_twice():
    """Overlapping arrays are, and what cloudpickle has to take; no descriptor stays open."""
    array = content(1, 1_000_000)
    with oobpickle.enabled(), multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(_call, (type, [array, lambda: 0]))
        n_open = len(os.listdir("/proc/self/fd"))
        for _ in range(4):
            for more in (array[1:], lambda: 0):
                read, write = multiprocessing.Pipe()
                pool.apply(_call, (type, [array, more, read]))
                read.close()
                write.close()
        # The thread of multiprocessing that handed the ends out closes them after the answer; its
        # listener stays.
        inside.eventually(lambda: len(os.listdir("/proc/self/fd")) == n_open + 1)


def registered_classes_in_both_directions(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena, context.Pool(1) as pool:
        for kind in (Signal, OtherSignal):
            returned = pool.apply(_check_signal, (kind(content(4, 500_000)),))
            assert type(returned) is kind
            assert (np.frombuffer(returned.samples, np.uint8) == content(5, 500_000)).all()
            np.frombuffer(returned.samples, np.uint8)[:] = 2
        statistics = arena.statistics()
        assert statistics.n_messages_out_of_band == 4, statistics
        assert statistics.nbytes_out_of_band >= 2_000_000


def ten_thousand_small_arrays():
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled() as arena, context.Pool(1) as pool:
        arrays = [content(n % 50, 100 + n) for n in range(10_000)]
        returned = pool.apply(_echo, (arrays,))
        assert len(returned) == 10_000
        for n, (sent, got) in enumerate(zip(arrays, returned, strict=True)):
            assert (sent == got).all(), n
            got[:] = n % 256
        assert all((got == n % 256).all() for n, got in enumerate(returned))
        assert arena.statistics().n_fallbacks == 0
        del returned[1:], got
        # One small survivor holds one block, not all of them.
        gc.collect()
        arena.trim()
        assert arena.statistics().nbytes["held"] <= 3 * MIB, arena.statistics()


def copying_out():
    context = multiprocessing.get_context("fork")
    for option in (True, False, None):
        with oobpickle.enabled(capacity=32 * MIB, copy_on_receive=option) as arena:
            read, write = context.Pipe(duplex=False)
            held = []
            for seed in range(10):
                write.send(message(seed, 2 * 10**6))
                held.append(verify(read.recv(), seed))
            inside_arena = [is_in_arena(arena, one[1]) for one in held]
            n_copied = arena.statistics().n_copied_on_receive
            assert n_copied == inside_arena.count(False)
            if option is not None:
                assert inside_arena == [not option] * 10
            else:
                assert inside_arena[:8] == [True] * 8
                assert not inside_arena[-1]
            for one in held:
                verify(one)
                one[1][:] = 1
            assert arena.statistics().n_fallbacks == 0
            inside.assert_table_in_order(arena)


def threads_send_at_once():
    sys.setswitchinterval(1e-5)
    context = multiprocessing.get_context("fork")
    n = 150
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        queue, results = context.SimpleQueue(), context.Queue()
        process = context.Process(target=_collect, args=(queue, results, 3 * n))
        process.start()

        def put(first):
            for seed in range(first, first + n):
                queue.put(message(seed, 70_000 + 1_000 * (seed % 300)))

        with ThreadPoolExecutor(3) as threads:
            list(threads.map(put, (0, n, 2 * n)))
        assert sorted(results.get()) == list(range(3 * n))
        process.join()
        with context.Pool(2) as pool, ThreadPoolExecutor(4) as threads:
            calls = [
                threads.submit(pool.apply, _echo, (message(seed, 200_000),)) for seed in range(60)
            ]
            for seed, call in enumerate(calls):
                verify(call.result(), seed)
        del calls, call
        gc.collect()
        assert arena.statistics().n_fallbacks == 0, arena.statistics()
        inside.assert_table_in_order(arena)


def _collect(queue, results, n):
    seeds = []
    for _ in range(n):
        seeds.append(verify(queue.get())[0])
    results.put(seeds)


def _look_at_huge(array):
    found = [int(array[at]) for at in (0, 2**31 - 1, 2**31, 2**31 + 4)]
    array[0] = 99
    return array.nbytes, found, int(array[:: 1 << 20].sum())


def one_buffer_beyond_two_gib():
    context = multiprocessing.get_context("fork")
    array = np.zeros(2**31 + 5, np.uint8)
    array[[0, 2**31 - 1, 2**31, 2**31 + 4]] = [1, 2, 3, 4]
    with oobpickle.enabled(capacity=5 << 30) as arena, context.Pool(1) as pool:
        assert pool.apply(_look_at_huge, (array,)) == (2**31 + 5, [1, 2, 3, 4], 99 + 3)
        assert array[0] == 1
        statistics = arena.statistics()
        assert statistics.n_fallbacks == 0, statistics
        assert statistics.nbytes_out_of_band >= 2**31 + 5


# --- silence at the end


_left_behind = None


def silent_exit_with_everything_alive(method):
    """Arrays, a pool, an install and unread results are left to the interpreter's exit."""
    global _left_behind
    oobpickle.install()
    context = multiprocessing.get_context(method)
    pool = context.Pool(2)
    results = pool.imap(_new_model, range(5))
    queue = context.Queue()
    queue.put(Model(1))
    _left_behind = (pool, results, next(results).check(), queue.get().check(), message(1))
    # All results have come, unread: a worker that is terminated while it returns one can hang
    # CPython's own pool.
    inside.eventually(lambda: len(results._items) == 4)
    cycle = [queue, _left_behind]
    cycle.append(cycle)


def exit_while_daemon_threads_send():
    oobpickle.install(capacity=64 * MIB)
    started = threading.Event()

    def traffic():
        read, write = multiprocessing.Pipe(duplex=False)
        kept = []
        for seed in range(10**9):
            write.send(message(seed, 100_000))
            kept = [*kept[-3:], verify(read.recv(), seed)]
            if seed > 20:
                started.set()

    for _ in range(3):
        threading.Thread(target=traffic, daemon=True).start()
    assert started.wait(20)


def exception_out_of_the_block(method):
    context = multiprocessing.get_context(method)
    kept = None

    def block():
        nonlocal kept
        with oobpickle.enabled(), context.Pool(1) as pool:
            kept = pool.apply(_new_model, (1,))
            raise KeyError("mine")

    assert _assert_raises(KeyError, block).args == ("mine",)
    kept.check()
    assert not _replaced()


def exit_from_inside_the_block():
    with oobpickle.enabled():
        read, write = multiprocessing.Pipe(duplex=False)
        write.send(Model(1))
        kept = read.recv()
        write.send(Model(2))
        kept.check()
        sys.exit(0)


if __name__ == "__main__":
    inside.main()
