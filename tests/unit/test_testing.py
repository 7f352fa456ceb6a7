"""check_roundtrip: what it lets pass, and the wrong picklers that it must catch."""

import collections
import copy
import ctypes
import os
import pickle
import re
import types

import numpy as np
import pytest

import oobpickle
import samples
from oobpickle.testing import Way, check_roundtrip, differences
from samples import Model


class Counting:
    """Says by its own reducer how it is taken apart."""

    def __init__(self, weights):
        self.weights = weights

    def __reduce__(self):
        return rebuild_counting, (self.weights,)


def rebuild_counting(weights):
    return Counting(weights)


def right(obj):
    return pickle.loads(pickle.dumps(obj, 5))


def planted(wrong, dump=lambda obj: pickle.dumps(obj, 5)):
    """A pickler whose results `wrong` changes."""
    return {"planted": Way(dump, lambda data: wrong(pickle.loads(data)))}


def changed(path, change):
    """Change what stands at an attribute of what arrives."""

    def wrong(obj):
        setattr(obj, path, change(getattr(obj, path)))
        return obj

    return wrong


def in_place(change):
    def wrong(obj):
        change(obj)
        return obj

    return wrong


ARRAY = np.arange(24.0).reshape(4, 6)
NEGATIVE_ZERO = [-0.0]
UNIT = np.dtype("f8", metadata={"unit": "metre"})


def model():
    return Model(a=ARRAY, b=ARRAY[1:], c=[ARRAY, {"x": 1, "y": (2, "three")}], d=b"abc")


def masked():
    return np.ma.MaskedArray(ARRAY, ARRAY > 5, fill_value=7.0)


def failing():
    error = ValueError("bad", ARRAY)
    error.add_note("a note")
    return error


def cyclic():
    found = Model(a=ARRAY)
    found.me = found
    return found


#: By what is wrong: what is sent, what changes it, and what the difference says.
PLANTED = {
    "dtype": (model, changed("a", lambda a: a.astype("f4")), r"\$\.a: dtype float64"),
    "byte order": (
        lambda: Model(a=ARRAY.astype(">f8")),
        changed("a", lambda a: a.astype("<f8")),
        r"\$\.a: dtype >f8",
    ),
    "metadata of a dtype": (
        lambda: Model(a=ARRAY.astype(UNIT)),
        changed("a", lambda a: a.view("f8")),
        r"\$\.a: dtype float64",
    ),
    "memory order": (
        lambda: Model(a=np.asfortranarray(ARRAY)),
        changed("a", lambda a: a.copy("C")),
        r"\$\.a: strides \(8, 32\)",
    ),
    "shape": (model, changed("a", lambda a: a.reshape(6, 4)), r"\$\.a: shape \(4, 6\)"),
    "one element": (
        model,
        in_place(lambda m: m.b.__setitem__((1, 2), -1)),
        r"\$\.b\[1, 2\]: np.float64\(14.0\)",
    ),
    "sign of zero": (lambda: NEGATIVE_ZERO, lambda _: [0.0], r"\$\[0\]: -0.0"),
    "mask": (masked, in_place(lambda m: m.mask.__setitem__((0, 0), True)), r"\$\._mask\[0, 0\]"),
    "fill value": (masked, lambda m: np.ma.MaskedArray(m.data, m.mask), r"\$\._fill_value"),
    "subclass": (lambda: Model(a=ARRAY.view(np.matrix)), changed("a", np.asarray), "type numpy"),
    "identity": (model, changed("c", copy.deepcopy), r"\$\.c\[0\]: the same object as \$\.a in p"),
    "a new identity": (
        lambda: [ARRAY.copy(), ARRAY.copy()],
        lambda pair: [pair[0], pair[0]],
        r"\$\[1\]: the same object as \$\[0\] here",
    ),
    "new aliasing": (model, lambda m: changed("b", lambda _: m.a[1:])(m), r"\$\.b: shares memory"),
    "lost aliasing": (
        lambda: samples.Viewing(np.arange(2000.0)),
        changed("flat", np.copy),
        r"flat: shares memory with \$\.(weights|head) in pickle's, not here",
    ),
    "the sender's memory": (
        lambda: Model(a=ARRAY),
        changed("a", lambda _: ARRAY),
        r"\$\.a: shares memory with what was sent",
    ),
    "writability": (model, in_place(lambda m: m.a.setflags(write=False)), r"\$\.a: read-only"),
    "an attribute": (model, in_place(lambda m: delattr(m, "d")), r"\$: attributes \['a'"),
    "an attribute more": (model, in_place(lambda m: setattr(m, "e", 1)), r"\$: attributes"),
    "order of a dict": (
        lambda: {"a": 1, "b": 2},
        lambda found: dict(reversed(found.items())),
        r"\$\.keys\(\)\[0\]: a in pickle's, b here",
    ),
    "type of a sequence": (model, changed("c", tuple), r"\$\.c: type list in pickle's, tuple here"),
    "type of bytes": (model, changed("d", bytearray), r"\$\.d: type bytes"),
    "an item": (model, changed("c", lambda c: c[:1]), r"\$\.c: length 2"),
    "a value far inside": (
        model,
        in_place(lambda m: m.c[1].update(y=(2, "four"))),
        r"\$\.c\[1\]\['y'\]\[1\]: three in pickle's, four here",
    ),
    "notes of an exception": (failing, in_place(lambda e: e.__notes__.clear()), "__notes__"),
    "a cycle": (
        cyclic,
        lambda m: Model(a=m.a, me=m),
        r"\$\.me: the same object as \$ in pickle's, not here",
    ),
    "default factory": (
        lambda: collections.defaultdict(list, a=1),
        in_place(lambda d: setattr(d, "default_factory", set)),
        r"\$\.default_factory: list in pickle's, set here",
    ),
    "length of a deque": (
        lambda: collections.deque([1], 5),
        lambda d: collections.deque(d, 6),
        "maxlen 5",
    ),
    "an object in an array": (
        lambda: np.array([{"a": 1}, None], object),
        in_place(lambda a: a[0].update(a=2)),
        r"\$\.ravel\(\)\[0\]\['a'\]: 1 in pickle's, 2 here",
    ),
    "a field": (
        lambda: np.zeros(3, [("a", "i4"), ("b", "f8")]),
        in_place(lambda a: a["b"].__setitem__(1, 5)),
        r"\$\['b'\]\[1\]",
    ),
    "state behind a reducer": (
        lambda: np.random.default_rng(1),
        in_place(lambda generator: generator.random()),
        r"\$\.__reduce_ex__\(5\)",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_pickler_is_caught_and_the_place_is_named(name):
    make, wrong, text = PLANTED[name]
    obj = make()
    found = "\n".join(differences(obj, planted(wrong)))

    assert re.search(text, found), found
    assert differences(make(), planted(lambda arrived: arrived)) == []


def test_a_reducer_that_is_called_twice_is_caught():
    def dump(obj):
        pickle.dumps(obj, 5)
        return pickle.dumps(obj, 5)

    found = differences(Counting(ARRAY), planted(lambda obj: obj, dump))

    assert ["planted: Counting.__reduce__ was called 2 times, by pickle 1 times"] == found


def test_a_reducer_that_is_not_called_is_caught():
    def dump(obj):
        return pickle.dumps(Counting.__new__(Counting).__dict__ or obj.weights, 5)

    found = differences(Counting(ARRAY), planted(Counting, dump))

    assert ["planted: Counting.__reduce__ was called 0 times, by pickle 1 times"] == found


def test_a_reducer_may_run_twice_where_buffers_overlap():

    assert differences([Counting(ARRAY), Counting(ARRAY[1:])], {}) == []
    check_roundtrip([Counting(np.arange(20_000.0)[:15_000])] * 2)


# --- what is right


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double), ("y", ctypes.c_int32))


GOOD = {
    "model": model(),
    "masked": masked(),
    "exception": failing(),
    "group": ExceptionGroup("several", [failing(), KeyError("k")]),
    "cycle": cyclic(),
    "own state": Counting(ARRAY),
    "views after loading": samples.Viewing(np.arange(30_000.0)),
    "strided": ARRAY[::2, ::-1],
    "read-only": samples._read_only(np.arange(30_000.0)),
    "big-endian and strided": np.arange(30_000).astype(">i4")[::3],
    "ctypes": [Point(1.5, 2), Point(0, -1)],
    "scalars": [np.float64(np.nan), np.datetime64(5, "ms"), -0.0, 1j, float("nan"), 1 << 100],
    "sets": {frozenset({1, 2}), "a"},
    "lambda": lambda: ARRAY,
    "generator": np.random.default_rng(3),
    **{f"a {kind.__name__}": kind(a=ARRAY, b={"c": ARRAY}) for kind in samples.FROZEN_DICTS},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_arrives_as_with_pickle_is_let_pass(name):
    check_roundtrip(GOOD[name])


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_every_start_method_serves(start_method):
    check_roundtrip(samples.Model(a=np.arange(30_000.0)), start_method=start_method)


class Estimator:
    """Its state has the names of its attributes as a value, too."""

    def __init__(self):
        self.names = ("known_only_here",)
        self.known_only_here = np.zeros(30_000)

    def __getstate__(self):
        return dict(vars(self))

    def __setstate__(self, state):
        vars(self).update(state)


def test_names_of_attributes_are_the_objects_of_whoever_is_loaded_first():
    obj = types.SimpleNamespace(names=("known_only_here",), known_only_here=1)
    check_roundtrip([obj, Estimator()], start_method="spawn")


def test_an_arena_that_is_in_force_is_used():
    with oobpickle.enabled(threshold=1000) as arena:
        check_roundtrip(np.arange(1000.0))

        assert arena.statistics().n_messages_out_of_band == 1


class DiesWhereItArrives:
    """Ends any process but the one that made it."""

    def __init__(self):
        self.pid = os.getpid()
        self.weights = np.zeros(30_000)

    def __setstate__(self, state):
        self.__dict__.update(state)
        if os.getpid() != self.pid:
            os._exit(7)


class FailsWhereItArrives(DiesWhereItArrives):
    def __setstate__(self, state):
        self.__dict__.update(state)
        if os.getpid() != self.pid:
            raise RuntimeError("only at home")


class DiffersWhereItArrives(DiesWhereItArrives):
    """Every load of it in another process gives another value."""

    n_loads = 0

    def __setstate__(self, state):
        self.__dict__.update(state)
        if os.getpid() != self.pid:
            DiffersWhereItArrives.n_loads += 1
            self.n = self.n_loads


def test_what_differs_in_a_process_is_said():
    with pytest.raises(AssertionError, match=r"in a process: \$\.n: 1 in pickle's, 2 here"):
        check_roundtrip(DiffersWhereItArrives())


def test_what_a_process_cannot_load_is_said():
    with pytest.raises(AssertionError, match=r"in a process: .*only at home"):
        check_roundtrip(FailsWhereItArrives())
    with pytest.raises(AssertionError, match=r"in a process: no answer; its exit code is 7"):
        check_roundtrip(DiesWhereItArrives())


class Unpicklable:
    def __reduce__(self):
        raise ZeroDivisionError("of the object")


def test_what_cannot_be_pickled_has_its_own_error():
    with pytest.raises(ZeroDivisionError, match="of the object"):
        check_roundtrip([ARRAY, Unpicklable()])


def test_the_text_is_short(monkeypatch):
    monkeypatch.setattr("oobpickle.testing._WAYS", planted(lambda found: dict.fromkeys(found, -1)))
    with pytest.raises(AssertionError) as caught:
        check_roundtrip(dict.fromkeys(range(1, 100), "x" * 1000))

    assert str(caught.value).endswith("and 79 more")
    assert len(str(caught.value)) < 5000
