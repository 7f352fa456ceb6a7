"""The stream: what the pickler has written, in the pieces in which it wrote it.

**What.** `Pieces` is the file that a pickler writes to, `Stream` what came of it. That is written
out once, into memory that the caller has, so a large stream is never put together in between.

**How it works.** The pickler in C collects small objects in frames of 64 KiB (PEP 3154), and hands
each larger ``bytes`` and ``bytearray``, and the encoding of each larger ``str``, to the file as it
is. Here they are kept, not copied: the pieces of ``[b"large", 1]`` are the opcodes before, the very
``bytes`` object, and the opcodes after. Loading makes each object from the joined stream in one
copy.

**Lifetime.** It refers to the user's objects until it is dropped.

**When it cannot.** `ResizedError` for a bytearray whose size is not that of the pickle any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pickle import PickleBuffer
from typing import Any, Final

from oobpickle._copying import copy_bytes
from oobpickle._pickling.resizable import Resizable, resized

_Piece = bytes | memoryview | Resizable

#: What is smaller the pickler collects in frames.
LEAST_UNCOPIED_NBYTES: Final = 64 << 10


class Pieces(list[Any]):
    """The file of a pickler, with no Python code: what was written, as it was written."""

    __slots__ = ()
    write = list.append


def joined(start: bytes, content: bytes | bytearray, end: bytes) -> bytes:
    """Return three pieces as one: what `Stream` does, for less.

    Raises
    ------
    ResizedError
        If the content was resized since its header was written.
    """
    stream = b"".join((start, content, end))
    if type(content) is bytes:
        return stream
    nbytes = int.from_bytes(start[-8:], "little")
    if len(start) + nbytes + len(end) != len(stream):
        raise resized(content, nbytes, len(content))
    return stream


class Stream:
    """The pieces of a pickle; as the file of a pickler, with a copy of what it writes.

    Parameters
    ----------
    pieces : iterable of bytes-like
        What is there already.

    Attributes
    ----------
    pieces : list of bytes, memoryview or Resizable
        What it is made of, in order.
    """

    __slots__ = ("pieces",)

    def __init__(self, pieces: Iterable[bytes | memoryview] = ()) -> None:
        self.pieces: list[_Piece] = [*pieces]

    @classmethod
    def of(cls, pieces: Pieces, settled: Mapping[int, bytes]) -> Stream:
        """Return a stream of pieces; `settled` has the content of buffers, by id."""
        stream = cls()
        for piece in pieces:
            if type(piece) is PickleBuffer:
                piece = settled[id(piece)]
            elif type(piece) is not bytes:
                # Its header is the end of the piece before, and says its size: by now others may
                # have changed that.
                header = bytes(stream.pieces[-1])[-8:]  # type: ignore[arg-type]
                piece = Resizable(piece, int.from_bytes(header, "little"))
            stream.pieces.append(piece)
        return stream

    def write(self, piece: bytes | bytearray | PickleBuffer) -> None:
        """Take a copy of what the pickler has written."""
        self.pieces.append(piece.raw().tobytes() if type(piece) is PickleBuffer else bytes(piece))

    @property
    def nbytes(self) -> int:
        """Of all pieces."""
        return sum(map(_nbytes_of, self.pieces))

    def __bytes__(self) -> bytes:
        return b"".join(p.raw() if isinstance(p, Resizable) else p for p in self.pieces)

    def write_into(self, view: memoryview) -> None:
        """Copy all of it once into memory of `nbytes` bytes."""
        at = 0
        for piece in self.pieces:
            n = _nbytes_of(piece)
            if isinstance(piece, Resizable):
                piece.copy_into(view[at : at + n])
            else:
                copy_bytes(view[at : at + n], piece)
            at += n


def _nbytes_of(piece: _Piece) -> int:
    return piece.nbytes if isinstance(piece, Resizable) else len(piece)
