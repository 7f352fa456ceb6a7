"""Ray: actors that keep a model, and the object store between them.

What
    An actor for each worker; `ray.put` for an argument, so that it is stored once for all actors.

How it works
    Objects lie in shared memory and are immutable: arrays are read where they are, read-only.
    https://docs.ray.io/en/latest/ray-core/objects/serialization.html
    https://docs.ray.io/en/latest/ray-core/patterns/pass-large-arg-by-value.html
    https://docs.ray.io/en/latest/ray-core/actors.html

Lifetime
    The cluster of this machine is started once in the process; `stop` kills the actors.

When it cannot
    An object that does not fit into the store is spilled to a file system.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import ray

from _peers._peer import Peer, Task
from _peers._work import Model, change, keep, make_result

STORE_NBYTES = 9 << 30  # More than the rows need, so that nothing is spilled.


class _Holder:
    def keep(self, nbytes: int) -> int:
        return keep(nbytes)

    def make(self, stamp: int) -> Model:
        return make_result(stamp)

    def run(self, task: Task, model: Model) -> Any:
        return task(model)

    def change(self, model: Model) -> Model:
        return change(model)


class Ray(Peer):
    """Actors on a cluster of one machine."""

    def __init__(self) -> None:
        self._actors: list[Any] = []

    def start(self, n_workers: int, nbytes: int) -> None:
        if not ray.is_initialized():
            ray.init(
                address="local",
                num_cpus=n_workers,
                object_store_memory=STORE_NBYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
            )
        holder = ray.remote(num_cpus=1)(_Holder)
        self._actors = [holder.remote() for _ in range(n_workers)]
        ray.get([actor.keep.remote(nbytes) for actor in self._actors])

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()

    def result(self, stamp: int) -> Model:
        model: Model = ray.get(self._actors[0].make.remote(stamp))
        return model

    def send(self, task: Task, model: Model) -> list[Any]:
        stored = ray.put(model)
        answers: list[Any] = ray.get([actor.run.remote(task, stored) for actor in self._actors])
        return answers

    def exchange(self, model: Model) -> Model:
        changed: Model = ray.get(self._actors[0].change.remote(ray.put(model)))
        return changed

    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        waiting = self._request(n_results, stamp)
        while waiting:
            [ready], waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(ready)

    def collect(self, n_results: int, stamp: int) -> list[Model]:
        models: list[Model] = ray.get(self._request(n_results, stamp))
        return models

    def _request(self, n_results: int, stamp: int) -> list[Any]:
        n_actors = len(self._actors)
        return [self._actors[index % n_actors].make.remote(stamp) for index in range(n_results)]
