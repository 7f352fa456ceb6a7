"""Comparison: where what arrived differs from what pickle delivers, by path.

**What.** `Comparison.differences` takes what plain pickle delivered and what arrived, and returns
one sentence for each difference: ``$.weights[2]: dtype float64 in pickle's, float32 here``.

**How it works.** Both are walked side by side, through containers, attributes, slots and elements
of object arrays; what has a reducer of its own is compared by what that returns, too. Compared are
type, value to the last bit, dtype, memory order, flags, which object stands in several places, and
which arrays share memory. The object that was sent is walked too, as far as it has the same
structure: where pickle loses memory order, byte order or writability of an array, keeping it is no
difference.

**Lifetime.** One for each pair; it keeps all that it has seen, so that no id is used twice.

**When it cannot.** What an object shows neither in attributes nor to its reducer is not seen. Names
are compared by identity: functions and classes that crossed by value are only compared by name."""

from __future__ import annotations

import collections
import copyreg
import enum
import struct
import types
from collections.abc import Callable, Iterable, Iterator
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final

from oobpickle._pickling import arrow_types
from oobpickle._pickling.reducers import byte_bounds

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: In the place of what was sent, where that is not there or has another structure.
UNKNOWN: Final = object()
_SINGLE: Final = (
    *(types.NoneType, bool, types.EllipsisType, types.NotImplementedType, types.ModuleType),
    *(type, types.BuiltinFunctionType, types.MethodDescriptorType, enum.Enum),
)
_BY_NAME: Final = (*_SINGLE, types.FunctionType)
_VALUES: Final = (int, str, bytes, bytearray, range, slice)
_NUMBERS: Final = (bool, int, float, complex)
_PICKLING: Final = ("__reduce_ex__", "__reduce__", "__getstate__")
_SHOWN: Final = 60


class Comparison:
    """One walk over what pickle delivers and what arrived."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._waiting: list[tuple[str, Any, Any, Any]] = []
        self._partner: dict[int, tuple[Any, str]] = {}  # by id of an object of pickle's
        self._place: dict[int, str] = {}  # by id of an object that arrived
        self._kept: list[Any] = []
        self._arrays: list[tuple[str, Array, Array]] = []
        self._sent: list[Array] = []

    def differences(self, sent: Any, expected: Any, actual: Any, *, apart: bool) -> list[str]:
        """Return one sentence for each difference.

        Parameters
        ----------
        sent : object
            What was sent.
        expected, actual : object
            What plain pickle made of it, and what arrived.
        apart : bool
            Whether `actual` is of this process, so that its memory must not be that of `sent`.
        """
        self._waiting.append(("$", sent, expected, actual))
        while self._waiting:
            self._pair(*self._waiting.pop())
        self._compare_memory(apart)
        return self._found

    def _say(self, path: str, what: str, expected: object, actual: object) -> None:
        self._found.append(f"{path}: {what}{_short(expected)} in pickle's, {_short(actual)} here")

    def _push(self, pairs: Iterable[tuple[str, Any, Any, Any]]) -> None:
        self._waiting += reversed(list(pairs))

    def _pair(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        if type(expected) is not type(actual):
            self._say(path, "type ", _name(type(expected)), _name(type(actual)))
        elif isinstance(expected, _BY_NAME):
            self._compare_names(path, expected, actual)
        elif self._is_new(path, expected, actual):
            found = (compare for kinds, compare in _COMPARES if isinstance(expected, kinds))
            compare = next(found, Comparison._compare_arrays_or_others)
            compare(self, path, sent if type(sent) is type(actual) else UNKNOWN, expected, actual)

    def _compare_names(self, path: str, expected: Any, actual: Any) -> None:
        if expected is actual:
            return
        if isinstance(expected, types.BuiltinFunctionType) and expected == actual:
            return  # a method, bound anew each time
        by_value = isinstance(expected, (types.FunctionType, type))
        if not by_value or _name(expected) != _name(actual):
            self._say(path, "", _name_or_value(expected), _name_or_value(actual))

    def _is_new(self, path: str, expected: Any, actual: Any) -> bool:
        """Compare who stands where; false if this pair was met before."""
        is_short = isinstance(expected, (str, bytes, tuple)) and len(expected) < 2
        # The names of attributes are those of the instance that came first.
        is_name = type(expected) is str and expected.isidentifier()
        if is_short or is_name or type(expected) in _NUMBERS:
            return True  # whether these are one object is the interpreter's choice
        partner, place = self._partner.get(id(expected), (None, ""))
        other = self._place.get(id(actual))
        if partner is None and other is None:
            self._partner[id(expected)] = actual, path
            self._place[id(actual)] = path
            self._kept += [expected, actual]
            return True
        if partner is not actual:
            if partner is not None:
                self._found.append(f"{path}: the same object as {place} in pickle's, not here")
            else:
                self._found.append(f"{path}: the same object as {other} here, not in pickle's")
        return False

    def _compare_values(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        same = expected == actual
        if isinstance(expected, (bytes, str, int)):  # what a subclass defines does not count
            base: Any = next(k for k in (bytes, str, int) if isinstance(expected, k))
            same = base.__eq__(expected, actual)
        elif isinstance(expected, bytearray):
            same = bytes(expected) == bytes(actual)
        if not same:
            self._say(path, "", expected, actual)
        self._compare_attributes(path, sent, expected, actual)

    def _compare_floats(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        def bits(number: Any) -> bytes:
            return struct.pack("dd", number.real, number.imag)

        if bits(expected) != bits(actual):
            self._say(path, "", expected, actual)
        self._compare_attributes(path, sent, expected, actual)

    def _compare_buffers(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        one, other = bytes(expected), bytes(actual)
        if one != other:
            self._say(path, "", one, other)

    def _compare_dicts(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        keys, others = list(dict.keys(expected)), list(dict.keys(actual))
        if len(keys) != len(others):
            self._say(path, "length ", len(keys), len(others))
            return
        ours = list(dict.keys(sent)) if sent is not UNKNOWN else []
        ours_fit = sent is not UNKNOWN and len(ours) == len(keys)
        sent_values = list(dict.values(sent)) if ours_fit else [UNKNOWN] * len(keys)
        self._compare_sequence(f"{path}.keys()", keys, others, ours)
        values = zip(dict.values(expected), dict.values(actual), strict=True)
        self._push(
            (f"{path}[{key!r}]", s, e, a)
            for key, s, (e, a) in zip(keys, sent_values, values, strict=True)
        )
        if isinstance(expected, collections.defaultdict):
            factories = expected.default_factory, actual.default_factory
            self._push([(f"{path}.default_factory", UNKNOWN, *factories)])
        self._compare_attributes(path, sent, expected, actual)

    def _compare_lists(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        base = next(k for k in (list, tuple, collections.deque) if isinstance(expected, k))
        items, others = list(base.__iter__(expected)), list(base.__iter__(actual))
        ours = list(base.__iter__(sent)) if sent is not UNKNOWN else []
        self._compare_sequence(path, items, others, ours)
        if base is collections.deque and expected.maxlen != actual.maxlen:
            self._say(path, "maxlen ", expected.maxlen, actual.maxlen)
        self._compare_attributes(path, sent, expected, actual)

    def _compare_sequence(self, path: str, items: list[Any], others: list[Any], sent: Any) -> None:
        if len(items) != len(others):
            self._say(path, "length ", len(items), len(others))
            return
        if len(sent) != len(items):
            sent = [UNKNOWN] * len(items)
        self._push(
            (f"{path}[{i}]", s, e, a)
            for i, (s, e, a) in enumerate(zip(sent, items, others, strict=True))
            if not (type(e) is type(a) and type(e) in (int, float) and e == a != 0)  # most of them
        )

    def _compare_sets(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        kinds = [collections.Counter(map(type, one)) for one in (expected, actual)]
        if set(expected) != set(actual) or kinds[0] != kinds[1]:
            self._say(path, "", expected, actual)
        self._compare_attributes(path, sent, expected, actual)

    def _compare_arrays_or_others(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        import numpy as np

        if isinstance(expected, np.ndarray):
            self._compare_arrays(path, sent, expected, actual)
        elif isinstance(expected, np.dtype):
            if _described(expected) != _described(actual):
                self._say(path, "", expected, actual)
        elif isinstance(expected, np.generic) and not isinstance(expected, np.object_):
            self._compare_arrays(path, UNKNOWN, np.asarray(expected), np.asarray(actual))
        else:
            if not _is_plain(type(expected)):
                self._compare_reduced(path, expected, actual)
            self._compare_attributes(path, sent, expected, actual)

    def _compare_attributes(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        mine, theirs = dict(_attributes(expected)), dict(_attributes(actual))
        if list(mine) != list(theirs):
            self._say(path, "attributes ", list(mine), list(theirs))
            return
        # What __setstate__ makes of it need not be what was sent.
        kind = type(sent)
        known = sent is not UNKNOWN and _is_plain(kind) and not hasattr(kind, "__setstate__")
        ours = dict(_attributes(sent)) if known else {}
        self._push(
            (f"{path}.{name}", ours.get(name, UNKNOWN), value, theirs[name])
            for name, value in mine.items()
        )

    def _compare_reduced(self, path: str, expected: Any, actual: Any) -> None:
        try:
            mine, theirs = _reduced(expected), _reduced(actual)
        except Exception:  # made anew where it was loaded, as a lock is: there is nothing to see
            return
        self._push([(f"{path}.__reduce_ex__(5)", UNKNOWN, mine, theirs)])

    def _compare_arrays(self, path: str, sent: Any, expected: Any, actual: Any) -> None:
        import numpy as np

        exact = type(expected) is np.ndarray
        known = sent is not UNKNOWN and exact
        ours = sent if known else expected
        self._arrays.append((path, expected, actual))
        self._kept += [expected, actual]
        if known:
            self._sent.append(sent)
        if expected.shape != actual.shape:
            self._say(path, "shape ", expected.shape, actual.shape)
            return
        dtypes = _described(expected.dtype), _described(ours.dtype)
        if _described(actual.dtype) not in dtypes:
            self._say(path, "dtype ", str(expected.dtype), str(actual.dtype))
            return
        if _order(actual) not in (_order(expected), _order(ours.copy("K"))):
            self._say(path, "strides ", expected.strides, actual.strides)
        if actual.flags.aligned != expected.flags.aligned:
            self._say(path, "aligned: ", expected.flags.aligned, actual.flags.aligned)
        if not actual.flags.writeable and (expected.flags.writeable or known):
            self._found.append(f"{path}: read-only; ndarrays arrive writable")
        base = np.ndarray.view(expected, np.ndarray), np.ndarray.view(actual, np.ndarray)
        self._compare_elements(path, ours, *base)
        if not exact:
            self._compare_attributes(path, UNKNOWN, expected, actual)

    def _compare_elements(self, path: str, sent: Any, expected: Array, actual: Array) -> None:
        import numpy as np

        if expected.dtype.names is not None:  # what lies between fields is no part of the value
            for name in expected.dtype.names:
                self._compare_elements(f"{path}[{name!r}]", UNKNOWN, expected[name], actual[name])
        elif expected.dtype.kind in "OT":
            known = isinstance(sent, np.ndarray) and sent.dtype.kind == "O"
            ours = sent.ravel().tolist() if known else []
            self._compare_sequence(
                f"{path}.ravel()", expected.ravel().tolist(), actual.ravel().tolist(), ours
            )
        elif expected.dtype.itemsize:
            one = np.ascontiguousarray(expected).reshape(-1)
            other = np.ascontiguousarray(actual.astype(expected.dtype, copy=False)).reshape(-1)
            rows = one.size, expected.dtype.itemsize
            raw = one.view("u1").reshape(rows), other.view("u1").reshape(rows)
            if not np.array_equal(*raw):
                at = int(np.argmax((raw[0] != raw[1]).any(axis=1)))
                index = [int(i) for i in np.unravel_index(at, expected.shape)]
                where = f"{path}[{', '.join(map(str, index))}]" if index else path
                self._say(where, "", one[at], other[at])

    def _compare_memory(self, apart: bool) -> None:
        paths = [path for path, _, _ in self._arrays]
        actual = [other for _, _, other in self._arrays]
        expected_groups = _groups([one for _, one, _ in self._arrays])
        actual_groups = _groups(actual)
        for groups, others, where in (
            (actual_groups, expected_groups, "here, not in pickle's"),
            (expected_groups, actual_groups, "in pickle's, not here"),
        ):
            first: dict[int, int] = {}
            for i, group in enumerate(groups):
                partner = first.setdefault(group, i)
                if others[partner] != others[i]:
                    self._found.append(f"{paths[i]}: shares memory with {paths[partner]} {where}")
        if apart:
            groups = _groups([*actual, *self._sent])
            sent_groups = set(groups[len(actual) :])
            self._found += [
                f"{path}: shares memory with what was sent"
                for path, group in zip(paths, groups, strict=False)
                if group in sent_groups
            ]


def _groups(arrays: list[Array]) -> list[int]:
    """Return a number for each array; those whose memory overlaps have the same."""
    bounds = sorted((*byte_bounds(a), i) for i, a in enumerate(arrays))
    numbers = [-1 - i for i in range(len(arrays))]
    end, number = -1, 0
    for low, high, i in bounds:
        if low == high:
            continue
        number += low >= end
        numbers[i] = number
        end = max(end, high)
    return numbers


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _name(obj: Any) -> str:
    return f"{obj.__module__}.{obj.__qualname__}".removeprefix("builtins.")


def _name_or_value(obj: Any) -> str:
    return _name(obj) if hasattr(obj, "__qualname__") else repr(obj)


def _order(array: Array) -> tuple[int, ...]:
    """Return the strides along the axes where they mean something."""
    if array.size == 0:
        return ()
    return tuple(s for s, n in zip(array.strides, array.shape, strict=True) if n > 1)


def _described(dtype: Any) -> tuple[object, ...]:
    kind = dtype.type.__name__, dtype.char, dtype.isalignedstruct
    return (dtype.str, repr(dtype), *kind, dict(dtype.metadata or {}))


def _attributes(obj: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(obj, "__dict__", {}).items()
    for name in copyreg._slotnames(type(obj)):  # type: ignore[attr-defined]
        if hasattr(obj, name):
            yield name, getattr(obj, name)


def _is_plain(kind: type) -> bool:
    """Whether instances are pickled by ``object`` alone."""
    own = any(getattr(kind, name) is not getattr(object, name) for name in _PICKLING)
    computed = any(hasattr(kind, name) for name in ("__getnewargs__", "__getnewargs_ex__"))
    return not own and not computed and kind not in copyreg.dispatch_table


def _reduced(obj: Any) -> Any:
    reducer = copyreg.dispatch_table.get(type(obj))
    if arrow_types.reducer_of(type(obj)) is not None:
        obj = arrow_types.compact(obj)  # where the range begins in its memory is no value
    found = obj.__reduce_ex__(5) if reducer is None else reducer(obj)
    if isinstance(found, str):
        return found
    return tuple(list(one) if isinstance(one, Iterator) else one for one in found)


_Compare = Callable[[Comparison, str, Any, Any, Any], None]
#: The first that fits is taken.
_COMPARES: Final[list[tuple[tuple[type, ...], _Compare]]] = [
    ((float, complex), Comparison._compare_floats),
    (_VALUES, Comparison._compare_values),
    ((memoryview, PickleBuffer), Comparison._compare_buffers),
    ((dict,), Comparison._compare_dicts),
    ((list, tuple, collections.deque), Comparison._compare_lists),
    ((set, frozenset), Comparison._compare_sets),
]
