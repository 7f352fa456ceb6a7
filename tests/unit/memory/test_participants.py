"""The table of participants: slots, deaths, counters."""

import os

import pytest

from ledger_tools import FakeLocks, make_ledger, state_of
from oobpickle import _faults
from oobpickle._memory.layout import (
    FREE,
    H_BANK,
    H_INCARNATION,
    H_N_SLOTS,
    MAX_PARTICIPANTS,
    P_PID,
    P_PID_NAMESPACE,
    P_STATE,
    PARTICIPANT_WORDS,
)
from oobpickle._memory.participants import OwnRow, Participants, pid_namespace


@pytest.fixture
def ledger():
    return make_ledger()


@pytest.fixture
def locks():
    return FakeLocks()


@pytest.fixture
def participants(ledger):
    return Participants(ledger)


def test_each_participant_gets_a_slot_of_its_own(participants, locks):
    assert [0, 1, 2] == [participants.join(locks) for _ in range(3)]
    assert {0, 1, 2} == locks.alive


def test_the_slot_of_the_dead_is_used_again_after_its_blocks_are_free(participants, locks, ledger):
    participants.join(locks)
    dead = participants.join(locks)
    taken = []
    ledger.lease([100], dead, taken)
    locks.alive.discard(dead)

    assert 1 == participants.reap(locks, 0)
    assert FREE == state_of(ledger, taken[0][0])
    assert dead == participants.join(locks)


def test_many_short_lives_do_not_use_up_the_slots(participants, locks):
    survivor = participants.join(locks)
    for _ in range(200):
        slot = participants.join(locks)
        locks.alive.discard(slot)

    assert participants.words[H_N_SLOTS] <= 17
    assert survivor in locks.alive


@pytest.mark.parametrize(
    ("word", "value"), [(P_PID, 2**22 + 1), (P_PID_NAMESPACE, 1), (P_PID_NAMESPACE, 0)]
)
def test_who_is_in_another_namespace_or_hidden_is_not_visible(participants, locks, word, value):
    own, other = participants.join(locks), participants.join(locks)
    assert participants.are_visible(locks, own)
    participants.words[participants._row(other) + word] = value

    assert not participants.are_visible(locks, own)
    locks.alive.discard(other)
    assert participants.are_visible(locks, own)


def test_where_proc_is_of_another_namespace_nobody_is_visible(participants, locks, monkeypatch):
    own = participants.join(locks)
    assert {os.getpid()} == participants.living(locks, own)
    monkeypatch.setattr(os, "readlink", lambda _: "1")

    assert 0 == pid_namespace()
    assert set() == participants.living(locks, own)
    assert not participants.are_visible(locks, own)


def test_no_slot_is_left(participants, locks):
    participants.words[H_N_SLOTS] = MAX_PARTICIPANTS
    for slot in range(MAX_PARTICIPANTS):
        participants.words[participants._row(slot)] = 1
        locks.alive.add(slot)

    assert participants.join(locks) is None


def test_counters_are_summed_over_the_living_and_the_dead(participants, locks):
    for amount in (1, 10, 100):
        OwnRow(participants.words, participants.join(locks)).count((3, amount), (4, 1))
    locks.alive -= {1, 2}

    assert (111, 3) == tuple(participants.counters()[3:5])
    participants.reap(locks, 0)
    assert (111, 3) == tuple(participants.counters()[3:5])
    OwnRow(participants.words, participants.join(locks)).count((3, 1000))
    assert 1111 == participants.counters()[3]


@pytest.mark.parametrize("point", ["participants.summed", "participants.absorbed"])
def test_a_death_while_counting_the_dead_counts_nobody_twice(
    participants, locks, monkeypatch, point
):
    OwnRow(participants.words, participants.join(locks)).count((0, 1))
    OwnRow(participants.words, participants.join(locks)).count((0, 10))
    locks.alive.discard(1)

    def die(name):
        if name == point:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(_faults, "reach", die)
        with pytest.raises(SystemExit):
            participants.reap(locks, 0)

    assert 11 == participants.counters()[0]
    assert 1 == participants.reap(locks, 0)
    assert 11 == participants.counters()[0]
    assert participants.words[H_BANK] in (0, 1)


def test_readings_are_published_and_taken_back(participants, locks):
    row = OwnRow(participants.words, participants.join(locks))

    row.readings.add("one")
    row.publish_readings()
    assert [(0, 1)] == list(participants.readers())
    row.readings.discard("one")
    row.publish_readings()
    assert [(0, 0)] == list(participants.readers())


# --- written over by a faulty process


@pytest.mark.parametrize("n_slots", [0, 1, 5, MAX_PARTICIPANTS + 1, 2**64 - 1])
def test_a_damaged_number_of_slots_takes_nobody_s_slot(participants, locks, n_slots):
    first, second = participants.join(locks), participants.join(locks)
    participants.words[H_N_SLOTS] = n_slots

    slot = participants.join(locks)

    assert slot not in (first, second)
    participants.counters()
    participants.reap(locks, slot)
    assert {first, second} <= locks.alive


def test_a_living_participant_whose_state_is_damaged_keeps_its_slot(participants, locks):
    first = participants.join(locks)
    participants.words[participants._row(first) + P_STATE] = 0

    assert 1 == participants.join(locks)


def test_damaged_counters_raise_nothing(participants, locks):
    own, other = participants.join(locks), participants.join(locks)
    for word in range(participants._row(own), participants._row(own) + 2 * PARTICIPANT_WORDS):
        participants.words[word] = 2**64 - 1
    participants.words[H_BANK] = participants.words[H_INCARNATION] = 2**64 - 1
    row = OwnRow(participants.words, own)

    row.count((0, 1))
    locks.alive.discard(other)
    participants.reap(locks, own)
    participants.counters()
    participants.join(locks)
    list(participants.readers())
