"""Python's own memory: out of band, and as its own pickling delivers it."""

import array
import ctypes
import io
import pickle

import pytest

import oobpickle
import samples
from messages import message_of
from oobpickle._pickling.in_band import as_pickle
from oobpickle.testing import check_roundtrip

NBYTES = 100_000
DATA = bytes(range(250)) * 400


class Bytes(bytes):
    pass


class Checked(bytes):
    """Sees what it is made of."""

    def __new__(cls, data):
        if type(data) is not bytes:
            raise TypeError(type(data))
        return super().__new__(cls, data)


class Stated(bytes):
    def __getstate__(self):
        return {"n": len(self)}

    def __setstate__(self, state):
        self.seen = state


class Slotted(bytearray):
    __slots__ = ("name",)


class Bytearray(bytearray):
    def __init__(self, data):
        if type(data) is not bytes:
            raise TypeError(type(data))
        super().__init__(data)


class Array(array.array):
    pass


class Text(str):
    pass


class Reduced(bytes):
    def __reduce__(self):
        return Reduced, (bytes(self),)


class Record(ctypes.Structure):
    _fields_ = (("items", ctypes.c_double * 12_500),)


class Pointing(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char_p), ("items", ctypes.c_double * 12_500))


def named(obj, **attributes):
    for name, value in attributes.items():
        setattr(obj, name, value)
    return obj


def record():
    found = named(Record(), note="mine")
    found.items[:] = [i / 3 for i in range(12_500)]
    return found


OUT_OF_BAND = {
    "bytes": named(Bytes(DATA), unit="m"),
    "bytes, own __new__": Checked(DATA),
    "bytes, own state": Stated(DATA),
    "bytearray": Bytearray(DATA),
    "bytearray, slots": named(Slotted(DATA), name="mine"),
    "array": array.array("d", DATA),
    "array of shorts": array.array("h", DATA),
    "array, subclass": named(Array("H", DATA), unit="m"),
    "ctypes": record(),
}
#: In the stream, which goes out of band as a whole; the pickler copies these once before that.
IN_STREAM = {
    "bytes": DATA,
    "bytearray": bytearray(DATA),
    "text": "text" * 25_000,
    "text, not ASCII": "\N{SNOWMAN}\ud800" * 25_000,
    "text, subclass": named(Text("text" * 25_000), unit="m"),
    "own reducer": Reduced(DATA),
    "file": io.BytesIO(DATA),
    "number": 1 << 800_000,
    "many small": list(range(300_000)),
}


@pytest.mark.parametrize("name", OUT_OF_BAND)
def test_it_travels_out_of_band_and_arrives_as_with_pickle(name):
    obj = OUT_OF_BAND[name]
    payload = oobpickle.dumps(obj)

    assert [NBYTES] == payload.sizes
    assert samples.address_of(obj) == samples.address_of(payload.buffers[0])
    assert len(payload.stream) < 300
    check_roundtrip([obj, obj])


@pytest.mark.parametrize("name", IN_STREAM)
def test_what_is_in_the_stream_arrives_as_with_pickle(name):
    check_roundtrip([IN_STREAM[name], IN_STREAM[name]])


@pytest.mark.parametrize("kind", [Bytes, Bytearray, lambda data: array.array("b", data)])
def test_small_ones_stay_in_the_stream(kind):
    payload = oobpickle.dumps(kind(DATA[:60_000]))

    assert payload.sizes == []
    check_roundtrip(kind(DATA[:60_000]))


def test_what_holds_pointers_is_refused_as_ever():
    with pytest.raises(ValueError) as plain:
        pickle.dumps(Pointing(b"text"), 5)
    with pytest.raises(ValueError) as ours:
        oobpickle.dumps(Pointing(b"text"))

    assert str(plain.value) == str(ours.value)


@pytest.mark.parametrize("obj", [bytearray(DATA), Slotted(DATA), array.array("b", DATA)])
def test_it_cannot_be_resized_while_a_payload_refers_to_it(obj):
    payload = oobpickle.dumps(obj)
    with pytest.raises(BufferError):
        obj.append(1)
    assert payload.sizes == [len(DATA)]

    del payload
    obj.append(1)


@pytest.mark.parametrize("obj", [bytearray(DATA), Slotted(DATA), array.array("b", DATA)])
def test_it_can_be_resized_once_it_was_taken_apart_for_a_channel(obj):
    message = message_of(obj)
    obj[0] = 99
    obj.append(1)

    arrived = pickle.loads(as_pickle(message))
    assert type(arrived) is type(obj)
    assert bytes(arrived) == DATA


def test_a_cycle_through_it_stays():
    obj = named(Bytes(DATA))
    obj.me = [obj]
    check_roundtrip(obj)
