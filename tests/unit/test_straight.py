"""Straight messages: what any Python would load, written and read without a copy of the whole."""

import gc
import io
import multiprocessing
import os
import pickle
import struct
import threading

import numpy as np
import pytest

import oobpickle
from oobpickle import _straight
from oobpickle._payload import PICKLE_START
from oobpickle._straight import Received, Straight, receive

MIB = 1 << 20
TAIL = b"\0tail"


def objects():
    big = np.random.default_rng(1).integers(0, 256, 3 * MIB, np.uint8)
    records = np.zeros(1000, [("a", "i1"), ("b", "f8")])
    records["b"] = np.arange(1000)
    return {
        "contiguous": big,
        "strided": big.reshape(1024, -1)[:, ::3],
        "negative": big[::-2],
        "fortran": np.asfortranarray(big[: 2 * MIB].reshape(1024, -1)),
        "dates": big[: 2 * MIB].view("datetime64[s]")[::2],
        "records": [records, records[::3]],
        "one row": big.reshape(1, -1),
        "small ones": [big[start : start + 600] for start in range(0, MIB, 1000)],
        "empty": [np.empty((0, 3)), big[:0], big],
        "no buffers": [b"x" * MIB, "y" * MIB],
    }


OBJECTS = objects()


@pytest.fixture(params=list(OBJECTS))
def obj(request):
    return OBJECTS[request.param]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("oobpickle._payload._PART_NBYTES", 10_000)


def equal(one, other):
    """Compare what a payload of each would hold."""
    return oobpickle.dumps(one).to_bytes() == oobpickle.dumps(other).to_bytes()


def sent(message):
    """Return what is written, without the length before it."""
    parts = []
    message.write(lambda part: parts.append(bytes(part)))
    whole = b"".join(parts)
    assert struct.unpack("!i", whole[:4]) == (len(whole) - 4,)
    return whole[4:]


def through_a_pipe(data, n_announced=None):
    read, write = os.pipe()
    with open(read, "rb") as reader, open(write, "wb", buffering=0) as writer:
        thread = threading.Thread(target=lambda: (writer.write(data), writer.close()))
        thread.start()
        try:
            return receive(reader.fileno(), len(data) if n_announced is None else n_announced)
        finally:
            thread.join()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("head", [b"", b"\x80\x05N0"])
def test_what_is_written_is_the_ordinary_pickle(obj, head, copied, small_parts, monkeypatch):
    monkeypatch.setattr(_straight, "_COPIED_NBYTES", 100_000)
    payload = oobpickle.dumps(obj)
    message = Straight.make(payload, 37, copied=copied, head=head, tail=TAIL)

    whole = sent(message)

    assert bytes(payload.to_pickle(head=head, tail=TAIL)) == whole
    assert len(message) == 37
    assert equal(obj, pickle.loads(whole))


@pytest.mark.parametrize(("copied", "expected"), [(True, 1), (False, 2)])
def test_a_copy_is_what_the_object_was(copied, expected):
    array = np.ones(MIB, np.uint8)
    message = Straight.make(oobpickle.dumps(array), 37, copied=copied)
    array[:] = 2

    assert (pickle.loads(sent(message)) == expected).all()


def test_no_memory_for_a_copy_is_a_memory_error(monkeypatch):
    monkeypatch.setattr(_straight, "_COPIED_NBYTES", 1 << 62)

    with pytest.raises(MemoryError, match="no memory to copy"):
        Straight.make(oobpickle.dumps(OBJECTS["contiguous"]), 37, copied=True)


def test_what_arrives_is_loaded_without_the_whole_in_between(obj):
    data = bytes(oobpickle.dumps(obj).to_pickle(tail=TAIL))

    message = through_a_pipe(data)

    assert type(message) is Received
    assert message.tail == TAIL
    with message.getbuffer() as view:
        assert len(view) < 100
        arrived = pickle.loads(view)
    assert equal(obj, arrived)


def test_arrays_that_arrive_are_writable_and_their_own(obj):
    data = bytes(oobpickle.dumps([obj, OBJECTS["contiguous"]]).to_pickle())

    arrived = pickle.loads(through_a_pipe(data).getbuffer())[1]

    arrived[:] = 0
    assert not arrived.any()


def test_whoever_asks_for_the_bytes_gets_them(obj):
    data = bytes(oobpickle.dumps(obj).to_pickle(tail=TAIL))

    assert data == through_a_pipe(data).getvalue()
    message = through_a_pipe(data)
    assert len(data) == message.tell()
    message.seek(0)
    assert data == message.read()


def test_a_message_is_loaded_once():
    stub = bytes(through_a_pipe(bytes(oobpickle.dumps(OBJECTS["empty"]).to_pickle())).getbuffer())
    with pytest.raises(oobpickle.StaleEnvelopeError):  # nobody has the message any more
        pickle.loads(stub)

    message = through_a_pipe(bytes(oobpickle.dumps(OBJECTS["empty"]).to_pickle()))
    pickle.loads(message.getbuffer())
    with pytest.raises(oobpickle.StaleEnvelopeError):
        pickle.loads(message.getbuffer())
    with pytest.raises(oobpickle.StaleEnvelopeError):
        message.getvalue()


def test_nothing_is_kept_of_a_message_that_nobody_loads():
    through_a_pipe(bytes(oobpickle.dumps(OBJECTS["contiguous"]).to_pickle()))
    gc.collect()
    assert not _straight._arrived


WHOLE = bytes(oobpickle.dumps([np.arange(300_000)] * 2).to_pickle(tail=TAIL))
AT = len(PICKLE_START)
OTHERS = {
    "another pickle": pickle.dumps(list(range(300_000))),
    "another buffer's length": WHOLE[: AT + 1] + struct.pack("<Q", 1 << 40) + WHOLE[AT + 9 :],
    "another middle": WHOLE.replace(b"tsNtb\x8e", b"tsNtb\x8f"),
    "another stream's length": WHOLE[: WHOLE.index(b"tsNtb\x8e") + 6] + bytes([255] * 8) + TAIL,
    "another end": WHOLE.replace(b"\x85R." + TAIL, b"\x86R." + TAIL),
    "only the beginning": WHOLE[: AT + 3],
    "less than the beginning": WHOLE[:10],
    "nothing": b"",
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=list(OTHERS))
def test_other_messages_arrive_as_they_are(data):
    message = through_a_pipe(data)

    assert type(message) is io.BytesIO
    assert (data, len(data)) == (message.getvalue(), message.tell())


@pytest.mark.parametrize("n", [0, 10, AT, AT + 5, AT + 100, len(WHOLE) - 20, len(WHOLE) - 1])
def test_an_end_of_file_is_an_error_as_ever(n):
    with pytest.raises(EOFError if n == 0 else OSError):
        through_a_pipe(WHOLE[:n], len(WHOLE))


def test_beyond_two_gib_the_length_is_written_as_multiprocessing_does(monkeypatch):
    class Big(oobpickle.Payload):
        def pickle_nbytes(self, **_):
            return (1 << 31) + 5

        def pickle_parts(self, *_, **__):
            yield b"part"

    parts = []
    Straight.make(Big(b"", [], []), 37).write(parts.append)

    assert b"".join(map(bytes, parts)) == struct.pack("!iQ", -1, (1 << 31) + 5) + b"part"


def test_a_connection_without_the_library_reads_it(obj):
    read, write = multiprocessing.Pipe(duplex=False)
    with read, write:
        message = Straight.make(oobpickle.dumps(obj), 37, tail=TAIL)
        thread = threading.Thread(target=message.write, args=[write._send])
        thread.start()
        assert equal(obj, read.recv())
        thread.join()
