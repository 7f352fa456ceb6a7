"""Amounts: what is added up over the parts of an object, as one list of numbers.

**What.** The places in such a list: bytes, and how many objects of each kind the pickler meets.
`added` adds two of them. The sizes of what has no parts.

**How it works.** A million parts are a million additions, so they are lists and no objects. The
kinds are those that cost the same each: `measuring` says what.

**Lifetime.** No state.

**When it cannot.** Sizes are those of protocol 5 as CPython's pickler in C writes it; framing is
added for the whole.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import add
from typing import Any, Final

(
    STREAM,  # bytes in the pickle stream
    OUT,  # bytes in buffers beside it
    PARTS,  # objects, in all
    REFUSED,  # of them that cannot be pickled
    ATOMS,
    STRINGS,
    AGAIN,  # references to what the stream has already
    TUPLES,
    LISTS,
    DICTS,
    ENTRIES,  # of dictionaries, and attributes
    SETS,
    INSTANCES,  # of ordinary classes, with their __dict__
    CALLS,
    ARRAYS_IN,  # in the stream
    ARRAYS_OUT,
    NS_REDUCERS,  # nanoseconds that reducers took
    END,
) = range(18)
KINDS: Final = range(ATOMS, NS_REDUCERS)
#: Types of which the pickler does not remember the objects.
NUMBERS: Final = frozenset({int, float, bool, type(None)})
STRING_TYPES: Final = frozenset({str, bytes})
PLAIN: Final = NUMBERS | STRING_TYPES
MEMO_NBYTES: Final = 1
GET_NBYTES: Final = 5


def none() -> list[int]:
    """Return amounts of nothing."""
    return [0] * END


def added(one: list[int], other: list[int]) -> list[int]:
    """Return the sums."""
    return list(map(add, one, other))


def nbytes_of_number(value: Any) -> int:
    """Return what a number, a truth value or ``None`` takes in the stream."""
    kind = type(value)
    if kind is float:
        return 9
    if kind is not int:
        return 1
    if -0x80000000 <= value <= 0x7FFFFFFF:
        return 5 if value < 0 or value > 0xFFFF else 3 if value > 0xFF else 2
    nbytes = int(value.bit_length()) // 8 + 1
    return nbytes + (2 if nbytes < 256 else 5)


def nbytes_of_string(value: Any) -> int:
    """Return what a ``str`` or ``bytes`` takes in the stream when it first comes."""
    if type(value) is str and not value.isascii():
        nbytes = len(value.encode("utf-8", "surrogatepass"))
    else:
        nbytes = len(value)
    return nbytes + MEMO_NBYTES + (2 if nbytes < 256 else 5 if nbytes < 1 << 32 else 9)


def nbytes_of_numbers(values: Collection[Any]) -> int:
    """Return what many numbers take together."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return 9 * len(values)
    if kinds <= {bool, type(None)}:
        return len(values)
    return sum(map(nbytes_of_number, values))


def nbytes_of_strings(values: Collection[Any]) -> int:
    """Return what many different ones take together."""
    if all(map(str.isascii, values)) if set(map(type, values)) == {str} else False:
        lengths = list(map(len, values))
        if not lengths or max(lengths) < 256:
            return sum(lengths) + 3 * len(lengths)
    return sum(map(nbytes_of_string, values))


def nbytes_of_batches(n_items: int) -> int:
    """Return what the pickler writes around the items of a list or dict: 1000 in a batch."""
    full, rest = divmod(n_items, 1000)
    return 2 * full + (0 if rest == 0 else 1 if rest == 1 and full == 0 else 2)
