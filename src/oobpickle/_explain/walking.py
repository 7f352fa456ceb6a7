"""Walking: what the pickler meets in an object, in its order, without writing it.

**What.** `walk` returns a tree of `Part`: what each part of the object takes in the stream and
beside it, and how many objects of each kind it has.

**How it works.** With a stack of its own, so that the depth of an object is no matter. Each part
adds up its `amounts`; a part keeps its largest parts only, so that a million of them take no
memory. What consists of numbers and strings only is counted as a whole.

**Lifetime.** What reducers return is referred to until the walk ends, as by the pickler: else a new
object could be taken for an old one at the same address.

**When it cannot.** A part that pickle refuses has the reason in `Part.refusal`, and the walk goes
on. What is `_DEEPEST` levels down is refused: the pickler has no room for that."""

from __future__ import annotations

import copyreg
import functools
import heapq
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pickle import PickleBuffer
from time import perf_counter_ns
from typing import Any, Final

from oobpickle._explain import amounts as of
from oobpickle._explain.amounts import MEMO_NBYTES, NUMBERS, PLAIN, STRING_TYPES
from oobpickle._explain.memo import Memo
from oobpickle._explain.parts import (
    ARGUMENT,
    ATTRIBUTE,
    ENTRY,
    INDEX,
    KEY,
    ROOT,
    STATE,
    Item,
    Part,
)
from oobpickle._explain.reducing import Reducer
from oobpickle._foreign import pass_on_foreign
from oobpickle._pickling.reducers import MIN_BUFFER_NBYTES

MOST_KEPT: Final = 40  # parts that a part keeps
_ALWAYS_KEPT: Final = 12  # of these, however small they are
_LEAST_KEPT_NBYTES: Final = 1024
_DEEPEST_KEPT: Final = 60
_DEEPEST: Final = 20_000
_LEAST_SHARED_NBYTES: Final = 4096
_FEW: Final = 16
_MOST_BUFFERS: Final = 100_000
_ARRAY_NBYTES: Final = 16  # around the bytes of one: shape, dtype, the call
_FRAMED_NBYTES: Final = 64 << 10


class Walk:
    """One walk over an object.

    Attributes
    ----------
    root : Part
        The object itself.
    buffers : list of (object, Part, str)
        The memory of arrays and the like, of `_LEAST_SHARED_NBYTES` or more.
    deepest : int
        Levels.
    refused : list of Part
        The first that cannot be pickled.
    """

    def __init__(self, obj: object, threshold: int) -> None:
        self._reducer = Reducer(threshold)
        self._sink = self._reducer.sink
        self._memo = Memo()
        self._serial = itertools.count()
        self._ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
        levels = self._sink.table.levels
        self._has_own_arrays = any(self._ndarray in level for level in levels)
        self.buffers: list[tuple[Any, Part]] = []
        self.refused: list[Part] = []
        self.deepest = 0
        self.root = Part(None, None, ROOT, "")
        self._run(obj)
        self._sink.clear()  # a bytearray can be resized again

    def _run(self, obj: object) -> None:
        above = Part(None, None, ROOT, "")
        above.items = iter([(ROOT, "", obj)])
        stack = [above]
        while stack:
            part = stack[-1]
            child = self._next(part)
            if child is not None:
                stack.append(child)
                self.deepest = max(self.deepest, len(stack))
                continue
            part.items = None
            stack.pop()
            if stack:
                self._leave(stack[-1], part)
        self.root = above.kept[0][2] if above.kept else self._of_number(obj)
        self.root.parent = None
        stream = self.root.amounts[of.STREAM]
        n_frames = 0 if stream < 3 else 1 + stream // _FRAMED_NBYTES
        self.root.amounts[of.STREAM] += 3 + 9 * n_frames

    def _of_number(self, obj: object) -> Part:
        part = Part(obj, None, ROOT, "")
        part.amounts[of.PARTS] = 0
        self._memo.add(part.amounts, obj)
        return part

    def _next(self, part: Part) -> Part | None:
        """Go on with the items of a part; return the first that has items itself."""
        total, memo = part.amounts, self._memo
        try:
            for style, label, obj in part.items or ():
                kind = type(obj)
                if kind in NUMBERS or id(obj) in memo:
                    self._memo.add(total, obj)
                    continue
                if len(part.kept) >= _ALWAYS_KEPT and self._is_few(total, obj, kind):
                    continue
                child = self._enter(part, style, label, obj, kind)
                if child is None:
                    total = part.amounts
                    continue
                if child.items is not None:
                    return child
                self._leave(part, child)
                total = part.amounts
        except Exception as error:  # of an iterator that a reducer returned
            pass_on_foreign(error)
            self._refuse(part, error)
        return None

    def _leave(self, part: Part, child: Part) -> None:
        """Add what a part's part takes, and keep it if it is one of the largest."""
        part.amounts = of.added(part.amounts, child.amounts)
        if part.depth > _DEEPEST_KEPT:
            return
        # What is refused counts as large, or it would not be seen.
        weight = child.nbytes + (1 << 62 if child.amounts[of.REFUSED] else 0)
        if len(part.kept) < MOST_KEPT:
            heapq.heappush(part.kept, (weight, next(self._serial), child))
        elif weight > part.kept[0][0]:
            heapq.heapreplace(part.kept, (weight, next(self._serial), child))

    def _refuse(self, part: Part, error: Exception) -> None:
        part.refusal = self._reducer.why_not(part.obj, error)
        part.amounts[of.REFUSED] += 1
        if len(self.refused) < MOST_KEPT:
            self.refused.append(part)

    def forget(self) -> None:
        """Refer to nothing of the object any more, without waiting for the collector."""
        todo = [self.root, *self.refused, *(part for _, part in self.buffers)]
        while todo:
            part = todo.pop()
            todo += [child for *_, child in part.kept]
            part.obj = part.parent = part.items = part.label = None
            part.kept = []
        self.buffers.clear()
        self.refused.clear()
        self._memo.clear()

    def refuse_all(self, error: Exception) -> None:
        """Say that the object cannot be pickled as a whole."""
        self._refuse(self.root, error)

    # --- a few numbers and strings

    def _is_few(self, total: list[int], obj: Any, kind: type) -> bool:
        """Add what has a few numbers and strings in it, and no others; the same as `_enter` does.

        There may be a million of them.
        """
        if kind is self._ndarray:
            nbytes = obj.nbytes
            is_few = nbytes < MIN_BUFFER_NBYTES and not self._has_own_arrays and _has_memory(obj)
            if is_few:
                total[of.PARTS] += 1
                total[of.ARRAYS_IN] += 1
                total[of.STREAM] += _ARRAY_NBYTES + 5 * obj.ndim + nbytes
        elif kind is tuple or kind is list:
            is_few = len(obj) <= _FEW and PLAIN.issuperset(map(type, obj))
            if is_few:
                self._memo.add_few(total, obj)
                total[_COUNTED_AS[kind]] += 1
                total[of.STREAM] += _nbytes_around(kind, len(obj))
        else:
            return self._is_few_attributes(total, obj, kind)
        if is_few:
            self._memo[id(obj)] = obj
        return is_few

    def _is_few_attributes(self, total: list[int], obj: Any, kind: type) -> bool:
        memo = self._memo
        if id(kind) not in memo or not self._reducer.is_plain(kind):
            return False
        try:
            state = obj.__dict__
        except Exception as error:  # what the pickler asks for as well: `_reduced` says it
            pass_on_foreign(error)
            return False
        if type(state) is not dict or len(state) > _FEW or not _has_dict_only(kind):
            return False
        values = state.values()
        if not (PLAIN.issuperset(map(type, values)) and PLAIN.issuperset(map(type, state))):
            return False
        self._memo.add_few(total, state)
        self._memo.add_few(total, values)
        total[of.PARTS] -= 1
        total[of.INSTANCES] += 1
        total[of.ENTRIES] += len(state)
        nbytes = 6 + of.nbytes_of_batches(len(state)) + self._memo.nbytes_again(id(kind))
        total[of.STREAM] += nbytes
        memo[id(obj)] = obj
        memo[id(state)] = state
        return True

    def _enter(self, above: Part, style: int, label: Any, obj: Any, kind: type) -> Part | None:
        """Return a part for an object; ``None`` if it is small and was added to `above`."""
        if kind in STRING_TYPES and len(obj) < _LEAST_KEPT_NBYTES and style != ROOT:
            self._memo.add(above.amounts, obj)
            return None
        part = Part(obj, above, style, label)
        if part.depth > _DEEPEST:
            self._refuse(part, RecursionError(f"nested more than {_DEEPEST:,} levels deep"))
            return part
        if kind in STRING_TYPES:
            part.amounts[of.PARTS] = 0
            self._memo.add(part.amounts, obj)
            return part
        self._memo[id(obj)] = obj
        opener = _CONTAINERS.get(kind)
        if opener is not None:
            opener(self, part, obj)
        elif kind is self._ndarray and not self._has_own_arrays and _has_memory(obj):
            self._array(part, obj)
        elif kind is bytearray or kind is PickleBuffer:
            self._memory(part, obj)
        else:
            self._reduced(part, obj, kind)
        is_small = part.items is None and part.nbytes < _LEAST_KEPT_NBYTES and not part.refusal
        if is_small and style != ROOT and len(above.kept) >= _ALWAYS_KEPT:
            above.amounts = of.added(above.amounts, part.amounts)
            return None
        return part

    # --- memory

    def _array(self, part: Part, array: Any) -> None:
        nbytes, total = array.nbytes, part.amounts
        is_out = nbytes >= MIN_BUFFER_NBYTES and not self._sink.stays(nbytes)
        total[of.ARRAYS_OUT if is_out else of.ARRAYS_IN] = 1
        total[of.STREAM] = _ARRAY_NBYTES + 5 * array.ndim + (0 if is_out else nbytes)
        total[of.OUT] = nbytes if is_out else 0
        self._note(array, nbytes, part)

    def _memory(self, part: Part, obj: Any) -> None:
        """Add a bytearray, or a PickleBuffer, for which something else may stand."""
        total, sink = part.amounts, self._sink
        if type(obj) is bytearray and len(obj) < _FRAMED_NBYTES:
            total[of.STRINGS] = 1
            total[of.STREAM] = 9 + MEMO_NBYTES + len(obj)
            return
        try:
            buffer = PickleBuffer(obj)  # of a bytearray; a stand-in has to be itself
            stays = sink.take(buffer if type(obj) is bytearray else obj)
            if stays:
                nbytes = len(obj) if type(obj) is bytearray else obj.raw().nbytes
                total[of.STREAM], total[of.STRINGS] = 10 + nbytes, 1
                self._note(buffer, nbytes, part)
            else:
                total[of.STREAM], total[of.ARRAYS_OUT] = 2, 1
                total[of.OUT] = sink.sizes[-1]
                self._note(sink.sources[-1], sink.sizes[-1], part)
        except (BufferError, ValueError) as error:  # strided, or released
            self._refuse(part, error)

    def _note(self, source: Any, nbytes: int, part: Part) -> None:
        if nbytes >= _LEAST_SHARED_NBYTES and len(self.buffers) < _MOST_BUFFERS:
            self.buffers.append((source, part))

    # --- what has parts

    def _open_sequence(self, part: Part, obj: Any) -> None:
        total, n, kind = part.amounts, len(obj), type(obj)
        total[_COUNTED_AS[kind]] = 1
        total[of.STREAM] = _nbytes_around(kind, n)
        if set(map(type, obj)) <= PLAIN:
            self._memo.add_all(total, obj)
        else:
            part.items = ((INDEX, i, one) for i, one in enumerate(obj))

    def _open_dict(self, part: Part, obj: dict[Any, Any], style: int = ENTRY) -> None:
        total = part.amounts
        total[of.DICTS] += 1
        total[of.ENTRIES] += len(obj)
        total[of.STREAM] += 2 + of.nbytes_of_batches(len(obj))
        items = self._entries(part, obj, style)
        part.items = items if part.items is None else itertools.chain(part.items, items)

    def _entries(self, part: Part, obj: dict[Any, Any], style: int) -> Iterator[Item]:
        values = list(obj.values())
        is_plain = set(map(type, values)) <= PLAIN
        if set(map(type, obj)) <= PLAIN:
            self._memo.add_all(part.amounts, list(obj))
        else:
            yield from ((KEY, key, key) for key in list(obj))
        if is_plain:
            self._memo.add_all(part.amounts, values)
        else:
            yield from ((style, key, value) for key, value in zip(list(obj), values, strict=True))

    def _reduced(self, part: Part, obj: Any, kind: type) -> None:
        part.is_own = not self._reducer.is_plain(kind)
        start = perf_counter_ns() if part.is_own else 0
        try:
            value = self._reducer.reduce(obj)
        except Exception as error:
            pass_on_foreign(error)
            self._refuse(part, error)
            return
        if part.is_own:
            part.amounts[of.NS_REDUCERS] += perf_counter_ns() - start
        if isinstance(value, str):
            part.is_own = False
            self._named(part.amounts, value)
            return
        self._called(part, obj, *value)

    def _named(self, total: list[int], name: str) -> None:
        total[of.STRINGS] += 2
        total[of.STREAM] += len(name) + 7 + MEMO_NBYTES

    def _called(
        self,
        part: Part,
        obj: Any,
        function: Any,
        arguments: Any,
        state: Any = None,
        items: Any = None,
        entries: Any = None,
        setter: Any = None,
    ) -> None:
        total = part.amounts
        is_new = getattr(function, "__name__", "") == "__newobj__" and len(arguments) > 0
        total[of.INSTANCES if is_new else of.CALLS] = 1
        n = len(arguments)
        total[of.STREAM] += 3 if is_new and n == 1 else 4 if n < 4 else 5
        given: Iterable[Item] = ((ARGUMENT, i, one) for i, one in enumerate(arguments))
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            given = itertools.chain([(STATE, "function", function)], given)
        parts: list[Iterable[Item]] = [given]
        if items is not None:
            parts.append((INDEX, i, one) for i, one in enumerate(items))
        if entries is not None:
            parts.append(_pairs(entries))
        part.items = itertools.chain.from_iterable(parts)
        if type(state) is dict and id(state) not in self._memo:
            self._memo[id(state)] = state
            total[of.DICTS] -= 1 if is_new else 0  # an instance is measured with its own
            self._open_dict(part, state, ATTRIBUTE)
            total[of.STREAM] += 1
        elif state is not None:
            total[of.STREAM] += 1
            part.items = itertools.chain(part.items, _slots_of(state, self._memo))
        if setter is not None:
            part.items = itertools.chain(part.items, [(STATE, "setter", setter)])


def _pairs(entries: Any) -> Iterator[Item]:
    for key, value in entries:
        yield KEY, key, key
        yield ENTRY, key, value


def _slots_of(state: Any, memo: dict[int, Any]) -> Iterator[Item]:
    """Yield the attributes in the state of an object with slots, or the state as it is."""
    is_of_slots = type(state) is tuple and len(state) == 2 and type(state[1]) is dict
    if not is_of_slots or type(state[0]) not in (dict, type(None)):
        yield STATE, "state", state
        return
    memo[id(state)] = state
    for attributes in filter(None, state):
        yield from ((ATTRIBUTE, name, name) for name in attributes)
        yield from ((ATTRIBUTE, name, value) for name, value in attributes.items())


def _nbytes_around(kind: type, n_items: int) -> int:
    if kind is tuple:
        return 1 if n_items == 0 else 2 if n_items < 4 else 3
    return 3 if kind is frozenset else 2 + of.nbytes_of_batches(n_items)


@functools.lru_cache(64)
def _has_dict_only(kind: type) -> bool:
    """Tell whether the state of instances is their ``__dict__``: no slots, no items of a list."""
    slots = [base for base in kind.__mro__ if vars(base).get("__slots__")]
    return not slots and not issubclass(kind, (list, dict, tuple, set, frozenset, str, bytes, int))


def _has_memory(array: Any) -> bool:
    """Tell whether the elements of an exact ndarray are bytes, not Python objects."""
    return array.dtype.kind in "biufcmMSUV" and not array.dtype.hasobject


_COUNTED_AS: Final[dict[type, int]] = {
    tuple: of.TUPLES,
    list: of.LISTS,
    set: of.SETS,
    frozenset: of.SETS,
}
_CONTAINERS: Final[dict[type, Callable[[Walk, Part, Any], None]]] = {
    dict: Walk._open_dict,
    **dict.fromkeys(_COUNTED_AS, Walk._open_sequence),
}
