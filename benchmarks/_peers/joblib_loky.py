"""joblib with its default backend, loky: large arguments become memory maps.

What
    ``Parallel(n_jobs)(delayed(task)(model))``, with the defaults of joblib: arrays above 1 MB among
    the arguments are dumped once into a file (in ``/dev/shm``) and mapped read-only by all workers;
    results are pickled.

How it works
    https://joblib.readthedocs.io/en/stable/parallel.html#working-with-numerical-data-in-shared-memory-memmapping
    Workers stay between calls. ``with Parallel(...)`` is not used: within it, an array that was
    changed in place would arrive as it was first dumped. One job would run in the parent, so there
    are at least two workers, and each of them has the model.

Lifetime
    The dumped files go with the call; the workers with `stop`.

When it cannot
    Nothing says which worker gets a task: one that is quick may get two models of one `send`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor

from _peers._peer import Peer, Task
from _peers._work import Model, change, keep, make_result

_START_TRIES = 200


class Joblib(Peer):
    """Calls of ``Parallel``."""

    def __init__(self) -> None:
        self._n_receivers = 0
        self._n_jobs = 0

    def start(self, n_workers: int, nbytes: int) -> None:
        self._n_receivers, self._n_jobs = n_workers, max(2, n_workers)
        found: set[int] = set()
        for _ in range(_START_TRIES):
            found.update(self._parallel(delayed(keep)(nbytes) for _ in range(self._n_jobs)))
            if len(found) >= self._n_jobs:
                return
        raise RuntimeError(f"only {len(found)} of {self._n_jobs} workers took a task")

    def stop(self) -> None:
        get_reusable_executor().shutdown(wait=True)

    def result(self, stamp: int) -> Model:
        return self._one(delayed(make_result)(stamp))

    def send(self, task: Task, model: Model) -> list[Any]:
        return self._parallel(delayed(task)(model) for _ in range(self._n_receivers))

    def exchange(self, model: Model) -> Model:
        return self._one(delayed(change)(model))

    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        calls = (delayed(make_result)(stamp) for _ in range(n_results))
        parallel = Parallel(n_jobs=self._n_jobs, batch_size=1, return_as="generator_unordered")
        yield from parallel(calls)

    def collect(self, n_results: int, stamp: int) -> list[Model]:
        return self._parallel(delayed(make_result)(stamp) for _ in range(n_results))

    def _one(self, call: Any) -> Model:
        model: Model = self._parallel([call])[0]
        return model

    def _parallel(self, calls: Any) -> list[Any]:
        found: list[Any] = Parallel(n_jobs=self._n_jobs, batch_size=1, pre_dispatch="all")(calls)
        return found
