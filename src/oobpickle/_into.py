"""Loading into an object that exists: its arrays are overwritten, its identity stays.

**What.** `load_into` gives an object the value of a payload without allocating its arrays again.

**How it works.** The payload's stream is loaded over memory that is never touched, which yields a
*shadow*: an object with the right structure whose arrays cost no pages. Shadow and target are
walked side by side. Only when everything fits is anything written: first the arrays, one copy
each from the payload, then the other values.

**Lifetime.** The shadow is dropped at the end; what has no arrays in it replaces the target's.

**When it cannot.** `StructureError` names the path of the first difference, and the target is
unchanged. Arrays inside objects that show neither items nor attributes cannot be reached; that is
an error too."""

from __future__ import annotations

import mmap
import operator
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from oobpickle._errors import StructureError
from oobpickle._payload import Payload, fresh_destinations
from oobpickle._reducers import byte_bounds, in_memory_order

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_ALIGN: Final = 64

#: ``((label, key), (value, setter))`` of something inside an object.
_Child = tuple[tuple[str, Any], tuple[Any, Callable[[Any], object]]]


def load_into(payload: Payload, target: Any) -> Any:
    """Overwrite `target` with the payload's value and return it."""
    shadows = _Shadows(payload.sizes)
    shadow = pickle.loads(payload.stream, buffers=shadows.views)
    walk = _Walk(shadows)
    if walk.replacement("$", shadow, target) is not target:
        raise StructureError(
            f"$: a {type(target).__name__} cannot be changed in place. Pass the object around it."
        )
    walk.check_complete(payload.sizes)
    staged = walk.stage(payload.sizes)
    payload.write_into([destination for destination, _ in staged])
    for _, finish in staged:
        finish()
    for change in walk.changes:
        change()
    return target


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
        self._address = _address_of(self.memory)

    def position_of(self, array: Array) -> int | None:
        """Return which buffer lies under the whole of the array, -1 for a part, ``None`` for
        none."""
        at = array.ctypes.data - self._address
        if not 0 <= at < self.memory.nbytes or array.nbytes == 0:
            return None
        position = self._positions.get(at, -1)
        return position if position >= 0 and self._sizes[position] == array.nbytes else -1


def _address_of(memory: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(memory, np.uint8).ctypes.data)


class _Walk:
    """Compares a shadow with a target, and notes what has to be written where."""

    def __init__(self, shadows: _Shadows) -> None:
        import numpy as np

        self._ndarray = np.ndarray
        self._unravel = np.unravel_index
        self._shadows = shadows
        self._partner_of_shadow: dict[int, Any] = {}
        self._shadow_of_target: dict[int, Any] = {}
        self._landings: dict[int, tuple[Array, Array]] = {}
        self._copies: list[tuple[Array, Array]] = []
        self.changes: list[Callable[[], object]] = []

    def replacement(self, path: str, shadow: Any, target: Any) -> Any:
        """Return what belongs at the place of `target`: itself if it can be changed in place."""
        if type(shadow) is not type(target):
            raise StructureError(
                f"{path}: the payload has a {type(shadow).__name__}, the target a "
                f"{type(target).__name__}"
            )
        if id(shadow) in self._partner_of_shadow:
            return self._partner_of_shadow[id(shadow)]
        children = _children(shadow)
        if children is None and not isinstance(shadow, self._ndarray):
            return shadow
        known = self._shadow_of_target.setdefault(id(target), shadow)
        if known is not shadow:
            raise StructureError(f"{path}: one object in the target, two in the payload")
        self._partner_of_shadow[id(shadow)] = target
        if isinstance(shadow, self._ndarray):
            self._match_array(path, shadow, target)
            return target
        if isinstance(shadow, tuple):
            return self._match_tuple(path, shadow, target)
        self._match_children(path, shadow, target)
        return target

    def _match_array(self, path: str, shadow: Array, target: Array) -> None:
        if shadow.shape != target.shape or shadow.dtype != target.dtype:
            raise StructureError(
                f"{path}: the payload has shape {shadow.shape} of {shadow.dtype}, "
                f"the target {target.shape} of {target.dtype}"
            )
        if not target.flags.writeable:
            raise StructureError(f"{path}: the target's array is read-only")
        if shadow.dtype.hasobject:
            self._match_elements(path, shadow, target)
            return
        position = self._shadows.position_of(shadow)
        if position is None:
            self._copies.append((shadow, target))
        elif position >= 0:
            self._landings[position] = (shadow, target)

    def _match_elements(self, path: str, shadow: Array, target: Array) -> None:
        if shadow.dtype.names is not None:
            self._copies.append((shadow, target))
            return
        for index, (mine, theirs) in enumerate(zip(shadow.flat, target.flat, strict=True)):
            new = self.replacement(f"{path}.flat[{index}]", mine, theirs)
            if new is not theirs:
                self.changes.append(
                    partial(target.__setitem__, self._unravel(index, target.shape), new)
                )

    def _match_tuple(self, path: str, shadow: Any, target: Any) -> Any:
        if len(shadow) != len(target):
            raise StructureError(f"{path}: {len(shadow)} items in the payload, {len(target)} here")
        items = [
            self.replacement(f"{path}[{i}]", *pair)
            for i, pair in enumerate(zip(shadow, target, strict=True))
        ]
        if all(new is old for new, old in zip(items, target, strict=True)):
            return target
        changed = type(target)._make(items) if hasattr(target, "_make") else type(target)(items)
        self._partner_of_shadow[id(shadow)] = changed
        return changed

    def _match_children(self, path: str, shadow: Any, target: Any) -> None:
        mine, theirs = dict(_children(shadow) or ()), dict(_children(target) or ())
        if mine.keys() != theirs.keys():
            odd = sorted(str(label) for label, *_ in mine.keys() ^ theirs.keys())
            raise StructureError(f"{path}: only one of payload and target has {', '.join(odd[:5])}")
        for key, (value, _) in mine.items():
            old, setter = theirs[key]
            new = self.replacement(path + key[0], value, old)
            if new is not old:
                self.changes.append(partial(setter, new))

    def check_complete(self, sizes: list[int]) -> None:
        """Raise unless every buffer has landed in exactly one array, and no two targets overlap."""
        missing = [i for i, n in enumerate(sizes) if n and i not in self._landings]
        if missing:
            raise StructureError(
                f"$: buffer {missing[0]} of {len(sizes)} belongs to an object whose memory cannot "
                "be reached from outside. Use loads(payload) without into=."
            )
        targets = [t for _, t in (*self._landings.values(), *self._copies) if t.nbytes]
        bounds = sorted(byte_bounds(t) for t in targets)
        for (_, end), (start, _) in pairwise(bounds):
            if start < end:
                raise StructureError("$: two arrays of the target overlap in memory")

    def stage(self, sizes: list[int]) -> list[tuple[memoryview, Callable[[], object]]]:
        """Return for each buffer where to write it, and what to do after all are written."""
        for shadow, target in self._copies:
            self.changes.insert(0, partial(self._copyto, target, shadow))
        return [self._staged(i, nbytes) for i, nbytes in enumerate(sizes)]

    def _staged(self, position: int, nbytes: int) -> tuple[memoryview, Callable[[], object]]:
        if nbytes == 0:
            return memoryview(bytearray()), _nothing
        shadow, target = self._landings[position]
        flat = in_memory_order(target)
        if shadow.strides == target.strides and flat.flags.c_contiguous:
            return memoryview(flat.reshape(-1).view("u1")), _nothing
        # Another memory order: through ordinary memory, so that nothing is written in between.
        (aside,) = fresh_destinations([nbytes])
        arrived = self._ndarray(shadow.shape, shadow.dtype, aside, 0, shadow.strides)
        return aside, partial(self._copyto, target, arrived)

    def _copyto(self, target: Array, source: Array) -> None:
        import numpy as np

        np.copyto(target, source)


def _nothing() -> None:
    return None


def _children(
    obj: Any,
) -> Iterator[_Child] | None:
    """Return what is inside `obj` and can be changed in place; ``None`` if nothing can be seen."""
    if isinstance(obj, (dict, list, tuple)) or hasattr(obj, "__dict__") or _slots(obj):
        if isinstance(obj, type) or (callable(obj) and not hasattr(type(obj), "__dict__")):
            return None
        return _all_children(obj)
    return None


def _all_children(obj: Any) -> Iterator[_Child]:
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield (f"[{key!r}]", key), (value, partial(obj.__setitem__, key))
    elif isinstance(obj, (list, tuple)):
        for index, value in enumerate(obj):
            yield (f"[{index}]", index), (value, partial(operator.setitem, obj, index))
    for name, value in getattr(obj, "__dict__", {}).items():
        yield (f".{name}", name), (value, partial(obj.__dict__.__setitem__, name))
    for name in _slots(obj):
        if hasattr(obj, name):
            value = getattr(obj, name)
            yield (f".{name}", name), (value, partial(object.__setattr__, obj, name))


def _slots(obj: Any) -> list[str]:
    names: list[str] = []
    for cls in type(obj).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]
