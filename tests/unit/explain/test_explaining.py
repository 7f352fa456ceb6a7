"""Explain: what it says of an object, and that it does nothing else."""

import collections
import copy
import gc
import html.parser
import pickle
import weakref

import numpy as np
import pandas as pd
import pytest

import oobpickle
from oobpickle._explain import explaining, measuring


class Layer:
    def __init__(self, n):
        self.weight = np.ones((n, n))


class Point:
    def __init__(self, i):
        self.x = i


class Model:
    def __init__(self):
        self.layers = [Layer(n) for n in (10, 200, 300)]
        self.names = {f"name {i}": i for i in range(30_000)}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    """The same machine for all tests."""
    rates = dict.fromkeys(measuring.of.KINDS, (2e-6, 1e-6, 2e-6, 1e-6))
    known = measuring.Costs(rates, (0.0,) * 4, 1e-8, 1e-10, 1e-4)
    monkeypatch.setattr(measuring, "_known", known)


def of(explanation, path):
    return next(part for part in explanation if part.path == path)


def test_the_tree_is_by_path_and_the_largest_is_first():
    explanation = oobpickle.explain(Model())
    layers = of(explanation, "$.layers")

    assert [part.path for part in explanation.children[:2]] == ["$.layers", "$.names"]
    assert layers.children[0].children[0].path == "$.layers[2].weight"
    assert layers.children[0].children[0].placement == "out of band"
    assert of(explanation, "$.names").placement == "stream"
    assert explanation.placement == "both"


def test_sums_and_parts():
    explanation = oobpickle.explain(Model())
    for part in explanation:
        nbytes = sum(one.nbytes for one in part.children) + part.nbytes_cut
        assert nbytes <= part.nbytes + 1 or not part.n_cut
        assert part.n_cut == part.n_parts - 1 - sum(one.n_parts for one in part.children)

    assert explanation.nbytes == pytest.approx(oobpickle.dumps(Model()).nbytes, rel=0.01)


def test_types_say_what_is_in_them():
    objects = np.array([str(i) for i in range(1000)], dtype=object)
    said = {
        "dict of 20,000 small objects": {str(i): i for i in range(20_000)},
        "list of 1,000 Python strings": [str(i) for i in range(1000)],
        "ndarray object 1000: 1,000 Python strings": objects,
        "ndarray float64 3x4": np.ones((3, 4)),
        "list of 3": [1, 2, 3],
        "str of 5": "abcde",
        "class int": int,
    }

    assert {oobpickle.explain(obj).type: obj is not None for obj in said.values()} == dict.fromkeys(
        said, True
    )
    strings = np.array(["a", "b"], np.dtypes.StringDType())
    assert oobpickle.explain(strings).type.endswith("StringDType 2: a list of strings to pickle")


def test_columns_of_a_frame_have_their_names():
    n = 20_000
    strings = pd.Series([str(i) for i in range(n)], dtype=object)
    frame = pd.DataFrame({"x": np.arange(n) * 1.0, "y": np.arange(n) * 2.0, "s": strings})
    explanation = oobpickle.explain(frame, name="frame")
    column = of(explanation, "frame['s']")

    assert of(explanation, "frame['x', 'y']").placement == "out of band"
    assert column.type == f"ndarray object 1x{n}: 20,000 Python strings"
    assert "astype('U')" in column.advice


ADVICE = {
    "numpy.array": [float(i) for i in range(20_000)],
    "arrays of keys and of values in its place": {str(i): i for i in range(20_000)},
    "arrays of keys and of": collections.Counter({str(i): i for i in range(20_000)}),
    "oobpickle.register": [Point(i) for i in range(20_000)],
    "one array for all of them": [np.ones(20) for _ in range(20_000)],
    "astype(float)": np.array([0.5] * 20_000, dtype=object),
    "pyarrow's string arrays": np.array(["abcdef"] * 20_000, np.dtypes.StringDType()),
}


@pytest.mark.parametrize("says", ADVICE)
def test_advice(says):
    assert says in oobpickle.explain(ADVICE[says]).advice


def test_broadcast_is_only_named_where_it_is(monkeypatch):
    large = np.ones(9 << 20)
    monkeypatch.delattr(oobpickle, "broadcast", raising=False)
    assert oobpickle.explain(large).advice == ""
    monkeypatch.setattr(oobpickle, "broadcast", None, raising=False)
    assert "oobpickle.broadcast" in oobpickle.explain(large).advice


def test_a_small_message_travels_as_ever():
    explanation = oobpickle.explain({"a": np.ones(1000)})

    assert explanation.placement == "stream"
    assert "less than 128 KiB: it travels as ever" in explanation.reason
    assert explanation.seconds.plain == explanation.seconds.oobpickle


def test_the_threshold_is_that_of_the_arena_in_use():
    with oobpickle.enabled(threshold=1000):
        assert oobpickle.explain({"a": np.ones(1000)}).placement == "out of band"


def test_what_stays_although_it_is_an_array_says_why():
    explanation = oobpickle.explain(
        {"first": np.ones(8000), "rest": np.ones(80_000), "s": np.ones(3)}
    )

    assert "among the first 128 KiB" in of(explanation, "$['first']").reason
    assert "fewer than 512 bytes" in of(explanation, "$['s']").reason
    assert of(explanation, "$['rest']").n_copies[1] == 1


def test_the_same_memory_by_two_paths():
    array = np.ones((1000, 100))
    obj = {
        "all": array,
        "again": array,
        "half": array[500:],
        "left": array[:, :50],
        "r": array[:, 50:],
    }
    explanation = oobpickle.explain(obj)

    # The very same object is sent once; views of it are not.
    paths = {one.paths for one in explanation.duplicates}
    assert ("$['all']", "$['left']") in paths
    assert not any("again" in path for one in paths for path in one)
    assert {"$['left']", "$['r']"} not in map(set, paths)
    assert "the same memory twice" in str(explanation)


def test_what_is_refused_comes_first_with_its_path():
    obj = Model()
    obj.layers[1].source = (i for i in range(3))
    explanation = oobpickle.explain(obj, name="model")

    assert explanation.refused == ("model.layers[1].source",)
    assert of(explanation, "model.layers[1].source").placement == "refused"
    assert "pickle cannot take model.layers[1].source" in str(explanation)


def test_what_is_too_deep_for_pickle_is_refused():
    obj = None
    for _ in range(12_000):
        obj = [obj]
    try:
        pickle.dumps(obj, 5)
        is_refused = False  # 3.14 goes as deep as its stack
    except RecursionError:
        is_refused = True
    explanation = oobpickle.explain(obj)

    assert ("RecursionError" in explanation.reason) == is_refused
    assert len(str(explanation)) < 5000


class Unfriendly:
    """Nothing of it may be asked."""

    def __repr__(self):
        raise AssertionError

    __str__ = __len__ = __iter__ = __bool__ = __repr__

    @property
    def value(self):
        raise AssertionError

    @property
    def __class__(self):
        raise AssertionError


class OfMeta(type):
    def __getattribute__(cls, name):
        if name in ("__qualname__", "__name__"):
            raise AssertionError
        return super().__getattribute__(name)


class WithMeta(metaclass=OfMeta):
    pass


def test_no_code_of_the_object_runs_but_its_reducers():
    explanation = oobpickle.explain({"a": [Unfriendly() for _ in range(20)], "b": WithMeta()})

    assert "Unfriendly" in str(explanation) + explanation._repr_html_()


def test_an_own_reducer_says_that_it_cannot_be_seen_into():
    class Own:
        def __reduce__(self):
            return bytes, (bytes(300_000),)

    explanation = oobpickle.explain({"own": Own()})

    assert "what rebuilding costs is not seen" in of(explanation, "$['own']").reason


def test_the_object_is_as_it_was():
    obj = {"a": np.ones(50_000), "b": bytearray(200_000), "c": [1, 2]}
    before = copy.deepcopy(obj)
    oobpickle.explain(obj)
    obj["b"].append(1)

    assert np.array_equal(obj["a"], before["a"])
    assert obj["b"][:-1] == before["b"]


def test_nothing_of_the_object_is_kept_not_even_for_the_collector():
    obj = Model()
    obj.wrong, obj.own = (i for i in ()), pd.DataFrame({"x": np.arange(50_000)})
    kept = [weakref.ref(obj), weakref.ref(obj.layers[2].weight), weakref.ref(obj.layers[1])]
    gc.collect()
    gc.disable()
    try:
        explanation = oobpickle.explain([obj, obj.layers])
        del obj
        assert [one() for one in kept] == [None] * 3
    finally:
        gc.enable()
    assert explanation.refused == ("$[0].wrong",)


EVERY = [
    Model(),
    {"x" * 200: {"y" * 300: np.ones(100_000)}, "<b>": ["&"] * 50},
    [[np.ones(30_000) for _ in range(100)] for _ in range(10)],
    pd.DataFrame({"a long name of a column " * 5: np.arange(50_000)}),
    3,
    None,
]


@pytest.mark.parametrize("obj", EVERY)
def test_the_text_fits_into_80_columns(obj):
    lines = str(oobpickle.explain(obj)).splitlines()

    assert max(map(len, lines)) <= 80
    assert len(lines) < 100


class Balanced(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("obj", EVERY)
def test_the_html_is_well_formed_and_escapes(obj):
    found = Balanced(oobpickle.explain(obj)._repr_html_())

    assert found.open == []
    assert found.seen <= {"div", "p", "br", "details", "summary", "b", "i"}


def test_an_explanation_is_a_value():
    explanation = oobpickle.explain({"a": np.ones(100_000)})

    assert pickle.loads(pickle.dumps(explanation)) == explanation
    assert repr(explanation).startswith("<Explanation of $: dict of 1, 800")


def test_seconds_add_up():
    n = 100_000
    explanation = oobpickle.explain({"a": np.ones(n)})
    seconds = explanation.seconds

    assert seconds.plain == pytest.approx(8 * n * 1e-8 + 1e-4, rel=0.1)
    assert seconds.oobpickle < seconds.plain
    assert 0 < seconds.pickle < seconds.oobpickle


def test_only_what_is_too_deep_is_tried(monkeypatch):
    monkeypatch.setattr(explaining, "_try", None)
    oobpickle.explain([[[1]]])
