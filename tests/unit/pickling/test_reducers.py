"""Reducers: how objects are taken apart, and which ones apply."""

import collections
import copyreg
import pickle
import sys
import types
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

import oobpickle
import samples
from oobpickle._pickling.reducers import (
    MIN_BUFFER_NBYTES,
    Sink,
    byte_bounds,
    has_reducer,
    in_memory_order,
)
from oobpickle._pickling.serializer import serialize
from samples import LAYOUTS, LoudSignal, Signal, described, pickled, reduce_signal


@pytest.fixture
def signal():
    """A signal of 1000 bytes, with its reducer registered."""
    oobpickle.register(Signal, reduce_signal)
    yield Signal(bytearray(range(250)) * 4)
    oobpickle.unregister(Signal)


# --- register


def test_a_registered_reducer_sends_its_buffer_out_of_band_uncopied(signal):
    payload = oobpickle.dumps([signal])

    assert payload.sizes == [1000]
    assert samples.address_of(payload.buffers[0]) == samples.address_of(signal.samples)
    assert bytes(signal.samples[:50]) not in payload.stream


def test_the_rebuilder_receives_writable_memory(signal):
    arrived = oobpickle.loads(oobpickle.dumps(signal))
    memoryview(arrived.samples)[0] = 77

    assert type(arrived) is Signal
    assert memoryview(arrived.samples)[0] == 77
    assert bytes(memoryview(arrived.samples)[1:]) == bytes(signal.samples[1:])
    assert signal.samples[0] == 0


def test_the_rebuilder_receives_read_only_memory_from_read_only_memory(signal):
    signal.samples = bytes(signal.samples)
    arrived = oobpickle.loads(oobpickle.dumps(signal))

    assert bytes(arrived.samples) == signal.samples
    assert memoryview(arrived.samples).readonly


def test_a_registered_reducer_is_for_exactly_its_class(signal):
    with pytest.raises(pickle.PicklingError, match="only the registered"):
        oobpickle.dumps(LoudSignal(signal.samples))


def test_unregister_brings_back_what_was(signal):
    oobpickle.unregister(Signal)
    with pytest.raises(pickle.PicklingError, match="only the registered"):
        oobpickle.dumps(signal)


def test_unregister_of_an_unknown_class_is_no_error():
    oobpickle.unregister(Signal)
    oobpickle.unregister(Signal)


def test_it_is_known_which_classes_are_registered(signal):

    assert has_reducer(Signal)
    assert not has_reducer(LoudSignal)
    oobpickle.unregister(Signal)
    assert not has_reducer(Signal)


def test_the_last_registration_counts(signal):
    oobpickle.register(Signal, lambda signal: (str, ("another",)))

    assert oobpickle.loads(oobpickle.dumps(signal)) == "another"


@pytest.mark.parametrize(
    ("cls", "reducer", "text"),
    [("Signal", reduce_signal, "'Signal'"), (Signal, "reduce", "Signal"), (Signal, None, "None")],
)
def test_register_refuses_what_is_no_class_or_not_callable(cls, reducer, text):
    with pytest.raises(TypeError, match=text):
        oobpickle.register(cls, reducer)
    with pytest.raises(pickle.PicklingError):
        oobpickle.dumps(Signal(b""))


def test_a_registered_reducer_for_arrays_replaces_ours():
    oobpickle.register(np.ndarray, lambda array: (list, (array.tolist(),)))
    try:
        payload = oobpickle.dumps(np.arange(1000))
    finally:
        oobpickle.unregister(np.ndarray)

    assert payload.sizes == []
    assert oobpickle.loads(payload) == list(range(1000))


def test_register_leaves_plain_pickle_and_multiprocessing_alone(signal):

    assert Signal not in copyreg.dispatch_table
    assert Signal not in ForkingPickler._extra_reducers


# --- which reducer applies


@pytest.fixture
def tables(monkeypatch):
    """The reducers of copyreg and of ForkingPickler, restored in the end."""
    monkeypatch.setattr(copyreg, "dispatch_table", dict(copyreg.dispatch_table))
    monkeypatch.setattr(ForkingPickler, "_extra_reducers", dict(ForkingPickler._extra_reducers))
    return copyreg.dispatch_table, ForkingPickler._extra_reducers


def as_text(text):
    return lambda obj: (str, (text,))


def test_reducers_of_copyreg_apply(tables):
    copyreg.pickle(Signal, as_text("copyreg"))

    assert oobpickle.loads(oobpickle.dumps(Signal(b""))) == "copyreg"


def test_reducers_of_forking_pickler_apply_and_win_over_copyreg(tables):
    copyreg.pickle(Signal, as_text("copyreg"))
    ForkingPickler.register(Signal, as_text("forking"))
    payload = serialize(Signal(b""), 0, ForkingPickler._extra_reducers)

    assert oobpickle.loads(payload) == "forking"


def test_our_registered_reducers_win_over_all(tables, signal):
    copyreg.pickle(Signal, as_text("copyreg"))
    ForkingPickler.register(Signal, as_text("forking"))
    payload = serialize(signal, 0, ForkingPickler._extra_reducers)

    assert type(oobpickle.loads(payload)) is Signal


def test_reducers_of_forking_pickler_may_send_buffers(tables):
    ForkingPickler.register(Signal, reduce_signal)
    payload = serialize(Signal(bytearray(b"abc" * 300)), 0, ForkingPickler._extra_reducers)

    assert payload.sizes == [900]
    assert bytes(oobpickle.loads(payload).samples) == b"abc" * 300


def test_a_reducer_for_arrays_given_to_forking_pickler_replaces_ours(tables):
    ForkingPickler.register(np.ndarray, as_text("an array"))
    payload = serialize(np.arange(1000), 0, ForkingPickler._extra_reducers)

    assert oobpickle.loads(payload) == "an array"


def test_merging_tables_changes_none_of_them(tables, signal):
    before = [dict(table) for table in tables]
    assert Sink(0, tables[1]).table[Signal]

    assert before == [dict(table) for table in tables]


def test_numpy_is_not_imported_for_objects_without_arrays(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    table = Sink(0).table
    assert table[Signal]

    assert "numpy" not in sys.modules
    assert not any(cls.__module__ == "numpy" for cls in table)


def test_while_another_thread_imports_numpy_objects_can_be_sent(monkeypatch):
    """A feeder thread sends when it likes; what it cannot pickle is lost."""
    obj = [types.SimpleNamespace(a=1), collections.OrderedDict(b=2)]
    monkeypatch.setitem(sys.modules, "numpy", types.ModuleType("numpy"))  # it has nothing yet

    assert obj == oobpickle.loads(serialize(obj, 1 << 16))


# --- the sink


def test_nothing_leaves_the_stream_below_the_threshold():
    payload = serialize([np.zeros(100), np.zeros(100)], 1601)

    assert payload.sizes == []
    assert len(payload.stream) > 1600


def test_what_reaches_the_threshold_leaves_the_stream():
    payload = serialize([np.zeros(100), np.zeros(100), np.zeros(100)], 1600)

    assert payload.sizes == [800, 800]


def test_small_buffers_stay_in_the_stream():
    at = MIN_BUFFER_NBYTES
    payload = oobpickle.dumps([np.zeros(at - 1, "u1"), np.zeros(at, "u1"), np.zeros(at + 1, "u1")])

    assert payload.sizes == [at, at + 1]


@pytest.mark.parametrize("threshold", [0, 1000, 1 << 40])
def test_a_reducer_runs_once_for_each_object(threshold):
    calls = []
    oobpickle.register(Signal, lambda signal: calls.append(signal) or reduce_signal(signal))
    signals = [Signal(bytearray(900)) for _ in range(4)]
    try:
        arrived = oobpickle.loads(serialize(signals + signals, threshold))
    finally:
        oobpickle.unregister(Signal)

    assert calls == signals
    assert [id(signal) for signal in arrived[:4]] == [id(signal) for signal in arrived[4:]]


def test_the_order_of_buffers_is_the_order_of_the_stream(signal):
    arrays = [np.full(100 + i, i, "f8") for i in range(5)]
    payload = oobpickle.dumps([arrays[0], signal, *arrays[1:]])

    assert payload.sizes == [800, 1000, 808, 816, 824, 832]
    assert [type(item) for item in oobpickle.loads(payload)].count(Signal) == 1
    assert oobpickle.loads(payload)[3][0] == 2.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_are_rebuilt_by_numpy_alone(layout):
    for shape in samples.SHAPES.values():
        payload = oobpickle.dumps(LAYOUTS[layout](samples.filled("f8", shape)))

        assert b"oobpickle" not in payload.stream


# --- memory order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_sent_is_that_of_the_memory_where_it_has_no_gaps(layout):
    array = LAYOUTS[layout](samples.filled("f8", samples.SHAPES["medium"]))
    ordered = in_memory_order(array)
    rebuilt = pickled(array)

    assert np.shares_memory(ordered, array) or array.size == 0
    assert sorted(ordered.shape) == sorted(array.shape)
    assert ordered.tobytes() == in_memory_order(rebuilt).tobytes()


def test_an_array_with_gaps_is_sent_in_c_order():
    array = samples.filled("f8", (6, 8))[::2, ::2].T

    assert in_memory_order(array) is array
    assert described(oobpickle.loads(oobpickle.dumps(array))) == described(pickled(array))


# --- what a payload refers to


def held(array):
    return pickle.PickleBuffer(array)


BASE = np.zeros((100, 100))
MEMORY = bytearray(100_000)
APART = {
    "two arrays": [np.zeros(1000), np.zeros(1000)],
    "neighbours": [BASE[:50], BASE[50:]],
    "neighbours, reversed": [BASE[:50], BASE[:49:-1]],
    "neighbours, transposed": [BASE[:50].T, BASE[50:].T],
    "parts of one memory": [held(memoryview(MEMORY)[:5000]), held(memoryview(MEMORY)[5000:])],
    "one alone": [BASE],
    "a buffer and an array over it": [held(MEMORY), np.frombuffer(MEMORY, "f8")],
}


def addresses(payload):
    return [byte_bounds(buffer)[0] for buffer in payload.buffers]


@pytest.mark.parametrize("name", APART)
def test_nothing_is_copied_before_it_is_written(name):
    things = APART[name]

    assert [byte_bounds(thing)[0] for thing in things] == addresses(serialize(things, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bounds_are_the_first_and_the_last_byte(layout):
    array = LAYOUTS[layout](samples.filled("f8", (6, 5, 4)))
    low, high = byte_bounds(array)
    cells = [
        array[(..., *(slice(i, i + 1) for i in index))].ctypes.data
        for index in np.ndindex(array.shape)
    ]

    assert (low, high) == (
        (min(cells), max(cells) + 8) if array.size else (array.ctypes.data, array.ctypes.data)
    )


def test_bounds_of_a_buffer_are_its_own():
    at = samples.address_of(MEMORY)

    assert byte_bounds(held(memoryview(MEMORY)[10:30])) == (at + 10, at + 30)
