"""Copying much memory at once, on two cores where there are two.

**What.** `copy_array` is ``np.copyto`` for arrays of one shape and dtype, `copy_bytes` the same for
memory of one size.

**How it works.** One core alone cannot move as much as memory can: two reach 1.6 times the rate
here. So a large copy is cut into pieces, and a helper thread takes some of them if it gets a core
in time; the caller takes pieces until none is left, and then waits for the helper's last one. Two
cores that share a memory bus spend more time in sum than one, so there is a helper only while a
core is idle: in a pool that is busy, throughput counts. There is none where a signal handler of the
program could run between two pieces, and change what is copied.

**Lifetime.** The helper lives for one copy: when `copy_array` returns, the system has forgotten it,
or Python would warn of a fork in a process with threads. After an interrupt it may go on for
moments: so memory that must not be written any more is not passed on while `is_busy`.

**When it cannot.** Without a second core, or a second thread, the caller copies everything."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
import weakref
from _signal import getsignal  # type: ignore[import-not-found]  # makes no enum of the answer
from typing import TYPE_CHECKING, Any, Final

from oobpickle._foreign import pass_on_foreign

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LEAST_NBYTES: Final = 32 << 20
_PIECE_NBYTES: Final = 8 << 20
_SMALL_NBYTES: Final = 32 << 10
_MOST_S: Final = 1.0
_SIGNALS: Final = sorted(signal.valid_signals())


class _Job:
    """The pieces of one copy that nobody has taken yet.

    Alive as long as anybody may write; longer, if the traceback of an interrupt is kept.
    """

    __slots__ = ("__weakref__", "has_helper", "helper_id", "helping", "pieces")

    def __init__(self, pieces: list[tuple[Array, Array]]) -> None:
        self.pieces = pieces
        self.has_helper = True
        self.helper_id: int | None = None
        self.helping = threading.Lock()
        self.helping.acquire()  # released by the helper at its end


_jobs: Final[set[weakref.ref[_Job]]] = set()


def is_busy() -> bool:
    """Tell whether a copy of this process, also one that was interrupted, may still be writing."""
    if not _jobs:
        return False
    return any(job.has_helper for job in _known_jobs())


def _known_jobs() -> list[_Job]:
    return [job for reference in list(_jobs) if (job := reference()) is not None]


def forget() -> None:
    """In a forked child: the threads that copied do not exist here."""
    for job in _known_jobs():  # a signal handler may have forked below them
        job.has_helper, job.helper_id = False, None
        with contextlib.suppress(RuntimeError):
            job.helping.release()
    _jobs.clear()


def copy_array(destination: Array, source: Array) -> None:
    """Copy; the GIL is released meanwhile."""
    import numpy as np

    if destination.nbytes < _LEAST_NBYTES or _has_handlers() or not _is_a_core_idle():
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


def _has_handlers() -> bool:
    """Tell whether the program has signal handlers that may run in this thread.

    That of a Ctrl-C only raises, and what is half copied is not sent.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return False
    handlers = set(map(getsignal, _SIGNALS)) - {signal.default_int_handler}
    return any(map(callable, handlers))


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
    started: list[int] = []
    try:
        try:
            # In one step: whatever interrupts it, the list says whether there is a helper.
            started.extend(map(_thread.start_new_thread, (_help,), ((job,),)))
        except RuntimeError:  # no thread to be had
            job.has_helper = False
        _copy_pieces(job)
    finally:
        job.pieces.clear()  # from here on the helper finds none; it may have one
        if started:
            _wait_for(job.helping)
            _wait_until_gone(job)


def _help(job: _Job) -> None:
    try:
        job.helper_id = threading.get_native_id()
        _copy_pieces(job)
    finally:
        job.has_helper = False
        job.helping.release()


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


def _wait_until_gone(job: _Job) -> None:
    """Wait until the system has forgotten the helper, which has done its work."""
    deadline = time.monotonic() + _MOST_S
    interrupt: BaseException | None = None
    while True:
        try:
            while job.helper_id is not None and time.monotonic() < deadline:
                if not os.path.exists(f"/proc/self/task/{job.helper_id}"):
                    break
                time.sleep(0)
            break
        except BaseException as error:  # a Ctrl-C
            interrupt = error
    if interrupt is not None:
        raise interrupt
