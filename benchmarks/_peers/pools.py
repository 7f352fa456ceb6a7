"""`multiprocessing.Pool`, plain and inside ``oobpickle.enabled()``: one line differs.

What
    `Plain` and `Oobpickle`. The pool is the default one: forked workers, on Linux up to CPython
    3.13.

How it works
    https://docs.python.org/3/library/multiprocessing.html#using-a-pool-of-workers

Lifetime
    `Oobpickle` has its arena from `start` to `stop`.

When it cannot
    What oobpickle cannot serve travels as by `Plain`, and `facts` says how often.
"""

from __future__ import annotations

import contextlib

from _peers._pooled import PoolPeer


class Plain(PoolPeer):
    """A pool as it comes."""


class Oobpickle(PoolPeer):
    """The same pool, enabled."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()

    def start(self, n_workers: int, nbytes: int) -> None:
        import oobpickle

        self._stack.enter_context(oobpickle.enabled())
        super().start(n_workers, nbytes)

    def stop(self) -> None:
        super().stop()
        self._stack.close()

    def facts(self) -> dict[str, int]:
        import oobpickle

        counts = oobpickle.statistics()
        return {"n_out_of_band": counts.n_messages_out_of_band, "n_fallbacks": counts.n_fallbacks}
