"""Ray: the calls of a merge as tasks of a cluster.

**What.** `Ray` serves the module ``ray``.

**How it works.** Partial results stay in the object stores of the nodes where they were made; this
process has their references, and learns by a second, small result that they are there. Arrays that
a task is given lie in the store and are read-only, so a left operand is copied before it is
changed.

Nothing is cancelled: ``ray.cancel`` of a task that ends in the same moment aborts this process
(seen with Ray 2.60; "Tried to complete task that was not pending"). So there is a `Stop`, a key
in the cluster's own store, at which tasks look.

**Lifetime.** Ray keeps an object as long as there is a reference. One that is lost with its node
is made again by Ray. The key is there until the end of the merge; one of a process that was killed
stays, some 40 bytes, and its tasks are ended by Ray.

**When it cannot.** In a release of Ray without that store, whatever was submitted is done, and its
results are dropped.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

from oobpickle._merge.engine import Engine, Ready
from oobpickle._merge.work import Span
from oobpickle._merge.writing import writable

#: How often a task looks at the key; once takes about 0.5 ms.
_INTERVAL_S: Final = 1.0


class Ray(Engine):
    """The module ``ray``."""

    is_remote = True
    ends_early = False
    owning = "writable"

    def __init__(self, ray: Any) -> None:
        if not ray.is_initialized():
            ray.init()
        super().__init__(int(ray.cluster_resources().get("CPU", 1)))
        self.stop = Stop(b"oobpickle-merge-" + os.urandom(8).hex().encode())
        self._ray = ray
        self._call = ray.remote(with_sign).options(num_returns=2)
        self._under_way: dict[Any, tuple[Span, Any]] = {}

    def begin(self) -> None:
        if self.stop is not None and not self.stop.show():
            self.stop = None

    def end(self) -> None:
        super().end()
        self._under_way.clear()

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


def _store() -> Any:
    """Return the cluster's store of keys, by its functions."""
    from ray.experimental import internal_kv

    return internal_kv


class Stop:
    """Whether the rest is called off, as every task of the cluster can see it.

    Parameters
    ----------
    key : bytes
        The merge goes on as long as it is in the cluster's store.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._next_s = 0.0

    def show(self) -> bool:
        """Let tasks see it; return whether they can."""
        try:
            store = _store()
            store._internal_kv_put(self._key, b"")
            return bool(store._internal_kv_exists(self._key))
        except Exception:  # whatever another release raises
            return False

    def set(self) -> None:
        """Call the rest off. No error if it is called off already, or the cluster has ended."""
        with contextlib.suppress(Exception):
            _store()._internal_kv_del(self._key)

    def is_set(self) -> bool:
        """Look, if it is time to.

        Raises
        ------
        RuntimeError
            If it is called off. Should the key have been lost, nobody takes what a task has not
            made for a result.
        """
        now_s = time.monotonic()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + _INTERVAL_S
        try:
            is_there = _store()._internal_kv_exists(self._key)
        except Exception:  # the store cannot be reached: that says nothing
            return False
        if not is_there:
            raise RuntimeError(
                f"the call was called off: the cluster has no key {self._key.decode()} any more"
            )
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return Stop, (self._key,)


def with_sign(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """Return what a call has raised, with its traceback, and what it has returned.

    An error that is raised in a task has another class when it arrives, and Ray logs those that
    nobody asks for.
    """
    try:
        return None, function(*arguments)
    except Exception as error:
        return (error, traceback.format_exc()), None
