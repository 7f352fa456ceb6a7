"""mpi4py: ranks that send objects with pickle protocol 5, ``mpi4py.util.pkl5``.

What
    Rank 0 is the parent, the others are the workers; ``send`` and ``recv`` for one worker,
    ``bcast`` for several.

How it works
    The side is started by ``mpiexec`` (see ``side_command``); ranks above 0 never get past
    `serve`. https://mpi4py.readthedocs.io/en/stable/mpi4py.util.pkl5.html

Lifetime
    A rank that waits in MPI keeps a core busy. So while other peers are timed, workers look for a
    message now and then, and only between `wake` and `rest` they wait for it.

When it cannot
    The number of ranks is that of ``mpiexec``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from mpi4py import MPI
from mpi4py.util import pkl5

from _peers._peer import Peer, Task
from _peers._work import Model, change, keep, make_result

_REST_S = 0.002

_communicator = pkl5.Intracomm(MPI.COMM_WORLD)


def is_worker() -> bool:
    return bool(_communicator.Get_rank())


def serve() -> None:
    """In a worker: do what rank 0 says until it says None."""
    is_awake = False
    while True:
        while not (is_awake or MPI.COMM_WORLD.iprobe(source=0)):
            time.sleep(_REST_S)
        request = _communicator.recv(source=0)
        if request is None:
            return
        if isinstance(request, bool):
            is_awake = request
            continue
        task, argument, is_broadcast = request
        del request
        if is_broadcast:
            argument = _communicator.bcast(None, root=0)
        _communicator.send(task(argument), dest=0)
        del argument


class Ranks(Peer):
    """The ranks above 0."""

    def __init__(self) -> None:
        self._ranks = range(1, _communicator.Get_size())

    def start(self, n_workers: int, nbytes: int) -> None:
        if n_workers != len(self._ranks):
            raise ValueError(f"{len(self._ranks)} ranks for {n_workers} workers")
        self._each(keep, nbytes)

    def stop(self) -> None:
        pass

    def end(self) -> None:
        """End the workers; nothing can be sent after that."""
        for rank in self._ranks:
            _communicator.send(None, dest=rank)

    def wake(self) -> None:
        for rank in self._ranks:
            _communicator.send(True, dest=rank)

    def rest(self) -> None:
        for rank in self._ranks:
            _communicator.send(False, dest=rank)

    def result(self, stamp: int) -> Model:
        return self._call(make_result, stamp)

    def send(self, task: Task, model: Model) -> list[Any]:
        is_broadcast = len(self._ranks) > 1
        for rank in self._ranks:
            _communicator.send((task, None if is_broadcast else model, is_broadcast), dest=rank)
        if is_broadcast:
            _communicator.bcast(model, root=0)
        return [_communicator.recv(source=rank) for rank in self._ranks]

    def exchange(self, model: Model) -> Model:
        return self._call(change, model)

    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        for index in range(n_results):
            rank = self._ranks[index % len(self._ranks)]
            _communicator.send((make_result, stamp, False), dest=rank)
        for _ in range(n_results):
            yield _communicator.recv(source=MPI.ANY_SOURCE)

    def _each(self, task: Any, argument: object) -> list[Any]:
        for rank in self._ranks:
            _communicator.send((task, argument, False), dest=rank)
        return [_communicator.recv(source=rank) for rank in self._ranks]

    def _call(self, task: Any, argument: object) -> Model:
        _communicator.send((task, argument, False), dest=1)
        model: Model = _communicator.recv(source=1)
        return model
