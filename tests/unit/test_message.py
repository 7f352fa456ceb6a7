"""A message as it is taken apart: in blocks, in memory, and from one to the other."""

import copyreg
import ctypes
import gc
import os
import pickle
import sys
import threading
import warnings
import weakref
from fractions import Fraction

import numpy as np
import pytest

import oobpickle
from messages import envelope_of, message_of
from oobpickle import _envelope
from oobpickle._native import core
from oobpickle._pickling.in_band import as_pickle
from oobpickle._pickling.reducers import Sink
from oobpickle._pickling.serializer import take_apart
from table import Table

MIB = 1 << 20


@pytest.fixture
def make_arena(make_arena):
    """Arenas that this process can load envelopes of."""
    arenas = []

    def make(**options):
        arenas.append(make_arena(**options))
        _envelope.introduce(arenas[-1])
        return arenas[-1]

    yield make
    for arena in arenas:
        _envelope.forget(arena)


def used(arena):
    return {state: n for state, n in arena.statistics().n_blocks.items() if n and state != "free"}


# --- arrays: the same as in Python

ARRAYS = {
    "floats": np.arange(1000.0),
    "few": np.arange(10.0),
    "no axis": np.array(5),
    "empty": np.zeros((0, 5)),
    "Fortran": np.asfortranarray(np.arange(3000.0).reshape(50, 60)),
    "few in Fortran's order": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "axes in another order": np.arange(4000).reshape(10, 20, 20).transpose(1, 0, 2),
    "every second": np.arange(5000)[::2],
    "backwards": np.arange(5000)[::-1],
    "a column": np.arange(5000).reshape(500, 10)[:, 3],
    "a column in a box": np.arange(6000).reshape(10, 20, 30)[2:5, ::3, 1:-1],
    "transposed with gaps": np.arange(6000).reshape(60, 100)[:, ::2].T,
    "broadcast": np.broadcast_to(np.arange(100.0), (30, 100)),
    "one element axes": np.arange(3000.0).reshape(1, 3000, 1)[:, ::3],
    "read-only": np.arange(1000).view(),
    "dates": np.arange(1000).astype("M8[D]"),
    "every second date": np.arange(2000).astype("M8[D]")[::2],
    "durations": np.arange(1000).astype("m8[s]"),
    "text": np.array(["abc", "de"] * 500),
    "bytes": np.array([b"abc", b"de"] * 500),
    "half": np.arange(1000, dtype="f2"),
    "long double": np.arange(1000, dtype="g"),
    "other byte order": np.arange(1000, dtype=">i4"),
    "long double in the other order": np.arange(1000, dtype=np.dtype("g").newbyteorder()),
    "complex": np.arange(1000) * 1j,
    "bool": np.arange(1000) % 3 == 0,
    "fields": np.zeros(500, [("a", "i1"), ("b", "f8")]),
    "fields with gaps": np.zeros(500, np.dtype([("a", "i1"), ("b", "f8")], align=True))[::2],
    "few fields": np.ones(5, [("a", "i1"), ("b", "f8")]),
    "few fields with gaps": np.ones(8, np.dtype([("a", "i1"), ("b", "f8")], align=True))[::2],
    "without a meaning": np.zeros(500, "V7"),
    "objects": np.array([1, "two", None] * 10, dtype=object),
    "metadata": np.zeros(1000, np.dtype("f8", metadata={"unit": "m"})),
    "13 bytes each, with gaps": np.zeros(1000, "S13")[::3],
    "48 axes": np.zeros((1,) * 30 + (20, 30)),
}
ARRAYS["read-only"].flags.writeable = False


class Structure(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_int * 30_000),)


class Kept(np.ndarray):
    pass


def both(obj, threshold):
    sink, message = Sink(threshold), core.Message(None, threshold, _envelope.tables({}))
    take_apart(obj, sink)
    take_apart(obj, message)
    return sink, message


@pytest.mark.parametrize("threshold", [0, 1 << 40])
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_taken_apart_as_in_python(name, threshold):
    obj = [ARRAYS[name], {"again": ARRAYS[name]}, ARRAYS[name].copy()]
    sink, message = both(obj, threshold)

    assert b"".join(sink.pieces) == message.stream
    assert sink.sizes == list(np.frombuffer(message.sizes, "u8"))
    payload = oobpickle.dumps(obj)
    if threshold == 0:
        assert bytes(payload.to_pickle()) == bytes(as_pickle(message))


@pytest.mark.parametrize("threshold", [0, 1, 100_000, 1 << 40])
def test_everything_is_taken_apart_as_in_python(threshold):
    ones = [np.ones(n) for n in (10, 1000, 3000, 20_000)]
    ones += [bytearray(200_000), b"x" * 100_000, "t" * 80_000, bytearray(10)]
    ones += [np.ones(40_000).view(np.recarray), np.ma.masked_array(np.ones(20_000), False)]
    ones += [pickle.PickleBuffer(bytearray(70_000)), pickle.PickleBuffer(b"y" * 1000)]
    ones += [Structure(), int, [1, 2], {"three": 4}]
    sink, message = both(ones, threshold)

    assert b"".join(sink.pieces) == message.stream
    assert sink.sizes == list(np.frombuffer(message.sizes, "u8"))
    assert message.nbytes == sink.nbytes


# --- where it is


def test_buffers_are_in_blocks_as_soon_as_they_are_handed_out(arena):
    array = np.ones(100_000)
    message = message_of([array, "text"], arena.blocks)
    array[:] = 2

    assert {"leased": 1} == used(arena)
    (block,) = message.blocks
    assert (np.frombuffer(block) == 1).all()
    del message, block
    assert {} == used(arena)


def test_a_message_goes_from_blocks_to_memory_and_back(arena):
    obj = [np.arange(5_000_000), np.arange(10.0), bytearray(70_000), np.arange(2000), np.zeros(0)]
    message = message_of(obj, arena.blocks)
    message.leave_blocks()
    assert message.blocks is None
    assert {} == used(arena)

    envelope = _envelope.pack(message, arena)
    envelope.lease.settle()

    for sent, arrived in zip(obj, pickle.loads(envelope), strict=True):
        np.testing.assert_array_equal(sent, arrived)


def test_empty_memory_with_strides_is_empty():
    empty = memoryview(b"abcd")[0:0:2]
    message = core.Message(None, 0, _envelope.tables({}))
    message.write(empty)
    assert message.stream == b""
    assert not message.take(pickle.PickleBuffer(empty))
    assert not message.take(message.stand_in(empty))
    assert message.sizes == bytes(16)


def test_the_pages_of_a_large_block_go_as_it_is_read(make_arena):
    arena = make_arena(capacity=256 * MIB)
    arena.blocks.keep_nbytes = 256 * MIB
    message = message_of(np.ones(16 * MIB), arena.blocks)
    assert arena.statistics().nbytes_resident >= 128 * MIB

    message.leave_blocks()

    assert arena.statistics().nbytes_resident < 16 * MIB
    assert (pickle.loads(as_pickle(message)) == 1).all()


@pytest.mark.parametrize("nbytes", [MIB, MIB + 100, 2 * MIB - 1, 4 * MIB, 5 * MIB + 1])
def test_a_large_buffer_that_shares_its_block_is_read_without_its_neighbours(arena, nbytes):
    """As in what is published."""
    sizes = (nbytes, 1000, nbytes, 70_000, nbytes)
    obj = [np.full(n, i, np.uint8) for i, n in enumerate(sizes)]
    message = message_of(obj, arena.blocks, is_coarse=True)
    assert message.blocks

    message.leave_blocks()

    for sent, arrived in zip(obj, pickle.loads(as_pickle(message)), strict=True):
        np.testing.assert_array_equal(sent, arrived)


def test_what_finds_no_room_is_in_memory_as_a_whole(make_arena):
    arena = make_arena(capacity=2 * MIB)
    obj = [np.full(100_000, float(i)) for i in range(4)]

    message = message_of(obj, arena.blocks)

    assert message.blocks is None
    assert {} == used(arena)
    for sent, arrived in zip(obj, pickle.loads(as_pickle(message)), strict=True):
        np.testing.assert_array_equal(sent, arrived)


def test_who_waits_for_room_has_no_block(make_arena):
    """Two that each held what the other one waits for would wait until the clock says no."""
    arena = make_arena(capacity=4 * MIB)
    held = [arena.acquire([MIB]) for _ in range(3)]
    message = message_of([np.ones(100_000), "t" * 20_000], arena.blocks)
    others = arena.acquire([MIB // 8])  # so that there is no room for the index
    assert message.blocks

    thread = threading.Thread(target=lambda: held.clear())
    thread.start()
    envelope = _envelope.pack(message, arena)
    thread.join()

    envelope.lease.settle()
    assert (pickle.loads(envelope)[0] == 1).all()
    others.release()


def test_a_message_that_goes_through_no_arena_takes_no_room(arena):
    message = message_of([np.ones(100_000)])

    assert {} == used(arena)
    assert message.blocks is None


def test_a_pickle_may_have_something_before_it_and_after_it():
    message = message_of([np.arange(1000)])
    view = as_pickle(message, head=b"\x80\x04N0", tail=b"tail")

    assert view.readonly
    assert bytes(view[:4]) == b"\x80\x04N0"
    assert bytes(view[-4:]) == b"tail"
    np.testing.assert_array_equal([np.arange(1000)], pickle.loads(view))
    with pytest.raises(ValueError, match="pickle already"):
        as_pickle(message)
    with pytest.raises(ValueError, match="too long"):
        as_pickle(message_of([np.arange(1000)]), head=bytes(2000))


def test_a_message_becomes_a_pickle_once():
    message = message_of([np.ones(100_000)])
    message.to_pickle(b"", b"", b"")

    with pytest.raises(ValueError, match="a pickle already"):
        message.to_pickle(b"", b"", b"")


def test_what_was_given_back_is_gone_and_the_rest_is_not():
    message = message_of([np.ones(4 * MIB)])
    view = as_pickle(message)
    nbytes = len(view)

    message.give_back(0, 16 * MIB)
    message.give_back(nbytes, 1)
    message.give_back(1 << 63, 1 << 63)

    assert not any(view[MIB : MIB + 1000])
    assert np.frombuffer(view[16 * MIB + 4096 : 16 * MIB + 4104], "u1").any()


def test_a_message_can_be_cleared_and_used_again(arena):
    message = message_of(np.ones(100_000), arena.blocks)
    message.clear()
    assert {} == used(arena)
    assert (0, 0, b"") == (message.nbytes, message.n_buffers, message.sizes)

    take_apart(np.full(100_000, 3.0), message)
    envelope = _envelope.pack(message, arena)
    envelope.lease.settle()
    assert (pickle.loads(envelope) == 3).all()


def test_memory_that_is_looked_at_is_not_cleared():
    message = message_of(np.ones(100_000))
    view = as_pickle(message)
    with pytest.raises(BufferError):
        message.clear()
    with pytest.raises(BufferError):
        message.take(pickle.PickleBuffer(b"more"))
    assert len(view) > 800_000
    del view
    message.clear()
    with pytest.raises(BufferError):
        memoryview(message)


# --- what pickle does in odd cases


class Changes:
    """Stands in the metadata of a dtype, which is pickled before the memory is asked for."""

    def __init__(self, change):
        self.change = change

    def __reduce__(self):
        self.change()
        return int, ()


@pytest.mark.parametrize("threshold", [0, 1 << 40])
@pytest.mark.parametrize("field", [False, True])
@pytest.mark.parametrize("change", ["fill", "shrink"])
def test_what_a_dtype_does_when_it_is_pickled_comes_too_late(arena, threshold, field, change):
    code = Changes(None)
    dtype = np.dtype("f8", metadata={"code": code})
    array = np.ones(500_000, [("a", dtype)] if field else dtype)
    changes = {"fill": lambda: array.fill(7), "shrink": lambda: array.resize(3, refcheck=False)}
    code.change = changes[change]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy: it does not load metadata
        arrived = pickle.loads(as_pickle(message_of(array, arena.blocks, threshold)))

    assert arrived.shape == (500_000,)
    assert arrived.tobytes() == np.ones(500_000).tobytes()


@pytest.mark.parametrize("threshold", [0, 1 << 40])
def test_memory_in_several_pieces_is_refused_as_ever(threshold):
    buffer = pickle.PickleBuffer(np.zeros(100_000)[::2])
    with pytest.raises(pickle.PicklingError) as plain:
        pickle.dumps(buffer, 5)
    for take_apart_into in (oobpickle.dumps, lambda obj: message_of(obj, threshold=threshold)):
        with pytest.raises(pickle.PicklingError) as ours:
            take_apart_into(buffer)
        assert str(plain.value) == str(ours.value)


class Hides:
    def __getattribute__(self, name):
        if name == "__reduce_ex__":
            raise AttributeError(name)
        return super().__getattribute__(name)

    def __reduce__(self):
        return str, ("found",)


def test_who_has_no_reduce_ex_is_asked_for_its_reduce():
    assert pickle.loads(message_of(Hides(), threshold=1000).stream) == "found"


class Lacks:
    def __reduce_ex__(self, protocol):
        return self.what_it_lacks


def test_an_attribute_that_a_reducer_lacks_is_what_is_said():
    """Not that there is no reducer."""
    with pytest.raises(AttributeError, match="what_it_lacks") as caught:
        message_of(Lacks(), threshold=1000)
    assert caught.value.obj.__class__ is Lacks
    assert caught.traceback[-1].name == "__reduce_ex__"


def test_what_is_registered_between_two_attempts_counts(monkeypatch):
    message = core.Message(None, 1 << 30, _envelope.tables({}))
    for expected in (Plain, str):
        take_apart([Plain(1), Plain(2)], message)
        assert [type(one) for one in pickle.loads(message.stream)] == [expected, expected]
        message.clear()
        monkeypatch.setitem(copyreg.dispatch_table, Plain, lambda plain: (str, ("registered",)))


Deep = ctypes.c_int
for _ in range(70):
    Deep = Deep * 1
Deep.__name__ = Deep.__qualname__ = "Deep"
Large = Deep * 30_000
Large.__name__ = Large.__qualname__ = "Large"


class Plain:
    def __init__(self, number):
        self.number = number


class Special(bytes):
    """What Python knows more about."""


def test_what_was_made_for_the_stream_is_not_resized_by_who_has_kept_it():
    message = core.Message(None, 1 << 30, _envelope.tables({}))
    *_, (*_, kept) = message.reduce_array(np.arange(5000.0))
    message.write(kept)

    for resize in (lambda: kept.extend(b"x"), kept.clear):
        with pytest.raises(BufferError):
            resize()
    assert message.stream == np.arange(5000.0).tobytes()
    del message
    kept.clear()


def test_objects_of_plain_and_special_classes_by_turns():
    """The last plain class is remembered; the first one of a message, too, if it is a new one."""
    large = [Special(bytes([n]) * 100_000) for n in range(40)]
    objects = []
    for n in range(20):
        objects += [Plain(n), Plain(n), *large[2 * n : 2 * n + 2], Fraction(n)]
    local = type("Local", (Plain,), {"__reduce__": lambda self: (Plain, (self.number,))})
    objects += [local(7), Plain(8), Special(9)]

    for threshold in (0, 1 << 30):
        message = message_of(objects, threshold=threshold)
        assert message.n_buffers == (len(large) if threshold == 0 else 0)
        found = pickle.loads(as_pickle(message))
        assert [type(one) for one in found] == [
            Plain if type(o) is local else type(o) for o in objects
        ]
        assert [getattr(one, "number", one) for one in found] == [
            getattr(one, "number", one) for one in objects
        ]
    kept = weakref.ref(local)
    del local, objects, message
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("kind", [Deep, Large])
def test_any_number_of_axes_can_be_sent(kind):
    for arrived in (
        oobpickle.loads(oobpickle.dumps(kind())),
        pickle.loads(as_pickle(message_of(kind()))),
    ):
        assert type(arrived) is kind


# --- errors


class Raises:
    def __reduce__(self):
        raise RuntimeError("not me")


def test_an_error_leaves_nothing_leased_and_no_reference(arena):
    array = np.ones(100_000)
    kept = np.ones(100_000).view(Kept)
    died = weakref.ref(kept)
    message = core.Message(arena.blocks, 0, _envelope.tables({}))
    with pytest.raises(RuntimeError, match="not me"):
        take_apart([array, kept, Raises()], message)
    del kept
    gc.collect()

    assert {} == used(arena)
    assert died() is None


@pytest.mark.parametrize(
    "arguments",
    [(), (None,), (None, 0), (None, 0, ()), (5, 0, ({}, {}, {}, None)), (None, -1, ({},) * 4)],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises((TypeError, OverflowError, ValueError)):
        core.Message(*arguments)


def test_a_bytearray_without_its_header_is_refused():
    message = core.Message(None, 0, _envelope.tables({}))
    with pytest.raises(SystemError, match="without its header"):
        message.write(bytearray(100_000))
    message.write(b"short")
    with pytest.raises(SystemError, match="without its header"):
        message.write(bytearray(100_000))


def test_blocks_that_do_not_fit_are_refused(arena):
    message = message_of([np.ones(100_000)])
    for needs in ([], [100], [100_000]):
        blocks = arena.acquire(needs).blocks
        with pytest.raises((ValueError, IndexError)):
            message.move_into(blocks)
    sealed = arena.acquire([800_000])
    sealed.seal(0)
    with pytest.raises(ValueError, match="not leased"):
        message.move_into(sealed.blocks)

    message.move_into(arena.acquire([800_000]).blocks)
    with pytest.raises(ValueError, match="not in memory"):
        message.move_into(arena.acquire([800_000]).blocks)


class Asks:
    """Exports memory, and calls something whenever it is asked for it."""

    def __init__(self, call):
        self.call = call

    def __buffer__(self, flags):
        self.call()
        return memoryview(b"x" * 1000)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no class in Python exports memory")
@pytest.mark.parametrize("name", ["clear", "leave_blocks", "take", "write", "reduce_array"])
def test_an_object_that_is_asked_for_its_memory_does_not_change_the_message(name):
    message = core.Message(None, 0, _envelope.tables({}))
    argument = {"take": (b"y" * 1000,), "write": (b"y",), "reduce_array": (np.ones(9),)}
    asks = Asks(lambda: getattr(message, name)(*argument.get(name, ())))
    for call, given in ((message.take, message.stand_in(asks)), (message.write, asks)):
        with pytest.raises(RuntimeError, match="being changed already"):
            call(given)
    assert message.n_buffers == message.stream_nbytes == 0

    message.write(b"stream")
    assert not message.take(pickle.PickleBuffer(b"z" * 1000))
    assert message.n_buffers == 1
    message.clear()


class Dies:
    """Calls something as it dies."""

    def __init__(self, call):
        self.call = call

    def __del__(self):
        self.call()


def test_what_dies_with_a_message_that_is_cleared_may_look_at_it(arena):
    message = core.Message(arena.blocks, 0, _envelope.tables({}))
    found = []
    looks = Dies(lambda: found.append([message.blocks, message.sizes, message.stream]))
    array = np.ones(100_000, np.dtype("f8", metadata={"dies": looks}))
    del looks
    message.take(message.stand_in(array))
    message.write(b"stream")
    del array
    message.clear()

    assert found == [[[], b"", b""]]


def test_another_thread_does_not_change_a_message_on_its_way_to_disk(make_arena, tmp_path):
    arena = make_arena(spill_dir=str(tmp_path))
    (block,) = arena.blocks.lease([32 * MIB], True)
    block.reserve(32 * MIB)
    refused = []

    def clear(message, is_on_its_way):
        is_on_its_way.wait()
        try:
            message.clear()
        except RuntimeError as error:
            refused.append(str(error))

    for _ in range(100):  # the thread may be there too early, or too late
        message, begins = core.Message(None, 1 << 40, _envelope.tables({})), threading.Event()
        message.write(os.urandom(32 * MIB))
        thread = threading.Thread(target=clear, args=(message, begins))
        thread.start()
        begins.set()
        message.write_stream_into(block, 0)
        thread.join()
        if refused:
            break
    assert "being changed already" in refused[0]
    block.empty()


# --- copied as handed out


class Writer:
    """Changes what was pickled before it."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __reduce__(self):
        for array in self.arrays:
            array[:] = np.full((), 7).astype(array.dtype)
        return int, ()


MEMORY = {
    "array": lambda: np.ones(100_000),
    "small array": lambda: np.ones(100),
    "strided": lambda: np.ones(200_000)[::2],
    "dates": lambda: np.ones(100_000, "M8[s]"),
    "bytearray": lambda: np.frombuffer(bytearray(b"\1" * 100_000), "u1"),
    "record array": lambda: np.ones(50_000).view(np.recarray),
    "masked": lambda: np.ma.masked_array(np.ones(50_000), False),
    "memory map": lambda: np.memmap("/dev/zero", "u1", "c", shape=(100_000,)),
}


@pytest.mark.parametrize("threshold", [0, 1 << 40])
@pytest.mark.parametrize("name", MEMORY)
def test_what_is_changed_afterwards_arrives_as_it_was(arena, name, threshold):
    array = MEMORY[name]()
    before = array.copy()
    message = message_of([array, Writer(array)], arena.blocks, threshold)

    arrived, _ = pickle.loads(as_pickle(message))
    np.testing.assert_array_equal(before, arrived)
    assert not np.array_equal(before, array)


class Scratch:
    """Fills one memory again and again."""

    memory = np.empty(100_000)

    def __init__(self, value, nbytes, wrap):
        self.value, self.n, self.wrap = value, nbytes, wrap

    def __reduce__(self):
        self.memory[: self.n] = self.value
        return list, ((self.wrap(self.memory[: self.n]),),)


WRAPS = {
    "slice": lambda array: array,
    "copy of the object": lambda array: np.frombuffer(memoryview(array)),
    "PickleBuffer": pickle.PickleBuffer,
    "subclass": lambda array: array.view(np.recarray),
    "from an address": lambda array: np.frombuffer(
        (ctypes.c_double * len(array)).from_address(array.ctypes.data)
    ),
}


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("threshold", [0, 100_000, 1 << 40])
def test_scratch_memory_arrives_as_it_was_each_time(arena, name, threshold):
    obj = [Scratch(float(i), n, WRAPS[name]) for i, n in enumerate((100, 50_000, 100_000, 70_000))]
    envelope = _envelope.pack(message_of(obj, arena.blocks, threshold), arena)
    envelope.lease.settle()

    for i, (memory,) in enumerate(pickle.loads(envelope)):
        assert {float(i)} == set(np.frombuffer(memory).tolist())


def test_no_thread_runs_between_the_first_buffer_and_the_last(arena):
    """What one thread changes in this order never arrives the other way around."""
    arrays = [np.zeros(2000) for _ in range(200)]
    views = [memoryview(array) for array in arrays]
    stop = threading.Event()

    def change():
        value = 0
        while not stop.is_set():
            value += 1
            content = memoryview(np.full(2000, float(value)))
            for view in views:
                view[:] = content  # in one piece: NumPy gives up the GIL in the middle

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(100):
            envelope = envelope_of(arrays, arena)
            envelope.lease.settle()
            # In a few steps: at each where NumPy gives up the GIL, `change` has a turn of 5 ms.
            arrived = np.frombuffer(b"".join(pickle.loads(envelope))).reshape(200, 2000)
            firsts = arrived[:, 0]
            assert (arrived == firsts[:, None]).all()
            assert (np.diff(firsts) <= 0).all()
            assert firsts[0] - firsts[-1] in (0, 1)
    finally:
        stop.set()
        thread.join()


# --- fork


def test_a_child_that_goes_on_with_a_message_of_its_parent_sends_what_it_was(arena):
    message = message_of([np.arange(100_000)], arena.blocks)

    def go_on():
        return bool((pickle.loads(as_pickle(message))[0] == np.arange(100_000)).all())

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"y" if go_on() else b"n")
        os._exit(0)
    assert b"y" == os.read(read, 1)
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    envelope = _envelope.pack(message, arena)
    envelope.lease.settle()
    np.testing.assert_array_equal(np.arange(100_000), pickle.loads(envelope)[0])


def test_a_child_does_not_send_what_its_parent_has_sent(arena):
    message = message_of([np.arange(100_000)], arena.blocks)
    ready, go = os.pipe(), os.pipe()

    def go_on():
        os.read(go[0], 1)
        try:
            as_pickle(message)
        except RuntimeError as error:
            return "forked while it sent" in str(error)
        return False

    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"y" if go_on() else b"n")
        os._exit(0)
    envelope = _envelope.pack(message, arena)
    envelope.lease.settle()
    arrived = pickle.loads(envelope)
    os.write(go[1], b"x")

    assert b"y" == os.read(ready[0], 1)
    os.waitpid(pid, 0)
    for fd in (*ready, *go):
        os.close(fd)
    np.testing.assert_array_equal(np.arange(100_000), arrived[0])


def test_a_child_does_not_send_what_its_parent_is_giving_up(arena):
    """Its pages go while the block is leased still; that it is empty is said before."""
    message = message_of([np.arange(100_000)], arena.blocks)
    (block,) = message.blocks
    used = Table.of(arena).rows["used"]
    before = used[block.index]
    used[block.index] = 0

    pid = os.fork()
    if pid == 0:
        try:
            as_pickle(message)
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert 0 == os.waitpid(pid, 0)[1]
    used[block.index] = before


def test_pages_go_only_after_that_was_said(arena):
    message = message_of([np.arange(1_000_000)], arena.blocks)
    (block,) = message.blocks
    message.leave_blocks()

    assert 0 == Table.of(arena).rows["used"][block.index]


def test_what_a_child_adds_to_a_message_of_its_parent_is_its_own(arena):
    message = message_of([np.full(1000, 1.0)], arena.blocks)
    read, write = os.pipe()

    pid = os.fork()
    if pid == 0:
        os.read(read, 1)
        message.take(pickle.PickleBuffer(np.full(1000, 2.0)))  # beside the first, in its chunk
        view = bytes(as_pickle(message))
        found = [view.count(np.full(1000, value).tobytes()) for value in (1.0, 2.0)]
        os._exit(0 if found == [1, 1] and message.blocks is None else 1)
    message.take(pickle.PickleBuffer(np.full(1000, 3.0)))
    os.write(write, b"x")
    assert 0 == os.waitpid(pid, 0)[1]
    os.close(read)
    os.close(write)

    (block,) = message.blocks
    assert bytes(block)[:8000] == np.full(1000, 1.0).tobytes()
    assert bytes(block)[8000:] == np.full(1000, 3.0).tobytes()


# --- the threshold, and memory that there is


def test_a_message_leaves_the_stream_when_it_reaches_the_threshold():
    assert 1 == message_of(np.zeros(1000, "u1"), threshold=1000).n_buffers
    assert 0 == message_of(np.zeros(1000, "u1"), threshold=1001).n_buffers
    stream = message_of("text" * 100).stream
    assert message_of("text" * 100, threshold=len(stream)).small() is None
    assert stream == message_of("text" * 100, threshold=len(stream) + 1).small()


def test_fresh_pages_are_counted(arena):
    first = message_of([np.ones(100_000), np.ones(100)], arena.blocks)
    assert 800_000 < first.nbytes_fresh < 1_000_000
    del first
    arena.acquire([100]).release()  # frees what was released

    assert 0 == message_of([np.ones(100_000), np.ones(100)], arena.blocks).nbytes_fresh


def test_what_was_referred_to_counts_once_it_is_copied(arena):
    lease = arena.acquire([MIB])
    (view,) = arena.blocks.publish(lease.blocks)
    message = core.Message(None, 0, _envelope.tables({}), arena.blocks)
    message.take(pickle.PickleBuffer(view))
    assert 1 == len(message.references)
    assert 0 == message.nbytes

    message.to_pickle(b"", b"", b"")

    assert MIB == message.nbytes == message.nbytes_in_band
    del view


@pytest.fixture
def limited(make_arena, tmp_path):
    """An arena, and a function that sets the limit of a cgroup and what is used of it, in MiB."""
    arena = make_arena()

    def limit(most, usage):
        (tmp_path / "usage").write_text(f"{usage * MIB}\n")
        (tmp_path / "stat").write_text("inactive_file 0\n")
        names = (str(tmp_path / "usage"), str(tmp_path / "stat"), ("inactive_file", "none"))
        core.headroom(most * MIB, [(most * MIB, *names)])
        return lambda usage: (tmp_path / "usage").write_text(f"{usage * MIB}\n")

    yield arena, limit
    arena.sending._tell_limits()


def test_room_for_the_next_message_in_band_is_left(limited):
    arena, limit = limited
    limit(64, 64 - 20)  # a quarter of it is left in any case; of a large message half of it

    assert message_of(np.ones(2000), arena.blocks).blocks is not None
    assert message_of(np.ones(1 << 19), arena.blocks).blocks is None


def test_what_a_look_has_granted_is_used_up(limited):
    arena, limit = limited
    use = limit(64, 0)
    messages = [message_of(np.ones(2000), arena.blocks)]
    use(64)

    while messages[-1].blocks is not None and len(messages) < 200:
        messages.append(message_of(np.ones(2000), arena.blocks))

    assert 10 < len(messages) < 200
    limit(64, 0)
    messages.append(message_of(np.ones(2000), arena.blocks))
    assert messages[-1].blocks is not None
    limit(64, 64)  # what was granted before is forgotten
    assert message_of(np.ones(2000), arena.blocks).blocks is None


@pytest.mark.parametrize(
    ("usage", "cache", "fits"), [(200, 0, True), (990, 0, False), (990, 900, True)]
)
def test_a_cgroup_is_asked_before_fresh_pages_are_made(make_arena, tmp_path, usage, cache, fits):
    """Past its limit the kernel kills."""
    (tmp_path / "usage").write_text(f"{usage * MIB}\n")
    (tmp_path / "stat").write_text(f"other 5\ninactive_file {cache * MIB}\nactive_file 0\n")
    keys = ("inactive_file", "active_file")
    limits = [(1000 * MIB, str(tmp_path / "usage"), str(tmp_path / "stat"), keys)]
    arena = make_arena()
    try:
        core.headroom(1000 * MIB, limits)
        message = message_of(np.ones(1_000_000), arena.blocks)
    finally:
        arena.sending._tell_limits()

    assert fits == (message.blocks is not None)
    assert (pickle.loads(as_pickle(message)) == 1).all()
