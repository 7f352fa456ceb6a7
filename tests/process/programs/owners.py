"""Others that use, extend or replace what oobpickle replaces, in the same process."""

import contextlib
import copyreg
import functools
import io
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.reduction
import pickle
import sys
import types
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler

import inside
import numpy as np
from inside import Fitted, content, fork, reap

import oobpickle
from oobpickle._hook import connections
from oobpickle._hook.replacements import of_standard_library

N = 4
SMALL_NBYTES, LARGE_NBYTES = 3_000, 600_000  # below and above the threshold


def _models(first=0):
    sizes = (SMALL_NBYTES, LARGE_NBYTES)
    return [Fitted(seed, nbytes) for seed in range(first, first + N) for nbytes in sizes]


def _check(model, seed, nbytes):
    assert (model.seed, model.name) == (seed, f"model {seed}")
    assert type(model.counts) is np.ndarray
    assert model.counts.dtype == np.uint64
    assert (model.counts == content(seed, nbytes).view(np.uint64)).all()


def _next(model):
    _check(model, model.seed, model.counts.nbytes)
    return Fitted(model.seed + 1, model.counts.nbytes)


def _check_next(found, first=0):
    assert len(found) == 2 * N
    for model, sent in zip(found, _models(first), strict=True):
        assert type(model) is Fitted
        _check(model, sent.seed + 1, sent.counts.nbytes)


def _there():
    """Return what is now in the places where oobpickle replaces something."""
    return [getattr(owner, name) for owner, name, _ in of_standard_library()]


_originals = _there()


def _is_restored():
    return all(now is then for now, then in zip(_there(), _originals, strict=True))


def _is_in():
    return not any(now is then for now, then in zip(_there(), _originals, strict=True))


# --- libraries that have pools of their own


@contextlib.contextmanager
def _multiprocess(method):
    import multiprocess

    with multiprocess.get_context(method).Pool(2) as pool:
        yield lambda models: pool.map(_next, models)
        pool.close()
        pool.join()


def _multiprocess_with_fork():
    return _multiprocess("fork")


def _multiprocess_with_spawn():
    return _multiprocess("spawn")


def _open(library):
    return globals()[f"_{library}"]()


def _send_through_a_pool(pool, arena, *, alone=True):
    before = arena.statistics()
    _check_next(pool.map(_next, _models(100), chunksize=1), 100)
    after = arena.statistics()
    sent = after.n_messages_out_of_band - before.n_messages_out_of_band
    assert sent == 2 * N or (sent > 2 * N and not alone), after
    assert after.n_fallbacks == before.n_fallbacks or not alone, after


def library_used_before_inside_at_once_and_after(library):
    """Its pool is older than the block, and one of multiprocessing is used at the same time."""
    with _open(library) as run:
        _check_next(run(_models()))
        assert _is_restored()
        with (
            _enabled_in_silence() as arena,
            multiprocessing.get_context("fork").Pool(2) as pool,
        ):
            assert _is_in()
            with ThreadPoolExecutor(1) as threads:
                _send_through_a_pool(pool, arena)
                at_once = [
                    threads.submit(_send_through_a_pool, pool, arena, alone=False) for _ in range(5)
                ]
                for first in range(5):
                    _check_next(run(_models(first)), first)
                for one in at_once:
                    one.result()
            assert arena.statistics().n_messages_out_of_band >= 6 * 2 * N
            pool.close()
            pool.join()
        assert _is_restored()
        _check_next(run(_models()))


def library_first_used_inside(library):
    assert library.split("_")[0] not in sys.modules
    with contextlib.ExitStack() as stack:
        with oobpickle.enabled() as arena:
            run = stack.enter_context(_open(library))
            _check_next(run(_models()))
            assert _is_in()
            assert arena.statistics().n_messages_out_of_band == 0
            with multiprocessing.get_context("fork").Pool(1) as pool:
                _send_through_a_pool(pool, arena)
                pool.close()
                pool.join()
        assert _is_restored()
        _check_next(run(_models()))


@contextlib.contextmanager
def _recorded():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def what_is_not_served_is_said(library):
    """Where the library is imported inside the block, and nothing else went out of band."""
    assert "multiprocess" not in sys.modules
    with _recorded() as found, oobpickle.enabled(), _open(library) as run:
        run([Fitted(0, SMALL_NBYTES)])
    assert [one.category for one in found] == [oobpickle.NotServedWarning]  # imported inside
    assert "multiprocess was imported inside" in str(found[0].message)
    assert found[0].filename == __file__
    with oobpickle.enabled() as arena, _open(library) as run:  # imported by now, and served
        _check_next(run(_models()))
        assert arena.statistics().n_messages_out_of_band >= 2
    with oobpickle.enabled(), _open(library) as run:
        run([Fitted(0, SMALL_NBYTES)])
    with oobpickle.enabled() as arena, _open(library) as run:
        _check_next(run(_models()))
        with multiprocessing.get_context("fork").Pool(1) as pool:
            _send_through_a_pool(pool, arena)
            pool.close()
            pool.join()
    with _open(library) as run:
        _check_next(run(_models()))


def _send_twice_to_all(go, queue, simple, connection):
    go.wait()
    for seed in range(2):
        for send in (queue.put, simple.put, connection.send):
            send(Fitted(seed, LARGE_NBYTES))
    connection.send(Fitted(2, LARGE_NBYTES))


def older_processes_are_counted_however_they_are_read(method):
    """Their pickler is multiprocessing's; what is read as bytes may be of any other."""
    connections._N_ASKING = 0  # nobody is invited to join
    context = multiprocessing.get_context(method)
    queue, simple, (reader, writer) = context.Queue(), context.SimpleQueue(), context.Pipe(False)
    go = context.Event()
    sender = context.Process(
        target=_send_twice_to_all, args=(go, queue, simple, writer), daemon=True
    )
    sender.start()
    with context.Pool(1) as pool, ProcessPoolExecutor(1, context) as executor:
        assert pool.apply(int) == executor.submit(int).result() == 0
        with _enabled_in_silence() as arena:
            go.set()
            with_timeout = functools.partial(queue.get, timeout=60)
            gets = [queue.get, simple.get, reader.recv, with_timeout, simple.get, reader.recv]
            gets += [functools.partial(pool.apply, Fitted, (0, LARGE_NBYTES))]
            gets += [lambda: executor.submit(Fitted, 0, LARGE_NBYTES).result()]
            for n, get in enumerate(gets, 1):
                model = get()
                _check(model, model.seed, LARGE_NBYTES)
                assert _n_from_others(arena) == n, get
            model = pickle.loads(reader.recv_bytes())
            _check(model, 2, LARGE_NBYTES)
            assert _n_from_others(arena) == n
        pool.close()
        pool.join()
    sender.join()
    assert sender.exitcode == 0


def _n_from_others(arena):
    fallbacks = arena.statistics().fallbacks
    return fallbacks["channel"].n_messages if fallbacks else 0


class _OwnPickler(multiprocessing.queues.SimpleQueue):
    def put(self, obj):
        self._writer.send_bytes(pickle.dumps(obj))


def queues_with_picklers_of_their_own():
    queue = _OwnPickler(ctx=multiprocessing.get_context("fork"))
    with oobpickle.enabled() as arena, ThreadPoolExecutor(1) as threads:
        for seed in range(3):
            sent = threads.submit(queue.put, Fitted(seed, LARGE_NBYTES))
            _check(queue.get(), seed, LARGE_NBYTES)
            sent.result()
        assert arena.statistics().n_fallbacks == 0, arena.statistics()


def _send_next(connection):
    for _ in range(2 * N):
        connection.send(_next(connection.recv()))


def pipe_to_a_process_of_loky():
    """It was started inside the block, and has joined."""
    with oobpickle.enabled() as arena:
        from loky.backend import get_context

        here, there = multiprocessing.Pipe()
        process = get_context("loky").Process(target=_send_next, args=(there,))
        process.start()
        there.close()
        found = []
        for model in _models():
            here.send(model)
            found.append(here.recv())
        _check_next(found)
        process.join()
        assert process.exitcode == 0
        here.close()
        assert arena.statistics().n_messages_out_of_band == 2 * N, arena.statistics()


@contextlib.contextmanager
def _enabled_in_silence():
    with warnings.catch_warnings(), oobpickle.enabled() as arena:
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        yield arena


# --- others that put something in the same places


def _reversing_pickler(found):
    class Theirs(found):
        @classmethod
        def dumps(cls, obj, protocol=None):
            return bytes(super().dumps(obj, protocol))[::-1]

        @staticmethod
        def loads(data):
            return pickle.loads(bytes(data)[::-1])

    return Theirs


def _reversing_send_bytes(found):
    return lambda self, buf: found(self, bytes(buf)[::-1])


def _reversing_recv_bytes(found):
    return lambda self, most=None: io.BytesIO(found(self, most).getvalue()[::-1])


_PICKLERS = (multiprocessing.connection, multiprocessing.queues)


class Party:
    """Somebody else, who replaces what is there, and later restores what was there."""

    def __init__(self, *replacements):
        self._replacements = replacements
        self._theirs = ()

    def enter(self):
        self._found = [getattr(owner, name) for owner, name, _ in self._replacements]
        self._theirs = [
            make(found) for found, (_, _, make) in zip(self._found, self._replacements, strict=True)
        ]
        self._put(self._theirs)

    def leave(self):
        self._put(self._found)

    def _put(self, values):
        for value, (owner, name, _) in zip(values, self._replacements, strict=True):
            setattr(owner, name, value)

    def is_on_top(self):
        there = [getattr(owner, name) for owner, name, _ in self._replacements]
        return self._theirs == there


PARTIES = {
    "pickler": [(owner, "_ForkingPickler", _reversing_pickler) for owner in _PICKLERS],
    "connection": [
        (Connection, "_send_bytes", _reversing_send_bytes),
        (Connection, "_recv_bytes", _reversing_recv_bytes),
    ],
}


def _pass_on(obj):
    """Return what arrives through a pipe and a queue."""
    read, write = multiprocessing.Pipe(duplex=False)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    found = []
    with read, write, ThreadPoolExecutor(1) as threads:
        for put, get in ((write.send, read.recv), (queue.put, queue.get)):
            sent = threads.submit(put, obj)
            found.append(get())
            sent.result()
    queue.close()
    return found


def _check_passing_on():
    for seed, nbytes in ((1, SMALL_NBYTES), (2, LARGE_NBYTES)):
        for model in _pass_on(Fitted(seed, nbytes)):
            assert type(model) is Fitted
            _check(model, seed, nbytes)


def _n_sent(arena):
    return arena.statistics().n_messages_out_of_band


def _interleave(kind, enter_at, leave_at):
    """Two blocks in a row, and another party that comes and goes somewhere among them."""
    party, block = Party(*PARTIES[kind]), contextlib.ExitStack()
    for step in range(5):
        if step == enter_at:
            party.enter()
            _check_passing_on()
            assert party.is_on_top()
        if step == leave_at:
            party.leave()
            _check_passing_on()
        if step in (0, 2):
            arena = block.enter_context(_enabled_in_silence())
            _check_passing_on()
            assert enter_at <= step or (_n_sent(arena), arena.statistics().n_fallbacks) == (2, 0)
        if step in (1, 3):
            block.close()
            n_sent = _n_sent(arena)
            _check_passing_on()
            assert _n_sent(arena) == n_sent
            assert party.is_on_top() == (enter_at <= step < leave_at)
    before = _there()
    with oobpickle.enabled() as arena:
        _check_passing_on()
        assert (_n_sent(arena), arena.statistics().n_fallbacks) == (2, 0)
    assert _there() == before


def another_party_comes_and_goes(kind):
    for enter_at, leave_at in itertools.combinations_with_replacement(range(5), 2):
        reap(fork(_interleave, kind, enter_at, leave_at))
    assert _is_restored()


class Mark:
    """What each pickler below has arrive as text."""


def _marked(obj):
    return [("theirs" if type(item) is Mark else item) for item in obj]


def _overriding(found):
    class Theirs(found):
        def reducer_override(self, obj):
            return (str, ("theirs",)) if type(obj) is Mark else NotImplemented

    return Theirs


def _unrelated(_):
    class Theirs:
        loads = staticmethod(pickle.loads)

        @staticmethod
        def dumps(obj):
            return pickle.dumps(_marked(obj))

    return Theirs


def _like_a_module(found):
    theirs = _unrelated(found)
    return types.SimpleNamespace(dumps=theirs.dumps, loads=theirs.loads)


def _marking_dumps(found):
    return classmethod(lambda _, obj: found(_marked(obj)))


PICKLERS = {
    "overriding": [(owner, "_ForkingPickler", _overriding) for owner in _PICKLERS],
    "unrelated": [(owner, "_ForkingPickler", _unrelated) for owner in _PICKLERS],
    "like a module": [(owner, "_ForkingPickler", _like_a_module) for owner in _PICKLERS],
    "changed": [(ForkingPickler, "dumps", _marking_dumps)],
}


def _check_marks(expected):
    for nbytes in (SMALL_NBYTES, LARGE_NBYTES):
        for mark, model in _pass_on([Mark(), Fitted(3, nbytes)]):
            assert (mark if type(mark) is str else type(mark)) == expected
            _check(model, 3, nbytes)


def _with_a_pickler_of_theirs(kind, enter_inside):
    party = Party(*PICKLERS[kind])
    if not enter_inside:
        party.enter()
    with _enabled_in_silence() as arena:
        if enter_inside:
            _check_marks(Mark)
            assert _n_sent(arena) == 2
            party.enter()
        _check_marks("theirs")
    _check_marks("theirs")


def picklers_that_are_not_the_standard_library_s():
    for kind in PICKLERS:
        for enter_inside in (False, True):
            reap(fork(_with_a_pickler_of_theirs, kind, enter_inside))


def _register(register, when):
    text = f"by {register.__module__}"
    tables = copyreg.dispatch_table, ForkingPickler._extra_reducers
    if when == "before":
        register(Mark, lambda _: (str, (text,)))
    with oobpickle.enabled() as arena:
        if when == "inside":
            _check_marks(Mark)
            register(Mark, lambda _: (str, (text,)))
        before = _n_sent(arena)
        _check_marks(text)
        assert (_n_sent(arena), arena.statistics().n_fallbacks) == (before + 2, 0)
    _check_marks(text)
    assert Mark in tables[register == ForkingPickler.register]
    assert copyreg.dispatch_table is tables[0]
    assert ForkingPickler._extra_reducers is tables[1]


def reducers_of_others():
    for register in (copyreg.pickle, ForkingPickler.register):
        for when in ("before", "inside"):
            reap(fork(_register, register, when))


def undone_in_any_order():
    """install() and two blocks, as three threads could have them."""

    def installed():
        oobpickle.install()
        oobpickle.install()
        return oobpickle.uninstall

    def entered():
        block = contextlib.ExitStack()
        block.enter_context(oobpickle.enabled())
        return block.close

    for ways in set(itertools.permutations((installed, entered, entered))):
        for order in itertools.permutations(range(3)):
            undo = [way() for way in ways]
            for at in order:
                assert _is_in()
                n_sent = oobpickle.statistics().n_messages_out_of_band
                _check_passing_on()
                assert oobpickle.statistics().n_messages_out_of_band == n_sent + 2
                undo[at]()
            assert _is_restored()
            _check_passing_on()


if __name__ == "__main__":
    inside.main()
