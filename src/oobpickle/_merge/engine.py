"""An engine: what runs the calls of a merge, behind one interface.

**What.** `Engine` is the interface; `Queued` is for those whose calls report by themselves.

**How it works.** An engine is given calls with the span of their result, and gives back who is
ready. It says whether its workers should join two partial results that are here.

**Lifetime.** From ``with`` to the end of the block; what the user gave goes on living.

**When it cannot.** A call that cannot be started raises what the user's object raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from oobpickle._merge.stopping import Stop
from oobpickle._merge.work import OWNING, Span, Stopping, fold, fold_flat

_INTERVAL_S: Final = 0.25


class Ready(NamedTuple):
    """A call that has ended: the span of its result, and a function that returns it or raises.

    The function is called once. It refers to nothing afterwards, since an error's frames keep it.
    """

    span: Span | None
    result: Callable[[], Any]


class Telling(Stopping, Protocol):
    """What tells those who ask it that the rest is called off."""

    def show(self) -> object: ...

    def set(self) -> None: ...


class Engine:
    """What runs calls.

    Attributes
    ----------
    n_workers : int
        How many calls run at once.
    owning : str
        What a worker has to do before it may change an object that was delivered to it.
    owning_here : str
        The same for this process, and what is delivered here.
    is_sending : bool
        Whether arguments arrive as copies.
    is_remote : bool
        Whether partial results stay where they are made.
    ends_early : bool
        Whether a call may return a part of its chunk, to have the rest handed out anew.
    stop : Stop or None
        Tells calls that are under way that nobody wants their results.
    """

    owning = ""
    owning_here = ""
    is_sending = True
    is_remote = False
    ends_early = True

    def __init__(self, n_workers: int) -> None:
        self.n_workers = max(n_workers, 1)
        self.stop: Telling | None = Stop()

    def __enter__(self) -> Engine:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self) -> None:
        """Prepare for the first call."""

    def end(self) -> None:
        """Call off what is under way, if anything is."""
        if self.stop is not None:
            self.stop.set()

    def submit_fold(self, span: Span, job: Any, pieces: Any, initial: tuple[Any, ...]) -> None:
        """Start to fold a chunk."""
        if self.is_remote:  # references among the arguments are looked for on top only
            flat = [argument for arguments in pieces for argument in arguments]
            self.submit(span, fold_flat, job, span.start, len(pieces[0]), initial, *flat)
        else:
            self.submit(span, fold, job, span.start, pieces, initial)

    def submit(self, span: Span, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a call whose result is that of the span."""
        raise NotImplementedError

    def take(self, *, wait: bool) -> Ready | None:
        """Return a call that has ended; ``None`` if there is none and it is not to wait."""
        raise NotImplementedError

    def wants(self, n_waiting: int, n_calls: int) -> bool:
        """Tell whether a worker should join two partial results.

        Parameters
        ----------
        n_waiting : int
            How many are here.
        n_calls : int
            How many calls are under way.
        """
        return n_calls < self.n_workers

    def fetch(self, value: Any) -> Any:
        """Return what the user gets in the end."""
        return OWNING[self.owning_here](value)


class Queued(Engine):
    """An engine whose calls report to a queue when they end."""

    def __init__(self, n_workers: int) -> None:
        super().__init__(n_workers)
        self.ready: SimpleQueue[Ready] = SimpleQueue()

    def end(self) -> None:
        super().end()
        self.ready = SimpleQueue()  # an error that is kept keeps no results

    def take(self, *, wait: bool) -> Ready | None:
        # Not for ever: a Ctrl-C that comes right before the waiting is seen only when that ends.
        while True:
            try:
                return self.ready.get(wait, _INTERVAL_S)
            except Empty:
                if not wait:
                    return None


def raise_from(box: list[BaseException]) -> NoReturn:
    """Raise the error in the box, which refers to it no longer."""
    raise box.pop()


def is_of(engine: object, module: str, *classes: str) -> bool:
    """Tell whether it is an instance of a class of a module, if that is imported."""
    found = [getattr(sys.modules.get(module), name, None) for name in classes]
    return isinstance(engine, tuple(one for one in found if isinstance(one, type)))
