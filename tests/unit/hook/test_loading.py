"""Loading that fails: the numbers of a task or result are read from every form of a message."""

import multiprocessing
import multiprocessing.pool
import os
import pickle
import sys

import numpy as np
import pytest

import oobpickle
from internals import inner
from messages import envelope_of, message_of
from oobpickle import _envelope
from oobpickle._hook import invitations, loading
from oobpickle._hook.loading import Substitute, numbers_in
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._pickling.in_band import Received, as_pickle, receive

BIG = np.ones(1 << 18)


def envelope(obj):
    arena = SharedArena.create(Options(capacity=64 << 20))
    try:
        return bytes(envelope_of(obj, arena))
    finally:
        inner(arena).close()
        assert inner(arena).try_destroy()


def in_band(obj):
    data = bytes(oobpickle.dumps(obj).to_pickle(tail=b"tail"))
    read, write = os.pipe()
    if os.fork() == 0:
        with open(write, "wb") as writer:
            writer.write(data)
        os._exit(0)
    os.close(write)
    try:
        message = receive(read, len(data))
    finally:
        os.close(read)
        os.wait()
    assert type(message) is Received
    KEPT.append(message)
    return message.getbuffer()


KEPT = []
WAYS = {
    "plain, protocol 4": lambda obj: pickle.dumps(obj, 4),
    "plain, protocol 2": lambda obj: pickle.dumps(obj, 2),
    "small": lambda obj: oobpickle.dumps(obj).stream,
    "in-band": lambda obj: oobpickle.dumps(obj).to_pickle(tail=b"\0tail"),
    "with an invitation": lambda obj: as_pickle(
        message_of(obj), head=invitations.prefix(bytes(32))
    ),
    "small, with an invitation": lambda obj: invitations.prefix(bytes(32)) + pickle.dumps(obj),
    "envelope": envelope,
    "envelope of a large stream": lambda obj: envelope((*obj, "x" * 10_000)),
    "in-band, read": in_band,
}
ENDS = {"result": ((True, BIG),), "task": (len, (BIG,), {})}


@pytest.mark.parametrize("numbers", [(0, 0), (255, 3), (70_000, 65_536), (1 << 31, 1 << 40)])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_are_found(way, end, numbers):
    data = WAYS[way]((*numbers, *ENDS[end]))

    assert numbers == numbers_in(data)
    assert numbers == numbers_in(memoryview(data))
    KEPT.clear()


@pytest.mark.parametrize(
    "obj", [None, 5, (5,), ("a", 1, 2), (1, "a"), [1], {"a": 1}, (None, 1), (1.5, 2), b"", BIG]
)
def test_what_is_no_task_has_none(obj):
    for way in ("plain, protocol 4", "small", "in-band", "envelope", "with an invitation"):
        assert numbers_in(WAYS[way](obj)) is None


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", b"\x80\x04K\x01", _envelope.PREFIX])
def test_what_is_no_pickle_has_none(data):
    assert numbers_in(data) is None


@pytest.mark.parametrize("way", WAYS)
def test_what_is_cut_off_has_none_or_the_right_ones(way):
    data = bytes(WAYS[way]((300, 70_000, (True, b"x" * 10))))[:600]
    found = {numbers_in(data[:n]) for n in range(len(data))}

    assert found <= {None, (300, 70_000)}
    KEPT.clear()


def test_only_pools_get_a_substitute():
    data = pickle.dumps((1, 2, (True, None)))

    assert Substitute.of(data, sys._getframe()) is None


def test_what_a_pool_gets():
    error = ValueError("no")
    result = Substitute("_handle_results", 1, 2).with_error(error)
    task = Substitute("worker", 1, 2).with_error(error)

    assert result == (1, 2, (False, error))
    assert task == (1, 2, loading.raising, (error,), {})
    assert [str(os.getpid()) in note for note in error.__notes__] == [True, True]
    with pytest.raises(ValueError, match="no") as caught:
        task[2](*task[3])
    assert caught.value is error


def test_the_functions_of_pools_are_those_of_this_python():
    found = loading._codes_of_pools()

    assert set(found.values()) == {"worker", "_handle_results", "_help_stuff_finish"}
    assert multiprocessing.pool.worker.__code__ in found


class RefusesToLoad:
    def __reduce__(self):
        return int, ("no number",)


def test_an_error_that_is_kept_holds_nothing_of_its_message():
    """The collector of CPython up to 3.12.3 crashes on some memory that is part of a circle."""
    with oobpickle.enabled():
        reader, writer = multiprocessing.Pipe(duplex=False)
        with reader, writer:
            writer.send([np.ones(1000), RefusesToLoad()])
            with pytest.raises(ValueError, match="no number") as caught:
                reader.recv()

    (names,) = [entry.frame.f_locals for entry in caught.traceback if entry.name == "loads"]
    assert names["data"] is None
    assert "error" not in names
