"""Statistics: each counter is shown once, under its name."""

import dataclasses
import multiprocessing
import pickle

import numpy as np
import pytest

import oobpickle
from oobpickle import Fallback, Statistics, _statistics
from oobpickle._fallback import REASONS, fallback_counters
from oobpickle._hook import connections
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
    "NBYTES_STREAM": "nbytes_stream",
    "NS_PICKLING": "seconds_pickling",
    "NS_WAITING": "seconds_waiting",
    "NS_LOADING": "seconds_loading",
    "N_SPILLED": "n_spilled",
    "NBYTES_SPILLED": "nbytes_spilled",
    "NS_SPILLING": "seconds_spilling",
    "NBYTES_IN_FILES": "nbytes_in_files",
}
#: What the arena adds.
KNOWN = {
    "n_participants": 3,
    "n_quarantined": 1,
    "n_blocks": {"free": 1, "leased": 2, "in_flight": 3, "held": 4},
    "nbytes": {"free": 10, "leased": 20, "in_flight": 30, "held": 40},
    "n_published": 2,
    "nbytes_published": 60,
    "n_references": 5,
    "repeated": (10, 300),
    "nbytes_resident": 100,
    "nbytes_on_disk": 70,
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

    assert differing == {SHOWN[name]: 7e-9 if name.startswith("NS_") else 7}


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


def shown(**amounts):
    return str(summed(counters(**amounts), **{**KNOWN, "n_quarantined": 0}))


def test_the_report_begins_with_a_verdict():
    fallen = counters(N_MESSAGES=92)
    n_messages, nbytes = fallback_counters("full")
    fallen[n_messages], fallen[nbytes] = 8, 8 << 20

    assert shown(N_MESSAGES=40).startswith("all 40 large messages out of band\n")
    assert shown(N_MESSAGES=1).startswith("1 message out of band\n")
    assert shown().startswith("no message was large enough to go out of band, or none was seen\n")
    report = str(summed(fallen, **KNOWN))
    assert report.startswith("92 of 100 large messages out of band (92 %)\n")
    assert "  in-band  8 (8.0 MiB): the arena was full" in report


def test_the_report_has_units_and_no_zeros():
    report = shown(
        **dict.fromkeys(("N_MESSAGES", "N_BUFFERS", "N_LOADED"), 40),
        NBYTES=32 << 20,
        NBYTES_STREAM=4096,
        NS_PICKLING=12_300_000,
        NS_LOADING=900_000,
    )

    assert report.splitlines()[1:5] == [
        "  sent     32 MiB: 32 MiB in 40 buffers, 4.0 KiB of pickle stream",
        "  loaded   40 messages",
        "  stored   60 bytes by broadcast or share, with 5 references",
        "  spent    12 ms pickling and copying, 900 us loading",
    ]
    assert " 0 " not in report
    nothing = str(_statistics.nothing())
    assert nothing.splitlines() == [
        "no message was large enough to go out of band, or none was seen",
        '  why      see docs/reference/troubleshooting.md, "It is not faster"',
    ]


def test_much_stream_is_a_matter_for_explain():
    report = shown(N_MESSAGES=1, NBYTES=1000, NBYTES_STREAM=920)

    assert "92 % is stream: see oobpickle.explain(obj)" in report
    assert "explain" not in shown(N_MESSAGES=1, NBYTES=1000, NBYTES_STREAM=400)


def test_what_lies_in_files_is_no_stream():
    report = shown(N_MESSAGES=1, NBYTES=1000, NBYTES_STREAM=1000, NBYTES_IN_FILES=8 << 20)

    assert "\n  in files 8.0 MiB, sent as their place\n" in report
    assert "explain" not in report


def test_what_is_wrong_is_in_the_report():
    report = str(summed(counters(N_SHARED_AFTER_FORK=2, N_RECLAIMED=1), **KNOWN))

    assert "1 taken back unread, 2 shared after a fork" in report
    assert "1 damaged" in report


def test_the_fields_are_in_the_repr_as_ever():
    assert repr(_statistics.nothing()).startswith("Statistics(n_messages_out_of_band=0, ")


def test_times_and_the_stream_are_counted_where_messages_go(monkeypatch):
    reads = []
    clock = connections.perf_counter_ns
    monkeypatch.setattr(connections, "perf_counter_ns", lambda: reads.append(1) or clock())
    with oobpickle.enabled() as arena:
        one, other = multiprocessing.Pipe()
        one.send({"small": 1})
        other.recv()
        n_for_a_small_one = len(reads)
        one.send([np.ones(50_000), "a" * 5000])
        received = other.recv()
        done = arena.statistics()
        one.close(), other.close()

    assert n_for_a_small_one == 1
    assert len(received) == 2
    assert 5000 < done.nbytes_stream < 6000
    assert done.nbytes_buffers == 400_000
    for seconds in (done.seconds_pickling, done.seconds_waiting, done.seconds_loading):
        assert 0 < seconds < 10
