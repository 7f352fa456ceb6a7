"""Functions by value: how one that cannot be found by its name is taken apart and put together.

**What.** `reduce_function` for functions, `reduce_cached` for those of ``functools.lru_cache``, and
`Part`, the pieces that functions and classes consist of and that pickle takes nowhere else: code,
cells, modules, properties, read-only mappings.

**How it works.** A function is made of its code and of empty cells, and gets everything else when
it is known to the pickler, since it may refer to itself. Of the globals only those are sent that
the code names. Functions of one message that shared globals and cells share them again. ::

    make_function(code, globals, cells) | set_function(function, state)

A `Part` stands for such a piece in the state of its function or class, so that the same object
elsewhere in the message is refused, as plain pickling refuses it.

The main module of a program that spawned children cannot import has a *mirror* in each of them: the
globals of all its functions there. What is sent with a function replaces what was sent before, but
not what the child itself has assigned, by an initializer for instance.

**Lifetime.** A mirror lives as long as its process.

**When it cannot.** What a function refers to may be refused, as everywhere else."""

from __future__ import annotations

import builtins
import dis
import functools
import importlib
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from cloudpickle.cloudpickle import (  # type: ignore[import-untyped]
    _find_imported_submodules as _submodules_used,
)

Reduced = tuple[Any, ...]

Cached: Final = type(functools.lru_cache(len))
_NAMING: Final = frozenset(
    # The last two are in the body of a class.
    ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
)
#: What is kept of a module's globals whatever the code names: relative imports need it.
_ALWAYS: Final = ("__name__", "__package__", "__path__", "__file__")
_ABSENT: Final = object()
_names: Final[weakref.WeakKeyDictionary[types.CodeType, frozenset[str]]] = (
    weakref.WeakKeyDictionary()
)


class Part:
    """Stands for a piece of a function or class, within its state."""

    __slots__ = ("whole",)

    def __init__(self, whole: Any) -> None:
        self.whole = whole


class Parts:
    """The parts of one message: one for each object, so that what is one arrives as one."""

    def __init__(self) -> None:
        self._by_id: dict[int, Part] = {}

    def of(self, value: Any) -> Any:
        """Return what stands for `value` in a state: a `Part`, or the very value."""
        if type(value) not in _REDUCERS and not isinstance(value, types.ModuleType):
            return value
        return self.standing_for(value)

    def standing_for(self, value: Any) -> Part:
        """Return the part of `value`."""
        part = self._by_id.get(id(value))
        if part is None:
            part = self._by_id[id(value)] = Part(value)
        return part

    def of_all(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.of(value) for name, value in values.items()}

    def reduce(self, part: Part) -> Reduced:
        """Reduce what a part stands for."""
        whole = part.whole
        if isinstance(whole, types.ModuleType):
            return _reduce_module(whole)
        return _REDUCERS[type(whole)](self, whole)


def _reduce_module(module: types.ModuleType) -> Reduced:
    if sys.modules.get(module.__name__) is not module:
        raise TypeError(f"cannot pickle module {module.__name__!r}, which cannot be imported")
    return importlib.import_module, (module.__name__,)


def _reduce_code(parts: Parts, code: types.CodeType) -> Reduced:
    return types.CodeType, (
        *(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_nlocals),
        *(code.co_stacksize, code.co_flags, code.co_code),
        tuple(map(parts.of, code.co_consts)),
        *(code.co_names, code.co_varnames, code.co_filename, code.co_name, code.co_qualname),
        *(code.co_firstlineno, code.co_linetable, code.co_exceptiontable),
        *(code.co_freevars, code.co_cellvars),
    )


def _reduce_wrapped(parts: Parts, method: Any) -> Reduced:
    return type(method), (parts.of(method.__func__),)


def _reduce_property(parts: Parts, prop: property) -> Reduced:
    calls = (prop.fget, prop.fset, prop.fdel)
    return type(prop), (*map(parts.of, calls), prop.__doc__)


def _reduce_mapping(parts: Parts, mapping: types.MappingProxyType[Any, Any]) -> Reduced:
    return types.MappingProxyType, ({key: parts.of(mapping[key]) for key in mapping},)


class _Mirrored:
    """The globals of a main module; stands for them in a message."""

    __slots__ = ("token",)

    def __init__(self, token: bytes) -> None:
        self.token = token


_REDUCERS: Final[dict[type, Callable[[Parts, Any], Reduced]]] = {
    types.CodeType: _reduce_code,
    types.CellType: lambda _, __: (types.CellType, ()),  # empty: `set_function` fills it
    classmethod: _reduce_wrapped,
    staticmethod: _reduce_wrapped,
    property: _reduce_property,
    types.MappingProxyType: _reduce_mapping,
    _Mirrored: lambda _, mirrored: (globals_of_main, (mirrored.token,)),
}


# --- taking apart


def reduce_function(parts: Parts, function: types.FunctionType, globals_: Any) -> Reduced:
    """Reduce a function; `globals_` stands for the globals that it shares with others."""
    arguments = _arguments(parts, function, globals_)
    return make_function, arguments, _state(parts, function), None, None, set_function


def reduce_cached(parts: Parts, cached: Any, globals_: Any) -> Reduced:
    """Reduce a function of ``functools.lru_cache``; its cache arrives empty."""
    function = cached.__wrapped__
    how = cached.cache_parameters()
    arguments = (*_arguments(parts, function, globals_), how["maxsize"], how["typed"])
    attributes = {name: v for name, v in vars(cached).items() if name != "__wrapped__"}
    state = _state(parts, function), parts.of_all(attributes)
    return make_cached, arguments, state, None, None, set_cached


def globals_for(parts: Parts, function: types.FunctionType, *, is_of_main: bool) -> Any:
    """Return what the globals of a function are made from, before any is set.

    Parameters
    ----------
    is_of_main : bool
        Whether they are those of a main module that the receiver cannot import.
    """
    token = next((t for t, mirror in _mirrors.items() if mirror is function.__globals__), None)
    if token is None and is_of_main:
        token = _own_token()
    if token is not None:
        return parts.standing_for(_Mirrored(token))
    given = function.__globals__
    return {name: given[name] for name in _ALWAYS if name in given}


def globals_used(function: types.FunctionType) -> dict[str, Any]:
    """Return the globals that the code of a function, or of one inside of it, names."""
    given = function.__globals__
    return {name: given[name] for name in sorted(_names_in(function.__code__)) if name in given}


def _names_in(code: types.CodeType) -> frozenset[str]:
    found = _names.get(code)
    if found is None:
        # From the instructions: `co_names` has the attributes too.
        own = {step.argval for step in dis.get_instructions(code) if step.opname in _NAMING}
        inner = (_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
        found = _names[code] = frozenset(own.union(*inner))
    return found


def _arguments(parts: Parts, function: types.FunctionType, globals_: Any) -> Reduced:
    cells = function.__closure__
    return parts.of(function.__code__), globals_, None if cells is None else _all(parts, cells)


def _state(parts: Parts, function: types.FunctionType) -> dict[str, Any]:
    used = globals_used(function)
    contents = [_contents(cell) for cell in function.__closure__ or ()]
    captured = [value for content in contents for value in content]
    modules = _submodules_used(function.__code__, [*used.values(), *captured])
    attributes: dict[str, Any] = {
        "__name__": function.__name__,
        "__qualname__": function.__qualname__,
        "__module__": function.__module__,
        "__doc__": function.__doc__,
        "__defaults__": function.__defaults__ and _all(parts, function.__defaults__),
        "__kwdefaults__": function.__kwdefaults__ and parts.of_all(function.__kwdefaults__),
        "__annotations__": annotations_of(function),
    }
    if getattr(function, "__type_params__", ()):
        attributes["__type_params__"] = function.__type_params__  # type: ignore[attr-defined,unused-ignore]
    return {
        "globals": parts.of_all(used),
        "contents": [_all(parts, content) for content in contents],
        "attributes": attributes,
        "dict": parts.of_all(vars(function)),
        "modules": _all(parts, modules),
    }


def _all(parts: Parts, values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(map(parts.of, values))


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def annotations_of(obj: Any) -> dict[str, Any]:
    """Return the annotations of a function, as far as they can be evaluated."""
    try:
        return dict(obj.__annotations__)
    except NameError:  # from CPython 3.14 on they are evaluated here
        return {}


def captured_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function takes along, and what it is there."""
    for name, value in globals_used(function).items():
        yield f"global {name!r}", value
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        yield from ((f"variable {name!r}", value) for value in _contents(cell))
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from (("a default of an argument", value) for value in defaults)


# --- putting together; the names are in messages


def make_function(
    code: types.CodeType, globals_: dict[str, Any], cells: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    """Make a function that has nothing but its code yet."""
    globals_.setdefault("__builtins__", vars(builtins))
    return types.FunctionType(code, globals_, code.co_name, None, cells)


def set_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    """Give a function what it refers to."""
    for cell, content in zip(function.__closure__ or (), state["contents"], strict=True):
        if content:
            (cell.cell_contents,) = content
    _bring(function.__globals__, state["globals"])
    vars(function).update(state["dict"])
    for name, value in state["attributes"].items():
        setattr(function, name, value)


def make_cached(
    code: types.CodeType,
    globals_: dict[str, Any],
    cells: tuple[types.CellType, ...] | None,
    maxsize: int | None,
    typed: bool,
) -> Any:
    """Make a function with an empty cache."""
    return functools.lru_cache(maxsize, typed)(make_function(code, globals_, cells))


def set_cached(cached: Any, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Give a function with a cache what it refers to."""
    set_function(cached.__wrapped__, state[0])
    vars(cached).update(state[1])


# --- mirrors of main modules


_mirrors: Final[dict[bytes, dict[str, Any]]] = {}
_brought: Final[dict[bytes, dict[str, Any]]] = {}  # what messages have set there last
_own: list[bytes] = []  # of this process's main module; a forked child has the same


def _own_token() -> bytes:
    if not _own:
        _own.append(os.urandom(16))
    return _own[0]


def globals_of_main(token: bytes) -> dict[str, Any]:
    """Return the globals for functions of a main module that only its own process has.

    In that process they are new ones: what others send does not change the module itself.
    """
    if token in _own:
        return {"__name__": "__main__"}
    _brought.setdefault(token, {})
    return _mirrors.setdefault(token, {"__name__": "__main__"})


def _bring(globals_: dict[str, Any], values: dict[str, Any]) -> None:
    token = next((t for t, mirror in _mirrors.items() if mirror is globals_), None)
    if token is None:
        globals_.update(values)
        return
    brought = _brought[token]
    for name, value in values.items():
        now = globals_.get(name, _ABSENT)
        if now is _ABSENT or now is brought.get(name, _ABSENT):
            globals_[name] = brought[name] = value
