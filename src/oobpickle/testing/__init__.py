"""Testing: whether an object of your own arrives as pickle would have delivered it.

**What.** `check_roundtrip` sends an object in every way that there is, and raises if what arrives
is not what plain pickle delivers.

**How it works.** Taken apart as for a channel, with buffers out of band and in-band; then
through a channel into a real process, which compares what it received with what plain pickle makes
of the object there. The comparison is by path: type, value to the last bit, dtype, memory order,
flags, attributes, which object stands in several places, and which arrays share memory. Reducers of
Python classes must run once for each object.

**Lifetime.** The process ends before `check_roundtrip` returns.

**When it cannot.** An object that cannot be pickled at all raises pickle's own error."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import pickle
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from oobpickle._api import enabled
from oobpickle._envelope import tables
from oobpickle._hook.installed import running
from oobpickle._native import core
from oobpickle._pickling import in_band
from oobpickle._pickling.reducers import registered
from oobpickle._pickling.serializer import serialize, take_apart
from oobpickle.testing._calls import Calls, reducer_calls
from oobpickle.testing._comparison import UNKNOWN, Comparison

__all__ = ["check_roundtrip"]

_WAIT_S: Final = 60.0
_MOST_SHOWN: Final = 20
_IN_BAND: Final = 1 << 60


class Way(NamedTuple):
    """One way through the serializer: taking apart, and rebuilding what came of it."""

    dump: Callable[[object], Any]
    load: Callable[[Any], object]


def _taken_apart(obj: object, threshold: int) -> bytes:
    """Return an ordinary pickle, made as for a channel: each buffer is copied as it is reached."""
    if core is None:
        return bytes(serialize(obj, threshold, by_value=True).to_pickle())
    message = core.Message(None, threshold, tables({}))
    take_apart(obj, message, by_value=True)
    return bytes(in_band.as_pickle(message))


_WAYS: Final = {
    "out of band": Way(lambda obj: _taken_apart(obj, 0), pickle.loads),
    "in-band": Way(lambda obj: _taken_apart(obj, _IN_BAND), pickle.loads),
}


def check_roundtrip(obj: object, *, start_method: str | None = None) -> None:
    """Raise unless `obj` arrives exactly as plain pickle delivers it, but with writable arrays.

    Parameters
    ----------
    obj : object
        Anything that can be pickled. Its class must be importable where `start_method` needs that.
    start_method : str, optional
        How the process is started that receives it; default: the context's.

    Raises
    ------
    AssertionError
        If something differs; the text has one line for each difference, with its path.
    Exception
        Whatever pickling or loading `obj` raises without oobpickle.

    Notes
    -----
    What is compared with is ``pickle.loads(pickle.dumps(obj, protocol=5))``. Memory order, byte
    order and writability of an array may be those of `obj` where pickle loses them. With
    `oobpickle.enabled` or `oobpickle.install` in force, the process gets the message by that arena.

    Examples
    --------
    >>> import numpy as np
    >>> from oobpickle.testing import check_roundtrip
    >>> check_roundtrip({"weights": np.arange(1000.0)[::2], "name": "a"})
    """
    found = differences(obj, _WAYS)
    if not found:
        found = [f"in a process: {text}" for text in _differences_in_process(obj, start_method)]
    if found:
        more = [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
        lines = "\n  ".join(found[:_MOST_SHOWN] + more)
        raise AssertionError(
            f"a {type(obj).__qualname__} does not arrive as pickle delivers it:\n  {lines}"
        )


def differences(obj: object, ways: dict[str, Way]) -> list[str]:
    """Return what is different after each of the ways from what pickle delivers."""
    data = _reference(obj)  # the first time: reducers may have something to import or to compute
    expected_calls = reducer_calls(lambda: _reference(obj))
    found: list[str] = []
    for name, way in ways.items():
        dumped: list[Any] = []
        calls = reducer_calls(partial(_append, dumped, way.dump, obj), registered().values())
        here = _differing_calls(obj, expected_calls, calls)
        expected = pickle.loads(data)  # anew: looking at an object can change it
        here += Comparison().differences(obj, expected, way.load(dumped.pop()), apart=True)
        found += [f"{name}: {text}" for text in here]
    return found


def _append(results: list[Any], call: Callable[[object], Any], obj: object) -> None:
    results.append(call(obj))


def _reference(obj: object) -> bytes:
    try:
        return pickle.dumps(obj, 5)
    except (pickle.PicklingError, AttributeError, TypeError):
        return serialize(obj, _IN_BAND, by_value=True).stream


def _differing_calls(obj: object, expected: Calls, calls: Calls) -> list[str]:
    if calls == expected or registered():  # a reducer that was registered calls what it likes
        return []
    return [
        f"{name} was called {calls[name]} times, by pickle {n} times"
        for name, n in sorted((name, expected[name]) for name in calls.keys() | expected.keys())
        if calls[name] != n
    ]


def _differences_in_process(obj: object, start_method: str | None) -> list[str]:
    context: Any = multiprocessing.get_context(start_method)
    with contextlib.ExitStack() as stack:
        if running() is None:
            stack.enter_context(enabled(threshold=0))
        ours, theirs = context.Pipe()
        stack.enter_context(ours)
        with theirs:
            process = context.Process(target=_compare_there, args=(theirs,))
            process.start()
        try:
            with ours:
                # What is right was compared with pickle's already, and crosses as plain bytes.
                data = _taken_apart(obj, 0)
                with contextlib.suppress(ConnectionError):  # it has ended: why, it says below
                    ours.send_bytes(data)
                    ours.send(obj)
                return _answer_of(process, ours)
        finally:
            process.join(_WAIT_S)
            process.kill()
            process.join()
            process.close()


def _answer_of(process: Any, connection: Connection) -> list[str]:
    multiprocessing.connection.wait([connection, process.sentinel], _WAIT_S)
    if connection.poll():
        with contextlib.suppress(EOFError, ConnectionError):
            return connection.recv_bytes().decode().splitlines()
    process.join(_WAIT_S)
    return [f"no answer; its exit code is {process.exitcode}"]


def _compare_there(connection: Connection) -> None:
    with connection:
        try:
            expected = pickle.loads(connection.recv_bytes())
            actual = connection.recv()
        except Exception:
            found = [f"loading it raised {traceback.format_exc()!r}"]
        else:
            found = Comparison().differences(UNKNOWN, expected, actual, apart=False)
        connection.send_bytes("\n".join(found).encode(errors="backslashreplace"))
