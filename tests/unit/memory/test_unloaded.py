"""The list of what a process may have read unseen: what others find in its row."""

import pytest

from ledger_tools import FakeLocks, make_ledger
from oobpickle._memory.layout import N_KEPT, adopted_by
from oobpickle._memory.participants import OwnRow, Participants
from oobpickle._memory.unloaded import Unloaded


@pytest.fixture
def ledger():
    return make_ledger()


def join(ledger, unloaded):
    slot = Participants(ledger).join(FakeLocks(), unloaded)
    return adopted_by(OwnRow(ledger.words, slot).incarnation)


def test_what_was_noted_before_and_after_joining_is_found(ledger):
    unloaded = Unloaded([5])
    assert unloaded
    own = join(ledger, unloaded)
    unloaded.note(6)

    assert Participants(ledger).kept() == ({own, 5, 6}, False)
    assert not Unloaded()


def test_what_is_not_needed_any_more_makes_place(ledger):
    unloaded = Unloaded()
    own = join(ledger, unloaded)
    assert all(unloaded.note(source) for source in range(1, N_KEPT + 1))

    assert unloaded.note(1)
    assert not unloaded.note(1000)
    unloaded.retain([1, 2, 3])
    assert unloaded.note(1000)

    assert Participants(ledger).kept() == ({own, 1, 2, 3, 1000}, False)


@pytest.mark.parametrize("is_later", [False, True])
def test_more_than_fits_is_everything(ledger, is_later):
    unloaded = Unloaded([] if is_later else range(1, N_KEPT + 2))
    join(ledger, unloaded)
    if is_later:
        unloaded.keep_any()

    assert Participants(ledger).kept()[1]
    assert Unloaded(unloaded.sources, is_any=unloaded.is_any)


def test_a_descriptor_that_was_asked_for_and_passed_on_is_not_noted(ledger):
    unloaded = Unloaded()
    own = join(ledger, unloaded)
    for _ in range(2):
        unloaded.note(7)

    unloaded.passed_on(7)
    assert Participants(ledger).kept() == ({own, 7}, False)
    unloaded.passed_on(7)
    unloaded.passed_on(7)
    assert Participants(ledger).kept() == ({own}, False)
