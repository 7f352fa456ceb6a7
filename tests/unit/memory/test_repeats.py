"""The same memory sent again and again is noticed; memory that is filled again is not."""

import multiprocessing

import numpy as np
import pytest

import oobpickle
from internals import inner
from oobpickle._fallback import describe_repeated

MIB = 1 << 20


@pytest.fixture
def sender():
    with oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)

        def send(array, n_times=1):
            for _ in range(n_times):
                write.send(array)
                read.recv()
            return inner(arena).blocks.repeated()

        yield send
        read.close()
        write.close()


def test_an_array_that_is_sent_ten_times(sender):
    array = np.ones(100_000)

    assert sender(array, 9) is None
    assert sender(array) == (10, 800_000)


def test_a_frame_that_is_filled_again(sender):
    frame = np.empty((480, 640))
    for n in range(100):
        frame[:] = n
        assert sender(frame) is None


def test_a_change_in_one_of_the_sampled_places_begins_anew(sender):
    array = np.zeros(100_000)
    sender(array, 15)
    array[-1] = 1

    assert sender(array) is None


def test_small_ones_are_not_looked_at(sender):
    assert sender([np.ones(20_000), np.ones(30_000)], 20) is None


def test_among_many_others_the_most_is_kept(sender):
    array = np.ones(200_000)
    sender(array, 10)
    others = [np.full(50_000, n) for n in range(40)]
    for other in others:
        assert sender(other) == (10, 1_600_000)


def test_among_many_small_ones_that_are_sent_more_often_a_large_one_is_kept(sender):
    array = np.ones(1_000_000)
    others = [np.full(50_000, n) for n in range(40)]
    sender(array, 5)
    for other in others:
        sender(other, 6)

    assert sender(array, 5) == (10, 8_000_000)


def test_a_part_with_the_same_address_is_another(sender):
    array = np.ones(100_000)
    for _ in range(10):
        sender(array[:50_000])
        found = sender(array)

    assert found == (10, 800_000)


def test_what_is_broadcast_is_not_sent_again(sender):
    with oobpickle.broadcast(np.ones(100_000)) as handle:
        assert sender(handle, 20) is None


@pytest.mark.parametrize(
    ("repeated", "nbytes"),
    [(None, MIB), ((10, MIB), 10 * MIB), ((10, 8 * MIB), 161 * MIB)],
    ids=["nothing", "little", "the smaller part"],
)
def test_what_is_not_worth_a_word(repeated, nbytes):
    assert describe_repeated(repeated, nbytes) == ""


def test_what_is_said():
    text = describe_repeated((40, 8 * MIB), 400 * MIB)

    assert "8.0 MiB was sent 40 times" in text
    assert "320 MiB of 400 MiB" in text
    assert "oobpickle.broadcast" in text


def test_it_is_said_once_at_the_end_of_the_block():
    array = np.ones(MIB)
    read, write = multiprocessing.Pipe(duplex=False)
    with pytest.warns(oobpickle.RepeatedWarning, match="broadcast") as said, oobpickle.enabled():
        for _ in range(40):
            write.send(array)
            read.recv()
    assert len(said) == 1
    read.close()
    write.close()
