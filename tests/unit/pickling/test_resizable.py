"""Memory that its owner may resize: held without a buffer, copied in one step."""

import array
import multiprocessing
import pickle

import pytest

import oobpickle
from oobpickle import ResizedError
from oobpickle._pickling.resizable import Resizable
from oobpickle._pickling.serializer import serialize


@pytest.mark.parametrize("owner", [bytearray(b"abcd" * 5), array.array("H", range(10))])
def test_its_bytes_are_copied(owner):
    memory = bytearray(20)
    Resizable(owner, 20).copy_into(memoryview(memory))

    assert bytes(owner) == bytes(memory)


@pytest.mark.parametrize("owner", [bytearray(8), array.array("d", [1.0])])
def test_nobody_is_kept_from_resizing_it(owner):
    held = Resizable(owner, 8)
    owner.append(1)
    with pytest.raises(ResizedError, match=f"a {type(owner).__name__} of 8 bytes had "):
        held.copy_into(memoryview(bytearray(8)))
    owner.pop()
    held.copy_into(memoryview(bytearray(8)))
    owner.append(1)  # nothing is held afterwards either


def test_while_its_bytes_are_looked_at_it_keeps_its_size():
    owner = bytearray(8)
    raw = Resizable(owner, 8).raw()
    with pytest.raises(BufferError):
        owner.append(1)

    assert raw.readonly is False
    assert pickle.PickleBuffer(owner).raw().nbytes == raw.nbytes


class Resizes:
    """Stands for another thread: resizes what was taken apart a moment before."""

    def __init__(self, other):
        self.other = other
        self.n_calls = 0

    def __reduce__(self):
        self.n_calls += 1
        if self.n_calls == 1:
            self.other += self.other[:8]
        return list, ()


@pytest.mark.parametrize(
    "make",
    [lambda: bytearray(b"ab" * 500_000), lambda: array.array("d", bytes(1_000_000))],
    ids=["bytearray", "array"],
)
def test_what_is_resized_meanwhile_arrives_whole(make):
    obj, expected = make(), make()
    expected += expected[:8]
    resizes = Resizes(obj)
    with oobpickle.enabled() as arena:
        queue = multiprocessing.SimpleQueue()
        queue.put([obj, resizes])
        arrived = queue.get()
        queue.close()

        assert arena.statistics().n_messages_out_of_band == 1
        assert arena.statistics().n_blocks["leased"] == 0

    assert [expected, []] == arrived
    assert resizes.n_calls == 2


def test_what_is_resized_arrives_whole_when_something_else_crosses_by_value():
    def triple(n):
        return 3 * n

    content = bytearray(b"ab" * 50_000)
    obj = [triple, content, Resizes(content)]
    with pytest.raises(ResizedError):  # upon which a connection makes another attempt
        serialize(obj, {}, 1 << 20, by_value=True)
    payload = serialize(obj, {}, 1 << 20, by_value=True, copying=True)
    function, arrived, _ = oobpickle.loads(payload)

    assert (6, b"ab" * 50_004) == (function(2), arrived)


def test_an_error_that_is_kept_keeps_nobody_from_resizing_again():
    """While a message is taken apart for the second time, the traceback of the first is there."""
    owner = bytearray(9)
    with pytest.raises(ResizedError) as error:
        Resizable(owner, 8).raw()
    owner.append(1)

    assert error.value.__traceback__ is not None
    assert len(owner) == 10
