"""Numbers of bytes as people write them.

**What.** `nbytes_of` makes an ``int`` of what an option was given: ``4 << 30``, ``4e9``, ``"4GB"``.

**How it works.** ``kB``, ``MB``, ``GB`` and ``TB`` are powers of 1000, ``KiB`` to ``TiB`` powers of
1024, as the SI and IEC 80000-13 have them. Case does not matter.

**Lifetime.** No state.

**When it cannot.** `TypeError` or `ValueError`, which show how it is written. A bare letter, as in
``"4G"``, is refused: some programs mean 1000 by it, and some 1024.
"""

from __future__ import annotations

import math
import operator
import re
from typing import Final, SupportsIndex

_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    "bytes": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_WRITTEN: Final = re.compile(
    r"([0-9][0-9_]*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE
)
_HOW: Final = 'Write bytes, 4 << 30 or 4e9, or a string with its unit, "4GB" or "4GiB"'


def nbytes_of(name: str, value: object) -> int | None:
    """Return what an option of that name was given, in bytes; ``None`` if it was not given.

    Raises
    ------
    TypeError, ValueError
        If it is no number of bytes.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _whole(name, value, _parsed(name, value))
    if isinstance(value, float):
        return _whole(name, value, value)
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be a number of bytes, not {value!r}. {_HOW}")
    return operator.index(value)


def _parsed(name: str, text: str) -> float:
    found = _WRITTEN.fullmatch(text.strip())
    factor = _UNITS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError(f"{name} is no number of bytes: {text!r}. {_HOW}")
    number = found[1]
    return int(number) * factor if number.isdecimal() else float(number) * factor


def _whole(name: str, value: object, number: float) -> int:
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{name} must be a whole number of bytes, not {value!r}. {_HOW}")
    return int(number)
