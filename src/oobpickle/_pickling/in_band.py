"""Zero-copy in-band: large messages through a pipe, with one copy on each side.

**What.** `as_pickle` makes an ordinary pickle of a message that was taken apart, `write` writes it,
and `receive` reads one from a pipe into the memory where its arrays will be.

**How it works.** Such a pickle has its buffers first, and is known by how it begins. They were
copied when the pickler handed them out, one behind the other (`oobpickle._core.Message`); the pages
go back to the system as they are written, so that the memory of the sender shrinks while that of
the receiver grows. There each buffer is read into memory of its own, and what is handed on is a
small pickle that fetches them. So the receiver needs the object once, where plain pickling needs it
twice.

**Lifetime.** What has arrived belongs to the message that was handed on, until that is loaded.

**When it cannot.** A message that does not go on as it began is put together as it was sent. Who
asks for the bytes of a message gets the bytes.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from oobpickle._errors import StaleEnvelopeError
from oobpickle._pickling.payload import (
    BYTEARRAY8,
    PICKLE_BUFFER,
    PICKLE_END,
    PICKLE_MIDDLE_NBYTES,
    PICKLE_START,
    Payload,
    fresh_destinations,
    pickle_middle,
    stream_nbytes_in,
)

#: Below this one write is as good.
LEAST_NBYTES: Final = 1 << 20
_MOST_READ_NBYTES: Final = 1 << 30
_STEP_NBYTES: Final = 16 << 20  # what is written at a time, and then given back


def as_pickle(message: Any, *, head: bytes = b"", tail: bytes = b"") -> memoryview:
    """Return an ordinary pickle of a message, with the buffers in-band; see `Payload.to_pickle`.

    Parameters
    ----------
    message : Message
        What was taken apart.
    head : bytes, optional
        What to put before it: opcodes that leave nothing behind.
    tail : bytes, optional
        What to put after its end; loading ignores it.
    """
    middle = pickle_middle(message.stream_nbytes)
    message.to_pickle(head + PICKLE_START, middle, PICKLE_END + tail)
    return memoryview(message)


def buffers_in(whole: memoryview, sizes: Iterable[int]) -> Iterator[memoryview]:
    """Yield the buffers, of the given sizes, in what `as_pickle` returned without a head."""
    at = len(PICKLE_START)
    for nbytes in sizes:
        at += PICKLE_BUFFER.size
        yield whole[at : at + nbytes]
        at += nbytes


def write(message: Any, view: memoryview, send: Callable[[Any], None]) -> None:
    """Write what `as_pickle` returned, as `multiprocessing` frames a message, and give it back.

    Parameters
    ----------
    message : Message
        Its memory goes back to the system as it is written.
    view : memoryview
        All of it.
    send : callable
        ``Connection._send``: writes all that it is given.
    """
    nbytes = len(view)
    send(struct.pack("!i", nbytes) if nbytes <= 0x7FFFFFFF else struct.pack("!iQ", -1, nbytes))
    for at in range(0, nbytes, _STEP_NBYTES):
        with view[at : at + _STEP_NBYTES] as step:
            send(step)  # what is left of it is sliced off again and again
            n = len(step)
        message.give_back(at, n)


class _Arrived:
    """Stream and buffers, until they are loaded."""

    def __init__(self, stream: memoryview, buffers: list[memoryview], tail: bytes) -> None:
        self.stream: memoryview | None = stream
        self.buffers = buffers
        self.tail = tail
        self.number = next(_numbers)
        _arrived[self.number] = self

    def to_pickle(self) -> memoryview:
        """Return the message as it was sent."""
        if self.stream is None:
            raise _loaded_already()
        payload = Payload([bytes(self.stream)], self.buffers, [b.nbytes for b in self.buffers])
        return payload.to_pickle(tail=self.tail)


_numbers: Final = itertools.count()
_arrived: Final[weakref.WeakValueDictionary[int, _Arrived]] = weakref.WeakValueDictionary()


def take(number: int) -> Any:
    """Rebuild the object of a message that has arrived; what loading it calls."""
    arrived = _arrived.get(number)
    if arrived is None or arrived.stream is None:
        raise _loaded_already()
    stream, buffers = arrived.stream, arrived.buffers
    arrived.stream, arrived.buffers = None, []
    try:
        return pickle.loads(stream, buffers=buffers)
    finally:
        del stream, buffers  # an error refers to this frame


def _loaded_already() -> StaleEnvelopeError:
    return StaleEnvelopeError(
        "this message was loaded already, or belongs to another process. Load each message once; "
        "keep the object instead."
    )


class _Stub(bytes):
    """What a queue gets for the bytes of a message, and loads."""

    arrived: _Arrived


class Received(io.BytesIO):
    """A message that has arrived: to whoever loads it a small pickle, to others its bytes."""

    def __init__(self, arrived: _Arrived) -> None:
        stream: Any = arrived.stream
        self._stub = _STUB.pack(_TAKE, arrived.number, b"\x85R.") + stream[:_START_NBYTES]
        super().__init__(self._stub)
        self._arrived: _Arrived | None = arrived

    @property
    def tail(self) -> bytes:
        """What comes after the end of the pickle."""
        return b"" if self._arrived is None else self._arrived.tail

    def getvalue(self) -> bytes:
        # Queues ask for bytes, and load them at once: nobody else sees these.
        caller = sys._getframe(1).f_back
        if (
            self._arrived is not None
            and caller is not None
            and caller.f_globals.get("__name__") == "multiprocessing.queues"
        ):
            stub = _Stub(self._stub)
            stub.arrived = self._arrived
            return stub
        self._become_bytes()
        return super().getvalue()

    def tell(self) -> int:
        self._become_bytes()
        return super().tell()

    def _become_bytes(self) -> None:
        if self._arrived is not None:
            whole = self._arrived.to_pickle()
            self._arrived = None
            self.seek(0)
            self.truncate()
            self.write(whole)


#: Behind it is a number of eight bytes.
_TAKE: Final = b"\x80\x04coobpickle._pickling.in_band\ntake\n\x8a\x08"
_STUB: Final = struct.Struct(f"<{len(_TAKE)}sq3s")
_START_NBYTES: Final = 40  # of the stream, after the end of the stub


def start_of_stream(message: memoryview) -> bytes | None:
    """Return the first bytes of the stream of what `receive` returned, else ``None``."""
    return bytes(message[_STUB.size :]) if bytes(message[: len(_TAKE)]) == _TAKE else None


class _Reader:
    """The rest of a message in a pipe."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._nbytes = nbytes
        self.left = nbytes
        self._parts: list[Any] = []

    def fill(self, memory: memoryview) -> None:
        """Read as much as there is room for."""
        done = 0
        while done < memory.nbytes:
            n = os.readv(self._fd, [memory[done : done + _MOST_READ_NBYTES]])
            if n == 0:  # in the words of Connection._recv
                if self.left == self._nbytes:
                    raise EOFError
                raise OSError("got end of file during message")
            done += n
            self.left -= n
        self._parts.append(memory)

    def take(self, nbytes: int) -> bytes:
        memory = memoryview(bytearray(min(nbytes, self.left)))
        self.fill(memory)
        return bytes(memory)

    def whole(self) -> io.BytesIO:
        """Read to the end; return all of the message as it was sent."""
        message = io.BytesIO()
        for part in self._parts:
            message.write(part)
        self._parts.clear()
        while self.left:
            memory = memoryview(bytearray(min(self.left, LEAST_NBYTES)))
            self.fill(memory)
            message.write(memory)
            self._parts.clear()
        return message


def receive(fd: int, nbytes: int) -> io.BytesIO:
    """Read a message of that many bytes.

    Raises
    ------
    EOFError, OSError
        As ``Connection._recv`` does.
    """
    reader = _Reader(fd, nbytes)
    if reader.take(len(PICKLE_START)) != PICKLE_START:
        return reader.whole()
    buffers: list[memoryview] = []
    while (head := reader.take(PICKLE_BUFFER.size))[:1] == bytes((BYTEARRAY8,)):
        n_buffer = PICKLE_BUFFER.unpack(head)[1] if len(head) == PICKLE_BUFFER.size else -1
        if not 0 <= n_buffer <= reader.left:
            return reader.whole()
        (memory,) = fresh_destinations([n_buffer])
        reader.fill(memory)
        buffers.append(memory)
    n_stream = stream_nbytes_in(head + reader.take(PICKLE_MIDDLE_NBYTES - len(head)))
    if not 0 <= n_stream <= reader.left:
        return reader.whole()
    stream = memoryview(bytearray(n_stream))
    reader.fill(stream)
    end = reader.take(reader.left)
    if not end.startswith(PICKLE_END):
        return reader.whole()
    return Received(_Arrived(stream, buffers, end[len(PICKLE_END) :]))
