"""The pieces: chunks, their sizes, and how far is read ahead."""

import itertools

import pytest

from oobpickle._merge import pieces as module
from oobpickle._merge.pieces import Chunk, check_size


def Pieces(iterables, n_workers, chunksize, buffersize):
    return module.Pieces(iterables, 2 * n_workers, n_workers, chunksize, buffersize)


def chunks_of(pieces):
    found = []
    while chunk := pieces.take(0, 1):
        found.append(chunk.pieces)
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
def test_equal_shares_where_the_length_is_known(n, n_workers, sizes):
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
    while chunk := pieces.take(n_under_way, 0):
        n_under_way += len(chunk.pieces)

    assert buffersize - (chunksize or 1) < n_under_way <= buffersize
    assert n_under_way == len(taken)
    assert pieces.take(n_under_way, 9) is None
    assert not pieces.is_exhausted
    assert pieces.take(0, 0)


def given_back(*sizes):
    """Pieces of which nothing is left but runs with gaps, out of order."""
    pieces = Pieces((range(100),), 1, 101, None)
    start, everything = pieces.take(0, 1)
    chunks = []
    for size in sizes:
        chunks.append(Chunk(start, everything[start : start + size]))
        start += size + 1
    for chunk in chunks[::-1]:
        pieces.give_back(chunk)
    return pieces


@pytest.mark.parametrize(
    ("sizes", "n_idle", "taken"),
    [
        ([6], 1, [(0, 6)]),
        ([6], 2, [(0, 3), (3, 3)]),
        ([7], 3, [(0, 3), (3, 2), (5, 2)]),
        ([2], 5, [(0, 1), (1, 1)]),
        ([4, 4], 2, [(0, 4), (5, 4)]),
        ([4, 4], 3, [(0, 4), (5, 2), (7, 2)]),
        ([4, 4], 4, [(0, 2), (2, 2), (5, 2), (7, 2)]),
        ([4, 4, 4], 2, [(0, 4), (5, 4)]),
    ],
)
def test_what_is_given_back_is_shared_by_those_who_have_nothing_to_do(sizes, n_idle, taken):
    pieces, found = given_back(*sizes), []
    while n_idle > len(found) and (chunk := pieces.take(0, n_idle - len(found))):
        assert [(chunk.start + i,) for i in range(len(chunk.pieces))] == chunk.pieces
        found.append((chunk.start, len(chunk.pieces)))

    assert found == taken
    assert pieces.is_exhausted == (sum(sizes) == sum(n for _, n in taken))


def test_what_is_given_back_waits_for_a_worker():
    pieces = given_back(4)

    assert pieces.take(0, 0) is None
    assert not pieces.is_exhausted


def test_what_is_given_back_comes_before_what_was_not_taken():
    pieces = Pieces((range(100),), 1, 4, None)
    start, chunk = pieces.take(0, 1)
    pieces.give_back(Chunk(start + 2, chunk[2:]))

    assert pieces.take(4, 0) is None
    assert pieces.take(4, 1) == (2, [(2,), (3,)])
    assert pieces.take(4, 0) == (4, [(4,), (5,), (6,), (7,)])


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
    assert pieces.take(0, 1) == (0, [(1,)])
    with pytest.raises(ValueError, match="no") as raised:
        pieces.take(0, 1)

    assert raised.value.__notes__ == ["oobpickle.merge: raised by an iterable, after piece 0"]


@pytest.mark.parametrize("value", [1.0, "1", True, [1]])
def test_sizes_are_ints(value):
    with pytest.raises(TypeError, match="chunksize must be an int"):
        check_size("chunksize", value)


@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(value):
    with pytest.raises(ValueError, match="buffersize must be 1 piece or more"):
        check_size("buffersize", value)
