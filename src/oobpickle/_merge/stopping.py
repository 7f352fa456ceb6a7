"""The word that the rest is called off, as every worker of this machine can see it.

**What.** `Stop` is given to each call. When it is set, workers end after the piece in hand.

**How it works.** It has a nameless file open, and is set by closing it. A worker looks at
``/proc/PID/fd/N`` of the process that merges, 2 us for each piece: as long as the link names that
file, the merge goes on. Pools have nothing of the kind: what is queued cannot be taken back, and
their own events can only be inherited.

**Lifetime.** The file is closed at the end of the merge. A process that is killed closes it too,
so its workers stop working for nobody. A forked child closes its own descriptor at once.

**When it cannot.** Without ``/proc`` or a descriptor to spare, and in a worker that may not look
(of another user), calls that are under way go on to their ends, and their results are dropped.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import Any

_open: dict[int, int] = {}  # whose it is, as a number: it keeps nothing
_forking = threading.RLock()  # held while this process forks


class Stop:
    """Whether the rest is called off; sent to another process it becomes a `Watcher`."""

    def __init__(self) -> None:
        self._is_set = False
        self._fd: int | None = None
        self._link = ""
        self._inode = 0

    def show(self) -> None:
        """Let other processes see it."""
        _close_in_children()
        name = f"oobpickle-merge-{os.urandom(8).hex()}"
        try:
            with _forking:  # else a child of another thread would keep it
                self._fd = os.memfd_create(name)
                _open[self._fd] = id(self)
            self._inode = os.fstat(self._fd).st_ino
            self._link = os.readlink(f"/proc/self/fd/{self._fd}")
        except (OSError, AttributeError):  # seen by nobody, then
            self._link = ""

    def is_set(self) -> bool:
        """Tell whether to end."""
        return self._is_set

    def set(self) -> None:
        """Call the rest off. No error if it is called off already."""
        self._is_set = True
        fd = self._fd
        if fd is None:
            return
        # An interrupt may come anywhere here, and then this is called again.
        if _open.get(fd) == id(self):
            with _forking:
                with contextlib.suppress(OSError):  # closed the time before
                    if os.fstat(fd).st_ino == self._inode:
                        os.close(fd)
                _open.pop(fd, None)
        self._fd = None

    __del__ = set

    def __reduce__(self) -> tuple[Any, ...]:
        return Watcher, (os.getpid(), self._fd, self._link)


class Watcher:
    """A `Stop` of another process."""

    def __init__(self, pid: int, fd: int | None, link: str) -> None:
        self._pid = pid
        self._path = f"/proc/{pid}/fd/{fd}"
        self._link = link

    def is_set(self) -> bool:
        """Tell whether to end."""
        if not self._link:
            return False
        try:
            return os.readlink(self._path) != self._link
        except FileNotFoundError:
            return self._may_look()
        except OSError:
            return False

    def _may_look(self) -> bool:
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # hidden, since it is another user's
            return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a Watcher is not sent on")


@functools.cache
def _close_in_children() -> None:
    def close() -> None:
        _forking.release()
        for fd in list(_open):
            _open.pop(fd)
            os.close(fd)

    os.register_at_fork(
        before=_forking.acquire, after_in_parent=_forking.release, after_in_child=close
    )
