"""What share() returns, in one process."""

import copy
import dataclasses
import gc
import multiprocessing
import pickle
import threading

import numpy as np
import pytest

import oobpickle
from conftest import eventually
from oobpickle._hook import installed
from oobpickle.testing import check_roundtrip


@dataclasses.dataclass
class Book:
    prices: np.ndarray
    counts: np.ndarray
    name: str = "a"
    n: int = 0


def book():
    return Book(np.arange(1000.0), np.zeros(1, int))


@pytest.fixture
def block():
    with oobpickle.enabled(capacity=64 << 20) as arena:
        yield arena


@pytest.fixture
def shared(block):
    with oobpickle.share(book()) as shared:
        yield shared


# --- the object


def test_arrays_of_any_size_are_one_memory(shared):
    with shared.writing() as mine:
        mine.prices[3] = 7
        mine.counts[0] = 8
    with shared.reading() as seen:
        assert (seen.prices[3], seen.counts[0]) == (7, 8)
        assert np.shares_memory(seen.prices, mine.prices)
    assert shared.unlocked is mine
    assert type(seen) is Book
    assert seen.name == "a"


def test_reading_refuses_to_write(shared):
    with shared.reading() as seen:
        with pytest.raises(ValueError, match="read-only"):
            seen.counts[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            seen.prices[3:].fill(0)


def test_what_was_shared_stays_what_it_is(block):
    array = np.zeros(1000)
    with oobpickle.share(array) as shared:
        array[0] = 1
        with shared.reading() as seen:
            assert seen[0] == 0


def test_nothing_else_may_be_changed(shared):
    text = r"^\$\.n was changed. Only the memory of arrays is shared"
    with pytest.raises(oobpickle.SharedStructureError, match=text), shared.writing() as mine:
        mine.n += 1
        mine.counts[0] = 5

    assert mine.n == 1
    assert shared.unlocked is not mine
    assert (shared.unlocked.n, shared.unlocked.counts[0]) == (0, 5)
    with shared.writing() as mine:
        mine.counts[0] += 1
    with shared.reading() as seen:
        assert seen.counts[0] == 6


def test_an_error_within_is_not_covered_by_that_of_the_structure(shared):
    with pytest.raises(KeyError, match="mine") as caught, shared.writing() as mine:
        mine.n = 2
        raise KeyError("mine")

    assert "oobpickle: $.n was changed" in caught.value.__notes__[0]
    assert shared.unlocked.n == 0
    assert shared.version == 1


def test_the_version_counts_what_was_written(shared):
    assert shared.version == 0
    with shared.writing(), shared.writing():
        pass
    with shared.reading():
        pass
    assert shared.version == 1
    assert shared.wait(0) == 1
    with pytest.raises(TimeoutError, match=r"no writing\(\) .* within 0.01 s, after 1"):
        shared.wait(1, timeout=0.01)
    with shared.writing(), pytest.raises(RuntimeError, match="this thread has the lock"):
        shared.wait(1)


def test_waiting_in_another_thread(shared):
    found = []
    thread = threading.Thread(target=lambda: found.append(shared.wait(0, timeout=20)))
    thread.start()
    with shared.writing():
        pass
    thread.join()

    assert found == [1]


def test_who_is_late_hears_who_has_it(shared):
    errors = []

    def enter():
        try:
            with shared.reading(timeout=0.02):
                pass
        except TimeoutError as error:
            errors.append(str(error))

    with shared.writing():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    expected = f"not free within 0.02 s: process {multiprocessing.current_process().pid} has it"
    assert expected in errors[0]


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_is_from_0_on(shared, timeout):
    for use in (shared.writing, shared.reading, lambda timeout: shared.wait(0, timeout)):
        with pytest.raises(ValueError, match="expected seconds from 0 on, or None"):
            use(timeout)


# --- what can be shared


def example(name):
    rng = np.random.default_rng(1)
    return {
        "array": rng.random(3000),
        "zero dimensions": {"a": np.array(5.0)},
        "fortran": {"a": np.asfortranarray(rng.random((30, 40)))},
        "axes": {"a": rng.random((3, 4, 5)).transpose(1, 0, 2)},
        "strides": {"a": rng.random(3000)[::3]},
        "backwards": {"a": np.arange(3000)[::-1]},
        "records": {"a": np.zeros(100, [("x", "i1"), ("y", "f8")])},
        "gaps": {"a": np.zeros(9, np.dtype([("x", "i1"), ("y", "f8")], align=True))},
        "dates": {"a": np.arange("2020-01", "2030-01", dtype="datetime64[D]")},
        "big endian": {"a": np.arange(3000, dtype=">i4")},
        "long double": {"a": np.arange(300, dtype=np.longdouble)},
        "strings": {"a": np.array(["a", "bcd"])},
        "read-only": {"a": np.broadcast_to(np.arange(300), (3, 300))},
        "many": [np.full(n, n) for n in (1, 10, 100, 1000, 10_000, 100_000)],
    }[name]


KINDS = """array, zero dimensions, fortran, axes, strides, backwards, records, gaps, dates,
big endian, long double, strings, read-only, many"""


def arrays_of(obj):
    values = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, list) else [obj]
    return list(values)


@pytest.mark.parametrize("name", KINDS.replace("\n", " ").split(", "))
def test_arrays_of_every_kind(block, name):
    obj = example(name.strip())
    with oobpickle.share(obj) as shared:
        for before, mine in zip(arrays_of(obj), arrays_of(shared.unlocked), strict=True):
            assert (before.dtype, before.shape) == (mine.dtype, mine.shape)
            assert mine.flags.writeable
            assert np.array_equal(before, mine)
        with shared.writing() as mine, shared.reading() as seen:
            for one, other in zip(arrays_of(mine), arrays_of(seen), strict=True):
                assert np.shares_memory(one, other)
                one[...] = np.zeros((), one.dtype)
                assert np.array_equal(one, other)


def test_the_same_array_twice_is_one(block):
    array = np.zeros(10)
    with oobpickle.share([array, array]) as shared:
        assert shared.unlocked[0] is shared.unlocked[1]


@pytest.mark.parametrize("kind", [np.matrix, np.recarray])
def test_subclasses(block, kind):
    array = np.zeros((100, 3)).view(kind)
    with oobpickle.share({"a": array}) as shared, shared.writing() as mine:
        assert type(mine["a"]) is kind
        mine["a"][:] = 3
        with shared.reading() as seen:
            assert (seen["a"] == 3).all()


@pytest.mark.parametrize("n", [10, 1000, 1_000_000])
def test_masked_arrays_are_structure_however_large(block, n):
    array = np.ma.masked_less(np.arange(n), 10)
    with pytest.raises(TypeError, match="this MaskedArray has none"):
        oobpickle.share(array)
    with oobpickle.share({"m": array, "a": np.zeros(1)}) as shared:
        with shared.writing() as mine:
            mine["a"][0] = 1
        text = r"\$\['m'\].* is not shared"
        with pytest.raises(oobpickle.SharedStructureError, match=text), shared.writing() as mine:
            mine["m"].data[0] = 5


def test_frames_of_numbers(block):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(1000.0), "b": np.arange(1000.0), "n": range(1000)})
    with oobpickle.share(frame) as shared:
        with shared.writing() as mine:
            mine.loc[3, "a"] = 7
            mine.iloc[:, 2] = 5
        with shared.reading() as seen:
            assert seen.loc[3, "a"] == 7
            assert (seen["n"] == 5).all()
        with pytest.raises(oobpickle.SharedStructureError), shared.writing() as mine:
            mine["a"] = mine["a"] + 1
        with pytest.raises(oobpickle.SharedStructureError), shared.writing() as mine:
            mine["new"] = 1.0
        assert list(shared.unlocked.columns) == ["a", "b", "n"]
        assert shared.unlocked.loc[3, "a"] == 7


@pytest.mark.parametrize(
    "obj", [5, "text", [1, 2], b"x" * 100_000, bytearray(100_000), np.empty(0), {"o": [None]}]
)
def test_something_without_arrays_is_refused(block, obj):
    with pytest.raises(TypeError, match=r"share.. takes an object with NumPy arrays in it"):
        oobpickle.share(obj)
    gc.collect()
    assert block.statistics().n_references == 0


def test_arrays_of_objects_are_structure(block):
    with pytest.raises(TypeError, match="this ndarray has none"):
        oobpickle.share(np.array([None, 1], object))
    shared = oobpickle.share({"o": np.array([None, 1], object), "a": np.zeros(3)})
    text = r"\$\['o'\]\[0\]"
    with pytest.raises(oobpickle.SharedStructureError, match=text), shared.writing() as mine:
        mine["o"][0] = 5


def test_outside_of_a_block():
    with pytest.raises(oobpickle.ArenaError, match=r"call it within `with oobpickle.enabled"):
        oobpickle.share(np.zeros(3))


def test_without_room(block):
    with pytest.raises(oobpickle.ArenaFullError):
        oobpickle.share(np.zeros(20 << 20))
    assert block.statistics().n_references == 0


def test_an_object_that_cannot_be_pickled(block):
    with pytest.raises(TypeError, match="pickle"):
        oobpickle.share({"a": np.zeros(1000), "lock": threading.Lock()})


# --- the memory


def test_it_counts_and_comes_back(block):
    before = block.statistics()
    shared = oobpickle.share({"a": np.zeros(1 << 17), "b": np.zeros(3)})
    during = block.statistics()

    assert during.nbytes_published - before.nbytes_published >= 1 << 20
    assert during.n_references > 0
    assert shared.nbytes >= (1 << 20) + 24
    shared.close()
    assert block.statistics().n_references == 0
    assert block.statistics().nbytes_published == 0


def test_arrays_that_were_taken_out_keep_it(block):
    shared = oobpickle.share(np.arange(1000.0))
    array = shared.unlocked
    shared.close()
    array[0] = 5

    assert array[0] == 5
    assert block.statistics().n_references > 0
    del array
    assert block.statistics().n_references == 0


def test_a_closed_handle_is_of_no_use(shared):
    shared.close()
    shared.close()

    assert "closed" in repr(shared)
    for use in (
        shared.writing,
        shared.reading,
        shared.__enter__,
        lambda: shared.unlocked,
        lambda: shared.version,
        lambda: shared.owner_died,
        lambda: shared.wait(0),
        lambda: pickle.dumps(shared),
    ):
        with pytest.raises(ValueError, match="close"):
            use()


def test_closing_within_a_turn(shared):
    with shared.writing() as mine:
        shared.close()
        mine.counts[0] = 1


def test_a_handle_outlives_its_block():
    with oobpickle.enabled():
        shared = oobpickle.share(book())
    with shared.writing(timeout=5) as mine:
        mine.counts[0] = 3
    with shared.reading(timeout=5) as seen:
        assert seen.counts[0] == 3
    assert shared.version == 1
    with pytest.raises(TypeError, match="has ended"):
        pickle.dumps(shared)
    with oobpickle.enabled(), pytest.raises(TypeError, match="has ended"):
        send(shared)
    array = mine.prices
    shared.close()
    del mine, seen, shared
    array[:] = 1
    assert array.sum() == 1000


# --- sending


def send(obj):
    read, write = multiprocessing.Pipe(duplex=False)
    with read, write:
        write.send(obj)
        return read.recv()


def test_a_message_brings_the_handle_of_the_same_memory(shared):
    arrived = send({"deep": [shared]})["deep"][0]

    assert type(arrived) is oobpickle.Shared
    with arrived.writing() as mine:
        mine.counts[0] = 9
    with shared.reading() as seen:
        assert seen.counts[0] == 9
    with arrived.writing(), shared.writing():  # one lock
        pass
    assert (arrived.version, arrived.nbytes) == (2, shared.nbytes)


def test_an_array_that_is_sent_alone_is_a_copy(shared):
    prices, counts = send([shared.unlocked.prices, shared.unlocked.counts])
    prices[0] = counts[0] = 77

    with shared.reading() as seen:
        assert (seen.prices[0], seen.counts[0]) == (0, 0)


def test_a_copy_is_the_handle(shared):
    assert copy.copy(shared) is shared
    assert copy.deepcopy([shared])[0] is shared


PICKLERS = {
    "pickle": pickle.dumps,
    "dumps": oobpickle.dumps,
    "broadcast": oobpickle.broadcast,
    "share": oobpickle.share,
    "ForkingPickler": lambda obj: multiprocessing.reduction.ForkingPickler.dumps(obj),
    "check_roundtrip": check_roundtrip,
    "share in": lambda obj: oobpickle.share([obj, np.zeros(3)]),
}


@pytest.mark.parametrize("name", PICKLERS)
def test_other_picklers_refuse_it(shared, block, name):
    before = block.statistics().n_references
    with pytest.raises(TypeError, match=r"what share.. returned") as caught:
        PICKLERS[name]([shared])
    del caught
    gc.collect()

    assert eventually(lambda: block.statistics().n_references == before)


def test_a_message_that_cannot_go_through_the_arena_is_refused(monkeypatch):
    """In-band there is no way."""
    with pytest.warns(oobpickle.FallbackWarning, match="has not joined"), oobpickle.enabled():
        shared = oobpickle.share(book())
        with monkeypatch.context() as patch:
            patch.setattr(installed.current.channels, "known", lambda fd: 0)
            with pytest.raises(TypeError, match="its receiver has not joined"):
                send([shared, np.zeros(100_000)])
        assert type(send([shared, np.zeros(100_000)])[0]) is oobpickle.Shared


def test_it_is_no_part_of_a_size_that_is_prepared(block, shared):
    block.preallocate(like=[shared, np.zeros(100_000)])


def test_handles_are_made_by_share():
    with pytest.raises(TypeError, match=r"oobpickle\.share"):
        oobpickle.Shared()


def test_its_representation_has_no_content(shared):
    assert repr(shared) == f"<oobpickle.Shared of Book: {shared.nbytes} bytes>"
