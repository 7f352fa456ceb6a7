"""Arguments of a forked process: the object in the place of its handle, as where it is pickled.

**What.** A replacement for ``BaseProcess._bootstrap``, which runs in a child before its target.

**How it works.** Under fork nothing is pickled: the child has the very arguments of its parent,
and among them handles that `broadcast` made. They are looked for where a pickler would come to
them, in target, arguments, keyword arguments and further attributes of the process: in lists,
tuples, dictionaries, sets, deques, ``functools.partial``, closures, bound methods, and the
attributes of objects. What can be changed is changed in place: all of it is the child's own memory.

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

_LEAVES: Final = (str, bytes, bytearray, int, float, complex, type, types.ModuleType)
#: Attributes of a process object that are multiprocessing's own.
_THEIRS: Final = frozenset(
    ("_identity", "_config", "_parent_pid", "_parent_name", "_popen", "_closed", "_name")
)


def hooked_bootstrap(original: Any) -> Any:
    def _bootstrap(self: Any, *args: Any, **kwargs: Any) -> Any:
        if living:
            _replace_in(self)
        return original(self, *args, **kwargs)

    return _bootstrap


def _replace_in(process: Any) -> None:
    values = Values()
    for name, value in list(vars(process).items()):
        if name not in _THEIRS:
            setattr(process, name, values.of(value))
    if values.error is not None:
        process.run = functools.partial(_raise, values.error)


def _raise(error: Exception) -> None:
    raise error


class Values:
    """One walk through objects; each object that it comes to is looked at once.

    Attributes
    ----------
    error : Exception, optional
        Of an object that could not be loaded. Whatever else goes wrong on the way, in a strange
        object or one that is nested too deep for a pickler, leaves that as it is.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        # By id: the object, which keeps that its own, and what stands in its place.
        self._done: dict[int, tuple[Any, Any]] = {}

    def of(self, obj: Any) -> Any:
        """Return what stands in the place of `obj`: itself, unless it is or has a handle."""
        if obj is None or issubclass(type(obj), _LEAVES):
            return obj
        if id(obj) not in self._done:
            self._done[id(obj)] = obj, obj  # for what refers to itself
            try:
                self._done[id(obj)] = obj, self._look(obj)
            except Exception as error:
                pass_on_foreign(error)
        return self._done[id(obj)][1]

    def _look(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is Broadcast:
            return self._load(obj)
        look = _BY_TYPE.get(kind)
        if look is not None:
            return look(self, obj)
        base = next((base for base in kind.__mro__ if base in _CONTAINERS), None)
        found = obj if base is None else _BY_TYPE[base](self, obj)
        self._in_attributes(found)
        return found

    def _load(self, handle: Broadcast[Any]) -> Any:
        try:
            return handle._fresh()  # not what the parent has made of its own
        except Exception as error:
            pass_on_foreign(error)
            self.error = error
            return handle

    def _in_attributes(self, obj: Any) -> None:
        """Not by ``getattr``: a proxy would answer for something else, or fail."""
        with contextlib.suppress(AttributeError):
            attributes = object.__getattribute__(obj, "__dict__")
            if type(attributes) is dict:
                self._in_dict(attributes)
        for name in copyreg._slotnames(type(obj)):  # type: ignore[attr-defined]
            with contextlib.suppress(AttributeError):
                item = object.__getattribute__(obj, name)
                value = self.of(item)
                if value is not item:
                    object.__setattr__(obj, name, value)

    def _in_list(self, items: Any) -> Any:
        for i, item in enumerate(list(items)):
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
        changed = any(value is not item for value, item in zip(values, items, strict=True))
        if not changed:
            return items
        made = tuple.__new__(type(items), values)  # also a named one
        if hasattr(items, "__dict__"):
            vars(made).update(vars(items))
        return made

    def _in_set(self, items: set[Any]) -> set[Any]:
        found = [item for item in items if type(item) is Broadcast]
        for handle in found:
            items.remove(handle)
            items.add(self.of(handle))
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
        return function

    def _in_method(self, method: types.MethodType) -> types.MethodType:
        self.of(method.__func__)
        owner = self.of(method.__self__)
        return method if owner is method.__self__ else types.MethodType(method.__func__, owner)


def _same(_values: Values, obj: Any) -> Any:
    return obj


_BY_TYPE: Final[dict[type, Callable[[Values, Any], Any]]] = {
    list: Values._in_list,
    collections.deque: Values._in_list,
    dict: Values._in_dict,
    tuple: Values._in_tuple,
    set: Values._in_set,
    functools.partial: Values._in_partial,
    types.FunctionType: Values._in_function,
    types.MethodType: Values._in_method,
    types.BuiltinFunctionType: _same,
}
_CONTAINERS: Final = frozenset((list, dict, tuple, set, collections.deque))
