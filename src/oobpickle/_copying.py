"""Copying much memory at once, on two cores where there are two.

**What.** `copy_array` is ``np.copyto`` for arrays of one shape and dtype.

**How it works.** One core alone cannot move as much as memory can: two reach 1.6 times the rate
here. So a large copy is cut into pieces, and a helper thread takes some of them if it gets a core
in time; the caller takes pieces until none is left, and then waits for the helper's last one. Two
cores that share a memory bus spend more time in sum than one, so there is a helper only while a
core is idle: in a pool that is busy, throughput counts.

**Lifetime.** The helper lives for one copy. It never writes after `copy_array` has returned or
raised, since the destination may belong to somebody else then.

**When it cannot.** Without a second core, or a second thread, the caller copies everything."""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LEAST_NBYTES: Final = 32 << 20
_PIECE_NBYTES: Final = 8 << 20


def copy_array(destination: Array, source: Array) -> None:
    """Copy; the GIL is released meanwhile."""
    import numpy as np

    if destination.nbytes < _LEAST_NBYTES or not _is_a_core_idle():
        np.copyto(destination, source)
        return
    _copy_with_helper(_pieces(destination, source))


def _is_a_core_idle() -> bool:
    try:
        with open("/proc/loadavg") as file:  # 0.01 0.05 0.01 running/all last-pid
            running = int(file.read().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return False
    return running < len(os.sched_getaffinity(0))


def _pieces(destination: Array, source: Array) -> list[tuple[Array, Array]]:
    n_rows = len(destination)
    step = max(1, n_rows * _PIECE_NBYTES // destination.nbytes)
    starts = range(0, n_rows, step)
    return [(destination[at : at + step], source[at : at + step]) for at in starts]


def _copy_with_helper(pieces: list[tuple[Array, Array]]) -> None:
    helping = threading.Lock()
    try:
        with contextlib.suppress(RuntimeError):  # no thread to be had
            _thread.start_new_thread(_help, (pieces, helping))
        _copy_pieces(pieces)
    finally:
        pieces.clear()  # from here on the helper finds none; it may have one
        _wait_for(helping)


def _help(pieces: list[tuple[Array, Array]], helping: threading.Lock) -> None:
    with helping:
        _copy_pieces(pieces)


def _copy_pieces(pieces: list[tuple[Array, Array]]) -> None:
    import numpy as np

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
