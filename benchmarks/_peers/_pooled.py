"""A ``Pool`` whose messages are wrapped by hand, or not at all.

What
    `PoolPeer` is the base of all peers that use the interface of `multiprocessing.Pool`. A
    subclass gives the context, and how a model becomes a message and a message a model.

How it works
    `pack` runs in the sender and `unpack` in the receiver; both are methods of a `Wrapping`, which
    goes to the workers as an argument of the pool's initializer. The parent unwraps nothing twice
    and releases all messages, those that it sent and those that it received, in `tidy`.

Lifetime
    Workers are forked by `start` and terminated by `stop`.

When it cannot
    A worker that dies is replaced by the pool, and its message never arrives: the caller's time-out
    ends the wait.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.pool
from collections.abc import Iterator
from typing import Any

from _peers._peer import Peer, Task
from _peers._work import Model, change, keep, make_result

BARRIER_S = 120.0


class Wrapping:
    """How a model travels: as it is."""

    def pack(self, model: Model) -> Any:
        return model

    def unpack(self, message: Any) -> Model:
        assert isinstance(message, Model)
        return message

    def release(self, message: Any) -> None:
        """In the parent, when all receivers have what they need."""


_wrapping = Wrapping()


def _begin(nbytes: int, wrapping: Wrapping, barrier: Any) -> None:
    global _wrapping
    _wrapping = wrapping
    # All workers hold the model at the same time, and none gets two of them.
    keep(nbytes, functools.partial(barrier.wait, BARRIER_S) if barrier else None)


def _make(stamp: int) -> Any:
    return _wrapping.pack(make_result(stamp))


def _run(task: Task, message: Any) -> Any:
    return task(_wrapping.unpack(message))


def _change(message: Any) -> Any:
    return _wrapping.pack(change(_wrapping.unpack(message)))


class PoolPeer(Peer):
    """A pool, with a wrapping around what it sends."""

    wrapping = Wrapping()

    def __init__(self) -> None:
        self._pool: multiprocessing.pool.Pool
        self._n_workers = 0
        self._messages: list[Any] = []

    def start(self, n_workers: int, nbytes: int) -> None:
        context = self.context()
        barrier = context.Barrier(n_workers) if n_workers > 1 else None
        self._n_workers = n_workers
        self._pool = context.Pool(n_workers, _begin, (nbytes, self.wrapping, barrier))

    def context(self) -> Any:
        """The module or context whose ``Pool`` is used."""
        return multiprocessing

    def stop(self) -> None:
        self._pool.terminate()
        self._pool.join()

    def result(self, stamp: int) -> Model:
        return self._receive(self._pool.apply(_make, (stamp,)))

    def send(self, task: Task, model: Model) -> list[Any]:
        message = self._pack(model)
        run = functools.partial(_run, task)
        if self._n_workers == 1:
            return [self._pool.apply(run, (message,))]
        return self._pool.map(run, [message] * self._n_workers, chunksize=1)

    def exchange(self, model: Model) -> Model:
        return self._receive(self._pool.apply(_change, (self._pack(model),)))

    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        # No variable here: it would keep each model until the next one is there.
        yield from map(self._receive, self._pool.imap_unordered(_make, [stamp] * n_results))

    def collect(self, n_results: int, stamp: int) -> list[Model]:
        messages = self._pool.map(_make, [stamp] * n_results, chunksize=1)
        return [self._receive(message) for message in messages]

    def tidy(self) -> None:
        for message in self._messages:
            self.wrapping.release(message)
        self._messages.clear()

    def _pack(self, model: Model) -> Any:
        message = self.wrapping.pack(model)
        self._remember(message)
        return message

    def _receive(self, message: Any) -> Model:
        self._remember(message)
        return self.wrapping.unpack(message)

    def _remember(self, message: Any) -> None:
        if type(self.wrapping) is not Wrapping:  # Else it would keep what arrived alive.
            self._messages.append(message)
