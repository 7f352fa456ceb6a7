"""The layout of a file: its header, the table of its buffers, and the checks of both.

**What.** `write_end` puts table, stream and header into a file whose buffers are written, `read`
reads them from one. `FileLayout` is what they say.

**How it works.** All numbers are little-endian; docs/reference/file-format.md has every byte::

    header 64 | buffer | padding | buffer ... | padding to 64 | table | stream

    header: magic 8 | version u32 | crc32 of the header u32 | flags u64 | nbytes of the file u64 |
            n_buffers u64 | offset of the stream u64 | nbytes of the stream u64 |
            crc32 of the stream u32 | crc32 of the table u32
    table:  for each buffer: offset u64 | nbytes u64 | crc32 u32 | 0 u32

Buffers stand in their order, from multiples of 64 on, without overlap. The header is written last.

**Lifetime.** No state.

**When it cannot.** `FileFormatError` for what is no such file, truncated, altered or newer. Nothing
is believed before it is compared with the size that the file has."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from oobpickle._errors import FileFormatError
from oobpickle._pickling.payload import FILE_MAGIC, MAGIC

VERSION: Final = 1
HEADER_NBYTES: Final = 64
ALIGN: Final = 64
_HEADER: Final = struct.Struct("<8sIIQQQQQII")
_CRC_AT: Final = 12
_ENTRY: Final = struct.Struct("<QQII")
_HAS_CHECKSUMS: Final = 1
#: ``(offset, nbytes, crc32)``; the last is 0 in a file without checksums of its buffers.
Entry = tuple[int, int, int]

#: How other files begin, and what loads them.
_FOREIGN: Final = {
    MAGIC: "the bytes of a Payload: use oobpickle.loads(data)",
    b"\x93NUMPY": "an array of np.save: use np.load",
    b"PK\x03\x04": "a zip archive, as np.savez and torch.save write: use what wrote it",
    b"ARROW1": "an Arrow file: use pyarrow.ipc.open_file",
    b"PAR1": "a Parquet file: use pyarrow.parquet",
    b"\x89HDF": "an HDF5 file: use h5py",
    b"\x80": "a pickle, as pickle.dump and joblib.dump write: use what wrote it",
}
_FILE_TYPES: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Where everything lies in a file that `dump` wrote; what `verify` returns.

    Attributes
    ----------
    version : int
        Of the format.
    nbytes : int
        Of the file.
    stream_nbytes : int
        Of the pickle stream, bytes.
    offsets : list of int
        Where each buffer begins, bytes from the start of the file.
    sizes : list of int
        nbytes of each buffer.
    checksums : list of int or None
        CRC-32 of each buffer; ``None`` if the file was written without ``checksum=True``.
    """

    version: int
    nbytes: int
    stream_nbytes: int
    offsets: list[int]
    sizes: list[int]
    checksums: list[int] | None


def type_name(mode: int) -> str:
    """Return what a file is, that is no regular one."""
    return _FILE_TYPES.get(stat.S_IFMT(mode), "no regular file")


def table_of(entries: Iterable[Entry]) -> bytes:
    """Return the table of the buffers."""
    return b"".join(_ENTRY.pack(*entry, 0) for entry in entries)


def header_of(
    n_buffers: int, *, table_at: int, table_crc: int, stream: tuple[int, int], has_checksums: bool
) -> bytes:
    """Return the header of a file; `stream` is the nbytes of the stream and its checksum."""
    stream_nbytes, stream_crc = stream
    stream_at = table_at + n_buffers * _ENTRY.size
    sizes = stream_at + stream_nbytes, n_buffers, stream_at, stream_nbytes
    flags = _HAS_CHECKSUMS if has_checksums else 0
    fields = FILE_MAGIC, VERSION, 0, flags, *sizes, stream_crc, table_crc
    header = bytearray(_HEADER.pack(*fields))
    struct.pack_into("<I", header, _CRC_AT, zlib.crc32(header))
    return bytes(header)


def read(fd: int, path: str) -> tuple[FileLayout, memoryview]:
    """Return the layout of a file and its stream.

    Raises
    ------
    FileFormatError
        If it is not what `dump` writes, truncated, altered, or of a newer version.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise FileFormatError(f"{path}: {type_name(found.st_mode)}, not a regular file.")
    header = os.pread(fd, HEADER_NBYTES, 0)
    _check_start(header, path)
    fields = _HEADER.unpack(header)
    _, version, crc, flags, nbytes, n_buffers, stream_at, stream_nbytes = fields[:8]
    stream_crc, table_crc = fields[8:]
    expected = zlib.crc32(header[:_CRC_AT] + bytes(4) + header[_CRC_AT + 4 :])
    if crc != expected:
        raise _altered(path, f"checksum of the header {crc:#010x}, expected {expected:#010x}")
    if found.st_size != nbytes:
        what = "truncated" if found.st_size < nbytes else "longer than it was written"
        raise FileFormatError(
            f"{path}: {what}: {found.st_size} bytes, expected {nbytes}. Copy or write it again."
        )
    table_nbytes = n_buffers * _ENTRY.size
    table_at = stream_at - table_nbytes
    if table_at < HEADER_NBYTES or stream_at + stream_nbytes != nbytes or flags >= 2:
        raise _altered(path, f"{n_buffers} buffers and {stream_nbytes} bytes at {stream_at}")
    rest = memoryview(bytearray(table_nbytes + stream_nbytes))
    read_into(fd, path, rest, table_at)
    table, stream = rest[:table_nbytes], rest[table_nbytes:]
    _check_crc(path, "the table", table_crc, table)
    _check_crc(path, "the stream", stream_crc, stream)
    has_checksums = bool(flags & _HAS_CHECKSUMS)
    entries = _entries_in(table, path, end=table_at, has_checksums=has_checksums)
    offsets, sizes, checksums = ([entry[n] for entry in entries] for n in range(3))
    checked = checksums if has_checksums else None
    return FileLayout(version, nbytes, stream_nbytes, offsets, sizes, checked), stream


def _check_start(header: bytes, path: str) -> None:
    """Raise unless this is the whole header of a file of this version."""
    start = header[: len(FILE_MAGIC)]
    if start != FILE_MAGIC[: len(header)] or not header:
        kinds = (what for magic, what in _FOREIGN.items() if header.startswith(magic))
        what = next(kinds, f"it begins with {start!r}") if header else "it is empty"
        raise FileFormatError(f"{path}: not a file of oobpickle.dump: {what}.")
    if len(header) >= _CRC_AT and (version := struct.unpack_from("<I", header, 8)[0]) > VERSION:
        raise FileFormatError(
            f"{path}: written by a newer oobpickle: version {version} of the format, this one "
            f"reads {VERSION}. Install a newer oobpickle."
        )
    if len(header) < HEADER_NBYTES:
        raise FileFormatError(
            f"{path}: truncated: {len(header)} bytes, the header alone has {HEADER_NBYTES}. "
            "Copy or write it again."
        )


def _entries_in(
    table: memoryview, path: str, *, end: int, has_checksums: bool
) -> Sequence[tuple[int, int, int, int]]:
    """Return the entries of a table whose buffers lie before `end`."""
    entries = list(_ENTRY.iter_unpack(table))
    last = HEADER_NBYTES
    for position, (offset, nbytes, crc, zero) in enumerate(entries):
        is_strange = zero != 0 or (crc != 0 and not has_checksums)
        if offset < last or offset % ALIGN or offset + nbytes > end or is_strange:
            raise _altered(path, f"buffer {position} has {nbytes} bytes at {offset}")
        last = offset + nbytes
    return entries


def read_into(fd: int, path: str, memory: memoryview, at: int) -> None:
    """Read exactly as many bytes as there is room for.

    Raises
    ------
    FileFormatError
        If the file has become shorter.
    """
    done = 0
    while done < memory.nbytes:
        n = os.preadv(fd, [memory[done : done + _STEP_NBYTES]], at + done)
        if n == 0:
            raise FileFormatError(
                f"{path}: truncated while it was read: {at + done} bytes, need "
                f"{at + memory.nbytes}. Write it again, by another name first."
            )
        done += n


_STEP_NBYTES: Final = 64 << 20  # between two of them Ctrl-C is heard


def check_data(path: str, position: int, expected: int, found: int) -> None:
    """Raise unless the checksum of a buffer is what it should be."""
    if expected != found:
        what = f"checksum of buffer {position} {found:#010x}, expected {expected:#010x}"
        raise _altered(path, what)


def _check_crc(path: str, what: str, expected: int, memory: memoryview) -> None:
    if (found := zlib.crc32(memory)) != expected:
        raise _altered(path, f"checksum of {what} {found:#010x}, expected {expected:#010x}")


def _altered(path: str, what: str) -> FileFormatError:
    return FileFormatError(f"{path}: altered: {what}. Copy or write it again.")
