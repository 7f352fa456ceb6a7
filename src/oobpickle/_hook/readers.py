"""Readers: who reads a message, and so whose pickler has made it.

**What.** `is_read_as_object` tells whether the message that is being read is one of
multiprocessing's own: an object that somebody has put into a queue, or given to ``send``.

**How it works.** Other libraries pickle in their own way, give `Connection.send_bytes` the bytes,
and read by the same methods. The bytes do not tell: from CPython 3.14 on the default protocol is
the highest one, which those libraries use. The frames do::

    Connection.recv <- anybody but joblib and loky           an object
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
from types import FrameType
from typing import Any, Final

#: Libraries that let `Connection.recv` load what their own picklers have made; by themselves, or as
#: a part of another package.
_WITH_PICKLERS: Final = frozenset(["joblib", "loky"])


def is_read_as_object(frame: FrameType | None) -> bool:
    """Tell whether a message was made by multiprocessing's own pickler, by who reads it.

    Parameters
    ----------
    frame : frame
        Of the method of a `Connection` that calls ``_recv``.
    """
    method = None
    while frame is not None and frame.f_globals is vars(mp_connection):
        method = frame.f_code
        frame = frame.f_back
    if frame is None:
        return False
    if frame.f_globals is vars(mp_queues):
        return _pickles_as_ours(frame.f_locals.get("self"))
    if method is not mp_connection.Connection.recv.__code__:
        return False
    module = str(frame.f_globals.get("__name__"))
    if module == "multiprocessing.pool":
        return _pickles_as_ours(frame.f_locals.get("outqueue"))
    return _WITH_PICKLERS.isdisjoint(module.split("."))


def _pickles_as_ours(queue: Any) -> bool:
    """Tell whether what is put into a queue goes through multiprocessing's own pickler."""
    pickles = getattr(type(queue), "_feed" if isinstance(queue, mp_queues.Queue) else "put", None)
    return getattr(pickles, "__globals__", None) is vars(mp_queues)
