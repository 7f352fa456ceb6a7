"""Exclusion around every step on the ledger: between threads, then between processes.

**What.** `LedgerMutex.run` runs one short step while nobody else, in any process of the arena,
runs one. `ThreadLock` is its first half, for state that only this process has.

**How it works.** First an in-process lock, then the ledger's byte of the locks file, tried
without giving up the GIL and retried with short sleeps *outside*. A dirty word in the ledger is
set around each step: whoever finds it set follows someone who died in the middle, and repairs the
table first.

A KeyboardInterrupt can come between any two bytecodes. So each lock is given back in a
``finally`` by one C call that is harmless when the lock is not held; the interpreter delivers no
interrupt before it.

**Lifetime.** The kernel gives the byte back when its holder dies. A forking thread keeps the
in-process lock from the *before* to the *after* hook, never the ledger's byte.

**When it cannot.** `LedgerBusyError` after `timeout_s` (a stopped holder, a fork in progress),
and at once when a finalizer or signal handler comes here from inside a step of the same thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from oobpickle import _faults, _system
from oobpickle._errors import ArenaFullError
from oobpickle._memory.descriptors import ClosedDescriptorError
from oobpickle._memory.layout import H_DIRTY
from oobpickle._memory.locks import LockFile

_FIRST_PAUSE_S: Final = 20e-6
_LAST_PAUSE_S: Final = 2e-3
_NO_CALL: Final = (-1, _system.F_OFD_SETLK, None)
_LONGEST_FORK_S: Final = 10.0  # from the last of the before hooks to the first of the after hooks

#: Turned on by one at the end of each fork, by a hook that is a C call and so is never interrupted:
#: its first item tells whether a fork that kept a `ThreadLock` is over.
fork_wheel: Final = deque(range(1024))


class LedgerBusyError(ArenaFullError):
    """A lock could not be had in time; `is_own`: this very thread has it."""

    def __init__(self, message: str, reason: str = "busy", *, is_own: bool = False) -> None:
        super().__init__(message, reason)
        self.is_own = is_own


class ThreadLock:
    """An in-process lock that an interrupt cannot leave locked, and that its owner cannot
    re-enter."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = 0  # the thread that is in `run`
        self._fork: int | None = None  # what `fork_wheel` showed when a fork took the lock

    def run(self, timeout_s: float, call: Callable[..., Any], *args: Any) -> Any:
        """Return ``call(*args)``, run under the lock.

        Raises
        ------
        LedgerBusyError
            If another thread has it for `timeout_s` seconds, or this thread has it already.
        """
        lock = self._lock
        if lock._is_owned() and not self._heal():  # type: ignore[attr-defined]
            raise LedgerBusyError("in use by this very thread, below a finalizer", is_own=True)
        release = lock.release
        me = threading.get_ident()
        try:
            if not lock.acquire(timeout=timeout_s):
                raise LedgerBusyError(f"in use by another thread for {timeout_s} s")
            self._inside = me
            return call(*args)
        finally:
            if self._inside == me:
                self._inside = 0
            try:  # noqa: SIM105 - a context manager would let an interrupt in before the release
                release()
            except RuntimeError:
                pass  # not ours: the wait for it timed out

    @property
    def in_use_below(self) -> bool:
        """Whether this thread is inside `run`, in whose middle a signal handler or finalizer is."""
        return self._inside == threading.get_ident()

    def enter_fork(self) -> None:
        """Keep the other threads of this process out until `leave_fork`.

        Again after an interrupt; and not for ever: a thread whose own fork hooks were aborted may
        have the lock and not come back.
        """
        if self.in_use_below:
            return  # the lock is kept already, and is not the fork's to release
        if not self._lock._is_owned():  # type: ignore[attr-defined]
            self._lock.acquire(timeout=_LONGEST_FORK_S)
        self._fork = fork_wheel[0]

    def leave_fork(self) -> None:
        """Let the other threads in again (in the parent), if `enter_fork` kept them out."""
        if self._lock._is_owned() and not self.in_use_below:  # type: ignore[attr-defined]
            self._fork = None
            self._lock.release()

    def _heal(self) -> bool:
        """Release a lock that a fork of this thread has left: signals aborted both its hooks."""
        if self._fork in (None, fork_wheel[0]):
            return False
        self.leave_fork()
        return True

    def reset_in_child(self) -> None:
        """Start anew in a forked child, where the other threads do not exist."""
        self._lock = threading.RLock()
        self._inside = 0
        self._fork = None


class LedgerMutex:
    """The two locks around the ledger.

    Parameters
    ----------
    locks : LockFile
        This process's description of the locks file.
    words : memoryview
        The ledger, as 64-bit words.
    repair : callable
        Called under both locks, after somebody died, was interrupted or failed in a step.
    """

    def __init__(self, locks: LockFile, words: memoryview, repair: Callable[[], None]) -> None:
        self.threads = ThreadLock()
        self.locks = locks
        self._words = words
        self._repair = repair
        self._interrupted = False

    def run(self, timeout_s: float, step: Callable[..., Any], *args: Any) -> Any:
        """Return ``step(*args)``, run under both locks.

        Raises
        ------
        LedgerBusyError
            If they cannot be had within `timeout_s` seconds, or this thread is inside a step.
        """
        return self.threads.run(timeout_s, self.run_owned, timeout_s, step, *args)

    def run_owned(self, timeout_s: float, step: Callable[..., Any], *args: Any) -> Any:
        """Do the same for a thread that owns the in-process lock already."""
        words = self._words
        locks = self.locks
        unlock_call = locks.unlock_call
        unlock = _system.fcntl_keeping_gil
        try:
            try:
                if not locks.try_lock():
                    self._wait(timeout_s)
            except ClosedDescriptorError:
                unlock_call = _NO_CALL  # the number is another file's, and so are its locks
                raise
            _faults.reach("mutex.locked")
            if words[H_DIRTY] or self._interrupted:
                words[H_DIRTY] = 1
                self._repair()
            words[H_DIRTY] = 1
            self._interrupted = True
            result = step(*args)
            self._interrupted = False
            words[H_DIRTY] = 0
            _faults.reach("mutex.clean")
            return result
        finally:
            unlock(*unlock_call)
            locks.see_to_loss()

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        pause_s = _FIRST_PAUSE_S
        while not self.locks.try_lock():
            if time.monotonic() >= deadline:
                raise LedgerBusyError(f"the ledger is in use by another process for {timeout_s} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
