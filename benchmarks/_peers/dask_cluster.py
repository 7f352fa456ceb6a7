"""Dask: a `LocalCluster` of processes.

What
    ``Client.scatter`` for arguments, ``Client.submit`` and ``Future.result`` for the rest.

How it works
    Buffers travel out of band of the pickle, through TCP on the loopback device. ``direct`` lets
    client and workers talk without the scheduler between them; ``hash=False`` saves hashing what
    is scattered; ``memory_limit=0`` keeps results from being spilled to disk.
    https://distributed.dask.org/en/stable/locality.html
    https://distributed.dask.org/en/stable/api.html#distributed.Client.scatter

Lifetime
    The cluster lives from `start` to `stop`.

When it cannot
    Whatever the cluster raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dask.distributed import Client, LocalCluster, as_completed

from _peers._peer import Peer, Task
from _peers._work import Model, change, keep, make_result


class Dask(Peer):
    """One single-threaded worker process for each receiver."""

    def __init__(self) -> None:
        self._cluster: Any
        self._client: Any
        self._addresses: list[str] = []

    def start(self, n_workers: int, nbytes: int) -> None:
        self._cluster = LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            memory_limit=0,
        )
        self._client = Client(self._cluster, direct_to_workers=True)
        self._client.run(keep, nbytes)
        self._addresses = sorted(self._client.scheduler_info(n_workers=-1)["workers"])

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()

    def result(self, stamp: int) -> Model:
        return self._get(self._client.submit(make_result, stamp, pure=False))

    def send(self, task: Task, model: Model) -> list[Any]:
        scattered = self._scatter(model)
        futures = [
            self._client.submit(
                task, scattered, pure=False, workers=[address], allow_other_workers=False
            )
            for address in self._addresses
        ]
        return [future.result() for future in futures]

    def exchange(self, model: Model) -> Model:
        return self._get(self._client.submit(change, self._scatter(model), pure=False))

    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        futures = as_completed(self._request(n_results, stamp), with_results=False)
        for future in futures:
            model = self._get(future)
            del future
            yield model

    def collect(self, n_results: int, stamp: int) -> list[Model]:
        models: list[Model] = self._client.gather(self._request(n_results, stamp), direct=True)
        return models

    def _request(self, n_results: int, stamp: int) -> list[Any]:
        n_workers = len(self._addresses)
        return [
            self._client.submit(
                make_result, stamp, pure=False, workers=[self._addresses[index % n_workers]]
            )
            for index in range(n_results)
        ]

    def _scatter(self, model: Model) -> Any:
        is_for_all = len(self._addresses) > 1
        return self._client.scatter(model, direct=True, broadcast=is_for_all, hash=False)

    def _get(self, future: Any) -> Model:
        model: Model = future.result()
        return model
