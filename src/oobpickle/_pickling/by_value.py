"""By value: the pickler for functions and classes that cannot be found by their names.

**What.** `dump` writes an object as the plain pickler does, but functions and classes that it
refuses by value. `Pickler` does it, and says what it took.

**How it works.** The pickler in C asks about each object that is of no simple type. Functions and
classes that plain pickling finds by their names it writes so; the others are taken apart by
`functions` and `classes`. Everything else is as in the plain pickler: what that refuses is
refused, with the same error.

What a *lost* main module has, which the receiver cannot import, cannot be found by name there.

**Lifetime.** A pickler lives for one `dump`.

**When it cannot.** A class of which it is not known that the receiver can make it is refused;
a note on the error says why."""

from __future__ import annotations

import pickle
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final

from oobpickle._pickling import classes, functions
from oobpickle._pickling.functions import Cached, Part, Parts

#: What the plain pickler raises when it meets something that it cannot take.
REFUSALS: Final = (pickle.PicklingError, AttributeError, TypeError)
_SINGLE: Final = (type(None), type(...), type(NotImplemented))
_MAIN: Final = "__main__"
#: Of classes whose own names are others: functions have them in their annotations and globals.
_NAMES_IN_TYPES: Final = {
    cls: name for name, cls in vars(types).items() if type(cls) is type and cls.__flags__ & 1 << 8
}


class Pickler(pickle.Pickler):
    """The pickler in C, which takes functions and classes by value.

    Attributes
    ----------
    taken : list
        The functions and classes that went by value.
    reasons : list of str
        Why classes did not.
    """

    def __init__(self, sink: Any, *, is_main_lost: bool) -> None:
        super().__init__(sink, 5, buffer_callback=sink.take)
        table = sink.table
        self.dispatch_table = table
        self._levels: tuple[Mapping[type, Any], ...] = table.levels
        self._is_main_lost = is_main_lost
        self._parts = Parts()
        self._globals: dict[int, Any] = {}
        self.taken: list[Any] = []
        self.reasons: list[str] = []

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        reduce = _KINDS.get(kind)
        if reduce is None:
            return self._reduce_class(obj) if issubclass(kind, type) else NotImplemented
        return reduce(self, obj)

    def _reduce_part(self, part: Part) -> Any:
        if type(part.whole) is classes.Field:
            return classes.reduce_field(self._parts, part.whole)
        return self._parts.reduce(part)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if self._is_found(function):
            return NotImplemented
        self.taken.append(function)
        return functions.reduce_function(self._parts, function, self._globals_of(function))

    def _reduce_cached(self, cached: Any) -> Any:
        function = cached.__wrapped__
        is_ours = type(function) is types.FunctionType and not self._has_reducer(Cached)
        if not is_ours or self._is_found(cached):
            return NotImplemented
        self.taken.append(function)
        return functions.reduce_cached(self._parts, cached, self._globals_of(function))

    def _reduce_method(self, method: types.MethodType) -> Any:
        # By its name it would be looked for in a class that may be about to be made.
        function = method.__func__
        is_plain = type(function) is not types.FunctionType or self._has_reducer(types.MethodType)
        if is_plain or self._is_found(function):
            return NotImplemented
        return types.MethodType, (function, method.__self__)

    def _reduce_class(self, cls: Any) -> Any:
        is_single = any(cls is single for single in _SINGLE)
        if is_single or self._has_reducer(type(cls)) or self._is_found(cls):
            return NotImplemented
        if type(cls) is type and cls in _NAMES_IN_TYPES and self.taken:
            return getattr, (self._parts.of(types), _NAMES_IN_TYPES[cls])
        reason = classes.refusal(cls)
        if not reason:
            self.taken.append(cls)
            return classes.reduce_class(self._parts, cls)
        self.reasons.append(f"class {cls.__qualname__} cannot go by value: {reason}")
        if self._is_of_main(cls):
            raise pickle.PicklingError(
                f"processes that are spawned cannot import the main module, and {self.reasons[-1]}."
                " Put it in a module of its own."
            )
        return NotImplemented

    def _reduce_typevar(self, variable: Any) -> Any:
        if self._has_reducer(type(variable)) or self._is_found(variable):
            return NotImplemented
        return classes.reduce_typevar(variable)

    def _reduce_sentinel(self, sentinel: Any) -> Any:
        return classes.SENTINELS[type(sentinel)].get(id(sentinel), NotImplemented)

    def _has_reducer(self, kind: type) -> bool:
        return any(kind in level for level in self._levels)

    def _is_found(self, obj: Any) -> bool:
        """Tell whether plain pickling finds it by its name, and the receiver will."""
        if self._is_of_main(obj):
            return False
        try:
            pickle.dumps(obj, 5)
        except REFUSALS:
            return False
        return True

    def _is_of_main(self, obj: Any) -> bool:
        return self._is_main_lost and getattr(obj, "__module__", None) == _MAIN

    def _globals_of(self, function: types.FunctionType) -> Any:
        key = id(function.__globals__)
        if key not in self._globals:
            main = sys.modules.get(_MAIN)
            is_of_main = self._is_main_lost and function.__globals__ is getattr(
                main, "__dict__", None
            )
            self._globals[key] = functions.globals_for(self._parts, function, is_of_main=is_of_main)
        return self._globals[key]


_KINDS: Final[dict[type, Callable[[Pickler, Any], Any]]] = {
    types.FunctionType: Pickler._reduce_function,
    types.MethodType: Pickler._reduce_method,
    Cached: Pickler._reduce_cached,
    Part: Pickler._reduce_part,
    classes.Step: lambda _, step: classes.reduce_step(step),
    typing.TypeVar: Pickler._reduce_typevar,
    **dict.fromkeys(classes.SENTINELS, Pickler._reduce_sentinel),
}
