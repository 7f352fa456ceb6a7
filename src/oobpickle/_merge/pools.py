"""Pools of multiprocessing, of processes and of threads.

**What.** `of_pool` serves a ``multiprocessing.pool.Pool`` and a ``ThreadPool``.

**How it works.** ``apply_async``, whose callbacks fill a queue. A pool whose worker dies starts
another and waits for ever for the lost result. So a thread looks at its processes, 20 times a
second, which is twice as often as the pool itself replaces them. It does not ask for exit codes,
which would take them from the pool, but looks whether the pool has them.

**Lifetime.** The thread ends with the merge. The pool stays as it is.

**When it cannot.** With ``maxtasksperchild`` an exit code of 0 is taken for a worker's planned
end: so ``os._exit(0)`` in `func` is not seen there. A worker that is killed while it waits for work
may have the lock of the pool's queue: the error is raised, but ``terminate`` of that pool waits for
ever then, as it does without us. Nobody can tell who has that lock, so it is not released here.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable
from typing import Any, Final, NoReturn

from oobpickle._merge.engine import Engine, Queued, Ready, is_of, raise_from
from oobpickle._merge.work import Span

_INTERVAL_S: Final = 0.05


def of_pool(pool: Any) -> Engine:
    """Return what serves a pool."""
    return Threads(pool) if is_of(pool, "multiprocessing.pool", "ThreadPool") else Processes(pool)


class Threads(Queued):
    """A ``ThreadPool``: nothing is sent."""

    is_sending = False

    def __init__(self, pool: Any) -> None:
        super().__init__(pool._processes)
        self._pool = pool

    def submit(self, span: Span, function: Callable[..., Any], *arguments: Any) -> None:
        def succeed(value: Any) -> None:
            self.ready.put(Ready(span, [value].pop))

        def fail(error: BaseException) -> None:
            self.ready.put(Ready(span, functools.partial(raise_from, [error])))

        self._pool.apply_async(function, arguments, callback=succeed, error_callback=fail)


class Processes(Threads):
    """A ``Pool``, whose workers are watched."""

    is_sending = True

    def begin(self) -> None:
        if self.stop is not None:
            self.stop.show()
        self._watch = _Watch(self._pool, self._bury)
        try:
            self._watch.start()
        except BaseException:  # of a signal handler
            self._watch.end()
            raise

    def end(self) -> None:
        super().end()
        self._watch.end()
        if not self._pool._result_handler.is_alive():
            self._pool._cache.clear()  # nothing comes any more, and `terminate` asks that

    def submit(self, span: Span, function: Callable[..., Any], *arguments: Any) -> None:
        super().submit(span, without_exit, function, *arguments)

    def _bury(self, what: str) -> None:
        self.ready.put(Ready(None, functools.partial(_raise_broken, what)))


def without_exit(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a worker, which may not end the worker: its result would never come."""
    try:
        return function(*arguments)
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r}) was called in a worker") from error


def _raise_broken(what: str) -> NoReturn:
    from concurrent.futures.process import BrokenProcessPool

    raise BrokenProcessPool(f"{what} A multiprocessing.Pool alone would wait for ever.")


def _death_of(pid: int | None, code: int) -> str:
    how = f"exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"signal {-code}, {signal.Signals(-code).name}"
    return (
        f"process {pid} of the pool has ended ({how}) while results were waited for, and nobody "
        "knows which call it had. For SIGKILL look for the kernel's out-of-memory killer (dmesg), "
        "and use fewer workers or a smaller chunksize. Terminate the pool and make another."
    )


_TERMINATED: Final = "the pool was terminated while results were waited for."
_NO_READER: Final = (
    "the thread of the pool that takes its results has ended: a result could not be loaded in this "
    "process (its traceback is on stderr). Terminate the pool and make another."
)


class _Watch(threading.Thread):
    """Looks for processes of a pool that have ended otherwise than the pool wanted."""

    def __init__(self, pool: Any, tell: Callable[[str], None]) -> None:
        super().__init__(name="oobpickle-merge-watch", daemon=True)
        self._pool = pool
        self._tell = tell
        self._is_over = threading.Event()
        # From before the first call: one that dies soon is replaced, and no longer listed.
        self._known = {id(process): process for process in list(pool._pool)}

    def run(self) -> None:
        known, self._known = self._known, {}  # they have descriptors
        while not self._is_over.wait(_INTERVAL_S):
            known.update((id(process), process) for process in list(self._pool._pool))
            found = self._death_among(known)
            if found is None and not self._pool._result_handler.is_alive():
                found = _NO_READER if self._pool._state == "RUN" else _TERMINATED
            if found is not None:
                self._tell(found)
                return

    def _death_among(self, known: dict[int, Any]) -> str | None:
        for key, process in list(known.items()):
            code = getattr(process._popen, "returncode", None)
            if code is not None:
                del known[key]
                if self._is_death(code):
                    return _death_of(process.pid, code)
        return None

    def _is_death(self, code: int) -> bool:
        if code != 0:
            return True
        return self._pool._state == "RUN" and self._pool._maxtasksperchild is None

    def end(self) -> None:
        self._is_over.set()
        if self.ident is not None:
            self.join()
