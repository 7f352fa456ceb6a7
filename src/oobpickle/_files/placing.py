"""Placing: a new file takes the place of another when it is complete, in one step.

**What.** `NewFile` is a file without a name, to be written. `NewFile.place` gives it the name that
it is for; what was there goes on until then.

**How it works.** ``open(O_TMPFILE)``. A name that is free is taken by one ``linkat``. One that is
in use needs two steps, since no system call replaces by a link: a link under a hidden name, and
``rename`` over the other. Each name has one hidden name, so a dump finds what a dead one has left
there, and removes it. Who is alive has a lock (flock) on the file; if another writer has the hidden
name, a random one is taken, and nobody waits.

As with ``open(path, "wb")``, symbolic links are followed, the permissions of what was there are
kept, and what may not be written is not replaced.

**Lifetime.** The kernel frees a file without a name when its process ends, however it does. If that
is killed between ``linkat`` and ``rename``, one hidden file stays, complete, until the next dump.

**When it cannot.** Where there is no ``O_TMPFILE`` (NFS, FUSE) or no ``/proc``, the file has its
hidden name from the beginning. `OSError` as ``open`` raises it, with the path."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from oobpickle import _faults
from oobpickle._files.layout import type_name
from oobpickle._foreign import annotate, ignoring, pass_on_foreign

_DIRECTORY: Final = os.O_CLOEXEC | getattr(os, "O_DIRECTORY", 0)
_NAMELESS: Final = getattr(os, "O_TMPFILE", 0)
#: What open(2) says where there are no nameless files.
_NO_NAMELESS: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class NewFile:
    """A file that is written under no name, or a hidden one; a context manager.

    Parameters
    ----------
    path : str, bytes or path-like
        The name that it is for.
    fsync : bool
        Whether `place` waits until file and name are on the disk.

    Attributes
    ----------
    fd : int
        Its descriptor.
    is_nameless : bool
        Whether the file system has such files: then it can reserve room too, quickly.
    """

    def __init__(self, path: Path, *, fsync: bool) -> None:
        self.path = os.fspath(path)
        self.fd = -1
        self.is_nameless = False
        self._fsync = fsync
        self._pid = os.getpid()
        self._hidden: bytes | None = None  # a name that may be ours
        self._there: os.stat_result | None = None
        self._is_placed = False

    def __enter__(self) -> NewFile:
        with self.explaining(), contextlib.ExitStack() as opened:
            directory, self._name = self._resolve()
            # Readable only for fsync: a directory need not be, to get a file.
            flag = 0 if self._fsync else getattr(os, "O_PATH", 0)
            self._directory = os.open(directory, _DIRECTORY | flag)
            opened.callback(os.close, self._directory)
            opened.callback(self._close)
            self._open()
            if self._there is not None:
                self._become_like(self._there)
            self._opened = opened.pop_all()
        _faults.reach("files.opened")
        return self

    def __exit__(self, *_: object) -> None:
        with self.explaining():
            self._opened.close()

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Have the errors of system calls name the path, and what is there now."""
        try:
            yield
        except OSError as error:
            pass_on_foreign(error)
            error.filename, error.filename2 = self.path, None
            if not self._is_placed:
                annotate(error, "oobpickle: nothing was written; what was there is unchanged")
            raise

    def _resolve(self) -> tuple[bytes, bytes]:
        """Return directory and name to be written; look at what is there."""
        path = os.fsencode(self.path)
        try:
            self._there = os.stat(path)
        except FileNotFoundError:
            pass
        else:
            self._check_there(self._there)
        if os.path.islink(path):
            path = os.path.realpath(path)
        directory, name = os.path.split(path)
        if not name:
            number = errno.EISDIR if path else errno.ENOENT
            raise OSError(number, os.strerror(number))
        return directory or b".", name

    def _check_there(self, there: os.stat_result) -> None:
        if stat.S_ISDIR(there.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(there.st_mode):
            raise OSError(errno.EINVAL, f"{type_name(there.st_mode)} is not replaced by a file")
        if not os.access(self.path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def _open(self) -> None:
        if _NAMELESS and os.path.isdir("/proc/self/fd"):
            try:
                self._create(b".", _NAMELESS)
                self.is_nameless = True
                return
            except OSError as error:
                pass_on_foreign(error)
                if error.errno not in _NO_NAMELESS:
                    raise
        self._take_hidden(lambda name: self._create(name, os.O_CREAT | os.O_EXCL))
        # Until it has its lock it may be taken for what a dead process has left.
        while not _lock(self.fd) or not self._is_hidden_ours():
            self._close()
            self._take_hidden(lambda name: self._create(name, os.O_CREAT | os.O_EXCL))

    def _create(self, name: bytes, flags: int) -> None:
        flags |= os.O_WRONLY | os.O_CLOEXEC
        self.fd = os.open(name, flags, 0o666, dir_fd=self._directory)

    def _become_like(self, there: os.stat_result) -> None:
        """Take over owner and permissions as far as they can be."""
        for owner in (there.st_uid, there.st_gid), (-1, there.st_gid):
            with contextlib.suppress(PermissionError):
                os.fchown(self.fd, *owner)
                break
        os.fchmod(self.fd, there.st_mode & 0o777)

    def place(self) -> None:
        """Give the file its name: whoever opens that gets the old one before, this one after."""
        with self.explaining():
            # As the system stamps files, several that have one inode in turn could look the same.
            with ignoring(OSError):
                os.utime(self.fd, ns=(time.time_ns(), time.time_ns()))
            if self._fsync:
                os.fsync(self.fd)
            self._take_name()
            self._is_placed = True
            if self._fsync:
                os.fsync(self._directory)

    def _take_name(self) -> None:
        if self._hidden is None:
            if self._there is None:
                with contextlib.suppress(FileExistsError):
                    self._link(self._name)
                    _faults.reach("files.placed")
                    return
            _lock(self.fd)
            self._take_hidden(self._link)
        assert self._hidden is not None
        _faults.reach("files.linked")
        here = self._directory
        os.rename(self._hidden, self._name, src_dir_fd=here, dst_dir_fd=here)
        self._hidden = None
        _faults.reach("files.placed")

    def _link(self, name: bytes) -> None:
        source = b"/proc/self/fd/%d" % self.fd
        os.link(source, name, dst_dir_fd=self._directory, follow_symlinks=True)

    def _take_hidden(self, take: Callable[[bytes], None]) -> None:
        for name in self._hidden_names():
            self._hidden = name
            with contextlib.suppress(FileExistsError):
                take(name)
                return

    def _hidden_names(self) -> Iterator[bytes]:
        first = b".oobpickle-%08x" % zlib.crc32(self._name)
        yield first
        if _remove_left(first, self._directory):
            yield first
        while True:
            yield first + b"-" + os.urandom(8).hex().encode()

    def _is_hidden_ours(self) -> bool:
        if self._hidden is None:
            return False
        try:
            there = os.stat(self._hidden, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.fd))

    def _close(self) -> None:
        """Close the file; remove its hidden name, if it still has that."""
        if self.fd < 0:
            return
        try:
            is_parents = os.getpid() != self._pid  # a forked child has its descriptor
            # Without the lock somebody else removes the name, and then a third one may have it.
            may_remove = not is_parents and _lock(self.fd)
            if self._hidden is not None and may_remove and self._is_hidden_ours():
                os.unlink(self._hidden, dir_fd=self._directory)
        finally:
            self._hidden = None
            fd, self.fd = self.fd, -1
            os.close(fd)


def _lock(fd: int) -> bool:
    """Show that the writer of a file is alive; whether nobody else has the lock of it."""
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # no locks here: then nobody can remove what is left
        pass_on_foreign(error)
    return True


def _remove_left(name: bytes, directory: int) -> bool:
    """Remove what a dead process has left under a hidden name; whether the name is free."""
    import fcntl

    try:
        # For writing, or NFS gives no exclusive lock.
        fd = os.open(
            name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory
        )
    except OSError as error:
        pass_on_foreign(error)
        return isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Only who has the lock of a file removes its name: between these two it stays this file's.
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if os.path.samestat(there, os.fstat(fd)):
            os.unlink(name, dir_fd=directory)
    except OSError as error:
        pass_on_foreign(error)
        return isinstance(error, FileNotFoundError)
    finally:
        os.close(fd)
    return True
