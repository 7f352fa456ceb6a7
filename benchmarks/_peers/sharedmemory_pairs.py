"""py-sharedmemory: queues whose messages lie in shared memory that is used again.

What
    A pair for each direction and worker; any object that can be pickled is sent as it is.

How it works
    The sender copies into a block, the receiver copies out of it.
    https://pypi.org/project/py-sharedmemory

Lifetime
    Endpoints are closed by `stop`, workers end when they are told to.

When it cannot
    A pair has one producing process, so results of two workers are taken in turn.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

from py_sharedmemory import create_shared_memory_pair

from _peers._peer import Peer, Task
from _peers._work import Model, change, keep, make_result

CAPACITY = 2


def _work(receiver: Any, sender: Any, nbytes: int) -> None:
    keep(nbytes)
    with receiver, sender:
        while (request := receiver.get()) is not None:
            task, argument = request
            del request
            sender.put(task(argument))
            del argument
        sender.wait_for_all_ack(timeout=30)


class Pairs(Peer):
    """Processes with a pair in each direction."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._senders: list[Any] = []
        self._receivers: list[Any] = []

    def start(self, n_workers: int, nbytes: int) -> None:
        context = multiprocessing.get_context("fork")
        for _ in range(n_workers):
            sender, workers_receiver = create_shared_memory_pair(capacity=CAPACITY, ctx=context)
            workers_sender, receiver = create_shared_memory_pair(capacity=CAPACITY, ctx=context)
            worker = context.Process(target=_work, args=(workers_receiver, workers_sender, nbytes))
            worker.start()
            workers_receiver.close()
            workers_sender.close()
            self._workers.append(worker)
            self._senders.append(sender)
            self._receivers.append(receiver)

    def stop(self) -> None:
        for sender in self._senders:
            sender.put(None)
        for sender, receiver, worker in zip(
            self._senders, self._receivers, self._workers, strict=True
        ):
            worker.join(30)
            sender.close()
            receiver.close()
        self.__init__()  # type: ignore[misc]

    def result(self, stamp: int) -> Model:
        return self._call(make_result, stamp)

    def send(self, task: Task, model: Model) -> list[Any]:
        for sender in self._senders:
            sender.put((task, model))
        return [receiver.get() for receiver in self._receivers]

    def exchange(self, model: Model) -> Model:
        return self._call(change, model)

    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        n_workers = len(self._workers)
        for index in range(min(n_results, n_workers * CAPACITY)):
            self._senders[index % n_workers].put((make_result, stamp))
        for index in range(n_results):
            model = self._receivers[index % n_workers].get()
            if index + n_workers * CAPACITY < n_results:
                self._senders[index % n_workers].put((make_result, stamp))
            yield model
            del model

    def _call(self, task: Any, argument: object) -> Model:
        self._senders[0].put((task, argument))
        model: Model = self._receivers[0].get()
        return model
