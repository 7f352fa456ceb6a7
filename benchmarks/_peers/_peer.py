"""What a peer can do: the five ways in which a model crosses.

What
    `Peer` is the base class of all peers. The parent calls its methods; workers run functions of
    ``_work.py``. Workers are numbered by nobody: `send` reaches each of them once.

How it works
    A method is the whole transfer, from the call until the last answer is there. It does not read
    what arrived in the parent; the caller does, with the same code for all peers. In a worker, the
    task that gets a model reads it.

Lifetime
    What must be released by hand (names in ``/dev/shm``) is released in `tidy`, outside of what is
    timed: freeing is not timed for any peer.

When it cannot
    Whatever the library raises. The caller makes a row of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from _peers._work import Model

Task = Callable[[Model], Any]


class Peer(ABC):
    """One way to send models between a parent and its workers."""

    @abstractmethod
    def start(self, n_workers: int, nbytes: int) -> None:
        """Start the workers; each of them makes a model of so many bytes and keeps it."""

    @abstractmethod
    def stop(self) -> None:
        """End the workers."""

    @abstractmethod
    def result(self, stamp: int) -> Model:
        """Get the model of a worker, with this stamp on it."""

    @abstractmethod
    def send(self, task: Task, model: Model) -> list[Any]:
        """Run the task on the model once in each worker; return what the tasks return."""

    @abstractmethod
    def exchange(self, model: Model) -> Model:
        """Send the model to a worker, which changes one element, and get it back."""

    @abstractmethod
    def results(self, n_results: int, stamp: int) -> Iterator[Model]:
        """Get so many models from the workers, with this stamp, as they arrive.

        All have the same one: a library may keep a result by reference until it is fetched.
        """

    def collect(self, n_results: int, stamp: int) -> list[Model]:
        """Get so many models from the workers and hold them all."""
        return list(self.results(n_results, stamp))

    def end(self) -> None:
        """Nothing is sent any more, and nothing will be started."""
        return

    def wake(self) -> None:
        """Messages are about to be timed."""
        return

    def rest(self) -> None:
        """Other peers are about to be timed: nothing may be busy."""
        return

    def tidy(self) -> None:
        """Release what the last message left behind, when nobody uses it any more."""
        return

    def facts(self) -> dict[str, int]:
        """What the library counted, for the JSON file."""
        return {}
