"""The pieces: chunks, their sizes, and how far is read ahead."""

import itertools

import pytest

from oobpickle._merge.pieces import Pieces, check_size


def chunks_of(pieces):
    found = []
    while chunk := pieces.take(0):
        found.append(chunk)
    return found


@pytest.mark.parametrize(
    ("n", "n_workers", "sizes"),
    [
        (16, 2, [4, 4, 4, 4]),
        (17, 2, [5, 5, 5, 2]),
        (3, 2, [1, 1, 1]),
        (1, 8, [1]),
        (0, 2, []),
        (1, 1, [1]),
        (7, 1, [4, 3]),
    ],
)
def test_two_chunks_a_worker_where_the_length_is_known(n, n_workers, sizes):
    pieces = Pieces((range(n),), n_workers, None, None)
    chunks = chunks_of(pieces)

    assert sizes == [len(chunk) for chunk in chunks]
    assert [(i,) for i in range(n)] == [*itertools.chain(*chunks)]
    assert (pieces.n_taken, pieces.n_all, pieces.is_exhausted) == (n, n, True)


def test_one_piece_each_where_it_is_not():
    pieces = Pieces((iter(range(9)), range(5)), 2, None, None)

    assert pieces.n_all is None
    assert [(i, i) for i in range(5)] == [one for (one,) in chunks_of(pieces)]
    assert pieces.n_all == 5


def test_the_shortest_ends_it():
    pieces = Pieces((range(9), "abc"), 1, 10, None)

    assert pieces.n_all == 3
    assert [[(0, "a"), (1, "b"), (2, "c")]] == chunks_of(pieces)


@pytest.mark.parametrize("lying", [0, 1, 100])
def test_a_wrong_length_is_only_a_hint(lying):
    class Lies(list):
        def __len__(self):
            return lying

    pieces = Pieces((Lies(range(10)),), 2, None, None)

    assert [(i,) for i in range(10)] == [*itertools.chain(*chunks_of(pieces))]
    assert pieces.n_all == 10


@pytest.mark.parametrize(("buffersize", "chunksize"), [(1, 5), (4, 5), (9, 2), (8, None)])
def test_no_more_is_taken_than_may_be_under_way(buffersize, chunksize):
    taken = []
    pieces = Pieces((map(taken.append, range(100)),), 2, chunksize, buffersize)
    n_under_way = 0
    while chunk := pieces.take(n_under_way):
        n_under_way += len(chunk)

    assert buffersize - (chunksize or 1) < n_under_way <= buffersize
    assert n_under_way == len(taken)
    assert pieces.take(n_under_way) == []
    assert not pieces.is_exhausted
    assert pieces.take(0)


def test_boxes_are_told_when_they_are_done():
    told = []
    pieces = Pieces(("ab",), 1, None, None)
    boxes = pieces.boxes(told.append)

    assert next(boxes) == [("a",)]
    assert told == []
    assert next(boxes) == [("b",)]
    assert told == [1]
    assert list(boxes) == []
    assert told == [1, 2]


def test_an_iterable_that_raises():
    def fails():
        yield 1
        raise ValueError("no")

    pieces = Pieces((fails(),), 1, 1, None)
    assert pieces.take(0) == [(1,)]
    with pytest.raises(ValueError, match="no") as raised:
        pieces.take(0)

    assert raised.value.__notes__ == ["oobpickle.merge: raised by an iterable, after piece 0"]


@pytest.mark.parametrize("value", [1.0, "1", True, [1]])
def test_sizes_are_ints(value):
    with pytest.raises(TypeError, match="chunksize must be an int"):
        check_size("chunksize", value)


@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(value):
    with pytest.raises(ValueError, match="buffersize must be 1 piece or more"):
        check_size("buffersize", value)
