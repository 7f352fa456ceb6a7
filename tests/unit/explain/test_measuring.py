"""Measuring: what this machine takes."""

import multiprocessing
import threading

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
