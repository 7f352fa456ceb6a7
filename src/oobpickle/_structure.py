"""The structure of an object: all of it but the memory of its arrays, and what changed in it.

**What.** `Memory` tells which arrays lie in shared memory. `Structure` notes what an object is like
apart from what is in those, and `Structure.difference` finds what was changed since, with its
path.

**How it works.** Where all is in dicts, lists and attributes, each has to have the very same
objects as before (`_Parts`). Anything else is pickled, with a number in the place of each such
array, and has to become the same bytes. If that is not so, the object is compared, part by part,
with one that was made anew from what is shared; instances are taken apart as a pickler does.

**Lifetime.** No state but those bytes.

**When it cannot.** What cannot be compared counts as changed."""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import types
from bisect import bisect_right
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from oobpickle._foreign import pass_on_foreign
from oobpickle._pickling.reducers import byte_bounds, levels

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: What is the same only if it is the very same object.
_NAMED: Final = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_HEAP_TYPE: Final = 1 << 9
_ATOMS: Final = (types.NoneType, bool, int, float, complex, str, bytes)
_TABLE: Final[ChainMap[type, Any]] = ChainMap(*levels({}))  # type: ignore[arg-type]
_Pair = tuple[str, Any, Any]  # a path, and what is there in the one object and in the other


def _token(*_: object) -> None:
    """Stand for something in what is never loaded."""


class Memory:
    """Ranges of addresses, in which arrays may lie: those of some buffers."""

    def __init__(self, parts: Iterable[Any]) -> None:
        bounds = sorted(byte_bounds(memoryview(part)) for part in parts)
        self._starts = [start for start, _ in bounds]
        self._ends = [end for _, end in bounds]

    def place_of(self, array: Array) -> tuple[Any, ...] | None:
        """Return what tells an array from others in this memory; ``None`` if it is elsewhere."""
        address: int = array.__array_interface__["data"][0]
        i = bisect_right(self._starts, address) - 1
        if i < 0 or address >= self._ends[i] or not array.nbytes:
            return None
        dtype = array.dtype
        kind = dtype.str if dtype.names is None else repr(dtype)
        return address, array.shape, array.strides, kind


class _Known:
    """The arrays of an object that lie in a memory. As long as they live, each has its number."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.arrays: dict[int, Array] = {}

    def token_of(self, array: Array) -> tuple[Any, ...] | None:
        """Return what an array has to keep; ``None`` if it is not in the memory."""
        number = id(array)
        if number not in self.arrays:
            if self.memory.place_of(array) is None:
                return None
            self.arrays[number] = array
        return number, array.shape, array.strides, id(array.dtype)


class _Parts:
    """The parts of an object of which each is an array, a value, or something with parts."""

    def __init__(self, obj: Any, known: _Known) -> None:
        self.are_all = True  # nothing is in it that may change in another way
        self._owners: list[tuple[Any, type, list[Any], list[int]]] = []  # keys, values
        self._lists: list[tuple[list[Any], list[int]]] = []
        self._arrays: list[tuple[Array, Any, Any, Any]] = []
        self._kept: dict[int, Any] = {}  # so that no number is used again
        self._known = known
        waiting = [obj]
        while waiting and self.are_all:
            one = waiting.pop()
            if id(one) not in self._kept:
                self._kept[id(one)] = one
                waiting += self._note(one)

    def _note(self, obj: Any) -> list[Any]:
        """Note an object, and return what is in it."""
        kind = type(obj)
        if kind in _ATOMS:
            return []
        if kind is sys.modules["numpy"].ndarray and self._known.token_of(obj):
            self._arrays.append((obj, obj.shape, obj.strides, obj.dtype))
            return []
        if kind is list:
            self._lists.append((obj, list(map(id, obj))))
            return list(obj)
        if kind is tuple:
            return list(obj)
        items = obj if kind is dict else _attributes_of(obj)
        if items is None or any(type(key) not in _ATOMS for key in items):
            self.are_all = False
            return []
        self._owners.append((obj, kind, list(items), list(map(id, items.values()))))
        return list(items.values())

    def are_same(self) -> bool:
        """Whether each has the very same parts as before."""
        for owner, kind, keys, numbers in self._owners:
            items = owner if kind is dict else owner.__dict__
            if [*items] != keys or [*map(id, items.values())] != numbers:
                return False
            if type(owner) is not kind:
                return False
        for items, numbers in self._lists:
            if [*map(id, items)] != numbers:
                return False
        for array, shape, strides, dtype in self._arrays:
            if array.shape != shape or array.strides != strides or array.dtype is not dtype:
                return False
        return True


def _attributes_of(obj: Any) -> Any:
    """Return the attributes of an object that has nothing else; ``None`` of any other."""
    kind = type(obj)
    are_plain = all(cls is object or cls.__flags__ & _HEAP_TYPE for cls in kind.__mro__)
    if not are_plain or copyreg._slotnames(kind):  # type: ignore[attr-defined]
        return None
    return getattr(obj, "__dict__", None)


class _Describer(pickle.Pickler):
    """Pickles all of an object but the arrays that lie in a memory."""

    dispatch_table = _TABLE

    def __init__(self, file: io.BytesIO, known: _Known) -> None:
        super().__init__(file, 5)
        self._known = known
        self._ndarray = sys.modules["numpy"].ndarray

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, self._ndarray):
            token = self._known.token_of(obj)
            if token is not None:
                own = getattr(obj, "__dict__", None)  # of a subclass
                return (_token, token, own) if own else (_token, token)
        elif isinstance(obj, _NAMED) and obj is not _token:
            return _token, (id(obj),)
        return NotImplemented


def _described(obj: Any, known: _Known) -> bytes:
    file = io.BytesIO()
    _Describer(file, known).dump(obj)
    return file.getvalue()


class Structure:
    """What an object is like, but for what is in the arrays that lie in a memory.

    Parameters
    ----------
    obj : object
    memory : Memory

    Attributes
    ----------
    n_arrays : int
        Arrays of the object that lie there.
    """

    def __init__(self, obj: Any, memory: Memory) -> None:
        self._memory = memory
        self._take(obj)

    def _take(self, obj: Any) -> None:
        self._known = _Known(self._memory)
        parts = _Parts(obj, self._known)
        self._parts = parts if parts.are_all else None
        self._before = b"" if parts.are_all else _described(obj, self._known)
        self.n_arrays = len(self._known.arrays)

    def _is_same(self, obj: Any) -> bool:
        if self._parts is not None:
            return self._parts.are_same()
        return _described(obj, self._known) == self._before

    def difference(self, obj: Any, make: Callable[[], Any]) -> str | None:
        """Return what is no longer as it was, and where; ``None`` if nothing is.

        Parameters
        ----------
        obj : object
            The one that the structure was taken of.
        make : callable
            Makes another one, as this was; it is called only if it is needed.
        """
        try:
            if self._is_same(obj):
                return None
            is_known = True
        except Exception as error:
            pass_on_foreign(error)
            is_known = False
        found = _Comparison(self._memory).first(make(), obj)
        if found is None and not is_known:
            return "$ has something in it that cannot be pickled"
        if found is None:
            self._take(obj)  # an equal object in the place of another
        return found


class _Comparison:
    """Two objects, side by side."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._kept: list[Any] = []  # what was made on the way: no id is used twice
        self._ndarray = sys.modules["numpy"].ndarray

    def first(self, before: Any, after: Any) -> str | None:
        """Return the first difference and its path."""
        seen: set[tuple[int, int]] = set()
        waiting: list[_Pair] = [("$", before, after)]
        while waiting:
            path, old, new = waiting.pop()
            if (id(old), id(new)) in seen:
                continue
            seen.add((id(old), id(new)))
            self._kept += old, new
            if type(old) is not type(new):
                return f"{path} was of type {type(old).__name__}, and is a {type(new).__name__}"
            try:
                verdict, pairs = self._compare(path, old, new)
            except Exception as error:
                pass_on_foreign(error)
                return f"{path} cannot be compared with what it was ({type(error).__name__})"
            if verdict:
                return verdict
            waiting += reversed(pairs)
        return None

    def _compare(self, path: str, old: Any, new: Any) -> tuple[str | None, list[_Pair]]:
        if isinstance(old, _NAMED):
            return (None if _are_same_name(old, new) else f"{path} is another one"), []
        if type(old) in _ATOMS:
            same = old is new or pickle.dumps(old, 5) == pickle.dumps(new, 5)
            return (None if same else f"{path} was changed"), []
        if isinstance(old, self._ndarray):
            return self._compare_arrays(path, old, new)
        if type(old) is dict:
            return _compare_keys(path, old, new, "[{!r}]")
        if type(old) is _Attributes:
            return _compare_keys(path, old.names, new.names, ".{}")
        if type(old) in (list, tuple):
            return _compare_items(path, old, new)
        if type(old) in (set, frozenset):
            same = Counter(map(self._bytes_of, old)) == Counter(map(self._bytes_of, new))
            return (None if same else f"{path} has other items"), []
        return self._compare_reduced(path, self._reduced(old), self._reduced(new))

    def _bytes_of(self, obj: Any) -> bytes:
        return _described(obj, _Known(self._memory))

    def _compare_arrays(self, path: str, old: Array, new: Array) -> tuple[str | None, list[_Pair]]:
        places = self._memory.place_of(old), self._memory.place_of(new)
        own = [(path, vars(old), vars(new))] if hasattr(old, "__dict__") else []
        if places != (None, None):
            return (None if places[0] == places[1] else f"{path} is another array"), own
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return f"{path} has another shape or dtype", []
        if old.dtype.hasobject and type(old) is self._ndarray:
            return None, [(path, old.ravel().tolist(), new.ravel().tolist())]
        same = self._bytes_of(old) == self._bytes_of(new)  # a masked array hides some of its own
        return (None if same else f"{path} was changed, and its memory is not shared"), own

    def _reduced(self, obj: Any) -> Any:
        reduce = _TABLE.get(type(obj))
        return reduce(obj) if reduce else obj.__reduce_ex__(4)

    def _compare_reduced(self, path: str, old: Any, new: Any) -> tuple[str | None, list[_Pair]]:
        if isinstance(old, str) or isinstance(new, str):
            return (None if old == new else f"{path} is another one"), []
        old, new = (list(one) + [None] * (6 - len(one)) for one in (old, new))
        pairs: list[_Pair] = [(path, old[0], new[0]), (path, old[1], new[1])]
        pairs += _states(path, old[2], new[2])
        for i in (3, 4):
            one, other = (None if one[i] is None else list(one[i]) for one in (old, new))
            pairs.append((path, one, other))
        return None, pairs


def _are_same_name(old: Any, new: Any) -> bool:
    if isinstance(old, types.FunctionType):  # by value: another one each time it is made
        return old is new or bool(old.__code__ == new.__code__)
    name = getattr(old, "__qualname__", None)
    return old is new or (name is not None and name == getattr(new, "__qualname__", None))


def _states(path: str, old: Any, new: Any) -> Iterator[_Pair]:
    """Yield the states of two objects: of attributes, each by its name."""
    slots = isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new) == 2
    for one, other in zip(old, new, strict=True) if slots else [(old, new)]:
        if {type(one), type(other)} <= {dict, types.NoneType}:
            yield path, _Attributes(one or {}), _Attributes(other or {})
        else:
            yield path, one, other


class _Attributes:
    """The attributes of an object, which are compared by their names."""

    def __init__(self, names: dict[Any, Any]) -> None:
        self.names = names


def _compare_keys(path: str, old: Any, new: Any, label: str) -> tuple[str | None, list[_Pair]]:
    for key in old:
        if key not in new:
            return f"{path}{label.format(key)} is gone", []
    for key in new:
        if key not in old:
            return f"{path}{label.format(key)} is new", []
    return None, [(path + label.format(key), old[key], new[key]) for key in old]


def _compare_items(path: str, old: Any, new: Any) -> tuple[str | None, list[_Pair]]:
    if len(old) != len(new):
        return f"{path} had {len(old)} items, and has {len(new)}", []
    return None, [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
