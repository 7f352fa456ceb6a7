"""Straight: large in-band messages without a copy, from the sender's arrays to the receiver's.

**What.** `Straight` is an in-band message that is still in the object's memory. `receive` reads one
from a pipe into the memory where its arrays will be.

**How it works.** What goes through the pipe is the ordinary pickle that `Payload.to_pickle` would
make, so that any Python can load it. Its parts are written one after the other from where they are.
The receiver knows the pickle by how it begins, and reads each buffer into memory of its own; what
it hands on is a small pickle that fetches them. So both together need twice the object, where plain
pickling needs four times as much.

Where others may change the object meanwhile, what is written is a copy in pieces, and each piece is
gone when it was written: the receiver's memory grows while the sender's shrinks.

**Lifetime.** A `Straight` belongs to whoever is about to write it, and refers to the user's memory
until then, unless it has a copy. What has arrived belongs to the message that was handed on, until
that is loaded.

**When it cannot.** A message that does not go on as it began is put together as it was sent. Who
asks for the bytes of a message gets the bytes.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import struct
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from oobpickle._errors import StaleEnvelopeError
from oobpickle._foreign import pass_on_foreign
from oobpickle._payload import (
    BYTEARRAY8,
    PICKLE_BUFFER,
    PICKLE_END,
    PICKLE_MIDDLE_NBYTES,
    PICKLE_START,
    Payload,
    fresh_destinations,
    stream_nbytes_in,
)

#: Below this one write is as good.
LEAST_NBYTES: Final = 1 << 20
#: Below this a copy may as well be one.
LEAST_COPIED_NBYTES: Final = 64 << 20
_COPIED_NBYTES: Final = 16 << 20
_ORDINARY: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_GATHER_NBYTES: Final = 64 << 10
_MOST_READ_NBYTES: Final = 1 << 30


class Straight(bytes):
    """An in-band message that is written from the object's own memory.

    The bytes themselves mean nothing.

    Attributes
    ----------
    nbytes : int
        Of the message.
    """

    nbytes: int
    _parts: Iterator[Any]
    _token: object

    @classmethod
    def make(
        cls, payload: Payload, stub_nbytes: int, *, copied: bool = False, **ends: bytes
    ) -> Straight:
        """Return a message of a payload, itself of `stub_nbytes` bytes.

        Parameters
        ----------
        payload : Payload
            What it holds.
        stub_nbytes : int
            How long the message pretends to be.
        copied : bool
            Whether it is what the object holds now, and not what it holds when it is written.
        **ends : bytes
            The ``head`` and ``tail`` of `Payload.to_pickle`.
        """
        message = cls(stub_nbytes)
        message.nbytes = payload.pickle_nbytes(**ends)
        # Memory is taken now: later half of the message is in the pipe.
        payload = payload.pinned()
        message._parts = payload.pickle_parts(payload.scratch(), **ends)
        if copied:
            message._parts = _emptied(_copied(message._parts))
        message._token = _Token()
        unsent.add(message._token)
        return message

    def write(self, send: Callable[[Any], None]) -> None:
        """Write the message as `multiprocessing` frames it; `send` writes all it is given."""
        small = self.nbytes <= 0x7FFFFFFF
        gathered = bytearray(
            struct.pack("!i", self.nbytes) if small else struct.pack("!iQ", -1, self.nbytes)
        )
        for part in self._parts:
            if len(gathered) + len(part) > _GATHER_NBYTES and gathered:
                send(memoryview(gathered))
                gathered = bytearray()
            if len(part) > _GATHER_NBYTES:
                send(memoryview(part))  # what is left of it is sliced off again and again
            else:
                gathered += part
        send(memoryview(gathered))

    def forget(self) -> None:
        """It was written, as far as it could be."""
        unsent.discard(self._token)


def _copied(parts: Iterator[Any]) -> deque[memoryview]:
    """Return pieces of memory whose pages the system has back as soon as they are dropped."""
    pieces: deque[memoryview] = deque()
    n_free = 0
    for part in parts:
        source = memoryview(part).cast("B")
        while source.nbytes:
            if n_free == 0:
                pieces.append(_fresh_piece())
                n_free = _COPIED_NBYTES
            n = min(n_free, source.nbytes)
            at = _COPIED_NBYTES - n_free
            pieces[-1][at : at + n] = source[:n]
            source, n_free = source[n:], n_free - n
    if pieces:
        pieces[-1] = pieces[-1][: _COPIED_NBYTES - n_free]
    return pieces


def _fresh_piece() -> memoryview:
    # Not by malloc, which keeps what is freed below something that is not.
    try:
        return memoryview(mmap.mmap(-1, _COPIED_NBYTES, flags=_ORDINARY))
    except OSError as error:
        pass_on_foreign(error)
        raise MemoryError(f"no memory to copy {_COPIED_NBYTES} bytes of a message") from error


def _emptied(pieces: deque[memoryview]) -> Iterator[memoryview]:
    while pieces:
        yield pieces.popleft()


class _Token:
    """Alive as long as its message."""


#: Of messages that nobody but us can write.
unsent: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


# --- receiving


class _Arrived:
    """Stream and buffers, until they are loaded."""

    def __init__(self, stream: memoryview, buffers: list[memoryview], tail: bytes) -> None:
        self.stream: memoryview | None = stream
        self.buffers = buffers
        self.tail = tail
        self.number = next(_numbers)
        _arrived[self.number] = self

    def to_bytes(self) -> bytes:
        """Return the message as it was sent."""
        if self.stream is None:
            raise _loaded_already()
        payload = Payload(bytes(self.stream), self.buffers, [b.nbytes for b in self.buffers])
        return b"".join(payload.pickle_parts(payload.scratch(), tail=self.tail))


_numbers: Final = itertools.count()
_arrived: Final[weakref.WeakValueDictionary[int, _Arrived]] = weakref.WeakValueDictionary()


def take(number: int) -> Any:
    """Rebuild the object of a message that has arrived; what loading it calls."""
    arrived = _arrived.get(number)
    if arrived is None or arrived.stream is None:
        raise _loaded_already()
    stream, buffers = arrived.stream, arrived.buffers
    arrived.stream, arrived.buffers = None, []
    return pickle.loads(stream, buffers=buffers)


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
        self._stub = pickle.dumps(_Fetching(arrived.number), 4)
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
            whole = self._arrived.to_bytes()
            self._arrived = None
            self.seek(0)
            self.truncate()
            self.write(whole)


class _Fetching:
    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return take, (self._number,)


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
