"""The serializer: an object to a payload and back, with no shared memory anywhere.

**What.** `dumps` and `loads`, usable and testable alone.

**How it works.** ``pickle.Pickler`` in C with protocol 5, a merged dispatch table and the sink's
callback (PEP 574). The order in which reducers are found is the standard library's: exact builtin
types, then the dispatch table, then ``__reduce_ex__``. The hook also has functions and classes that
this pickler refuses, since no module has them, taken apart by `by_value`, which is asked second:
it costs several times more.

What is taken apart goes into a sink: `reducers.Sink` refers to the object's memory, and a
`oobpickle._core.Message` has copied each buffer before the pickler goes on.

**Lifetime.** No state. A payload refers to the object's memory until it is written.

**When it cannot.** What is refused by both is refused here, with the plain pickler's error.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, overload

from oobpickle._errors import PayloadError
from oobpickle._foreign import annotate, pass_on_foreign
from oobpickle._pickling.into import load_into
from oobpickle._pickling.large_globals import LEAST_NBYTES, warn_of_large
from oobpickle._pickling.locating import add_place
from oobpickle._pickling.payload import Payload, check_sizes, fresh_destinations
from oobpickle._pickling.reducers import Reducer, Sink

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]

T = TypeVar("T")


def dumps(obj: object) -> Payload:
    """Pickle `obj` with every PickleBuffer, and arrays from 512 bytes on, out of band.

    Parameters
    ----------
    obj : object
        Anything that ``pickle`` takes.

    Returns
    -------
    Payload
        It refers to the memory of `obj`.

    Raises
    ------
    Exception
        Whatever ``pickle.dumps(obj, protocol=5)`` raises.

    Notes
    -----
    Arrays arrive writable whatever they were. Source: PEP 574.

    What the payload refers to is read when it is written, as with the ``buffer_callback`` of
    ``pickle``. So an object whose ``__reduce__`` fills one scratch array for each of its parts has
    to be sent through a channel, where each buffer is copied as it is reached. While a payload
    refers to a ``bytearray`` or an ``array.array``, that cannot be resized.

    Examples
    --------
    >>> import numpy as np, oobpickle
    >>> payload = oobpickle.dumps({"weights": np.arange(1000.0), "name": "a"})
    >>> payload.sizes
    [8000]
    >>> oobpickle.loads(payload)["weights"][:3]
    array([0., 1., 2.])
    """
    return serialize(obj)


def serialize(
    obj: object,
    threshold: int = 0,
    special: Mapping[type, Reducer] | None = None,
    *,
    by_value: bool = False,
    is_main_lost: bool = False,
) -> Payload:
    """Do what `dumps` does, with further reducers; buffers stay in-band up to `threshold` bytes.

    For the rest see `take_apart`.
    """
    sink = Sink(threshold, special)
    take_apart(obj, sink, by_value=by_value, is_main_lost=is_main_lost)
    return Payload(sink.pieces, sink.sources, sink.sizes)


class Taker(Protocol):
    """What takes a message: a `Sink`, or an `oobpickle._core.Message`."""

    @property
    def nbytes(self) -> int: ...
    @property
    def table(self) -> Any: ...
    def clear(self) -> None: ...
    def write(self, piece: Any, /) -> None: ...
    def take(self, buffer: Any, /) -> bool: ...


def take_apart(
    obj: object,
    sink: Taker,
    *,
    by_value: bool = False,
    is_main_lost: bool = False,
    undo: list[Callable[[], Any]] | None = None,
) -> None:
    """Pickle `obj` into a sink.

    With `by_value`, functions and classes that cannot be found by their names go by value; with
    `is_main_lost` those of the main module too, since the receiver cannot import it. What is in
    `undo` by then is called before reducers run a second time.
    """
    try:
        if is_main_lost:
            _ByValue(is_main_lost).dump(obj, sink)
            return
        pickler = pickle.Pickler(sink, 5, buffer_callback=sink.take)
        pickler.dispatch_table = sink.table
        pickler.dump(obj)
    except Exception as error:
        pass_on_foreign(error)
        if by_value and not is_main_lost and isinstance(error, _REFUSALS):
            _call_all(undo)
            sink.clear()
            attempt = _ByValue(is_main_lost)
            try:
                attempt.dump(obj, sink)
                return
            except Exception as second:
                pass_on_foreign(second)
                attempt.explain(error, second)
        _call_all(undo)
        sink.clear()
        add_place(error, obj, Sink(0, sink.table.levels[1]).table)
        _call_all(undo)
        raise


#: What the plain pickler raises when it meets something that it cannot take.
_REFUSALS: Final = (pickle.PicklingError, AttributeError, TypeError)


def _call_all(undo: list[Callable[[], Any]] | None) -> None:
    for call in undo or ():
        call()


class _ByValue:
    """An attempt to take apart by value what cannot be found by its name."""

    def __init__(self, is_main_lost: bool) -> None:
        self._is_main_lost = is_main_lost
        self._taken: list[Any] = []
        self._reasons: list[str] = []

    def dump(self, obj: object, sink: Taker) -> None:
        from oobpickle._pickling.by_value import Pickler

        pickler = Pickler(sink, is_main_lost=self._is_main_lost)
        self._taken, self._reasons = pickler.taken, pickler.reasons
        pickler.dump(obj)
        if not pickler.taken and not self._is_main_lost:
            raise pickle.PicklingError(
                "nothing in it can go by value"
            )  # so what refused it was right
        if pickler.taken and sink.nbytes >= LEAST_NBYTES:
            warn_of_large(pickler.taken)

    def explain(self, error: Exception, second: Exception) -> None:
        """Note on the plain pickler's error why it does not go by value."""
        for reason in self._reasons:
            annotate(error, f"oobpickle: {reason}")
        if self._taken and not self._reasons:
            annotate(error, f"oobpickle: by value: {type(second).__name__}: {second}")


@overload
def loads(
    payload: Payload | Buffer, *, buffers: Sequence[Buffer] | None = ..., into: None = ...
) -> Any: ...
@overload
def loads(payload: Payload | Buffer, *, buffers: None = ..., into: T) -> T: ...


def loads(
    payload: Payload | Buffer,
    *,
    buffers: Sequence[Buffer] | None = None,
    into: Any = None,
) -> Any:
    """Rebuild the object of a payload.

    Parameters
    ----------
    payload : Payload or bytes-like
        From `dumps`, or the bytes of `Payload.to_bytes`. The stream is trusted like any pickle.
    buffers : sequence of buffers, optional
        Memory that holds the payload's buffers already (see `Payload.write_into`); the object is
        built *on* it and shares it. Without it the object is independent of the payload: its
        buffers are copied once, into ordinary memory.
    into : object, optional
        An object of the same structure, shapes and dtypes: its arrays are overwritten in place,
        its other attributes replaced, and it is returned.

    Raises
    ------
    PayloadError
        If `payload` is truncated or altered, or `buffers` do not fit it.
    StructureError
        If `into` has another structure; it is unchanged then.

    Examples
    --------
    >>> import numpy as np, oobpickle
    >>> model = {"weights": np.zeros(1000)}
    >>> kept = model["weights"]
    >>> oobpickle.loads(oobpickle.dumps({"weights": np.ones(1000)}), into=model) is model
    True
    >>> float(kept.sum())
    1000.0
    """
    if not isinstance(payload, Payload):
        payload = Payload.from_bytes(payload)
    if into is not None:
        if buffers is not None:
            raise TypeError("loads() takes buffers= or into=, not both")
        return load_into(payload, into)
    if buffers is None:
        buffers = fresh_destinations(payload.sizes)
        payload.write_into(buffers)
    else:
        try:
            found = [memoryview(buffer).nbytes for buffer in buffers]
        except TypeError as error:
            raise PayloadError(f"buffers must be bytes-like: {error}") from error
        check_sizes("buffers", found, payload.sizes)
    return pickle.loads(payload.stream, buffers=buffers)
