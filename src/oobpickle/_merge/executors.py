"""Executors of concurrent.futures: the standard library's, loky's, Dask's, and any other.

**What.** `of_executor` serves any ``concurrent.futures.Executor``.

**How it works.** ``submit``, and callbacks of the futures, which fill a queue. What another
library's executor delivers may be read-only or somebody else's too, so its left operands are
copied.

**Lifetime.** Futures that have not begun are cancelled when a merge fails.

**When it cannot.** A worker that dies is what the executor says it is: ``BrokenProcessPool`` with
the standard library's and loky's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from oobpickle._merge.engine import Engine, Queued, Ready, is_of
from oobpickle._merge.work import Span

_LOKY = ("loky.process_executor", "joblib.externals.loky.process_executor")


def of_executor(executor: Any) -> Engine:
    """Return what serves an executor."""
    if is_of(executor, "concurrent.futures.thread", "ThreadPoolExecutor") and not is_of(
        executor, "concurrent.futures.interpreter", "InterpreterPoolExecutor"
    ):
        return Executor(executor, is_sending=False)
    if is_of(executor, "concurrent.futures.process", "ProcessPoolExecutor"):
        return Executor(executor, is_near=True)
    if any(is_of(executor, module, "ProcessPoolExecutor") for module in _LOKY):
        maps_files = is_of(executor, "joblib.executor", "MemmappingExecutor")
        return Executor(executor, is_near=True, owning="writable" if maps_files else "")
    return Executor(executor, is_sending=False, owning="private")


class Executor(Queued):
    """An executor.

    Parameters
    ----------
    is_sending, owning
        As in `Engine`.
    is_near : bool
        Whether its workers are processes of this machine.
    """

    def __init__(
        self, executor: Any, *, is_sending: bool = True, is_near: bool = False, owning: str = ""
    ) -> None:
        super().__init__(_n_workers(executor))
        self._executor = executor
        self._is_near = is_near
        self.is_sending = is_sending
        self.owning = owning
        self._futures: set[Any] = set()
        if owning == "private":
            self.stop = None  # its workers may be anywhere
            self.owning_here = "writable"

    def begin(self) -> None:
        if self._is_near and self.stop is not None:
            self.stop.show()

    def end(self) -> None:
        super().end()
        for future in list(self._futures):
            future.cancel()

    def submit(self, span: Span, function: Callable[..., Any], *arguments: Any) -> None:
        future = self._executor.submit(function, *arguments)
        self._futures.add(future)

        def end(future: Any) -> None:
            self._futures.discard(future)
            self.ready.put(Ready(span, functools.partial(_result_in, [future])))

        future.add_done_callback(end)


def _result_in(box: list[Any]) -> Any:
    return box.pop().result()


def _n_workers(executor: Any) -> int:
    for name in ("_max_workers", "num_workers"):  # the latter is mpi4py's
        found = getattr(executor, name, None)
        if isinstance(found, int) and found > 0:
            return found
    client: Any = getattr(executor, "_client", None)
    if is_of(client, "distributed", "Client"):
        return sum(client.nthreads().values())
    return os.cpu_count() or 1
