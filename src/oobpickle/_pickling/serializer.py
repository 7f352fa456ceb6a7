"""The serializer: an object to a payload and back, with no shared memory anywhere.

**What.** `dumps` and `loads`, usable and testable alone.

**How it works.** ``pickle.Pickler`` in C with protocol 5, a merged dispatch table and the sink's
callback (PEP 574). The order in which reducers are found is the standard library's: exact builtin
types, then the dispatch table, then ``__reduce_ex__``. The hook also has functions and classes that
this pickler refuses, since no module has them, taken apart by `by_value`, which is asked second:
it costs several times more.

**Lifetime.** No state. A payload refers to the object's memory until it is written.

**When it cannot.** What is refused by both is refused here, with the plain pickler's error.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from oobpickle._errors import PayloadError, ResizedError
from oobpickle._foreign import annotate, pass_on_foreign
from oobpickle._pickling.into import load_into
from oobpickle._pickling.large_globals import LEAST_NBYTES, warn_of_large
from oobpickle._pickling.locating import add_place
from oobpickle._pickling.payload import Payload, check_sizes, fresh_destinations
from oobpickle._pickling.reducers import Reducer, Sink
from oobpickle._pickling.stream import Pieces, Stream, joined

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

    Examples
    --------
    >>> import numpy as np, oobpickle
    >>> payload = oobpickle.dumps({"weights": np.arange(1000.0), "name": "a"})
    >>> payload.sizes
    [8000]
    >>> oobpickle.loads(payload)["weights"][:3]
    array([0., 1., 2.])
    """
    return serialize(obj, {}, 0)


def serialize(
    obj: object,
    reducers: dict[type, Reducer],
    threshold: int,
    *,
    by_value: bool = False,
    is_main_lost: bool = False,
    copying: bool = False,
    undo: list[Callable[[], Any]] | None = None,
) -> Payload:
    """Do what `dumps` does, with further reducers; buffers stay in-band up to `threshold` bytes.

    With `by_value`, functions and classes that cannot be found by their names go by value; with
    `is_main_lost` those of the main module too, since the receiver cannot import it. With
    `copying`, this is another attempt, for which the content is taken at once. What is in `undo` by
    then is called before reducers run a second time.

    Raises
    ------
    ResizedError
        If something was resized before a small stream was put together: try again with `copying`.
    """
    if copying:
        _call_all(undo)
    sink = Sink(threshold, copying)
    try:
        if is_main_lost:
            return _ByValue(is_main_lost).serialize(obj, reducers, sink, undo)
        # `_dump` and `_settled`, for what a small message is: each Python call shows there.
        file: Any = Stream() if copying else Pieces()
        pickler = pickle.Pickler(file, 5, buffer_callback=sink.take)
        pickler.dispatch_table = sink.dispatch_table(copyreg.dispatch_table, reducers)
        pickler.dump(obj)
        if not sink.sizes and not copying and len(file) == 1:
            return Payload(file[0], sink.sources, sink.sizes)
        return _independent(_dump, _settled(file, sink), obj, reducers, sink, undo)
    except Exception as error:
        pass_on_foreign(error)
        if isinstance(error, ResizedError):
            raise  # the caller makes another attempt
        if by_value and not is_main_lost and isinstance(error, _REFUSALS):
            _call_all(undo)
            attempt = _ByValue(is_main_lost)
            try:
                return attempt.serialize(obj, reducers, Sink(threshold, copying), undo)
            except Exception as second:
                pass_on_foreign(second)
                if isinstance(second, ResizedError):
                    raise
                attempt.explain(error, second)
        _call_all(undo)
        add_place(error, obj, Sink(0).dispatch_table(copyreg.dispatch_table, reducers))
        _call_all(undo)
        raise


#: What the plain pickler raises when it meets something that it cannot take.
_REFUSALS: Final = (pickle.PicklingError, AttributeError, TypeError)
_Dump = Callable[[object, dict[type, Reducer], Sink], bytes | Stream]


def _call_all(undo: list[Callable[[], Any]] | None) -> None:
    for call in undo or ():
        call()


def _independent(
    dump: _Dump,
    stream: bytes | Stream,
    obj: object,
    reducers: dict[type, Reducer],
    sink: Sink,
    undo: list[Callable[[], Any]] | None,
) -> Payload:
    """Return the payload of what was dumped; dump again if its buffers are in common memory."""
    if not sink.copying and len(sink.sources) > 1 and sink.has_overlap():
        # Perhaps scratch memory that a reducer has used again: then it reduces twice.
        _call_all(undo)
        sink = Sink(sink.threshold, True)
        stream = dump(obj, reducers, sink)
    return Payload(stream, sink.sources, sink.sizes)


def has_common_memory(obj: object) -> bool:
    """Tell whether two buffers of an object overlap, so that `dumps` takes it apart twice."""
    sink = Sink(0)
    try:
        _dump(obj, {}, sink)
    except _REFUSALS:
        sink = Sink(0)
        _ByValue(False).dump(obj, {}, sink)
    return sink.has_overlap()


def _dump(obj: object, reducers: dict[type, Reducer], sink: Sink) -> bytes | Stream:
    file: Any = Stream() if sink.copying else Pieces()
    pickler = pickle.Pickler(file, 5, buffer_callback=sink.take)
    pickler.dispatch_table = sink.dispatch_table(copyreg.dispatch_table, reducers)
    pickler.dump(obj)
    return _settled(file, sink)


def _settled(file: Any, sink: Sink) -> bytes | Stream:
    if type(file) is Stream:
        return file
    if len(file) == 1:
        return file[0]  # type: ignore[no-any-return]
    if len(file) == 3 and type(file[1]) in (bytearray, bytes):  # one array that stays in-band
        start, content, end = file
        if len(start) + len(content) + len(end) < sink.threshold:
            return joined(start, content, end)
    stream = Stream.of(file, sink.settled)
    return bytes(stream) if stream.nbytes < sink.threshold else stream


class _ByValue:
    """An attempt to take apart by value what cannot be found by its name."""

    def __init__(self, is_main_lost: bool) -> None:
        self._is_main_lost = is_main_lost
        self._taken: list[Any] = []
        self._reasons: list[str] = []

    def serialize(
        self,
        obj: object,
        reducers: dict[type, Reducer],
        sink: Sink,
        undo: list[Callable[[], Any]] | None,
    ) -> Payload:
        stream = self.dump(obj, reducers, sink)
        payload = _independent(self.dump, stream, obj, reducers, sink, undo)
        if self._taken and payload.nbytes >= LEAST_NBYTES:
            warn_of_large(self._taken)
        return payload

    def dump(self, obj: object, reducers: dict[type, Reducer], sink: Sink) -> bytes | Stream:
        from oobpickle._pickling.by_value import Pickler

        file: Any = Stream() if sink.copying else Pieces()
        table = sink.dispatch_table(copyreg.dispatch_table, reducers)
        pickler = Pickler(file, table, is_main_lost=self._is_main_lost, buffer_callback=sink.take)
        self._taken, self._reasons = pickler.taken, pickler.reasons
        pickler.dump(obj)
        if not pickler.taken and not self._is_main_lost:
            raise pickle.PicklingError(
                "nothing in it can go by value"
            )  # so what refused it was right
        return _settled(file, sink)

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
