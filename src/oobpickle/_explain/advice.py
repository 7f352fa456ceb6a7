"""Advice: why a part is where it is, how often it is copied, and what would change that.

**What.** `placement_of`, `reason_for`, `copies_of` and `advice_for`.

**How it works.** By type and amounts. The copies of plain pickling are those that CPython makes,
as a message goes through ``Connection.send`` and ``recv``: into the pickle, into the pipe, out of
it, into the message, and out of that. Protocol 4, the default before CPython 3.14, makes two more
of an array.

**Lifetime.** No state.

**When it cannot.** Where there is nothing to gain, or nothing is known, the advice is empty.
"""

from __future__ import annotations

import pickle
import sys
from types import FunctionType
from typing import Any, Final

from oobpickle._errors import format_nbytes
from oobpickle._explain import amounts as of
from oobpickle._explain.naming import is_array
from oobpickle._explain.parts import Part
from oobpickle._pickling.reducers import MIN_BUFFER_NBYTES

_WORTH_NBYTES: Final = 64 << 10
_LARGE: Final = 64 << 20
_MANY: Final = 10_000
_PLAIN_COPIES: Final = 5
_COLUMNS: Final = "see docs/how-to/many-small-objects.md"


def placement_of(part: Part) -> str:
    """Return where the bytes of a part are."""
    stream, out = part.amounts[of.STREAM], part.amounts[of.OUT]
    if part.refusal:
        return "refused"
    if out < 0.01 * (stream + out):
        return "stream"
    return "out of band" if stream < 0.01 * (stream + out) or not part.kept else "both"


def copies_of(part: Part, *, is_small: bool) -> tuple[int, int]:
    """Return how often most of the bytes are copied, plain and with oobpickle."""
    out = part.amounts[of.OUT]
    is_memory = 2 * out > part.nbytes or _kind_of_array(part.obj) not in ("", "O", "T")
    plain = _PLAIN_COPIES + (2 if is_memory and pickle.DEFAULT_PROTOCOL < 5 else 0)
    if is_small:
        return plain, plain
    if 2 * out > part.nbytes:
        return plain, 1
    return plain, 2 if type(part.obj) in (bytes, bytearray) else 3


def _kind_of_array(obj: Any) -> str:
    return str(obj.dtype.kind) if is_array(obj) else ""


def reason_for(part: Part, threshold: int, *, is_small: bool, is_leaf: bool) -> str:
    """Return why the part is where it is."""
    amounts, obj = part.amounts, part.obj
    if part.refusal:
        return part.refusal
    if amounts[of.REFUSED]:
        return "pickle cannot take a part of it"
    if is_small:
        return f"the whole message has less than {format_nbytes(threshold)}: it travels as ever"
    if type(obj) is FunctionType or (issubclass(type(obj), type) and amounts[of.PARTS] > 1):
        return "by value: no module has it under its name, so its code goes along"
    own = "taken apart by its own reducer; what rebuilding costs is not seen" if part.is_own else ""
    kind = _kind_of_array(obj)
    if kind in ("O", "T"):
        return "each element is a Python object to pickle"
    if kind and not amounts[of.OUT]:
        if obj.nbytes < MIN_BUFFER_NBYTES:
            return f"fewer than {MIN_BUFFER_NBYTES} bytes: a buffer of its own would cost more"
        if amounts[of.PARTS] == 1:
            return f"among the first {format_nbytes(threshold)}, which stay in the stream"
    if is_leaf and amounts[of.OUT]:
        return "memory: copied once, into shared memory"
    if type(obj) is str:
        return "a string is encoded into the stream"
    if type(obj) is bytes:
        return "bytes are part of the stream, which is copied as a whole"
    if amounts[of.OUT] and placement_of(part) == "both":
        return f"{format_nbytes(amounts[of.OUT])} in buffers, the rest is pickle stream" + (
            f"; {own}" if own else ""
        )
    return own or _of_many(amounts)


def _of_many(amounts: list[int]) -> str:
    n = amounts[of.PARTS]
    if amounts[of.OUT]:
        return "its arrays leave the stream"
    return f"{n:,} objects, pickled one by one" if n > 1 else "a part of the stream"


def advice_for(part: Part, inner: Part) -> str:
    """Return what to do about a part; empty if there is nothing to gain.

    `inner` is the part whose parts are shown below it, and get advice of their own.
    """
    amounts, obj = part.amounts, part.obj
    if part.refusal:
        return "leave it out (__getstate__), or make it anew where it arrives"
    if part.nbytes < _WORTH_NBYTES:
        return ""
    if part.parent is None and amounts[of.OUT] > max(_LARGE, amounts[of.PARTS] * 1024):
        can_broadcast = hasattr(sys.modules.get("oobpickle"), "broadcast")
        return "if many processes get the same: oobpickle.broadcast" if can_broadcast else ""
    kind = _kind_of_array(obj)
    if kind == "O":
        return _of_objects(obj)
    if kind == "T":
        return "astype('U') has its strings in one buffer; so have pyarrow's string arrays"
    if kind or type(obj) in (str, bytes, bytearray):
        return ""
    n_out, n_in = amounts[of.ARRAYS_OUT], amounts[of.ARRAYS_IN]
    if n_in + n_out > _MANY and part.nbytes / (n_in + n_out) < 4 * MIN_BUFFER_NBYTES:
        if _is_below(inner, of.ARRAYS_IN) or _is_below(inner, of.ARRAYS_OUT):
            return ""
        return f"one array for all of them, and where each begins: {_COLUMNS}"
    if amounts[of.STREAM] >= _WORTH_NBYTES and amounts[of.PARTS] > _MANY:
        return "" if _is_below(inner, of.PARTS) else _of_small_objects(part, inner is not part)
    return ""


def _is_below(part: Part, what: int) -> bool:
    """Tell whether one of its parts has nearly all of it, and gets the advice."""
    return any(one.amounts[what] > 0.8 * part.amounts[what] for *_, one in part.kept)


def _of_objects(array: Any) -> str:
    kinds = set(map(type, array.flat[:1000]))
    if kinds == {str}:
        return "strings in one buffer: astype('U'), or pandas with dtype='str' and pyarrow"
    if kinds <= {int, float, bool} and kinds:
        return "a dtype of numbers: astype(float)"
    return f"a dtype other than object, or columns: {_COLUMNS}"


def _of_small_objects(part: Part, is_wrapped: bool) -> str:
    obj, amounts = part.obj, part.amounts
    if type(obj) in (list, tuple, set, frozenset):
        kinds = set(
            map(type, list(obj)[:1000] if isinstance(obj, (set, frozenset)) else obj[:1000])
        )
        if kinds <= {int, float, bool} and kinds:
            return "numbers in one buffer: numpy.array or array.array"
    are_instances = amounts[of.CALLS] > _MANY or amounts[of.INSTANCES] > _MANY
    if isinstance(obj, dict) and not are_instances:
        # With a reducer the receiver would make the dictionary again, which is most of the work.
        return f"arrays of keys and of values in its place: {_COLUMNS}"
    if are_instances or part.is_own or is_wrapped:
        return f"arrays instead of objects, or oobpickle.register for its class: {_COLUMNS}"
    return f"columns: arrays in the place of its objects: {_COLUMNS}"
