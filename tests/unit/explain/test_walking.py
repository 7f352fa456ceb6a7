"""Walking: what is counted is what the pickler writes."""

import collections
import datetime
import decimal
import threading
import time
import tracemalloc

import numpy as np
import pandas as pd
import polars as pl
import pytest
import xarray as xr
from sklearn.ensemble import RandomForestClassifier

import samples
from oobpickle._envelope import tables
from oobpickle._explain import amounts as of
from oobpickle._explain.walking import Walk
from oobpickle._native import core
from oobpickle._pickling.serializer import take_apart

THRESHOLD = 128 << 10
BIG = np.ones(50_000)


class Point:
    def __init__(self, i):
        self.x, self.name = i, f"point {i}"


class Holder:
    pass


class Slotted:
    __slots__ = ("array", "name")

    def __init__(self):
        self.array, self.name = np.ones(100_000), "a"


def holder(**attributes):
    made = Holder()
    vars(made).update(attributes)
    return made


def _forest():
    random = np.random.default_rng(0)
    return RandomForestClassifier(10, random_state=0).fit(
        random.random((300, 4)), np.arange(300) % 2
    )


CASES = {
    "none": lambda: None,
    "int": lambda: 3,
    "string": lambda: "abc",
    "ints": lambda: [*range(-70_000, 70_000, 7), 1 << 40, -(1 << 70), 1 << 3000],
    "floats": lambda: [float(i) for i in range(5000)],
    "truth": lambda: [True, False, None] * 1000,
    "strings": lambda: [f"ä{i}" for i in range(5000)] + ["\ud800", "a" * 300, "b" * 100_000],
    "the same string": lambda: ["again and again" + str(3)] * 3000,
    "bytes": lambda: [b"a", bytes(300), bytes(200_000), bytearray(10), bytearray(300_000)],
    "dict": lambda: {f"key {i}": float(i) for i in range(5000)},
    "dict of tuples": lambda: {(i, str(i)): [i] for i in range(2000)},
    "tuples": lambda: [(i, i + 0.5) for i in range(3000)],
    "nested": lambda: [[[(1, (2, [3, {4: {5}}]))]], frozenset([1, "a"]), set(), (), [], {}],
    "points": lambda: [Point(i) for i in range(3000)],
    "small arrays": lambda: [np.arange(10.0) for _ in range(3000)],
    "arrays": lambda: holder(a=np.ones((300, 300)), b=[np.ones(3), np.ones((100, 100)).T]),
    "strided": lambda: np.ones((1000, 100))[::2, ::3],
    "slots": Slotted,
    "counter": lambda: collections.Counter(str(i) for i in range(3000)),
    "deque": lambda: collections.deque(range(3000)),
    "dates": lambda: [datetime.datetime(2020, 1, 1) + datetime.timedelta(i) for i in range(2000)],
    "decimals": lambda: [decimal.Decimal(i) / 7 for i in range(2000)],
    "frame": lambda: pd.DataFrame(
        {"x": np.arange(20_000.0), "s": pd.Series([str(i) for i in range(20_000)], dtype=object)}
    ),
    "polars": lambda: pl.DataFrame({"x": np.arange(50_000.0)}),
    "xarray": lambda: xr.Dataset({"x": ("t", np.arange(50_000.0))}),
    "forest": _forest,
    "masked": lambda: np.ma.array(np.arange(50_000.0), mask=np.arange(50_000) % 2 == 0),
    "objects": lambda: np.array([str(i) for i in range(5000)], dtype=object),
    "strings of numpy": lambda: np.array([str(i) for i in range(5000)], np.dtypes.StringDType()),
    "structured": lambda: np.zeros(20_000, [("a", "f8"), ("b", "i4")]),
    "lambdas": lambda: [lambda: 1, lambda x, y=BIG: x],
    "colours": lambda: [samples.Colour.RED] * 10,
    "registered": lambda: [range(5), slice(1, 2), complex(1, 2), Ellipsis, NotImplemented],
}


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_that_are_written(name):
    obj = CASES[name]()
    root = Walk(obj, THRESHOLD).root
    message = core.Message(None, THRESHOLD, tables({}))
    take_apart(obj, message, by_value=True)

    assert root.amounts[of.OUT] == message.nbytes - message.stream_nbytes
    assert root.amounts[of.STREAM] == pytest.approx(message.stream_nbytes, rel=0.01, abs=400)


def test_each_reducer_is_called_once():
    calls = []

    class Counting:
        def __reduce__(self):
            calls.append(self)
            return str, ()

    obj = [Counting() for _ in range(50)]
    Walk(obj + obj, THRESHOLD)

    assert calls == obj


def seconds_of_a_walk(n_points):
    obj = [Point(i) for i in range(n_points)]
    start_s = time.thread_time()
    walk = Walk(obj, THRESHOLD)
    took_s = time.thread_time() - start_s
    assert walk.root.amounts[of.PARTS] > 4.7 * n_points
    return took_s


def test_a_million_parts_take_no_longer_than_their_number():
    few_s = min(seconds_of_a_walk(17_000) for _ in range(3))

    assert seconds_of_a_walk(170_000) < 10 * 3 * few_s


def test_a_part_takes_little_memory():
    obj = [Point(i) for i in range(20_000)]
    tracemalloc.start()
    n_parts = Walk(obj, THRESHOLD).root.amounts[of.PARTS]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak / n_parts < 200  # bytes: a million of them take less than 200 MB


def test_cycles_end():
    obj = []
    obj.append((obj, {"self": obj}))
    one, other = holder(), holder()
    one.other, other.other = other, one

    assert Walk(obj, THRESHOLD).refused == Walk(one, THRESHOLD).refused == []


def test_depth_is_no_matter():
    obj = None
    for _ in range(15_000):
        obj = [obj]
    walk = Walk(obj, THRESHOLD)

    assert walk.deepest >= 15_000
    assert walk.root.amounts[of.PARTS] == 15_001


def _endless():
    return Endless()


class Endless:
    def __reduce__(self):
        return _endless, (Endless(),)


class Breaking:
    def __reduce__(self):
        return list, (), None, self._items()

    @staticmethod
    def _items():
        yield 1
        raise KeyError("broken")


class Raising:
    def __reduce__(self):
        raise ValueError("not now")


class Guarded:
    def __getattribute__(self, name):
        raise RuntimeError(name)


class Wrong:
    def __reduce__(self):
        return 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: (i for i in ()), "TypeError: cannot pickle 'generator' object"),
        (threading.Lock, "TypeError: cannot pickle"),
        (Raising, "ValueError: not now"),
        (Guarded, "RuntimeError: __reduce_ex__"),
        (Breaking, "KeyError: 'broken'"),
        (Wrong, "PicklingError: __reduce__ must return"),
        (Endless, "RecursionError: nested more than 20,000 levels deep"),
        (lambda: np, "TypeError: cannot pickle 'module' object"),
    ],
)
def test_what_pickle_refuses_is_named_and_the_rest_is_counted(make, says):
    obj = {"before": np.ones(100_000), "wrong": [make()], "after": np.ones(100_000)}
    walk = Walk(obj, THRESHOLD)

    assert walk.root.amounts[of.OUT] == 1_600_000
    assert says in walk.refused[0].refusal
    assert walk.root.amounts[of.REFUSED] == 1


def test_a_bytearray_can_be_resized_afterwards():
    obj = bytearray(300_000)
    Walk([obj], THRESHOLD)
    obj.append(1)
