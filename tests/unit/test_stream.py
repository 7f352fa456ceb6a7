"""The stream: what the pickler wrote, in pieces, the large ones uncopied."""

import io
import pickle

import pytest

import oobpickle
from oobpickle import ResizedError
from oobpickle._stream import Stream

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


def written(obj, **options):
    stream = Stream(**options)
    pickle.Pickler(stream, 5).dump(obj)
    return stream


@pytest.mark.parametrize("obj", OBJECTS.values(), ids=list(OBJECTS))
@pytest.mark.parametrize("copying", [False, True])
def test_the_pieces_are_the_pickle(obj, copying):
    stream = written(obj, copying=copying)
    memory = bytearray(b"\xee" * stream.nbytes)
    stream.write_into(memoryview(memory))

    assert pickle.dumps(obj, 5) == bytes(stream)
    assert bytes(stream) == bytes(memory) == b"".join(stream.parts())
    assert stream.nbytes == len(memory)
    assert obj == pickle.loads(memory)


def test_large_bytes_are_the_very_object():
    stream = written([LARGE, 1, {"again": LARGE}])

    assert [part is LARGE for part in stream.parts()] == [False, True, False]


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


def test_a_bytearray_may_be_resized_by_others_and_that_is_seen():
    memory = bytearray(LARGE)
    stream = written([memory])
    memory += b"more"
    for write in (bytes, lambda s: s.write_into(memoryview(bytearray(s.nbytes))), Stream.pinned):
        with pytest.raises(ResizedError, match="102400 bytes had 102404"):
            write(stream)


def test_what_is_pinned_keeps_its_size():
    memory = bytearray(LARGE)
    pinned = written([memory]).pinned()
    with pytest.raises(BufferError):
        memory.append(1)

    assert pickle.loads(bytes(pinned)) == [LARGE]


def test_a_buffer_that_stays_in_band_has_the_content_that_it_had():
    memory = bytearray(LARGE)
    stream = Stream()
    pickle.Pickler(stream, 5, buffer_callback=lambda _: True).dump(pickle.PickleBuffer(memory))
    memory[:3] = b"xyz"

    assert LARGE == pickle.loads(bytes(stream))


def test_pieces_that_are_there_already_come_first():
    stream = Stream([b"\x80\x05", memoryview(b"N")])
    stream.write(b".")

    assert (4, b"\x80\x05N.") == (stream.nbytes, bytes(stream))


def test_a_payload_joins_its_stream_only_when_asked():
    payload = oobpickle.dumps([LARGE, bytearray(LARGE), "x" * 100_000])
    whole = pickle.dumps([LARGE, bytearray(LARGE), "x" * 100_000], 5)

    assert (whole, len(whole)) == (payload.stream, payload.stream_nbytes)
    assert len(whole) == payload.nbytes
    assert sum(part is LARGE for part in payload.pickle_parts(payload.scratch())) == 1
    assert pickle.load(io.BytesIO(payload.to_pickle())) == pickle.loads(whole)
