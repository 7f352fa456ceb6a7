"""Large globals: what functions by value drag along with each message, said once.

**What.** `warn_of_large` warns of functions and classes that took much memory along.

**How it works.** Only asked after a large message. What a function names, captures and defaults to,
and what a class has, is looked through for buffers; nothing is pickled for it.

**Lifetime.** What was warned of is remembered, by name and place, until the process ends.

**When it cannot.** Where warnings are errors it is only shown: the program does nothing wrong. What
has more than `_MOST_OBJECTS` objects is not looked through to its end.
"""

from __future__ import annotations

import gc
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Final

#: Of the buffers of one function.
LEAST_NBYTES: Final = 1 << 20
_MOST_OBJECTS: Final = 5_000
_MEMORY: Final = (bytes, bytearray, str)
#: Not sent with what refers to them, or looked at by themselves.
_APART: Final = (type, types.ModuleType, types.FunctionType, types.CodeType, types.FrameType)

_said: set[tuple[str, str, int]] = set()


def warn_of_large(taken: Iterable[Any]) -> None:
    """Warn of each function or class that takes `LEAST_NBYTES` or more along.

    Warns
    -----
    UserWarning
        Once for each.
    """
    for obj in taken:
        where, lineno = _place_of(obj)
        key = (f"{obj.__module__}.{obj.__qualname__}", where, lineno)
        if key in _said:
            continue
        found = [(nbytes_of(value), what) for what, value in _taken_along(obj)]
        total = sum(nbytes for nbytes, _ in found)
        if total < LEAST_NBYTES:
            continue
        _said.add(key)
        largest, what = max(found)
        kind = "class" if isinstance(obj, type) else "function"
        _warn(
            f"oobpickle: {kind} {obj.__qualname__} goes by value, since it cannot be found by its "
            f"name, and takes {total} bytes along with each message: {what} has {largest}. "
            f"Pass it as an argument where it is needed, or put the {kind} into a module that the "
            "workers can import, and set it there with the initializer of the pool.",
            where,
            lineno,
        )


def _warn(text: str, where: str, lineno: int) -> None:
    try:
        warnings.warn_explicit(text, UserWarning, where, lineno)
    except UserWarning as error:
        warnings.showwarning(error, UserWarning, where, lineno)


def _place_of(obj: Any) -> tuple[str, int]:
    code = getattr(obj, "__code__", None)
    if code is not None:
        return code.co_filename, code.co_firstlineno
    methods = (vars(obj)[name] for name in vars(obj))
    codes = (getattr(method, "__code__", None) for method in methods)
    return next((c.co_filename for c in codes if c is not None), obj.__module__), 1


def _taken_along(obj: Any) -> Iterator[tuple[str, Any]]:
    from oobpickle._pickling.functions import captured_by

    if isinstance(obj, type):
        yield from ((f"its attribute {name!r}", value) for name, value in vars(obj).items())
    else:
        yield from captured_by(obj)


def nbytes_of(value: Any) -> int:
    """Return about how many bytes of buffers a value has, wherever they are in it."""
    total, seen, todo = 0, set[int](), [value]
    while todo and len(seen) < _MOST_OBJECTS:
        one = todo.pop()
        if id(one) in seen or isinstance(one, _APART):
            continue
        seen.add(id(one))
        nbytes = len(one) if isinstance(one, _MEMORY) else _nbytes_said(one)
        if nbytes < 0:
            todo += gc.get_referents(one)
        total += max(nbytes, 0)
        if getattr(getattr(one, "dtype", None), "hasobject", False):
            todo += getattr(one, "flat", ())  # the collector does not look into arrays
    return total


def _nbytes_said(one: Any) -> int:
    """Return what an array says, or -1."""
    if isinstance(one, (int, float)) or not hasattr(type(one), "nbytes"):
        return -1
    try:
        nbytes = one.nbytes
    except Exception:  # a property of the user's
        return -1
    return nbytes if isinstance(nbytes, int) else -1
