"""The three files of an arena: made by its owner, opened by everybody else who joins.

**What.** `Files` has the data, the ledger and the locks. A *name* tells another process of the same
user where it finds them.

**How it works.** Apart, so that a write past the end of an array cannot reach the table. The
ledger's header says which the two others are and carries a check; it is read and compared before
anything is mapped.

**Lifetime.** Files that were created end with this object, unless somebody keeps them; inherited
ones stay open.

**When it cannot.** `ArenaError`. Nothing that `create` has made stays behind, whatever interrupts
it; an interrupted `inherited` may leave mappings."""

from __future__ import annotations

import os
import secrets
import stat
import struct
from collections.abc import Sequence
from typing import Final

from oobpickle import _system
from oobpickle._errors import ArenaError, format_nbytes
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory import huge_pages
from oobpickle._memory.backing import largest_file_nbytes, locked_nbytes
from oobpickle._memory.layout import (
    BLOCKS_AT,
    H_CHECK,
    H_DATA_INODE,
    H_DATA_NBYTES,
    H_HUGE,
    H_IDENTITY,
    H_LOCKS_INODE,
    H_MAGIC,
    H_ROWS,
    H_VERSION,
    HEADER_WORDS,
    LEDGER_NBYTES,
    MAGIC,
    VERSION,
    header_check,
    rows_word,
)
from oobpickle._memory.options import Options
from oobpickle._memory.segment import Segment

_DATA_NBYTES: Final = 1 << 44
_MIN_DATA_NBYTES: Final = 64 << 20
_ADDRESS: Final = struct.Struct("<4I")
_IDENTITY_NBYTES: Final = 16


class Files:
    """The files of one arena, as this process has them.

    Parameters
    ----------
    data, table, locks : Segment
        The memory of the messages, the ledger, and the file whose bytes are locked; the last is
        not mapped.
    """

    __slots__ = ("data", "locks", "table", "words")

    def __init__(self, data: Segment, table: Segment, locks: Segment) -> None:
        self.data, self.table, self.locks = data, table, locks
        self.words = table.words()
        _check_header(self.words, data.nbytes)

    @property
    def identity(self) -> bytes:
        """16 random bytes that name the arena."""
        return bytes(self.words[H_IDENTITY : H_IDENTITY + 2])

    @classmethod
    def create(cls, options: Options) -> Files:
        """Create the files, with resolved options in the ledger's header.

        Raises
        ------
        OSError
            If the system cannot provide them; the text says why.
        """
        made: list[Segment] = []
        try:
            data = _create_data(largest_file_nbytes(_DATA_NBYTES))
            made.append(data)
            table = Segment.create(LEDGER_NBYTES, "ledger")
            made.append(table)
            if table.backing != "memfd":  # a mount can be full: then its pages fault fatally
                table.reserve(0, 8 * BLOCKS_AT)
            locks = Segment.create(_system.PAGE_NBYTES, "locks", map_it=False)
            made.append(locks)
            _write_header(table.words(), options.within(data.nbytes), data, locks.fd)
            return cls(data, table, locks)
        except BaseException:
            for segment in made:
                segment.close()
            raise

    @classmethod
    def inherited(cls, data_fd: int, ledger_fd: int, locks_fd: int) -> Files:
        """Map the files behind inherited descriptors, as far as address space allows.

        Raises
        ------
        ArenaError
            If they are no files of one arena, or of another version.
        """
        table_nbytes, data_nbytes = os.fstat(ledger_fd).st_size, os.fstat(data_fd).st_size
        if table_nbytes != LEDGER_NBYTES or data_nbytes < _MIN_DATA_NBYTES:
            raise ArenaError(
                f"these are no files of an arena: {table_nbytes} and {data_nbytes} bytes, expected "
                f"{LEDGER_NBYTES} and at least {_MIN_DATA_NBYTES}"
            )
        head = memoryview(bytearray(os.pread(ledger_fd, 8 * HEADER_WORDS, 0))).cast("Q")
        _check_header(head, data_nbytes)  # before anything is mapped
        for word, fd in ((H_DATA_INODE, data_fd), (H_LOCKS_INODE, locks_fd)):
            inode = os.fstat(fd).st_ino
            if inode != head[word]:
                raise ArenaError(
                    f"descriptor {fd} is another file than the ledger's: inode {inode}, expected "
                    f"{head[word]}"
                )
        table = Segment.attach(ledger_fd)
        locks = Segment.attach(locks_fd, map_it=False)
        return cls(Segment.attach(data_fd, map_it=_may_map()), table, locks)

    def close(self) -> None:
        """Unmap and close all of them."""
        for segment in (self.data, self.table, self.locks):
            segment.close()


def name_of(identity: bytes, descriptors: Sequence[int]) -> bytes:
    """Return 32 bytes: the identity, and where this process has the files."""
    return identity + _ADDRESS.pack(os.getpid(), *descriptors)


def open_by_name(name: bytes) -> tuple[int, int, int]:
    """Open the files that a process of this user has; return descriptors of data, ledger, locks.

    Raises
    ------
    OSError, ArenaError
        If that process is gone, is another user's, or has not got this arena.
    """
    pid, *numbers = _ADDRESS.unpack(name[_IDENTITY_NBYTES:])
    paths, fds = [], []
    try:
        for number in numbers:
            # To look is all that can be done with such a descriptor, and it disturbs nobody: the
            # sender's numbers may be other files by now.
            paths.append(os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC))
        data, ledger, locks = (os.fstat(path) for path in paths)
        for status in (data, ledger, locks):
            _check_private(pid, status)
        if ledger.st_size != LEDGER_NBYTES:
            raise ArenaError(f"process {pid} has something else open now")
        fds.append(_open_again(paths[1]))
        head = memoryview(bytearray(os.pread(fds[0], 8 * HEADER_WORDS, 0))).cast("Q")
        if bytes(head[H_IDENTITY : H_IDENTITY + 2]) != name[:_IDENTITY_NBYTES] or (
            (data.st_ino, locks.st_ino) != (head[H_DATA_INODE], head[H_LOCKS_INODE])
        ):
            raise ArenaError(f"process {pid} has not got it any more")
        fds += [_open_again(paths[0]), _open_again(paths[2])]
        return fds[1], fds[0], fds[2]
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    finally:
        for fd in paths:
            os.close(fd)


def _check_private(pid: int, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 0:
        raise ArenaError(f"process {pid} has something else open now")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ArenaError(
            f"a file of process {pid} belongs to user {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):04o}: not private to this user"
        )


def _open_again(path_fd: int) -> int:
    return os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR | os.O_CLOEXEC)


def _may_map() -> bool:
    """Tell whether a sparse mapping is safe: mlockall() would make all of it resident."""
    try:
        return locked_nbytes() == 0
    except OSError as error:  # no /proc, or no descriptor
        pass_on_foreign(error)
        return True


def _create_data(nbytes: int) -> Segment:
    """Create the data file, as large as the address space allows: 128 TiB hold seven of 16."""
    if nbytes < _MIN_DATA_NBYTES:
        raise ArenaError(
            f"the limits of this process leave {format_nbytes(nbytes)} of address space or file "
            f"size, need {format_nbytes(_MIN_DATA_NBYTES)}. See ulimit -v and ulimit -f."
        )
    while True:
        try:
            return Segment.create(nbytes, "data")
        except ArenaError:
            if nbytes // 4 < _MIN_DATA_NBYTES:
                raise
            nbytes //= 4


def _write_header(words: memoryview, options: Options, data: Segment, locks_fd: int) -> None:
    identity = secrets.token_bytes(_IDENTITY_NBYTES)
    words[H_IDENTITY] = int.from_bytes(identity[:8], "little")
    words[H_IDENTITY + 1] = int.from_bytes(identity[8:], "little")
    options.write(words)
    words[H_DATA_NBYTES] = data.nbytes
    words[H_DATA_INODE] = os.fstat(data.fd).st_ino
    words[H_LOCKS_INODE] = os.fstat(locks_fd).st_ino
    words[H_HUGE] = huge_pages.policy() if data.backing == "memfd" else huge_pages.NEVER
    words[H_ROWS] = rows_word(0)
    words[H_VERSION] = VERSION
    words[H_MAGIC] = MAGIC
    words[H_CHECK] = header_check(words)


def _check_header(words: memoryview, data_nbytes: int) -> None:
    if (words[H_MAGIC], words[H_VERSION]) != (MAGIC, VERSION):
        raise ArenaError(
            f"the inherited file is no ledger of this version: magic {words[H_MAGIC]:#x}, "
            f"version {words[H_VERSION]}, expected {MAGIC:#x} and {VERSION}. "
            "Use one version of oobpickle in all processes."
        )
    if words[H_CHECK] != header_check(words):
        raise ArenaError("the header of the inherited ledger is damaged: its check does not match")
    if words[H_DATA_NBYTES] != data_nbytes:
        raise ArenaError(
            f"the inherited data file has {data_nbytes} bytes, the ledger speaks of "
            f"{words[H_DATA_NBYTES]}"
        )
