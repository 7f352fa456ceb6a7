"""Byte types: what Python itself has for memory, where pickle would copy it first.

**What.** `reducer_of` knows the subclasses of ``bytes`` and ``bytearray``, ``array.array`` and
ctypes objects. (Exact ``bytes`` and ``bytearray`` are pickled without a reducer.)

**How it works.** The reducers of these types put a ``bytes`` object with a copy of the memory into
their arguments. Ours put in its place a call of ``bytes`` for a buffer that travels out of band:
the receiver makes the same ``bytes`` of it, and the type's own function takes it from there. So
what a class overrides sees what it always sees.

**Lifetime.** No state.

**When it cannot.** A class with a reducer of its own is left to it; what holds pointers is left to
ctypes, which refuses it. A subclass of ``str`` is encoded first in any case."""

from __future__ import annotations

import array
import copyreg
import sys
from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any, Final, Protocol

from oobpickle._pickling.replaced import Rebuild, inherits

#: Below this the pickler copies less than a call of a reducer takes.
LEAST_NBYTES: Final = 64 << 10
_REDUCERS: Final = ("__reduce_ex__", "__reduce__")
_OF_BYTES: Final = (*_REDUCERS, "__getnewargs__", "__getnewargs_ex__", "__buffer__")


class Taker(Protocol):
    """What takes buffers out of a message."""

    def stays(self, nbytes: int) -> bool:
        """Decide about so many bytes: true if they stay in the stream."""

    def stand_in(self, source: Any) -> PickleBuffer:
        """Return what the pickler gets in the place of a source that leaves the stream."""


Reduce = Callable[[Taker, Any], Any]


def reducer_of(kind: type) -> Reduce | None:
    """Return how to reduce instances of a class, or ``None`` if that is not known here."""
    if issubclass(kind, bytes):
        return _reduce_bytes if inherits(kind, bytes, _OF_BYTES) else None
    if issubclass(kind, bytearray):
        return _reduce_bytearray if inherits(kind, bytearray, _OF_BYTES) else None
    if issubclass(kind, array.array):
        return _reduce_array if inherits(kind, array.array, _REDUCERS) else None
    ctypes = sys.modules.get("_ctypes")
    base = ctypes.Structure.__mro__[1] if ctypes is not None else None
    if base is not None and issubclass(kind, base) and inherits(kind, base, _REDUCERS):
        return _reduce_ctypes
    return None


def as_bytes(stand_in: PickleBuffer) -> Any:
    """Return what arrives as ``bytes`` of a buffer."""
    return Rebuild(bytes, (stand_in,))


def _reduce_bytes(taker: Taker, obj: bytes) -> Any:
    nbytes = bytes.__len__(obj)
    if nbytes < LEAST_NBYTES or taker.stays(nbytes):
        return obj.__reduce_ex__(5)
    state = obj.__getstate__()  # type: ignore[attr-defined,unused-ignore]
    arguments = type(obj), as_bytes(taker.stand_in(obj))
    return copyreg.__newobj__, arguments, state  # type: ignore[attr-defined]


def _reduce_bytearray(taker: Taker, obj: bytearray) -> Any:
    nbytes = bytearray.__len__(obj)
    if nbytes < LEAST_NBYTES or taker.stays(nbytes):
        return obj.__reduce_ex__(5)
    state = obj.__getstate__()  # type: ignore[attr-defined,unused-ignore]
    stand_in = taker.stand_in(obj)
    return type(obj), (as_bytes(stand_in),), state


def _reduce_array(taker: Taker, obj: array.array[Any]) -> Any:
    nbytes = array.array.__len__(obj) * obj.itemsize
    if nbytes < LEAST_NBYTES or taker.stays(nbytes):
        return obj.__reduce_ex__(5)
    empty: Any = array.array(obj.typecode)
    rebuild, (_, *codes, _), _ = empty.__reduce_ex__(5)
    stand_in = taker.stand_in(obj)
    return rebuild, (type(obj), *codes, as_bytes(stand_in)), getattr(obj, "__dict__", None)


def _reduce_ctypes(taker: Taker, obj: Any) -> Any:
    ctypes = sys.modules["ctypes"]
    nbytes = ctypes.sizeof(obj)
    if nbytes < LEAST_NBYTES:
        return obj.__reduce_ex__(5)
    # Of the same items, and so refused in the same way; but there are none to copy.
    rebuild, _ = (type(obj) * 0)().__reduce__()
    if taker.stays(nbytes):
        return obj.__reduce_ex__(5)
    # In one axis, whatever its shape is: a memoryview has at most 64.
    flat: Any = (ctypes.c_char * nbytes).from_address(ctypes.addressof(obj))
    flat.owner = obj
    return rebuild, (type(obj), (obj.__dict__, as_bytes(taker.stand_in(flat))))
