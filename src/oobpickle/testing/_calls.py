"""Calls: which reducers of Python classes run while an object is taken apart, and how often.

**What.** `reducer_calls` runs a function and counts the calls of ``__reduce_ex__``, ``__reduce__``,
``__getstate__`` and the functions of dispatch tables.

**How it works.** The interpreter's profile function sees every call of Python code in this thread.

**Lifetime.** The profile function that was there is put back at the end.

**When it cannot.** Reducers in C are not seen. A profiler in C that is running is put back, but has
not seen what happened meanwhile."""

from __future__ import annotations

import collections
import copyreg
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Final

#: What pickle calls of a class that says itself how it is taken apart.
_NAMES: Final = frozenset(
    ["__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__"]
)


#: How often each function was called, by its qualified name.
Calls = collections.Counter[str]


def reducer_calls(
    call: Callable[[], object], reducers: Iterable[Callable[..., object]] = ()
) -> Calls:
    """Return how often the reducers ran in ``call()``.

    Parameters
    ----------
    call : callable
        Takes an object apart.
    reducers : iterable of callable
        Functions of dispatch tables, besides those of `copyreg`.
    """
    functions = [*copyreg.dispatch_table.values(), *reducers]
    codes = {getattr(function, "__code__", None) for function in functions}
    calls: Calls = collections.Counter()
    before = sys.getprofile()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            _note(calls, frame, codes)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return calls


def _note(calls: Calls, frame: FrameType, codes: set[CodeType | None]) -> None:
    code = frame.f_code
    caller = frame.f_back
    if code.co_name not in _NAMES and code not in codes:
        return
    if caller is not None and caller.f_code.co_name in _NAMES:
        return  # by an overriding method, which is counted
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    if package not in ("numpy", "oobpickle"):  # how arrays are taken apart is our business
        calls[code.co_qualname] += 1
