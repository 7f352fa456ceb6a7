"""The layout: every size has a class, every buffer a place, and nothing overlaps."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oobpickle._memory import layout
from oobpickle._memory.layout import class_nbytes, class_of, class_stride, commit_word, plan
from oobpickle._system import PAGE_NBYTES

MIB = 1 << 20
SIZES = st.one_of(
    st.integers(1, 10 * PAGE_NBYTES),
    st.integers(1, 1 << 44),
    st.builds(
        lambda power, around: max(1, (1 << power) + around), st.integers(0, 44), st.integers(-2, 2)
    ),
)


# --- size classes


@given(SIZES)
def test_the_class_of_a_size_is_the_smallest_that_holds_it(nbytes):
    size_class = class_of(nbytes)

    assert class_nbytes(size_class) >= nbytes
    assert size_class == 0 or class_nbytes(size_class - 1) < nbytes


def test_classes_grow_by_at_most_a_quarter_beyond_the_first():
    sizes = [class_nbytes(size_class) for size_class in range(layout.N_CLASSES)]

    assert sizes[:5] == [n * PAGE_NBYTES for n in range(1, 6)]
    assert sizes == sorted(set(sizes))
    assert all(4 * b <= 5 * a for a, b in pairwise(sizes[3:]))


def test_every_class_is_the_class_of_its_own_size():
    classes = list(range(layout.N_CLASSES))

    assert classes == [class_of(class_nbytes(c)) for c in classes]
    assert classes == [class_of(class_nbytes(c) - PAGE_NBYTES + 1) for c in classes]
    assert classes[1:] == [class_of(class_nbytes(c) + 1) for c in classes[:-1]]


def test_there_is_a_class_for_all_that_can_be_mapped():

    assert class_nbytes(layout.N_CLASSES - 1) > 1 << 44


def test_a_hole_page_follows_every_block():
    for size_class in range(layout.N_CLASSES):
        nbytes, stride = class_nbytes(size_class), class_stride(size_class)

        assert stride >= nbytes + PAGE_NBYTES
        assert stride % PAGE_NBYTES == 0
        assert nbytes < 2 * MIB or stride % (2 * MIB) == 0


# --- commit words


STATES = [
    layout.FREE,
    layout.LEASED,
    layout.IN_FLIGHT,
    layout.HELD,
    layout.QUARANTINED,
]


@given(
    st.integers(0, layout.MAX_BLOCKS - 1),
    st.sampled_from(STATES),
    st.integers(0, layout.OWNER_MASK),
    st.integers(0, layout.WORD_MASK),
)
def test_a_commit_word_holds_state_and_owner(index, state, owner, generation):
    word = commit_word(index, state, owner, generation)

    assert word < 1 << 64
    assert word & layout.STATE_MASK == state
    assert word >> layout.OWNER_SHIFT & layout.OWNER_MASK == owner


@given(
    st.integers(0, layout.MAX_BLOCKS - 1),
    st.sampled_from(STATES),
    st.integers(0, 4095),
    st.integers(0, layout.WORD_MASK),
    st.integers(0, 63),
)
def test_the_check_of_a_commit_word_finds_every_single_change(index, state, owner, generation, bit):
    word = commit_word(index, state, owner, generation)
    flipped = word ^ 1 << bit

    assert flipped != layout.checked_word(index, flipped & layout.LOW_MASK, generation)
    assert word != commit_word(index, state, owner, generation ^ 1 << bit)
    assert word != commit_word(index ^ 1 << bit % 20, state, owner, generation)


@given(
    st.lists(
        st.tuples(st.integers(0, layout.MAX_BLOCKS - 1), st.integers(0, (1 << 44) - 1)),
        min_size=1,
    )
)
def test_checks_are_the_same_for_numbers_and_for_columns(pairs):
    index, number = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    words = layout.checked_word(index, layout.FREE, number).tolist()

    assert words == [commit_word(i, layout.FREE, 0, n) for i, n in pairs]
    assert layout.row_check(index, number, 5).tolist() == [
        layout.row_check(i, n, 5) for i, n in pairs
    ]
    assert layout.resident_word(index, number).tolist() == [
        layout.resident_word(i, n) for i, n in pairs
    ]


@given(
    st.integers(0, layout.MAX_BLOCKS - 1),
    st.integers(0, (1 << 44) - 1),
    st.integers(0, layout.WORD_MASK),
)
def test_a_damaged_number_of_resident_bytes_is_none(index, nbytes, other):
    word = layout.resident_word(index, nbytes)

    assert nbytes == layout.resident_nbytes(index, word)
    assert layout.resident_nbytes(index, other) in (0, other & (1 << 48) - 1)
    assert layout.resident_nbytes(index, word ^ 1 << 50) == 0


def test_no_rows_are_not_an_empty_word():

    assert 0 != layout.rows_word(0)


def test_states_are_different_and_an_empty_word_is_none_of_them():

    assert sorted(STATES) == list(range(1, 1 + len(STATES)))


def test_every_participant_has_an_owner_number():

    assert layout.MAX_PARTICIPANTS - 1 <= layout.OWNER_MASK


# --- the table


def test_header_words_do_not_overlap():
    single = [
        value
        for name, value in vars(layout).items()
        if name.startswith("H_") and name not in ("H_WARM", "H_EMPTY", "H_TOTALS")
    ]
    ranges = [(word, word + (2 if word == layout.H_IDENTITY else 1)) for word in single]
    ranges += [
        (layout.H_WARM, layout.H_WARM + layout.N_CLASSES),
        (layout.H_EMPTY, layout.H_EMPTY + layout.N_CLASSES),
        (layout.H_TOTALS, layout.H_TOTALS + 2 * layout.BANK_WORDS),
    ]
    ranges.sort()

    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] <= layout.HEADER_WORDS


def test_the_columns_end_where_the_table_ends():
    columns = sorted(value for name, value in vars(layout).items() if name.startswith("C_"))
    end = layout.BLOCKS_AT + layout.N_COLUMNS * layout.MAX_BLOCKS

    assert columns == list(range(layout.N_COLUMNS))
    assert layout.BLOCKS_AT == (
        layout.HEADER_WORDS + layout.MAX_PARTICIPANTS * layout.PARTICIPANT_WORDS
    )
    assert 8 * end == layout.LEDGER_NBYTES
    assert layout.P_COUNTERS + layout.N_COUNTERS == layout.P_KEPT
    assert layout.P_KEPT + layout.N_KEPT == layout.PARTICIPANT_WORDS


# --- plans


BUFFERS = st.lists(
    st.one_of(
        st.just(0),
        st.integers(1, 2000),
        st.integers(layout.OWN_BLOCK_NBYTES - 70, layout.OWN_BLOCK_NBYTES + 2),
        st.integers(0, 1 << 33),
    ),
    max_size=60,
)


@given(BUFFERS)
def test_every_buffer_has_a_place_of_its_own_inside_its_block(sizes):
    needs, places = plan(sizes)
    used = []
    for nbytes, (block, at) in zip(sizes, places, strict=True):
        if nbytes == 0:
            assert (block, at) == (-1, 0)
        else:
            assert 0 <= at <= needs[block] - nbytes
            used.append((block, at, at + nbytes))
    used.sort()

    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(used))
    assert {block for block, _, _ in used} == set(range(len(needs)))


@given(BUFFERS)
def test_big_buffers_have_a_block_each_and_small_ones_are_aligned(sizes):
    needs, places = plan(sizes)
    for nbytes, (block, at) in zip(sizes, places, strict=True):
        if nbytes >= layout.OWN_BLOCK_NBYTES:
            assert needs[block] == nbytes
            assert [b for b, _ in places].count(block) == 1
        assert at % layout.ALIGN_NBYTES == 0


@given(BUFFERS)
def test_packs_are_of_bounded_size_and_no_more_than_needed(sizes):
    needs, places = plan(sizes)
    packs = {b for n, (b, _) in zip(sizes, places, strict=True) if 0 < n < layout.OWN_BLOCK_NBYTES}
    small = sum(-(-n // 64) * 64 for n in sizes if n < layout.OWN_BLOCK_NBYTES)

    assert all(needs[block] <= layout.PACK_NBYTES for block in packs)
    assert len(packs) <= 1 + small // (layout.PACK_NBYTES - layout.OWN_BLOCK_NBYTES)


@given(BUFFERS)
def test_sender_and_receiver_compute_the_same_plan(sizes):

    assert plan(list(sizes)) == plan(list(sizes))


def test_nothing_to_lay_out_needs_no_block():

    assert plan([]) == ([], [])
    assert plan([0, 0]) == ([], [(-1, 0), (-1, 0)])


def test_an_example_of_a_plan():
    own = layout.OWN_BLOCK_NBYTES

    assert plan([100, own, 0, 65, own - 1]) == (
        [256 + own - 1, own],
        [(0, 0), (1, 0), (-1, 0), (0, 128), (0, 256)],
    )
