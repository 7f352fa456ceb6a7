"""Messages that cannot be loaded: in a pool the job gets the error, and the pool goes on."""

import concurrent.futures
import ctypes
import dataclasses
import functools
import io
import multiprocessing
import os
import sys
import threading
import warnings
from multiprocessing.reduction import ForkingPickler

import inside
import numpy as np
from inside import Model, content

import oobpickle
from oobpickle._hook import connections

MIB = 1 << 20
SIZES = (10, 200_000, 3 * MIB)


class _FailsToLoad:
    """Raises what ends the threads of a pool without a word."""

    def __init__(self, nbytes, error=FileNotFoundError):
        self.data = content(1, nbytes)
        self.error = error

    def __setstate__(self, state):
        raise state["error"]("in __setstate__")


class _TwoArgumentsError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def _raise(nbytes):
    error = _TwoArgumentsError(1, 2)
    error.data = content(1, nbytes)
    raise error


@dataclasses.dataclass(frozen=True)
class _FrozenError(Exception):
    """Takes no notes."""

    text: str


def _take(*_):
    return os.getpid()


def _raised(kind, call, *args):
    try:
        call(*args)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def _error_of(call, kind=FileNotFoundError):
    (note,) = [note for note in _raised(kind, call).__notes__ if "oobpickle" in note]
    return note


def _all_ways(pool, nbytes):
    """Yield what raises, by what its note says is not loaded."""
    bad = _FailsToLoad(nbytes)
    twice = functools.partial(_FailsToLoad, error=OSError)
    yield "result", pool.apply_async(_FailsToLoad, (nbytes,)).get
    yield "task", pool.apply_async(_take, (bad,)).get
    yield "result", pool.map_async(_FailsToLoad, [nbytes, nbytes, 10], chunksize=1).get
    yield "task", pool.map_async(_take, [bad, 1, bad], chunksize=2).get
    yield "result", lambda: list(pool.imap(twice, [nbytes]))
    yield "task", lambda: list(pool.imap_unordered(_take, [bad, bad]))


def pools_go_on(method):
    """In each way, out of band and in-band, and nothing stays in use."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena, context.Pool(2) as pool:
        pids = [worker.pid for worker in pool._pool]
        for nbytes in SIZES:
            for what, call in _all_ways(pool, nbytes):
                note = _error_of(call, OSError)
                assert f"loaded this {what}" in note, note
                assert (f"process {os.getpid()} " in note) == (what == "result"), note
            _error_of(pool.apply_async(_raise, (nbytes,)).get, TypeError)
            called = []
            failing = pool.apply_async(
                _FailsToLoad, (nbytes,), callback=called.append, error_callback=called.append
            )
            failing.wait(30)
            assert [type(error) for error in called] == [FileNotFoundError]
            called.clear()
            del failing, call
        failing = pool.apply_async(_take, (_FailsToLoad(10, _FrozenError),))
        assert _raised(Exception, failing.get, 60).__traceback__ is not None
        pool.apply(Model, (1,)).check()
        assert pids == [worker.pid for worker in pool._pool if worker.is_alive()]
        assert arena.statistics().n_fallbacks == 0
        inside.assert_empty(arena)


def pools_go_on_in_band(method):
    """There is no room: large messages travel in-band."""
    context = multiprocessing.get_context(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with oobpickle.enabled(capacity=MIB) as arena, context.Pool(1) as pool:
            for nbytes in SIZES:
                for what, call in _all_ways(pool, nbytes):
                    assert f"loaded this {what}" in _error_of(call, OSError)
            pool.apply(Model, (1,)).check()
            assert arena.statistics().n_fallbacks


def older_pools_go_on():
    """The first large messages are invitations to join."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with oobpickle.enabled():
            _error_of(pool.apply_async(_FailsToLoad, (10,)).get)
            _error_of(pool.apply_async(_FailsToLoad, (200_000,)).get)
            assert pool.apply(len, (b"x" * 200_000,)) == 200_000
            assert "loaded this task" in _error_of(
                pool.apply_async(_take, (_FailsToLoad(200_000),)).get
            )
            _error_of(pool.apply_async(_take, (_FailsToLoad(10),)).get)
            pool.apply(Model, (1,)).check()


def messages_that_are_lost():
    """The envelope itself cannot be loaded: its blocks are gone."""
    context = multiprocessing.get_context("fork")
    with oobpickle.enabled(), context.Pool(1) as pool:
        for size in (10, 20_000):  # with the stream in the envelope, and in the arena
            pool.apply(_take_back_what_is_sent)
            lost = pool.apply_async(_text_and_data, (size,))
            assert "loaded this result" in _error_of(lost.get, oobpickle.StaleEnvelopeError)
            pool.apply(_let_go)
            pool.apply(Model, (1,)).check()


def _text_and_data(size):
    return "x" * size, content(1, 200_000)


_pack = connections.pack


def _take_back_what_is_sent():

    def pack(*args):
        envelope = _pack(*args)
        envelope.lease.release()
        return envelope

    connections.pack = pack


def _let_go():
    connections.pack = _pack


def terminated_while_results_fail(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        for _ in range(3):
            pool = context.Pool(2)
            results = [pool.apply_async(_FailsToLoad, (200_000,)) for _ in range(30)]
            results += [pool.apply_async(_take, (_FailsToLoad(200_000),)) for _ in range(30)]
            results[0].wait(30)
            pool.terminate()
            pool.join()
            results.clear()
            del pool  # which has the channels, and what is unread in them
        inside.assert_empty(arena)


def executors_end_with_a_clear_error(method):
    context = multiprocessing.get_context(method)
    sys.excepthook = threading.excepthook = lambda *_: None
    with oobpickle.enabled():
        for nbytes in SIZES:
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
                failing = executor.submit(_FailsToLoad, nbytes)
                error = _raised(concurrent.futures.process.BrokenProcessPool, failing.result, 30)
                assert "in __setstate__" in str(error.__cause__), error.__cause__


def refused_in_the_sender(method):
    """What plain pickling refuses, from every side, with its error; and the pool goes on."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena, context.Pool(1) as pool:
        for make in (_file, _view, _array_of_c, _module, _two_axes):
            bad = make(0)
            plain = _raised(Exception, ForkingPickler(io.BytesIO()).dump, bad)
            for call in (
                pool.apply_async(_take, (bad,)).get,
                pool.map_async(_take, [bad]).get,
                lambda bad=bad: context.SimpleQueue().put(bad),
                lambda bad=bad: context.Pipe()[0].send(bad),
                lambda bad=bad: context.Pipe()[0].send([bad, lambda: 1]),
            ):
                assert str(_raised(type(plain), call)) == str(plain)
            returned = pool.apply_async(make, (0,))
            error = _raised(multiprocessing.pool.MaybeEncodingError, returned.get, 30)
            assert str(plain)[:20] in str(error), error
        assert ctypes.sizeof(pool.apply(_plain_of_c)) == 8
        inside.assert_empty(arena)


def _file(_):
    return sys.stdout


def _view(_):
    return memoryview(bytes(10))


def _two_axes(_):
    return memoryview(np.zeros((3, 4)))


def _array_of_c(_):
    return (ctypes.c_double * 4)()


def _plain_of_c():
    return ctypes.c_double(1)


def _module(_):
    return os


if __name__ == "__main__":
    inside.main()
