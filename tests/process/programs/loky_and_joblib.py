"""joblib and loky, as their users use them: results and arguments by value go out of band."""

import contextlib
import errno
import functools
import gc
import multiprocessing
import operator
import os
import signal
import sys
import tempfile
import warnings

import inside
import numpy as np
from inside import Fitted, eventually, our_descriptors

import oobpickle
from internals import inner

MIB = 1 << 20
N = 4
NBYTES = 2 * MIB


# --- what is run


def _make(seed):
    return Fitted(seed, NBYTES)


def _next(model):
    """Take a model, write into it, and return another."""
    _check(model, model.seed)
    model.counts += np.uint64(1)
    return Fitted(model.seed + 1, NBYTES)


def _check(model, seed):
    np.testing.assert_array_equal(model.counts, Fitted(seed, NBYTES).counts)
    assert type(model.counts) is np.ndarray
    assert model.counts.flags.writeable


def _models():
    return [_make(seed) for seed in range(N)]


def _check_next(run):
    for seed, model in enumerate(run(_next, _models())):
        _check(model, seed + 1)


# --- by what


@contextlib.contextmanager
def _joblib(backend, **options):
    from joblib import Parallel, delayed

    with Parallel(2, backend=backend, max_nbytes=None, **options) as parallel:
        yield lambda call, objects: parallel(delayed(call)(one) for one in objects)


@contextlib.contextmanager
def _joblib_loky():
    with _joblib("loky") as run:
        yield run
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


@contextlib.contextmanager
def _joblib_multiprocessing():
    with _joblib("multiprocessing") as run:
        yield run


@contextlib.contextmanager
def _loky_reusable():
    import loky

    executor = loky.get_reusable_executor(2)
    yield lambda call, objects: list(executor.map(call, objects))
    executor.shutdown()


@contextlib.contextmanager
def _loky_own():
    import loky

    with loky.ProcessPoolExecutor(2) as executor:
        yield lambda call, objects: list(executor.map(call, objects))


def _open(library):
    return globals()[f"_{library}"]()


@contextlib.contextmanager
def _in_silence(**options):
    with warnings.catch_warnings(), oobpickle.enabled(**options) as arena:
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        yield arena


def _counts(arena):
    done = arena.statistics()
    return done.n_buffers_out_of_band, done.n_fallbacks  # joblib sends several tasks at once


# --- for each library


def first_used_inside(library):
    """Imported inside the block, too: every result and argument, and nothing after it."""
    assert not {"joblib", "loky"} & set(sys.modules)
    with contextlib.ExitStack() as stack:
        with oobpickle.enabled(capacity=512 * MIB) as arena:
            run = stack.enter_context(_open(library))
            _check_next(run)
            assert _counts(arena) == (2 * N, 0), arena.statistics()
            _check_next(run)
            assert _counts(arena) == (4 * N, 0), arena.statistics()
        _check_next(run)
        assert _counts(arena) == (4 * N, 0)


def imported_before(library):
    with _open(library) as run:
        pass
    with oobpickle.enabled(capacity=512 * MIB) as arena, _open(library) as run:
        _check_next(run)
        assert _counts(arena) == (2 * N, 0), arena.statistics()
    with oobpickle.enabled(capacity=512 * MIB) as arena, _open(library) as run:
        _check_next(run)
        assert _counts(arena) == (2 * N, 0), arena.statistics()
    with _open(library) as run:
        _check_next(run)


def older_than_the_block(library):
    """Its workers are invited by their first large messages, which travel in-band."""
    with _open(library) as run:
        _check_next(run)
        for _ in range(2):
            with _in_silence(capacity=512 * MIB) as arena:

                def goes_out_of_band(arena=arena):
                    n_before, n_fallbacks = _counts(arena)
                    _check_next(run)
                    n_after, n_more = _counts(arena)
                    return n_more == n_fallbacks and n_after > n_before

                eventually(goes_out_of_band)
        _check_next(run)


def only_returns_and_is_older(library):
    with _open(library) as run, contextlib.ExitStack() as stack:
        run(int, range(N))
        arena = stack.enter_context(_in_silence(capacity=512 * MIB))

        def goes_out_of_band():
            n_before, *_ = _counts(arena)
            for seed, model in enumerate(run(_make, range(N))):
                _check(model, seed)
            return _counts(arena)[0] > n_before

        eventually(goes_out_of_band)


class _Refused(Exception):
    def __init__(self, counts):
        super().__init__(counts)
        self.counts = counts


def _refuse(seed):
    raise _Refused(Fitted(seed, NBYTES).counts)


def errors_with_arrays(library):
    with oobpickle.enabled(capacity=512 * MIB) as arena, _open(library) as run:
        try:
            run(_refuse, [3])
        except _Refused as error:
            np.testing.assert_array_equal(error.counts, Fitted(3, NBYTES).counts)
        else:
            raise AssertionError("no error")
        assert arena.statistics().n_messages_out_of_band == 1
        assert arena.statistics().n_fallbacks == 0
    with oobpickle.enabled(), _open(library) as run:
        _check_next(run)


def small_tasks(library):
    """Nothing is counted, and nothing is said."""
    with oobpickle.enabled() as arena, _open(library) as run:
        assert [2 * n for n in range(50)] == list(
            run(functools.partial(operator.mul, 2), range(50))
        )
        assert _counts(arena) == (0, 0)


def descriptors(library):
    """None of the arena's is inheritable, no duplicate stays."""
    with oobpickle.enabled(capacity=512 * MIB) as arena:
        n_before = len(our_descriptors())
        with _open(library) as run:
            _check_next(run)
            assert not any(os.get_inheritable(fd) for fd in inner(arena).descriptors)
            assert len(our_descriptors()) == n_before


# --- loky alone


def both_are_imported(first):
    """Each has a loky of its own; a worker may be started by the other's."""
    for name in (first, {"loky": "joblib", "joblib": "loky"}[first]):
        __import__(name)
    for library in ("loky_own", "joblib_loky"):
        with oobpickle.enabled(capacity=512 * MIB) as arena, _open(library) as run:
            _check_next(run)
            assert _counts(arena) == (2 * N, 0), (library, arena.statistics())


def an_older_executor_that_is_asked_for():
    """It keeps its workers and their environment."""
    import loky

    older = loky.get_reusable_executor(1, env={"OF_THE_OLDER": "yes"}, timeout=100)
    assert older.submit(os.getenv, "OF_THE_OLDER").result() == "yes"
    with oobpickle.enabled():
        same = loky.get_reusable_executor(reuse=True)
        assert same is older
        assert same.submit(os.getenv, "OF_THE_OLDER").result() == "yes"
        assert same._max_workers == 1
        other = loky.get_reusable_executor(1)
        assert other is not older
        assert other.submit(os.getenv, "OF_THE_OLDER").result() is None
        assert loky.get_reusable_executor(reuse=True) is other
        other.shutdown()


def without_descriptors_for_a_worker():
    """It starts all the same; what was duplicated is closed."""
    import loky.backend

    with _in_silence() as arena:
        process = loky.backend.get_context("loky").Process(target=print)
        process.start()  # so that all is imported
        process.join()
        n_before = len(our_descriptors())
        original = os.dup
        hits = []

        def refuse(fd):
            hits.append(fd)
            if len(hits) % 3 == 2:
                raise OSError(errno.EMFILE, "no descriptor is left")
            return original(fd)

        os.dup = refuse
        try:
            process = loky.backend.get_context("loky").Process(target=print)
            process.start()
        finally:
            os.dup = original
        process.join()
        assert process.exitcode == 0
        assert len(hits) == 2
        assert len(our_descriptors()) == n_before
        assert arena.statistics().n_fallbacks == 0


def processes_with_a_launcher_of_their_own():
    """Nothing of the duplicates stays when the process object has gone."""
    from loky.backend.popen_loky_posix import Popen
    from loky.backend.process import LokyProcess

    class Own(LokyProcess):
        @staticmethod
        def _Popen(process):
            return Popen(process)

    with oobpickle.enabled():
        n_before = len(our_descriptors())
        process = Own(target=print)
        process.start()
        process.join()
        del process
        gc.collect()
        assert len(our_descriptors()) == n_before


def lambdas_and_local_functions():
    with oobpickle.enabled(capacity=512 * MIB) as arena, _joblib("loky") as run:
        offset = np.full(NBYTES // 8, 7.0)
        found = run(lambda n: offset + n, range(N))
        for n, array in enumerate(found):
            np.testing.assert_array_equal(array, np.full(NBYTES // 8, 7.0 + n))
        assert arena.statistics().n_fallbacks == 0
        assert arena.statistics().n_messages_out_of_band >= N


def generators():
    import joblib

    is_older = joblib.__version__.startswith("1.3.")
    for kind in ("generator",) if is_older else ("generator", "generator_unordered"):
        with (
            oobpickle.enabled(capacity=512 * MIB) as arena,
            _joblib("loky", return_as=kind) as run,
        ):
            found = sorted(model.seed for model in run(_next, [_make(n) for n in range(12)]))
            assert found == list(range(1, 13))
            assert _counts(arena) == (24, 0)


def _die(seed):
    if seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return _make(seed)


def a_killed_worker():
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with _in_silence(capacity=512 * MIB) as arena:
        try:
            Parallel(2, max_nbytes=None)(delayed(_die)(seed) for seed in range(N))
        except TerminatedWorkerError:
            pass
        else:
            raise AssertionError("no error")
        with _joblib_loky() as run:
            _check_next(run)
        assert arena.statistics().n_fallbacks == 0
        inside.assert_empty(arena)


def _sleep(seed):
    if seed == 1:
        signal.pause()
    return _make(seed)


def a_timeout_and_what_comes_after_it():
    from joblib import Parallel, delayed

    with _in_silence(capacity=512 * MIB) as arena:
        try:
            Parallel(2, max_nbytes=None, timeout=1)(delayed(_sleep)(seed) for seed in range(N))
        except (TimeoutError, multiprocessing.TimeoutError):
            pass
        else:
            raise AssertionError("no error")
        with _joblib_loky() as run:
            _check_next(run)
        inside.assert_empty(arena)


def _describe(array):
    return type(array).__name__, getattr(array, "mode", None), float(array.sum())


def _same(array):
    return array


def memory_maps(backend, where):
    """What joblib keeps in files stays there, in its mode; what is returned is what it was."""
    from joblib import Parallel, delayed

    ones = np.ones(NBYTES // 8)
    with tempfile.NamedTemporaryFile() as file:
        ones.tofile(file.name)
        own = np.memmap(file.name, np.float64, "r")
        inside = oobpickle.enabled(capacity=512 * MIB) if where == "inside" else None
        with inside or contextlib.nullcontext() as arena:
            parallel = Parallel(2, max_nbytes=MIB, mmap_mode="c", backend=backend)
            seen = parallel(delayed(_describe)(a) for a in (ones, own, ones[::2], ones[:10]))
            back = parallel(delayed(_same)(a) for a in (ones, own, ones[::2]))
            print(seen, [_describe(one) for one in back])
        assert seen[0] == ("memmap", "c", float(ones.sum())), seen
        assert arena is None or arena.statistics().n_messages_out_of_band >= 1, arena.statistics()


def _pid(_):
    return os.getpid()


def workers_are_replaced_once_for_each_block():
    from joblib import Parallel, delayed

    def pids():
        return set(Parallel(2)(delayed(_pid)(n) for n in range(20)))

    before = pids()
    with oobpickle.enabled():
        first = set().union(*(pids() for _ in range(4)))
        assert first.isdisjoint(before)
        assert len(first) <= 2
    first |= pids()
    assert len(first) <= 2
    with oobpickle.enabled():
        assert pids().isdisjoint(first)


def who_uses_an_older_executor_goes_on():
    from joblib import Parallel, delayed

    results = Parallel(2, return_as="generator")(delayed(abs)(-n) for n in range(40))
    found = [next(results)]
    with oobpickle.enabled():
        assert Parallel(2)(delayed(abs)(-n) for n in range(10)) == list(range(10))
        found += results
    assert found == list(range(40))


def _sum_and_change(table, number):
    """What joblib would keep in a file arrives as with any other pool: private, and writable."""
    total = int(table["a"].sum())
    table["a"][:] = number
    with open("/proc/self/maps") as file:
        return total, any("oobpickle" in line and " rw-p " in line for line in file)


def one_object_for_many():
    from joblib import Parallel, delayed

    table = {"a": np.arange(1_000_000)}
    total = int(table["a"].sum())
    with oobpickle.enabled() as arena, oobpickle.broadcast(table) as handle:
        for options in ({}, {"max_nbytes": None}, {"backend": "multiprocessing"}):
            parallel = Parallel(n_jobs=2, **options)
            found = parallel(delayed(_sum_and_change)(handle, n) for n in range(4))
            assert found == [(total, True)] * 4
        assert arena.statistics().nbytes_out_of_band < 50_000
        assert arena.statistics().n_fallbacks == 0


def _inner(seed):
    from joblib import Parallel, delayed

    return sum(Parallel(2)(delayed(_make)(seed + n) for n in range(2)), start=_Sum()).total


class _Sum:
    total = 0

    def __add__(self, model):
        self.total += int(model.counts[0])
        return self


def nested():
    from joblib import Parallel, delayed

    expected = [sum(int(_make(seed + n).counts[0]) for n in range(2)) for seed in range(N)]
    with oobpickle.enabled(capacity=512 * MIB) as arena:
        assert Parallel(2)(delayed(_inner)(seed) for seed in range(N)) == expected
        assert arena.statistics().n_fallbacks == 0


def _pid_and_model(model):
    return os.getpid(), model


def shared_pages_do_not_count_as_a_leak():
    """Workers that have much of the arena in their page tables are not replaced."""
    from joblib.externals.loky import get_reusable_executor, process_executor

    assert process_executor._USE_PSUTIL
    with oobpickle.enabled(capacity=1024 * MIB):
        executor = get_reusable_executor(2, initializer=_check_for_leaks_always)
        kept, pids = [], set()
        for _ in range(40):
            pid, model = executor.submit(_pid_and_model, Fitted(1, 16 * MIB)).result()
            kept.append(model)
            pids.add(pid)
        assert len(pids) <= 2, pids
        executor.shutdown()


def _check_for_leaks_always():
    from joblib.externals.loky import process_executor

    process_executor._MEMORY_LEAK_CHECK_DELAY = 0
    process_executor._MAX_MEMORY_LEAK_SIZE = 120 * MIB


def scikit_learn():
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_validate

    random = np.random.default_rng(1)
    x, y = random.normal(size=(400, 10)), random.integers(0, 2, 400)
    forest = RandomForestClassifier(20, random_state=1)
    expected = cross_validate(forest, x, y, n_jobs=1)["test_score"]
    with oobpickle.enabled() as arena:
        found = cross_validate(forest, x, y, n_jobs=2, return_estimator=True)
        np.testing.assert_array_equal(expected, found["test_score"])
        trained = RandomForestClassifier(20, random_state=1, n_jobs=2).fit(x, y)
        np.testing.assert_array_equal(trained.predict(x), forest.fit(x, y).predict(x))
        assert arena.statistics().n_fallbacks == 0


def another_release(backend, is_said):
    """What is not served travels as it would without oobpickle, and one warning says so."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with oobpickle.enabled(capacity=512 * MIB) as arena, _joblib(backend) as run:
            for _ in range(2):
                _check_next(run)
    told = [one for one in told if issubclass(one.category, oobpickle.FallbackWarning)]
    if is_said == "said":
        assert _counts(arena) == (0, 0), arena.statistics()
        assert [one.category for one in told] == [oobpickle.NotServedWarning], told
        assert "joblib pickles in another way" in str(told[0].message)
    else:
        assert arena.statistics().n_messages_out_of_band, arena.statistics()
        assert [one.category for one in told] in ([], [oobpickle.FallbackWarning]), told
    if backend == "loky":
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)


if __name__ == "__main__":
    inside.main()
