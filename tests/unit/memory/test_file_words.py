"""Words of a file that is not mapped: what a process without address space loads messages with."""

import random

import pytest

from oobpickle import ArenaError
from oobpickle._memory import layout
from oobpickle._memory.file_words import WORD_NBYTES, FileWords
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.segment import Segment


@pytest.fixture
def segment():
    segment = Segment.create(layout.LEDGER_NBYTES, "tests", map_it=False)
    yield segment
    segment.close()


@pytest.fixture
def words(segment):
    return segment.words()


def test_a_word_is_what_was_written(words):
    words[5] = (1 << 64) - 1

    assert isinstance(words, FileWords)
    assert (0, (1 << 64) - 1, 0) == (words[4], words[5], words[6])


def test_a_part_is_counted_from_its_start(words):
    words[100], words[102] = 7, 9
    part = words[100:103]

    assert 3 == len(part)
    assert [7, 0, 9] == list(part)
    assert b"".join(n.to_bytes(8, "little") for n in (7, 0, 9)) == bytes(part)
    part[1] = 8
    assert 8 == words[101]
    part.release()


@pytest.mark.parametrize("position", [3, 1 << 63, -4])
def test_there_is_nothing_outside(words, position):
    part = words[100:103]

    with pytest.raises((IndexError, OverflowError)):
        part[position]
    with pytest.raises((IndexError, OverflowError)):
        part[position] = 1


def test_a_file_that_was_cut_is_an_error_of_ours():
    segment = Segment.create(layout.PAGE_NBYTES, "tests", map_it=False)
    beyond = FileWords(segment, range(layout.PAGE_NBYTES // WORD_NBYTES + 1))
    try:
        with pytest.raises(ArenaError, match="end of file"):
            beyond[layout.PAGE_NBYTES // WORD_NBYTES]
    finally:
        segment.close()


def test_a_ledger_that_is_not_mapped_believes_no_more_than_another(words):
    words[layout.H_DATA_NBYTES], words[layout.H_ROWS] = 1 << 40, layout.rows_word(0)
    words[layout.H_CAPACITY] = 1 << 26
    ledger, taken = Ledger(words), []
    assert ledger.lease([70_000, 1 << 20], 1, taken) is None
    blocks = [(index, ledger.generation[index]) for index, _ in taken]
    ledger.seal(blocks, 1, 5)

    assert all(ledger.is_of(*block, n) for block, n in zip(blocks, [70_000, 1 << 20], strict=True))
    rng = random.Random(3)
    for _ in range(200):
        column = rng.choice([ledger.word, ledger.generation, ledger.check, ledger.size_class])
        index, value = rng.randrange(2), rng.getrandbits(64)
        before, column[index] = column[index], value
        later = Ledger(words)
        assert not later.is_in_flight(*blocks[index])
        assert later.is_in_flight(*blocks[1 - index])
        column[index] = before
    assert not ledger.is_in_flight(1 << 63, 1)
