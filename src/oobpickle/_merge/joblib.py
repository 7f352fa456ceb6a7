"""The calls of a merge in rounds of one ``joblib.Parallel``.

**What.** `Joblib` serves a ``joblib.Parallel``, whatever its backend. How joblib's own messages go
through the arena is in `_hook.loky`.

**How it works.** A ``Parallel`` takes calls and returns all results, so what was started is run
together when somebody waits for it. joblib maps large arguments read-only, so a left operand is
made one's own.

**Lifetime.** Results of a round are kept until they are taken.

**When it cannot.** A round lasts as long as its longest call. An error ends the round, and what
joblib raises for a worker that died is what is raised.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from oobpickle._merge.engine import Engine, Ready
from oobpickle._merge.work import Span

#: So few are joined here, where they are, rather than sent there and back in a round.
_MOST_HERE: Final = 4


class Joblib(Engine):
    """A ``joblib.Parallel``."""

    owning = "writable"
    is_sending = False  # with a backend of threads
    ends_early = False

    def __init__(self, parallel: Any) -> None:
        self._joblib: Any = sys.modules["joblib"]
        super().__init__(self._joblib.effective_n_jobs(parallel.n_jobs))
        self.stop = None
        self._parallel = parallel
        self._calls: list[tuple[Span, Callable[..., Any], tuple[Any, ...]]] = []
        self._results: list[tuple[Span, Any]] = []

    def submit(self, span: Span, function: Callable[..., Any], *arguments: Any) -> None:
        self._calls.append((span, function, arguments))

    def take(self, *, wait: bool) -> Ready | None:
        if wait and not self._results:
            calls, self._calls = self._calls, []
            call = self._joblib.delayed(with_span)
            run = self._parallel(call(*calls.pop(0)) for _ in range(len(calls)))
            self._results += run  # a generator or a list
        if not self._results:
            return None
        span, value = self._results.pop(0)
        return Ready(span, [value].pop)

    def wants(self, n_waiting: int, n_calls: int) -> bool:
        return n_waiting > _MOST_HERE


def with_span(span: Span, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return the span and the result of a call: some backends return them in any order."""
    return span, function(*arguments)
