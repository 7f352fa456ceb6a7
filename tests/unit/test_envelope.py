"""The envelope: pickle meets memory."""

import errno
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

import oobpickle
from messages import envelope_of, message_of
from oobpickle import EnvelopeError, StaleEnvelopeError, _envelope, _published
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._memory.sending import Lease
from oobpickle._native import core
from table import Table

NAME = bytes(range(32))


@pytest.fixture
def arena():
    arena = SharedArena.create(Options(capacity=64 << 20))
    _envelope.introduce(arena)
    yield arena
    _envelope.forget(arena)
    arena.close()
    arena.detach()
    assert arena.try_destroy()


def pack(arena, obj):
    envelope = envelope_of(obj, arena)
    envelope.lease.settle()
    return bytes(envelope)


@pytest.mark.parametrize("n_arrays", [0, 1, 3, 2000])
def test_an_envelope_is_an_ordinary_pickle_that_loads_once(arena, n_arrays):
    obj = {"arrays": [np.full(100 + i, i) for i in range(n_arrays)], "text": "t" * 100_000}
    envelope = pack(arena, obj)

    loaded = pickle.loads(envelope)

    assert "t" * 100_000 == loaded["text"]
    assert n_arrays == len(loaded["arrays"])
    for expected, array in zip(obj["arrays"], loaded["arrays"], strict=True):
        assert array.flags.writeable
        np.testing.assert_array_equal(expected, array)
    with pytest.raises(StaleEnvelopeError):
        pickle.loads(envelope)
    assert len(envelope) < 20_000


def test_what_survives_of_a_message_pins_little(arena):
    """An array of less than 4 KiB nothing, a larger one what shares 64 KiB with it."""
    small = pickle.loads(pack(arena, [np.ones(100) for _ in range(5000)]))
    assert 0 == arena.statistics().n_blocks["held"]
    assert all(array.flags.writeable for array in small)

    larger = pickle.loads(pack(arena, [np.ones(1000) for _ in range(1000)]))
    assert 1000 // 8 == arena.statistics().n_blocks["held"]
    del larger[8:]
    assert 1 == arena.statistics().n_blocks["held"]


def test_the_array_is_the_block(arena):
    array = pickle.loads(pack(arena, np.ones(100_000)))

    assert type(array.base) is core.Block
    assert 0 == array.ctypes.data % 64


def test_of_what_cannot_be_mapped_only_the_part_is_copied(arena):
    data = np.arange(1_000_000)
    view = _published.store(data, arena, readonly=True).value
    sent = {"one": view[10_000:20_000], "other": view[-30_000:], "own": np.ones(50_000)}
    n_references = arena.statistics().n_references
    envelope = pack(arena, [sent, view])
    core.arm("mapping.view", 1, -errno.ENOMEM)
    try:
        arrived, whole = pickle.loads(envelope)
    finally:
        core.arm(None, 0, 0)

    assert [10_000 * 8, 30_000 * 8, 50_000 * 8, 1_000_000 * 8] == [
        memoryview(array.base).nbytes for array in (*arrived.values(), whole)
    ]
    for name, array in sent.items():
        np.testing.assert_array_equal(array, arrived[name])
        arrived[name][:] = 0
    np.testing.assert_array_equal(data, whole)
    np.testing.assert_array_equal(data, view)
    assert arena.statistics().n_references == n_references


def test_of_what_is_mapped_the_part_is_a_view(arena):
    view = _published.store(np.arange(1_000_000), arena, readonly=True).value
    part = pickle.loads(pack(arena, view[10_000:20_000]))

    assert part.base.is_reference
    assert not part.base.is_copy
    assert part.tolist() == [*range(10_000, 20_000)]


@pytest.mark.parametrize(("at", "nbytes"), [(8_000_000 - 79_999, 80_000), (0, 8_000_001)])
@pytest.mark.parametrize("maps", [True, False])
def test_a_part_that_is_not_there_is_refused(arena, at, nbytes, maps):
    view = _published.store(np.arange(1_000_000), arena, readonly=True).value
    message = message_of(view[:10_000], arena.blocks)
    lease = Lease(arena.blocks, message.references)
    lease.seal(0)
    lease.settle()
    if not maps:
        core.arm("mapping.view", 1, -errno.ENOMEM)
    try:
        with pytest.raises(EnvelopeError, match="smaller than what lies in it"):
            arena.receiving.claim(lease.pairs, [0], struct.pack("<2Q", 1 << 63 | nbytes, at))
    finally:
        core.arm(None, 0, 0)

    assert arena.statistics().n_references == 1


def test_the_same_array_twice_is_one_array(arena):
    array = np.ones(100_000)

    first, second = pickle.loads(pack(arena, [array, array]))

    assert first is second


def test_empty_buffers_take_no_room(arena):
    buffers = [pickle.PickleBuffer(b""), pickle.PickleBuffer(bytearray(1000))]

    empty, full = pickle.loads(pack(arena, buffers))

    assert (b"", bytes(1000)) == (bytes(empty), bytes(full))


class Unloadable:
    """Raises where it is loaded, with an array that has arrived."""

    def __init__(self):
        self.array = np.ones(100_000)

    def __setstate__(self, state):
        raise RuntimeError("as it does today")


def test_an_object_that_cannot_be_loaded_fails_as_it_does_today_and_holds_nothing(arena):
    envelope = pack(arena, Unloadable())

    with pytest.raises(RuntimeError, match="as it does today"):
        pickle.loads(envelope)

    assert 0 == arena.statistics().n_blocks["held"]


class Unpicklable:
    def __reduce__(self):
        raise TypeError("not me")


def test_an_object_that_cannot_be_pickled_leases_nothing(arena):
    with pytest.raises(TypeError, match="not me"):
        pack(arena, [np.ones(100_000), Unpicklable()])

    assert {} == {k: v for k, v in arena.statistics().n_blocks.items() if v and k != "free"}


class Lies:
    """Its array needs more memory than it hands over."""

    def __reduce__(self):
        return np.ndarray, ((200_000,), "f8", pickle.PickleBuffer(bytearray(100_000)))


@pytest.mark.parametrize("bad", [5, (int,), (5, ()), (int, 5), "no_such_name"], ids=repr)
def test_a_reducer_that_returns_the_wrong_thing_leases_nothing(arena, bad):
    Unpicklable.bad = bad
    with pytest.raises(pickle.PicklingError) as caught:
        pack(arena, {"a": [np.ones(100_000), Returning()]})

    assert any(note.endswith(".Returning at $['a'][1]") for note in caught.value.__notes__)
    assert {} == {k: v for k, v in arena.statistics().n_blocks.items() if v and k != "free"}


class Returning:
    def __reduce__(self):
        return Unpicklable.bad


def test_a_reducer_that_lies_about_a_size_fails_where_it_is_loaded_and_holds_nothing(arena):
    envelope = pack(arena, [np.ones(100_000), Lies()])
    with pytest.raises(TypeError, match="buffer is too small"):
        pickle.loads(envelope)

    assert 0 == arena.statistics().n_blocks["held"]


def test_bytes_hold_nothing_once_they_are_loaded(arena):
    sent = [b"x" * 1_000_000, bytearray(500_000), "text" * 100_000, list(range(100_000))]
    arrived = pickle.loads(pack(arena, sent))

    assert sent == arrived
    assert 0 == arena.statistics().n_blocks["held"]


def framed_in(envelope):
    at = len(_envelope.PREFIX) + 8
    return bytearray(envelope[at : -len(_envelope._SUFFIX)])


@pytest.mark.parametrize("obj", [np.ones(1000), "s" * 50_000], ids=["direct", "indirect"])
def test_an_altered_or_truncated_envelope_is_refused_and_the_message_not_lost(arena, obj):
    envelope = pack(arena, obj)
    good = framed_in(envelope)

    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x41
        with pytest.raises(EnvelopeError):
            _envelope.unpack_envelope(bytes(bad))
    for length in range(len(good)):
        with pytest.raises(EnvelopeError):
            _envelope.unpack_envelope(bytes(good[:length]))
    with pytest.raises(EnvelopeError):
        _envelope.unpack_envelope(bytes(good) + b"x")

    loaded = pickle.loads(envelope)
    assert np.array_equal(obj, loaded)


def rechecked(envelope):
    at = len(_envelope.PREFIX) + 8
    framed = envelope[at : -len(_envelope._SUFFIX)]
    return envelope[: at + 4] + struct.pack("<I", zlib.crc32(framed[8:])) + envelope[at + 8 :]


def test_an_envelope_of_an_arena_out_of_reach_names_it_and_says_what_to_do(arena):
    envelope = pack(arena, np.ones(1000))
    del _envelope._arenas[arena.identity]
    elsewhere = envelope.replace(arena.name[16:20], (2**31 - 1).to_bytes(4, "little"))

    with pytest.raises(EnvelopeError, match=f"arena {arena.identity.hex()[:8]}.*cannot reach"):
        pickle.loads(rechecked(elsewhere))

    _envelope.introduce(arena)
    pickle.loads(envelope)


def test_a_process_that_does_not_take_part_finds_the_arena_through_the_sender(arena):
    """As a program that inherited a connection through subprocess."""
    envelope = pack(arena, np.arange(100_000))
    code = (
        "import pickle, sys; array = pickle.loads(sys.stdin.buffer.read());"
        "array += 1; print(array.sum(), len(array))"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], input=envelope, capture_output=True, timeout=60, check=False
    )

    assert (b"", 0) == (result.stderr, result.returncode)
    assert f"{np.arange(100_000).sum() + 100_000} 100000" == result.stdout.decode().strip()
    with pytest.raises(StaleEnvelopeError):
        pickle.loads(envelope)


def reframe(arena, counts, body):
    framed = _envelope._framed(arena.name, counts, body)
    return framed[_envelope._BODY_AT : -len(_envelope._SUFFIX)]


@pytest.mark.parametrize(
    ("counts", "body"),
    [
        ((1, 1, 0, 0), struct.pack("<3Q", 0, 1, 10**15)),
        ((2, 1, 0, 0), struct.pack("<5Q", 0, 1, 1, 1, 100)),
        ((1, 1, 0, 5), struct.pack("<3Q", 1 << 50, 1, 100) + b"abcde"),
        ((1, 0, 1, 0), struct.pack("<3Q", 3, 1, 65536)),
        ((10**6, 0, 1, 0), struct.pack("<3Q", 0, 1, 65536)),
        ((0, 0, 1, 0), struct.pack("<3Q", 0, 1, 65536)),
    ],
)
def test_a_forged_envelope_with_a_right_checksum_is_refused(arena, counts, body):
    envelope = pack(arena, np.ones(1000))

    with pytest.raises(EnvelopeError):
        _envelope.unpack_envelope(reframe(arena, counts, body))

    pickle.loads(envelope)


@pytest.mark.parametrize(
    "told",
    [
        _envelope._in_files._END.pack(1, 2**32 - 1, 0, 0),
        _envelope._in_files._END.pack(1, 0, 2**32 - 1, 0),
        _envelope._in_files._END.pack(1, 0, 0, 2**64 - 1),
        bytes(28) + _envelope._in_files._END.pack(1, 1, 0, 28),  # in no file
        struct.pack("<3QI", 9, 0, 1, 0) + bytes(40) + _envelope._in_files._END.pack(1, 1, 1, 68),
        struct.pack("<3QI", 0, 1, 1, 0) + bytes(40) + _envelope._in_files._END.pack(1, 1, 1, 68),
        bytes(28) + struct.pack("<3QqiI", 0, 0, 0, 0, 0, 1) + b"\0"
        + _envelope._in_files._END.pack(1, 1, 1, 69),
        b"none",
    ],
)  # fmt: skip
def test_a_forged_list_of_files_is_refused(arena, told):
    envelope = pack(arena, np.ones(100_000))
    index, generation = _envelope.head_of(envelope, arena.identity)
    stream = oobpickle.dumps(np.ones(100_000)).stream + told
    body = struct.pack("<3Q", index, generation, 800_000) + stream

    with pytest.raises(EnvelopeError, match=r"in files|in the file"):
        _envelope.unpack_envelope(reframe(arena, (1, 1, _envelope._IN_FILES, len(stream)), body))

    assert 0 == arena.statistics().n_blocks["in_flight"] == arena.statistics().n_blocks["held"]


def test_a_forged_size_that_is_a_reference_without_its_offset_is_refused(arena):
    envelope = pack(arena, np.ones(100_000))
    index, generation = _envelope.head_of(envelope, arena.identity)
    sizes = struct.pack("<2Q", 800_000, 1 << 63 | 8)
    forged = reframe(arena, (1, 2, 0, 0), struct.pack("<2Q", index, generation) + sizes)

    with pytest.raises(EnvelopeError, match="does not fit its blocks") as caught:
        _envelope.unpack_envelope(forged)

    assert 0 == arena.statistics().n_blocks["held"]
    assert "a reference without its offset" in str(caught.value)  # it is kept until here


@pytest.mark.parametrize(
    ("n_buffers", "flags", "said"),
    [(2000, _envelope._IN_FILES, "in files"), (1, 0, "buffers that")],
)
def test_an_error_that_is_kept_holds_no_index_of_its_message(arena, n_buffers, flags, said):
    envelope = pack(arena, [np.full(1000, i) for i in range(2000)])
    parsed = _envelope._parse(bytes(framed_in(envelope)))
    assert (parsed.indirect, parsed.n_buffers) == (True, 2000)
    body = bytes(parsed.body[: 24 + _envelope.START_NBYTES])
    counts = (parsed.n_blocks, n_buffers, _envelope._INDIRECT | flags, parsed.n_stream)

    with pytest.raises(EnvelopeError, match=said) as caught:
        _envelope.unpack_envelope(reframe(arena, counts, body))

    assert 0 == arena.statistics().n_blocks["held"]
    assert said in str(caught.value)  # it is kept until here


@pytest.mark.parametrize("n", range(4))
def test_a_forged_name_without_a_descriptor_is_refused(arena, n):
    envelope = pack(arena, np.ones(1000))
    framed = framed_in(envelope)
    framed[8] ^= 1  # the identity, so that the name is looked at
    struct.pack_into("<i", framed, 28 + 4 * n, -1)
    struct.pack_into("<I", framed, 4, zlib.crc32(framed[8:]))

    with pytest.raises(EnvelopeError, match="cannot reach"):
        _envelope.unpack_envelope(bytes(framed))

    pickle.loads(envelope)


@pytest.mark.parametrize("argument", [None, 5, "text", [1], bytearray(100), b""])
def test_what_is_no_bytes_is_no_envelope(argument):
    with pytest.raises(EnvelopeError, match="envelope"):
        _envelope.unpack_envelope(argument)


def test_an_envelope_that_names_a_block_twice_is_refused(arena):
    """Two arrays over one block would be released twice, and lent to a stranger in between."""
    envelope = pack(arena, np.ones(100_000))
    index, generation = _envelope.head_of(envelope, arena.identity)
    stream = oobpickle.dumps([np.ones(100_000)] * 2).stream
    body = struct.pack("<6Q", *[index, generation] * 2, *[800_000] * 2) + stream
    forged = reframe(arena, (2, 2, 0, len(stream)), body)

    with pytest.raises(EnvelopeError, match="twice"):
        _envelope.unpack_envelope(forged)

    assert 1 == arena.statistics().n_blocks["in_flight"]
    pickle.loads(envelope)


@pytest.mark.parametrize("column", ["commit", "generation"])
def test_a_message_whose_entry_is_damaged_is_refused_and_counted(arena, column):
    envelope, other = pack(arena, np.ones(100_000)), pack(arena, np.full(100_000, 2.0))
    index, _ = _envelope.head_of(envelope, arena.identity)
    Table.of(arena).rows[column][index] ^= np.uint64(1 << 45)

    with pytest.raises(EnvelopeError, match=r"entry of block .* is damaged"):
        pickle.loads(envelope)

    assert 1 == arena.statistics().n_quarantined
    np.testing.assert_array_equal(np.full(100_000, 2.0), pickle.loads(other))
    assert 1 == arena.statistics().n_quarantined
    assert 0 == arena.statistics().n_blocks["in_flight"]


def test_the_head_of_an_envelope_names_its_first_block(arena):
    envelope = pack(arena, np.ones(1000))
    head = envelope[: _envelope.HEAD_NBYTES]

    assert (0, 1) == _envelope.head_of(head, arena.identity)
    assert _envelope.head_of(head, NAME[:16]) is None
    assert _envelope.head_of(b"x" * _envelope.HEAD_NBYTES, arena.identity) is None
    assert _envelope.MIN_NBYTES <= len(envelope) <= _envelope.MAX_NBYTES
    assert _envelope.MARK == len(envelope) % _envelope.MODULUS
    pickle.loads(envelope)


class RefusesToLoad:
    def __reduce__(self):
        return int, ("no number",)


def test_an_error_that_is_kept_holds_nothing_of_its_message(arena):
    envelope = pack(arena, [np.ones(100_000), RefusesToLoad()])
    with pytest.raises(ValueError, match="no number") as caught:
        pickle.loads(envelope)

    assert 0 == arena.statistics().n_blocks["held"]
    assert "unpack_envelope" in [entry.name for entry in caught.traceback]
