"""The memo: what the pickler remembers, and so writes only once.

**What.** `Memo` adds numbers, strings and what it has already to the amounts of a part.

**How it works.** By the id of each object, as in the pickler. A reference to one of the first 256
takes two bytes, and five later.

**Lifetime.** It refers to what it has seen, or a new object could be taken for an old one at the
same address.

**When it cannot.** Its first 256 are nearly those of the pickler, not always the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Final

from oobpickle._explain import amounts as of
from oobpickle._explain.amounts import GET_NBYTES, NUMBERS, STRING_TYPES

_N_EARLY: Final = 256


class Memo(dict[int, Any]):
    """Objects by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self._early: frozenset[int] = frozenset()

    def add(self, total: list[int], obj: Any) -> None:
        """Add a number, a string, or what is in the stream already."""
        total[of.PARTS] += 1
        kind = type(obj)
        if kind in NUMBERS:
            total[of.ATOMS] += 1
            total[of.STREAM] += of.nbytes_of_number(obj)
        elif id(obj) in self:
            total[of.AGAIN] += 1
            total[of.STREAM] += self.nbytes_again(id(obj))
        else:
            self[id(obj)] = obj
            total[of.STRINGS] += 1
            total[of.STREAM] += of.nbytes_of_string(obj)

    def nbytes_again(self, key: int) -> int:
        if not self._early:
            if len(self) < _N_EARLY:
                return 2
            self._early = frozenset(itertools.islice(self, _N_EARLY))
        return 2 if key in self._early else GET_NBYTES

    def add_few(self, total: list[int], values: Iterable[Any]) -> None:
        memo = self
        n = n_strings = n_again = stream = 0
        for value in values:
            n += 1
            kind = type(value)
            if kind in NUMBERS:
                stream += 9 if kind is float else of.nbytes_of_number(value)
            elif id(value) in memo:
                n_again += 1
                stream += self.nbytes_again(id(value))
            else:
                n_strings += 1
                memo[id(value)] = value
                stream += of.nbytes_of_string(value)
        total[of.PARTS] += n + 1
        total[of.STREAM] += stream
        total[of.ATOMS] += n - n_strings - n_again
        total[of.STRINGS] += n_strings
        total[of.AGAIN] += n_again

    def add_all(self, total: list[int], values: Any) -> None:
        """Add numbers and strings, many at a time."""
        strings = [value for value in values if type(value) in STRING_TYPES]
        memo, ids = self, set(map(id, strings))
        if len(ids) < len(strings) or not memo.keys().isdisjoint(ids):
            for value in values:
                self.add(total, value)
            return
        memo.update(zip(map(id, strings), strings, strict=True))
        numbers = [v for v in values if type(v) in NUMBERS] if strings else values
        total[of.PARTS] += len(values)
        total[of.ATOMS] += len(numbers)
        total[of.STRINGS] += len(strings)
        total[of.STREAM] += of.nbytes_of_numbers(numbers) + of.nbytes_of_strings(strings)
