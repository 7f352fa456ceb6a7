"""The table of blocks, step by step."""

import pytest

from ledger_tools import assert_in_order, make_ledger, owner_of, state_of
from oobpickle._memory import huge_pages, layout
from oobpickle._memory.rows import Rows

MIB = 1 << 20


@pytest.fixture
def ledger():
    ledger = make_ledger(64 * MIB)
    yield ledger
    assert_in_order(ledger)


def lease(ledger, *needs, slot=1):
    taken = []
    shortage = ledger.lease(needs, slot, taken)
    assert shortage is None
    return [(index, ledger.generation[index]) for index, _ in taken]


def send(ledger, *needs, slot=1, channel=9):
    blocks = lease(ledger, *needs, slot=slot)
    ledger.seal(blocks, slot, channel)
    return blocks


def test_a_leased_block_holds_what_was_asked_for(ledger):
    ((index, generation),) = lease(ledger, 70_000)

    assert (layout.LEASED, 1) == (state_of(ledger, index), owner_of(ledger, index))
    assert (1, 70_000) == (generation, ledger.used[index])
    assert ledger.resident_nbytes(index) == ledger.words[layout.H_RESIDENT] == 73_728


def test_huge_pages_are_counted_whole(ledger):
    """Otherwise the arena would occupy more than its capacity."""
    ledger.huge = huge_pages.BY_FAULT

    (large, _), (small, _) = lease(ledger, 2 * MIB + 1, 70_000)

    assert ledger.resident_nbytes(large) == 4 * MIB
    assert ledger.resident_nbytes(small) == 73_728
    assert ledger.words[layout.H_RESIDENT] == 4 * MIB + 73_728


@pytest.mark.parametrize("nbytes", [2 * MIB, 2 * MIB + 1, 7 * MIB, 20 * MIB + 1, 33 * MIB])
def test_huge_pages_stay_within_their_block(ledger, nbytes):
    ledger.huge = huge_pages.ALWAYS

    (first, _), (second, _) = lease(ledger, nbytes, 70_000)

    assert ledger.offset[first] % (2 * MIB) == 0
    assert ledger.offset[first] + ledger.resident_nbytes(first) <= ledger.offset[second]


def test_a_released_block_is_leased_again_warm_with_the_next_generation(ledger):
    (block,) = lease(ledger, 70_000)
    ledger.release([block], 1)
    taken = []

    ledger.lease([69_000], 1, taken)

    assert [(block[0], 73_728)] == taken
    assert block[1] + 1 == ledger.generation[block[0]]


def test_the_block_that_a_process_wrote_last_comes_back_to_it(ledger):
    (mine,), (theirs,) = lease(ledger, MIB, slot=1), lease(ledger, MIB, slot=2)
    ledger.release([mine], 1)
    ledger.release([theirs], 2)

    assert mine[0] == lease(ledger, MIB, slot=1)[0][0]
    assert theirs[0] == lease(ledger, MIB, slot=1)[0][0]


def test_a_warm_block_of_a_larger_class_is_better_than_fresh_pages(ledger):
    (block,) = lease(ledger, 5 * MIB)
    ledger.release([block], 1)

    assert block[0] == lease(ledger, 4 * MIB)[0][0]


def test_a_much_larger_block_is_left_for_larger_messages(ledger):
    (block,) = lease(ledger, 32 * MIB)
    ledger.release([block], 1)

    assert block[0] != lease(ledger, 4096)[0][0]


def test_capacity_is_the_limit_of_pages_not_of_blocks(ledger):
    (block,) = lease(ledger, 60 * MIB)
    taken = []

    shortage = ledger.lease([MIB, 8 * MIB], 1, taken)

    assert ("full", 8 * MIB, 3 * MIB) == tuple(shortage)
    assert 1 == len(taken)
    ledger.release([block], 1)
    assert block[0] == lease(ledger, 60 * MIB)[0][0]


def test_the_table_of_blocks_can_be_full(ledger):
    ledger.rows._data_nbytes = 10 * layout.PAGE_NBYTES
    taken = []

    shortage = ledger.lease([layout.PAGE_NBYTES] * 6, 1, taken)

    assert "table" == shortage.reason
    assert 5 == len(taken)


def test_claim_takes_all_blocks_of_a_message_or_none(ledger):
    blocks = send(ledger, 100, MIB)
    wrong = [blocks[0], (blocks[1][0], blocks[1][1] + 1)]

    assert 1 == ledger.claim(wrong, [100, MIB], 2)
    assert {layout.IN_FLIGHT} == {state_of(ledger, index) for index, _ in blocks}
    assert ledger.claim(blocks, [100, MIB], 2) is None
    assert {(layout.HELD, 2)} == {(state_of(ledger, i), owner_of(ledger, i)) for i, _ in blocks}
    assert 100 + MIB == ledger.words[layout.H_HELD]


def test_a_message_is_claimed_once(ledger):
    blocks = send(ledger, 100)
    ledger.claim(blocks, [100], 2)

    assert 0 == ledger.claim(blocks, [100], 3)
    ledger.release(blocks, 2)
    assert 0 == ledger.claim(blocks, [100], 3)


def test_a_claim_of_other_sizes_than_were_written_is_refused(ledger):
    blocks = send(ledger, 100)

    assert 0 == ledger.claim(blocks, [101], 2)


@pytest.mark.parametrize("index", [1, layout.MAX_BLOCKS - 1])
def test_a_claim_of_a_row_that_was_never_made_is_refused(ledger, index):
    send(ledger, 100)

    assert 0 == ledger.claim([(index, 0)], [0], 2)


def test_only_the_owner_releases_and_only_its_generation(ledger):
    (block,) = send(ledger, 100, slot=1)
    ledger.claim([block], [100], 2)

    ledger.release([block], 1)
    ledger.release([(block[0], block[1] - 1)], 2)
    assert layout.HELD == state_of(ledger, block[0])
    ledger.release([block], 2)
    ledger.release([block], 2)
    assert layout.FREE == state_of(ledger, block[0])


def test_recovery_frees_what_the_dead_had_and_keeps_what_it_sent(ledger):
    leased, sent, held = lease(ledger, 100, slot=1), send(ledger, 200, slot=1), send(ledger, 300)
    others = lease(ledger, 400, slot=2)
    ledger.claim(held, [300], 1)

    ledger.recover([1])

    states = [state_of(ledger, block[0][0]) for block in (leased, sent, held, others)]
    assert [layout.FREE, layout.IN_FLIGHT, layout.FREE, layout.LEASED] == states
    assert 1 == owner_of(ledger, sent[0][0])
    assert [sent[0][0]] == [index for index, _, _ in ledger.in_flight([2, 3])]
    assert [] == ledger.in_flight([1])
    assert ledger.claim(sent, [200], 2) is None


def test_many_dead_are_recovered_with_one_rebuild(ledger, monkeypatch):
    blocks = [lease(ledger, 100, MIB, slot=slot) for slot in range(1, 6)]
    rebuild, n_rebuilt = ledger.rebuild, []
    monkeypatch.setattr(ledger, "rebuild", lambda: n_rebuilt.append(rebuild()))

    ledger.recover([1, 2, 4, 5, 6])

    assert 1 == len(n_rebuilt)
    states = [{state_of(ledger, index) for index, _ in of_one} for of_one in blocks]
    free, leased = {layout.FREE}, {layout.LEASED}
    assert [free, free, leased, free, free] == states


def test_the_dead_who_had_nothing_cost_no_rebuild(ledger, monkeypatch):
    blocks = lease(ledger, 100, MIB)
    send(ledger, 100, slot=2)
    monkeypatch.setattr(ledger, "rebuild", lambda: pytest.fail("rebuilt for nothing"))

    ledger.recover([2, 3])

    assert {layout.LEASED} == {state_of(ledger, index) for index, _ in blocks}


def test_rebuilt_lists_are_in_the_order_of_addresses(ledger):
    blocks = lease(ledger, *[100, MIB, 5 * MIB] * 5)
    ledger.release(blocks[::-2] + blocks[1::2], 1)
    ledger.mark_punched([index for index, _ in blocks[6:]])

    ledger.rebuild()

    found = {}
    for head in range(layout.H_WARM, layout.H_EMPTY + layout.N_CLASSES):
        link = ledger.words[head]
        while link:
            found.setdefault(head, []).append(link - 1)
            link = ledger.next[link - 1]
    assert [2, 2, 2, 3, 3, 3] == sorted(len(indices) for indices in found.values())
    assert all(indices == sorted(indices) for indices in found.values())


def test_forgetting_frees_only_what_the_process_does_not_know(ledger):
    known, unknown = lease(ledger, 100), lease(ledger, 100)
    other = lease(ledger, 100, slot=2)
    sent = send(ledger, 100)

    ledger.forget_unknown(1, {known[0][0]})

    states = [state_of(ledger, block[0][0]) for block in (known, unknown, other, sent)]
    assert [layout.LEASED, layout.FREE, layout.LEASED, layout.IN_FLIGHT] == states


def test_idle_blocks_are_taken_largest_first_until_it_is_enough(ledger):
    blocks = lease(ledger, MIB, 8 * MIB, 2 * MIB)
    ledger.release(blocks, 1)
    taken = []

    ledger.take_idle(9 * MIB, 1, taken)

    assert [blocks[1][0], blocks[2][0]] == taken
    ledger.mark_punched(taken)
    assert MIB == ledger.words[layout.H_RESIDENT]
    ledger.release([(index, ledger.generation[index]) for index in taken], 1)


def test_a_punched_block_says_so_to_those_who_had_it_mapped(ledger):
    (block,) = lease(ledger, MIB)
    before = ledger.punches[block[0]]

    ledger.mark_punched([block[0]])

    assert before + 1 == ledger.punches[block[0]]


def test_a_message_in_flight_is_freed_only_while_it_is_what_was_seen(ledger):
    ((index, generation),) = send(ledger, 100)
    seen = ledger.word[index]
    ledger.readdress(index, generation, 2, 7)

    assert 0 == ledger.free_unread([(index, seen)])
    assert 1 == ledger.free_unread([(index, ledger.word[index])])


def test_only_a_message_in_flight_of_that_generation_is_adopted_or_sent_on(ledger):
    ((index, generation),) = send(ledger, 100, slot=1)

    ledger.adopt(index, generation + 1, 2)
    ledger.adopt(layout.MAX_BLOCKS + 5, 1, 2)
    assert not ledger.readdress(index, generation + 1, 2, 8)
    assert ledger.is_unread(index, generation)
    ledger.adopt(index, generation, 2)
    assert not ledger.is_unread(index, generation)
    assert 1 == owner_of(ledger, index)
    assert ledger.readdress(index, generation, 2, 8)
    assert ledger.is_unread(index, generation)
    assert 2 == owner_of(ledger, index)


def test_an_adoption_leaves_a_message_alone_that_another_claims_meanwhile(ledger, monkeypatch):
    """The same bytes were sent to both: if they had the block both, each would see the other's
    writes."""
    ((index, generation),) = send(ledger, 100, slot=1)
    is_in_flight = ledger.is_in_flight

    def overtaken(*block):
        answer = is_in_flight(*block)
        monkeypatch.undo()
        ledger.claim([block], [100], 3)
        return answer

    monkeypatch.setattr(ledger, "is_in_flight", overtaken)
    ledger.adopt(index, generation, 2)

    assert (layout.HELD, 3) == (state_of(ledger, index), owner_of(ledger, index))
    assert 0 == ledger.claim([(index, generation)], [100], 2)


def lost(ledger, others=(), kept=(), **options):
    return [index for index, _, _ in ledger.in_flight(others, kept, **options)]


def test_who_has_read_a_message_answers_for_it_and_not_its_sender(ledger):
    ((index, generation),) = send(ledger, 100, slot=1)
    ledger.adopt(index, generation, 9)
    reader = layout.adopted_by(9)

    assert [] == lost(ledger, [1], [reader])
    assert [] == lost(ledger, [], [reader])
    assert [] == lost(ledger, [], [reader], keeps_all=True)
    assert [index] == lost(ledger, [1], [layout.adopted_by(8)])
    assert [index] == lost(ledger, [1], [], keeps_all=True)
    assert {reader} == ledger.sources()


def test_an_adoption_of_an_earlier_lease_says_nothing(ledger):
    ((index, generation),) = send(ledger, 100, slot=1)
    ledger.adopt(index, generation, 9)
    late = ledger.channel[index]
    ledger.claim([(index, generation)], [100], 2)
    ledger.release([(index, generation)], 2)
    assert send(ledger, 100, slot=1) == [(index, generation + 1)]

    ledger.channel[index] = late

    assert [] == lost(ledger)


@pytest.mark.parametrize("mark", [0, layout.UNPROVEN])
def test_what_was_sent_where_somebody_may_have_read_is_kept(ledger, mark):
    ((index, _),) = send(ledger, 100, slot=1)
    channel = ledger.channel[index] = ledger.channel[index] | mark

    assert [index] == lost(ledger, [2], [channel + 1])
    assert [] == lost(ledger, [2], [channel & ~mark])
    assert [] == lost(ledger, [2], [], keeps_all=True)
    assert {channel & ~mark} == ledger.sources()


def test_following_blocks_are_abandoned_when_the_first_is_gone(ledger):
    (head, follower) = send(ledger, MIB, 2 * MIB)

    rest = [(follower[0], ledger.word[follower[0]])]

    assert [] == ledger.abandoned()
    ledger.claim([head], [MIB], 2)
    assert [] == ledger.abandoned()
    ledger.release([head], 2)
    assert rest == ledger.abandoned()
    lease(ledger, MIB)
    assert rest == ledger.abandoned()


def test_rebuilding_restores_lists_and_sums(ledger):
    blocks = lease(ledger, 100, MIB, 5 * MIB, MIB)
    ledger.release(blocks[1:3], 1)
    for word in range(layout.H_WARM, layout.H_EMPTY + layout.N_CLASSES):
        ledger.words[word] = 12345
    ledger.words[layout.H_HELD] = ledger.words[layout.H_RESIDENT] = 99
    ledger.words[layout.H_N_BLOCKS] -= 1

    ledger.rebuild()

    assert 4 == ledger.words[layout.H_N_BLOCKS]
    assert_in_order(ledger)


def test_rebuilding_mends_a_lease_that_was_counted_but_not_committed(ledger):
    ((index, generation),) = lease(ledger, MIB)
    ledger.release([(index, generation)], 1)
    ledger.generation[index] += 1  # where the process died

    ledger.rebuild()

    assert layout.commit_word(index, layout.FREE, 0, generation + 1) == ledger.word[index]
    assert layout.FREE == state_of(ledger, index)
    assert [(index, generation + 2)] == lease(ledger, MIB)


def test_census_goes_on_while_another_process_makes_rows(ledger, monkeypatch):
    lease(ledger, *[70_000] * 3)
    n_rows = Rows.n_rows.fget

    def more(rows):
        with monkeypatch.context() as patch:
            patch.setattr(Rows, "n_rows", property(n_rows))
            rows.make(0, 100)
            return rows.n_rows

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "n_rows", property(more))
        census = ledger.census()
    ledger.rebuild()  # puts the new rows into the lists

    assert (census.n_blocks["leased"], census.n_quarantined) == (3, 0)
    assert census.n_blocks["free"] >= 1


def test_census_counts_bytes_in_use_and_kept(ledger):
    lease(ledger, 100)
    send(ledger, 200)
    ledger.release(lease(ledger, 5000), 1)

    census = ledger.census()

    assert {"free": 1, "leased": 1, "in_flight": 1, "held": 0} == census.n_blocks
    assert {"free": 8192, "leased": 100, "in_flight": 200, "held": 0} == census.nbytes


def test_a_closed_ledger_refuses_instead_of_touching_memory():
    ledger = make_ledger()
    ledger.close()

    with pytest.raises(ValueError, match="released"):
        ledger.lease([1], 1, [])


# --- written over by a faulty process


def damaged_free(ledger, *needs):
    """Free blocks of these sizes, and one that is held throughout."""
    held = send(ledger, MIB)
    assert ledger.claim(held, [MIB], 3) is None
    blocks = lease(ledger, *needs)
    ledger.release(blocks, 1)
    return [index for index, _ in blocks], held[0]


@pytest.mark.parametrize("link", [7, layout.MAX_BLOCKS, (1 << 64) - 1])
def test_a_link_that_leads_nowhere_is_not_followed(ledger, link):
    _, held = damaged_free(ledger, MIB, MIB)
    ledger.words[layout.H_WARM + layout.class_of(MIB)] = link

    taken = lease(ledger, MIB, MIB)

    assert held[0] not in {index for index, _ in taken}
    assert 2 == len({index for index, _ in taken})


@pytest.mark.parametrize("column", ["warm", "empty"])
def test_a_link_to_a_block_in_use_does_not_give_it_away(ledger, column):
    (index, other), held = damaged_free(ledger, MIB, MIB)
    if column == "empty":
        ledger.mark_punched([index, other])
        ledger.rebuild()
    base = layout.H_WARM if column == "warm" else layout.H_EMPTY
    ledger.words[base + layout.class_of(MIB)] = held[0] + 1

    taken = lease(ledger, MIB, MIB)

    assert held[0] not in {index for index, _ in taken}
    assert layout.HELD == state_of(ledger, held[0])


def test_a_list_that_bites_its_tail_ends(ledger):
    (first, second), _ = damaged_free(ledger, MIB, MIB)
    ledger.next[first], ledger.next[second] = second + 1, first + 1

    taken = lease(ledger, MIB, MIB, MIB)

    assert 3 == len({index for index, _ in taken})


@pytest.mark.parametrize("column", ["word", "generation", "size_class", "offset", "check"])
@pytest.mark.parametrize("value", [0, 1, 3, 12345, (1 << 64) - 1])
def test_a_damaged_entry_is_quarantined_and_its_range_not_used_again(column, value):
    ledger = make_ledger()
    (index, other), _ = damaged_free(ledger, MIB, 2 * MIB)
    view = getattr(ledger, column)
    if view[index] == value:
        value = 77
    view[index] = value
    if column in ("size_class", "offset", "check"):
        ledger.rows.known.clear()  # as in a process that has not seen it

    taken = lease(ledger, MIB)
    ledger.rebuild()

    assert [other] == [i for i, _ in taken]
    assert layout.QUARANTINED == state_of(ledger, index)
    assert 1 == ledger.census().n_quarantined
    assert index != lease(ledger, MIB)[0][0]
    ledger.rebuild()
    assert 1 == ledger.census().n_quarantined


def test_what_is_known_of_a_row_is_not_read_again(ledger):
    (block,) = lease(ledger, MIB)
    offset = ledger.rows.offset(block[0])
    saved = ledger.offset[block[0]]
    ledger.offset[block[0]] = 1 << 30

    assert offset == ledger.rows.offset(block[0])
    ledger.offset[block[0]] = saved


@pytest.mark.parametrize("column", ["word", "generation", "used"])
def test_a_message_whose_entry_is_damaged_is_refused(column):
    ledger = make_ledger()
    (good,), (bad,) = send(ledger, MIB), send(ledger, MIB)
    getattr(ledger, column)[bad[0]] ^= 1 << 40

    assert 1 == ledger.claim([good, bad], [MIB, MIB], 2)
    assert layout.IN_FLIGHT == state_of(ledger, good[0])
    expected = layout.IN_FLIGHT if column == "used" else layout.QUARANTINED
    assert expected == state_of(ledger, bad[0])


def test_a_size_that_a_block_does_not_hold_is_refused(ledger):
    (block,) = send(ledger, MIB)
    ledger.used[block[0]] = 1 << 40

    assert 0 == ledger.claim([block], [1 << 40], 2)
    ledger.used[block[0]] = MIB


def test_a_held_block_with_a_damaged_word_is_not_given_to_another():
    ledger = make_ledger()
    (block,) = send(ledger, MIB)
    ledger.claim([block], [MIB], 2)
    ledger.word[block[0]] = layout.FREE  # without its check
    ledger.rebuild()

    assert block[0] != lease(ledger, MIB)[0][0]
    ledger.release([block], 2)
    assert block[0] != lease(ledger, MIB)[0][0]
    assert layout.QUARANTINED == state_of(ledger, block[0])


@pytest.mark.parametrize("value", [0, 1, 3, 1 << 20, (1 << 64) - 1])
@pytest.mark.parametrize("words", [["H_N_BLOCKS"], ["H_ROWS"]])
def test_one_of_the_two_numbers_of_rows_is_enough(ledger, words, value):
    before = [index for index, _ in lease(ledger, MIB, MIB)]
    for word in words:
        ledger.words[getattr(layout, word)] = value

    after = [index for index, _ in lease(ledger, MIB, 5 * MIB)]

    assert not set(before) & set(after)
    ledger.rebuild()


def test_without_the_number_of_rows_no_row_is_made_and_the_others_serve():
    ledger = make_ledger()
    (block,) = lease(ledger, MIB)
    ledger.release([block], 1)
    ledger.words[layout.H_ROWS], ledger.words[layout.H_N_BLOCKS] = 0, 0
    taken = []

    assert block[0] == lease(ledger, MIB)[0][0]
    assert "damaged" == ledger.lease([MIB], 1, taken).reason
    assert "damaged" == make_damaged_anew(ledger).lease([MIB], 1, taken).reason
    assert [] == taken


def make_damaged_anew(ledger):
    """Return the same ledger as a process sees it that comes later."""
    return type(ledger)(ledger.words)


def test_after_a_damaged_last_row_no_row_is_made():
    ledger = make_ledger()
    (block,) = lease(ledger, MIB)
    ledger.check[block[0]] ^= 1
    later = make_damaged_anew(ledger)

    assert "damaged" == later.lease([MIB], 1, []).reason
    assert later.rows.get(block[0]) is None


@pytest.mark.parametrize("value", [0, 12345, (1 << 64) - 1])
def test_damaged_sums_and_sizes_raise_nothing(ledger, value):
    (block,) = send(ledger, MIB)
    for word in (layout.H_HELD, layout.H_RESIDENT):
        ledger.words[word] = value
    ledger.used[block[0]] = ledger.resident[block[0]] = ledger.punches[block[0]] = value

    ledger.claim([block], [MIB], 2)
    ledger.release([block], 2)
    ledger.mark_punched([block[0]])
    ledger.lease([2 * MIB], 2, [])
    ledger.used[block[0]] = MIB
    ledger.rebuild()
    ledger.free_unread([(block[0], ledger.word[block[0]])])


def test_the_first_block_of_a_message_cannot_lie_outside_the_table(ledger):
    head, follower = send(ledger, MIB, 2 * MIB)
    ledger.channel[follower[0]] = layout.FOLLOWS | layout.FOLLOWS - 1

    assert [] == ledger.abandoned()
    assert ledger.is_sound(head[0])
