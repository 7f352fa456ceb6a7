"""Memory that its owner may resize: held without a buffer, copied in one step."""

import array
import pickle

import pytest

from oobpickle import ResizedError
from oobpickle._resizable import Resizable


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
