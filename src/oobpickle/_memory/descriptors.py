"""Descriptors that may be somebody else's by now: what is behind a number, before it is believed.

**What.** An `OwnDescriptor` remembers which file it referred to, and tells whether it still does.
`ClosedDescriptorError` says that it does not.

**How it works.** Daemons and servers close all descriptors, also those that they did not open, and
the next files get their numbers. A file is known by its device and inode. The question keeps the
GIL, so that few threads can come between it and the use of its answer; where one could do harm it
is asked again afterwards: a number that was lost never becomes ours again.

**Lifetime.** No descriptor is kept here.

**When it cannot.** It cannot keep another thread from closing the descriptor in the next moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from oobpickle import _system
from oobpickle._errors import ArenaError
from oobpickle._foreign import ignoring

File = tuple[int, int]  # device and inode


class ClosedDescriptorError(ArenaError):
    """A descriptor of the arena was closed, or its number is another file's by now."""

    @classmethod
    def of(cls, fd: int, what: str) -> ClosedDescriptorError:
        """Say which one."""
        return cls(
            f"descriptor {fd} of {what} was closed in process {os.getpid()}. "
            "Do not close descriptors that you did not open (os.closerange)."
        )


class OwnDescriptor:
    """A descriptor, and which file it referred to when this was made.

    Parameters
    ----------
    fd : int
        Open.

    Raises
    ------
    OSError
        If it is not.
    """

    __slots__ = ("_call", "_status", "device", "fd", "inode")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._call: Callable[[], int] | None = None
        self.device, self.inode = file_of(fd)
        call = _system.status_call(fd)
        if call is not None:
            self._call, self._status = call
            if not self.is_intact():
                self._call = None  # `struct stat` begins otherwise here

    def is_intact(self) -> bool:
        """Tell whether it still refers to that file."""
        if self._call is None:
            return is_file(self.fd, self.file)
        # What a thread that comes in between has found is no older.
        status = self._status
        return self._call() == 0 and status[1] == self.inode and status[0] == self.device

    @property
    def file(self) -> File:
        """Device and inode."""
        return self.device, self.inode

    def close(self) -> None:
        """Close it, unless it is somebody else's by now."""
        close_if(self.fd, self.file)


def file_of(fd: int) -> File:
    """Return what tells the file behind a descriptor from every other one."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def is_file(fd: int, file: File) -> bool:
    """Tell whether the descriptor is open and refers to that file."""
    with ignoring(OSError):
        return file_of(fd) == file
    return False


def close_if(fd: int, file: File) -> None:
    """Close the descriptor, unless it is somebody else's."""
    with ignoring(OSError):
        if file_of(fd) == file:
            os.close(fd)
