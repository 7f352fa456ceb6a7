"""Payloads: written once into given memory, and bytes that are checked."""

import ctypes
import mmap
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from array import array

import numpy as np
import pytest

import oobpickle
import samples
from oobpickle import Payload, PayloadError
from samples import LAYOUTS, address_of, described, filled, pickled

MIB = 1 << 20


def small_payload():
    """A payload of two buffers, some hundred bytes in all."""
    return oobpickle.dumps({"a": np.arange(64.0), "b": np.arange(513, dtype="u2")[::-1], "c": None})


# --- what it shows


def test_buffers_are_the_memory_of_the_arrays():
    arrays = [
        np.arange(1000.0),
        np.arange(1000.0).reshape(10, 100).T,
        np.arange(500).reshape(5, -1),
    ]
    buffers = oobpickle.dumps(arrays).buffers

    assert [address_of(b.raw()) for b in buffers] == [a.ctypes.data for a in arrays]
    assert [memoryview(b).nbytes for b in buffers] == [8000, 8000, 4000]


def test_strided_arrays_are_shown_as_themselves():
    strided = np.arange(2000.0)[::2]
    payload = oobpickle.dumps(strided)

    assert payload.buffers[0] is strided
    assert payload.sizes == [8000]


def test_the_stream_has_no_bytes_of_the_buffers():
    flat = np.frombuffer(b"unmistakable" * 100, "u1")
    for obj in (flat, flat[::2], flat.reshape(12, 100).T):
        payload = oobpickle.dumps(obj)

        assert len(payload.stream) < 300
        assert b"mistak" not in payload.stream
        assert payload.nbytes == len(payload.stream) + sum(payload.sizes)


def test_repr_says_how_large_it_is():
    payload = oobpickle.dumps(np.zeros(1000))

    assert repr(payload) == (
        f"<Payload of {payload.nbytes} bytes: stream {len(payload.stream)}, buffers [8000]>"
    )


def test_nothing_is_copied_before_it_is_written():
    arrays = [np.zeros(4 * MIB, "u1"), np.zeros(MIB, "u1")[::2]]
    payload = oobpickle.dumps(arrays)
    for item in arrays:
        item[:] = 7
    arrived = oobpickle.loads(payload)

    assert [np.unique(item).tolist() for item in arrived] == [[7], [7]]


# --- write_into


def through_given_memory(obj):
    payload = oobpickle.dumps(obj)
    destinations = [bytearray(b"\xee" * nbytes) for nbytes in payload.sizes]
    payload.write_into(destinations)
    arrived = oobpickle.loads(payload, buffers=destinations)
    if destinations and obj.nbytes:
        assert arrived.ctypes.data == address_of(destinations[0])
    return arrived


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_are_written_into_given_memory_and_built_on_it(layout):

    assert samples.differing(layout, through_given_memory) == {}


def peak_of(call):
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", ["C", "F", "moveaxis", "strided", "negative", "broadcast"])
@pytest.mark.parametrize("dtype", ["f8", "M8[s]", "U3", "i1,f8"])
def test_writing_takes_one_pass_and_no_memory(layout, dtype):
    obj = LAYOUTS[layout](filled(dtype, (64, 64, 64)))
    payload = oobpickle.dumps(obj)
    destination = bytearray(payload.sizes[0])
    peak, _ = peak_of(lambda: payload.write_into([destination]))

    assert peak < 64 << 10 < obj.nbytes


@pytest.mark.parametrize("layout", ["C", "F", "strided"])
@pytest.mark.parametrize("way", ["loads", "to_pickle"])
def test_each_buffer_is_copied_once(layout, way):
    obj = LAYOUTS[layout](filled("f8", (64, 64, 64)))
    payload = oobpickle.dumps(obj)
    ways = {"loads": lambda: oobpickle.loads(payload), "to_pickle": payload.to_pickle}
    peak, _ = peak_of(ways[way])

    assert peak < 1.2 * obj.nbytes


DESTINATIONS = {
    "bytearray": bytearray,
    "memoryview": lambda n: memoryview(bytearray(n)),
    "middle of a bytearray": lambda n: memoryview(bytearray(n + 9))[3:-6],
    "array.array": lambda n: array("b", bytes(n)),
    "numpy": lambda n: np.zeros(n, "u1"),
    "numpy, two axes": lambda n: np.zeros((2, n // 8), "i4"),
    "ctypes": lambda n: (ctypes.c_double * (n // 8))(),
    "mmap": lambda n: memoryview(mmap.mmap(-1, n))[:n],
    "PickleBuffer": lambda n: pickle.PickleBuffer(bytearray(n)),
}


@pytest.mark.parametrize("kind", DESTINATIONS)
@pytest.mark.parametrize("n", [100, 10_000])
def test_any_writable_contiguous_memory_is_a_destination(kind, n):
    obj = [np.arange(n, dtype="f8"), np.arange(2 * n, dtype="c16")[::2]]
    payload = oobpickle.dumps(obj)
    destinations = [DESTINATIONS[kind](nbytes) for nbytes in payload.sizes]
    payload.write_into(destinations)

    assert [bytes(d) for d in map(memoryview, destinations)] == [a.tobytes() for a in obj]


def test_a_generator_is_no_problem_where_a_tuple_is_none():
    payload = small_payload()
    destinations = tuple(bytearray(n) for n in payload.sizes)
    payload.write_into(destinations)

    assert described(oobpickle.loads(payload, buffers=destinations)["a"]) == described(
        np.arange(64.0)
    )


WRONG = {
    "too few": lambda sizes: [bytearray(sizes[0])],
    "too many": lambda sizes: [bytearray(n) for n in (*sizes, 0)],
    "none": lambda sizes: [],
    "too short": lambda sizes: [bytearray(sizes[0]), bytearray(sizes[1] - 1)],
    "too long": lambda sizes: [bytearray(sizes[0]), bytearray(sizes[1] + 1)],
    "swapped": lambda sizes: [bytearray(sizes[1]), bytearray(sizes[0])],
    "empty": lambda sizes: [bytearray(sizes[0]), bytearray()],
    "read-only": lambda sizes: [bytearray(sizes[0]), bytes(sizes[1])],
    "strided": lambda sizes: [bytearray(sizes[0]), np.zeros(2 * sizes[1], "u1")[::2]],
    "Fortran": lambda sizes: [bytearray(sizes[0]), np.zeros((2, sizes[1] // 2), "u1", "F")],
    "no buffer": lambda sizes: [bytearray(sizes[0]), sizes[1]],
    "str": lambda sizes: [bytearray(sizes[0]), "x" * sizes[1]],
    "None": lambda sizes: [bytearray(sizes[0]), None],
    "released": lambda sizes: [bytearray(sizes[0]), released(sizes[1])],
}


def released(nbytes):
    view = memoryview(bytearray(nbytes))
    view.release()
    return view


@pytest.mark.parametrize("case", WRONG)
def test_wrong_destinations_are_refused_before_anything_is_written(case):
    payload = small_payload()
    destinations = WRONG[case](payload.sizes)
    with pytest.raises(PayloadError) as caught:
        payload.write_into(destinations)

    assert not any(any(d) for d in destinations if isinstance(d, bytearray))
    assert str(caught.value)


def test_the_error_names_position_and_both_sizes():
    with pytest.raises(PayloadError, match=r"destinations\[1\] has 7 bytes, buffer 1 has 1026"):
        small_payload().write_into([bytearray(512), bytearray(7)])


def raw(table):
    return table.view(f"V{table.itemsize}").tobytes()


def test_bytes_between_fields_arrive_too_as_in_plain_pickle():
    table = np.frombuffer(bytes(range(1, 241)) * 400, "i4,f8,i4").copy()
    for fields in (table[["f0", "f2"]], table[["f0", "f2"]].reshape(60, 100).T):
        payload = oobpickle.dumps(fields)
        destination = bytearray(b"\xee" * fields.nbytes)
        payload.write_into([destination])

        assert b"\xee" * 8 not in bytes(destination)
        assert raw(pickled(fields)) == raw(oobpickle.loads(payload))


# --- overlaps


A, B, C = (np.arange(1000.0) for _ in range(3))
SOURCES_AND_TARGETS = {
    "each at its own place": ([A, B], [A, B], False),
    "elsewhere": ([A, B], [C, np.zeros(1000)], False),
    "exchanged": ([A, B], [B, A], True),
    "one of another": ([A, B], [C, A], True),
    "a part": ([A[:100], B], [C[:100], A], True),
    "shifted": ([A[:500]], [A[1:501]], True),
    "neighbours": ([A[:500]], [A[500:]], False),
    "the last of many": (
        [C[i * 100 : i * 100 + 100] for i in range(10)],
        [A] * 9 + [C[:100]],
        True,
    ),
    "within a large one": ([A[400:500], B], [C[:100], A], True),
    "empty": ([A, B], [A, B[:0]], False),
}


@pytest.mark.parametrize("case", SOURCES_AND_TARGETS)
def test_it_is_known_whether_writing_would_change_what_is_still_to_be_read(case):
    sources, targets, expected = SOURCES_AND_TARGETS[case]

    assert oobpickle.dumps(sources).overlaps(targets) is expected


# --- to_bytes and from_bytes


def test_bytes_have_the_layout_that_the_docstring_draws():
    payload = small_payload()
    data = payload.to_bytes()
    magic, version, n_buffers, crc, zero, n_stream = struct.unpack_from("<8sIIIIQ", data)
    sizes = struct.unpack_from("<2Q", data, 32)
    first = -(-(48 + n_stream) // 64) * 64
    second = first + 512

    assert type(data) is bytes
    assert (magic, version, n_buffers, zero) == (b"OOBPAYLD", 1, 2, 0)
    assert (n_stream, sizes) == (len(payload.stream), (512, 1026))
    assert data[48 : 48 + n_stream] == payload.stream
    assert data[first:second] == np.arange(64.0).tobytes()
    assert data[second:] == np.arange(513, dtype="u2")[::-1].tobytes()
    assert crc == zlib.crc32(data[:16] + b"\0\0\0\0" + data[20:])


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda d: np.frombuffer(d, "u1")])
def test_buffers_read_from_bytes_are_slices_of_them(wrap):
    data = wrap(small_payload().to_bytes())
    payload = Payload.from_bytes(data)
    start = address_of(data)
    inside = [address_of(buffer) - start for buffer in payload.buffers]

    assert all(0 <= at < len(data) and at % 64 == 0 for at in inside)
    assert payload.sizes == [512, 1026]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_round_trip(layout):
    def cross(obj):
        return oobpickle.loads(oobpickle.dumps(obj).to_bytes())

    assert samples.differing(layout, cross) == {}


def test_bytes_made_of_read_bytes_are_the_same():
    data = small_payload().to_bytes()

    assert Payload.from_bytes(data).to_bytes() == data


def test_payloads_without_buffers_become_bytes_too():
    data = oobpickle.dumps({"a": [1, 2, "three"]}).to_bytes()

    assert oobpickle.loads(data) == {"a": [1, 2, "three"]}
    assert Payload.from_bytes(data).buffers == []


def test_bytes_cut_at_any_length_are_refused():
    data = small_payload().to_bytes()
    for n in range(len(data)):
        with pytest.raises(PayloadError, match="truncated"):
            Payload.from_bytes(data[:n])


@pytest.mark.parametrize("change", [1, 0x80, 0xFF])
def test_bytes_altered_anywhere_are_refused(change):
    data = bytearray(small_payload().to_bytes())
    for at in range(len(data)):
        data[at] ^= change
        with pytest.raises(PayloadError):
            oobpickle.loads(data)
        data[at] ^= change

    assert oobpickle.loads(data)["c"] is None


def test_bytes_with_more_at_the_end_are_refused():
    with pytest.raises(PayloadError, match="extended"):
        Payload.from_bytes(small_payload().to_bytes() + b"\0")


@pytest.mark.parametrize(
    "data", [b"", b"OOBPAYLD", bytes(32), bytes(100), pickle.dumps("x" * 100), b"\xff" * 1000]
)
def test_other_bytes_are_refused(data):
    with pytest.raises(PayloadError):
        oobpickle.loads(data)


def test_a_later_version_is_refused_with_both_numbers():
    data = bytearray(small_payload().to_bytes())
    struct.pack_into("<I", data, 8, 2)
    with pytest.raises(PayloadError, match=r"version 2, expected .* and 1"):
        Payload.from_bytes(data)


# --- to_pickle


@pytest.mark.parametrize("obj", [np.arange(1000), {"a": 1}], ids=["buffers", "none"])
def test_a_tail_comes_after_the_pickle_and_is_ignored(obj):
    payload = oobpickle.dumps(obj)
    whole = bytes(payload.to_pickle(tail=b"the tail"))

    assert whole == bytes(payload.to_pickle()) + b"the tail"
    np.testing.assert_equal(pickle.loads(whole), obj)


PROGRAM = """
import pickle, sys
sys.modules["oobpickle"] = None  # importing it fails, wherever it is installed
import numpy as np
obj = pickle.loads(sys.stdin.buffer.read())
assert all(a.flags.writeable for a in obj if type(a) is np.ndarray), obj
obj[0] += 1
sys.stdout.buffer.write(pickle.dumps(obj, 5))
"""


def test_an_ordinary_pickle_can_be_loaded_without_the_library():
    obj = [
        np.arange(1000.0),
        np.arange(2000.0).reshape(40, 50).T,
        np.arange(2000.0)[::2],
        np.arange(3.0),
        np.arange(1000).astype("M8[s]"),
        filled([("when", "M8[s]"), ("what", "f8")], (100,)),
        np.frombuffer(bytes(1000), "u1"),
        np.ma.masked_less(np.arange(100.0), 3),
        {"a": np.array(["x", None, np.ones(100)], object)},
    ]
    child = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", PROGRAM],
        input=oobpickle.dumps(obj).to_pickle(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    expected = pickled(obj)
    expected[0] += 1

    assert (child.returncode, child.stderr.decode()) == (0, "")
    assert described(expected) == described(pickle.loads(child.stdout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_ordinary_pickle_holds_the_same_value(layout):
    def cross(obj):
        return pickle.loads(oobpickle.dumps(obj).to_pickle())

    assert samples.differing(layout, cross) == {}


def test_an_ordinary_pickle_keeps_what_is_shared():
    whole = np.arange(1000.0)
    first, second, third = pickle.loads(oobpickle.dumps([whole, whole, whole[:500]]).to_pickle())

    assert first is second
    assert not np.shares_memory(first, third)


def test_an_ordinary_pickle_without_buffers_is_one_too():
    whole = oobpickle.dumps({"a": 1}).to_pickle()

    assert pickle.loads(whole) == {"a": 1}


def test_an_ordinary_pickle_of_many_buffers():
    obj = [np.full(64 + i, i, "f8") for i in range(2000)]
    arrived = pickle.loads(oobpickle.dumps(obj).to_pickle())

    assert [(a[0], a.size) for a in obj] == [(a[0], a.size) for a in arrived]


def test_an_ordinary_pickle_of_read_bytes():
    payload = Payload.from_bytes(small_payload().to_bytes())

    assert bytes(payload.to_pickle()) == bytes(small_payload().to_pickle())
