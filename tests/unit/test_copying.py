import _thread
import os
import signal
import threading
import weakref

import numpy as np
import pytest

import samples
from oobpickle import _copying
from oobpickle._copying import copy_array


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def n_cores(request, monkeypatch):
    """Whether there is a helper, whatever this machine is doing."""
    monkeypatch.setattr(_copying, "_is_a_core_idle", lambda: request.param > 1)
    monkeypatch.setattr(_copying, "_LEAST_NBYTES", 1 << 16)
    monkeypatch.setattr(_copying, "_PIECE_NBYTES", 1 << 14)
    return request.param


@pytest.mark.parametrize("shape", [(1 << 20,), (7, 300, 211), (1, 1 << 18), (3000, 3, 97)])
@pytest.mark.parametrize("step", [1, 2, -1])
def test_a_large_copy_is_whole(n_cores, shape, step):
    source = samples.filled("f8", shape)[::step]
    destination = np.zeros(source.shape)

    copy_array(destination, source)

    assert (source == destination).all()


@pytest.fixture
def copyto(monkeypatch):
    """Gives the helper its first piece, and holds it there until told to go on."""
    gate, has_begun, main = threading.Event(), threading.Event(), threading.get_ident()
    original = np.copyto

    def held(destination, source):
        if threading.get_ident() == main:
            assert has_begun.wait(20)
            on_caller(destination)
        else:
            has_begun.set()
            assert gate.wait(20)
        original(destination, source)

    def on_caller(destination):
        pass

    def fail_in_caller(error):
        nonlocal on_caller

        def on_caller(destination):
            threading.Timer(0.05, gate.set).start()
            raise error

    def go_on():
        nonlocal on_caller

        def on_caller(destination):
            gate.set()

    monkeypatch.setattr(np, "copyto", held)
    held.fail_in_caller, held.go_on = fail_in_caller, go_on
    return held


@pytest.mark.parametrize("n_cores", [2], indirect=True)
def test_both_take_pieces(n_cores, copyto):
    copyto.go_on()
    source = samples.filled("u1", (1 << 18,))
    destination = np.zeros_like(source)

    copy_array(destination, source)

    assert (source == destination).all()


@pytest.mark.parametrize("n_cores", [2], indirect=True)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_nothing_is_written_after_an_interrupt(n_cores, copyto, error):
    """The helper's piece is finished before the error leaves, and it takes no other."""
    copyto.fail_in_caller(error)
    source = np.ones(1 << 18, np.uint8)
    destination = np.zeros_like(source)

    with pytest.raises(type(error)):
        copy_array(destination, source)

    assert 1 << 14 == np.count_nonzero(destination)


@pytest.mark.parametrize("n_cores", [2], indirect=True)
def test_without_a_thread_the_caller_copies_all(n_cores, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_copying._thread, "start_new_thread", refuse)
    source = samples.filled("u1", (1 << 18,))
    destination = np.zeros_like(source)

    copy_array(destination, source)

    assert (source == destination).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.1 0.2 0.3 1/99 7\n", True), ("0.1 0.2 0.3 9999/9999 7\n", False), ("", False)],
)
def test_a_core_is_idle_while_fewer_run_than_there_are(monkeypatch, tmp_path, text, expected):
    (tmp_path / "loadavg").write_text(text)
    monkeypatch.setattr("builtins.open", lambda _: (tmp_path / "loadavg").open())
    monkeypatch.setattr(_copying.os, "sched_getaffinity", lambda _: {0, 1})

    assert expected == _copying._is_a_core_idle()


# --- the helper's life


def tasks():
    return set(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("n_cores", [2], indirect=True)
def test_the_helper_is_gone_when_the_copy_is_made(n_cores):
    source = samples.filled("u1", (1 << 18,))
    destination = np.zeros_like(source)
    before = tasks()
    for _ in range(100):
        copy_array(destination, source)
        assert tasks() == before


@pytest.mark.parametrize("n_cores", [2], indirect=True)
def test_a_helper_that_begins_late_is_waited_for_too(n_cores, monkeypatch):
    source = samples.filled("u1", (1 << 18,))
    destination = np.zeros_like(source)
    go, help_ = threading.Event(), _copying._help
    wait_for, before = _copying._wait_for, tasks()

    def help_late(job):
        assert go.wait(20)
        help_(job)

    def wait_after_the_last_piece(lock):
        assert (source == destination).all()
        go.set()
        wait_for(lock)

    monkeypatch.setattr(_copying, "_help", help_late)
    monkeypatch.setattr(_copying, "_wait_for", wait_after_the_last_piece)
    copy_array(destination, source)

    assert tasks() == before


@pytest.mark.parametrize("n_cores", [2], indirect=True)
def test_an_interrupt_while_it_ends_is_raised_when_it_has_ended(n_cores, monkeypatch):
    source = samples.filled("u1", (1 << 18,))
    before, exists, n_calls = tasks(), os.path.exists, 0

    def interrupted(path):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise KeyboardInterrupt
        return exists(path)

    monkeypatch.setattr(_copying.os.path, "exists", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy_array(np.zeros_like(source), source)

    assert n_calls > 1
    assert tasks() == before


def test_a_forked_child_does_not_wait_for_a_helper():
    job = _copying._Job([])
    _copying._jobs.add(weakref.ref(job, _copying._jobs.discard))
    assert _copying.is_busy()
    _copying.forget()

    assert job.helping.acquire(blocking=False)
    assert not job.has_helper
    assert not _copying.is_busy()


@pytest.fixture
def helpers(monkeypatch):
    """Counts them."""
    started, start = [], _thread.start_new_thread

    def start_new_thread(*args):
        started.append(args)
        return start(*args)

    monkeypatch.setattr(_copying._thread, "start_new_thread", start_new_thread)
    return started


@pytest.mark.parametrize("n_cores", [2], indirect=True)
@pytest.mark.parametrize(
    ("handler", "expected"),
    [(signal.SIG_IGN, 1), (signal.default_int_handler, 1), (lambda *_: None, 0)],
    ids=["ignored", "Ctrl-C", "of the program"],
)
def test_where_a_handler_could_run_between_two_pieces_there_is_one(
    n_cores, helpers, handler, expected
):
    source = samples.filled("u1", (1 << 18,))
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        copy_array(np.zeros_like(source), source)
    finally:
        signal.signal(signal.SIGUSR2, before)

    assert len(helpers) == expected


@pytest.mark.parametrize("n_cores", [2], indirect=True)
def test_handlers_do_not_run_in_other_threads(n_cores, helpers):
    source = samples.filled("u1", (1 << 18,))
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    thread = threading.Thread(target=copy_array, args=(np.zeros_like(source), source))
    thread.start()
    thread.join()
    signal.signal(signal.SIGUSR2, before)

    assert len(helpers) == 1
