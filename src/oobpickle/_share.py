"""Sharing: one memory for the arrays of an object, in every process that a message brings it to.

**What.** `share` puts an object into published memory and returns its handle, a `Shared`.

**How it works.** The object is taken apart like a message, with all its arrays out of the stream,
however small, into blocks of the arena in use, which are published (``_core/published.c``).

**Lifetime.** See `_shared`.

**When it cannot.** Without an arena it raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from operator import methodcaller
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final, TypeVar

from oobpickle._envelope import tables
from oobpickle._errors import ArenaError
from oobpickle._hook.installed import running
from oobpickle._memory.sending import writing
from oobpickle._native import core
from oobpickle._pickling.numpy_subclasses import is_made_by_new
from oobpickle._pickling.reducers import in_memory_order, kept_strides
from oobpickle._pickling.serializer import take_apart
from oobpickle._published import blocks_of, publish
from oobpickle._shared import CONTROL_NBYTES, Shared, as_shared

if TYPE_CHECKING:
    from oobpickle._memory.arena import SharedArena

T = TypeVar("T")

_KINDS: Final = frozenset("biufcmMSUV")


def share(obj: T) -> Shared[T]:
    """Put the arrays of an object into memory that all processes write to and read, with a lock.

    Send the handle through pools, queues and pipes, or let children inherit it. In each process
    `Shared.writing` and `Shared.reading` give the object under the lock, `Shared.unlocked` without.

    Parameters
    ----------
    obj : object
        An array, or what has arrays in it: a dict, a data class, an object, a frame of numbers. It
        is copied: `obj` itself stays what it is.

    Returns
    -------
    Shared
        The handle, for ``with`` or `Shared.close`.

    Raises
    ------
    ArenaError
        Outside of `enabled`, and where there is no shared memory.
    ArenaFullError
        If there is no room; nothing stays stored.
    TypeError
        If there is no array in it.
    Exception
        Whatever pickling `obj` raises.

    Notes
    -----
    What is shared is the memory of NumPy arrays of numbers, dates, and strings of a fixed length.
    Everything else (attributes, keys, lists, scalars, shapes, arrays of objects, ``bytearray``) is
    each process's own, as it was when it was shared; `Shared.writing` raises where it was changed.
    Arrays of one object that overlap do not do so here, as where it is pickled. Masked arrays, and
    those of classes with an ``__array_finalize__`` of their own, are not shared: share data and
    mask. An array that is taken out and sent alone is a copy.

    The memory is free when the last handle, message and array of it is gone, in any process,
    however those processes end. It counts towards the arena's ``capacity``. It may outlive the
    block.

    The handle crosses as a handle, only between processes that have joined; anywhere else sending
    it raises `TypeError`. For objects that nobody writes to, see `broadcast`.

    Examples
    --------
    >>> import multiprocessing, numpy as np, oobpickle
    >>> def add(shared, n):
    ...     with shared.writing() as counts:
    ...         counts["n"] += n
    >>> def total(shared):
    ...     with shared.reading() as counts:
    ...         return int(counts["n"][0])
    >>> with oobpickle.enabled(), oobpickle.share({"n": np.zeros(1, int)}) as shared:
    ...     with multiprocessing.get_context("fork").Pool(2) as pool:
    ...         _ = pool.starmap(add, [(shared, n) for n in range(10)])
    ...     total(shared)
    45
    """
    hook = running()
    if hook is None:
        raise ArenaError(
            "share() needs shared memory: call it within `with oobpickle.enabled():`, or after "
            "oobpickle.install(), on 64-bit Linux"
        )
    return _store(obj, hook.arena)


def _store(obj: Any, arena: SharedArena) -> Shared[Any]:
    """Put an object into memory for all.

    Parameters
    ----------
    obj : object
        What pickles, and has arrays.
    arena : SharedArena
        Where.

    Raises
    ------
    TypeError
        If there is no array in it.
    ArenaFullError
        If there is no room, memory or lock; nothing stays stored.
    """
    kind = type(obj).__name__
    if "numpy" not in sys.modules:
        raise _no_arrays(kind)
    message = core.Message(arena.blocks, 0, tables(_Reducers()), None)
    message.is_coarse = True
    take_apart(obj, message, by_value=True)
    if not message.n_buffers:
        raise _no_arrays(kind)
    sizes, n_stream = message.sizes, message.stream_nbytes
    blocks = blocks_of(message, arena)
    memory = arena.acquire([CONTROL_NBYTES + len(sizes) + n_stream])
    with writing(message.nbytes):
        memory.blocks[0].write(0, bytes(CONTROL_NBYTES) + sizes)  # the lock is free
        message.write_stream_into(memory.blocks[0], CONTROL_NBYTES + len(sizes))
    views = publish(arena, memory.blocks + blocks)
    shared = Shared._made(kind, (len(sizes) // 8, n_stream), as_shared(views))
    if not shared._local().n_arrays:
        raise _no_arrays(kind)
    return shared


def _no_arrays(kind: str) -> TypeError:
    return TypeError(
        f"share() takes an object with NumPy arrays in it, whose memory is shared; this {kind} has "
        "none. Keep numbers in an array; for a value that nobody writes to there is broadcast()"
    )


class _Reducers(Mapping[type, Callable[[Any], Any]]):
    """The reducers of a message whose arrays are to be shared."""

    def __getitem__(self, kind: type) -> Callable[[Any], Any]:
        if issubclass(kind, sys.modules["numpy"].ndarray):
            return _reduce if is_made_by_new(kind) else methodcaller("__reduce_ex__", 5)
        raise KeyError(kind)

    def __iter__(self) -> Iterator[type]:
        return iter(())  # nobody knows which there will be

    def __len__(self) -> int:
        return 0


def _reduce(array: Any) -> Any:
    """Reduce an array: however small it is, its memory leaves the stream."""
    import numpy as np

    kind, dtype = type(array), array.dtype
    plain = np.ndarray.view(array, np.ndarray)
    if dtype.kind not in _KINDS or dtype.hasobject or not plain.nbytes:
        return array.__reduce_ex__(5)
    strides = kept_strides(plain)
    ordered = np.ascontiguousarray(in_memory_order(plain))
    memory = PickleBuffer(ordered.reshape(-1).view(np.uint8))
    arguments = array.shape, dtype, memory, *(() if strides is None else (0, strides))
    if kind is np.ndarray:
        return kind, arguments
    return np.ndarray.__new__, (kind, *arguments)
