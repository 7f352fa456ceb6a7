"""Classes by value: what is made elsewhere is what it was, and what might not be is refused."""

import abc
import ctypes
import dataclasses
import enum
import gc
import inspect
import pickle
import sys
import threading
import types
import typing
import weakref

import cloudpickle.cloudpickle
import numpy as np
import pytest

import oobpickle
from oobpickle._pickling.serializer import serialize


def dumped(obj):
    return serialize(obj, 1 << 40, by_value=True).stream


@pytest.fixture
def elsewhere(monkeypatch):
    """Return what loads as another process does, which has none of the classes yet."""

    def load(data):
        with monkeypatch.context() as other:
            name = "_DYNAMIC_CLASS_TRACKER_BY_"
            other.setattr(cloudpickle.cloudpickle, f"{name}CLASS", weakref.WeakKeyDictionary())
            other.setattr(cloudpickle.cloudpickle, f"{name}ID", weakref.WeakValueDictionary())
            return pickle.loads(data)

    return load


def classes():
    """Return classes that no module has, each with what an instance is made from."""

    class Plain:
        """Doc."""

        kind: typing.ClassVar[str] = "plain"
        table = types.MappingProxyType({"a": 1})
        module = sys

        def __init__(self, a):
            self.a = a

        def twice(self):
            return 2 * self.a

        @classmethod
        def make(cls):
            return cls(3)

        @staticmethod
        def three():
            return 3

        @property
        def half(self):
            """Of it."""
            return self.a / 2

        @half.setter
        def half(self, value):
            self.a = 2 * value

    class Derived(Plain):
        def twice(self):
            return super().twice() + 1

    Plain.handlers = [Plain.make, Derived]

    class Slots:
        __slots__ = ("__private", "a")

        def __init__(self, a):
            self.a = self.__private = a

        def private(self):
            return self.__private

    class OneSlot:
        __slots__ = "a"

        def __init__(self, a):
            self.a = a

    class WithDict:
        __slots__ = ("__dict__", "__weakref__", "a")

        def __init__(self, a):
            self.a, self.b = a, a

    class Abstract(abc.ABC):
        @property
        @abc.abstractmethod
        def a(self): ...

    class Concrete(Abstract):
        a = 5

    class Virtual:
        pass

    Abstract.register(Virtual)
    T = typing.TypeVar("T")

    class Of(typing.Generic[T]):
        def __init__(self, a: T):
            self.a = a

    class OfInt(Of[int], dict):
        pass

    @typing.runtime_checkable
    class HasA(typing.Protocol):
        a: int

        def f(self): ...

    class Error(ValueError):
        pass

    class Array(np.ndarray):
        pass

    return {
        "plain": (Plain, 1),
        "derived": (Derived, 1),
        "slots": (Slots, 1),
        "one slot": (OneSlot, 1),
        "slots and a dict": (WithDict, 1),
        "abstract": (Concrete,),
        "with a virtual subclass": (Abstract, ...),
        "virtual": (Virtual,),
        "generic": (Of, 1),
        "of a generic": (OfInt, 1),
        "protocol": (HasA, ...),
        "exception": (Error, "text"),
        "array": (Array, 3),
        **data_classes(),
        **enumerations(),
    }


def data_classes():
    @dataclasses.dataclass
    class Data:
        a: int
        b: list = dataclasses.field(default_factory=list, metadata={"unit": "m"})
        c: dataclasses.InitVar[int] = 3

    @dataclasses.dataclass
    class DerivedData(Data):
        d: str = "d"

    @dataclasses.dataclass(frozen=True, slots=True, order=True, kw_only=False)
    class Frozen:
        a: int
        _: dataclasses.KW_ONLY
        b: float = 2.0

    class Named(typing.NamedTuple):
        a: int
        b: str = "b"

        def both(self):
            return self.a, self.b

    return {
        "data": (Data, 1),
        "derived data": (DerivedData, 1),
        "frozen": (Frozen, 1),
        "named tuple": (Named, 1),
    }


def enumerations():
    class Colour(enum.Enum):
        RED = 1
        GREEN = "g"
        ALIAS = 1  # noqa: PIE796

        def low(self):
            return self.name.lower()

    class Number(enum.IntEnum):
        ONE = enum.auto()
        TWO = enum.auto()

    class Text(enum.StrEnum):
        A = "a"

    class Flags(enum.Flag, boundary=enum.KEEP):
        R = 1
        W = 2
        RW = 3

    class Planet(enum.Enum):
        EARTH = (5.9, 6.3)

        def __init__(self, mass, radius):
            self.mass, self.radius = mass, radius

        def ratio(self):
            return self.mass / self.radius

    return {
        "enum": (Colour, "g"),
        "int enum": (Number, 2),
        "str enum": (Text, "a"),
        "flag": (Flags, 3),
        "enum with __init__": (Planet, (5.9, 6.3)),
    }


CLASSES = classes()
#: Where an enumeration keeps what it looks up; and what differs from process to process.
APART = {
    "__classdictcell__",
    "_abc_impl",
    "__weakref__",
    "__dict__",
    "__parameters__",
    "__orig_bases__",
}
APART |= {"__type_params__", "__slotnames__"}
VERSION_TAG = 1 << 19  # of a cache


def said_of(value):
    """Return what is to be compared of an attribute."""
    if isinstance(value, (classmethod, staticmethod)):
        return type(value), said_of(value.__func__)
    if isinstance(value, property):
        return property, value.__doc__, *map(said_of, (value.fget, value.fset, value.fdel))
    if isinstance(value, types.FunctionType):
        attributes = ("__qualname__", "__module__", "__doc__", "__name__", "__annotations__")
        return [repr(getattr(value, name)) for name in attributes], value.__code__
    if isinstance(value, (dict, types.MappingProxyType)):
        return type(value), [(said_of(k), said_of(v)) for k, v in value.items()]
    if type(value) in (set, frozenset):
        return type(value), sorted(map(repr, value))
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return [said_of(v) for v in value]
    if isinstance(value, types.MethodType):
        return said_of(value.__func__)
    if isinstance(value, dataclasses.Field):
        return [(name, said_of(getattr(value, name))) for name in value.__slots__]
    if isinstance(value, (type, types.MemberDescriptorType)):
        return type(value), value.__qualname__
    if isinstance(value, enum.Enum):
        return [
            (name, said_of(v)) for name, v in sorted(vars(value).items()) if name != "__objclass__"
        ]
    return repr(value)


#: Where a class has its annotations, by the version of Python.
ANNOTATIONS = {"__annotations__", "__annotate_func__", "__annotations_cache__"}


def described(cls):
    found = {name: v for name, v in vars(cls).items() if name not in {*APART, *ANNOTATIONS}}
    found["__annotations__"] = inspect.get_annotations(cls)
    found["__doc__"] = cls.__doc__  # of a data class an object that makes it, in CPython 3.15
    return [(name, said_of(v)) for name, v in sorted(found.items())]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_arrives_as_it_was(elsewhere, name):
    cls, *_ = CLASSES[name]
    arrived, again = elsewhere(dumped([cls, cls]))

    assert arrived is again
    assert arrived is not cls
    assert type(arrived) is type(cls)
    assert (arrived.__name__, arrived.__qualname__) == (cls.__name__, cls.__qualname__)
    assert [c.__qualname__ for c in arrived.__mro__] == [c.__qualname__ for c in cls.__mro__]
    assert described(cls) == described(arrived)
    assert (arrived.__flags__ ^ cls.__flags__) & ~VERSION_TAG == 0
    assert cls.__basicsize__ == arrived.__basicsize__


@pytest.mark.parametrize("name", [name for name, made in CLASSES.items() if made[1:] != (...,)])
def test_an_instance_that_is_sent_back_is_one_of_the_original(elsewhere, name):
    cls, *arguments = CLASSES[name]
    instance = cls(*arguments)
    before = described(cls)
    arrived = elsewhere(dumped(instance))
    number = cloudpickle.cloudpickle._get_or_create_tracker_id(cls)
    cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS[type(arrived)] = number
    for base in type(arrived).__mro__:
        original = next((c for c in cls.__mro__ if c.__qualname__ == base.__qualname__), base)
        if original is not base:
            number = cloudpickle.cloudpickle._get_or_create_tracker_id(original)
            cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS[base] = number
    returned = pickle.loads(dumped(arrived))

    assert type(arrived).__qualname__ == cls.__qualname__
    assert type(returned) is cls
    assert before == described(cls)


def test_what_has_arrived_works(elsewhere):
    names = ("plain", "derived", "slots", "one slot", "slots and a dict", "frozen", "named tuple")
    sent = {name: CLASSES[name][0](4) for name in names}
    got = elsewhere(dumped(sent))

    assert got["derived"].twice() == 9
    assert got["derived"].make().a == 3
    got["plain"].half = 5
    assert (got["plain"].a, got["plain"].three(), got["plain"].half) == (10, 3, 5.0)
    assert got["plain"].handlers == [type(got["plain"]).make, type(got["derived"])]
    assert (got["slots"].a, got["slots"].private()) == (4, 4)
    assert not hasattr(got["slots"], "__dict__")
    assert (got["slots and a dict"].a, got["slots and a dict"].b) == (4, 4)
    assert got["one slot"].a == 4
    assert dataclasses.replace(got["frozen"], a=5) > got["frozen"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        got["frozen"].a = 3
    assert got["named tuple"]._replace(a=2).both() == (2, "b")


def test_a_class_may_refer_to_its_own_instances(elsewhere):
    class Point(typing.NamedTuple):
        a: int

        def distance(self):
            return abs(self.a - ORIGINS[0].a)

    @dataclasses.dataclass(frozen=True, slots=True)
    class Frozen:
        a: int

        def others(self):
            return frozen

    class Made:
        def __new__(cls, a):
            return super().__new__(cls)

        def __init__(self, a):
            self.a = a

        def __getnewargs__(self):
            return (self.a,)

        def __reduce__(self):
            return type(self), (self.a,)

    frozen = Frozen(4)
    Made.made = [Made(1), {Made(2): 2}]
    ORIGINS[:] = [Point(1)]
    Point.origin = Point(5)
    point, other, made = elsewhere(dumped([Point(3), Frozen(1), Made]))

    assert (point.distance(), point.origin) == (2, (5,))
    assert other.others().a == 4
    assert made.made[0].a == 1


ORIGINS = []


def test_methods_may_refer_to_methods_that_are_bound(elsewhere):
    class Local:
        def aliases(self):
            return aliases

        @classmethod
        def make(cls):
            return cls

    aliases = [Local.make, Local().aliases]
    arrived = elsewhere(dumped(Local()))

    assert arrived.aliases()[0]() is type(arrived)
    assert arrived.aliases()[1]() is arrived.aliases()


def test_data_classes_can_be_built_on(elsewhere):
    data, derived = elsewhere(dumped([CLASSES["data"][0], CLASSES["derived data"][0]]))

    @dataclasses.dataclass
    class Further(derived):
        e: int = 1

    fields = dataclasses.fields(data)
    assert [f.name for f in dataclasses.fields(Further)] == ["a", "b", "d", "e"]
    assert fields[0].default is dataclasses.MISSING
    assert fields[1].metadata == {"unit": "m"}
    assert data(1).b == []
    assert Further(1).b is not Further(1).b


def test_enumerations_have_their_members(elsewhere):
    names = ("enum", "int enum", "str enum", "flag", "enum with __init__")
    colour, number, text, flags, planet = elsewhere(dumped([CLASSES[n][0] for n in names]))

    assert list(colour.__members__) == ["RED", "GREEN", "ALIAS"]
    assert colour.ALIAS is colour.RED is colour(1)
    assert colour.GREEN.low() == "green"
    assert number.ONE + number.TWO == 3
    assert f"{text.A}" == "a"
    assert flags.RW == flags.R | flags.W
    assert flags(8).value == 8
    assert planet.EARTH.ratio() == 5.9 / 6.3


def test_abstract_classes_stay_abstract(elsewhere):
    names = ("abstract", "with a virtual subclass", "protocol", "virtual")
    concrete, abstract, protocol, virtual = elsewhere(dumped([CLASSES[n][0] for n in names]))
    with pytest.raises(TypeError, match="abstract"):
        abstract()

    assert concrete().a == 5
    assert issubclass(concrete, abstract)
    assert issubclass(virtual, abstract)

    class Has:
        a = 3

        def f(self):
            pass

    assert isinstance(Has(), protocol)
    assert not isinstance(3, protocol)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax of CPython 3.12")
def test_type_parameters_arrive(elsewhere):
    names = {"__name__": __name__}
    exec("def make():\n class C[T: int]:\n  def f[U](self, u: U) -> T: ...\n return C", names)
    cls = elsewhere(dumped(names["make"]()))

    (variable,) = cls.__type_params__
    assert (variable.__name__, variable.__bound__) == ("T", int)
    assert variable.__infer_variance__
    assert cls.__parameters__ == (variable,)
    assert [v.__name__ for v in cls.f.__type_params__] == ["U"]
    assert cls[bool].__args__ == (bool,)


# --- one class in each process


def test_the_original_is_not_changed_by_what_comes_back():
    class Model:
        seen = 1

    data = dumped(Model())
    Model.seen = 2
    Model.__call__ = call = lambda self: 3

    assert type(pickle.loads(data)) is Model
    assert Model.seen == 2
    assert vars(Model)["__call__"] is call


def test_a_copy_follows_the_last_message(monkeypatch, elsewhere):
    class Model:
        seen = 1

    first = dumped(Model)
    Model.seen, Model.late = 2, lambda self: 4
    one, other = elsewhere(pickle.dumps([Loading(first), Loading(dumped(Model))]))

    assert one is other
    assert (one.seen, one().late()) == (2, 4)


class Loading:
    """Arrives as what a pickle loads to."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return pickle.loads, (self.data,)


def test_two_definitions_are_two_classes(elsewhere):
    def define(n):
        class Model:
            number = n

        return Model

    one, other = elsewhere(dumped([define(1)(), define(2)()]))

    assert (one.number, other.number) == (1, 2)
    assert type(one) is not type(other)


def test_classes_that_arrived_go_when_nobody_has_them(elsewhere):
    arrived = elsewhere(dumped(CLASSES["plain"][0]))
    alive = weakref.ref(arrived)
    del arrived
    gc.collect()

    assert alive() is None


def test_threads_load_one_class():
    class Model:
        def f(self):
            return 1

    data = dumped([Model() for _ in range(10)])
    number = cloudpickle.cloudpickle._get_or_create_tracker_id(Model)
    cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.pop(number)
    found, start = [], threading.Barrier(4)

    def load():
        start.wait()
        found.extend(pickle.loads(data))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({type(model) for model in found}) == 1
    assert {model.f() for model in found} == {1}


# --- what is refused


class Meta(type):
    def __new__(cls, name, bases, namespace, **options):
        return super().__new__(cls, name, bases, namespace)


class Quiet(type):
    def __call__(cls, *args):
        return super().__call__(*args)

    def answer(cls):
        return 42


class Keyed:
    def __init_subclass__(cls, *, key, **kwargs):
        cls.key = key


class Optional:
    def __init_subclass__(cls, key=None, **kwargs):
        if key is None:
            raise TypeError("without a key")


def refused():
    class WithMeta(metaclass=Meta, option=1):
        pass

    class OfKeyed(Keyed, key=1):
        pass

    class OfOptional(Optional, key=1):
        pass

    class OfLocal(WithMeta):
        pass

    class Structure(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int),)

    class Bytes(bytes, enum.Enum):
        def __new__(cls, value, label):
            made = bytes.__new__(cls, [value])
            made._value_ = value
            return made

        A = (1, "a")

    class Pair(tuple, enum.Enum):
        A = (1, 2)

    class Holder:
        lock = threading.Lock()

    class Typed(typing.TypedDict):
        a: int

    return {
        "metaclass": WithMeta,
        "keyword argument": OfKeyed,
        "optional keyword argument": OfOptional,
        "base that is refused": OfLocal,
        "ctypes structure": Structure,
        "instance of one": Structure(1),
        "ctypes array": (ctypes.c_double * 4)(),
        "enum with __new__": Bytes,
        "enum of tuples": Pair,
        "an attribute that is refused": Holder,
        "typed dict": Typed,
        "builtin": types.FunctionType,
        "iterator": type(iter([])),
    }


REFUSED = refused()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("beside", [(), (lambda: 1,)], ids=["alone", "beside a lambda"])
def test_what_might_not_load_is_refused_with_the_error_of_plain_pickle(name, beside):
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError, ValueError)) as plain:
        pickle.dumps([REFUSED[name], *beside], 5)
    with pytest.raises(plain.type) as caught:
        dumped([REFUSED[name], *beside])

    assert str(plain.value) == str(caught.value)
    assert any("by value" in note for note in caught.value.__notes__)


def test_a_metaclass_without_a_say_is_no_obstacle(elsewhere):
    class Local(metaclass=Quiet):
        pass

    arrived = elsewhere(dumped(Local))

    assert type(arrived) is Quiet
    assert arrived.answer() == 42


def test_a_reducer_for_the_metaclass_comes_first():
    class Local(metaclass=Quiet):
        pass

    def reduce(cls):
        return int, (7,)

    stream = serialize([Local, lambda: 1], 0, {Quiet: reduce}, by_value=True).stream

    assert pickle.loads(stream)[0] == 7


def test_what_plain_pickle_finds_goes_by_name_beside_what_goes_by_value():
    sent = [lambda: 1, Meta, Keyed(), dumped, oobpickle.dumps, len]
    arrived = pickle.loads(dumped(sent))

    assert arrived[1] is Meta
    assert type(arrived[2]) is Keyed
    assert arrived[3:] == sent[3:]
