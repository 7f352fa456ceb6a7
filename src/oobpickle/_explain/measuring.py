"""Measuring: what a byte and an object of each kind cost on this machine, in a second or two.

**What.** `costs` returns `Costs`: seconds for each kind of `amounts` and each byte, for pickling
and loading, as the pickler of multiprocessing does it and as this library does. `predict` adds
them up.

**How it works.** Some thousands of objects of each kind are pickled and loaded; an array goes
through a pipe to a thread, and is copied between two places that have pages, so much that it is in
no cache. The shortest of some times counts. Of many objects each takes longer: to pickle one that
the pickler remembers, and to load an entry of a dictionary. What one message costs beside its bytes
follows from the threshold: it is where both ways take the same time.

**Lifetime.** Measured once in a process.

**When it cannot.** What pickling costs is counted in the thread's own time, but a pipe on a machine
that is busy at that moment looks slow. What code of the program's takes to rebuild an object is not
known: it is taken to be as much as its reducer took. A first message, for which memory has to be
had first, takes longer; so does one that waits for room or for its receiver."""

from __future__ import annotations

import datetime
import multiprocessing.connection as mp_connection
import multiprocessing.reduction as mp_reduction
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any, Final

from oobpickle._copying import copy_bytes
from oobpickle._envelope import tables
from oobpickle._explain import amounts as of
from oobpickle._memory import headroom
from oobpickle._native import core
from oobpickle._pickling.serializer import serialize, take_apart

_N: Final = 5000
_N_ARRAYS: Final = 20_000  # a small array takes twice as long among so many as among few
_MANY: Final = 100_000
_CROWDING: Final = 0.7  # how it grows with their number, as measured from 20,000 to 2,000,000
_N_TIMES: Final = 3
_LARGE: Final = 16 << 20
_COLD: Final = 64 << 20
_ROOM: Final = 1 << 30
_NEVER: Final = 1 << 60
_LEAST_S: Final = 5e-9

Rates = tuple[float, float, float, float]  # to dump plainly and here, to load plainly and here


class Sample:
    """An ordinary object."""

    def __init__(self, value: float) -> None:
        self.value = value


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, of this machine.

    Attributes
    ----------
    kinds : dict of int to Rates
        For an object of each of `amounts.KINDS`.
    crowded : Rates
        Besides, if there are `_MANY`: to dump each object that the pickler remembers, and to load
        each entry of a dictionary.
    plain_byte, copied_byte : float
        For a byte from sender to receiver: through a pipe, and copied once.
    message : float
        For a message whatever its size, through a pipe.
    """

    kinds: dict[int, Rates]
    crowded: Rates
    plain_byte: float
    copied_byte: float
    message: float


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a part takes, seconds, as measured on this machine.

    Attributes
    ----------
    pickle, load : float
        To take it apart with oobpickle, and to rebuild it.
    plain, oobpickle : float
        From sender to receiver: pickled by multiprocessing and through a pipe, and with oobpickle
        once its memory has pages.
    """

    pickle: float
    load: float
    plain: float
    oobpickle: float


def predict(amounts: list[int], threshold: int, known: Costs) -> Seconds:
    """Return what something of such amounts takes."""
    sums = [0.0] * 4
    for kind in of.KINDS:
        if amounts[kind]:
            for i, rate in enumerate(known.kinds[kind]):
                sums[i] += amounts[kind] * rate
    n_arrays = amounts[of.ARRAYS_IN] + amounts[of.ARRAYS_OUT]
    n_remembered = sum(amounts[kind] for kind in _REMEMBERED) + _MORE_OF_ARRAYS * n_arrays
    n_entries = amounts[of.ENTRIES]
    crowds = n_remembered, n_remembered, n_entries, n_entries
    for i, (n, rate) in enumerate(zip(crowds, known.crowded, strict=True)):
        if n > _N:  # the more there are, the more of them are in no cache
            sums[i] += n * rate * (n / _MANY) ** _CROWDING
    reducers = amounts[of.NS_REDUCERS] * 1e-9
    stream, out = amounts[of.STREAM], amounts[of.OUT]
    plain = reducers + sums[0] + sums[2] + (stream + out) * known.plain_byte + known.message
    loading = sums[3] + reducers  # what rebuilds is not known: as much as what takes apart
    plain += reducers
    if stream + out < threshold:
        return Seconds(reducers + sums[0], reducers + sums[2], plain, plain)
    ours = reducers + sums[1] + loading + (2 * stream + out) * known.copied_byte
    more = threshold * max(0.0, known.plain_byte - known.copied_byte)
    copying = out * known.copied_byte
    return Seconds(reducers + sums[1] + copying, loading, plain, ours + known.message + more)


_FORGOTTEN: Final = (of.ATOMS, of.AGAIN, of.ENTRIES)
_REMEMBERED: Final = tuple(kind for kind in of.KINDS if kind not in _FORGOTTEN)
_MORE_OF_ARRAYS: Final = 3  # shape, strides, and what rebuilds it
_known: Costs | None = None


def costs() -> Costs:
    """Return what this machine takes; measured by the first call."""
    global _known
    if _known is None:
        _known = _measured()
    return _known


def _measured() -> Costs:
    import numpy as np

    array = np.ones((_COLD if headroom.available_nbytes() > _ROOM else _LARGE) // 8)
    copied = _copied(memoryview(array).cast("B"), memoryview(bytearray(_LARGE)))
    array = array[: _LARGE // 8]
    reader, writer = mp_connection.Pipe(duplex=False)
    try:
        through = _shortest(lambda: _through_a_pipe(array, reader, writer)) / _LARGE
        message = _shortest(lambda: _through_a_pipe(b"", reader, writer))
    finally:
        reader.close()
        writer.close()
    kinds = _kinds(np)
    whole = _rates([_dictionary(_MANY)], n=_MANY, n_times=2)
    crowded = _less(whole, kinds[of.ATOMS], kinds[of.STRINGS], kinds[of.ENTRIES])
    return Costs(kinds, crowded, through, min(copied, through), message)


def _copied(source: memoryview, target: memoryview) -> float:
    """Return what it takes to copy a byte; the source is copied over and over the target."""

    def copy() -> None:
        for at in range(0, len(source), len(target)):
            copy_bytes(target, source[at : at + len(target)])

    return _shortest(copy) / len(source)


def _dictionary(n: int) -> dict[str, float]:
    return {f"key {i}": float(i) for i in range(n)}


def _shortest(
    call: Callable[[], object],
    clock: Callable[[], float] = perf_counter,
    n_times: int = _N_TIMES,
) -> float:
    times = []
    for _ in range(n_times):
        start = clock()
        result = call()
        times.append(clock() - start)
        del result
    return min(times)


def _through_a_pipe(obj: object, reader: Any, writer: Any) -> None:
    data = _dumps(obj)
    thread = threading.Thread(target=writer.send_bytes, args=(data,), daemon=True)
    thread.start()
    pickle.loads(reader.recv_bytes())
    thread.join()


def _dumps(obj: object) -> Any:
    return mp_reduction.ForkingPickler.dumps(obj)


def _taken_apart(obj: object, threshold: int) -> Any:
    if core is None:
        return serialize(obj, threshold)
    message = core.Message(None, threshold, tables({}))
    take_apart(obj, message)
    return message


def _rates(
    objects: list[Any], threshold: int = _NEVER, n: int | None = None, n_times: int = _N_TIMES
) -> Rates:
    """Return what one of the objects takes, of which there are `n`."""
    n = n or len(objects)
    plain, ours = _dumps(objects), serialize(objects, threshold)
    stream = ours.stream
    buffers = [bytearray(nbytes) for nbytes in ours.sizes]
    calls: list[Callable[[], object]] = [
        lambda: _dumps(objects),
        lambda: _taken_apart(objects, threshold),
        lambda: pickle.loads(plain),
        lambda: pickle.loads(stream, buffers=buffers),
    ]
    one, two, three, four = (
        max(_LEAST_S, _shortest(call, thread_time, n_times) / n) for call in calls
    )
    return one, two, three, four


def _less(rates: Rates, *others: Rates) -> Rates:
    """Return what is left without the parts."""
    left = [max(_LEAST_S, whole - sum(parts)) for whole, *parts in zip(rates, *others, strict=True)]
    return left[0], left[1], left[2], left[3]


def _kinds(np: Any) -> dict[int, Rates]:
    numbers = [float(i) for i in range(_N)]
    again = (1, 2)
    found = {
        of.ATOMS: _rates(numbers),
        of.STRINGS: _rates([f"string {i}" for i in range(_N)]),
        of.AGAIN: _rates([again] * _N),
        of.ARRAYS_IN: _rates([np.full(10, float(i)) for i in range(_N_ARRAYS)], n_times=1),
        of.ARRAYS_OUT: _rates([np.full(100, x) for x in numbers[: _N // 2]], 0),
    }
    number, get = found[of.ATOMS], found[of.AGAIN]
    entry = _less(_rates([_dictionary(_N)], n=_N), number, found[of.STRINGS])
    found[of.ENTRIES] = entry
    found[of.TUPLES] = _less(_rates([(x,) for x in numbers]), number)
    found[of.LISTS] = _less(_rates([[x] for x in numbers]), number)
    found[of.SETS] = _less(_rates([{x} for x in numbers]), number)
    found[of.DICTS] = _less(_rates([{"value": x} for x in numbers]), number, get, entry)
    samples = _rates([Sample(x) for x in numbers])
    found[of.INSTANCES] = _less(samples, number, get, get, entry)
    deltas = [datetime.timedelta(i) for i in range(_N)]
    found[of.CALLS] = _less(_rates(deltas), number, number, number, found[of.TUPLES], get)
    return found
