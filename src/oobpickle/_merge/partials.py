"""The partial results that are there and wait for a neighbour.

**What.** `Ordered` finds two whose pieces follow each other, `Unordered` any two.

**How it works.** Between two that wait there is always one that is not there yet; so as a rule no
more of them wait than workers are busy, and one.

**Lifetime.** A value is referred to until it is taken as one of a pair.

**When it cannot.** Which two meet depends on who is ready when: sums of floats may differ in their
last bits from one run to the next.
"""

from __future__ import annotations

from bisect import insort
from itertools import pairwise
from typing import Any

from oobpickle._merge.work import Span

Partial = tuple[Span, Any]
Pair = tuple[Partial, Partial]


class Unordered:
    """Partial results of which any two may be merged."""

    def __init__(self) -> None:
        self._waiting: list[Partial] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, span: Span, value: Any) -> None:
        """Take a partial result that is there now."""
        self._waiting.append((span, value))

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()

    def pop(self) -> Partial:
        """Return the only one."""
        (only,) = self._waiting
        self._waiting.clear()
        return only

    def take_pair(self) -> Pair | None:
        """Return two that can be merged, left and right; they wait no longer."""
        if len(self._waiting) < 2:
            return None
        right, left = self._waiting.pop(), self._waiting.pop()
        return left, right


class Ordered(Unordered):
    """Partial results of which two may be merged if nothing is between them."""

    def add(self, span: Span, value: Any) -> None:
        """Take a partial result that is there now."""
        insort(self._waiting, (span, value), key=lambda partial: partial[0])

    def take_pair(self) -> Pair | None:
        """Return two that can be merged, left and right; they wait no longer."""
        for at, (left, right) in enumerate(pairwise(self._waiting)):
            if left[0].stop == right[0].start:
                del self._waiting[at : at + 2]
                return left, right
        return None
