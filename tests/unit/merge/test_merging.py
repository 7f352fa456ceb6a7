"""merge in this process, on threads, on joblib and on executors of whoever; its arguments."""

import concurrent.futures
import functools
import operator
import os
import pickle
import threading
import weakref
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest

import oobpickle
from conftest import eventually
from oobpickle._merge import merging, partials, work


class Pickling(concurrent.futures.Executor):
    """An executor that delivers arrays read-only, as those of other machines do."""

    def submit(self, function, /, *arguments):
        future = concurrent.futures.Future()
        try:
            function, arguments = frozen(pickle.loads(pickle.dumps((function, arguments))))
            future.set_result(frozen(function(*arguments)))
        except Exception as error:
            future.set_exception(error)
        return future


def frozen(obj):
    if isinstance(obj, np.ndarray):
        obj = obj.copy()
        obj.flags.writeable = False
    return type(obj)(map(frozen, obj)) if type(obj) in (tuple, list) else obj


@pytest.fixture(scope="module", params=["here", "pool", "three threads", "one thread", "other"])
def engine(request):
    if request.param == "here":
        yield None
    elif request.param == "pool":
        with ThreadPool(3) as pool:
            yield pool
    elif request.param in ("one thread", "three threads"):
        n_threads = 1 if request.param == "one thread" else 3
        barrier = threading.Barrier(n_threads)
        with concurrent.futures.ThreadPoolExecutor(n_threads) as executor:
            # All start, so that none is taken for a leftover of a test.
            list(executor.map(lambda _: barrier.wait(), range(n_threads)))
            yield executor
    else:
        yield Pickling()


def listed(*items):
    return list(items)


SIZES = (0, 1, 2, 3, 7, 50)
OPTIONS = ({}, {"chunksize": 1}, {"chunksize": 1000}, {"buffersize": 1}, {"buffersize": 5})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_it_is_reduce_of_map(engine, n, options):
    initial = [-1]
    for pieces in (range(n), iter(range(n))):
        total = oobpickle.merge(
            engine, listed, pieces, op=operator.iadd, initial=initial, **options
        )

        assert total == [-1, *range(n)]
        assert initial == [-1]
        assert (total is initial) == (n == 0)


@pytest.mark.parametrize("n", SIZES[1:])
def test_without_initial_and_in_any_order(engine, n):
    total = oobpickle.merge(engine, listed, range(n), op=operator.iadd, ordered=False)

    assert sorted(total) == list(range(n))


def test_the_default_operator_adds(engine):

    assert oobpickle.merge(engine, abs, [-1, 2, -3]) == 6


def test_an_initial_array_stays_as_it_is(engine):
    initial = np.zeros(3)
    total = oobpickle.merge(engine, np.ones, [3] * 9, op=operator.iadd, initial=initial)

    assert total.tolist() == [9, 9, 9]
    assert initial.tolist() == [0, 0, 0]
    total += 1


def test_one_result_is_ones_own_too(engine):
    total = oobpickle.merge(engine, np.ones, [3])
    total += 1

    assert total.tolist() == [2, 2, 2]


def test_an_error_that_is_kept_keeps_no_results(engine):
    class Result(list):
        pass

    kept = []

    def func(n):
        result = Result([n])
        kept.append(weakref.ref(result))
        if n == 7:
            raise ValueError(n)
        return result

    if engine is None or isinstance(engine, Pickling):
        pytest.skip("the frames of func's caller have them, or functions are pickled")
    with pytest.raises(ValueError, match="7") as raised:
        oobpickle.merge(engine, func, iter(range(20)), op=operator.iadd, buffersize=1)
    eventually(lambda: sum(one() is not None for one in kept) <= 1)
    assert raised.value.args == (7,)


def test_none_is_an_initial_value_like_any_other(engine):
    total = oobpickle.merge(engine, listed, range(4), op=join_or_start, initial=None)

    assert total == [None, 0, 1, 2, 3]
    assert oobpickle.merge(engine, listed, [], initial=None) is None


def join_or_start(left, right):
    return [None, *right] if left is None else left + right


def test_no_pieces_and_no_initial(engine):
    with pytest.raises(TypeError, match="no pieces with no initial value"):
        oobpickle.merge(engine, listed, [])
    with pytest.raises(TypeError, match="no pieces with no initial value"):
        oobpickle.merge(engine, listed, iter(""))


def fails(n):
    if n == 5:
        raise ValueError("five")
    return [n]


def test_the_first_error_is_raised_with_its_place(engine):
    with pytest.raises(ValueError, match="five") as raised:
        oobpickle.merge(engine, fails, range(6))

    assert raised.value.__notes__ == ["oobpickle.merge: raised in func, piece 5"]


def test_an_operator_that_returns_none(engine):
    with pytest.raises(TypeError, match=r"op list\.extend returned None"):
        oobpickle.merge(engine, listed, range(6), op=list.extend)


def test_progress_ends_with_all(engine):
    told = []
    oobpickle.merge(engine, listed, range(20), progress=lambda *args: told.append(args))

    assert told[0] == (0, 20)
    assert told[-2:] == [(20, 20), (20, 20)]
    assert sorted(told) == told


def test_matrices_do_not_commute(engine):
    matrices = np.random.default_rng(0).integers(-2, 3, (30, 3, 3)).astype(object)
    expected = functools.reduce(operator.matmul, matrices)
    total = oobpickle.merge(engine, np.array, matrices, op=operator.matmul, chunksize=2)

    assert (total == expected).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: oobpickle.merge(None, str), "one iterable or more"),
        (lambda: oobpickle.merge(None, 3, [1]), "func must be callable"),
        (lambda: oobpickle.merge(None, str, [1], op="+"), "op must be callable"),
        (lambda: oobpickle.merge(None, str, 3), "iter"),
        (lambda: oobpickle.merge(None, str, [1], chunksize=1.5), "chunksize must be an int"),
        (lambda: oobpickle.merge(None, str, [1], progress=3), "progress must be"),
    ],
)
def test_arguments_of_the_wrong_type(call, said):
    with pytest.raises(TypeError, match=said):
        call()


def test_the_same_order_as_reduce_in_this_process():
    floats = list(np.random.default_rng(1).normal(size=1000) * 10.0 ** np.arange(1000).__mod__(17))

    assert oobpickle.merge(None, float, floats) == functools.reduce(operator.add, floats)


def test_this_process_joins_while_workers_are_busy():
    here, there = threading.get_ident(), threading.Event()
    idents = set()

    def func(n):
        if n == 3:
            assert there.wait(20)
        return [n]

    def op(left, right):
        idents.add(threading.get_ident())
        if threading.get_ident() == here:
            there.set()
        return left + right

    with ThreadPool(2) as pool:
        assert oobpickle.merge(pool, func, range(4), op=op, chunksize=1) == [0, 1, 2, 3]
    assert here in idents


def test_idle_workers_join_too():
    """Of two pairs one is for a worker: the two joins wait for each other."""
    barrier = threading.Barrier(2, timeout=20)
    made = threading.Barrier(4, timeout=20)

    def func(n):
        made.wait()
        return [n]

    def all_are_here(n_done, n_all):
        if n_done:
            eventually(lambda: not pool._cache)

    def op(left, right):
        if len(left) + len(right) == 2:
            barrier.wait()
        return left + right

    with ThreadPool(4) as pool:
        total = oobpickle.merge(pool, func, range(4), op=op, chunksize=1, progress=all_are_here)
    assert total == [0, 1, 2, 3]


def test_a_worker_has_one_chunk():
    """So that no more results are sent than there are workers."""
    threads = []

    class Recording(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function, /, *arguments):
            threads.append(function)
            return super().submit(function, *arguments)

    for options, n_calls in (({}, 3), ({"chunksize": 5}, 6), ({"buffersize": 4}, 8)):
        threads.clear()
        with Recording(3) as executor:
            total = oobpickle.merge(executor, listed, range(30), op=operator.iadd, **options)
        assert total == [*range(30)]
        assert n_calls == sum(function is work.fold for function in threads)


def test_those_who_are_done_help_the_others(monkeypatch):
    """The second half of what the slow one has is done by both: the two wait for each other."""
    monkeypatch.setattr(merging, "_LEAST_S", 0)
    monkeypatch.setattr(work, "_TIMES_OP", 0)
    is_first_done, both = threading.Event(), threading.Barrier(2, timeout=20)

    def func(n):
        if n == 23:
            assert is_first_done.wait(20)
        if n in (24, 28):
            both.wait()
        return [n]

    def progress(n_done, n_all):
        if n_done == 16:
            is_first_done.set()

    with ThreadPool(2) as pool:
        assert oobpickle.merge(pool, func, range(32), progress=progress) == [*range(32)]


def test_parts_that_wait_are_bounded(monkeypatch):
    """Also where every call ends early."""
    monkeypatch.setattr(merging, "_LEAST_S", 0)
    monkeypatch.setattr(work, "_TIMES_OP", 0)
    most = 0

    class Counting(partials.Ordered):
        def add(self, span, value):
            nonlocal most
            super().add(span, value)
            most = max(most, len(self))

    monkeypatch.setattr(merging, "Ordered", Counting)
    for n_workers in (1, 2, 5):
        most = 0
        with ThreadPool(n_workers) as pool:
            assert oobpickle.merge(pool, listed, range(500)) == [*range(500)]
        assert 1 < most <= 2 * n_workers + 1


def test_the_rest_is_called_off():
    begun, called = threading.Event(), []

    def func(n):
        called.append(n)
        if n == 0:
            assert begun.wait(20)
            raise ValueError("stop")
        begun.set()
        return [n]

    def slow(left, right):
        raised.wait(20)
        return left + right

    raised = threading.Event()
    with ThreadPool(2) as pool:
        with pytest.raises(ValueError, match="stop"):
            oobpickle.merge(pool, func, range(4000), op=slow, chunksize=1000)
        raised.set()
        pool.close()
        pool.join()
    assert len(called) < 100


def test_what_is_under_way_and_waits_is_bounded():
    """However slow the joins are."""
    n_out, most = 0, 0

    def pieces():
        nonlocal n_out, most
        for n in range(60):
            n_out += 1
            most = max(most, n_out)
            yield n

    def op(left, right):
        nonlocal n_out
        total = left + right
        n_out -= 1
        return total

    with ThreadPool(2) as pool:
        assert oobpickle.merge(pool, listed, pieces(), op=op) == [*range(60)]
    assert most <= 2 * 2 + 1


def test_an_interrupt_leaves_the_engine_usable():
    def pieces():
        yield from range(3)
        raise KeyboardInterrupt

    with ThreadPool(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            oobpickle.merge(pool, listed, pieces())
        assert oobpickle.merge(pool, listed, range(3)) == [0, 1, 2]


def test_a_pool_that_is_closed():
    with ThreadPool(2) as pool:
        pool.close()
        with pytest.raises(ValueError, match="not running"):
            oobpickle.merge(pool, listed, range(3))


@pytest.mark.parametrize(
    ("backend", "return_as"),
    [
        ("sequential", "list"),
        ("threading", "list"),
        ("threading", "generator"),
        ("loky", "list"),
        ("loky", "generator_unordered"),
        ("multiprocessing", "list"),
    ],
)
def test_joblib(backend, return_as):
    joblib = pytest.importorskip("joblib")
    if return_as == "generator_unordered" and joblib.__version__.startswith("1.3."):
        pytest.skip("joblib 1.4 has it")
    parallel = joblib.Parallel(2, backend=backend, return_as=return_as)
    for n, options in ((0, {}), (1, {}), (7, {"buffersize": 2}), (12, {"chunksize": 1})):
        total = oobpickle.merge(
            parallel, listed, iter(range(n)), op=operator.iadd, initial=[-1], **options
        )
        assert total == [-1, *range(n)]
    with pytest.raises(ValueError, match="five") as raised:
        oobpickle.merge(parallel, fails, range(9))
    assert "oobpickle.merge: raised in func, piece 5" in raised.value.__notes__
    end_loky()


def end_loky():
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


def large(n):
    return np.full(300_000, n)  # joblib maps arguments of more than 1 MB read-only


@pytest.mark.parametrize("block", [False, True])
def test_joblib_maps_large_arguments(block):
    joblib = pytest.importorskip("joblib")
    with oobpickle.enabled() if block else joblib.parallel_config(n_jobs=2):
        total = oobpickle.merge(
            joblib.Parallel(2), large, range(40), op=operator.iadd, chunksize=1, buffersize=20
        )
        end_loky()

    assert (total == sum(range(40))).all()
    total += 1


def test_an_executor_of_loky():
    loky = pytest.importorskip("loky")
    with loky.ProcessPoolExecutor(2) as executor:
        assert oobpickle.merge(executor, listed, range(9), op=operator.iadd) == [*range(9)]
        with pytest.raises(concurrent.futures.process.BrokenProcessPool):
            oobpickle.merge(executor, os._exit, [3, 3, 3])
