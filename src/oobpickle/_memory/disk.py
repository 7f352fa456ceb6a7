"""The file on disk of an arena that may spill: the folder is tried before anything starts.

**What.** `open_in` opens the file, `folder_of` says where it lies.

**How it works.** It has no name in the folder (``O_TMPFILE``, else it is unlinked at once), and is
as sparse as the file in memory. What is needed later is done once now: a block is given room
(``fallocate``), written, mapped and given back (``FALLOC_FL_PUNCH_HOLE``).

**Lifetime.** The kernel frees the file with its last descriptor and mapping, however the processes
end. On NFS the server sees a name until then, and keeps it if the client dies.

**When it cannot.** An `OSError` of the kind that the system gave, which says what to do. What goes
wrong later, a disk that is full or a write that it refuses, is a fallback (reason ``disk``)."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final

from oobpickle._errors import format_nbytes
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.backing import open_unlinked, set_size
from oobpickle._native import core

_DELETED: Final = " (deleted)"
_WHAT: Final[dict[str, str]] = {
    "fallocate": "reserve room in a file (fallocate)",
    "write": "write to a file",
    "mmap": "map a file",
    "punch": "give a part of a file back (fallocate with FALLOC_FL_PUNCH_HOLE)",
}
_TO_DO: Final[dict[int, str]] = {
    errno.ENOENT: "Make it first (os.makedirs), or name another folder.",
    errno.ENOTDIR: "Name a folder.",
    errno.EACCES: "Name a folder that this user may write to.",
    errno.EPERM: "Name a folder that this user may write to.",
    errno.EROFS: "Name a folder that is not mounted read-only.",
    errno.ENOSPC: "Make room there, or name a folder on another disk.",
    errno.EDQUOT: "Make room there, or name a folder on another disk.",
    errno.EOPNOTSUPP: "Name a folder on a local ext4, XFS or Btrfs.",
}


def open_in(folder: str, nbytes: int) -> int:
    """Open an empty file of so many bytes, all holes, in a folder; return its descriptor.

    Parameters
    ----------
    folder : str
        An absolute path.
    nbytes : int
        The longest that is wanted; it is less where the file system takes no more.

    Raises
    ------
    OSError
        If no file can be had there that does what is needed.
    """
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        fd = open_unlinked(folder)
    except OSError as error:
        pass_on_foreign(error)
        raise _refusal(folder, "make a file", error.errno) from error
    try:
        os.fchmod(fd, 0o600)
        set_size(fd, nbytes)
        refused = core.try_disk(fd)
        if refused is not None:
            raise _refusal(folder, _WHAT[refused[0]], refused[1])
    except BaseException as error:
        os.close(fd)
        pass_on_foreign(error)
        if not isinstance(error, OSError) or error.filename == folder:
            raise
        raise _refusal(folder, f"make a file of {format_nbytes(nbytes)}", error.errno) from error
    return fd


def _refusal(folder: str, what: str, number: int | None) -> OSError:
    number = number or errno.EIO
    text = f"spill_dir cannot be used: this process cannot {what} there: {os.strerror(number)}"
    return OSError(number, f"{text}. {_TO_DO.get(number, 'Name another folder.')}", folder)


def folder_of(fd: int) -> str | None:
    """Return the folder that a file without a name was made in; ``None`` if nothing tells."""
    with contextlib.suppress(OSError):
        path = os.readlink(f"/proc/self/fd/{fd}").removesuffix(_DELETED)
        if os.path.isabs(path):
            return os.path.dirname(path)
    return None
