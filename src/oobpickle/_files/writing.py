"""Writing: the buffers of an object go into its file as the pickler hands them out.

**What.** `Writer` puts memory behind memory into a file, and table, stream and header at its end.
`FileSink` takes an object apart into one.

**How it works.** Each buffer is written when the pickler comes across it, as it is at that moment,
from the object's own memory: what is contiguous by ``pwrite``, strides through 1 MiB, in which
small buffers are put together too. Buffers of 64 KiB and more begin at a multiple of 4096, others
at one of 64.

Every exact array is a buffer, however small: what is in the stream could not be written back by
``mmap_mode="r+"``.

**Lifetime.** A writer has 1 MiB, and refers to nothing of the object's when it has written it.

**When it cannot.** `WriteFailedError` has the `OSError` of the system: full, or too large."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pickle import PickleBuffer
from typing import Any, ClassVar, Final

from oobpickle import _faults
from oobpickle._errors import OobPickleError
from oobpickle._files.layout import (
    ALIGN,
    HEADER_NBYTES,
    Entry,
    header_of,
    table_of,
)
from oobpickle._foreign import pass_on_foreign
from oobpickle._pickling.payload import copy_source, exposed
from oobpickle._pickling.reducers import Sink, in_memory_order, with_gaps

_PAGE_NBYTES: Final = 4096
_LARGE_NBYTES: Final = 64 << 10
_STAGING_NBYTES: Final = 1 << 20
_STEP_NBYTES: Final = 64 << 20  # between two of them Ctrl-C is heard
_LEAST_RESERVED_NBYTES: Final = 16 << 20
_RESERVED_NBYTES: Final = 64 << 20


class WriteFailedError(BaseException):
    """The system refused to write; no business of the pickler's, which tells of objects."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class Writer:
    """A file that grows.

    Parameters
    ----------
    fd : int
        Of the empty file.
    has_checksums : bool
        Whether each buffer gets one: of the very bytes that are written.
    reserves : bool
        Whether to reserve room on the disk before it is written.
    """

    def __init__(self, fd: int, *, has_checksums: bool, reserves: bool) -> None:
        self._fd = fd
        self._reserves = reserves
        self._reserved_to = 0
        self._pid = os.getpid()
        self._has_checksums = has_checksums
        self._staging = memoryview(bytearray(_STAGING_NBYTES))
        self._entries: list[Entry] = []
        self._staged_at = HEADER_NBYTES  # where the staging begins in the file
        self._n_staged = 0

    def append(self, source: Any, nbytes: int) -> None:
        """Write one buffer of so many bytes: an array or a ``PickleBuffer``."""
        is_large = nbytes >= _LARGE_NBYTES
        at = self._align(_PAGE_NBYTES if is_large else ALIGN)
        crc = 0
        if not is_large:
            room = self._reserve(nbytes)
            copy_source(room, source)
            crc = zlib.crc32(room) if self._has_checksums else 0
        else:
            self._flush()
            for piece in self._pieces_of(source):
                crc = zlib.crc32(piece, crc) if self._has_checksums else 0
                self._write(piece)
        self._entries.append((at, nbytes, crc))
        _faults.reach("files.buffer_written")

    def finish(self, stream: Sequence[bytes]) -> None:
        """Write what comes after the buffers, and then the header."""
        table = table_of(self._entries)
        table_at = self._align(ALIGN)
        stream_nbytes = stream_crc = 0
        self._put(table)
        for piece in stream:
            stream_nbytes += len(piece)
            stream_crc = zlib.crc32(piece, stream_crc)
            self._put(piece)
        self._flush()
        if self._reserved_to > self._staged_at:
            os.ftruncate(self._fd, self._staged_at)
        _faults.reach("files.stream_written")
        header = header_of(
            len(self._entries),
            table_at=table_at,
            table_crc=zlib.crc32(table),
            stream=(stream_nbytes, stream_crc),
            has_checksums=self._has_checksums,
        )
        self._staged_at = 0
        self._write(memoryview(header))
        _faults.reach("files.header_written")

    def _align(self, nbytes: int) -> int:
        """Go on at a multiple of so many bytes; return where that is."""
        end = self._staged_at + self._n_staged
        gap = -end % nbytes
        if gap > _STAGING_NBYTES - self._n_staged:
            self._flush()
            self._staged_at += gap  # a hole
        else:
            self._reserve(gap)[:] = bytes(gap)
        return end + gap

    def _reserve(self, nbytes: int) -> memoryview:
        """Return so much of the staging, to be filled at once."""
        if nbytes > _STAGING_NBYTES - self._n_staged:
            self._flush()
        start, self._n_staged = self._n_staged, self._n_staged + nbytes
        return self._staging[start : start + nbytes]

    def _put(self, piece: bytes) -> None:
        if len(piece) < _LARGE_NBYTES:
            self._reserve(len(piece))[:] = piece
        else:
            self._flush()
            self._write(memoryview(piece))

    def _flush(self) -> None:
        n, self._n_staged = self._n_staged, 0
        self._write(self._staging[:n])

    def _write(self, piece: memoryview) -> None:
        """Write at the end, with nothing in the staging but the piece itself."""
        if os.getpid() != self._pid:  # the file is its parent's, which goes on writing it
            raise OobPickleError(
                f"oobpickle.dump: process {os.getpid()} was forked from {self._pid} in the middle "
                "of a dump, which only that can finish. Do not fork in a reducer."
            )
        done = 0
        if self._reserves and piece.nbytes >= _LARGE_NBYTES:
            self._reserve_room(self._staged_at + piece.nbytes)
        try:
            while done < piece.nbytes:
                step = piece[done : done + _STEP_NBYTES]
                n = os.pwrite(self._fd, step, self._staged_at)
                done += n
                self._staged_at += n
        except OSError as error:
            pass_on_foreign(error)
            raise WriteFailedError(error) from None

    def _reserve_room(self, end: int) -> None:
        """Reserve room on the disk up to `end`, and some more: large writes are faster then."""
        if end <= max(self._reserved_to, _LEAST_RESERVED_NBYTES):
            return
        start = max(self._reserved_to, self._staged_at)
        nbytes = max(end - start, _RESERVED_NBYTES)
        try:
            os.posix_fallocate(self._fd, start, nbytes)
            self._reserved_to = start + nbytes
        except OSError as error:  # there may be room for what is written, if not for more
            pass_on_foreign(error)
            self._reserves = False

    def _pieces_of(self, source: Any) -> Iterator[memoryview]:
        """Yield the bytes of a source: its own memory, or copies of parts in the staging."""
        flat = exposed(source)
        if isinstance(flat, PickleBuffer):
            memory = flat.raw()
            if not self._has_checksums:
                yield memory
                return
            for at in range(0, memory.nbytes, _STAGING_NBYTES):
                part = memory[at : at + _STAGING_NBYTES]
                room = self._staging[: part.nbytes]
                room[:] = part  # else another thread could change it in between
                yield room
            return
        import numpy as np

        for part in _parts_of(with_gaps(in_memory_order(source))):
            room = self._staging[: part.nbytes]
            if room.nbytes < part.nbytes:  # one element
                room = memoryview(bytearray(part.nbytes))
            np.copyto(np.ndarray(part.shape, part.dtype, room), part)
            yield room


def _parts_of(array: Any) -> Iterator[Any]:
    """Yield an array in parts, in C order, that have room in the staging or are one element."""
    if array.nbytes <= _STAGING_NBYTES or array.size == 1:
        yield array
    elif array.ndim == 1 or array.nbytes // len(array) <= _STAGING_NBYTES:
        step = max(1, _STAGING_NBYTES * len(array) // array.nbytes)
        for at in range(0, len(array), step):
            yield array[at : at + step]
    else:
        for row in array:
            yield from _parts_of(row)


class FileSink(Sink):
    """Takes an object apart into a file.

    Parameters
    ----------
    writer : Writer
        Of an empty file.
    """

    __slots__ = ("_writer",)
    least_nbytes: ClassVar[int] = 1
    least_nbytes_of_subclass: ClassVar[int] = 1

    def __init__(self, writer: Writer) -> None:
        super().__init__(0)
        self._writer = writer

    def _add(self, source: Any) -> None:
        nbytes = source.raw().nbytes if isinstance(source, PickleBuffer) else source.nbytes
        self._writer.append(source, nbytes)
