"""The serializer: what arrives is what plain pickle would have delivered."""

import io
import pickle
import threading

import numpy as np
import pytest

import oobpickle
import samples
from oobpickle import PayloadError
from oobpickle._pickling.serializer import serialize
from samples import LAYOUTS, SHAPES, Model, address_of, described, filled, pickled


def crossed(obj):
    return oobpickle.loads(oobpickle.dumps(obj))


# --- by value


def local_object(array):
    class Local:
        def __init__(self):
            self.array = array

    return Local()


@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["out of band", "in band"])
def test_what_plain_pickle_refuses_is_taken_by_value(threshold):
    array = np.arange(1000.0)
    obj = [local_object(array), lambda: array, array]
    with pytest.raises((AttributeError, pickle.PicklingError)):
        serialize(obj, threshold)
    payload = serialize(obj, threshold, by_value=True)
    one, function, third = oobpickle.loads(payload)

    assert payload.sizes == ([] if threshold else [8000])
    assert one.array is third
    assert function() is third
    assert type(one) is type(obj[0])
    np.testing.assert_array_equal(array, third)
    assert third.flags.writeable


def test_registered_reducers_come_before_those_by_value():
    class Local:
        pass

    payload = serialize([Local(), lambda: 1], 0, {Local: lambda _: (int, (7,))}, by_value=True)

    assert oobpickle.loads(payload)[0] == 7


class Counts:
    n_reduced = 0

    def __reduce__(self):
        Counts.n_reduced += 1
        return Counts, ()


def test_what_plain_pickle_takes_is_not_asked_about_twice():
    Counts.n_reduced = 0
    serialize(Counts(), 0, by_value=True)

    assert Counts.n_reduced == 1


LOCK = threading.Lock()


@pytest.mark.parametrize("bad", [LOCK, lambda lock=LOCK: lock], ids=["lock", "lambda"])
def test_what_both_refuse_has_the_error_of_plain_pickle(bad):
    with pytest.raises(Exception) as plain:
        pickle.dumps(bad, 5)
    with pytest.raises(plain.type) as caught:
        serialize(bad, 0, by_value=True)

    assert str(plain.value) == str(caught.value)


def test_an_alarm_during_the_second_attempt_reaches_the_program():
    class Slow:
        def __reduce__(self):
            if Slow.armed:
                raise TimeoutError("alarm")
            Slow.armed = True
            return int, ()

        armed = False

    with pytest.raises(TimeoutError, match="alarm"):
        serialize([Slow(), lambda: 1], 0, by_value=True)


# --- arrays


@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["out of band", "in band"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_arrive_as_pickle_would_deliver_them_but_writable(layout, threshold):
    def cross(array):
        return oobpickle.loads(serialize(array, threshold))

    assert samples.differing(layout, cross) == {}


SPECIAL = [
    "object",
    "object, no dimension",
    "object, read-only",
    "object field",
    "memmap",
    "memmap, read-only",
    "matrix",
    "recarray",
    "masked",
    "masked, hard",
    "subclass",
    "itemsize 0",
    "StringDType",
    "StringDType with a missing one",
]


@pytest.fixture
def special(tmp_path):
    """Arrays that are no exact ndarrays of plain bytes."""
    return samples.special_arrays(tmp_path)


def test_every_special_array_is_listed_here(special):

    assert set(special) <= set(SPECIAL)


@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["out of band", "in band"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_arrays_arrive_as_pickle_would_deliver_them(special, name, threshold):
    if name not in special:
        pytest.skip("this numpy has no such dtype")
    arrived = oobpickle.loads(serialize(special[name], threshold))

    assert described(pickled(special[name])) == described(arrived)
    assert type(arrived) is not np.ndarray or arrived.flags.writeable


def test_a_memmap_does_not_become_a_reference_to_its_file(special, tmp_path):
    payload = oobpickle.dumps(special["memmap"])
    special["memmap"][0, 0] = -1
    data = payload.to_bytes()
    (tmp_path / "mapped").write_bytes(b"")

    assert float(oobpickle.loads(data)[0, 0]) == 0.0


def test_big_arrays_inside_object_arrays_travel_out_of_band(special):
    payload = oobpickle.dumps(special["object"])

    assert payload.sizes == [16000, 16000, 8000]


def test_a_mask_that_is_shared_stays_shared():
    mask = np.zeros(1000, bool)
    one = np.ma.MaskedArray(np.arange(1000.0), mask, shrink=False)
    expected, actual = pickled([one, one]), crossed([one, one])

    assert described(expected) == described(actual)
    assert actual[0] is actual[1]


def test_a_field_view_carries_only_its_own_bytes():
    table = np.zeros(1000, [("a", "i1"), ("b", "f8")])
    payload = oobpickle.dumps(table["b"])

    assert payload.sizes == [8000]
    assert described(pickled(table["b"])) == described(oobpickle.loads(payload))


def test_a_slice_carries_only_its_own_bytes():
    base = np.zeros((1000, 1000))
    payload = oobpickle.dumps([base[3], base[:, 3], base[:2, :2]])

    assert payload.sizes == [8000, 8000]
    assert payload.nbytes < 17_000


def test_arrays_are_aligned_for_any_instruction():
    arrays = crossed([np.zeros(n, dtype) for n in (100, 333, 5000) for dtype in ("u1", "f8", "G")])

    assert {a.ctypes.data % 64 for a in arrays if a.nbytes >= 512} == {0}
    assert all(a.flags.aligned for a in arrays)


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_read_only_arrays_arrive_writable(n):
    array = np.arange(n, dtype="f8")
    array.flags.writeable = False
    arrived = crossed({"a": array, "b": array[::2]})
    for value in arrived.values():
        value += 1

    assert arrived["a"][0] == 1.0
    assert not array.flags.writeable
    assert array[0] == 0.0


@pytest.mark.parametrize(
    "shape", [(0,), (0, 3), (3, 0), ()], ids=["0", "0 of 3", "3 of 0", "no dimension"]
)
def test_read_only_arrays_of_little_or_nothing_arrive_writable(shape):
    array = np.zeros(shape)
    array.flags.writeable = False

    assert crossed(array).flags.writeable


# --- independence


@pytest.mark.parametrize("layout", ["C", "F", "strided", "read-only"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_arrives_is_independent_of_what_was_sent(layout, shape):
    obj = LAYOUTS[layout](filled("f8", shape))
    before = obj.tobytes()
    payload = oobpickle.dumps(obj)
    first, second = oobpickle.loads(payload), oobpickle.loads(payload)
    first[...] = -1

    assert not np.shares_memory(first, obj)
    assert not np.shares_memory(first, second)
    assert second.tobytes() == before == obj.tobytes()


def test_what_arrives_from_bytes_is_independent_of_them():
    data = bytearray(oobpickle.dumps(np.arange(1000.0)).to_bytes())
    first, second = oobpickle.loads(data), oobpickle.loads(data)
    first[...] = -1

    assert not np.shares_memory(first, np.frombuffer(data, "u1"))
    assert second[5] == oobpickle.loads(data)[5] == 5.0


def test_given_buffers_are_shared_with_what_is_built_on_them():
    payload = oobpickle.dumps(np.arange(1000.0))
    memory = bytearray(8000)
    payload.write_into([memory])
    arrived = oobpickle.loads(payload, buffers=[memory])
    memory[:8] = np.float64(77).tobytes()

    assert arrived.ctypes.data == address_of(memory)
    assert arrived[0] == 77.0


@pytest.mark.parametrize(
    "buffers",
    [[], [bytearray(7999)], [bytearray(8001)], [bytearray(8000), b""], [None], ["x"], [8000]],
    ids=repr,
)
def test_buffers_that_do_not_fit_are_refused(buffers):
    payload = oobpickle.dumps(np.arange(1000.0))
    with pytest.raises(PayloadError):
        oobpickle.loads(payload, buffers=buffers)


def test_buffers_and_into_together_are_refused():
    payload = oobpickle.dumps(np.arange(1000.0))
    with pytest.raises(TypeError, match="not both"):
        oobpickle.loads(payload, buffers=[bytearray(8000)], into=np.zeros(1000))


# --- what is shared, and what is not


@pytest.mark.parametrize("n", [10, 1000])
def test_the_same_array_twice_stays_one_array(n):
    array = np.zeros(n)
    model = crossed(Model(a=array, b=[array, {"c": (array,)}]))

    assert model.a is model.b[0] is model.b[1]["c"][0]


def test_the_same_array_twice_is_sent_once():
    array = np.zeros(1000)

    assert oobpickle.dumps([array] * 5).sizes == [8000]


@pytest.mark.parametrize("n", [20, 1000, 20_000])
def test_views_do_not_become_aliases(n):
    array = np.arange(n, dtype="f8")
    views = [array, array[:], array[::2], array.reshape(2, -1), array[5:], array.view("i8")]
    arrived = crossed(views)
    pairs = [(i, j) for i in range(6) for j in range(i) if np.shares_memory(arrived[i], arrived[j])]

    assert pairs == []
    assert described(pickled(views)) == described(arrived)


@pytest.mark.parametrize("layout", [*LAYOUTS, "strided and transposed", "reversed and transposed"])
def test_overlapping_arrays_arrive_as_pickle_would_deliver_them_but_writable(layout):
    lay = LAYOUTS.get(layout, lambda a: a.T[:, ::2] if "strided" in layout else a.T[::-1])
    wrong = {}
    for name in ("f8", "str", "datetime64", "gap"):
        for size, shape in SHAPES.items():
            base = filled(samples.dtypes()[name], shape)
            views = [base[:], lay(base), base[:], lay(base[:])]
            expected = [described(samples.as_pickle_should(view)) for view in views]
            arrived = crossed(views)
            if expected != [described(array) for array in arrived]:
                wrong[name, size] = "value"
            if not all(array.flags.writeable for array in arrived):
                wrong[name, size] = "arrived read-only"

    assert wrong == {}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("threshold", [0, 1 << 40], ids=["out of band", "in band"])
@pytest.mark.parametrize("nbytes", [320, 960, 3_200])
def test_bytes_between_fields_arrive_as_they_are(nbytes, threshold, order):
    """Some take the checksum of an array's memory."""
    raw = np.arange(nbytes).astype("u1").view("V32").reshape((2, -1), order=order)
    array = raw.view(samples.dtypes()["gap"])
    arrived = oobpickle.loads(serialize(array, threshold))

    assert arrived.flags.owndata or nbytes > 320
    assert arrived.view("V32").tobytes("A") == raw.tobytes("A")


def test_bytes_between_fields_arrive_of_memory_handed_over_twice():
    raw = np.arange(3_200).astype("u1").view("V32")
    array = raw.view(samples.dtypes()["gap"])

    assert [one.view("V32").tobytes() for one in crossed([array, array[:]])] == 2 * [raw.tobytes()]


def test_memory_handed_over_twice_is_not_shared():
    memory = bytearray(1000)
    first, second = crossed([np.frombuffer(memory, "u1"), np.frombuffer(memory, "u1")])

    assert not np.shares_memory(first, second)


def test_cycles_survive():
    model = Model(weights=np.zeros(1000))
    model.me = model
    model.list = [model.weights, model]
    model.list.append(model.list)
    model.objects = np.array([model, None], object)

    assert described(pickled(model)) == described(crossed(model))


def test_singletons_stay_what_they_are():
    obj = [None, True, ..., NotImplemented, np.ma.masked, int, len, samples.Colour.RED]

    assert [id(item) for item in crossed(obj)] == [id(item) for item in obj]


# --- other buffers


def test_a_pickle_buffer_arrives_as_writable_memory():
    arrived = crossed(pickle.PickleBuffer(bytearray(b"abc" * 1000)))

    assert bytes(arrived) == b"abc" * 1000


def test_a_part_of_memory_carries_only_that_part():
    part = pickle.PickleBuffer(memoryview(bytearray(b"0123456789" * 100))[100:300])
    payload = oobpickle.dumps(part)

    assert payload.sizes == [200]
    assert bytes(oobpickle.loads(payload)) == b"0123456789" * 20


def test_pickle_buffers_of_several_axes_arrive_flat_as_pickle_delivers_them():
    for array in (filled("i4", (20, 30)), np.asfortranarray(filled("i4", (20, 30)))):
        buffers = []
        stream = pickle.dumps(pickle.PickleBuffer(array), 5, buffer_callback=buffers.append)
        expected = bytes(memoryview(pickle.loads(stream, buffers=[buffers[0].raw()])))

        assert expected == bytes(memoryview(crossed(pickle.PickleBuffer(array))))


@pytest.mark.parametrize(
    "obj",
    [
        bytes(range(256)) * 10,
        bytearray(range(256)) * 10,
        "text" * 1000,
        2**10000,
        {"a": [1.5, None, (2, {3})]},
        range(5),
        frozenset({1, 2}),
        slice(1, None, 2),
        1j,
        np.float64(1.5),
        np.datetime64(5, "ms"),
        np.dtype([("a", "f8")]),
        samples.Layer(1, 2, "three"),
        *(kind(a=1, b=kind(c=[2])) for kind in samples.FROZEN_DICTS),
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_objects_without_arrays_arrive_equal(obj):
    arrived = crossed(obj)

    assert type(arrived) is type(obj)
    assert arrived == obj


def test_random_generators_continue_where_they_were():
    generator = np.random.default_rng(3)
    arrived = crossed(generator)

    assert arrived.random(5).tolist() == generator.random(5).tolist()


# --- errors


class Refuses:
    def __reduce__(self):
        raise ZeroDivisionError("of the object")


class RefusesToLoad:
    def __reduce__(self):
        return (int, ("no number",))


@pytest.mark.parametrize(
    "obj",
    [
        Refuses(),
        lambda: None,
        threading.Lock(),
        memoryview(b"abc"),
        io.StringIO,
        (i for i in "abc"),
        pickle.PickleBuffer(np.zeros(1000)[::2]),
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_what_plain_pickle_refuses_is_refused_with_the_same_error(obj):
    def outcome(call):
        try:
            call()
        except Exception as error:
            return type(error), str(error)
        return None

    expected = outcome(lambda: pickle.dumps([np.zeros(1000), obj], 5))

    assert expected == outcome(lambda: oobpickle.dumps([np.zeros(1000), obj]))


def test_an_error_of_the_object_while_loading_is_not_wrapped():
    payload = oobpickle.dumps([np.zeros(1000), RefusesToLoad()])
    with pytest.raises(ValueError, match="no number") as caught:
        oobpickle.loads(payload)

    assert not isinstance(caught.value, oobpickle.OobPickleError)


def test_deep_nesting_fails_as_in_plain_pickle():
    obj = []
    for _ in range(100_000):
        obj = [obj]
    with pytest.raises(RecursionError):
        oobpickle.dumps(obj)


def test_threads_may_serialize_the_same_object_at_once():
    obj = {str(i): np.full(1000, i, "f8")[:: i % 2 + 1] for i in range(50)}
    expected = described(pickled(obj))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(described(crossed(obj)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [expected] * 8 == found
