"""The files of an arena: made by its owner, opened by everybody else who joins.

**What.** `Files` has the data, the table and the locks, and the data on disk if a folder for it was
named (`disk`). A *name* tells another process of the same user where it finds them.

**How it works.** Apart, so that a write past the end of an array cannot reach the table. The
table's header says which the two others are and carries a check; it is read and compared before
anything is mapped. A file is known by device and inode: daemons and servers close all descriptors,
also those that they did not open, and the next files get their numbers.

**Lifetime.** No name in the file system: the kernel frees a file with its last descriptor and
mapping, however the processes end. Files that were created end with this object, unless somebody
keeps them; inherited ones stay open.

**When it cannot.** `ArenaError`. Nothing that `create` has made stays behind, whatever interrupts
it."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from typing import Final

from oobpickle._errors import ArenaError, format_nbytes
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._memory import disk, huge_pages
from oobpickle._memory.backing import (
    MIN_DATA_NBYTES,
    largest_file_nbytes,
    open_nameless,
    seal,
    set_size,
)
from oobpickle._memory.descriptors import File, close_if, file_of, is_file
from oobpickle._memory.options import Options
from oobpickle._native import core

_DATA_NBYTES: Final = 1 << 44
_LOCKS_NBYTES: Final = 4096
_ADDRESS: Final = struct.Struct("<5I")
_NO_DISK: Final = 0xFFFF_FFFF
_IDENTITY_NBYTES: Final = 16
NAME_NBYTES: Final = _IDENTITY_NBYTES + _ADDRESS.size


class Files:
    """The files of one arena, as this process has them.

    Attributes
    ----------
    descriptors : tuple of int
        Of data, table, locks, and of the data on disk if there is any: what a child must inherit.
    identity : bytes
        16 random bytes that name the arena.
    options : Options
        What is in the header.
    huge : int
        How huge pages are to be had: see `huge_pages.policy`.
    kept : bool
        Whether the files stay open when this is dropped.
    """

    __slots__ = ("_status", "descriptors", "huge", "identity", "kept", "options")

    def __init__(self, descriptors: tuple[int, ...], head: bytes, *, kept: bool) -> None:
        self.kept = True
        self.descriptors = descriptors
        self._status: list[File] = [file_of(fd) for fd in descriptors]
        self.kept = kept
        words = _constants(head)
        self.identity, self.huge = words[0], words[6]
        folder = disk.folder_of(descriptors[3]) if len(descriptors) > 3 else None
        self.options = Options.read(words[1], words[3], words[4], words[5], folder)

    @classmethod
    def create(cls, options: Options) -> Files:
        """Create the files, with resolved options in the table's header.

        Raises
        ------
        OSError
            If the system cannot provide them; the text says why.
        """
        made: list[int] = []
        try:
            most_nbytes = largest_file_nbytes(_DATA_NBYTES)
            if most_nbytes < MIN_DATA_NBYTES:
                raise ArenaError(
                    f"the limits of this process leave {format_nbytes(most_nbytes)} of file size, "
                    f"need {format_nbytes(MIN_DATA_NBYTES)}. See ulimit -f."
                )
            is_memfd = _create(made, "data", most_nbytes)
            nbytes = os.fstat(made[0]).st_size
            if not _create(made, "table", core.TABLE_NBYTES):
                # A mount can be full: then its pages fault fatally.
                os.posix_fallocate(made[1], 0, core.HEADER_NBYTES + (4 << 20))
            _create(made, "locks", _LOCKS_NBYTES)
            if options.spill_dir is not None:
                made.append(disk.open_in(options.spill_dir, most_nbytes))
            head = core.header(
                os.urandom(_IDENTITY_NBYTES),
                min(options.capacity or 0, nbytes // 2),
                nbytes,
                *options.words(),
                huge_pages.policy() if is_memfd else huge_pages.NEVER,
                os.fstat(made[0]).st_ino,
                os.fstat(made[2]).st_ino,
                *_size_and_inode(made[3:]),
            )
            os.pwrite(made[1], head, 0)
            return cls(tuple(made), head, kept=False)
        except BaseException:
            for fd in made:
                os.close(fd)
            raise

    @classmethod
    def inherited(cls, data: int, table: int, locks: int, *on_disk: int) -> Files:
        """Take over inherited descriptors; the last one if there is data on disk.

        Raises
        ------
        ArenaError
            If they are no files of one arena, or of another version.
        """
        for fd in (data, table, locks, *on_disk):
            os.set_inheritable(fd, False)
        table_nbytes, data_nbytes = os.fstat(table).st_size, os.fstat(data).st_size
        if table_nbytes != core.TABLE_NBYTES or data_nbytes < MIN_DATA_NBYTES:
            raise ArenaError(
                f"these are no files of an arena: {table_nbytes} and {data_nbytes} bytes, expected "
                f"{core.TABLE_NBYTES} and at least {MIN_DATA_NBYTES}"
            )
        head = os.pread(table, core.HEADER_NBYTES, 0)
        words = _constants(head)
        if words[2] != data_nbytes:
            raise ArenaError(
                f"the inherited data file has {data_nbytes} bytes, the table speaks of {words[2]}"
            )
        for fd, expected in ((data, words[7]), (locks, words[8])):
            inode = os.fstat(fd).st_ino
            if inode != expected:
                raise ArenaError(
                    f"descriptor {fd} is another file than the table's: inode {inode}, expected "
                    f"{expected}"
                )
        if _size_and_inode(on_disk) != words[9:]:
            raise ArenaError(
                f"the data on disk is another file than the table's: {_size_and_inode(on_disk)}, "
                f"expected {words[9:]} (bytes, inode)"
            )
        return cls((data, table, locks, *on_disk), head, kept=True)

    def are_ours(self) -> bool:
        """Tell whether the descriptors are still those files: others may have closed them."""
        return all(map(is_file, self.descriptors, self._status))

    def resident_nbytes(self) -> int | None:
        """Return how many bytes of the data have pages; ``None`` if its descriptor was closed."""
        with ignoring(OSError):
            status = os.fstat(self.descriptors[0])
            if (status.st_dev, status.st_ino) == self._status[0]:
                return status.st_blocks * 512
        return None

    def huge_nbytes(self) -> int:
        """Return how many bytes of the data this process has mapped in huge pages."""
        return huge_pages.mapped_nbytes(*self._status[0]) if self.huge else 0

    def close(self) -> None:
        """Close those that are ours still."""
        for fd, status in zip(self.descriptors, self._status, strict=False):
            close_if(fd, status)

    def __del__(self) -> None:
        if not getattr(self, "kept", True):
            self.close()


def _constants(head: bytes) -> tuple[bytes, int, int, int, int, int, int, int, int, int, int]:
    try:
        return core.constants(head)
    except ValueError as error:
        raise ArenaError(f"the inherited file is no table of an arena: {error}") from error


def _size_and_inode(on_disk: Sequence[int]) -> tuple[int, int]:
    """Of the data on disk; zeros if there is none."""
    if not on_disk:
        return 0, 0
    status = os.fstat(on_disk[0])
    return status.st_size, status.st_ino


def _create(made: list[int], name: str, nbytes: int) -> bool:
    """Create a file of so many bytes, all holes; tell whether it is a memfd."""
    made.append(open_nameless(name))
    try:
        os.fchmod(made[-1], 0o600)
        set_size(made[-1], nbytes)
    except OSError as error:
        pass_on_foreign(error)
        raise ArenaError(
            error.errno,
            f"cannot create the {name} file of {nbytes} bytes: {error.strerror}. Check ulimit -f, "
            "or pass a smaller capacity.",
        ) from error
    return seal(made[-1])


def name_of(identity: bytes, descriptors: Sequence[int]) -> bytes:
    """Return `NAME_NBYTES` bytes: the identity, and where this process has the files."""
    return identity + _ADDRESS.pack(os.getpid(), *[*descriptors, _NO_DISK][:4])


def open_by_name(name: bytes) -> tuple[int, ...]:
    """Open the files that a process of this user has; return descriptors as `Files` has them.

    Raises
    ------
    OSError, ArenaError
        If that process is gone, is another user's, or has not got this arena.
    """
    pid, *numbers = _ADDRESS.unpack(name[_IDENTITY_NBYTES:])
    if numbers[-1] == _NO_DISK:
        numbers.pop()
    paths: list[int] = []
    fds: list[int] = []
    try:
        for number in numbers:
            # To look is all that can be done with such a descriptor, and it disturbs nobody: the
            # sender's numbers may be other files by now.
            paths.append(os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC))
        data, table, locks, *on_disk = (os.fstat(path) for path in paths)
        for status in (data, table, locks, *on_disk):
            _check_private(pid, status)
        if table.st_size != core.TABLE_NBYTES:
            raise ArenaError(f"process {pid} has something else open now")
        fds.append(_open_again(paths[1]))
        words = _constants(os.pread(fds[0], core.HEADER_NBYTES, 0))
        found = words[0], words[7], words[8], words[10]
        inodes = [status.st_ino for status in (data, locks, *on_disk)]
        if found != (name[:_IDENTITY_NBYTES], *[*inodes, 0][:3]):
            raise ArenaError(f"process {pid} has not got it any more")
        for path in (paths[0], *paths[2:]):
            fds.append(_open_again(path))  # one by one: what is open when one fails is closed
        return fds[1], fds[0], *fds[2:]
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
