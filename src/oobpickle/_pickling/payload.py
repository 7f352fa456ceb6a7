"""A payload: a protocol-5 stream and its buffers, still in this process.

**What.** `Payload` holds what `dumps` made of an object: ``stream``, ``buffers``, ``nbytes``. It
writes its buffers into destinations that the caller allocated, and becomes bytes, or an ordinary
pickle, and back.

**How it works.** No array is copied until it is written; then it is copied once, from the user's
memory, strided or not. The bytes of a payload::

    magic 8 | version u32 | n_buffers u32 | crc32 u32 | 0 u32 | stream nbytes u64 | nbytes u64 of
    each buffer stream | padding to 64 | buffer | padding to 64 | buffer ...

The checksum covers everything but itself.

**Lifetime.** A payload refers to the user's memory: what is written is what it holds *then*.
Write it before you change the object.

**When it cannot.** `PayloadError` for wrong destinations and for bytes that are no payload,
truncated or altered. The stream is trusted like any pickle: loading it can run code."""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final

from oobpickle._copying import copy_array, copy_bytes
from oobpickle._errors import PayloadError
from oobpickle._pickling.reducers import (
    EXPORTED_CHARS,
    byte_bounds,
    in_memory_order,
    with_gaps,
)

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]

    from oobpickle._pickling.reducers import Source

MAGIC: Final = b"OOBPAYLD"
#: How a file of `oobpickle.dump` begins, which is another format.
FILE_MAGIC: Final = b"\x89OOB\r\n\x1a\n"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIIIQ")
_CRC_AT: Final = 16
_ALIGN: Final = 64
_SMALL_NBYTES: Final = 32 << 10
_START_NBYTES: Final = 40


class Payload:
    """What `dumps` made of one object.

    Attributes
    ----------
    stream : bytes
        The in-band pickle, protocol 5; put together anew each time.
    sizes : list of int
        nbytes of each buffer.
    nbytes : int
        Stream and buffers together, bytes.
    """

    __slots__ = ("_pieces", "_sources", "sizes")

    def __init__(self, pieces: Sequence[bytes], sources: Sequence[Any], sizes: list[int]) -> None:
        self._pieces = pieces
        self._sources = sources
        self.sizes = sizes

    @property
    def stream(self) -> bytes:
        pieces = self._pieces
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)  # the very object

    @property
    def stream_nbytes(self) -> int:
        """Bytes of the stream."""
        return sum(map(len, self._pieces))

    @property
    def nbytes(self) -> int:
        return self.stream_nbytes + sum(self.sizes)

    @property
    def buffers(self) -> list[Source]:
        """The memory to send out of band, in order; nothing is copied.

        A ``PickleBuffer`` over contiguous memory, or the array itself if it is strided.
        """
        return [exposed(source) for source in self._sources]

    def __repr__(self) -> str:
        return (
            f"<Payload of {self.nbytes} bytes: stream {self.stream_nbytes}, buffers {self.sizes}>"
        )

    def overlaps(self, targets: Sequence[Any]) -> bool:
        """Tell whether a source lies in the memory of a target other than the one at its place."""
        spans = sorted((*byte_bounds(t), i) for i, t in enumerate(targets) if t.nbytes)
        starts = [start for start, _, _ in spans]
        for position, source in enumerate(self._sources):
            low, high = byte_bounds(source)
            at = max(0, bisect_right(starts, low) - 1)
            while at < len(spans) and spans[at][0] < high:
                start, end, index = spans[at]
                if low < end and start < high and (start, end, index) != (low, high, position):
                    return True
                at += 1
        return False

    def write_into(self, destinations: Sequence[Buffer]) -> None:
        """Copy each buffer once into the destination at the same position.

        Parameters
        ----------
        destinations : sequence of writable buffers
            One for each buffer, contiguous, with exactly its nbytes.

        Raises
        ------
        PayloadError
            If their number or a size is wrong, or one cannot be written; nothing was written.
        """
        views = [_writable(destination) for destination in destinations]
        check_sizes("destinations", [view.nbytes for view in views], self.sizes)
        for view, source in zip(views, self._sources, strict=True):
            copy_source(view, source)

    def to_bytes(self) -> bytes:
        """Return everything as one string of bytes, with a checksum; see `from_bytes`."""
        sizes = struct.pack(f"<{len(self.sizes)}Q", *self.sizes)
        head = _HEADER.pack(MAGIC, _VERSION, len(self.sizes), 0, 0, self.stream_nbytes) + sizes
        offsets, total = _offsets(len(head) + self.stream_nbytes, self.sizes)
        whole = bytearray(total)
        view = memoryview(whole)
        view[: len(head)] = head
        view[len(head) : len(head) + self.stream_nbytes] = self.stream
        for at, nbytes, source in zip(offsets, self.sizes, self._sources, strict=True):
            copy_source(view[at : at + nbytes], source)
        struct.pack_into("<I", whole, _CRC_AT, zlib.crc32(whole))
        view.release()
        return bytes(whole)

    @classmethod
    def from_bytes(cls, data: Buffer) -> Payload:
        """Read what `to_bytes` returned; the buffers are slices of `data`, uncopied.

        Raises
        ------
        PayloadError
            If `data` is no payload, truncated or altered.
        """
        view = memoryview(data).cast("B")
        if bytes(view[: len(FILE_MAGIC)]) == FILE_MAGIC:
            raise PayloadError(
                f"not a payload: {view.nbytes} bytes of a file that oobpickle.dump() wrote. Use "
                "oobpickle.load(path) on the file itself."
            )
        if view.nbytes < _HEADER.size:
            raise PayloadError(
                f"payload truncated: {view.nbytes} bytes, need {_HEADER.size} or more"
            )
        magic, version, n_buffers, crc, zero, n_stream = _HEADER.unpack_from(view)
        if magic != MAGIC or version != _VERSION or zero != 0:
            raise PayloadError(
                f"not a payload: magic {magic!r}, version {version}, expected {MAGIC!r} and "
                f"{_VERSION}. "
                "Pass the bytes that Payload.to_bytes() returned."
            )
        body = _HEADER.size + 8 * n_buffers
        if view.nbytes < body + n_stream:
            raise PayloadError(
                f"payload truncated: {view.nbytes} bytes, need {body + n_stream} or more"
            )
        sizes = list(struct.unpack_from(f"<{n_buffers}Q", view, _HEADER.size))
        offsets, total = _offsets(body + n_stream, sizes)
        if view.nbytes != total:
            raise PayloadError(
                f"payload truncated or extended: {view.nbytes} bytes, expected {total}"
            )
        found = zlib.crc32(view[_CRC_AT + 4 :], zlib.crc32(b"\0\0\0\0", zlib.crc32(view[:_CRC_AT])))
        if found != crc:
            raise PayloadError(f"payload altered: checksum {found:#010x}, expected {crc:#010x}")
        stream = bytes(view[body : body + n_stream])
        return cls(
            [stream], [view[at : at + n] for at, n in zip(offsets, sizes, strict=True)], sizes
        )

    def to_pickle(self, *, tail: bytes = b"") -> memoryview:
        """Return an ordinary pickle of the object, with the buffers in-band.

        Any Python >= 3.8 that can load the stream can load it; it need not have oobpickle. The
        receiver's arrays are writable.

        Parameters
        ----------
        tail : bytes, optional
            What to put after its end; loading ignores it.
        """
        headers = [PICKLE_BUFFER.pack(BYTEARRAY8, nbytes) for nbytes in self.sizes]
        end = b"".join((pickle_middle(self.stream_nbytes), *self._pieces, PICKLE_END, tail))
        at = len(PICKLE_START)
        n_headers = PICKLE_BUFFER.size * len(headers)
        (whole,) = fresh_destinations([at + n_headers + sum(self.sizes) + len(end)])
        whole[:at] = PICKLE_START
        for header, source, nbytes in zip(headers, self._sources, self.sizes, strict=True):
            whole[at : at + len(header)] = header
            at += len(header)
            copy_source(whole[at : at + nbytes], source)
            at += nbytes
        whole[at:] = end
        return whole


# partial(loads, buffers=(bytearray, ...))(stream), written out by hand: nothing is pickled twice.
PICKLE_START: Final = (
    b"\x80\x05cfunctools\npartial\nc_pickle\nloads\n\x85R(c_pickle\nloads\n)}\x8c\x07buffers("
)
PICKLE_BUFFER: Final = struct.Struct("<BQ")
BYTEARRAY8: Final = 0x96
_PICKLE_MIDDLE: Final = b"tsNtb\x8e"
PICKLE_MIDDLE_NBYTES: Final = len(_PICKLE_MIDDLE) + 8
PICKLE_END: Final = b"\x85R."


def pickle_middle(stream_nbytes: int) -> bytes:
    """Return what comes between the buffers of an ordinary pickle and the stream."""
    return _PICKLE_MIDDLE + struct.pack("<Q", stream_nbytes)


def start_of_stream(message: memoryview) -> bytes | None:
    """Return the first bytes of the stream in what `Payload.to_pickle` returned, else ``None``."""
    at = len(PICKLE_START)
    if bytes(message[:at]) != PICKLE_START:
        return None
    while message[at : at + 1] == bytes((BYTEARRAY8,)):
        at += PICKLE_BUFFER.size + PICKLE_BUFFER.unpack_from(message, at)[1]
    n_stream = stream_nbytes_in(bytes(message[at : at + PICKLE_MIDDLE_NBYTES]))
    at += PICKLE_MIDDLE_NBYTES
    return bytes(message[at : at + min(n_stream, _START_NBYTES)]) if n_stream >= 0 else None


def stream_nbytes_in(middle: bytes) -> int:
    """Return the nbytes of the stream that follows, or -1 if it is not what comes before one."""
    return struct.unpack("<Q", middle[-8:])[0] if middle[:-8] == _PICKLE_MIDDLE else -1


def check_sizes(what: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise `PayloadError` unless both lists of nbytes are the same."""
    if len(found) != len(wanted):
        raise PayloadError(f"{len(found)} {what} for {len(wanted)} buffers")
    for position, (n_found, n_wanted) in enumerate(zip(found, wanted, strict=True)):
        if n_found != n_wanted:
            raise PayloadError(
                f"{what}[{position}] has {n_found} bytes, buffer {position} has {n_wanted}"
            )


def fresh_destinations(sizes: Iterable[int]) -> list[memoryview]:
    """Allocate ordinary memory for buffers of the given nbytes, 64-byte aligned."""
    return [_empty(nbytes) for nbytes in sizes]


def _empty(nbytes: int) -> memoryview:
    # Not bytearray(n): that writes zeros first.
    import numpy as np

    room = np.empty(nbytes + _ALIGN, np.uint8)
    start = -room.ctypes.data % _ALIGN
    return memoryview(room[start : start + nbytes])


def _offsets(start: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    offsets = []
    for nbytes in sizes:
        start = -(-start // _ALIGN) * _ALIGN
        offsets.append(start)
        start += nbytes
    return offsets, start


#: What is bytes in a row; everything else is an array.
_FLAT: Final = (PickleBuffer, memoryview)


def _raw(source: PickleBuffer | memoryview) -> memoryview:
    return source.cast("B") if isinstance(source, memoryview) else source.raw()


def exposed(source: Any) -> Any:
    """Return a ``PickleBuffer`` over the memory of a source; the source itself if it is strided."""
    if isinstance(source, _FLAT):
        return source if isinstance(source, PickleBuffer) else PickleBuffer(_raw(source))
    flat = in_memory_order(source)
    if not flat.flags.c_contiguous:
        return source
    return PickleBuffer(flat.reshape(-1).view("u1"))


def _writable(destination: Buffer) -> memoryview:
    try:
        view = memoryview(destination)
        if view.readonly:
            raise PayloadError(f"a destination is read-only: {type(destination).__name__}")
        return view.cast("B") if view.nbytes else memoryview(bytearray())
    except (TypeError, ValueError, BufferError) as error:
        raise PayloadError(f"a destination is no contiguous writable buffer: {error}") from error


def copy_source(view: memoryview, source: Any) -> None:
    """Copy a source once, strided or not, into memory of its size."""
    if isinstance(source, _FLAT):
        copy_bytes(view, _raw(source))
        return
    import numpy as np

    flat = in_memory_order(source)
    flat = with_gaps(flat)
    is_small = flat.nbytes <= _SMALL_NBYTES and flat.flags.c_contiguous
    if is_small and flat.dtype.char in EXPORTED_CHARS:
        view[:] = memoryview(flat).cast("B")
    else:
        # Takes strides in the same pass.
        copy_array(np.ndarray(flat.shape, flat.dtype, view), flat)
