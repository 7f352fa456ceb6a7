"""Reducing: what the pickler would get for an object, asked for in the same order.

**What.** `Reducer.reduce` returns the tuple that an object is pickled as, or the name of a global.
Arrays and other memory go to a sink, as in a message.

**How it works.** Functions and classes that no module has are taken apart by value, as in a
channel; then come `register`, ``ForkingPickler.register``, ``copyreg``, our own reducers, and
``__reduce_ex__(5)``. Each is called once.

**Lifetime.** For one walk.

**When it cannot.** `refusal` has what the pickler would have raised."""

from __future__ import annotations

import multiprocessing.reduction as mp_reduction
import pickle
import sys
import types
from typing import Any, Final

from oobpickle._pickling.by_value import Pickler
from oobpickle._pickling.reducers import Sink

#: What by_value is asked about, besides classes.
_BY_VALUE: Final = (types.FunctionType, types.MethodType)


class Reducer:
    """What an object is pickled as.

    Parameters
    ----------
    threshold : int
        From so many bytes on buffers leave the stream.
    """

    def __init__(self, threshold: int) -> None:
        forking: Any = mp_reduction.ForkingPickler
        self.sink = Sink(threshold, getattr(forking, "_extra_reducers", {}))
        self._table = self.sink.table
        self._pickler = Pickler(self.sink, is_main_lost=False)
        self._is_plain: dict[type, bool] = {}

    def reduce(self, obj: Any) -> Any:
        """Return a tuple as of ``__reduce_ex__``, or a ``str``: the name of a global.

        Raises
        ------
        Exception
            What the object's reducer raises.
        """
        override = self._pickler.reducer_override(obj)
        if override is not NotImplemented:
            return override
        kind = type(obj)
        if kind is type or kind is types.FunctionType:
            return _found(obj)
        try:
            reduce = self._table[kind]
        except KeyError:  # of a metaclass
            return _found(obj)
        value = reduce(obj)
        if isinstance(value, str):
            return _found(obj, value)
        if not isinstance(value, tuple) or not 2 <= len(value) <= 6:
            raise pickle.PicklingError("__reduce__ must return a string or tuple of 2 to 6 items")
        return value

    def is_plain(self, kind: type) -> bool:
        """Tell whether instances are pickled by what every class has: no code of its own runs."""
        found = self._is_plain.get(kind)
        if found is None:
            names = "__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__"
            found = all(
                getattr(kind, name, None) is getattr(object, name, None)
                for name in (*names, "__getnewargs_ex__")
            ) and not any(kind in level for level in self._table.levels)
            self._is_plain[kind] = found
        return found

    def why_not(self, obj: Any, error: Exception) -> str:
        """Return in a line why an object is refused."""
        reasons = self._pickler.reasons
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return f"{text} ({reasons[-1]})" if reasons and isinstance(obj, type) else text


def _found(obj: Any, name: str | None = None) -> str:
    """Return where a global is, or raise what the pickler would."""
    name = name or getattr(obj, "__qualname__", None) or obj.__name__
    module = getattr(obj, "__module__", None) or "__main__"
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not obj:
        pickle.dumps(obj, 5)  # imports the module, or raises
    return f"{module} {name}"
