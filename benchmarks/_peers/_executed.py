"""What `concurrent.futures.ProcessPoolExecutor` and its drop-in replacements share.

What
    `ExecutorPeer`: `submit` for each task, `as_completed` for what arrives.

How it works
    As in ``_pooled.py``, a barrier keeps each worker from getting two models of one `send`.

Lifetime
    Workers are started by `start` and ended by `stop`.

When it cannot
    A worker that dies breaks the executor: `BrokenProcessPool`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Iterator
from typing import Any

from _peers._peer import Peer, Task
from _peers._pooled import BARRIER_S
from _peers._work import Model, change, keep, make_result


def _begin(nbytes: int, barrier: Any) -> None:
    keep(nbytes, functools.partial(barrier.wait, BARRIER_S) if barrier else None)


class ExecutorPeer(Peer):
    """An executor, with a forked worker for each model that is held."""

    def __init__(self) -> None:
        self._executor: Any
        self._n_workers = 0

    def executor_class(self) -> Any:
        raise NotImplementedError

    def prepared(self, model: Model) -> Model:
        """What to submit in place of the model."""
        return model

    def start(self, n_workers: int, nbytes: int) -> None:
        self._n_workers = n_workers
        barrier = multiprocessing.Barrier(n_workers) if n_workers > 1 else None
        self._executor = self.executor_class()(
            n_workers, initializer=_begin, initargs=(nbytes, barrier)
        )

    def stop(self) -> None:
        self._executor.shutdown()

    def result(self, stamp: int) -> Model:
        return self._result(self._executor.submit(self.make_task(), stamp))

    def send(self, task: Task, model: Model) -> list[Any]:
        futures = [
            self._executor.submit(task, self.prepared(model)) for _ in range(self._n_workers)
        ]
        return [future.result() for future in futures]

    def exchange(self, model: Model) -> Model:
        return self._result(self._executor.submit(change, self.prepared(model)))

    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        futures = {self._executor.submit(self.make_task(), stamp) for _ in range(n_results)}
        for future in concurrent.futures.as_completed(futures):
            futures.remove(future)  # Else each model would live until the last one was merged.
            yield self._result(future)

    def collect(self, n_results: int, stamp: int) -> list[Model]:
        return list(self._executor.map(self.make_task(), [stamp] * n_results))

    def make_task(self) -> Any:
        return make_result

    def _result(self, future: Any) -> Model:
        model: Model = future.result()
        return model
