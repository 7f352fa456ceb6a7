"""The locks file: exclusion between processes, and the proof that a process is alive.

**What.** A `LockFile` is one participant's own open file description of a shared, nameless file.
Byte 0 is the ledger's lock; byte ``1 + slot`` is held for life by the participant with that slot.

**How it works.** Open file description locks (``F_OFD_SETLK``) belong to a description, and the
kernel drops them when the last reference to it is gone, which it sees to however a process dies.
Classic POSIX locks would vanish as soon as *any* descriptor of the file is closed in the process.
So each participant opens a description of its own through ``/proc/self/fd``::

    handle (inherited, never locked) --open--> own description: byte 0 for moments, byte 1+slot
    for life

**Lifetime.** One page of the description is mapped with ``MADV_DONTFORK``: that keeps the
description alive if someone closes the descriptor (``os.closerange``), and still ends with the
process although a forked child lives on. A forked child inherits the descriptor; it must close it
and never unlock (`abandon`).

**When it cannot.** Without ``/proc`` there is no second description; then there is no arena.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from oobpickle import _system
from oobpickle._errors import ArenaError
from oobpickle._foreign import ignoring, pass_on_foreign

_LEDGER_BYTE: Final = 0


class LockFile:
    """This process's description of the locks file behind `handle`.

    Parameters
    ----------
    handle : int
        A descriptor of the file; it is not kept.

    Raises
    ------
    OSError
        EMFILE, EACCES, ENOENT of open(2): no description can be had.
    """

    __slots__ = ("_address", "_file", "_lock", "_unlock", "fd")

    def __init__(self, handle: int) -> None:
        self.fd, self._address = -1, 0
        self._file: tuple[int, int] | None = None
        try:
            self.fd = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_CLOEXEC)
            self._file = file_of(self.fd)
            self._prepare()
        except BaseException:  # a Ctrl-C
            self.close()
            raise

    def _prepare(self) -> None:
        self._lock = _system.flock_argument(lock=True, byte=_LEDGER_BYTE)
        self._unlock = _system.flock_argument(lock=False, byte=_LEDGER_BYTE)
        # Without the page we only lose the protection against closerange.
        with ignoring(OSError):
            page = _system.PAGE_NBYTES
            self._address = _system.map_memory(self.fd, 0, page, flags=_system.MAP_SHARED)
            _system.advise(self._address, page, _system.MADV_DONTFORK)
            _system.advise(self._address, page, _system.MADV_DONTDUMP)

    @property
    def unlock_call(self) -> tuple[int, int, object]:
        """Arguments with which ``fcntl`` gives the ledger's lock back, in one C call."""
        return self.fd, _system.F_OFD_SETLK, self._unlock

    def try_lock(self) -> bool:
        """Take the ledger's lock, or return ``False`` at once if another process has it.

        Raises
        ------
        ArenaError
            If our descriptor was closed: a lock on the file that has its number now would exclude
            nobody.
        """
        try:
            intact = file_of(self.fd) == self._file
        except OSError as error:
            pass_on_foreign(error)
            intact = False
        if not intact:
            raise ArenaError(
                f"descriptor {self.fd} of the arena's lock was closed in process {os.getpid()}. "
                "Do not close descriptors that you did not open (os.closerange)."
            )
        if _system.fcntl_keeping_gil(self.fd, _system.F_OFD_SETLK, self._lock) == 0:
            return True
        if ctypes.get_errno() in (errno.EAGAIN, errno.EACCES):
            return False
        raise ArenaError(f"locking failed: {os.strerror(ctypes.get_errno())}")

    def hold(self, slot: int) -> bool:
        """Hold the slot's byte until this process ends; ``False`` if a living one has it."""
        return _system.try_lock_byte(self.fd, 1 + slot)

    def is_alive(self, slot: int) -> bool:
        """Tell whether another participant holds the slot's byte."""
        return _system.is_byte_locked(self.fd, 1 + slot)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's description without unlocking anything."""
        self._close_fd()
        self._address = 0  # MADV_DONTFORK: not mapped here

    def close(self) -> None:
        """Give up the slot and all locks."""
        if self._address:
            _system.unmap_memory(self._address, _system.PAGE_NBYTES)
            self._address = 0
        self._close_fd()

    def _close_fd(self) -> None:
        with ignoring(OSError):
            if self._file is None or file_of(self.fd) == self._file:
                os.close(self.fd)
        self.fd = -1


def file_of(fd: int) -> tuple[int, int]:
    """Return what tells the file behind a descriptor from every other one."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
