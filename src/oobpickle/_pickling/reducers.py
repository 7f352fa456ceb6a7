"""How objects are taken apart: the reducers of oobpickle, and those that users register.

**What.** `Sink` collects the buffers of one message, with a reducer for exact ``numpy.ndarray``
and the callback that the pickler asks about each ``PickleBuffer``. `register` adds a reducer for
a user's own class.

**How it works.** NumPy's own reducer keeps strided and datetime arrays in the stream, and
read-only arrays arrive read-only. Ours hands the pickler a *stand-in*: an empty writable
PickleBuffer, for which the array itself goes into the list of buffers. It is rebuilt by
``numpy.ndarray(shape, dtype, buffer[, 0, strides])``, so a receiver needs only NumPy.

A message below the threshold costs nothing extra: buffers stay in the stream until their sum
reaches the threshold, and what is in-band by then stays there. No reducer runs twice.

A sink refers to the memory that it is given. What is sent through a channel is copied at once
instead, by `oobpickle._core.Message`, which is a sink too and writes the same stream.

**Lifetime.** A sink lives for one ``dumps``. Registered reducers live until `unregister`.

**When it cannot.** Arrays with Python objects in them and empty arrays take NumPy's way. Other
classes: `numpy_subclasses` for those of arrays, `byte_types` for Python's own memory,
`arrow_types` for slices of pyarrow's arrays. A further kind needs a line in `special_reducer`, and
its base class where the search ends early: in `DispatchTable.__missing__`, and in `may_be_special`
of ``_core/message.c``."""

from __future__ import annotations

import copyreg
import sys
from array import array as _array
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter, methodcaller
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, ClassVar, Final

from oobpickle._pickling import arrow_types, byte_types, numpy_subclasses
from oobpickle._pickling.replaced import Rebuild

if TYPE_CHECKING:
    import numpy as np

    from oobpickle._pickling.byte_types import Taker

    Array = np.ndarray[Any, Any]
    Source = Array | PickleBuffer

Reducer = Callable[[Any], Any]

#: Below this a buffer of its own costs more than its bytes in the stream.
MIN_BUFFER_NBYTES: Final = 512
_NOTHING: Final = bytearray()
#: The pickler hands a large bytearray to its file as it is, behind its header. In the place of
#: that comes a call for a buffer.
_HEADER_NBYTES: Final = 9
_CALL_BYTEARRAY: Final = b"cbuiltins\nbytearray\n\x97\x85R"
_KINDS: Final = frozenset("biufcmMSUV")
#: Their dtypes the buffer protocol has in every byte order: not that of long doubles.
EXPORTED_CHARS: Final = frozenset("?bBhHiIlLqQefdFDS")
#: NumPy copies up to here when it loads; above, the array is made on what the pickle had.
_MOST_OWNED_NBYTES: Final = 1000

_registered: dict[type, Reducer] = {}
_own: set[type] = set()  # classes of oobpickle among them


def register(type: type, reducer: Reducer) -> None:
    """Use `reducer` for instances of exactly `type`, in `dumps` and in every enabled block.

    Parameters
    ----------
    type : type
        The class; subclasses are not affected, as with ``copyreg.pickle``.
    reducer : callable
        ``reducer(obj)`` returns what ``__reduce_ex__(5)`` would, and may wrap memory in
        ``pickle.PickleBuffer``, which then travels out of band. The rebuilding function receives
        a bytes-like object in its place, writable if the wrapped memory is (PEP 574).

    Raises
    ------
    TypeError
        If `type` is no class or `reducer` not callable.

    See Also
    --------
    unregister : the undo.

    Examples
    --------
    >>> import pickle, oobpickle
    >>> class Signal:
    ...     def __init__(self, samples):
    ...         self.samples = samples
    >>> def rebuild_signal(samples):
    ...     return Signal(bytearray(samples))
    >>> def reduce_signal(signal):
    ...     return rebuild_signal, (pickle.PickleBuffer(signal.samples),)
    >>> oobpickle.register(Signal, reduce_signal)
    >>> payload = oobpickle.dumps(Signal(bytearray(1000)))
    >>> [memoryview(buffer).nbytes for buffer in payload.buffers]
    [1000]
    >>> oobpickle.unregister(Signal)
    """
    if not isinstance(type, _type):
        raise TypeError(f"register() takes a class, not {type!r}")
    if not callable(reducer):
        raise TypeError(f"the reducer for {type.__qualname__} is not callable: {reducer!r}")
    _registered[type] = reducer


_type = type


def unregister(type: type) -> None:
    """Undo `register`; a class that is not registered is no error."""
    _registered.pop(type, None)


def has_reducer(type: type) -> bool:
    """Whether `register` was called for the class."""
    return type in _registered


def special_reducer(kind: type, sink: Taker) -> Reducer | None:
    """Return the reducer for a class that derives from one with memory, or ``None``."""
    found = (module.reducer_of(kind) for module in (numpy_subclasses, byte_types, arrow_types))
    special = next(filter(None, found), None)
    return None if special is None else partial(special, sink)


class DispatchTable(dict[type, Reducer]):
    """A dispatch table that learns about a class when the first instance of it comes.

    What is not special gets what the pickler itself would call; so the pickler, which asks for
    each object, finds an entry, and no Python code runs. The sink has no reference to its table:
    together they would be a cycle, and the user's arrays would live until the collector comes.

    Attributes
    ----------
    sink : Sink
        Of the message.
    levels : tuple of mapping
        Where a reducer is looked for before ours are; the first that has one wins.
    """

    __slots__ = ("levels", "sink")

    levels: tuple[Mapping[type, Reducer], ...]
    sink: Sink

    def __missing__(self, kind: type) -> Reducer:
        for level in self.levels:
            if kind in level:
                self[kind] = level[kind]
                return level[kind]
        reduce: Reducer | None
        # None too while another thread is importing numpy.
        if kind is getattr(sys.modules.get("numpy"), "ndarray", None):
            reduce = self.sink.reduce_array
        elif kind is Rebuild:
            reduce = _REDUCED
        elif kind.__base__ is object and kind is not _array:
            reduce = _AS_PICKLE  # most are such: derived from nothing that has memory
        elif issubclass(kind, _type):
            raise KeyError(kind)  # its instances are classes, pickled by their names
        else:
            reduce = special_reducer(kind, self.sink) or _AS_PICKLE
        self[kind] = reduce
        return reduce

    def get(self, kind: type, default: Any = None) -> Any:
        """Do what the pickler in C does; the one in Python asks in this way."""
        try:
            return self[kind]
        except KeyError:
            return default


_AS_PICKLE: Final[Reducer] = methodcaller("__reduce_ex__", 5)
_REDUCED: Final[Reducer] = attrgetter("reduced")


def register_own(kind: type, reducer: Reducer) -> None:
    """Use `reducer` for a class of oobpickle."""
    _own.add(kind)
    _registered[kind] = reducer


def registered() -> dict[type, Reducer]:
    """Return the reducers that users have given to `register`, by class."""
    return {kind: reducer for kind, reducer in _registered.items() if kind not in _own}


def levels(special: Mapping[type, Reducer]) -> tuple[Mapping[type, Reducer], ...]:
    """Return where a pickler looks for reducers, in this order, before it asks for ours.

    Parameters
    ----------
    special : mapping
        What this pickler has besides those of all.
    """
    return _registered, special, copyreg.dispatch_table


class Sink:
    """The buffers of one message, as the pickler comes across them, and the file that it writes to.

    Parameters
    ----------
    threshold : int
        Buffers stay in-band while their sum is below this, bytes.
    special : mapping of class to reducer, optional
        What to look for before ``copyreg``.

    Attributes
    ----------
    pieces : list of bytes
        The stream.
    sources : list
        Arrays, and what has a buffer, to send out of band, in order.
    sizes : list of int
        Their nbytes.
    """

    #: The least memory of an array that is a buffer; of an array of a subclass.
    least_nbytes: ClassVar[int] = MIN_BUFFER_NBYTES
    least_nbytes_of_subclass: ClassVar[int] = byte_types.LEAST_NBYTES

    __slots__ = (
        *("_dtype", "_in_band_nbytes", "_sent", "_special", "_stand_ins"),
        *("pieces", "sizes", "sources", "threshold"),
    )

    def __init__(self, threshold: int, special: Mapping[type, Reducer] | None = None) -> None:
        self.threshold = threshold
        self._special = special or {}
        self.clear()

    def clear(self) -> None:
        """Forget all that was taken apart."""
        self.pieces: list[bytes] = []
        self.sources: list[Source] = []
        self.sizes: list[int] = []
        self._in_band_nbytes = 0
        self._dtype: Any = None
        self._sent: Any = None
        self._stand_ins: dict[int, tuple[Any, PickleBuffer]] = {}

    @property
    def table(self) -> DispatchTable:
        """The dispatch table for a pickler: what users registered, `special`, and then ours."""
        table = DispatchTable()
        table.sink = self
        table.levels = levels(self._special)
        return table

    @property
    def nbytes(self) -> int:
        """Of stream and buffers, bytes."""
        return sum(map(len, self.pieces)) + sum(self.sizes)

    def write(self, piece: bytes | bytearray | PickleBuffer) -> None:
        """Take what the pickler has written."""
        if isinstance(piece, bytes):
            self.pieces.append(piece)
        elif isinstance(piece, bytearray) and not self.stays(len(piece)):
            self.pieces[-1] = self.pieces[-1][:-_HEADER_NBYTES] + _CALL_BYTEARRAY
            self._add(PickleBuffer(piece))
        else:
            self.pieces.append(memoryview(piece).tobytes("A"))

    def take(self, buffer: PickleBuffer) -> bool:
        """Decide about one PickleBuffer: true leaves it in the stream (`buffer_callback`)."""
        source, _ = self._stand_ins.pop(id(buffer), (buffer, None))
        if source is buffer and self._keeps(buffer):
            return True
        self._add(source)
        return False

    def _keeps(self, buffer: PickleBuffer) -> bool:
        try:
            return self.stays(buffer.raw().nbytes)
        except BufferError:
            return True  # it is in several pieces: the pickler refuses to write it

    def _add(self, source: Any) -> None:
        self.sources.append(source)
        self.sizes.append(
            source.raw().nbytes if isinstance(source, PickleBuffer) else source.nbytes
        )

    def stand_in(self, source: Any) -> PickleBuffer:
        """Return what the pickler gets in the place of a source that leaves the stream."""
        stand_in = PickleBuffer(_NOTHING)
        # An array that is no ndarray has to stay as large as it is.
        is_array = type(source) is getattr(sys.modules.get("numpy"), "ndarray", None)
        self._stand_ins[id(stand_in)] = (source if is_array else PickleBuffer(source)), stand_in
        return stand_in

    def stays(self, nbytes: int) -> bool:
        """Decide about so many bytes: true if they stay in the stream."""
        total = self._in_band_nbytes + nbytes
        if total < self.threshold:
            self._in_band_nbytes = total
            return True
        return False

    def _sent_as(self, dtype: Any) -> Any:
        """Return what stands for a dtype in the stream; the same object for the same one."""
        if dtype is not self._dtype:
            # The name of a builtin dtype is much cheaper to send and to load than the object.
            is_builtin = dtype.isbuiltin == 1 and dtype.metadata is None
            self._dtype, self._sent = dtype, dtype.str if is_builtin else dtype
        return self._sent

    def reduce_array(self, array: Array) -> Any:
        """Reduce an exact ndarray: ``ndarray(shape, dtype, buffer[, 0, strides])``."""
        dtype, nbytes = array.dtype, array.nbytes
        if dtype.kind not in _KINDS or dtype.hasobject:
            return array.__reduce_ex__(5)
        if nbytes == 0:
            return type(array), (array.shape, dtype)
        kind = self._sent_as(dtype)
        strides = kept_strides(array)
        order = () if strides is None else (0, strides)
        if nbytes >= self.least_nbytes and not self.stays(nbytes):
            return type(array), (array.shape, kind, self.stand_in(array), *order)
        if nbytes <= _MOST_OWNED_NBYTES:
            if dtype.names is not None and (strides is None or array.flags.f_contiguous):
                # In the copy below, what is between the fields would be anything.
                return array.__reduce__()
            ordered = array if strides is None else in_memory_order(array)
            arguments = (array.shape, kind, ordered.tobytes(), *order)
            # A copy, because a small array that arrives owns its memory, as it does without us.
            return sys.modules["numpy"].array, (Rebuild(type(array), arguments),)
        if strides is None and dtype.char in EXPORTED_CHARS and array.flags.c_contiguous:
            memory = bytearray(array)
        else:
            memory = bytearray(with_gaps(in_memory_order(array)).tobytes())
        return type(array), (array.shape, kind, memory, *order)


def kept_strides(array: Array) -> tuple[int, ...] | None:
    """Return the strides if the memory has no gaps in some order of axes but C's, else ``None``."""
    if array.flags.c_contiguous:
        return None
    if array.flags.f_contiguous:
        return array.strides
    axes = _axes_by_stride(array)
    return array.strides if array.transpose(axes).flags.c_contiguous else None


def _axes_by_stride(array: Array) -> list[int]:
    strides = array.strides
    return sorted(range(array.ndim), key=lambda axis: -strides[axis])


def in_memory_order(array: Array) -> Array:
    """Return a view whose C order is the order of the bytes that are sent."""
    if kept_strides(array) is None:
        return array
    return array.transpose(_axes_by_stride(array))


def with_gaps(array: Array) -> Array:
    """Return the array with the bytes between its fields, or the receiver would see others."""
    return array if array.dtype.names is None else array.view(f"V{array.itemsize}")


def byte_bounds(source: Any) -> tuple[int, int]:
    """Return the addresses of the first byte of an array or other memory, and after its last."""
    if isinstance(source, (PickleBuffer, memoryview)):
        import numpy as np

        raw = source.cast("B") if isinstance(source, memoryview) else source.raw()
        source = np.frombuffer(raw, np.uint8)
    start: int = source.__array_interface__["data"][0]
    if source.nbytes == 0:
        return start, start
    steps = [(n - 1) * stride for n, stride in zip(source.shape, source.strides, strict=True)]
    low = start + sum(step for step in steps if step < 0)
    return low, start + sum(step for step in steps if step > 0) + source.itemsize
