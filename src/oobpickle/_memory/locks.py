"""The locks file: exclusion between processes, and the proof that a process is alive.

**What.** A `LockFile` is one participant's own open file descriptions of a shared, nameless file.
Byte 0 is the ledger's lock; byte ``1 + slot`` is held for life by the participant with that slot.

**How it works.** Open file description locks (``F_OFD_SETLK``) belong to a description, and the
kernel drops them when the last reference to it is gone, which it sees to however a process dies.
Classic POSIX locks would vanish as soon as *any* descriptor of the file is closed in the process.
So each participant opens descriptions of its own through ``/proc/self/fd``::

    handle (inherited, never locked) --open--> for steps: byte 0 for moments
                                     --open--> for life: byte 1+slot

**Lifetime.** One page of each description is mapped with ``MADV_DONTFORK``: that keeps the
description alive if someone closes the descriptor (``os.closerange``), and still ends with the
process although a forked child lives on. If the descriptor for steps is closed in the middle of
one, its lock stays until its page is unmapped, right after the step; that is why there are two. A
forked child inherits the descriptors; it must close them and never unlock (`abandon`). What is
behind a descriptor is compared before it is used and, since another thread may close it in
between, after: no strange file is left locked, and nobody is taken for dead because of one.

**When it cannot.** Without ``/proc`` there is no second description; then there is no arena.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from oobpickle import _system
from oobpickle._errors import ArenaError
from oobpickle._foreign import ignoring
from oobpickle._memory.descriptors import ClosedDescriptorError, File, OwnDescriptor, is_file

_LEDGER_BYTE: Final = 0
_WHAT: Final = "the arena's lock"


class _Description:
    """An open file description of our own; it outlives its descriptor."""

    __slots__ = ("_address", "_own", "fd")

    def __init__(self, handle: int, file: File | None) -> None:
        self.fd, self._address = -1, 0
        self._own: OwnDescriptor | None = None
        # Before it is opened: to open a strange file can have effects.
        if file is not None and not is_file(handle, file):
            raise ClosedDescriptorError.of(handle, _WHAT)
        try:
            self.fd = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
            self._own = OwnDescriptor(self.fd)
            if file not in (None, self._own.file):
                raise ClosedDescriptorError.of(handle, _WHAT)
            self._map()
        except BaseException:  # a Ctrl-C
            self.close()
            raise

    def _map(self) -> None:
        # Without the page we only lose the protection against closerange.
        with ignoring(OSError):
            page = _system.PAGE_NBYTES
            self._address = _system.map_memory(self.fd, 0, page, flags=_system.MAP_SHARED)
            _system.advise(self._address, page, _system.MADV_DONTFORK)
            _system.advise(self._address, page, _system.MADV_DONTDUMP)

    @property
    def file(self) -> File | None:
        return None if self._own is None else self._own.file

    def is_intact(self) -> bool:
        """Tell whether the descriptor is still ours."""
        own = self._own
        return own is not None and self.fd >= 0 and own.is_intact()

    def check(self) -> None:
        """Raise `ClosedDescriptorError` if the descriptor is not ours any more."""
        if not self.is_intact():
            raise ClosedDescriptorError.of(self.fd, _WHAT)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's description without unlocking anything."""
        self._address = 0  # MADV_DONTFORK: not mapped here
        self._close_fd()

    def unmap(self) -> None:
        """Let the description end with its descriptor; its locks end with it."""
        address, self._address = self._address, 0
        if address:
            _system.unmap_memory(address, _system.PAGE_NBYTES)

    def close(self) -> None:
        """Give up all its locks."""
        self.unmap()
        self._close_fd()

    def _close_fd(self) -> None:
        fd, own = self.fd, self._own
        if own is not None:
            own.close()
        elif fd >= 0:
            with ignoring(OSError):
                os.close(fd)
        self.fd = -1


class LockFile:
    """This process's descriptions of the locks file behind `handle`.

    Parameters
    ----------
    handle : int
        A descriptor of the file; it is not kept.
    file : (int, int), optional
        Device and inode that it must have.

    Raises
    ------
    OSError
        EMFILE, EACCES, ENOENT of open(2): no description can be had.
    ClosedDescriptorError
        If the handle is another file's by now.
    """

    __slots__ = ("_life", "_lock", "_steps", "_unlock", "fd", "unlock_call")

    def __init__(self, handle: int, file: File | None = None) -> None:
        self._lock = _system.flock_argument(lock=True, byte=_LEDGER_BYTE)
        self._unlock = _system.flock_argument(lock=False, byte=_LEDGER_BYTE)
        self._steps = _Description(handle, file)
        try:
            self.fd = self._steps.fd
            #: Arguments with which ``fcntl`` gives the ledger's lock back, in one C call.
            self.unlock_call = self.fd, _system.F_OFD_SETLK, self._unlock
            self._life = _Description(handle, self._steps.file)  # last: nothing would close it
        except BaseException:  # a Ctrl-C
            self._steps.close()
            raise

    def is_intact(self) -> bool:
        """Tell whether nobody has closed our descriptors."""
        return self._steps.is_intact() and self._life.is_intact()

    @property
    def descriptors(self) -> tuple[int, int]:
        """What a forked child inherits of it."""
        return self._steps.fd, self._life.fd

    def try_lock(self) -> bool:
        """Take the ledger's lock, or return ``False`` at once if another process has it.

        Raises
        ------
        ClosedDescriptorError
            If our descriptor was closed: a lock on the file that has its number now would exclude
            nobody. No lock is left there.
        ArenaError
            If the kernel refuses otherwise.
        """
        steps = self._steps
        if not steps.is_intact():
            steps.unmap()
            steps.check()
        if _system.fcntl_keeping_gil(self.fd, _system.F_OFD_SETLK, self._lock) != 0:
            if ctypes.get_errno() in (errno.EAGAIN, errno.EACCES):
                return False
            raise ArenaError(f"locking failed: {os.strerror(ctypes.get_errno())}")
        if not steps.is_intact():  # closed by another thread a moment ago
            _system.fcntl_keeping_gil(*self.unlock_call)
            steps.unmap()
            steps.check()
        return True

    def see_to_loss(self) -> None:
        """After the lock was given back: if the descriptor had been closed, it was not; do so."""
        if not self._steps.is_intact():
            self._steps.unmap()

    def hold(self, slot: int) -> bool:
        """Hold the slot's byte until this process ends; ``False`` if a living one has it."""
        life = self._life
        life.check()
        held = _system.try_lock_byte(life.fd, 1 + slot)
        if not life.is_intact():
            _system.fcntl_keeping_gil(
                life.fd, _system.F_OFD_SETLK, _system.flock_argument(lock=False, byte=1 + slot)
            )
            life.check()
        return held

    def is_alive(self, slot: int) -> bool:
        """Tell whether another participant holds the slot's byte.

        Raises
        ------
        ClosedDescriptorError
            If our descriptor was closed: whoever has its number now knows of no locks.
        """
        life = self._life
        life.check()
        alive = _system.is_byte_locked(life.fd, 1 + slot)
        if not alive:
            life.check()
        return alive

    def abandon(self) -> None:
        """In a forked child: let go of the parent's descriptions without unlocking anything."""
        for description in (self._steps, self._life):
            description.abandon()
        self.fd = -1

    def close(self) -> None:
        """Give up the slot and all locks."""
        for description in (self._steps, self._life):
            description.close()
        self.fd = -1
