"""Locating: where in an object the thing is that could not be pickled.

**What.** `add_place` adds a note to the exception that pickling raised: the type, and the path.

**How it works.** The pickler in C says neither. So the object is taken apart once more by the
pickler in Python, into nothing, which keeps the objects that it is inside of. Where it fails, they
are the path. The exception itself stays as it is: its type, its text, its traceback.

**Lifetime.** No state.

**When it cannot.** Nothing is added where the second attempt succeeds, fails otherwise, or has not
failed after `_MOST_OBJECTS` objects."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

from oobpickle._foreign import annotate, pass_on_foreign

_MOST_OBJECTS: Final = 200_000
_REDUCED: Final = ".__reduce_ex__(5)"


class _GaveUpError(Exception):
    pass


_Pickler: Any = pickle._Pickler  # type: ignore[attr-defined,unused-ignore]


class _Locator(_Pickler):  # type: ignore[misc,unused-ignore]
    """Writes nothing, and knows where it is."""

    #: Without what dill adds to it when it is imported: that would take what pickle refuses.
    dispatch: Final = {
        kind: save for kind, save in _Pickler.dispatch.items() if save.__module__ == "pickle"
    }

    def __init__(self, table: Mapping[type, Any]) -> None:
        super().__init__(_Nothing(), 5, buffer_callback=lambda _: False)
        self.dispatch_table = table
        self.inside: list[Any] = []
        self._n_objects = 0

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        self._n_objects += 1
        if self._n_objects > _MOST_OBJECTS:
            raise _GaveUpError
        self.inside.append(obj)
        super().save(obj, save_persistent_id)
        self.inside.pop()  # not if it raises: then all that it is inside of is still here


class _Nothing(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data) if isinstance(data, (bytes, bytearray)) else 0


def add_place(error: BaseException, obj: object, table: Mapping[type, Any]) -> None:
    """Add a note to an exception that pickling `obj` raised."""
    locator = _Locator(table)
    try:
        locator.dump(obj)
    except Exception as second:
        pass_on_foreign(second)
        inside = locator.inside
        if isinstance(second, _GaveUpError) or not inside:
            return
        kind = type(inside[-1])
        path = "$" + "".join(_label(*pair) for pair in pairwise(_without_states(inside)))
        annotate(error, f"oobpickle: pickling a {kind.__module__}.{kind.__qualname__} at {path}")


def _without_states(inside: list[Any]) -> list[Any]:
    """Leave out the ``__dict__`` of what stands before it."""
    return [
        inside[0],
        *(o for before, o in pairwise(inside) if o is not getattr(before, "__dict__", None)),
    ]


def _label(outer: Any, inner: Any) -> str:
    if isinstance(outer, dict):
        labels = (f"[{key!r}]" for key, value in dict.items(outer) if value is inner)
        return next(labels, ".keys()[...]")
    attributes = getattr(outer, "__dict__", {})
    found = [f".{name}" for name, value in attributes.items() if value is inner]
    if not found and isinstance(outer, (list, tuple)):
        items = tuple.__iter__(outer) if isinstance(outer, tuple) else list.__iter__(outer)
        found = [f"[{i}]" for i, value in enumerate(items) if value is inner]
    return found[0] if found else _REDUCED
