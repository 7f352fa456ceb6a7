"""Large in-band messages: read without a copy of the whole."""

import gc
import io
import os
import pickle
import struct
import threading

import numpy as np
import pytest

import oobpickle
from oobpickle._pickling import in_band
from oobpickle._pickling.in_band import Received, receive
from oobpickle._pickling.payload import PICKLE_START

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


def equal(one, other):
    """Compare what a payload of each would hold."""
    return oobpickle.dumps(one).to_bytes() == oobpickle.dumps(other).to_bytes()


def through_a_pipe(data, n_announced=None):
    read, write = os.pipe()
    with open(read, "rb") as reader, open(write, "wb", buffering=0) as writer:
        thread = threading.Thread(target=lambda: (writer.write(data), writer.close()))
        thread.start()
        try:
            return receive(reader.fileno(), len(data) if n_announced is None else n_announced)
        finally:
            thread.join()


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


class RefusesToLoad:
    def __reduce__(self):
        return int, ("no number",)


def test_an_error_that_is_kept_holds_nothing_of_its_message():
    data = bytes(oobpickle.dumps([np.ones(MIB), RefusesToLoad()]).to_pickle())
    message = through_a_pipe(data, len(data))
    with pytest.raises(ValueError, match="no number") as caught:
        pickle.loads(message.getbuffer())

    frames = [entry.frame.f_locals for entry in caught.traceback if entry.name == "take"]
    assert [set(names) & {"stream", "buffers"} for names in frames] == [set()]


def test_nothing_is_kept_of_a_message_that_nobody_loads():
    through_a_pipe(bytes(oobpickle.dumps(OBJECTS["contiguous"]).to_pickle()))
    gc.collect()
    assert not in_band._arrived


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
