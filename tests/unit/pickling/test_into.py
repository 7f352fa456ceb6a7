"""Loading into an object that exists: all of the value, in the memory that was there."""

import collections
import ctypes
import functools
import logging
import pathlib
import pickle
import time
import tracemalloc
import uuid
from array import array as typed
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest

import oobpickle
import samples
from oobpickle import StructureError
from samples import (
    Colour,
    Deriving,
    Doubling,
    Layer,
    Model,
    NotedLayer,
    Row,
    Slotted,
    SlottedChild,
    Table,
    Total,
    Viewing,
    described,
    filled,
    pickled,
    relu,
    tanh,
)


def loaded_into(target, source):
    """Load the bytes of `source`, which no longer exist anywhere else, into `target`."""
    return oobpickle.loads(oobpickle.dumps(source).to_bytes(), into=target)


def weights(value, n=200):
    return np.full(n, value, "f8")


def objects(*items):
    array = np.empty(len(items), object)
    for index, item in enumerate(items):
        array[index] = item
    return array


# --- arrays


@pytest.mark.parametrize("n", [10, 200, 20_000])
def test_the_object_its_arrays_and_their_memory_stay(n):
    target = Model(weights=weights(0, n), layers=[weights(1, n)], name="old")
    inside = target.weights, target.layers, target.layers[0]
    addresses = [inside[0].ctypes.data, inside[2].ctypes.data]
    result = loaded_into(target, Model(weights=weights(5, n), layers=[weights(6, n)], name="new"))

    assert result is target
    assert target.weights is inside[0]
    assert target.layers is inside[1]
    assert target.layers[0] is inside[2]
    assert [inside[0].ctypes.data, inside[2].ctypes.data] == addresses
    assert (inside[0][0], inside[2][-1], target.name) == (5.0, 6.0, "new")


def test_the_target_shares_nothing_with_the_payload():
    source, target = Model(weights=weights(5)), Model(weights=weights(0))
    oobpickle.loads(oobpickle.dumps(source), into=target)
    source.weights[:] = 9

    assert set(target.weights) == {5.0}


def test_an_array_alone_is_a_target():
    target = weights(0)

    assert loaded_into(target, weights(3)) is target
    assert set(target) == {3.0}


#: Targets of a shape and dtype, with every memory order.
TARGETS = {
    "C": lambda shape, dtype: np.zeros(shape, dtype),
    "F": lambda shape, dtype: np.zeros(shape, dtype, "F"),
    "moveaxis": lambda shape, dtype: np.zeros((shape[1], shape[0], shape[2]), dtype).swapaxes(0, 1),
    "strided": lambda shape, dtype: np.zeros((2 * shape[0], *shape[1:]), dtype)[::2],
    "strided within": lambda shape, dtype: np.zeros((*shape[:2], 3 * shape[2]), dtype)[:, :, ::3],
    "negative": lambda shape, dtype: np.zeros(shape, dtype)[::-1],
    "unaligned": lambda shape, dtype: np.ndarray(
        shape, dtype, bytearray(int(np.prod(shape)) * np.dtype(dtype).itemsize + 1), 1
    ),
    "field": lambda shape, dtype: np.zeros(shape, [("a", "i1"), ("b", dtype)])["b"],
}


@pytest.mark.parametrize("kind", TARGETS)
def test_every_memory_order_lands_in_every_other(kind):
    wrong = []
    for name, dtype in samples.dtypes().items():
        for layout in ("C", "F", "moveaxis", "strided", "negative", "broadcast"):
            source = samples.LAYOUTS[layout](filled(dtype, (12, 10, 8)))
            target = TARGETS[kind](source.shape, source.dtype)
            strides, address = target.strides, target.ctypes.data
            loaded_into([target], [source])
            if described(target.copy("C")) != described(source.copy("C").astype(target.dtype)):
                wrong.append((name, layout, "value"))
            if (target.strides, target.ctypes.data) != (strides, address):
                wrong.append((name, layout, "has moved"))

    assert wrong == []


@pytest.mark.parametrize(
    "index", [np.s_[None, :], np.s_[:, None], np.s_[None, ::2], np.s_[3:4, None]]
)
def test_new_axes_share_no_memory(index):
    target = weights(0)[index]
    loaded_into([target], [weights(5)[index]])

    assert set(target.ravel()) == {5.0}


def test_a_target_whose_items_share_memory_is_refused():
    base = weights(0, 1)
    target = np.lib.stride_tricks.as_strided(base, (200,), (0,))
    with pytest.raises(StructureError, match="memory"):
        loaded_into([target], [np.arange(200.0)])

    assert base[0] == 0.0


def test_memory_around_a_strided_target_is_left_alone():
    base = np.full((20, 30), -1.0)
    loaded_into({"a": base[::2, ::3]}, {"a": np.arange(100.0).reshape(10, 10)})

    assert base[::2, ::3].ravel().tolist() == list(range(100))
    assert (base == -1).sum() == 500


@pytest.mark.parametrize("order", "CF")
def test_arrays_of_the_same_order_land_without_further_memory(order):
    source = {"a": np.ones((1024, 1024), order=order)}
    target = {"a": np.zeros((1024, 1024), order=order)}
    payload = oobpickle.dumps(source)
    tracemalloc.start()
    try:
        oobpickle.loads(payload, into=target)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20 < target["a"].nbytes
    assert target["a"].all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), ()])
def test_arrays_of_little_or_nothing_are_no_exception(shape):
    target = {"a": np.zeros(shape), "b": weights(0)}
    loaded_into(target, {"a": np.ones(shape), "b": weights(2)})

    assert target["a"].tolist() == np.ones(shape).tolist()
    assert target["b"][0] == 2.0


def test_object_arrays_keep_the_arrays_inside_them():
    def table(value):
        return objects(weights(value), {"a": weights(value + 1)}, value, None).reshape(2, 2)

    target = table(0)
    first, second = target[0, 0], target[0, 1]["a"]
    loaded_into(Model(table=target), Model(table=table(5)))

    assert target[0, 0] is first
    assert target[0, 1]["a"] is second
    assert (first[0], second[0], target[1, 0]) == (5.0, 6.0, 5)


def test_object_arrays_without_dimension():
    target = [np.array([1, 2, None], object), np.array(None, object)]
    target[1][()] = [weights(0), "old"]
    kept = target[1][()][0]
    source = [np.array([3, 4, None], object), np.array(None, object)]
    source[1][()] = [weights(4), "new"]
    loaded_into(target, source)

    assert described(pickled(source)) == described(target)
    assert target[1][()][0] is kept


def test_items_of_object_arrays_may_be_sequences():
    source = {"a": objects((1, 2), [3, 4], {5}, "six"), "w": weights(1)}
    target = {"a": objects((7, 8), [0, 0], {9}, "ten"), "w": weights(0)}

    assert described(pickled(source)) == described(loaded_into(target, source))


def test_string_arrays_of_variable_length():
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("this numpy has no such dtype")
    dtype = np.dtypes.StringDType()
    source = [np.array(["a", "a much longer word " * 5], dtype), weights(1)]
    target = [np.array(["b", "c"], dtype), weights(0)]
    kept = target[0]
    loaded_into(target, source)

    assert target[0] is kept
    assert kept.tolist() == source[0].tolist()


def special(value):
    """Arrays of subclasses, of a certain value."""
    matrix = weights(value).view(samples.Matrix)
    matrix.unit = f"unit {value}"
    return {
        "masked": np.ma.MaskedArray(weights(value), weights(value) > 3, fill_value=value),
        "partly masked": np.ma.MaskedArray(np.arange(9), np.arange(9) == value),
        "subclass": matrix,
        "recarray": np.rec.fromarrays([np.full(300, value), np.full(300, value / 2)], names="a,b"),
        "matrix": weights(value).reshape(20, 10).view(np.matrix),
        "object field": np.array([(value, "x"), (2, None)], [("n", "i4"), ("o", "O")]),
        "StringDType": np.array([str(value)] * 99, getattr(np.dtypes, "StringDType", "U5")),
    }


@pytest.mark.parametrize("name", special(0))
def test_arrays_of_subclasses_receive_the_whole_value_or_are_refused(name):
    source, target = {"a": special(5)[name]}, {"a": special(0)[name]}
    before = described(target)
    try:
        loaded_into(target, source)
    except StructureError:
        expected = before
    else:
        expected = described(pickled(source))

    assert expected == described(target)


# --- structure


#: Pairs of the same structure and different values, with arrays that must stay.
def structures(value):
    w = functools.partial(weights, value)
    cyclic = Model(weights=w(), value=value)
    cyclic.me, cyclic.list = cyclic, [cyclic]
    cyclic.list.append(cyclic.list)
    shared = w()
    child = SlottedChild(w(), value)
    child.bias, child.extra = w(), value
    table = Table(a=w(), b=value)
    table.note = f"note {value}"
    return {
        "dict": {"a": w(), 2: w(), ("t", 1): value, None: str(value)},
        "list": [w(), [value, [w()]], value],
        "tuple": (w(), w()),
        "tuple with values": [(w(), value, (w(), str(value)))],
        "named tuple": [Layer(w(), (w(), value), str(value))],
        "model": Model(a=w(), b=Model(c=w(), d=value), e=None),
        "slots": Slotted(w(), value),
        "slots and more": child,
        "dict subclass": table,
        "OrderedDict": collections.OrderedDict(a=w(), b=value),
        "defaultdict": collections.defaultdict(list, a=w(), b=value),
        "Counter": Model(count=collections.Counter(a=value, b=2), w=w()),
        "shared array": [shared, {"again": shared}, (shared, value)],
        "cycle": cyclic,
        "values": Model(w=w(), i=value, f=value / 3, s=str(value), b=bytes(value), c={value}),
        "empty": [w(), {}, [], (), "", None],
        "bytearray": [w(), bytearray(value + 1)],
        "deque": [w(), collections.deque([value])],
        "error": [w(), Model(error=ValueError(f"error {value}"))],
        "partial": [w(), functools.partial(relu, value)],
        "Decimal": [w(), Decimal(value), Fraction(value, 7)],
        "path": [w(), pathlib.PurePosixPath(f"/a/{value}")],
        "uuid": [w(), uuid.UUID(int=value)],
        "enum": [w(), Colour.RED if value else Colour.BLUE],
        "function": [w(), tanh if value else relu],
        "builtin": [w(), len if value else repr],
        "class": [w(), Model if value else Table],
        "method": [w(), "x".join if value else "x".split],
        "ufunc": [w(), np.sin if value else np.cos],
        "dtype": [w(), np.dtype("M8[s]" if value else "M8[ms]")],
        "scalar": [w(), np.float32(value), np.datetime64(value, "s")],
        "logger": [w(), logging.getLogger(f"oobpickle.tests.{value}")],
    }


STRUCTURES = sorted(structures(0))


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_target_has_the_value_that_pickle_would_have_delivered(name):
    source, target = structures(5)[name], structures(0)[name]
    expected = described(pickled(source))
    result = loaded_into(target, source)

    assert result is target
    assert expected == described(target)


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_array_of_the_target_is_replaced(name):
    source, target = structures(5)[name], structures(0)[name]
    kept = arrays_of(target)
    loaded_into(target, source)

    assert [id(array) for array in kept] == [id(array) for array in arrays_of(target)]
    assert kept


def arrays_of(obj, seen=None):
    """Return the exact arrays in an object, in order."""
    seen = {} if seen is None else seen
    if id(obj) in seen:
        return []
    seen[id(obj)] = obj
    if type(obj) is np.ndarray and obj.dtype != object:
        return [obj]
    inside = list(obj.values()) if isinstance(obj, dict) else []
    inside += obj if isinstance(obj, (list, tuple)) else []
    inside += list(obj.flat) if type(obj) is np.ndarray else []
    if isinstance(obj, (Model, Table, Row, Slotted, Viewing)):
        inside += obj.__dict__.values() if hasattr(obj, "__dict__") else []
    if isinstance(obj, Slotted):
        inside += [getattr(obj, name) for name in ("weights", "bias") if hasattr(obj, name)]
    return [array for item in inside for array in arrays_of(item, seen)]


def test_what_is_shared_by_all_objects_is_not_changed():
    names = [item.name for item in (*Colour, logging.getLogger("oobpickle.tests.0"))]
    values = [colour.value for colour in Colour]
    for name in ("enum", "function", "logger", "class"):
        loaded_into(structures(0)[name], structures(5)[name])

    assert [item.name for item in (*Colour, logging.getLogger("oobpickle.tests.0"))] == names
    assert [colour.value for colour in Colour] == values
    assert Colour(1) is Colour.RED


@pytest.mark.parametrize("kind", [Fraction, Decimal, pathlib.PurePosixPath, str, tuple])
def test_immutable_objects_that_others_hold_keep_their_value(kind):
    old, new = {
        Fraction: (Fraction(1, 2), Fraction(3, 4)),
        Decimal: (Decimal(1), Decimal(2)),
        pathlib.PurePosixPath: (pathlib.PurePosixPath("/a"), pathlib.PurePosixPath("/b")),
        str: ("old", "new"),
        tuple: ((1, 2), (3, 4)),
    }[kind]
    before, hash_before = repr(old), hash(old)
    target = Model(value=old, w=weights(0))
    loaded_into(target, Model(value=new, w=weights(1)))

    assert target.value == new
    assert (repr(old), hash(old)) == (before, hash_before)


def test_a_path_that_was_used_is_no_other_structure():
    old = pathlib.PurePosixPath("/a") / "b"
    assert str(old) == "/a/b"
    assert hash(old)
    target = Model(path=old, w=weights(0))
    loaded_into(target, Model(path=pathlib.PurePosixPath("/c/d"), w=weights(1)))

    assert str(target.path) == "/c/d"


def test_an_object_that_is_twice_in_the_target_by_chance_is_no_other_structure():
    pair = (1, 2)
    target = Model(shape=pair, size=pair, one=relu, two=relu, w=weights(0))
    source = Model(shape=(3, 4), size=(5, 6), one=relu, two=tanh, w=weights(1))
    loaded_into(target, source)

    assert (target.shape, target.size, target.one, target.two) == ((3, 4), (5, 6), relu, tanh)


def test_one_array_of_the_payload_becomes_one_in_the_target():
    source = Model(a=weights(5))
    source.b = source.a
    target = Model(a=weights(0), b=weights(1))
    first = target.a
    loaded_into(target, source)

    assert target.a is target.b is first
    assert first[0] == 5.0


def test_one_array_of_the_target_for_two_of_the_payload_is_refused():
    target = Model(a=weights(0))
    target.b = target.a
    with pytest.raises(StructureError, match=r"\$\.b"):
        loaded_into(target, Model(a=weights(1), b=weights(2)))

    assert set(target.a) == {0.0}


def test_a_changed_tuple_in_a_cycle_is_refused():
    def cyclic(value):
        inner = [weights(value)]
        whole = (inner, value)
        inner.append(whole)
        return {"t": whole}

    target = cyclic(0)
    with pytest.raises(StructureError, match="changed tuple"):
        loaded_into(target, cyclic(5))

    assert (target["t"][1], target["t"][0][0][0]) == (0, 0.0)


def test_the_order_of_a_dict_is_that_of_the_payload_or_it_is_refused():
    for kind in (dict, collections.OrderedDict):
        source = kind([("b", weights(2)), ("a", 1)])
        target = kind([("a", 0), ("b", weights(0))])
        try:
            loaded_into(target, source)
        except StructureError:
            assert list(target) == ["a", "b"]
        else:
            assert list(target) == ["b", "a"]


def test_other_kinds_of_state_arrive_or_are_refused():
    source = collections.defaultdict(int, w=weights(5))
    target = collections.defaultdict(list, w=weights(0))
    try:
        loaded_into(target, source)
    except StructureError:
        assert set(target["w"]) == {0.0}
    else:
        assert target.default_factory is int


def noted(cls, *arguments):
    made = cls(*arguments)
    made.note = f"note {arguments[-1]}"
    return made


#: What may be refused, but may not receive half of the value.
UNUSUAL = {
    "generator": lambda value: [weights(value), np.random.default_rng(value)],
    "named tuple subclass": lambda value: [noted(NotedLayer, weights(value), 1, value)],
    "named tuple subclass, attributes alone": lambda value: [
        weights(value),
        noted(NotedLayer, "a", "b", value > 0),
    ],
    "items that are changed": lambda value: Doubling(w=weights(value), n=value + 1),
    "class with __setstate__": lambda value: Deriving(weights(value)),
    "views in __setstate__": lambda value: Viewing(weights(value)),
    "user list": lambda value: collections.UserList([weights(value), value]),
    "chain map": lambda value: collections.ChainMap({"w": weights(value)}, {"n": value}),
    "frozen set": lambda value: [weights(value), frozenset({value, "a"})],
    "time": lambda value: [weights(value), time.gmtime(value)],
    "keys": lambda value: {("w", value): weights(value)},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_objects_receive_the_whole_value_or_are_refused(name):

    assert value_or_refusal(UNUSUAL[name](0), UNUSUAL[name](5))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (0.0, -0.0),
        (0j, -0.0j),
        (np.float32(0.0), np.float32(-0.0)),
        (Decimal("1.0"), Decimal("1.00")),
        (frozenset({1}), frozenset({True})),
        (frozenset({1}), frozenset({1.0})),
        (float("nan"), float("nan")),
        (slice(1), slice(True)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: [(x,)], lambda x: Model(x=x)])
def test_equal_is_not_the_same(wrap, old, new):
    target = loaded_into([weights(0), wrap(old)], [weights(1), wrap(new)])

    assert repr(described(pickled(wrap(new)))) == repr(described(target[1]))


# --- state that is computed while loading


def value_or_refusal(target, source):
    """Return whether the target has the value of the source, or was refused unchanged."""
    before, expected = described(target), described(pickled(source))
    try:
        loaded_into(target, source)
    except StructureError:
        return described(target) == before
    return described(target) == expected


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), "text", [1], (2,), np.arange(3), True])
@pytest.mark.parametrize("old", [None, 1])
def test_an_attribute_of_another_type_arrives_or_is_refused(old, value):

    assert value_or_refusal(Model(w=weights(0), a=old), Model(w=weights(5), a=value))


def test_what_is_computed_from_an_array_while_loading_is_right_or_refused():

    assert value_or_refusal(Deriving(weights(0)), Deriving(weights(5)))


def test_further_arrays_over_the_same_memory_are_right_or_refused():

    assert value_or_refusal(Viewing(weights(0)), Viewing(weights(5)))


def test_further_arrays_of_the_payload_alone_over_the_same_memory_are_right_or_refused():
    target = Viewing(weights(0))
    target.head, target.flat = target.head.copy(), target.flat.copy()
    before, expected = described(target), described(pickled(Viewing(weights(5))))
    try:
        loaded_into(target, Viewing(weights(5)))
    except StructureError:
        assert before == described(target)
    else:
        assert expected == described(target)


@pytest.mark.parametrize(
    "hide",
    [
        lambda array: collections.deque([array]),
        lambda array: functools.partial(relu, array),
        lambda array: ValueError(array),
        lambda array: np.array([(array,)], [("o", "O")]),
        lambda array: {frozenset({1}): collections.deque([array])},
        Total,
    ],
    ids=["deque", "partial", "error", "object field", "dict of deque", "what was computed of it"],
)
def test_an_array_that_is_hidden_elsewhere_too_is_right_or_refused(hide):
    def model(value):
        array = weights(value)
        return {"array": array, "hidden": hide(array)}

    assert value_or_refusal(model(0), model(5))


def test_arrays_that_cannot_be_reached_are_refused():
    target = {"a": collections.deque([weights(0)]), "b": weights(1)}
    with pytest.raises(StructureError, match=r"without into="):
        loaded_into(target, {"a": collections.deque([weights(5)]), "b": weights(6)})

    assert (target["a"][0][0], target["b"][0]) == (0.0, 1.0)


# --- memory of the target that is memory of the payload


def test_an_object_can_be_loaded_into_itself():
    model = Model(a=weights(3), b=[weights(4)[::2]])
    oobpickle.loads(oobpickle.dumps(model), into=model)

    assert (set(model.a), set(model.b[0])) == ({3.0}, {4.0})


@pytest.mark.parametrize("n", [100, 10_000])
def test_two_arrays_can_be_exchanged(n):
    first, second = weights(1, n), weights(2, n)
    payload = oobpickle.dumps({"a": second, "b": first})
    oobpickle.loads(payload, into={"a": first, "b": second})

    assert (set(first), set(second)) == ({2.0}, {1.0})


@pytest.mark.parametrize("shift", [-1, 1, 50])
@pytest.mark.parametrize("n", [200, 20_000])
def test_an_array_can_be_shifted_within_its_memory(n, shift):
    base = np.arange(n + 100, dtype="f8")
    source, target = base[50 : n + 50], base[50 + shift : n + 50 + shift]
    expected = source.copy()
    oobpickle.loads(oobpickle.dumps([source]), into=[target])

    assert expected.tolist() == target.tolist()


def test_an_array_can_be_transposed_within_its_memory():
    base = filled("f8", (100, 100))
    expected = base.T.tolist()
    oobpickle.loads(oobpickle.dumps([base.T]), into=[base])

    assert expected == base.tolist()


# --- what is refused


W = weights(0)
FROZEN = weights(0)
FROZEN.flags.writeable = False
MISMATCHES = {
    "shape": ({"a": np.zeros((3, 100))}, {"a": np.zeros((100, 3))}, r"\$\['a'\].*\(3, 100\)"),
    "length": ([np.zeros(100)], [np.zeros(101)], r"\$\[0\].*\(100,\).*\(101,\)"),
    "dimensions": ([np.zeros((1, 100))], [np.zeros(100)], r"\$\[0\]"),
    "dtype": (Model(w=np.zeros(100, "f4")), Model(w=np.zeros(100)), r"\$\.w.*float32.*float64"),
    "byte order": ([np.zeros(100, ">f8")], [np.zeros(100)], r"\$\[0\].*>f8"),
    "unit": ([np.zeros(100, "M8[s]")], [np.zeros(100, "M8[ms]")], r"\[s\].*\[ms\]"),
    "fields": ([np.zeros(99, "f8,f8")], [np.zeros(99, [("a", "f8"), ("b", "f8")])], r"\$\[0\]"),
    "small array": ([np.zeros(3), W], [np.zeros(4), W.copy()], r"\$\[0\].*\(3,\)"),
    "subclass": ([W], [W.copy().view(np.recarray)], r"\$\[0\].*ndarray.*recarray"),
    "array for list": ([W], [[0.0] * 200], r"\$\[0\].*ndarray.*list"),
    "dict for object": ({"a": W}, Model(a=W.copy()), r"\$:.*dict.*Model"),
    "list for tuple": ({"a": [W]}, {"a": (W.copy(),)}, r"\$\['a'\].*list.*tuple"),
    "missing key": ({"a": W}, {"a": W.copy(), "b": 1}, r"\$.*'b'"),
    "further key": ({"a": W, "b": 1}, {"a": W.copy()}, r"\$.*'b'"),
    "other key": ({"a": W}, {"b": W.copy()}, r"'a'.*'b'"),
    "key of another type": ({1: W}, {"1": W.copy()}, r"\$"),
    "shorter list": ([W, 1], [W.copy()], r"\$"),
    "longer list": ([W], [W.copy(), 1], r"\$"),
    "shorter tuple": ([(W, 1)], [(W.copy(),)], r"\$\[0\].*2.*1"),
    "missing attribute": (Model(a=W), Model(a=W.copy(), b=1), r"\$.*\.b"),
    "further attribute": (Model(a=W, b=1), Model(a=W.copy()), r"\$.*\.b"),
    "deep": (
        Model(layers=[{"w": W}, {"w": (W, np.zeros(100))}]),
        Model(layers=[{"w": W.copy()}, {"w": (W.copy(), np.zeros(99))}]),
        r"\$\.layers\[1\]\['w'\]\[1\]",
    ),
    "object array": (
        Model(o=objects(None, np.zeros(100))),
        Model(o=objects(None, np.zeros(99))),
        r"\$\.o.*\[1\]",
    ),
    "read-only": ([W], [FROZEN], r"\$\[0\].*read-only"),
    "read-only view": ([W], [np.broadcast_to(W[0], 200)], r"\$\[0\].*read-only"),
}


def bytes_of(obj):
    """Return everything in an object that a partial load could have changed."""
    return described(obj), [array.tobytes() for array in arrays_of(obj)]


@pytest.mark.parametrize("case", MISMATCHES)
def test_another_structure_is_refused_at_its_path_and_nothing_is_changed(case):
    source, target, text = MISMATCHES[case]
    source, target = pickled([5, source, weights(5)]), [0, target, weights(0)]
    source[1] = _raised(source[1])
    kept, before = arrays_of(target), bytes_of(target)
    with pytest.raises(StructureError, match=text.replace(r"\$", r"\$\[1\]", 1)) as caught:
        oobpickle.loads(oobpickle.dumps(source), into=target)

    assert bytes_of(target) == before
    assert [id(array) for array in kept] == [id(array) for array in arrays_of(target)]
    assert isinstance(caught.value, ValueError)


def _raised(obj):
    for array in arrays_of(obj):
        if array.dtype.kind == "f":
            array += 7
    return obj


UNCHANGEABLE = [
    (1, 2),
    ("a", "b"),
    (b"a", b"b"),
    (None, False),
    (Fraction(1, 2), Fraction(1, 3)),
    ((1, 2), (1, 3)),
    (Colour.RED, Colour.BLUE),
    (relu, tanh),
]


@pytest.mark.parametrize(("source", "target"), UNCHANGEABLE)
def test_what_cannot_be_changed_in_place_is_refused_as_a_target(source, target):
    before = repr(target)
    with pytest.raises(StructureError, match=r"\$: "):
        loaded_into(target, source)

    assert repr(target) == before


def test_a_tuple_with_other_values_is_refused_as_a_target():
    target = (weights(0), 1)
    with pytest.raises(StructureError, match="tuple cannot be changed in place"):
        loaded_into(target, (weights(5), 2))

    assert set(target[0]) == {0.0}


def overlapping():
    base, other = np.zeros(1000), np.zeros((40, 40))
    return {
        "the same memory": [base[:500], base[:500]],
        "one inside the other": [base, base[100:200]],
        "by one item": [base[:501], base[500:]],
        "another dtype": [base, base.view("i8")],
        "transposed": [other, other.T],
        "strided": [base[::2], base[::4]],
        "reversed": [base[:500], base[499::-1]],
        "not neighbours": [base[:900], np.zeros(100), base[100:200]],
        "within an object array": [base, objects(base[:100], None)],
        "small and large": [base, base[:3]],
    }


@pytest.mark.parametrize("case", overlapping())
def test_targets_that_overlap_are_refused_and_nothing_is_changed(case):
    target = overlapping()[case]
    source = _raised(pickled(target))
    with pytest.raises(StructureError, match="overlap"):
        oobpickle.loads(oobpickle.dumps(source), into=target)

    assert not any(array.any() for array in arrays_of(target))


def test_neighbours_in_one_memory_do_not_overlap():
    base = np.zeros(1000)
    parts = [base[:300], base[300:700], base[700:]]
    loaded_into(parts, [weights(1, 300), weights(2, 400), weights(3, 300)])

    assert base.tolist() == [1.0] * 300 + [2.0] * 400 + [3.0] * 300


def test_an_error_of_the_object_while_loading_changes_nothing():
    target = [weights(0), 0]
    payload = oobpickle.dumps([weights(1), Raising()])
    with pytest.raises(ZeroDivisionError):
        oobpickle.loads(payload, into=target)

    assert (target[0][0], target[1]) == (0.0, 0)


class Raising:
    def __reduce__(self):
        return (divmod, (1, 0))


class Content(bytes):
    pass


class Point(ctypes.Structure):
    _fields_: ClassVar = [("x", ctypes.c_double), ("rest", ctypes.c_char * 900)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (typed("d", [0.0] * 900), typed("d", range(900))),
        (typed("f", [0.0] * 900), typed("d", range(700))),
        (bytearray(9000), bytearray(b"abc") * 2000),
        (bytes(9000), b"abc" * 2000),
        (Content(9000), Content(b"abc" * 2000)),
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_memory_that_is_no_array_is_replaced(old, new):
    before = pickle.dumps(old)
    target = {"content": old, "weights": weights(0)}
    kept = target["weights"]
    loaded_into(target, {"content": new, "weights": weights(1)})

    assert type(target["content"]) is type(new)
    assert pickle.dumps(target["content"]) == pickle.dumps(new)
    assert pickle.dumps(old) == before
    assert set(kept) == {1.0}


def test_a_structure_of_ctypes_is_no_target():
    target = [Point(), weights(0)]
    with pytest.raises(StructureError, match="decides itself"):
        oobpickle.loads(oobpickle.dumps([Point(1.0), weights(1)]), into=target)

    assert target[0].x == 0
    assert not any(target[1])


def test_altered_bytes_change_nothing():
    target = {"a": weights(0)}
    data = bytearray(oobpickle.dumps({"a": weights(1)}).to_bytes())
    data[-1] ^= 1
    with pytest.raises(pickle.UnpicklingError):
        oobpickle.loads(data, into=target)

    assert set(target["a"]) == {0.0}
