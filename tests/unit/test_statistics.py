"""Statistics: each counter is shown once, under its name."""

import dataclasses
import pickle

import pytest

from oobpickle import Fallback, Statistics, _statistics
from oobpickle._fallback import REASONS, fallback_counters
from oobpickle._native import core
from oobpickle._statistics import summed

#: Where each counter is shown.
SHOWN = {
    "N_MESSAGES": "n_messages_out_of_band",
    "N_BUFFERS": "n_buffers_out_of_band",
    "NBYTES": "nbytes_out_of_band",
    "N_LOADED": "n_messages_loaded",
    "N_COPIED_ON_RECEIVE": "n_copied_on_receive",
    "NBYTES_COPIED_ON_RECEIVE": "nbytes_copied_on_receive",
    "N_COPIED_AT_FORK": "n_copied_at_fork",
    "NBYTES_COPIED_AT_FORK": "nbytes_copied_at_fork",
    "N_RECLAIMED": "n_reclaimed",
    "N_SHARED_AFTER_FORK": "n_shared_after_fork",
}
#: What the arena adds.
KNOWN = {
    "n_participants": 3,
    "n_quarantined": 1,
    "n_blocks": {"free": 1, "leased": 2, "in_flight": 3, "held": 4},
    "nbytes": {"free": 10, "leased": 20, "in_flight": 30, "held": 40},
    "nbytes_resident": 100,
    "nbytes_huge": 50,
    "capacity": 1 << 20,
}


def counters(**amounts):
    found = [0] * core.N_COUNTERS
    for name, amount in amounts.items():
        found[getattr(_statistics, name)] = amount
    return found


def test_every_counter_has_its_place():
    places = [getattr(_statistics, name) for name in SHOWN]
    places += [place for reason in REASONS for place in fallback_counters(reason)]

    assert len(set(places)) == len(places)
    assert all(0 <= place < core.N_COUNTERS for place in places)


def test_every_counter_is_listed_here():
    names = {
        name
        for name, value in vars(_statistics).items()
        if name.isupper() and name.startswith("N") and isinstance(value, int)
    }

    assert names == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_counter_is_shown_under_its_name_and_no_other(name):
    zero, one = summed(counters(), **KNOWN), summed(counters(**{name: 7}), **KNOWN)
    differing = {
        field.name: getattr(one, field.name)
        for field in dataclasses.fields(Statistics)
        if getattr(one, field.name) != getattr(zero, field.name)
    }

    assert differing == {SHOWN[name]: 7}


def test_what_the_arena_knows_is_shown_as_it_is():
    statistics = summed(counters(), **KNOWN)

    assert {name: getattr(statistics, name) for name in KNOWN} == KNOWN


def test_fallbacks_are_shown_by_reason_and_in_all():
    found = counters()
    for amount, reason in enumerate(REASONS, 1):
        n_messages, nbytes = fallback_counters(reason)
        found[n_messages], found[nbytes] = amount, 1000 * amount
    statistics = summed(found, **KNOWN)

    assert statistics.fallbacks == {r: Fallback(i, 1000 * i) for i, r in enumerate(REASONS, 1)}
    assert statistics.n_fallbacks == sum(range(len(REASONS) + 1))
    assert statistics.nbytes_fallbacks == 1000 * statistics.n_fallbacks


def test_statistics_are_values():
    statistics = summed(counters(N_MESSAGES=1), **KNOWN)

    assert pickle.loads(pickle.dumps(statistics)) == statistics
    with pytest.raises(AttributeError):
        statistics.n_reclaimed = 1
