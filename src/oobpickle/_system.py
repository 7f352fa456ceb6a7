"""The few system calls that Python's standard library does not offer, typed.

**What.** ``mmap`` at a fixed address, ``mremap(2)``, ``madvise`` and ``mprotect`` on a range,
``fallocate(2)``, open file description locks (``fcntl(2)``, ``F_OFD_*``) and two pipe queries.

**How it works.** ctypes on the C library that the interpreter itself uses. Calls that may take
long go through `ctypes.CDLL` (the GIL is released); the record locks go through `ctypes.PyDLL`
(the GIL is kept): the holder of a lock that gave up the GIL would wait for it, up to 5 ms, while
all other processes wait for the lock.

**Lifetime.** No state; addresses and descriptors belong to the callers.

**When it cannot.** `SUPPORTED` is false on anything but 64-bit Linux with ``/proc``; nothing else
of this module may then be used. `lacking` says why there can be no arena. Sources: mmap(2),
mremap(2), madvise(2), fallocate(2), fcntl(2), pipe(7).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import operator
import os
import sys
from collections.abc import Callable
from typing import Final

SUPPORTED: Final = (
    sys.platform == "linux" and sys.maxsize > 2**32 and os.path.isdir("/proc/self/fd")
)
#: Of the build: with ``PYTHON_GIL=1`` its collector and reference counts are still other ones.
FREE_THREADED: Final = "t" in getattr(sys, "abiflags", "")
PAGE_NBYTES: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

PROT_NONE: Final = 0x0
PROT_READ_WRITE: Final = 0x1 | 0x2
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2

MADV_DONTNEED: Final = 4
MADV_REMOVE: Final = 9
MADV_DONTFORK: Final = 10
MADV_HUGEPAGE: Final = 14
MADV_DONTDUMP: Final = 16
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23

_FALLOC_KEEP_SIZE: Final = 0x01
_FALLOC_PUNCH_HOLE: Final = 0x02

_F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_F_WRLCK: Final = 1
_F_UNLCK: Final = 2

FIONREAD: Final = 0x541B
SIOCOUTQ: Final = 0x5411


def _has_gil() -> bool:
    return not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled()


def lacking() -> str | None:
    """Return what an arena needs and is not here, and what to do; ``None`` if all is here."""
    if not SUPPORTED:
        return "this needs 64-bit Linux with /proc"
    if FREE_THREADED or not _has_gil():
        return (
            "this is a free-threaded Python, whose threads run at the same time, and what is done "
            "to shared memory between two bytecodes has not been made safe for that. Use the "
            "ordinary build of the same version (python3.14, not python3.14t)"
        )
    return None


class _Flock(ctypes.Structure):
    _fields_ = (
        ("l_type", ctypes.c_short),
        ("l_whence", ctypes.c_short),
        ("l_start", ctypes.c_int64),
        ("l_len", ctypes.c_int64),
        ("l_pid", ctypes.c_int),
    )


if SUPPORTED:
    _free = ctypes.CDLL(None, use_errno=True)
    _held = ctypes.PyDLL(None, use_errno=True)
    _mmap = _free.mmap
    _mmap.restype = ctypes.c_void_p
    _mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    _munmap = _free.munmap
    _munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _madvise = _free.madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _mprotect = _free.mprotect
    _mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _fallocate = _free.fallocate
    _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    #: ``madvise(address, nbytes, advice, ...)``, result and any further argument ignored.
    advise_ignoring = ctypes.CDLL(None).madvise
    advise_ignoring.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    #: ``mprotect(address, nbytes, protection, ...)`` likewise.
    protect_ignoring = ctypes.CDLL(None).mprotect
    protect_ignoring.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    #: ``fcntl(fd, command, flock)`` with the GIL held: for the one place that may not lose it.
    fcntl_keeping_gil = _held.fcntl
    fcntl_keeping_gil.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    _mremap = _held.mremap
    _mremap.restype = ctypes.c_void_p
    _mremap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    _memcpy = _held.memcpy
    _memcpy.restype = ctypes.c_void_p
    _memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    # Before version 2.33 glibc has it in its headers only.
    _fstat = getattr(ctypes.PyDLL(None), "fstat", None)

_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def flock_argument(*, lock: bool, byte: int) -> object:
    """Return a reusable argument for `fcntl_keeping_gil` that locks or unlocks one byte."""
    return ctypes.byref(_Flock(_F_WRLCK if lock else _F_UNLCK, os.SEEK_SET, byte, 1, 0))


def status_call(fd: int) -> tuple[Callable[[], int], memoryview] | None:
    """Return a call of fstat(2) that keeps the GIL, and the 64-bit words that it fills.

    Device and inode are the first two on every 64-bit system but one: compare them once.
    """
    if _fstat is None:
        return None
    words = (ctypes.c_uint64 * 32)()
    call = functools.partial(_fstat, ctypes.c_int(fd), ctypes.c_void_p(ctypes.addressof(words)))
    return call, memoryview(words).cast("B").cast("Q")


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def map_memory(
    fd: int,
    offset: int,
    nbytes: int,
    *,
    flags: int,
    address: int = 0,
    protection: int = PROT_READ_WRITE,
) -> int:
    """Map `nbytes` of `fd` from `offset`, readable and writable if not said; return the address.

    Raises
    ------
    OSError
        With the errno of mmap(2), for instance ENOMEM beyond ``RLIMIT_AS``.
    """
    mapped = _mmap(address or None, nbytes, protection, flags, fd, offset)
    if mapped == _MAP_FAILED or mapped is None:
        raise _error("mmap")
    return int(mapped)


def unmap_memory(address: int, nbytes: int) -> None:
    """Give up a mapping; errors are impossible for a range that we mapped."""
    _munmap(address, nbytes)


def map_anonymous(nbytes: int) -> int:
    """Map fresh private memory; return the address.

    Raises
    ------
    OSError
        With the errno of mmap(2).
    """
    return map_memory(-1, 0, nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)


def map_again(address: int, nbytes: int) -> int:
    """Map a file a second time, from the page that is mapped shared at `address`; return where.

    mremap(2) does that for an old size of 0. No descriptor is needed, and the new mapping may be
    longer than the old one.

    Raises
    ------
    OSError
        With the errno of mremap(2).
    """
    mapped = _mremap(address, 0, nbytes, _MREMAP_MAYMOVE, None)
    if mapped == _MAP_FAILED or mapped is None:
        raise _error("mremap")
    return int(mapped)


def move_mapping(address: int, nbytes: int, to: int) -> None:
    """Move a mapping over what is at `to`.

    Raises
    ------
    OSError
        With the errno of mremap(2).
    """
    if _mremap(address, nbytes, nbytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, to) == _MAP_FAILED:
        raise _error("mremap")


def copy_and_move_mapping(address: int, nbytes: int, to: int) -> None:
    """Copy what is at `to` to `address`, and move that mapping over it.

    The GIL is kept from the first byte on: both are done by one call in C, so no thread that
    writes there with the GIL comes in between.

    Raises
    ------
    OSError
        With the errno of mremap(2).
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
    calls = (
        functools.partial(_memcpy, address, to, nbytes),
        functools.partial(_mremap, address, nbytes, nbytes, flags, to),
    )
    if list(map(operator.call, calls))[1] == _MAP_FAILED:
        raise _error("mremap")


def protect(address: int, nbytes: int, protection: int) -> None:
    """Change how a range may be touched (mprotect(2)).

    Raises
    ------
    OSError
        ENOMEM where it would take more mappings than the system allows.
    """
    if _mprotect(address, nbytes, protection) != 0:
        raise _error("mprotect")


def advise(address: int, nbytes: int, advice: int) -> bool:
    """Call madvise(2), again after each signal; ``False`` where the kernel refuses the advice."""
    while _madvise(address, nbytes, advice) != 0:
        if ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):
            return False
    return True


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Give the range its pages (fallocate(2)); no file gets longer by it.

    Raises
    ------
    OSError
        With ENOSPC on a full mount, EOPNOTSUPP where the file system cannot.
    """
    while _fallocate(fd, _FALLOC_KEEP_SIZE, offset, nbytes) != 0:
        if ctypes.get_errno() != errno.EINTR:
            raise _error("fallocate")


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Give the pages of the range back to the system; it reads as zeros from then on."""
    while _fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, offset, nbytes) != 0:
        if ctypes.get_errno() != errno.EINTR:
            raise _error("fallocate(PUNCH_HOLE)")


def try_lock_byte(fd: int, byte: int) -> bool:
    """Lock one byte for this open file description; ``False`` if another one holds it."""
    if fcntl_keeping_gil(fd, F_OFD_SETLK, flock_argument(lock=True, byte=byte)) == 0:
        return True
    if ctypes.get_errno() in (errno.EAGAIN, errno.EACCES):
        return False
    raise _error("fcntl(F_OFD_SETLK)")


def is_byte_locked(fd: int, byte: int) -> bool:
    """Tell whether *another* open file description holds the byte."""
    query = _Flock(_F_WRLCK, os.SEEK_SET, byte, 1, 0)
    if fcntl_keeping_gil(fd, _F_OFD_GETLK, ctypes.byref(query)) != 0:
        raise _error("fcntl(F_OFD_GETLK)")
    return bool(query.l_type != _F_UNLCK)
