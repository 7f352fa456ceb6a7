"""Copying much memory at once, on two cores where there are two.

**What.** `copy_array` is ``np.copyto`` for arrays of one shape and dtype, `copy_bytes` the same for
memory of one size.

**How it works.** One core alone cannot move as much as memory can: two reach 1.6 times the rate
here. So a large copy is cut into pieces, and a helper thread takes some of them if it gets a core
in time; the caller takes pieces until none is left, and then waits for the helper's last one. Two
cores that share a memory bus spend more time in sum than one, so there is a helper only while a
core is idle: in a pool that is busy, throughput counts.

**Lifetime.** The helper lives for one copy. It never writes after `copy_array` has returned. After
an interrupt it may: so memory that must not be written any more is not passed on while `is_busy`.

**When it cannot.** Without a second core, or a second thread, the caller copies everything."""

from __future__ import annotations

import _thread
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

from oobpickle._foreign import pass_on_foreign

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LEAST_NBYTES: Final = 32 << 20
_PIECE_NBYTES: Final = 8 << 20
_SMALL_NBYTES: Final = 32 << 10


class _Job:
    """The pieces of one copy that nobody has taken yet.

    Alive as long as anybody may write; longer, if the traceback of an interrupt is kept.
    """

    __slots__ = ("__weakref__", "has_helper", "pieces")

    def __init__(self, pieces: list[tuple[Array, Array]]) -> None:
        self.pieces = pieces
        self.has_helper = True


_jobs: Final[set[weakref.ref[_Job]]] = set()


def is_busy() -> bool:
    """Tell whether a copy of this process, also one that was interrupted, may still be writing."""
    if not _jobs:
        return False
    jobs = [reference() for reference in list(_jobs)]
    return any(job is not None and job.has_helper for job in jobs)


def forget() -> None:
    """In a forked child: the threads that copied do not exist here."""
    _jobs.clear()


def copy_array(destination: Array, source: Array) -> None:
    """Copy; the GIL is released meanwhile."""
    import numpy as np

    if destination.nbytes < _LEAST_NBYTES or not _is_a_core_idle():
        np.copyto(destination, source)
        return
    _copy_with_helper(_Job(_pieces(destination, source)))


def copy_bytes(destination: memoryview, source: bytes | memoryview) -> None:
    """Copy contiguous bytes; if they are many, the GIL is released meanwhile."""
    if len(source) <= _SMALL_NBYTES:
        destination[:] = source
        return
    import numpy as np

    copy_array(np.frombuffer(destination, np.uint8), np.frombuffer(source, np.uint8))


def _is_a_core_idle() -> bool:
    try:
        with open("/proc/loadavg") as file:  # 0.01 0.05 0.01 running/all last-pid
            running = int(file.read().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError) as error:
        pass_on_foreign(error)
        return False
    return running < len(os.sched_getaffinity(0))


def _pieces(destination: Array, source: Array) -> list[tuple[Array, Array]]:
    n_rows = len(destination)
    step = max(1, n_rows * _PIECE_NBYTES // destination.nbytes)
    starts = range(0, n_rows, step)
    return [(destination[at : at + step], source[at : at + step]) for at in starts]


def _copy_with_helper(job: _Job) -> None:
    # The job dies with this frame and with the helper's, whatever interrupts the one or the other.
    _jobs.add(weakref.ref(job, _jobs.discard))
    helping = threading.Lock()
    try:
        try:
            _thread.start_new_thread(_help, (job, helping))
        except RuntimeError:  # no thread to be had
            job.has_helper = False
        _copy_pieces(job)
    finally:
        job.pieces.clear()  # from here on the helper finds none; it may have one
        _wait_for(helping)


def _help(job: _Job, helping: threading.Lock) -> None:
    with helping:
        try:
            _copy_pieces(job)
        finally:
            job.has_helper = False


def _copy_pieces(job: _Job) -> None:
    import numpy as np

    pieces = job.pieces
    while pieces:
        try:
            destination, source = pieces.pop()
        except IndexError:  # the other one took the last
            return
        np.copyto(destination, source)


def _wait_for(lock: threading.Lock) -> None:
    interrupt: BaseException | None = None
    while True:
        try:
            with lock:
                break
        except BaseException as error:  # a Ctrl-C: the helper is still writing
            interrupt = error
    if interrupt is not None:
        raise interrupt
