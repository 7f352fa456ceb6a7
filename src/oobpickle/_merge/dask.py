"""Dask: the calls of a merge as tasks of a cluster.

**What.** `Dask` serves a ``distributed.Client``.

**How it works.** Partial results stay in the memory of the worker that made them, and go from
worker to worker. What a worker keeps may be asked for again, by a task that is retried or by
another worker, so a left operand is copied before it is changed.

**Lifetime.** The cluster keeps a partial result as long as we have its future, or what is made of
it is not there yet. A worker that dies takes its partial results with it; the scheduler has them
made again.

**When it cannot.** An asynchronous client is refused. A task that has begun is not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from oobpickle._merge.engine import Queued, Ready
from oobpickle._merge.work import Span
from oobpickle._merge.writing import writable


class Dask(Queued):
    """A ``distributed.Client``."""

    is_remote = True
    ends_early = False
    owning = "private"
    is_sending = False  # in one process with its workers

    def __init__(self, client: Any) -> None:
        if client.asynchronous:
            raise TypeError(
                "merge() waits for the cluster, which an asynchronous distributed.Client does not "
                "allow: make the client without asynchronous=True, or give client.get_executor()"
            )
        super().__init__(sum(client.nthreads().values()))
        self.stop = None
        self._client = client
        self._futures: dict[str, Any] = {}

    def end(self) -> None:
        super().end()
        futures = list(self._futures.values())
        self._futures.clear()
        if futures:
            self._client.cancel(futures)

    def submit(self, span: Span, function: Callable[..., Any], *arguments: Any) -> None:
        future = self._client.submit(function, *arguments, pure=False)
        self._futures[future.key] = future

        def end(future: Any) -> None:
            self.ready.put(Ready(span, partial(self._checked, [future])))

        future.add_done_callback(end)

    def _checked(self, box: list[Any]) -> Any:
        future = box.pop()
        self._futures.pop(future.key, None)
        if future.status in ("finished", "pending", "lost"):  # the latter are made again
            return future
        error = future.exception()
        del future  # or an error that is kept keeps it, and the cluster what it stands for
        raise error or RuntimeError("a call of merge() was cancelled")

    def wants(self, n_waiting: int, n_calls: int) -> bool:
        return True

    def fetch(self, value: Any) -> Any:
        return writable(value.result())
