"""Descriptors that may be somebody else's by now: what is behind a number, before it is believed.

**What.** `file_of` names the file behind a descriptor, `is_file` and `close_if` compare first.

**How it works.** Daemons and servers close all descriptors, also those that they did not open, and
the next files get their numbers. A file is known by its device and inode.

**Lifetime.** No descriptor is kept here.

**When it cannot.** It cannot keep another thread from closing the descriptor in the next moment.
"""

from __future__ import annotations

import os

from oobpickle._foreign import ignoring

File = tuple[int, int]  # device and inode


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
