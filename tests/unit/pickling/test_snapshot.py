"""Snapshots: what everything held at one moment, and that it is the ordinary pickle."""

import array
import gc
import multiprocessing
import pickle
import struct
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest

import oobpickle
from oobpickle import ResizedError
from oobpickle._pickling import snapshot
from oobpickle._pickling.resizable import Resizable
from oobpickle._pickling.snapshot import Snapshot, taken

MIB = 1 << 20


def objects():
    big = np.random.default_rng(1).integers(0, 256, 3 * MIB, np.uint8)
    records = np.zeros(1000, [("a", "i1"), ("b", "f8")])
    records["b"] = np.arange(1000)
    aligned = np.zeros((300, 40), np.dtype([("a", "i1"), ("b", "f8")], align=True))
    aligned.view("u1")[:] = 7  # between the fields too
    return {
        "contiguous": big,
        "strided": big.reshape(1024, -1)[:, ::3],
        "negative": big[::-2],
        "fortran": np.asfortranarray(big[: 2 * MIB].reshape(1024, -1)),
        "axes": big.reshape(128, 64, -1).transpose(1, 0, 2),
        "dates": big[: 2 * MIB].view("datetime64[s]")[::2],
        "other order": big[:80_000].view(">f4")[::3],
        "text": np.array(["a", "bcd"] * 1000)[::2],
        "records": [records, records[::3]],
        "records with gaps": [aligned, aligned[::2], aligned[:, ::2]],
        "one row": big.reshape(1, -1),
        "overlapping": [big[:MIB], big[100 : 2 * MIB], big[::2]],
        "small ones": [big[start : start + 600] for start in range(0, MIB, 1000)],
        "empty": [np.empty((0, 3)), big[:0], np.empty(3, "V0"), big],
        "no buffers": [b"x" * MIB, "y" * MIB],
        "resizable": [bytearray(big), array.array("d", big[:1000]), b"z" * MIB],
    }


OBJECTS = objects()


@pytest.fixture(params=list(OBJECTS))
def obj(request):
    return OBJECTS[request.param]


@pytest.fixture(params=[1 << 62, 1 << 12], ids=["small", "large"])
def how(request, monkeypatch):
    """Make every message of one kind: in one piece, or in many steps."""
    monkeypatch.setattr(snapshot, "_STEP_NBYTES", request.param)


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(snapshot, "_STEP_NBYTES", 1 << 12)


def equal(one, other):
    return oobpickle.dumps(one).to_bytes() == oobpickle.dumps(other).to_bytes()


@pytest.fixture(params=[(2, 3), (2, 4)], ids=["NumPy with the GIL", "without"])
def numpy_version(request, monkeypatch):
    ours = tuple(map(int, np.__version__.split(".")[:2]))
    monkeypatch.setattr(
        snapshot, "_NUMPY_GIVES_UP_GIL", (0, 0) if request.param == (2, 4) else (ours[0], 99)
    )


def test_it_is_the_ordinary_pickle(obj, how, numpy_version):
    whole = oobpickle.dumps(obj).to_pickle(head=b"\x80\x05N0", tail=b"\0tail")

    assert bytes(whole).endswith(b"\0tail")
    assert equal(obj, pickle.loads(whole))


def test_both_ways_are_the_same(obj, monkeypatch):
    payload = oobpickle.dumps(obj)
    small = payload.to_pickle(tail=b"tail")
    monkeypatch.setattr(snapshot, "_STEP_NBYTES", 1 << 12)
    large = payload.to_pickle(tail=b"tail")

    assert type(small.obj) is np.ndarray
    assert type(large.obj) is Snapshot
    assert small == large


def test_it_is_what_the_object_was(how):
    arrays = [np.ones(MIB, np.uint8), np.ones((1024, 1024), np.uint8)[:, ::2]]
    memory = bytearray(b"\1") * MIB
    whole = oobpickle.dumps([*arrays, memory]).to_pickle()
    for changed in arrays:
        changed[:] = 2
    memory[:] = bytes(MIB)

    arrived = pickle.loads(whole)

    assert all(np.all(np.frombuffer(part, np.uint8) == 1) for part in map(bytes, arrived))


def written(message):
    parts = []
    message.obj.write_to(lambda part: parts.append(bytes(part)))
    return b"".join(parts)


def test_what_is_written_is_framed_as_multiprocessing_does(obj, large):
    message = oobpickle.dumps(obj).to_pickle()
    expected = bytes(message)

    assert written(message) == struct.pack("!i", len(expected)) + expected


def test_beyond_two_gib_too():
    assert snapshot._framing((1 << 31) - 1) == struct.pack("!i", (1 << 31) - 1)
    assert snapshot._framing(1 << 31) == struct.pack("!iQ", -1, 1 << 31)


def resident_nbytes(view):
    """Of memory whose pages hold something other than zeros."""
    return sum(any(view[at : at + 4096]) for at in range(0, len(view), 4096)) * 4096


def test_what_is_written_is_given_back_at_once(large):
    message = oobpickle.dumps(np.ones(MIB, np.uint8)).to_pickle()
    left = []
    message.obj.write_to(lambda _: left.append(resident_nbytes(message)))

    assert len(left) > MIB >> 12
    assert max(left) == left[1] > MIB
    assert all(one - other == 1 << 12 for one, other in pairwise(left[1:]))
    assert resident_nbytes(message) == 0


def test_memory_that_cannot_be_given_back_is_kept(large):
    class Locked(Snapshot):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    memory = Locked.fresh(100_003)
    memory.write(b"x" * 100_000 + b"end")

    assert written(memoryview(memory))[4:] == b"x" * 100_000 + b"end"


def test_no_memory_is_a_memory_error():
    with pytest.raises(MemoryError, match="no memory to copy 4611686018427387904 bytes"):
        Snapshot.fresh(1 << 62)


@pytest.mark.parametrize("change", [lambda m: m.append(1), lambda m: m.pop(), bytearray.clear])
@pytest.mark.parametrize("more", [b"", b"x" * MIB])
def test_what_was_resized_is_refused(how, change, more):
    memory = bytearray(100_000)
    parts = [b"head", Resizable(memory, 100_000), more, b"tail"]
    change(memory)

    with pytest.raises(ResizedError, match="a bytearray of 100000 bytes had"):
        taken(parts)


def test_sizes_that_change_so_that_their_sum_stays_are_seen(how):
    one, other = bytearray(70_000), bytearray(70_000)
    parts = [Resizable(one, 70_000), Resizable(other, 70_000)]
    one.append(1)
    other.pop()

    with pytest.raises(ResizedError, match="a bytearray of 70000 bytes had 70001"):
        taken(parts)


def test_nothing_is_kept_of_what_was_copied(how):
    memory = np.ones(MIB, np.uint8)
    n_references = sys.getrefcount(memory)
    message = oobpickle.dumps([memory, memory[::2]]).to_pickle()
    gc.collect()

    assert sys.getrefcount(memory) == n_references
    assert len(message) > MIB


def test_a_bytearray_can_be_resized_afterwards(how):
    memory = bytearray(MIB)
    message = oobpickle.dumps([memory]).to_pickle()
    memory.append(1)

    assert len(pickle.loads(message)[0]) == MIB


def test_a_connection_without_the_library_reads_it(obj, large):
    read, write = multiprocessing.Pipe(duplex=False)
    with read, write:
        message = oobpickle.dumps(obj).to_pickle(tail=b"tail")
        thread = threading.Thread(target=message.obj.write_to, args=[write._send])
        thread.start()
        assert equal(obj, read.recv())
        thread.join()
