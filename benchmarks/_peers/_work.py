"""What crosses, and what a worker does: the same for all peers.

What
    `Model` is the model of ``transfer.py`` with a stamp; `keep`, `make_result`, `take`, `change`
    and `probe` run in workers.

How it works
    Each message has another stamp in its first word, so that one that is delivered twice, or out of
    memory that was written before, has another checksum than the one expected.

Lifetime
    A worker keeps one model for life, `keep` makes it. `make_result` returns that very object.

When it cannot
    `change` copies an array that is read-only, as its user would have to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _driver import Model as PlainModel

RENDEZVOUS_S = 60.0


class Model(PlainModel):
    """An array of random words, of which the first one is the stamp, and a few attributes."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes, 1)
        self.stamp(0)

    @property
    def words(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
        assert isinstance(self.weights, np.ndarray)
        return self.weights

    def stamp(self, stamp: int) -> None:
        self.words[0] = stamp
        self.n_epochs = stamp

    def total(self) -> int:
        """The sum of all words modulo 2^64."""
        return int(np.add.reduce(self.words))

    def with_words(self, words: object) -> Model:
        """A shallow copy that has something else in the place of its array."""
        other = Model.__new__(Model)
        other.__dict__.update(self.__dict__)
        other.weights = words  # type: ignore[assignment]
        return other

    def __add__(self, other: Model) -> Model:
        return self.with_words(self.words + other.words)


_kept: Model | None = None
_wait: Callable[[], object] | None = None


def keep(nbytes: int, wait: Callable[[], object] | None = None) -> int:
    """In a worker: make the model that it has from now on, and say who it is.

    `wait` is called by `take` once the model was read, and returns when all workers have done so.
    """
    global _kept, _wait
    if _kept is None or _kept.words.nbytes != nbytes:
        _kept = Model(nbytes)
    _wait = wait
    return os.getpid()


def make_result(stamp: int) -> Model:
    """In a worker: return the model that is already there."""
    if _kept is None:
        raise RuntimeError("keep() was not called in this worker")
    _kept.stamp(stamp)
    return _kept


def take(model: Model) -> int:
    """In a worker: read the model; return its checksum."""
    checksum = model.checksum()
    if _wait is not None:
        _wait()
    return checksum


def change(model: Model) -> Model:
    """In a worker: read the model, change one element in place, and return it."""
    model.name = hex(model.checksum())
    try:
        model.words[1] += np.uint64(1)
    except ValueError:  # Read-only.
        model = model.with_words(model.words.copy())
        model.words[1] += np.uint64(1)
    return model


def probe(folder: str, n_receivers: int, model: Model) -> tuple[bool, bool]:
    """In each worker: is the model writable, and does no other receiver see what is written?

    Each receiver writes its pid, waits until all have, and looks whether its own is still there.
    """
    pid = os.getpid()
    try:
        model.words[1] = pid
        is_writable = True
    except ValueError:  # Read-only.
        is_writable = False
    Path(folder, str(pid)).touch()
    deadline_s = time.monotonic() + RENDEZVOUS_S
    while len(os.listdir(folder)) < n_receivers:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"only {len(os.listdir(folder))} of {n_receivers} got the model")
        time.sleep(0.01)
    return is_writable, is_writable and int(model.words[1]) == pid
