"""Measuring: what this machine takes."""

import multiprocessing
import threading

import pytest

from oobpickle._explain import amounts as of
from oobpickle._explain import measuring


def test_every_kind_has_its_rates_and_nothing_is_left():
    threads = threading.active_count()
    measuring._known = None
    known = measuring.costs()

    assert set(known.kinds) == set(of.KINDS)
    assert all(rate > 0 for rates in known.kinds.values() for rate in rates)
    assert 0 < known.copied_byte <= known.plain_byte < 1e-6
    assert 0 < known.message < 1
    assert measuring.costs() is known
    assert threading.active_count() == threads
    assert multiprocessing.active_children() == []


def test_arrays_out_of_band_load_faster_than_small_objects_of_the_same_number():
    known = measuring.costs()

    assert known.kinds[of.INSTANCES][0] > known.kinds[of.ATOMS][0]
    assert known.kinds[of.ARRAYS_OUT][0] > known.kinds[of.ATOMS][0]


def test_what_many_objects_take_besides():
    """Remembered ones when they are pickled, entries of dictionaries when they are loaded."""
    kinds = dict.fromkeys(of.KINDS, (0.0,) * 4)
    known = measuring.Costs(kinds, (1e-6, 1e-6, 3e-6, 3e-6), 0.0, 0.0, 0.0)

    def seconds(**n):
        amounts = of.none()
        for name, value in n.items():
            amounts[getattr(of, name)] = value
        predicted = measuring.predict(amounts, 0, known)
        return predicted.pickle, predicted.load

    assert seconds(STRINGS=measuring._MANY) == pytest.approx((0.1, 0))
    assert seconds(ENTRIES=measuring._MANY) == pytest.approx((0, 0.3))
    assert seconds(STRINGS=1000, ENTRIES=1000) == (0, 0)
    few, many = (seconds(STRINGS=n)[0] / n for n in (20_000, 2_000_000))
    assert 10 < many / few < 50


def test_without_much_memory_less_is_copied(monkeypatch):
    monkeypatch.setattr(measuring.headroom, "available_nbytes", lambda: 512 << 20)
    sizes = []
    monkeypatch.setattr(measuring, "_copied", lambda source, target: sizes.append(len(source)) or 1)
    monkeypatch.setattr(measuring, "_kinds", lambda np: dict.fromkeys(of.KINDS, (0.0,) * 4))
    monkeypatch.setattr(measuring, "_rates", lambda *args, **options: (1.0,) * 4)
    measuring._measured()

    assert sizes == [16 << 20]
