"""One object for many readers: what `broadcast` returns, and how it travels.

**What.** `store` puts an object into published memory of an arena once, and returns its handle, a
`Broadcast`. A message with the handle brings the object, not the handle.

**How it works.** The object is taken apart like a message, and its blocks are published
(``_core/published.c``): the handle has frozen views of them. They lie in published memory, so the
core sends references to them in the place of their bytes, and what arrives are private views, on
which the object is loaded. `_reduce` is the reducer of our picklers; any other pickler gets the
object by value. ::

    index       sizes of the buffers, 64-bit words | stream
    memories    the buffers, laid out by ``_core/plan.c`` (coarse)

A large index lies in published memory, too.

**Lifetime.** The handle has references, each message on its way has some, each process in which the
object has arrived has some, and so does a child that was forked from one. With the last of them the
memory is free.

**When it cannot.** Without an arena, or without room in it, the handle has the buffers in ordinary
memory of its own, and the object travels by value with each message."""

from __future__ import annotations

import functools
import pickle
import struct
from collections.abc import Iterator, Sequence
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeVar
from weakref import WeakSet

from oobpickle._envelope import tables
from oobpickle._errors import ArenaFullError
from oobpickle._handle import Handle
from oobpickle._memory.sending import writing
from oobpickle._native import core
from oobpickle._pickling import in_band
from oobpickle._pickling.reducers import register_own
from oobpickle._pickling.serializer import serialize, take_apart

if TYPE_CHECKING:
    from oobpickle._memory.arena import SharedArena

T = TypeVar("T")

#: Below this it is sent with each message: a mapping costs more.
_LEAST_PUBLISHED_NBYTES: Final = 64 << 10
_NOTHING: Final = object()
#: Those of this process, for whoever has to look for them in something.
living: Final[WeakSet[Broadcast[Any]]] = WeakSet()


class _Refuses:
    """What is no answer to a handle: it says to use the value."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            f"this is the handle that broadcast() returned, not the {self._kind}: use `.value`. "
            "(A function that is called in another process gets the object itself.)"
        )

    def __getattr__(self, name: str) -> Any:
        made = type(self).__dict__.get(name)
        if isinstance(made, property) and made.fget is not None:
            return made.fget(self)  # it has raised an AttributeError of the object's own
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._refuse()

    __call__ = __len__ = __iter__ = __contains__ = _refuse
    __getitem__ = __setitem__ = __delitem__ = __array__ = __dataframe__ = _refuse
    __int__ = __float__ = __complex__ = __index__ = __neg__ = __pos__ = __abs__ = _refuse
    __invert__ = __round__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __sub__ = __mul__ = __matmul__ = __truediv__ = __floordiv__ = _refuse
    __mod__ = __divmod__ = __pow__ = __lshift__ = __rshift__ = _refuse
    __and__ = __or__ = __xor__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rmatmul__ = __rtruediv__ = __rfloordiv__ = _refuse
    __rmod__ = __rdivmod__ = __rpow__ = __rlshift__ = __rrshift__ = _refuse
    __rand__ = __ror__ = __rxor__ = _refuse
    #: NumPy leaves the arithmetic with arrays to the handle, which refuses.
    __array_ufunc__ = None


class Broadcast(_Refuses, Handle, Generic[T]):
    """The handle of an object that was stored once for many readers; `broadcast` makes it.

    A message with the handle in it, at any depth, brings the object itself. Within this process
    the handle stays what it is: `value` has the object.

    Attributes
    ----------
    nbytes : int
        Bytes that are stored.
    readonly : bool
        Whether arrays arrive so that NumPy refuses to write to them.

    See Also
    --------
    broadcast : which says what arrives, and how long the memory lives.
    """

    __slots__ = (
        *("__weakref__", "_index", "_kind", "_n_sizes", "_parts", "_value"),
        *("nbytes", "readonly"),
    )

    nbytes: int
    readonly: bool
    _kind: str
    _index: Any  # bytes, or published memory
    _n_sizes: int  # at the beginning of the index; -1: nothing is published, and it is the stream
    _parts: Sequence[Any] | None  # memory; None: closed
    _value: Any

    def __init__(self) -> None:
        raise TypeError("broadcast() makes handles: oobpickle.broadcast(obj)")

    @classmethod
    def _made(
        cls, kind: str, index: Any, n_sizes: int, parts: Sequence[Any], *, readonly: bool
    ) -> Broadcast[Any]:
        self: Broadcast[Any] = object.__new__(cls)
        self._kind = kind
        self._index, self._n_sizes = index, n_sizes
        self._parts, self._value = parts, _NOTHING
        self.readonly = readonly
        self.nbytes = len(index) + sum(memoryview(part).nbytes for part in parts)
        living.add(self)
        return self

    @property
    def value(self) -> T:
        """The object, as it arrives elsewhere; in this process always the same one.

        Raises
        ------
        ValueError
            If the handle was closed.
        """
        if self._value is _NOTHING:
            loaded = self._fresh()
            if self._value is _NOTHING:  # another thread may have been faster
                self._value = loaded
        return self._value  # type: ignore[no-any-return]

    def _fresh(self) -> Any:
        """Load the object, whatever was done to `value` here."""
        parts = self._open()
        own = [part if self.readonly else _again(part) for part in parts]
        return _load(self._index, self._n_sizes, own)

    def close(self) -> None:
        """Release the references of this process now, rather than when the handle is dropped.

        The memory is freed when no other process uses it any more. A `value` that was taken out
        stays valid. The handle cannot be sent any more.
        """
        self._parts, self._index, self._value = None, b"", _NOTHING

    def __repr__(self) -> str:
        state = "closed" if self._parts is None else f"{self.nbytes} bytes"
        return f"<oobpickle.Broadcast of {self._kind}: {state}; the object is its .value>"

    def _open(self) -> Sequence[Any]:
        if self._parts is None:
            raise ValueError(f"{self!r} cannot be used: close() was called, or its block was left")
        return self._parts

    def _buffers(self) -> list[Any]:
        parts = list(self._open())
        return core.spread(parts, _sizes(self), False, True) if self._n_sizes >= 0 else parts

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the object, by value, so that it can be loaded without oobpickle."""
        make = bytes if self.readonly else bytearray
        buffers = [make(buffer) for buffer in self._buffers()]
        return functools.partial(pickle.loads, buffers=buffers), (_stream(self),)


def _sizes(handle: Broadcast[Any]) -> bytes:
    return bytes(handle._index[: 8 * handle._n_sizes])


def _stream(handle: Broadcast[Any]) -> bytes:
    return bytes(handle._index[8 * max(0, handle._n_sizes) :])


def _reduce(handle: Broadcast[Any]) -> Any:
    """Reduce a handle for our picklers, which send references to what lies in published blocks."""
    parts = handle._open()
    if handle._n_sizes < 0:
        buffers = [PickleBuffer(part) for part in parts]
        return functools.partial(pickle.loads, buffers=buffers), (_stream(handle),)
    index = handle._index
    if not isinstance(index, bytes):
        index = PickleBuffer(index)
    return arrive, (handle.readonly, handle._n_sizes, index, *map(PickleBuffer, parts))


register_own(Broadcast, _reduce)


def arrive(readonly: bool, n_sizes: int, index: Any, *parts: Any) -> Any:
    """Load the object of a handle; what loading a message with one calls."""
    own = [_frozen(part) if readonly else _writable(part) for part in parts]
    return _load(index, n_sizes, own)


def _load(index: Any, n_sizes: int, parts: list[Any]) -> Any:
    if n_sizes < 0:
        return pickle.loads(index, buffers=parts)
    sizes, stream = bytes(index[: 8 * n_sizes]), index[8 * n_sizes :]
    return pickle.loads(stream, buffers=core.spread(parts, sizes, False, True))


def _block_of(part: Any) -> core.Block | None:
    """Return the reference of which `part` is all: of a handle within another object it is not."""
    block = getattr(part, "obj", None)
    if core is None or not isinstance(block, core.Block) or not block.is_reference:
        return None
    return block if memoryview(block).nbytes == memoryview(part).nbytes else None


def _frozen(part: Any) -> memoryview:
    block = _block_of(part)
    if block is not None:
        block.freeze()
    return memoryview(part).toreadonly()


def _writable(part: Any) -> Any:
    block = _block_of(part)
    if block is not None:
        return memoryview(block)  # all of it: the pickler has said that it was read-only
    if _is_frozen(part):  # within an object that nobody is to write to
        return part
    return bytearray(part) if memoryview(part).readonly else part


def _is_frozen(part: Any) -> bool:
    block = getattr(part, "obj", None)
    return core is not None and isinstance(block, core.Block) and memoryview(block).readonly


def _again(part: Any) -> Any:
    block = _block_of(part)
    again = block.again() if block is not None else None
    return bytearray(part) if again is None else memoryview(again)


def store(obj: Any, arena: SharedArena | None, *, readonly: bool) -> Broadcast[Any]:
    """Store an object for many readers.

    Parameters
    ----------
    obj : object
        What pickles.
    arena : SharedArena, optional
        Where; without one, in ordinary memory.
    readonly : bool
        Whether nobody is to write to it.

    Raises
    ------
    ArenaFullError
        If there is no room, memory or lock; nothing stays stored.
    """
    kind = type(obj).__name__
    if arena is None:
        return _in_memory(obj, kind, readonly=readonly)
    # What lies in other published memory is copied: references are to blocks, not to references.
    message = core.Message(arena.blocks, 0, tables({}), False)
    message.is_coarse = True
    take_apart(obj, message, by_value=True)
    if message.nbytes < _LEAST_PUBLISHED_NBYTES:
        return _in_memory(obj, kind, readonly=readonly)
    sizes, n_stream = message.sizes, message.stream_nbytes
    blocks = blocks_of(message, arena)
    index_nbytes = len(sizes) + n_stream
    if index_nbytes < _LEAST_PUBLISHED_NBYTES:
        index: Any = sizes + message.stream
        parts = _views(arena, blocks)
    else:
        memory = arena.acquire([index_nbytes])
        with writing(index_nbytes):
            memory.blocks[0].write(0, sizes)
            message.write_stream_into(memory.blocks[0], len(sizes))
        *parts, index = _views(arena, blocks + memory.blocks)
    return Broadcast._made(kind, index, len(sizes) // 8, parts, readonly=readonly)


def blocks_of(message: core.Message, arena: SharedArena) -> list[core.Block]:
    """Return the blocks that a message was copied to; if there was no room for it, there is now."""
    blocks = message.blocks
    if blocks is not None:
        return blocks
    message.leave_blocks()
    blocks = arena.acquire(core.plan(message.sizes, False, True)).blocks
    with writing(message.nbytes):
        message.move_into(blocks)
    return message.blocks or []


def publish(arena: SharedArena, blocks: list[core.Block]) -> list[core.Block]:
    """Publish what was written to blocks; return views of it."""
    arena.receiving.keep_within_limit()  # whoever drops the last handle frees them, perhaps we
    views = arena.blocks.publish(blocks)
    if isinstance(views, tuple):
        reason = core.SHORTAGES[views[0]]
        raise ArenaFullError(f"the object cannot be stored: {reason}", reason)
    return views


def _views(arena: SharedArena, blocks: list[core.Block]) -> list[memoryview]:
    return [memoryview(view) for view in publish(arena, blocks)]


def _in_memory(obj: Any, kind: str, *, readonly: bool) -> Broadcast[Any]:
    make = bytes if readonly else bytearray
    stream, buffers = _taken_apart(obj)
    return Broadcast._made(kind, stream, -1, list(map(make, buffers)), readonly=readonly)


def _taken_apart(obj: Any) -> tuple[bytes, Iterator[Any]]:
    if core is None:
        payload = serialize(obj, by_value=True)
        buffers = [bytearray(n) for n in payload.sizes]
        payload.write_into(buffers)
        return payload.stream, iter(buffers)
    message = core.Message(None, 0, tables({}))
    take_apart(obj, message, by_value=True)  # each buffer is copied as it is reached
    sizes, stream = struct.unpack(f"<{message.n_buffers}Q", message.sizes), message.stream
    return stream, in_band.buffers_in(in_band.as_pickle(message), sizes)
