"""After the block: large messages through what was made inside it, said once.

**What.** `watch` has the connections of a block that has ended say that a large message now travels
as without oobpickle: a pool that was made inside the block and is used behind it is a mistake that
nothing else shows.

**How it works.** Nothing stays replaced in multiprocessing. Each connection that the owner made
inside the block and has still open gets two attributes of its own, which see the size of a message
and then do what the class does. The first large one takes them away again, everywhere, and warns.

**Lifetime.** The attributes end with their connections, which are referred to weakly. A forked
child says nothing.

What a finalizer sends, as that of a `Pool` does that was never closed, is sent too: the weak
reference to its connection is gone by then, and a `_StandIn` has the descriptor.

**When it cannot.** The connections of managers, listeners, joblib and loky are not seen. Where
warnings are errors it is reported as an exception in a finalizer is: raised, it would end a thread
of the pool."""

from __future__ import annotations

import multiprocessing.connection as mp_connection
import pickle
import warnings
import weakref
from collections.abc import Iterable
from functools import partial
from types import FrameType
from typing import Any, Final

from oobpickle._errors import FallbackWarning, format_nbytes
from oobpickle._hook import installed
from oobpickle._native import core

_NAMES: Final = ("_send_bytes", "_recv")
_PROTO, _STOP = pickle.PROTO[0], pickle.STOP[0]


def place_of(frame: FrameType | None) -> tuple[str, int]:
    """Return file and line of the program's frame that has left the block."""
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    return ("<unknown>", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def watch(connections: Iterable[Any], threshold: int, place: tuple[str, int]) -> None:
    """Say it once if a message of so many bytes goes through one of the connections.

    Parameters
    ----------
    connections : iterable of Connection
        Those that were made inside the block.
    threshold : int
        What was large there, bytes.
    place : (str, int)
        Where the block was left: what the warning names.
    """
    still = [one for one in connections if not one.closed]
    if still and hasattr(still[0], "__dict__"):
        _Watch(still, max(1, threshold), place)


class _Watch:
    def __init__(self, connections: list[Any], threshold: int, place: tuple[str, int]) -> None:
        self._connections = weakref.WeakSet(connections)
        self._threshold = threshold
        self._place = place
        self._epoch = core.epoch()
        for connection in connections:
            it = weakref.ref(connection)  # or it would refer to itself, and stay open
            spare = connection.fileno()
            ours = partial(self._send_bytes, it, spare), partial(self._recv, it, spare)
            for name, function in zip(_NAMES, ours, strict=True):
                vars(connection).setdefault(name, function)

    def _send_bytes(self, it: weakref.ref[Any], spare: int, buf: Any) -> None:
        connection: Any = it() or _StandIn(spare)
        type(connection)._send_bytes(connection, buf)
        if len(buf) >= self._threshold:
            self._see(len(buf), buf[0], buf[-1])

    def _recv(self, it: weakref.ref[Any], spare: int, size: int, *args: Any) -> Any:
        connection: Any = it() or _StandIn(spare)
        message = type(connection)._recv(connection, size, *args)
        if size >= self._threshold:
            with message.getbuffer() as view:
                self._see(size, view[0], view[-1])
        return message

    def _see(self, nbytes: int, first: int, last: int) -> None:
        """Say it, unless it is no pickle, as what `send_bytes` was given; or a block is open."""
        if (first, last) != (_PROTO, _STOP) or installed.current is not None:
            return
        connections, self._connections = self._connections, weakref.WeakSet()
        if self._epoch != core.epoch() or not connections:
            return
        for connection in connections:
            for name in _NAMES:
                if getattr(vars(connection).get(name), "func", None) in (
                    self._send_bytes,
                    self._recv,
                ):
                    del vars(connection)[name]
        _Said(
            f"a message of {format_nbytes(nbytes)} travelled as without oobpickle, since the "
            "enabled() block in which its pool, queue or pipe was made has ended here. Use what "
            "was made inside the block inside of it, or call oobpickle.install().",
            self._place,
        )


class _StandIn(mp_connection.Connection):
    """What has the descriptor of a connection that is being finalized, and leaves it open."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __del__(self) -> None:
        pass


class _Said:
    """Warns when it is dropped, which is at once: nothing that a finalizer raises goes anywhere."""

    def __init__(self, text: str, place: tuple[str, int]) -> None:
        self._text, self._place = text, place

    def __del__(self) -> None:
        warnings.warn_explicit(self._text, FallbackWarning, *self._place)
