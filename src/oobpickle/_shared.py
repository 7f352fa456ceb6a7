"""One memory for all: what `share` returns, how it travels, and one process's turn with it.

**What.** `Shared` is the handle of an object in published memory. In every process that a message
brings it to, the arrays of the object are that memory itself.

**How it works.** Each process maps the blocks shared (``_core/published.c``), and loads the stream
on them once to write and once to read. ::

    first block   lock, version (a page: _core/shared_lock.c) | sizes of the buffers | stream
    others        the buffers, laid out by _core/plan.c (coarse)

`_share` writes them. A message gets references to the blocks, which no pickler but ours takes. So a
handle is refused where it would have become a copy.

**Lifetime.** The handle, each message on its way, each array that was taken out, and each child
that was forked has references. With the last of them the memory is free.

**When it cannot.** It raises, as there is no way to do this by value.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Generic, TypeVar

from oobpickle._errors import (
    ArenaError,
    ArenaFullError,
    LockOwnerDiedWarning,
    SharedStructureError,
)
from oobpickle._foreign import annotate
from oobpickle._handle import Handle
from oobpickle._native import core
from oobpickle._structure import Memory, Structure

T = TypeVar("T")

#: Of the first block: its lock, and what goes with that.
CONTROL_NBYTES: Final = 4096


class _Local:
    """The object as this process has it: a structure of its own, over memory that all see."""

    __slots__ = ("_load", "_structure", "holding", "is_spoilt", "obj")

    def __init__(
        self, load: Callable[[], Any], parts: Sequence[Any], lock: core.SharedLock
    ) -> None:
        self._load = load
        self.holding = lock.holding
        self.obj = load()
        self._structure = Structure(self.obj, Memory(parts))
        self.is_spoilt = False  # somebody has changed what nobody else sees

    @property
    def n_arrays(self) -> int:
        """Arrays whose memory is shared."""
        return self._structure.n_arrays

    def look(self, error: BaseException | None) -> None:
        """Raise if the structure was changed, at the end of a block that ended with `error`."""
        found = self._structure.difference(self.obj, self._load)
        if found is None:
            return
        self.is_spoilt = True
        text = (
            f"{found}. Only the memory of arrays is shared, so no other process would see it: "
            "write into arrays in place (a[:] = b), and keep counters in an array. The change is "
            "dropped here, too: the next writing() gives the structure that was shared"
        )
        if error is None:
            raise SharedStructureError(text)
        annotate(error, f"oobpickle: {text}")


def _tell(what: str, pid: int, timeout: float) -> None:
    """Say what kept a turn from beginning, or was found when it began."""
    if what == "late":
        raise TimeoutError(
            f"the lock of a shared object was not free within {timeout:g} s: process {pid} has it. "
            "Let it leave its block earlier, or wait longer"
        )
    if what == "detached":
        raise ArenaError(
            "this process has no place in the arena that the shared object lies in, so it cannot "
            "have its lock: it was forked without a descriptor to spare. Raise `ulimit -n`"
        )
    warnings.warn(
        "a process died while it was writing to this shared object, which may be half changed. Put "
        "it right within writing(); until such a block has ended without an error, everybody who "
        "takes the lock is told",
        LockOwnerDiedWarning,
        stacklevel=2,
    )


class Shared(Handle, Generic[T]):
    """The handle of an object whose arrays are one memory for all processes; `share` makes it.

    It arrives as a handle, too: what is written is seen by all, so each use says which kind it is.

    Attributes
    ----------
    nbytes : int
        Bytes of the arrays.

    See Also
    --------
    share : which says what is shared.
    """

    __slots__ = ("__weakref__", "_kind", "_layout", "_lock", "_own", "_read", "_views", "nbytes")

    nbytes: int
    _kind: str
    _layout: tuple[int, int]  # sizes, and bytes of the stream
    _lock: core.SharedLock | None
    _views: list[core.Block] | None
    _own: _Local | None
    _read: tuple[Any] | None  # the object, which may be anything

    def __init__(self) -> None:
        raise TypeError("share() makes handles: oobpickle.share(obj)")

    @classmethod
    def _made(cls, kind: str, layout: tuple[int, int], views: list[core.Block]) -> Shared[Any]:
        self = object.__new__(cls)
        self._kind, self._layout = kind, layout
        self._views, self._lock = views, core.SharedLock(views[0])
        self._own = self._read = None
        self.nbytes = sum(memoryview(view).nbytes for view in views[1:])
        return self

    # --- the object

    def _open(self) -> tuple[core.SharedLock, list[core.Block]]:
        lock, views = self._lock, self._views
        if lock is None or views is None:
            raise ValueError(f"{self!r} cannot be used: close() was called")
        return lock, views

    def _load(self, parts: list[memoryview], index: core.Block) -> Any:
        n_sizes, n_stream = self._layout
        head = memoryview(index)[CONTROL_NBYTES:]
        sizes, stream = bytes(head[: 8 * n_sizes]), bytes(head[8 * n_sizes :][:n_stream])
        return pickle.loads(stream, buffers=core.spread(parts, sizes, False, True))

    def _local(self) -> _Local:
        own = self._own
        if own is None or own.is_spoilt:
            lock, (index, *others) = self._open()
            parts = [memoryview(view) for view in others]
            self._own = own = _Local(lambda: self._load(parts, index), parts, lock)
        return own

    @property
    def unlocked(self) -> T:
        """The object without a lock, to write to and to read.

        For parts that nobody else uses at the same time, and for algorithms that put up with
        whatever the machine makes of two writes to one place. A write is seen by all as soon as
        the processor has made it; those of more than 8 bytes are not seen as a whole.
        """
        self._open()
        return self._local().obj  # type: ignore[no-any-return]

    def writing(self, timeout: float | None = None) -> AbstractContextManager[T]:
        """Return a context manager that gives the object under the lock, to write to its arrays.

        Parameters
        ----------
        timeout : float, optional
            How long to wait for the lock, seconds. Default: as long as it takes.

        Raises
        ------
        TimeoutError
            On entering, if the lock was not free in time.
        SharedStructureError
            On leaving, if something was changed that is not the memory of an array. The changes to
            arrays stay; this process's object is made anew.
        ValueError
            If the handle was closed, or `timeout` is out of range.

        Warns
        -----
        LockOwnerDiedWarning
            On entering, if somebody died within `writing` and nobody has written since.

        Notes
        -----
        The lock is exclusive, also for `reading`, between processes and between the threads of one.
        A thread that has it may enter again. It is not for two tasks of one event loop.
        """
        own = self._own
        if own is None or own.is_spoilt:
            own = self._local()
        return own.holding(own.obj, True, timeout, _tell, own.look)

    def reading(self, timeout: float | None = None) -> AbstractContextManager[T]:
        """Return a context manager that gives the object under the lock, with read-only arrays.

        Parameters
        ----------
        timeout : float, optional
            As for `writing`.

        Raises
        ------
        TimeoutError, ValueError
            As for `writing`.

        Warns
        -----
        LockOwnerDiedWarning
            As for `writing`.
        """
        read, lock = self._read, self._lock
        if read is None or lock is None:
            lock, (index, *others) = self._open()
            parts = [memoryview(view).toreadonly() for view in others]
            self._read = read = (self._load(parts, index),)
        return lock.holding(read[0], False, timeout, _tell, None)

    # --- what happened to it

    @property
    def version(self) -> int:
        """How many `writing` blocks have ended, in all processes."""
        return self._open()[0].version

    @property
    def owner_died(self) -> bool:
        """Whether somebody died within `writing`, and nobody has written since without an error.

        It is found when the lock is next taken.
        """
        return self._open()[0].owner_died

    def wait(self, version: int, timeout: float | None = None) -> int:
        """Wait until more `writing` blocks have ended than `version`, and return how many.

        Parameters
        ----------
        version : int
            The value that `version` had before.
        timeout : float, optional
            Seconds. Default: as long as it takes.

        Raises
        ------
        TimeoutError
            If nobody has written in time.
        RuntimeError
            If this thread has the lock, so that nobody else can write.
        """
        lock, _ = self._open()
        if lock.is_held and lock.version <= version:
            raise RuntimeError(
                f"wait({version}) would never end: this thread has the lock, and nobody else can "
                "write. Leave the block before"
            )
        found = lock.wait(version, timeout, _tell)
        if found is None:
            raise TimeoutError(
                f"no writing() of the shared object has ended within {timeout:g} s, after {version}"
            )
        return found

    # --- the handle

    def close(self) -> None:
        """Give up this process's part of the memory; arrays that were taken out stay as they are.

        The memory is free once every other process has dropped what it has of it.
        """
        self._own = self._read = self._views = self._lock = None

    def __repr__(self) -> str:
        state = "closed" if self._views is None else f"{self.nbytes} bytes"
        return f"<oobpickle.Shared of {self._kind}: {state}>"

    def __reduce__(self) -> Any:
        _, views = self._open()
        references = views[0].refer(views)
        if isinstance(references, tuple):
            reason = core.SHORTAGES[references[0]]
            if reason != "detached":
                raise ArenaFullError(f"{self!r} cannot be sent: {reason}", reason)
            raise TypeError(
                f"{self!r} cannot be sent: the enabled() block that it was made in has ended"
            )
        return arrive, (self._kind, self._layout, *references)


def arrive(kind: str, layout: tuple[int, int], *parts: memoryview) -> Shared[Any]:
    """Make the handle in the process that a message has come to; what loading one calls."""
    return Shared._made(kind, layout, as_shared([part.obj for part in parts]))


def as_shared(views: list[Any]) -> list[core.Block]:
    """Have what is written to these views seen by all.

    Raises
    ------
    ArenaError
        If one cannot be mapped.
    """
    for view in views:
        if type(view) is not core.Block or not view.share():
            raise ArenaError(
                "the memory of a shared object cannot be mapped in this process: it has no place "
                "in the arena, or no address space. See `ulimit -n` and `ulimit -v`"
            )
    return views
