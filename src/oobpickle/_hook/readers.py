"""Readers: who reads a message, and so whose pickler has made it.

**What.** `protocol_of` tells whether the message that is being read is an object that somebody has
put into a queue or given to ``send``, of multiprocessing or of a library that is served;
`unserved_of` which library it is of that should be served and is not.

**How it works.** Other libraries pickle in their own way, give `Connection.send_bytes` the bytes,
and read by the same methods. The bytes do not tell: from CPython 3.14 on the default protocol is
the highest one, which those libraries use. The frames do::

    Connection.recv <- joblib and loky                       an object, if they are served
                    <- anybody else                          an object
                    <- Pool._handle_results(outqueue, ...)   an object if `outqueue` pickles as ours
    Connection.recv_bytes <- Queue.get, SimpleQueue.get      an object if the queue pickles as ours
                          <- anybody else                    bytes

**Lifetime.** No state.

**When it cannot.** What is read through a method that somebody has put on top of those of
`Connection` is not recognized; it is not counted then.
"""

from __future__ import annotations

import multiprocessing.connection as mp_connection
import multiprocessing.queues as mp_queues
import pickle
from types import FrameType
from typing import Any, Final

from oobpickle._hook import libraries

#: Libraries that let `Connection.recv` load what their own picklers have made; by themselves, or as
#: a part of another package.
_WITH_PICKLERS: Final = frozenset(["joblib", "loky"])
_LOKYS: Final = 5
_STANDARD: Final = "multiprocessing"


def protocol_of(frame: FrameType | None) -> int | None:
    """Return the protocol that an object was pickled with; ``None`` if it may be other bytes.

    Parameters
    ----------
    frame : frame
        Of the method of a `Connection` that calls ``_recv``.
    """
    name = _pickler_of(frame)
    if name == _STANDARD:
        return pickle.DEFAULT_PROTOCOL
    return _LOKYS if name is not None and libraries.serves(name) else None


def unserved_of(frame: FrameType | None) -> str:
    """Return the library, if what is read was pickled by one that should be served and is not.

    Parameters
    ----------
    frame : frame
        As for `protocol_of`.
    """
    return libraries.unserved(_pickler_of(frame) or "")


def _pickler_of(frame: FrameType | None) -> str | None:
    """Return the module whose pickler has made an object; ``None`` if it may be other bytes."""
    method = None
    while frame is not None and frame.f_globals is vars(mp_connection):
        method = frame.f_code
        frame = frame.f_back
    if frame is None:
        return None
    if frame.f_globals is vars(mp_queues):
        return _pickler_of_queue(frame.f_locals.get("self"))
    if method is not mp_connection.Connection.recv.__code__:
        return None
    module = str(frame.f_globals.get("__name__"))
    if module == "multiprocessing.pool":
        return _pickler_of_queue(frame.f_locals.get("outqueue"))
    return _STANDARD if _WITH_PICKLERS.isdisjoint(module.split(".")) else module


def _pickler_of_queue(queue: Any) -> str | None:
    """Return the same for what is put into a queue, by the function that does it."""
    pickles = getattr(type(queue), "_feed" if isinstance(queue, mp_queues.Queue) else "put", None)
    namespace = getattr(pickles, "__globals__", None)
    if namespace is vars(mp_queues):
        return _STANDARD
    # joblib's queue has its `put` in each instance.
    name = namespace.get("__name__") if isinstance(namespace, dict) else type(queue).__module__
    return name if isinstance(name, str) else None
