"""What is replaced in joblib and loky, and what their reducers still do."""

import copyreg
import io
import multiprocessing
import os
import pickle
import sys
from types import SimpleNamespace

import joblib.externals.loky.backend.process
import joblib.externals.loky.process_executor
import joblib.pool
import loky.backend.process
import numpy as np
import pytest
from cloudpickle import CloudPickler
from joblib import _memmapping_reducer as memmapping
from joblib.externals.loky import reusable_executor
from joblib.externals.loky.backend import queues, reduction

import oobpickle
from kernel import needs_kernel
from oobpickle._hook import installed
from oobpickle._hook import loky as hooks

NBYTES = 1 << 20
NAME = "_executor"


@pytest.fixture
def pipe():
    with oobpickle.enabled() as arena:
        reader, writer = multiprocessing.Pipe(duplex=False)
        with reader, writer:
            yield arena, reader, writer


def sent(writer, obj, reducers=None):
    """Send as loky's queue does, from a frame that has the same names."""
    send_bytes = writer.send_bytes
    send_bytes(queues.dumps(obj, reducers=reducers))


def reducers_of(kind, folder, max_nbytes=None):
    forward, backward = memmapping.get_memmapping_reducers(
        temp_folder_resolver=lambda: str(folder), max_nbytes=max_nbytes, mmap_mode="r"
    )
    return forward if kind == "argument" else backward


def test_each_loky_and_the_pool_of_joblib_are_served():
    names = sorted({(owner.__name__, name) for owner, name, _ in hooks.replacements()})
    expected = [
        ("joblib.pool", "BytesIO"),
        ("joblib.pool", "CustomizablePickler"),
        ("LokyProcess", "_Popen"),
        ("_ReusablePoolExecutor", "get_reusable_executor"),
    ]
    for package in ("joblib.externals.loky", "loky"):
        expected += [
            (f"{package}.backend._posix_reduction", "DupFd"),
            (f"{package}.backend.queues", "dumps"),
            (f"{package}.backend.reduction", "dump"),
        ]
    assert set(expected) <= set(names)
    assert loky.backend.process.LokyProcess is not joblib.externals.loky.backend.process.LokyProcess


def test_what_is_replaced_is_restored():
    before = [vars(owner)[name] for owner, name, _ in hooks.replacements()]
    with oobpickle.enabled():
        inside = [vars(owner)[name] for owner, name, _ in hooks.replacements()]
        assert not set(map(id, before)) & set(map(id, inside))
    after = [vars(owner)[name] for owner, name, _ in hooks.replacements()]
    assert list(map(id, before)) == list(map(id, after))


@pytest.mark.parametrize("missing", ["backend.queues", "process_executor", "reusable_executor"])
def test_a_release_without_a_place_is_left_alone(missing, monkeypatch):
    name = f"joblib.externals.loky.{missing}"
    n_before = len(hooks.replacements())
    monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    assert len(hooks.replacements()) < n_before
    with oobpickle.enabled():
        assert installed.current is not None


@pytest.mark.parametrize("kind", ["argument", "result"])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(NBYTES // 8),
        np.asfortranarray(np.ones((300, 500))),
        np.ones((300, 1000))[:, ::2],
        np.arange(10.0),
        np.array(3.5),
        np.array(["a", None, 3], object),
        np.zeros(NBYTES // 8, "M8[s]"),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_arrays_arrive_as_joblib_delivers_them(pipe, kind, array, tmp_path):
    _, reader, writer = pipe
    reducers = reducers_of(kind, tmp_path)
    plain = pickle.loads(reduction.dumps(array, reducers=reducers))
    sent(writer, {"array": array, "again": array}, reducers)
    found = reader.recv()

    np.testing.assert_array_equal(plain, found["array"])
    assert found["array"] is found["again"]
    assert (plain.dtype, plain.flags.writeable) == (found["array"].dtype, True)
    assert type(found["array"]) is type(plain) is np.ndarray


def test_a_large_argument_goes_into_a_file_of_joblibs(pipe, tmp_path):
    arena, reader, writer = pipe
    array = np.arange(NBYTES // 8)
    sent(writer, array, reducers_of("argument", tmp_path, max_nbytes=1000))
    found = reader.recv()
    assert type(found) is np.memmap
    np.testing.assert_array_equal(array, found)
    assert arena.statistics().n_messages_out_of_band == 0


def test_a_result_in_a_file_of_the_users_is_mapped_again(pipe, tmp_path):
    _, reader, writer = pipe
    own = np.memmap(tmp_path / "own", np.float64, "w+", shape=NBYTES // 8)
    own[:] = 3.0
    sent(writer, own[10:], reducers_of("result", tmp_path))
    found = reader.recv()
    assert type(found) is np.memmap
    assert found.filename == own.filename
    np.testing.assert_array_equal(own[10:], found)


def test_a_result_in_a_file_of_joblibs_goes_by_value(pipe, tmp_path, monkeypatch):
    arena, reader, writer = pipe
    its = np.memmap(tmp_path / "its", np.float64, "w+", shape=NBYTES // 8)
    its[:] = 4.0
    monkeypatch.setattr(memmapping, "JOBLIB_MMAPS", {its.filename})
    sent(writer, its, reducers_of("result", tmp_path))
    found = reader.recv()
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(its, found)
    assert arena.statistics().n_messages_out_of_band == 1


def test_functions_go_as_loky_sends_them(pipe):
    _, reader, writer = pipe
    offset = np.arange(NBYTES // 8)
    sent(writer, lambda number: offset + number)
    np.testing.assert_array_equal(offset + 2, reader.recv()(2))


@pytest.mark.parametrize("kind", ["argument", "result", "loky"])
@pytest.mark.parametrize("n", [10, NBYTES])
def test_arrays_that_are_read_only_arrive_so(pipe, kind, n, tmp_path):
    """Their pickler keeps the flag, that of multiprocessing's protocol does not."""
    _, reader, writer = pipe
    array = np.ones(n)
    array.flags.writeable = False
    sent(writer, [array, np.ones(n)], None if kind == "loky" else reducers_of(kind, tmp_path))
    found, other = reader.recv()
    np.testing.assert_array_equal(array, found)
    assert (found.flags.writeable, other.flags.writeable) == (False, True)


def test_empty_arrays_have_the_strides_that_they_have_without_us(pipe):
    _, reader, writer = pipe
    array = np.empty((0, 7))
    sent(writer, [array, np.ones(NBYTES)])
    assert reader.recv()[0].strides == pickle.loads(reduction.dumps(array)).strides


def _mine(number):
    return str, ("mine",)


class OwnTable(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table.copy()
    dispatch_table[complex] = _mine


class OwnArguments(pickle.Pickler):
    def __init__(self, file, protocol=None):
        super().__init__(file, protocol)


class OwnLevels(CloudPickler):
    dispatch_table = CloudPickler.dispatch_table.new_child({complex: _mine})


@pytest.mark.parametrize("kind", [OwnTable, OwnArguments, OwnLevels])
def test_picklers_of_the_users_own_are_left_alone(pipe, kind, monkeypatch):
    _, reader, writer = pipe
    module = SimpleNamespace(Pickler=kind)
    monkeypatch.setitem(sys.modules, "pickler_of_a_user", module)
    reduction.set_loky_pickler("pickler_of_a_user")
    try:
        plain = pickle.loads(reduction.dumps([1j, abs]))
        sent(writer, [1j, abs])
    finally:
        reduction.set_loky_pickler()
    assert reader.recv() == plain


@pytest.mark.parametrize("name", ["pickle", "cloudpickle"])
def test_both_picklers_that_loky_has_are_served(pipe, name):
    arena, reader, writer = pipe
    reduction.set_loky_pickler(name)
    try:
        sent(writer, [np.arange(NBYTES), abs])
    finally:
        reduction.set_loky_pickler()
    assert reader.recv()[1] is abs
    assert arena.statistics().n_messages_out_of_band == 1


def test_what_cannot_be_pickled_raises_and_leaves_nothing(pipe):
    arena, _, writer = pipe
    with pytest.raises((TypeError, pickle.PicklingError)):
        sent(writer, [np.arange(NBYTES), io.TextIOWrapper(io.BytesIO())])
    assert arena.statistics().n_blocks["leased"] == 0


def test_a_pickler_that_is_not_in_c_is_left_alone(pipe, monkeypatch):
    arena, reader, writer = pipe

    class Slow(pickle._Pickler):
        def __init__(self, file, reducers=None, protocol=None):
            super().__init__(file, protocol)

    monkeypatch.setattr(reduction, "_LokyPickler", Slow)
    send_bytes = writer.send_bytes
    send_bytes(queues.dumps({"a": 1}))
    assert reader.recv() == {"a": 1}
    assert arena.statistics().n_messages_out_of_band == 0


def test_no_cycle_keeps_what_was_sent(pipe, tmp_path):
    arena, reader, writer = pipe
    before = sys.getrefcount(np.ndarray)
    for _ in range(20):
        sent(writer, np.arange(NBYTES // 8), reducers_of("argument", tmp_path))
        reader.recv()
    assert arena.statistics().n_blocks["held"] == 0
    assert sys.getrefcount(np.ndarray) < before + 15


@needs_kernel("populate")
def test_shared_pages_are_not_counted_as_memory_of_a_worker(tmp_path):
    measured = hooks.hooked_memory_usage(lambda pid, force_gc=False: 1 << 40)
    assert measured(os.getpid()) == 1 << 40
    with oobpickle.enabled() as arena:
        shared = 1 << 24
        arena.preallocate(nbytes=shared)
        before = measured(os.getpid(), force_gc=True)
        assert before <= (1 << 40) - shared
        oobpickle.dump(np.ones(shared, np.uint8), tmp_path / "file")
        loaded = oobpickle.load(tmp_path / "file", "r")
        assert loaded.sum() == shared
        assert measured(os.getpid()) <= before - shared // 2  # what else there is comes and goes
    assert measured(os.getpid()) == 1 << 40


@pytest.mark.parametrize("is_for_each_thread", [True, False])
def test_an_executor_is_made_anew_for_each_arena(monkeypatch, is_for_each_thread):
    """If it is idle; the end of one that is in use would be waited for, perhaps for ever."""
    storage = SimpleNamespace(executor=None)
    reuses = []

    class Reusable:
        @classmethod
        def get_reusable_executor(cls, n, reuse="auto"):
            reuses.append(reuse)
            place, name = (vars(storage), "executor") if is_for_each_thread else (globals(), NAME)
            if place.get(name) is None or reuse is False:
                place[name] = SimpleNamespace(_pending_work_items={})
            return place[name], True

    class Joblibs(Reusable):
        """Says each time that it is to be used again, and all arguments."""

    original = vars(Reusable)["get_reusable_executor"]
    monkeypatch.setitem(globals(), NAME, None)
    if is_for_each_thread:
        monkeypatch.setitem(globals(), "_executor_storage", storage)
    found = [Reusable.get_reusable_executor(2)[0]]
    Reusable.get_reusable_executor = hooks.hooked_get(original)
    with oobpickle.enabled():
        found.append(Reusable.get_reusable_executor(2)[0])
        assert Reusable.get_reusable_executor(2)[0] is found[-1]
    found[-1]._pending_work_items[1] = "a task"
    with oobpickle.enabled():
        assert Reusable.get_reusable_executor(2)[0] is found[-1]
        found[-1]._pending_work_items.clear()
        assert Reusable.get_reusable_executor(2, reuse=True)[0] is found[-1]
        found.append(Reusable.get_reusable_executor(2)[0])
    with oobpickle.enabled():
        found.append(Joblibs.get_reusable_executor(2, reuse=True)[0])
        assert Joblibs.get_reusable_executor(2, reuse=True)[0] is found[-1]
    assert Reusable.get_reusable_executor(2)[0] is found[-1]
    assert len(set(map(id, found))) == 4
    assert reuses == ["auto", False, "auto", "auto", True, False, False, True, "auto"]
    names = vars(reusable_executor)
    assert "_executor_storage" in names or NAME in names
