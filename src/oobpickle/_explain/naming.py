"""Naming: how a part of an object is called, and what its type is, in a few words.

**What.** `label_of`, the piece of a path (``.weight``, ``[3]``, ``['name']``), and `type_of`.

**How it works.** No code of the object runs: only what is of a simple type is shown by its own
``repr``. What an own reducer returned is looked for among the attributes of its object.

**Lifetime.** No state.

**When it cannot.** What has no name is shown by its place: ``<argument 0>`` of the function that
rebuilds the object. Blocks of a pandas frame are shown by the names of their columns.
"""

from __future__ import annotations

import collections
import sys
from itertools import islice
from typing import Any, Final

from oobpickle._explain import amounts as of
from oobpickle._explain import parts
from oobpickle._explain.parts import Part

_MOST_REPR: Final = 40
_MOST_LOOKED_AT: Final = 100_000
_SHOWN: Final = (str, bytes, int, float, bool, type(None))
_PANDAS: Final = "pandas.core.internals"
_NAMED: Final = {"str": "Python strings", "int": "Python ints", "float": "Python floats"}


def name_of(kind: type, attribute: str = "__qualname__") -> str:
    """Return the name of a class, or its module; a metaclass of the program's is not asked."""
    return str(type.__getattribute__(kind, attribute))


def short(value: Any) -> str:
    """Return a key as it is written, if that runs no code of the program's."""
    if type(value) is tuple and len(value) <= 4 and all(type(one) in _SHOWN for one in value):
        text = repr(value)
    elif type(value) in _SHOWN:
        text = repr(value[: 2 * _MOST_REPR]) if isinstance(value, (str, bytes)) else repr(value)
    else:
        return f"<{name_of(type(value))}>"
    return text if len(text) <= _MOST_REPR else text[: _MOST_REPR - 4] + "..." + text[-1]


def label_of(part: Part) -> str:
    """Return what a part adds to the path of the part that it is in."""
    style, label, above = part.style, part.label, part.parent
    if _is(part, "BlockManager"):
        return ""
    if above is not None and _is(above, "BlockManager") and style == parts.ARGUMENT:
        return ""
    if _is(part, "Block") and above is not None and above.parent is not None:
        columns = _columns_of(part.obj, above.parent.obj)
        if columns:
            return columns
    if style == parts.INDEX:
        return f"[{label}]"
    if style == parts.ENTRY:
        return f"[{short(label)}]"
    if style == parts.KEY:
        return f"<key {short(label)}>"
    if style == parts.ATTRIBUTE:
        return f".{label}" if type(label) is str else f"<attribute {short(label)}>"
    if style == parts.ARGUMENT:
        return _attribute_that_is(part) or f"<argument {label}>"
    return f"<{label}>" if style == parts.STATE else ""


def _attribute_that_is(part: Part) -> str:
    above = part.parent
    try:
        attributes = object.__getattribute__(above.obj, "__dict__") if above else {}
    except Exception:  # it has none
        return ""
    if type(attributes) is not dict:
        return ""
    return next((f".{name}" for name, one in attributes.items() if one is part.obj), "")


def _is(part: Part, ending: str) -> bool:
    kind = type(part.obj)
    return name_of(kind).endswith(ending) and name_of(kind, "__module__").startswith(_PANDAS)


def is_wrapper(part: Part) -> bool:
    """Tell whether a part has no name of its own: an argument, a state, the blocks of a frame."""
    return part.style in (parts.ARGUMENT, parts.STATE) or _is(part, "BlockManager")


def _columns_of(block: Any, manager: Any) -> str:
    try:
        items = manager.axes[0]
        names = [items[at] for at in list(block.mgr_locs)]
    except Exception:  # of another version of pandas
        return ""
    if not names or len(manager.axes) < 2:
        return ""
    shown = ", ".join(map(short, names[:3]))
    return f"[{shown}]" if len(names) <= 3 else f"[{shown}, {len(names) - 3:,} more]"


def type_of(part: Part) -> str:
    """Return the type of a part's object, with what it has in it."""
    obj = part.obj
    kind = type(obj)
    name, module = name_of(kind), name_of(kind, "__module__")
    if module not in ("builtins", "__main__", "numpy"):
        name = f"{module}.{name}"
    if is_array(obj):
        return f"{name} {_described(obj)}"
    if issubclass(kind, type):
        return f"class {name_of(obj)}"
    if kind in (dict, list, tuple, set, frozenset, collections.Counter, collections.deque):
        return f"{name} of {_content_of(part)}"
    if kind in (str, bytes, bytearray):
        return f"{name} of {len(obj):,}"
    return name


def type_within(part: Part, told: Part) -> str:
    """Return the type of a wrapper, with that of what is in it."""
    inside = type_of(told)
    return inside if _is(part, "Block") else f"{type_of(part)}, {inside}"


def is_array(obj: object) -> bool:
    """Tell whether it is an array of NumPy, by its type: proxies are not asked."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(type(obj), numpy.ndarray)


def _described(array: Any) -> str:
    dtype, shape = array.dtype, "x".join(map(str, array.shape)) or "()"
    if dtype.kind == "T":
        return f"StringDType {shape}: a list of strings to pickle"
    if dtype.kind == "O":
        return f"object {shape}: {_kinds_of(array.size, array.flat)}"
    return f"{dtype.name if dtype.names is None else 'of records'} {shape}"


def _kinds_of(n: int, values: Any) -> str:
    """Return how many of what type there are; of very many the first are looked at."""
    found = collections.Counter(map(type, islice(values, _MOST_LOOKED_AT)))
    if not found:
        return f"{n:,}"
    kind, many = found.most_common(1)[0]
    if many < 0.99 * sum(found.values()):
        return f"{n:,} objects of {len(found):,} types"
    return f"{n:,} {_NAMED.get(name_of(kind), name_of(kind))}"


def _content_of(part: Part) -> str:
    obj = part.obj
    n = len(obj)
    if n < 10:
        return str(n)
    if part.nbytes / n > 1000:
        return f"{n:,}"
    if isinstance(obj, dict):
        small = part.amounts[of.PARTS] / n < 3
        return f"{n:,} small objects" if small else f"{n:,}"
    return _kinds_of(n, obj)
