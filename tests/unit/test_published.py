"""The handle of a broadcast object: what it refuses, how it is pickled, what it keeps."""

import contextlib
import copy
import gc
import pickle
import struct
import weakref

import numpy as np
import pytest

import oobpickle
from internals import inner
from oobpickle import _published
from oobpickle._memory import receiving
from oobpickle._native import core
from oobpickle._published import Broadcast, living


@pytest.fixture(params=["in the arena", "in memory"])
def handle(request):
    table = {"a": np.arange(100_000), "b": [np.ones(7), "text"], "c": np.arange(100_000)}
    with oobpickle.enabled() if request.param == "in the arena" else contextlib.nullcontext():
        handle = oobpickle.broadcast(table)
        yield handle
        handle.close()


def assert_is_the_table(found):
    assert (found["a"] == np.arange(100_000)).all()
    assert (found["b"][0] == np.ones(7)).all()
    assert found["b"][1] == "text"
    assert (found["c"] == np.arange(100_000)).all()


@pytest.mark.parametrize("publish", [oobpickle.broadcast, oobpickle.share])
def test_an_object_that_finds_room_only_in_the_end_is_whole(publish):
    """Pages of free blocks have to go first, and some of its arrays share a block."""
    sizes = ((1 << 20) + 100, 1000, 40_000_000)
    obj = [np.full(nbytes, i + 1, np.uint8) for i, nbytes in enumerate(sizes)]
    with oobpickle.enabled(capacity="64 MiB") as arena:
        oobpickle.broadcast(np.zeros(30_000_000, np.uint8)).close()
        with publish(obj) as handle, contextlib.ExitStack() as stack:
            shared = isinstance(handle, oobpickle.Shared)
            found = stack.enter_context(handle.reading()) if shared else handle.value
            for sent, arrived in zip(obj, found, strict=True):
                np.testing.assert_array_equal(sent, arrived)
            del found, arrived
            stack.close()
        assert not arena.statistics().n_fallbacks


REFUSED = {
    "attribute": lambda handle: handle.shape,
    "item": lambda handle: handle["a"],
    "call": lambda handle: handle(1),
    "length": len,
    "iteration": list,
    "membership": lambda handle: 1 in handle,
    "sum": lambda handle: handle + 1,
    "reflected sum": lambda handle: 1 + handle,
    "product with an array": lambda handle: np.ones(3) * handle,
    "ufunc": np.sin,
    "asarray": np.asarray,
    "comparison": lambda handle: handle < 3,
    "float": float,
    "negation": lambda handle: -handle,
    "setting an item": lambda handle: handle.__setitem__("a", 1),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_is_done_to_the_handle_says_where_the_object_is(handle, use):
    with pytest.raises(TypeError, match=r"value|Broadcast"):
        use(handle)


def test_it_has_no_private_attributes_that_others_look_for(handle):
    assert not hasattr(handle, "_repr_html_")
    assert not hasattr(handle, "__array_interface__")


def test_it_says_what_it_is(handle):
    assert "Broadcast of dict" in repr(handle)
    assert ".value" in repr(handle)
    assert handle.nbytes >= 1_600_000
    assert handle.readonly is False


def test_its_value_is_the_object_and_always_the_same(handle):
    assert_is_the_table(handle.value)
    assert handle.value is handle.value


def test_a_copy_of_it_is_itself(handle):
    assert copy.copy(handle) is handle
    assert copy.deepcopy([handle])[0] is handle


@pytest.mark.parametrize("protocol", range(6))
def test_any_pickler_takes_the_object_by_value(handle, protocol):
    found = pickle.loads(pickle.dumps([handle, handle], protocol))

    assert_is_the_table(found[0])
    assert found[0] is found[1]
    found[0]["a"][:] = 0
    assert_is_the_table(handle.value)


def test_the_serializer_takes_the_object_by_value(handle):
    payload = oobpickle.dumps({"table": handle})
    found = oobpickle.loads(payload)["table"]

    assert_is_the_table(found)
    found["a"][:] = 0
    assert_is_the_table(oobpickle.loads(payload.to_bytes())["table"])


def test_what_is_readonly_arrives_so():
    for enabled in (False, True):
        if enabled:
            with oobpickle.enabled():
                one = oobpickle.broadcast(np.arange(100_000), readonly=True)
        else:
            one = oobpickle.broadcast(np.arange(100_000), readonly=True)
        for found in (one.value, pickle.loads(pickle.dumps(one))):
            assert not found.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                found[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                found.flags.writeable = True


def test_later_changes_are_not_seen():
    array = np.arange(100_000)
    with oobpickle.enabled():
        one = oobpickle.broadcast(array)
        array[:] = 0
        assert (one.value == np.arange(100_000)).all()


def test_the_state_of_an_array_that_is_reduced_twice_is_the_one_of_its_time():
    scratch = np.zeros(100_000)

    class Part:
        def __init__(self, n):
            self.n = n

        def __reduce__(self):
            scratch[:] = self.n
            return list, ([scratch.copy() * 0 + scratch],)

    class Same:
        def __init__(self, n):
            self.n = n

        def __reduce__(self):
            scratch[:] = self.n
            return np.array, (np.frombuffer(scratch, float)[:],)

    for block in (oobpickle.enabled, contextlib.nullcontext):
        with block():
            found = oobpickle.broadcast([Same(1), Same(2), Part(3)]).value
        assert [found[0][0], found[1][0], found[2][0][0]] == [1, 2, 3]


def test_what_cannot_be_pickled_leaves_nothing():
    with oobpickle.enabled() as arena:
        with pytest.raises(TypeError):
            oobpickle.broadcast([np.ones(100_000), (i for i in ())])
        gc.collect()
        statistics = arena.statistics()
        assert statistics.n_published == 0
        assert not any(n for state, n in statistics.n_blocks.items() if state != "free")


def test_what_is_small_is_sent_with_each_message():
    with oobpickle.enabled() as arena:
        small = oobpickle.broadcast({"a": np.arange(100), "b": "text"})
        assert arena.statistics().n_published == 0
        assert small.value["b"] == "text"


def test_an_object_of_many_arrays_takes_few_blocks():
    with oobpickle.enabled() as arena:
        many = oobpickle.broadcast([np.full(1000, i) for i in range(5000)])
        assert arena.statistics().n_published <= 24
        assert arena.statistics().nbytes_resident < 1.3 * 40_000_000
        assert all((array == i).all() for i, array in enumerate(many.value))
        for i, array in enumerate(many.value):
            array[:] = -i
        found = pickle.loads(pickle.dumps(many))
        assert all((array == i).all() for i, array in enumerate(found))


def test_a_large_stream_is_stored_too():
    with oobpickle.enabled() as arena:
        words = oobpickle.broadcast({"words": [str(i) for i in range(50_000)], "a": np.ones(9000)})
        assert arena.statistics().n_published == 2
        assert words.value["words"][-1] == "49999"
        assert pickle.loads(pickle.dumps(words))["words"][-1] == "49999"


@pytest.mark.parametrize("obj", [None, 5, "text", [], b"x" * 300_000, bytearray(300_000)], ids=type)
def test_objects_without_arrays(obj):
    with oobpickle.enabled():
        assert oobpickle.broadcast(obj).value == obj
    assert pickle.loads(pickle.dumps(oobpickle.broadcast(obj))) == obj


def test_when_it_is_closed_it_says_so(handle):
    value = handle.value
    with handle as same:
        assert same is handle
    assert_is_the_table(value)
    for use in (lambda: handle.value, lambda: pickle.dumps(handle), handle.__enter__):
        with pytest.raises(ValueError, match="close"):
            use()
    handle.close()


def test_it_cannot_be_made_by_hand():
    with pytest.raises(TypeError, match="broadcast"):
        Broadcast()


def test_it_is_dropped_with_its_last_reference():
    handle = oobpickle.broadcast(np.ones(100_000))
    assert handle in living
    gone = weakref.ref(handle)
    del handle
    assert gone() is None


def test_its_pages_are_kept_for_the_next_one(monkeypatch):
    """Also by a process that never receives: fresh pages take four times as long as the copy."""
    monkeypatch.setattr(receiving, "_LEAST_KEPT_NBYTES", 1 << 20)
    with oobpickle.enabled() as arena:
        inner(arena).blocks.keep_nbytes = 1 << 20
        oobpickle.broadcast(np.ones(1 << 19)).close()
        assert arena.statistics().nbytes_published == 0
        assert inner(arena).blocks.resident >= 4 << 20


def test_the_core_is_not_needed(monkeypatch):
    monkeypatch.setattr(_published, "core", None)
    handle = oobpickle.broadcast({"a": np.arange(1000)})

    assert (handle.value["a"] == np.arange(1000)).all()
    assert (pickle.loads(pickle.dumps(handle))["a"] == np.arange(1000)).all()


def test_full_memory_is_counted():
    with pytest.warns(oobpickle.FallbackWarning), oobpickle.enabled(capacity=1 << 20) as arena:
        one = oobpickle.broadcast(np.ones(1 << 20))
        assert (one.value == 1).all()
        assert arena.statistics().fallbacks["full"].n_messages == 1


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("nbytes", [200_000, 10_000_000])
def test_a_handle_within_another_object_is_stored_with_it(readonly, nbytes):
    with oobpickle.enabled():
        frozen = oobpickle.broadcast(np.full(nbytes // 8, 1.0), readonly=True)
        free = oobpickle.broadcast(np.full(nbytes // 8, 2.0))
        part = frozen.value[1000:]
        outer = oobpickle.broadcast(
            {"frozen": frozen, "free": free, "part": part, "own": np.full(nbytes // 8, 3.0)},
            readonly=readonly,
        )
        frozen.close()
        free.close()
        del part
        found = outer.value
        sums = {name: array.sum() for name, array in found.items()}
        n = nbytes // 8
        assert sums == {"frozen": n, "free": 2 * n, "part": n - 1000, "own": 3 * n}
        assert not found["frozen"].flags.writeable
        for name in ("free", "part", "own"):
            assert found[name].flags.writeable is not readonly
            if not readonly:
                found[name][:] = 0
        assert found["frozen"].sum() == n
        outer.close()


def test_a_size_that_says_reference_without_an_offset_is_refused():
    marked = struct.pack("<2Q", 8, 1 << 63 | 8)
    with pytest.raises(ValueError, match="without its offset"):
        core.spread([memoryview(bytearray(8))], marked, False)
