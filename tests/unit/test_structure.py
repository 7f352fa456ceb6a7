"""The structure of an object: what was changed that is not the memory of an array."""

import collections
import dataclasses
import enum
import pickle
import warnings

import numpy as np
import pytest

from oobpickle._structure import Memory, Structure


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Model:
    weights: object
    name: str = "a"
    n: int = 0


class Other:
    pass


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a, b):
        self.a, self.b = a, b


class Tagged(np.ndarray):
    tag = "a"


class Listed(list):
    pass


class Odd:
    def __getstate__(self):
        if hasattr(self, "is_odd"):
            raise RuntimeError("not any more")
        return {}


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("not this one")


def helper():
    return 1


class World:
    """An object over memory of ours, and how to make it anew."""

    def __init__(self, make):
        self.memory = bytearray(8 * 1000)
        self._make = make
        self.obj = self.make()
        self.structure = Structure(self.obj, Memory([self.memory]))

    def make(self):
        return self._make(self.array)

    def array(self, at=0, n=10):
        return np.ndarray((n,), np.float64, self.memory, 8 * at)

    @property
    def difference(self):
        return self.structure.difference(self.obj, self.make)


def every_kind(array):
    return {
        "array": array(),
        "other": array(100, 20),
        "matrix": array(200, 12).reshape(3, 4).T,
        "model": Model(array(300)),
        "slotted": Slotted(array(400), [1, 2.5, "x", b"y", None, True, 1j]),
        "deque": collections.deque([array(500), {"deep": (1, [array(600)])}]),
        "set": {1, "a", frozenset({2})},
        "listed": Listed([1, 2]),
        "objects": np.array([1, "a", None, [2]], object),
        "own": np.arange(5),
        "colour": Colour.RED,
        "function": helper,
        "nan": float("nan"),
        "bytearray": bytearray(b"abc"),
        "date": np.datetime64("2020-01-01"),
        "class": Model,
    }


@pytest.fixture
def world():
    return World(every_kind)


def become(obj):
    obj["model"].__class__ = Other


def simple(array):
    return {"model": Model(array(), "a", [1, (2.5, array(20))]), "other": array(30)}


SIMPLE_CHANGES = {
    "$['model'].n[0] was changed": lambda obj: obj["model"].n.__setitem__(0, 2),
    "$['model'].n had 2 items, and has 3": lambda obj: obj["model"].n.append(2),
    "$['model'].name was of type str, and is a int": lambda obj: setattr(obj["model"], "name", 1),
    "$['model'].x is new": lambda obj: setattr(obj["model"], "x", 1),
    "$['model'].weights is gone": lambda obj: setattr(obj["model"], "__dict__", {}),
    "$['model'] was of type Model, and is a Other": become,
    "$['other'] is another array": lambda obj: obj.update(other=obj["other"][::-1]),
    "$['new'] is new": lambda obj: obj.update(new=None),
    "$['other'] is gone": lambda obj: obj.clear() or obj.update(model=Model(1)),
}


@pytest.mark.parametrize("expected", SIMPLE_CHANGES)
def test_a_change_is_found_where_all_is_in_dicts_lists_and_attributes(expected, monkeypatch):
    world = World(simple)
    world.obj["model"].weights[:] = world.obj["other"][:] = 3
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "Pickler", None)  # it needs none
        assert world.difference is None
    SIMPLE_CHANGES[expected](world.obj)

    assert expected == world.difference
    assert world.structure.n_arrays == 3


def test_arrays_are_counted_that_lie_in_the_memory(world):
    assert world.structure.n_arrays == 7


def test_writing_into_arrays_changes_nothing(world):
    for name in ("array", "other", "matrix"):
        world.obj[name][:] = 7
    world.obj["model"].weights += 1

    assert world.difference is None


def set_item(name, value):
    return lambda obj: obj.__setitem__(name, value)


def rebind(obj):
    obj["array"] = obj["array"].copy()


def swap(obj):
    obj["array"], obj["deque"][0] = obj["deque"][0], obj["array"]


def tag(obj):
    obj["model"].extra = 1


CHANGES = {
    "$['model'] was of type Model, and is a Other": [become],
    "$['array'] is another array": [
        rebind,
        swap,
        lambda obj: set_item("array", obj["array"][:5])(obj),
        lambda obj: set_item("array", obj["array"].view(np.int64))(obj),
    ],
    "$['array'] was of type ndarray, and is a int": [set_item("array", 3)],
    "$['new'] is new": [set_item("new", 3)],
    "$['other'] is gone": [lambda obj: obj.pop("other")],
    "$['model'].n was changed": [lambda obj: setattr(obj["model"], "n", 1)],
    "$['model'].name was changed": [lambda obj: setattr(obj["model"], "name", "b")],
    "$['model'].extra is new": [tag],
    "$['model'].weights is gone": [lambda obj: delattr(obj["model"], "weights")],
    "$['slotted'].b[1] was changed": [lambda obj: obj["slotted"].b.__setitem__(1, 2.25)],
    "$['slotted'].b[5] was of type bool, and is a int": [
        lambda obj: obj["slotted"].b.__setitem__(5, 1)
    ],
    "$['slotted'].b had 7 items, and has 8": [lambda obj: obj["slotted"].b.append(1)],
    "$['deque'][1]['deep'][1] had 1 items, and has 0": [
        lambda obj: obj["deque"][1]["deep"][1].clear()
    ],
    "$['set'] has other items": [lambda obj: obj["set"].add(5)],
    "$['listed'][0] was changed": [lambda obj: obj["listed"].__setitem__(0, 5)],
    "$['objects'][1] was changed": [lambda obj: obj["objects"].__setitem__(1, "b")],
    "$['own'] was changed, and its memory is not shared": [lambda obj: obj["own"].fill(1)],
    "$['own'] has another shape or dtype": [set_item("own", np.arange(6))],
    "$['function'] is another one": [set_item("function", swap)],
    "$['class'] is another one": [set_item("class", Slotted)],
    "$['nan'] was changed": [set_item("nan", 0.0)],
}


@pytest.mark.parametrize(
    ("expected", "change"), [(k, change) for k, changes in CHANGES.items() for change in changes]
)
def test_a_change_is_found_with_its_path(world, expected, change):
    change(world.obj)

    assert expected == world.difference


@pytest.mark.parametrize("name", ["colour", "bytearray", "date"])
def test_what_is_taken_apart_as_a_pickler_does_is_found_at_its_place(world, name):
    changed = {"colour": Colour.BLUE, "bytearray": bytearray(b"abd"), "date": np.datetime64("2021")}
    world.obj[name] = changed[name]

    assert world.difference.startswith(f"$['{name}']")


def test_an_equal_object_in_the_place_of_another_is_no_change(world):
    world.obj["model"].name = "".join(["a"])
    world.obj["slotted"].b = list(world.obj["slotted"].b)
    world.obj["array"] = world.obj["array"][:]
    world.obj["deque"][1]["deep"] = (1, [world.array(600)])

    assert world.difference is None
    made = []
    assert world.structure.difference(world.obj, lambda: made.append(1)) is None
    assert made == []  # it has been noted


def test_another_order_of_keys_is_no_change(world):
    world.obj["array"] = world.obj.pop("array")

    assert world.difference is None


def test_the_attributes_of_a_subclass_are_structure():
    world = World(lambda array: [array().view(Tagged)])
    world.obj[0][:] = 3
    assert world.difference is None

    world.obj[0].tag = "b"
    assert world.difference == "$[0]['tag'] is new"


def test_an_array_alone():
    world = World(lambda array: array())
    world.obj[:] = 3
    assert world.difference is None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from NumPy 2.5 on
        world.obj.shape = (2, 5)
    assert world.difference == "$ is another array"


def test_what_cannot_be_pickled_counts_as_changed(world):
    world.obj["model"].name = Unpicklable()

    assert world.difference == "$['model'].name was of type str, and is a Unpicklable"


def test_a_new_thing_that_cannot_be_compared():
    world = World(lambda array: [array(), Odd()])
    world.obj[1].is_odd = True

    assert world.difference == "$[1] cannot be compared with what it was (RuntimeError)"


def test_objects_that_refer_to_themselves():
    def make(array):
        knot = {"array": array()}
        knot["self"] = knot
        return knot

    world = World(make)
    assert world.difference is None
    world.obj["n"] = 1
    assert world.difference == "$['n'] is new"


def test_a_deep_object():
    def make(array):
        deep = [array()]
        for _ in range(300):
            deep = [deep]
        return deep

    world = World(make)
    inner = world.obj
    while isinstance(inner[0], list):
        inner = inner[0]
    inner[0] = 1

    assert world.difference == "$" + 301 * "[0]" + " was of type ndarray, and is a int"


def test_nothing_that_is_compared_is_loaded(world, monkeypatch):
    monkeypatch.setattr(pickle, "loads", None)

    assert world.difference is None
