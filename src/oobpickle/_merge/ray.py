"""Ray: the calls of a merge as tasks of a cluster.

**What.** `Ray` serves the module ``ray``.

**How it works.** Partial results stay in the object stores of the nodes where they were made; this
process has their references, and learns by a second, small result that they are there. Arrays that
a task is given lie in the store and are read-only, so a left operand is copied before it is
changed.

**Lifetime.** Ray keeps an object as long as there is a reference. One that is lost with its node
is made again by Ray.

**When it cannot.** A task that has begun is interrupted only by Ray's own means, as soon as it can
be.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

from oobpickle._merge.engine import Engine, Ready
from oobpickle._merge.work import Span
from oobpickle._merge.writing import writable


class Ray(Engine):
    """The module ``ray``."""

    is_remote = True
    ends_early = False
    owning = "writable"

    def __init__(self, ray: Any) -> None:
        if not ray.is_initialized():
            ray.init()
        super().__init__(int(ray.cluster_resources().get("CPU", 1)))
        self.stop = None
        self._ray = ray
        self._call = ray.remote(with_sign).options(num_returns=2)
        self._under_way: dict[Any, tuple[Span, Any]] = {}

    def end(self) -> None:
        signs = list(self._under_way)
        self._under_way.clear()
        for sign in signs:
            with contextlib.suppress(Exception):  # it has ended, or the cluster has
                self._ray.cancel(sign)

    def submit(self, span: Span, function: Callable[..., Any], *arguments: Any) -> None:
        sign, value = self._call.remote(function, *arguments)
        self._under_way[sign] = span, value

    def take(self, *, wait: bool) -> Ready | None:
        signs = list(self._under_way)
        if not signs:
            return None
        ready, _ = self._ray.wait(signs, num_returns=1, timeout=None if wait else 0)
        if not ready:
            return None
        span, value = self._under_way.pop(ready[0])
        return Ready(span, lambda: self._checked(ready[0], value))

    def _checked(self, sign: Any, value: Any) -> Any:
        raised = self._ray.get(sign)
        if raised is not None:
            from multiprocessing import pool

            error, text = raised
            error.__cause__ = error.__cause__ or pool.RemoteTraceback(text)  # type: ignore[attr-defined]
            raise error
        return value

    def wants(self, n_waiting: int, n_calls: int) -> bool:
        return True

    def fetch(self, value: Any) -> Any:
        return writable(self._ray.get(value))


def with_sign(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """Return what a call has raised, with its traceback, and what it has returned.

    An error that is raised in a task has another class when it arrives, and Ray logs those that
    nobody asks for.
    """
    try:
        return None, function(*arguments)
    except Exception as error:
        return (error, traceback.format_exc()), None
