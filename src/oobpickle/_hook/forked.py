"""Arguments of a forked process: the object in the place of its handle, as where it is pickled.

**What.** A replacement for ``BaseProcess._bootstrap``, which runs in a child before its target.

**How it works.** Under fork nothing is pickled: the child has the very arguments of its parent,
and among them handles that `broadcast` made. They are looked for where a pickler would come to
them, in target, arguments and keyword arguments: in lists, tuples, dictionaries, sets,
``functools.partial``, closures, bound methods, and the attributes of objects. What can be changed
is changed in place: all of it is the child's own memory.

**Lifetime.** It asks at call time whether this process has any handle.

**When it cannot.** If an object cannot be loaded, the target raises that error in its place.
"""

from __future__ import annotations

import collections
import contextlib
import copyreg
import functools
import types
from collections.abc import Callable
from typing import Any, Final

from oobpickle._foreign import pass_on_foreign
from oobpickle._published import Broadcast, living

_LEAVES: Final = frozenset(
    (type(None), bool, int, float, complex, str, bytes, bytearray, type, types.ModuleType)
)
_FIELDS: Final = ("_target", "_args", "_kwargs")


def hooked_bootstrap(original: Any) -> Any:
    def _bootstrap(self: Any, *args: Any, **kwargs: Any) -> Any:
        if living:
            _replace_in(self)
        return original(self, *args, **kwargs)

    return _bootstrap


def _replace_in(process: Any) -> None:
    values, fields = Values(), vars(process)
    with contextlib.suppress(RecursionError):  # what is so deep stays what it is
        for name, value in list(fields.items()):
            if name in _FIELDS or not name.startswith("_"):
                fields[name] = values.of(value)
    if values.error is not None:
        process.run = functools.partial(_raise, values.error)


def _raise(error: Exception) -> None:
    raise error


class Values:
    """One walk through objects; each object that it comes to is looked at once.

    Attributes
    ----------
    error : Exception or None
        Why an object could not be loaded.
    """

    def __init__(self) -> None:
        # By id: the object, which keeps that its own, and what stands in its place.
        self._done: dict[int, tuple[Any, Any]] = {}
        self.error: Exception | None = None

    def of(self, obj: Any) -> Any:
        """Return what stands in the place of `obj`: itself, unless it is or has a handle."""
        if type(obj) in _LEAVES:
            return obj
        if id(obj) not in self._done:
            self._done[id(obj)] = obj, obj  # for what refers to itself
            self._done[id(obj)] = obj, self._look(obj)
        return self._done[id(obj)][1]

    def _look(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is Broadcast:
            return self._value_of(obj)
        look = next((_BY_TYPE[base] for base in kind.__mro__ if base in _BY_TYPE), None)
        value = obj if look is None else look(self, obj)
        if kind not in _BY_TYPE:
            self._in_attributes(obj)
        return value

    def _value_of(self, handle: Broadcast[Any]) -> Any:
        try:
            return handle.value
        except Exception as error:
            pass_on_foreign(error)
            self.error = error
            return handle

    def _in_attributes(self, obj: Any) -> None:
        with contextlib.suppress(Exception):  # of an object that answers for another one
            attributes = object.__getattribute__(obj, "__dict__")
            if type(attributes) is dict:
                self._in_dict(attributes)
        for name in _slot_names(type(obj)):
            with contextlib.suppress(Exception):  # it is not set, or cannot be
                item = object.__getattribute__(obj, name)
                value = self.of(item)
                if value is not item:
                    object.__setattr__(obj, name, value)

    def _in_list(self, items: Any) -> Any:
        for i, item in enumerate(items):
            if type(item) not in _LEAVES:
                value = self.of(item)
                if value is not item:
                    items[i] = value
        return items

    def _in_dict(self, items: dict[Any, Any]) -> dict[Any, Any]:
        for key, item in list(items.items()):
            value = self.of(item)
            if value is not item:
                items[key] = value
        return items

    def _in_tuple(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        values = [self.of(item) for item in items]
        if all(value is item for value, item in zip(values, items, strict=True)):
            return items
        make = getattr(type(items), "_make", None)  # of a named tuple
        return make(values) if callable(make) else tuple(values)

    def _in_set(self, items: set[Any]) -> set[Any]:
        found = [item for item in items if type(item) is Broadcast]
        for handle in found:
            items.remove(handle)
            items.add(handle.value)
        return items

    def _in_partial(self, call: functools.partial[Any]) -> functools.partial[Any]:
        func, args = self.of(call.func), self.of(call.args)
        self._in_dict(call.keywords)
        if func is call.func and args is call.args:
            return call
        return functools.partial(func, *args, **call.keywords)

    def _in_function(self, function: types.FunctionType) -> types.FunctionType:
        for cell in function.__closure__ or ():
            try:
                item = cell.cell_contents
            except ValueError:  # empty
                continue
            value = self.of(item)
            if value is not item:
                cell.cell_contents = value
        defaults = function.__defaults__
        if defaults:
            function.__defaults__ = self.of(defaults)
        if function.__kwdefaults__:
            self._in_dict(function.__kwdefaults__)
        self._in_attributes(function)
        return function

    def _in_method(self, method: types.MethodType) -> types.MethodType:
        self.of(method.__func__)
        owner = self.of(method.__self__)
        return method if owner is method.__self__ else types.MethodType(method.__func__, owner)


def _slot_names(kind: type) -> list[str]:
    return list(copyreg._slotnames(kind))  # type: ignore[attr-defined]


_BY_TYPE: Final[dict[type, Callable[[Values, Any], Any]]] = {
    list: Values._in_list,
    collections.deque: Values._in_list,
    dict: Values._in_dict,
    tuple: Values._in_tuple,
    set: Values._in_set,
    functools.partial: Values._in_partial,
    types.FunctionType: Values._in_function,
    types.MethodType: Values._in_method,
}
