"""The stream: what the pickler wrote, in pieces, the large ones uncopied."""

import io
import pickle

import numpy as np
import pytest

import oobpickle
from oobpickle import ResizedError
from oobpickle._pickling.serializer import serialize
from oobpickle._pickling.stream import Pieces, Stream, joined

KIB = 1 << 10
LARGE = bytes(range(256)) * 400  # more than a frame

OBJECTS = {
    "small": [1, "a", b"b"],
    "large bytes": LARGE,
    "large bytearray": bytearray(LARGE),
    "large str": "a" * 100_000,
    "large str, not ASCII": "\N{SNOWMAN}\ud800" * 100_000,
    "several": [LARGE, 1, bytearray(LARGE), {"a": LARGE, "b": "x" * 70_000}, bytearray(5)],
    "many small": list(range(200_000)),
    "of the size of a frame": [bytes(64 * KIB + n) for n in (-1, 0, 1)],
    "a large number": 1 << 2_000_000,
}


def written(obj, copying=False):
    file = Stream() if copying else Pieces()
    pickle.Pickler(file, 5).dump(obj)
    return file if copying else Stream.of(file, {})


def content(piece):
    return getattr(piece, "owner", piece)


@pytest.mark.parametrize("obj", OBJECTS.values(), ids=list(OBJECTS))
@pytest.mark.parametrize("copying", [False, True])
def test_the_pieces_are_the_pickle(obj, copying):
    stream = written(obj, copying=copying)
    memory = bytearray(b"\xee" * stream.nbytes)
    stream.write_into(memoryview(memory))

    assert pickle.dumps(obj, 5) == bytes(stream)
    assert bytes(stream) == bytes(memory) == b"".join(map(content, stream.pieces))
    assert stream.nbytes == len(memory)
    assert obj == pickle.loads(memory)


def test_large_bytes_are_the_very_object():
    stream = written([LARGE, 1, {"again": LARGE}])

    assert [piece is LARGE for piece in stream.pieces] == [False, True, False]


def test_a_large_bytearray_is_not_copied_before_it_is_written():
    memory = bytearray(LARGE)
    stream = written([memory])
    memory[:3] = b"xyz"

    assert pickle.loads(bytes(stream)) == [b"xyz" + LARGE[3:]]


def test_a_bytearray_whose_content_is_taken_at_once_may_change():
    memory = bytearray(LARGE)
    stream = written([memory], copying=True)
    memory.clear()

    assert pickle.loads(bytes(stream)) == [LARGE]


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_three_pieces_are_joined_as_a_stream_would(kind):
    obj = [1, kind(b"abc" * 30_000), "end"]
    pieces = Pieces()
    pickle.Pickler(pieces, 5).dump(obj)

    assert [bytes, kind, bytes] == [*map(type, pieces)]
    assert pickle.dumps(obj, 5) == joined(*pieces) == bytes(Stream.of(pieces, {}))


def test_joining_a_bytearray_that_was_resized_is_refused():
    pieces = Pieces()
    pickle.Pickler(pieces, 5).dump(bytearray(b"abc" * 30_000))
    pieces[1].append(1)
    with pytest.raises(ResizedError, match=r"bytearray of 90000 bytes had 90001"):
        joined(*pieces)


def test_a_bytearray_may_be_resized_by_others_and_that_is_seen():
    memory = bytearray(LARGE)
    stream = written([memory])
    memory += b"more"
    for write in (bytes, lambda s: s.write_into(memoryview(bytearray(s.nbytes)))):
        with pytest.raises(ResizedError, match="102400 bytes had 102404"):
            write(stream)


def test_a_buffer_that_stays_in_band_has_the_content_that_it_had():
    memory = bytearray(LARGE)
    stream = Stream()
    pickle.Pickler(stream, 5, buffer_callback=lambda _: True).dump(pickle.PickleBuffer(memory))
    memory[:3] = b"xyz"

    assert LARGE == pickle.loads(bytes(stream))


class _Meanwhile:
    """What happens to the memory after it was pickled and before the message is complete."""

    def __init__(self, change):
        self.change = change

    def __reduce__(self):
        self.change()
        return int, ()


@pytest.mark.parametrize("obj", OBJECTS.values(), ids=list(OBJECTS))
def test_what_dumps_collects_is_the_pickle(obj):
    payload = oobpickle.dumps([obj, 1])
    memory = bytearray(payload.stream_nbytes)
    payload.write_stream_into(memoryview(memory))

    assert pickle.dumps([obj, 1], 5) == payload.stream == memory


def test_a_bytearray_that_a_later_reducer_resizes_is_noticed():
    memory = bytearray(LARGE)
    payload = oobpickle.dumps([memory, _Meanwhile(lambda: memory.extend(b"more"))])

    with pytest.raises(ResizedError, match="102400 bytes had 102404"):
        payload.to_bytes()


@pytest.mark.parametrize("readonly", [True, False])
def test_a_buffer_in_band_may_be_used_again_by_a_later_reducer(readonly):
    memory = bytearray(LARGE)
    view = memoryview(memory).toreadonly() if readonly else memory
    change = _Meanwhile(lambda: memory.__setitem__(slice(3), b"xyz"))
    payload = serialize([pickle.PickleBuffer(view), change], {}, 1 << 20)

    assert payload.sizes == []
    assert [LARGE, 0] == pickle.loads(payload.stream)


@pytest.mark.parametrize("copying", [False, True])
def test_a_buffer_in_band_keeps_the_order_of_its_memory(copying):
    array = np.asfortranarray(np.arange(100_000, dtype=np.uint8).reshape(100, -1))
    buffer = pickle.PickleBuffer(array)
    payload = serialize([buffer, 1], {}, 1 << 20, copying=copying)

    assert pickle.loads(payload.stream) == pickle.loads(pickle.dumps([buffer, 1], 5))


def test_pieces_that_are_there_already_come_first():
    stream = Stream([b"\x80\x05", memoryview(b"N")])
    stream.write(b".")

    assert (4, b"\x80\x05N.") == (stream.nbytes, bytes(stream))


def test_a_payload_joins_its_stream_only_when_asked():
    payload = oobpickle.dumps([LARGE, bytearray(LARGE), "x" * 100_000])
    whole = pickle.dumps([LARGE, bytearray(LARGE), "x" * 100_000], 5)

    assert (whole, len(whole)) == (payload.stream, payload.stream_nbytes)
    assert len(whole) == payload.nbytes
    assert pickle.load(io.BytesIO(payload.to_pickle())) == pickle.loads(whole)
