"""writable: a copy where an array is read-only, the object itself where none is."""

import array
import collections
import pickle

import numpy as np
import pytest

import oobpickle
from oobpickle._merge.writing import private
from samples import Model

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")


def frozen(array):
    array.flags.writeable = False
    return array


class Matrix(np.ndarray):
    """A subclass."""


class Holder:
    """A class with its own PickleBuffer."""

    def __init__(self, memory):
        self.memory = memory

    def __reduce__(self):
        return Holder, (pickle.PickleBuffer(self.memory),)


READ_ONLY = {
    "large": lambda: frozen(np.arange(1000.0)),
    "small": lambda: frozen(np.arange(3)),
    "empty": lambda: frozen(np.arange(0)),
    "strided": lambda: frozen(np.arange(1000)[::2]),
    "fortran": lambda: frozen(np.asfortranarray(np.ones((30, 30)))),
    "datetimes": lambda: frozen(np.arange(1000).astype("datetime64[s]")),
    "records": lambda: frozen(np.zeros(9, [("a", "i4"), ("b", "f8")])),
    "objects": lambda: frozen(np.array([[1], None], object)),
    "in objects": lambda: np.array([frozen(np.arange(3)), None], object),
    "in a dict": lambda: {"a": np.ones(3), "b": [frozen(np.ones(300))]},
    "subclass": lambda: frozen(np.arange(1000).view(Matrix)),
    "masked": lambda: np.ma.array(frozen(np.arange(1000)), mask=False, copy=False),
    "frame": lambda: pd.DataFrame({"a": frozen(np.arange(1000))}, copy=False),
    "buffer": lambda: Holder(memoryview(bytes(1000))[1:].toreadonly()),
    "of bytes": lambda: np.frombuffer(bytes(1000)),
}


@pytest.mark.parametrize("name", [n for n in READ_ONLY if n != "buffer"])
def test_what_is_read_only_is_copied(name):
    obj = READ_ONLY[name]()
    own = oobpickle.writable(obj)

    assert own is not obj
    assert type(own) is type(obj)
    assert pickle.dumps(own, 4) == pickle.dumps(obj, 4) or name in ("fortran", "frame", "masked")
    assert oobpickle.writable(own) is own


def test_arrays_can_be_written_then_and_the_original_is_as_it_was():
    obj = {"a": np.ones(1000), "b": frozen(np.ones(1000)), "c": [frozen(np.ones(3))]}
    own = oobpickle.writable(obj)
    for array_ in (own["a"], own["b"], own["c"][0]):
        array_ += 1

    assert [obj["a"].max(), obj["b"].max(), obj["c"][0].max()] == [1, 1, 1]
    assert [own["a"].min(), own["b"].min(), own["c"][0].min()] == [2, 2, 2]


@pytest.mark.parametrize(
    "obj",
    [
        np.arange(1000),
        np.arange(3),
        np.asfortranarray(np.ones((30, 30))),
        np.array([None], object),
        {"a": [np.ones(3)]},
        collections.Counter("abra"),
        bytes(10_000),
        bytearray(10_000),
        array.array("d", range(1000)),
        pa.table({"a": range(1000)}),
        pa.array(range(1000)),
        Model(),
        "text",
        None,
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_what_can_be_written_is_the_object_itself(obj):

    assert oobpickle.writable(obj) is obj


def test_a_buffer_of_another_class():
    holder = READ_ONLY["buffer"]()

    own = oobpickle.writable(holder)

    assert own is not holder
    assert bytes(own.memory) == bytes(999)


def test_a_class_that_no_name_finds():
    class Local:
        def __init__(self):
            self.array = frozen(np.arange(1000))

    obj = Local()
    own = oobpickle.writable(obj)
    own.array += 1

    assert type(own).__name__ == "Local"
    assert obj.array[0] == 0


def test_what_cannot_be_pickled():
    with pytest.raises(TypeError, match="pickle"):
        oobpickle.writable(_ for _ in ())


def test_private_always_copies():
    obj = {"a": np.ones(1000), "b": [1]}
    own = private(obj)
    own["a"] += 1
    own["b"].append(2)

    assert obj["a"].max() == 1
    assert obj["b"] == [1]
