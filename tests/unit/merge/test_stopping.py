"""Whether the rest is called off, as other processes see it."""

import multiprocessing
import os
import pickle

import pytest

from oobpickle._merge.stopping import Stop


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def names():
    found = []
    for fd in descriptors():
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return [name for name in found if "oobpickle-merge" in name]


def test_it_is_seen_here_and_elsewhere():
    stop = Stop()
    stop.show()
    there = pickle.loads(pickle.dumps(stop))

    assert not stop.is_set()
    assert not there.is_set()
    stop.set()
    assert stop.is_set()
    assert there.is_set()
    stop.set()
    assert names() == []


def test_another_file_of_the_same_number_is_not_taken_for_it():
    stop = Stop()
    stop.show()
    there = pickle.loads(pickle.dumps(stop))
    stop.set()
    other = Stop()
    other.show()  # has the number now

    assert there.is_set()
    other.set()


def test_what_is_not_shown_is_never_set_elsewhere():
    stop = Stop()
    there = pickle.loads(pickle.dumps(stop))
    stop.set()

    assert not there.is_set()
    assert stop.is_set()


def test_a_process_that_has_gone_has_called_it_off():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        there = pickle.loads(pool.apply(made_there))

    assert there.is_set()


def made_there():
    stop = Stop()
    stop.show()
    data = pickle.dumps(stop)
    _kept.append(stop)
    return data


_kept = []


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_whoever_may_not_look_goes_on(monkeypatch, error):
    stop = Stop()
    stop.show()
    there = pickle.loads(pickle.dumps(stop))
    monkeypatch.setattr(os, "readlink", raising(error))

    assert not there.is_set()
    stop.set()


@pytest.mark.parametrize(
    ("error", "is_set"), [(None, True), (PermissionError, False), (ProcessLookupError, True)]
)
def test_a_process_that_is_hidden_has_not_gone(monkeypatch, error, is_set):
    stop = Stop()
    stop.show()
    there = pickle.loads(pickle.dumps(stop))
    monkeypatch.setattr(os, "readlink", raising(FileNotFoundError))
    monkeypatch.setattr(os, "kill", raising(error) if error else lambda *_: None)

    assert there.is_set() is is_set
    stop.set()


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_without_descriptors_nobody_sees_it(monkeypatch):
    monkeypatch.setattr(os, "memfd_create", raising(OSError))
    stop = Stop()
    stop.show()

    assert not pickle.loads(pickle.dumps(stop)).is_set()
    stop.set()


def test_a_forked_child_keeps_no_descriptor():
    stop = Stop()
    stop.show()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(names) == []
        assert len(names()) == 1
    stop.set()

    assert names() == []


def test_it_is_closed_when_it_is_collected():
    stop = Stop()
    stop.show()
    assert len(names()) == 1
    del stop

    assert names() == []


def test_a_watcher_is_not_sent_on():
    with pytest.raises(TypeError, match="not sent on"):
        pickle.dumps(pickle.loads(pickle.dumps(Stop())))
