"""Loading into an object that exists: its arrays are overwritten, its identity stays.

**What.** `load_into` gives an object the value of a payload without allocating its arrays again.

**How it works.** The payload's stream is loaded over memory that is never touched: a *shadow*,
with the right structure, whose arrays cost no pages. Shadow and target are walked side by side.
Only when everything fits is anything written: first the arrays, one copy each, then the other
values.

**Lifetime.** The shadow is dropped at the end; values without arrays move from it to the target.

**When it cannot.** `StructureError` names the path of the first difference, and the target is
unchanged. Arrays are reached through dicts, lists, tuples, object arrays and instances of Python
classes that leave their pickling to ``object``; in anything else they are refused.
"""

from __future__ import annotations

import copyreg
import enum
import gc
import mmap
import pickle
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from oobpickle._errors import StructureError
from oobpickle._pickling.payload import Payload, fresh_destinations
from oobpickle._pickling.reducers import byte_bounds, has_reducer, in_memory_order

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_ALIGN: Final = 64
_HEAP_TYPE: Final = 1 << 9
_ATOMS: Final = (
    *(types.NoneType, bool, int, float, complex, str, bytes, range, type),
    *(types.FunctionType, types.BuiltinFunctionType, types.EllipsisType),
)
_SIMPLE: Final = (types.NoneType, bool, int, str, bytes)
_CONTAINERS: Final = (dict, list, OrderedDict, defaultdict)
_PICKLING: Final = ("__reduce_ex__", "__reduce__", "__getstate__")
_STATE: Final = ("__setstate__", "__getnewargs__", "__getnewargs_ex__")

#: ``((label, key), (value, setter))`` of something inside an object.
_Child = tuple[tuple[str, Any], tuple[Any, Callable[[Any], object]]]


class _Landing(NamedTuple):
    """An array of the target, and the strides that the bytes of its buffer have."""

    array: Array
    strides: tuple[int, ...] | None  # None: C order


def load_into(payload: Payload, target: Any) -> Any:
    """Overwrite `target` with the payload's value and return it."""
    walk = _Walk(_Shadows(payload.sizes))
    shadow = pickle.loads(payload.stream, buffers=walk.shadows.views)
    if walk.replacement("$", shadow, target) is not target:
        raise StructureError(
            f"$: a {type(target).__name__} cannot be changed in place. Pass what it is in."
        )
    landings = walk.landings(payload.sizes)
    _check_targets([landing.array for landing in landings])
    # The payload may be of the target's own arrays in another order: read all, then write.
    aside = payload.overlaps([landing.array for landing in landings])
    places = [_place(landing, aside=aside) for landing in landings]
    payload.write_into([place for place, _ in places])
    for _, finish in places:
        finish()
    for change in walk.changes:
        change()
    return target


def _place(landing: _Landing, *, aside: bool) -> tuple[memoryview, Callable[[], object]]:
    """Return where to write the bytes for an array, and what to do after all are written."""
    import numpy as np

    array, strides = landing
    if array.nbytes == 0:
        return memoryview(bytearray()), _nothing
    direct = array.flags.c_contiguous if strides is None else strides == array.strides
    if direct and not aside and in_memory_order(array).flags.c_contiguous:
        return memoryview(in_memory_order(array).reshape(-1).view("u1")), _nothing
    (memory,) = fresh_destinations([array.nbytes])
    arrived = np.ndarray(array.shape, array.dtype, memory, 0, strides)
    return memory, partial(np.copyto, array, arrived)


def _nothing() -> None:
    return None


def _check_targets(arrays: Sequence[Array]) -> None:
    for array in arrays:
        if not array.flags.writeable:
            raise StructureError(f"$: an array of the target is read-only (shape {array.shape})")
    bounds = sorted(byte_bounds(array) for array in arrays if array.nbytes)
    if any(start < end for (_, end), (start, _) in pairwise(bounds)):
        raise StructureError("$: two arrays of the target overlap in memory")
    axes = [axis for a in arrays if a.nbytes for axis in zip(a.shape, a.strides, strict=True)]
    if any(n > 1 and not step for n, step in axes):
        raise StructureError("$: an array of the target is broadcast: its elements share memory")


class _Shadows:
    """Memory of the right sizes that is never touched, so that it costs no pages."""

    def __init__(self, sizes: list[int]) -> None:
        starts, end = [], 0
        for nbytes in sizes:
            starts.append(end)
            end += -(-nbytes // _ALIGN) * _ALIGN
        self.memory = memoryview(mmap.mmap(-1, max(end, 1)))
        self.views = [self.memory[at : at + n] for at, n in zip(starts, sizes, strict=True)]
        self._sizes = sizes
        self._positions = {at: i for i, at in enumerate(starts) if sizes[i]}
        self._address = byte_bounds(pickle.PickleBuffer(self.memory))[0]

    def position_of(self, array: Array) -> int | None:
        """Return which buffer lies under the whole of the array, -1 for a part, ``None`` for
        none."""
        at = byte_bounds(array)[0] - self._address
        if not 0 <= at < self.memory.nbytes or array.nbytes == 0:
            return None
        position = self._positions.get(at, -1)
        return position if position >= 0 and self._sizes[position] == array.nbytes else -1


class _Walk:
    """Compares a shadow with a target, and notes what has to be written where."""

    def __init__(self, shadows: _Shadows) -> None:
        import numpy as np

        self.shadows = shadows
        self.changes: list[Callable[[], object]] = []
        self._ndarray = np.ndarray
        self._atoms = (*_ATOMS, np.dtype, np.generic)
        self._partners: dict[int, Any] = {}
        self._shadow_of: dict[int, Any] = {}
        self._landed: dict[int, _Landing] = {}
        self._small: list[Array] = []
        self._taken: dict[int, Any] = {}
        self._met_again: set[int] = set()

    def replacement(self, path: str, shadow: Any, target: Any) -> Any:
        """Return what belongs at the place of `target`: itself if it can be changed in place."""
        kind = type(shadow)
        if kind is not type(target):
            raise StructureError(
                f"{path}: the payload has a {kind.__name__}, the target a {type(target).__name__}"
            )
        if issubclass(kind, (*self._atoms[-2:], enum.Enum)) or kind in self._atoms:
            return shadow
        if kind is tuple and all(type(item) in _ATOMS for item in (*shadow, *target)):
            return shadow if len(shadow) == len(target) else self._match_tuple(path, shadow, target)
        if id(shadow) in self._partners or id(target) in self._shadow_of:
            return self._again(path, shadow, target)
        self._partners[id(shadow)] = target
        self._shadow_of[id(target)] = shadow
        if kind is self._ndarray:
            self._match_array(path, shadow, target)
        elif kind is tuple or (kind.__bases__ == (tuple,) and hasattr(kind, "_fields")):
            return self._match_tuple(path, shadow, target)
        elif kind in _CONTAINERS or _is_plain(kind):
            if getattr(shadow, "default_factory", None) is not getattr(
                target, "default_factory", None
            ):
                raise StructureError(f"{path}: another default_factory")
            self._match_children(path, shadow, target)
        else:
            return self._opaque(path, shadow)
        return target

    def _opaque(self, path: str, shadow: Any) -> Any:
        """Take over as a whole what decides itself how it is pickled, if there is no array in
        it."""
        inside = _reachable(shadow)
        if any(self._is_shadow(o) or not _is_known(type(o)) for o in inside.values()):
            kind = type(shadow)
            raise StructureError(
                f"{path}: a {kind.__module__}.{kind.__qualname__} decides itself how it is "
                "pickled; what it makes of arrays cannot be known. Use loads(payload) without "
                "into=."
            )
        self._taken.update(inside)
        self._partners[id(shadow)] = shadow
        return shadow

    def _is_shadow(self, obj: Any) -> bool:
        if isinstance(obj, self._ndarray):
            return self.shadows.position_of(obj) is not None
        return isinstance(obj, memoryview)

    def _again(self, path: str, shadow: Any, target: Any) -> Any:
        self._met_again.add(id(shadow))
        if id(target) not in self._shadow_of and self._partners.get(id(shadow)) is not None:
            return self._partners[id(shadow)]  # two objects here become one
        if self._partners.get(id(shadow)) is not target or (
            self._shadow_of.get(id(target)) is not shadow
        ):
            raise StructureError(
                f"{path}: one object here is two there, or stands in a changed tuple"
            )
        return target

    def _match_array(self, path: str, shadow: Array, target: Array) -> None:
        if shadow.shape != target.shape or shadow.dtype != target.dtype:
            raise StructureError(
                f"{path}: the payload has shape {shadow.shape} of {shadow.dtype}, "
                f"the target {target.shape} of {target.dtype}"
            )
        if not target.flags.writeable:
            raise StructureError(f"{path}: the target's array is read-only")
        if shadow.dtype.hasobject and shadow.dtype.names is not None:
            raise StructureError(f"{path}: an array with fields of objects")
        if shadow.dtype.kind == "O":
            self._small.append(target)
            self._match_elements(path, shadow, target)
            return
        position = self.shadows.position_of(shadow)
        if position is None:
            import numpy as np

            self.changes.append(partial(np.copyto, target, shadow))
            self._small.append(target)
        elif position >= 0 and position not in self._landed:
            self._landed[position] = _Landing(target, shadow.strides)
        else:
            raise StructureError(f"{path}: an array over a part of a buffer")

    def _match_elements(self, path: str, shadow: Array, target: Array) -> None:
        import numpy as np

        for index in np.ndindex(shadow.shape):
            old = target[index]
            new = self.replacement(f"{path}[{', '.join(map(str, index))}]", shadow[index], old)
            if new is not old:
                cell = target[tuple(slice(i, i + 1) for i in index)]
                self.changes.append(partial(cell.fill, new))  # as one object, whatever it is

    def _match_tuple(self, path: str, shadow: Any, target: Any) -> Any:
        if len(shadow) != len(target):
            raise StructureError(f"{path}: {len(shadow)} items in the payload, {len(target)} here")
        items = [
            self.replacement(f"{path}[{i}]", *pair)
            for i, pair in enumerate(zip(shadow, target, strict=True))
        ]
        if all(new is old or _same(new, old) for new, old in zip(items, target, strict=True)):
            return target
        if id(shadow) in self._met_again:
            raise StructureError(f"{path}: a changed tuple stands in itself")
        del self._shadow_of[id(target)]
        changed = type(target)._make(items) if hasattr(target, "_make") else type(target)(items)
        self._partners[id(shadow)] = changed
        return changed

    def _match_children(self, path: str, shadow: Any, target: Any) -> None:
        mine, theirs = dict(_children(shadow)), dict(_children(target))
        if list(mine) != list(theirs):
            odd = sorted({label for label, _ in mine.keys() ^ theirs.keys()}) or ["another order"]
            raise StructureError(f"{path}: payload and target differ in {', '.join(odd[:5])}")
        for key, (value, _) in mine.items():
            old, setter = theirs[key]
            new = self.replacement(path + key[0], value, old)
            if new is not old:
                self.changes.append(partial(setter, new))

    def _opaque_ids(self) -> set[int]:
        return {key for key, partner in self._partners.items() if id(partner) == key}

    def landings(self, sizes: list[int]) -> list[_Landing]:
        """Return where each buffer goes; raise unless each has its array."""
        import numpy as np

        if self._taken.keys() & (self._partners.keys() - self._opaque_ids()):
            raise StructureError("$: something stands both inside and outside of an opaque object")
        missing = [i for i, n in enumerate(sizes) if n and i not in self._landed]
        if missing:
            raise StructureError(
                f"$: buffer {missing[0]} of {len(sizes)} belongs to an object whose memory cannot "
                "be reached from outside. Use loads(payload) without into=."
            )
        _check_targets([*(landing.array for landing in self._landed.values()), *self._small])
        empty = _Landing(np.empty(0, np.uint8), None)
        return [self._landed[i] if n else empty for i, n in enumerate(sizes)]


def _same(new: Any, old: Any) -> bool:
    """Whether nobody can tell them apart: equal is not enough, see 0.0 and -0.0."""
    return type(new) is type(old) and type(new) in _SIMPLE and bool(new == old)


def _is_known(kind: type) -> bool:
    """Whether a class computes nothing from arrays when it is loaded."""
    package = kind.__module__.partition(".")[0]
    return package in sys.stdlib_module_names or package == "numpy" or _is_plain(kind)


def _reachable(obj: Any) -> dict[int, Any]:
    """Return all that the garbage collector sees inside an object, without code and modules."""
    found: dict[int, Any] = {}
    waiting = [obj]
    while waiting:
        one = waiting.pop()
        if id(one) not in found and not isinstance(one, (*_ATOMS, types.ModuleType)):
            found[id(one)] = one
            waiting += gc.get_referents(one)
    return found


def _is_plain(kind: type) -> bool:
    """Whether instances are made by Python classes only, and pickled by ``object`` alone."""
    return (
        all(cls in (object, dict, list) or cls.__flags__ & _HEAP_TYPE for cls in kind.__mro__)
        and all(getattr(kind, name) is getattr(object, name) for name in _PICKLING)
        and not any(hasattr(kind, name) for name in _STATE)
        and kind not in copyreg.dispatch_table
        and not has_reducer(kind)
    )


def _children(obj: Any) -> Iterator[_Child]:
    """Yield ``((label, key), (value, setter))`` of what can be changed in place inside `obj`."""
    if isinstance(obj, dict):
        for key, value in dict.items(obj):
            yield (f"[{key!r}]", key), (value, partial(dict.__setitem__, obj, key))
    elif isinstance(obj, list):
        for index, value in enumerate(list.__iter__(obj)):
            yield (f"[{index}]", index), (value, partial(list.__setitem__, obj, index))
    for name, value in getattr(obj, "__dict__", {}).items():
        yield (f".{name}", name), (value, partial(obj.__dict__.__setitem__, name))
    for name in copyreg._slotnames(type(obj)):  # type: ignore[attr-defined]
        if hasattr(obj, name):
            yield (f".{name}", name), (getattr(obj, name), partial(object.__setattr__, obj, name))
