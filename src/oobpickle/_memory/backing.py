"""The nameless files of this system: which kinds there are, and how large one may be.

**What.** `open_nameless` opens one, `open_unlinked` one in a given folder; `set_size` and `seal`
give it a size and fix it, `largest_file_nbytes` says how large a sparse one may be here.

**How it works.** A memfd, else a file in ``/dev/shm``, else one in the temporary folder, which is
unlinked before anybody uses it. The environment can ask for one of them (`BACKING_VARIABLE`).

**Lifetime.** The kernel frees the file with its last descriptor and mapping.

**When it cannot.** `ArenaError`, with what each kind answered."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from typing import Final

from oobpickle._errors import ArenaError
from oobpickle._foreign import pass_on_foreign

BACKING_VARIABLE: Final = "OOBPICKLE_BACKING"

MIN_DATA_NBYTES: Final = 64 << 20
_ALIGN_NBYTES: Final = 2 << 20
_MFD_CLOEXEC: Final = 0x1
_MFD_ALLOW_SEALING: Final = 0x2
_MFD_NOEXEC_SEAL: Final = 0x8
_F_ADD_SEALS: Final = 1033
_SEALS: Final = 0x1 | 0x2 | 0x4  # SEAL, SHRINK, GROW: nobody can cut the file under a mapping


def open_nameless(name: str) -> int:
    """Open an empty file without a name; return its descriptor, close-on-exec.

    Raises
    ------
    ArenaError
        If the system offers none, or `BACKING_VARIABLE` none that there is.
    """
    wanted = os.environ.get(BACKING_VARIABLE, "")
    openers = {"memfd": _open_memfd, "shm": _open_shm, "tmp": _open_tmp}
    if wanted and wanted not in openers:
        raise ArenaError(f"{BACKING_VARIABLE} is {wanted!r}, expected one of {', '.join(openers)}")
    problems = []
    for backing, opener in openers.items():
        if wanted and backing != wanted:
            continue
        try:
            return opener(name)
        except OSError as error:
            pass_on_foreign(error)
            problems.append(f"{backing}: {error.strerror}")
    raise ArenaError(f"no shared memory on this system ({'; '.join(problems)})")


def _open_memfd(name: str) -> int:
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    try:
        return os.memfd_create(f"oobpickle-{name}", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:  # kernels before 6.3 do not know the flag
        pass_on_foreign(error)
        return os.memfd_create(f"oobpickle-{name}", flags)


def _open_shm(name: str) -> int:
    return open_unlinked("/dev/shm")


def _open_tmp(name: str) -> int:
    return open_unlinked(tempfile.gettempdir())


def open_unlinked(directory: str) -> int:
    """Open an empty file in a folder, without a name there."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:  # O_TMPFILE is not for every file system
        pass_on_foreign(error)
        fd, path = tempfile.mkstemp(dir=directory)
        os.unlink(path)
        os.set_inheritable(fd, False)
        return fd


def set_size(fd: int, nbytes: int) -> None:
    """Give a file so many bytes, all holes, or as many as its file system takes."""
    while True:
        try:
            os.ftruncate(fd, nbytes)
        except OSError as error:
            # What a file system takes as a sparse file can be less.
            if error.errno != errno.EFBIG or nbytes // 4 < MIN_DATA_NBYTES:
                raise
            nbytes //= 4
        else:
            return


def seal(fd: int) -> bool:
    """Let nobody change the size of a memfd any more: no mapping of it can be cut.

    Returns ``False`` for a file of another kind.
    """
    import fcntl

    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except OSError as error:
        pass_on_foreign(error)
        return False
    return True


def largest_file_nbytes(wanted: int) -> int:
    """Return how large a sparse file may be here, at most `wanted` bytes: see ``RLIMIT_FSIZE``."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    nbytes = wanted if limit == resource.RLIM_INFINITY else min(wanted, limit)
    return max(0, nbytes // _ALIGN_NBYTES * _ALIGN_NBYTES)
