"""Classes by value: which ones can be made again elsewhere, and how.

**What.** `refusal` says why a class cannot go by value. `reduce_class` takes apart one that can,
`reduce_typevar` a type variable.

**How it works.** A class is made by its metaclass from its name, its bases and its slots, and gets
its other attributes when it is known to the pickler, since its methods may refer to it. So it can
go only if nothing of the user's runs when a class is made: no metaclass that has a say in it, no
``__init_subclass__``, no keyword arguments for these. Methods come first, and those that make
instances before all: an attribute, or a global of a method, may be an instance of the class. ::

    make_class(metaclass, name, bases, namespace, number) | set_class(class, state)
    state: set_attributes(class, ...) for each step | virtual subclasses | members

The number is cloudpickle's, which finds the class where it was made before, or where it comes from:
so an instance that is sent back is an instance of the original class.

**Lifetime.** A class that was made from a message belongs to whoever uses it. It has what the last
message said; the original is never changed.

**When it cannot.** `refusal` gives the reason, and the class is refused as plain pickling does it.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import types
import typing
import weakref
from typing import Any, Final

import cloudpickle.cloudpickle as _cloudpickle  # type: ignore[import-untyped]

from oobpickle._pickling.functions import Parts, Reduced, annotations_of

Field: Final = dataclasses.Field
_Protocol: Final[Any] = type(typing.Protocol)
_METACLASSES: Final = (type, abc.ABCMeta, enum.EnumMeta, _Protocol)
#: What a metaclass may not have of its own: with it, making the class again could do anything.
_MAKING: Final = (
    *("__new__", "__init__", "__prepare__", "__setattr__", "__delattr__", "__getattribute__"),
    *("mro", "__eq__", "__hash__"),
)
#: Where an ``__init_subclass__`` may come from that can run for a class that is still empty.
_HARMLESS: Final = ("builtins", "typing", "enum", "abc", "collections", "sklearn")
_HEAP, _IMMUTABLE = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE, Py_TPFLAGS_IMMUTABLETYPE
_OF_C: Final = (
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
)
_DROPPED: Final = frozenset(
    # copyreg finds the last one but one again; CPython 3.15 leaves the last in named tuples.
    (
        *("__dict__", "__weakref__", "__module__", "__slots__"),
        *("__slotnames__", "__classdictcell__"),
    )
)
_DROPPED_IN_314: Final = frozenset(("__annotate_func__", "__annotations_cache__"))
#: What the metaclass of an enumeration makes anew.
_OF_ENUM: Final = frozenset(
    (
        *("_generate_next_value_", "_member_names_", "_member_map_", "_member_type_"),
        *("_value2member_map_", "_unhashable_values_", "_unhashable_values_map_"),
        *("_hashable_values_", "_new_member_", "_use_args_", "_value_repr_", "_boundary_"),
        *("_flag_mask_", "_singles_mask_", "_all_bits_", "_inverted_"),
        *("__new__", "__new_member__"),
    )
)
#: What may be needed to load an instance, each by itself: what it refers to may be one.
_MAKING_INSTANCES: Final = (
    *("__new__", "__dataclass_fields__", "__setstate__", "__hash__", "__eq__", "__init__"),
    *("__setattr__", "__setitem__"),
)
_METHODS: Final = (types.FunctionType, classmethod, staticmethod, property)
_OF_MEMBER: Final = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_"))
_MEMBER_TYPES: Final = (object, int, str, float)

_copies: Final[weakref.WeakSet[type]] = weakref.WeakSet()  # made from messages


# --- the rule


def refusal(cls: type) -> str:
    """Return why a class cannot go by value, or ``""``."""
    if not cls.__flags__ & _HEAP or cls.__flags__ & _IMMUTABLE or _is_of_c(cls):
        return "it was not made by a class statement"
    metaclass: Any = type(cls)
    for name in _MAKING:
        owner = next((c for c in metaclass.__mro__ if name in vars(c)), object)
        if owner is not object and owner not in _METACLASSES:
            return f"its metaclass {metaclass.__qualname__} has a {name} of its own"
    for base in cls.__mro__[1:]:
        if "__init_subclass__" in vars(base) and not _is_harmless(base):
            return f"its base {base.__qualname__} has an __init_subclass__"
    slots = vars(cls).get("__slots__", ())
    if not isinstance(slots, (str, tuple, list, dict, set, frozenset)):
        return "its __slots__ can be read only once"
    return _refusal_of_enum(cls) if isinstance(cls, enum.EnumMeta) else ""


def _is_harmless(base: type) -> bool:
    return base.__module__.partition(".")[0] in _HARMLESS


def _is_of_c(cls: type) -> bool:
    has_slots = "__slots__" in vars(cls)
    return any(
        isinstance(value, _OF_C)
        and value.__objclass__ is cls
        and name not in ("__dict__", "__weakref__")
        and not (has_slots and isinstance(value, types.MemberDescriptorType))
        for name, value in vars(cls).items()
    )


def _refusal_of_enum(cls: Any) -> str:
    if cls._member_type_ not in _MEMBER_TYPES:
        return f"it is an enumeration of {cls._member_type_.__qualname__}"
    new = cls._new_member_
    if isinstance(new, types.FunctionType) and new.__module__ != enum.__name__:
        return "it is an enumeration with a __new__"
    return ""


# --- taking apart


def reduce_class(parts: Parts, cls: type) -> Reduced:
    """Reduce a class that `refusal` has nothing against."""
    number = _cloudpickle._get_or_create_tracker_id(cls)
    if isinstance(cls, enum.EnumMeta):
        return _reduce_enum(parts, cls, number)
    own = vars(cls)
    kept = ("__module__", "__slots__", "__orig_bases__")  # needed when it is made
    namespace = {name: own[name] for name in kept if name in own}
    namespace["__qualname__"] = cls.__qualname__
    if isinstance(own.get("__dict__"), property):
        namespace["__dict__"] = parts.of(own["__dict__"])
    arguments = type(cls), cls.__name__, cls.__bases__, namespace, number
    state = _state(parts, cls, _DROPPED | {"__orig_bases__"})
    return make_class, arguments, (state, _registered_with(cls), {}), None, None, set_class


def _reduce_enum(parts: Parts, cls: Any, number: str) -> Reduced:
    members = cls._member_map_
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    values = {name: member._value_ for name, member in members.items()}
    options = {"boundary": cls._boundary_} if issubclass(cls, enum.Flag) else {}
    arguments = type(cls), cls.__name__, cls.__bases__, namespace, values, options, number
    state = _state(parts, cls, _DROPPED | _OF_ENUM | members.keys())
    attributes = {
        name: {key: v for key, v in vars(member).items() if key not in _OF_MEMBER}
        for name, member in members.items()
    }
    return make_enum, arguments, (state, [], attributes), None, None, set_class


class Step:
    """Attributes that are set together."""

    __slots__ = ("attributes", "cls")

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.attributes: dict[str, Any] = {}


def reduce_step(step: Step) -> Reduced:
    """Reduce some attributes of a class, so that loading them sets them."""
    return set_attributes, (step.cls, step.attributes)


def _state(parts: Parts, cls: type, dropped: frozenset[str]) -> tuple[Step, ...]:
    making = {name: Step(cls) for name in _MAKING_INSTANCES if name in vars(cls)}
    methods, others = Step(cls), Step(cls)
    for name, value in list(vars(cls).items()):  # as of 3.14 looking at annotations adds to them
        is_made_anew = isinstance(value, types.MemberDescriptorType) and value.__objclass__ is cls
        if name in dropped or name == "_abc_impl" or is_made_anew:
            continue
        if name in _DROPPED_IN_314:
            name, value = "__annotations__", annotations_of(cls)
        elif name == "__dataclass_fields__":
            value = {key: _field(parts, field) for key, field in value.items()}
        step = methods if isinstance(value, _METHODS) else others
        making.get(name, step).attributes[name] = parts.of(value)
    return *making.values(), methods, others


def _field(parts: Parts, field: Any) -> Any:
    return parts.standing_for(field) if type(field) is Field else field


def reduce_field(parts: Parts, field: Any) -> Reduced:
    """Reduce a field of a data class, whose metadata are a read-only mapping."""
    names = [name for name in field.__slots__ if hasattr(field, name)]
    return make_field, ({name: parts.of(getattr(field, name)) for name in names},)


def _registered_with(cls: type) -> list[type]:
    """Return the virtual subclasses of an abstract class."""
    if not isinstance(cls, abc.ABCMeta):
        return []
    references = abc._get_dump(cls)[0]  # type: ignore[attr-defined]
    return [found for reference in references if (found := reference()) is not None]


def reduce_typevar(variable: Any) -> Reduced:
    """Reduce a type variable that cannot be found by its name."""
    options: dict[str, Any] = {
        "bound": variable.__bound__,
        "covariant": variable.__covariant__,
        "contravariant": variable.__contravariant__,
    }
    if getattr(variable, "__infer_variance__", False):
        options["infer_variance"] = True
    if getattr(variable, "has_default", bool)():
        options["default"] = variable.__default__
    number = _cloudpickle._get_or_create_tracker_id(variable)
    names = variable.__name__, variable.__module__
    return make_typevar, (*names, variable.__constraints__, options, number)


#: Objects of which there is one in each process, by their names in ``dataclasses``.
SENTINELS: Final[dict[type, dict[int, str]]] = {}
for _name in (
    *("MISSING", "KW_ONLY", "_HAS_DEFAULT_FACTORY"),
    *("_FIELD", "_FIELD_CLASSVAR", "_FIELD_INITVAR"),
):
    _sentinel = getattr(dataclasses, _name, None)
    if _sentinel is not None:
        SENTINELS.setdefault(type(_sentinel), {})[id(_sentinel)] = _name


# --- putting together; the names are in messages


def _known(number: str) -> Any:
    with _cloudpickle._DYNAMIC_CLASS_TRACKER_LOCK:
        return _cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(number)


def make_class(
    metaclass: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any], number: str
) -> Any:
    """Return the class of that number, which is made if this process has none yet."""
    known = _known(number)
    return _tracked(metaclass(name, bases, namespace), number) if known is None else known


def make_enum(
    metaclass: Any,
    name: str,
    bases: tuple[type, ...],
    namespace: dict[str, Any],
    values: dict[str, Any],
    options: dict[str, Any],
    number: str,
) -> Any:
    """Do what `make_class` does, for an enumeration with its members."""
    known = _known(number)
    if known is not None:
        return known
    prepared = metaclass.__prepare__(name, bases, **options)
    for key, value in (namespace | values).items():
        prepared[key] = value
    return _tracked(metaclass(name, bases, prepared, **options), number)


def _tracked(made: Any, number: str) -> Any:
    _copies.add(made)
    return _cloudpickle._lookup_class_or_track(number, made)  # another thread may have made one


def set_attributes(cls: type, attributes: dict[str, Any]) -> None:
    """Give a class some attributes, unless it is the original."""
    if cls in _copies:
        for name, value in attributes.items():
            type.__setattr__(cls, name, value)  # an enumeration's own looks for its members first


def set_class(cls: Any, state: tuple[Any, list[type], dict[str, Any]]) -> None:
    """Give a class what comes after its attributes, unless it is the original."""
    if cls not in _copies:
        return
    _, registered, of_members = state
    for virtual in registered:
        cls.register(virtual)
    for name, values in of_members.items():
        vars(cls._member_map_[name]).update(values)


def make_field(slots: dict[str, Any]) -> Any:
    """Make a field of a data class."""
    field = Field.__new__(Field)
    for name, value in slots.items():
        setattr(field, name, value)
    return field


def make_typevar(
    name: str, module: str, constraints: tuple[Any, ...], options: dict[str, Any], number: str
) -> Any:
    """Return the type variable of that number, which is made if this process has none yet."""
    known = _known(number)
    if known is not None:
        return known
    make: Any = typing.TypeVar
    made = make(name, *constraints, **options)
    made.__module__ = module
    return _cloudpickle._lookup_class_or_track(number, made)
