"""The hook: what it replaces, what it sends where, and its undo. One process; no pools."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.reduction
import multiprocessing.spawn
import multiprocessing.util
import os
import pickle
import secrets
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import popen_forkserver, popen_spawn_posix
from types import SimpleNamespace

import numpy as np
import pytest

import oobpickle
from conftest import is_installed, process_with
from internals import inner
from kernel import needs_kernel
from oobpickle import ArenaError, Fallback, FallbackWarning, _api, _system
from oobpickle._envelope import Envelope
from oobpickle._hook import installed
from oobpickle._hook.replacements import of_standard_library
from oobpickle._memory.arena import SharedArena

MIB = 1 << 20
BIG = np.arange(MIB // 8, dtype=np.int64)


def replaced_objects():
    connection = multiprocessing.connection
    return (
        connection._ForkingPickler,
        multiprocessing.queues._ForkingPickler,
        connection.Connection._send_bytes,
        connection.Connection._recv,
        connection._ConnectionBase.fileno,
        connection.Pipe,
        multiprocessing.reduction.dump,
        multiprocessing.reduction.DupFd,
        popen_spawn_posix.Popen._launch,
        popen_forkserver.Popen._launch,
        multiprocessing.spawn.get_preparation_data,
        multiprocessing.process.BaseProcess._bootstrap,
        subprocess.Popen._execute_child,
        *(os.execv, os.execve, os.posix_spawn, os.posix_spawnp, os._spawnvef, os.system),
        multiprocessing.util.spawnv_passfds,
    )


@pytest.fixture(autouse=True)
def _uninstalled():
    before = replaced_objects()
    yield
    oobpickle.uninstall()
    assert before == replaced_objects()


def test_a_block_that_is_never_entered_is_a_mistake():
    with pytest.warns(RuntimeWarning, match="called and not entered") as caught:
        oobpickle.enabled()

    assert caught[0].filename == __file__


def test_a_block_without_parentheses_is_a_mistake():
    with pytest.raises(TypeError, match=r"call it: with oobpickle.enabled\(\):"), oobpickle.enabled:
        pass


def test_a_block_whose_options_are_refused_says_nothing_more():
    with pytest.raises(ValueError, match="capacity is no number of bytes: 'much'"):
        oobpickle.enabled(capacity="much")
    with pytest.raises(TypeError, match="threshold must be a number of bytes"):
        oobpickle.enabled(threshold=[1])


def test_bytes_are_said_as_people_write_them():
    with oobpickle.enabled(capacity="64MiB", threshold=2e5) as arena:
        assert (arena.options.capacity, arena.options.threshold) == (64 * MIB, 200_000)
    arena = oobpickle.install(capacity=64 * MIB, threshold="1kB")
    assert arena.options.threshold == 1000


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_block_that_is_kept_until_the_interpreter_ends_is_none():
    child = run("import oobpickle; kept = oobpickle.enabled(); late = [oobpickle.enabled()]")

    assert (child.returncode, child.stderr) == (0, "")


def test_a_block_that_is_kept_and_entered_later_is_none():
    kept = oobpickle.enabled()
    with kept:
        pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(oobpickle.enabled())


def test_a_function_can_be_decorated():
    @oobpickle.enabled(capacity=16 * MIB)
    def nested(n):
        assert oobpickle.statistics().capacity == 16 * MIB
        return nested(n - 1) + 1 if n else 0

    assert nested(2) == nested(0) + 2
    with pytest.raises(ArenaError):
        oobpickle.statistics()


def test_a_block_that_is_dropped_inside_is_left():
    block = oobpickle.enabled()
    block.__enter__()
    del block

    assert not is_installed()


def test_enabled_replaces_twenty_objects_and_restores_them():
    before = replaced_objects()
    with oobpickle.enabled():
        assert len(of_standard_library()) == len(before) == 20
        assert not set(map(id, before)) & set(map(id, replaced_objects()))

    assert before == replaced_objects()


def test_the_block_is_left_by_an_exception_too():
    before = replaced_objects()
    with pytest.raises(ZeroDivisionError), oobpickle.enabled():
        raise ZeroDivisionError

    assert before == replaced_objects()


def test_nested_blocks_share_one_arena_until_the_last_is_left():
    with oobpickle.enabled() as outer:
        with oobpickle.enabled() as inner:
            assert outer is inner
        assert not outer.closed
    assert outer.closed


def test_install_is_idempotent_and_one_uninstall_is_enough():
    first = oobpickle.install(capacity=16 * MIB)

    assert first is oobpickle.install()
    oobpickle.uninstall()
    assert first.closed
    oobpickle.uninstall()


def test_a_block_inside_install_leaves_it_installed():
    arena = oobpickle.install()
    with oobpickle.enabled() as inner:
        assert arena is inner
    assert not arena.closed


def test_uninstall_inside_a_block_waits_for_its_end():
    with oobpickle.enabled() as arena:
        oobpickle.install()
        oobpickle.uninstall()
        assert not arena.closed
    assert arena.closed


def test_a_differing_option_is_refused_with_both_values():
    with oobpickle.enabled(capacity=16 * MIB, threshold=1000):
        with pytest.raises(ValueError, match=r"capacity=16777216; capacity=33554432 differs"):
            oobpickle.install(capacity=32 * MIB)
        with (
            pytest.raises(ValueError, match="copy_on_receive=True differs"),
            oobpickle.enabled(copy_on_receive=True),
        ):
            pass
        with oobpickle.enabled(capacity=16 * MIB):
            pass


@pytest.mark.parametrize(
    "option",
    [
        {"capacity": 0},
        {"capacity": -1},
        {"threshold": -1},
        {"wait_timeout": -0.5},
        {"wait_timeout": 1e30},
    ],
)
def test_an_option_out_of_range_starts_nothing(option):
    before = replaced_objects()
    with pytest.raises(ValueError, match=next(iter(option))):
        oobpickle.install(**option)

    assert before == replaced_objects()


def test_statistics_need_an_arena():
    with pytest.raises(ArenaError, match="not enabled"):
        oobpickle.statistics()
    with oobpickle.enabled():
        assert 0 == oobpickle.statistics().n_messages_out_of_band


def test_a_large_message_goes_out_of_band_and_arrives_independent():
    with oobpickle.enabled() as arena:
        reader, writer = multiprocessing.Pipe(False)
        with reader, writer:
            array = BIG.copy()
            writer.send(array)
            array[:] = 0
            arrived = reader.recv()
        statistics = arena.statistics()

    np.testing.assert_array_equal(BIG, arrived)
    assert arrived.flags.writeable
    assert (1, 1, 0) == (
        statistics.n_messages_out_of_band,
        statistics.n_messages_loaded,
        statistics.n_fallbacks,
    )
    assert statistics.nbytes_out_of_band >= BIG.nbytes


def test_a_small_message_is_what_it_always_was():
    with oobpickle.enabled() as arena:
        data = multiprocessing.connection._ForkingPickler.dumps([1, "a", np.arange(10)])

        assert type(data) is bytes
        assert "oobpickle" not in str(data)
        assert 0 == arena.statistics().n_messages_out_of_band
    assert [1, "a"] == pickle.loads(data)[:2]


@pytest.mark.parametrize("threshold", [0, 1000, 10**6])
def test_the_threshold_is_compared_with_the_whole_message(threshold):
    parts = [np.zeros(300, np.uint8) for _ in range(10)]
    with oobpickle.enabled(threshold=threshold) as arena:
        reader, writer = multiprocessing.Pipe()
        with reader, writer:
            writer.send(parts)
            reader.recv()

        assert int(threshold < 3000) == arena.statistics().n_messages_out_of_band


class Counted:
    """Counts how often it is reduced."""

    n_reduced = 0

    def __reduce__(self):
        Counted.n_reduced += 1
        return Counted, ()


@pytest.mark.parametrize("size", [10, MIB])
def test_no_reducer_runs_twice(size):
    Counted.n_reduced = 0
    with oobpickle.enabled():
        reader, writer = multiprocessing.Pipe()
        with reader, writer:
            writer.send([Counted(), np.zeros(size, np.uint8)])
            reader.recv()

    assert 1 == Counted.n_reduced


@pytest.fixture
def older():
    """A pipe older than any block, that an older process can read: the reading end first."""
    reader, writer = multiprocessing.Pipe(False)
    with reader, writer, process_with(reader.fileno()):
        yield reader, writer


def while_reading(receive, send):
    """Return what is received while it is sent: no pipe has room for so much."""
    with ThreadPoolExecutor(1) as executor:
        received = executor.submit(receive)
        send()
        return received.result(20)


def test_a_channel_that_an_older_process_can_read_stays_in_band_and_is_counted(older):
    reader, writer = older
    with (
        pytest.warns(FallbackWarning, match=r"1 message travelled in-band.*1\.0 MiB.*inside"),
        oobpickle.enabled(),
    ):
        arrived = while_reading(reader.recv, lambda: writer.send(BIG))

    np.testing.assert_array_equal(BIG, arrived)
    assert arrived.flags.writeable


@pytest.mark.parametrize("duplex", [False, pytest.param(True, marks=needs_kernel("sock_diag"))])
def test_an_older_channel_that_only_this_process_can_read_is_used(duplex):
    reader, writer = multiprocessing.Pipe(duplex)
    with reader, writer, oobpickle.enabled() as arena:
        writer.send(BIG)
        np.testing.assert_array_equal(BIG, reader.recv())
        assert arena.statistics().n_messages_out_of_band == 1


def test_a_warning_turned_into_an_error_comes_after_the_undo(older):
    reader, writer = older
    arrived = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FallbackWarning), oobpickle.enabled():
            arrived.append(while_reading(reader.recv, lambda: writer.send(BIG)))

    np.testing.assert_array_equal(BIG, arrived[0])


def test_a_full_arena_falls_back_and_says_so():
    kept = []
    with (
        pytest.warns(FallbackWarning, match="arena was full; pass enabled"),
        oobpickle.enabled(capacity=2 * MIB, wait_timeout=0, copy_on_receive=False) as arena,
    ):
        reader, writer = multiprocessing.Pipe()
        with reader, writer:
            for _ in range(4):
                thread = threading.Thread(target=lambda: kept.append(reader.recv()))
                thread.start()
                writer.send(BIG)
                thread.join()
        assert {"full"} == set(arena.statistics().fallbacks)
        assert 2 == arena.statistics().fallbacks["full"].n_messages

    for array in kept:
        np.testing.assert_array_equal(BIG, array)


@pytest.mark.parametrize(
    ("obj", "n_counted"),
    [(BIG, 1), (b"x" * MIB, 1), (b"x" * 1000, 0), (np.zeros(1000), 0)],
    ids=["array", "bytes", "small", "small array"],
)
def test_what_comes_in_band_from_somebody_who_does_not_take_part_is_counted(older, obj, n_counted):
    reader, writer = older
    pickled = multiprocessing.reduction.ForkingPickler.dumps(obj)  # as without the hook
    warned = pytest.warns(FallbackWarning) if n_counted else contextlib.nullcontext()
    with warned, oobpickle.enabled() as arena:
        arrived = while_reading(reader.recv, lambda: writer.send_bytes(pickled))
        fallbacks = dict(arena.statistics().fallbacks)

    np.testing.assert_array_equal(obj, arrived)
    assert fallbacks == ({"channel": Fallback(1, len(pickled))} if n_counted else {})


@pytest.mark.parametrize("obj", [BIG, "x" * MIB], ids=["buffers", "stream"])
def test_what_its_sender_has_counted_is_not_counted_twice(older, obj):
    reader, writer = older
    with pytest.warns(FallbackWarning, match="^1 message"), oobpickle.enabled() as arena:
        arrived = while_reading(reader.recv, lambda: writer.send(obj))
        assert arena.statistics().n_fallbacks == 1

    np.testing.assert_array_equal(obj, arrived)


@pytest.mark.parametrize("obj", [BIG, "x" * MIB], ids=["buffers", "stream"])
def test_what_its_sender_could_not_count_is_counted_for_it(older, obj, monkeypatch):
    """It is detached; the receiver's own messages are counted by itself."""
    reader, writer = older
    with pytest.warns(FallbackWarning, match="^1 message"), oobpickle.enabled() as arena:
        blocks = inner(arena).blocks
        closed = SimpleNamespace(
            joined=False, closed=False, n_passed=blocks.n_passed, count=lambda *_: None
        )
        monkeypatch.setattr(inner(arena), "blocks", closed)
        message = multiprocessing.connection._ForkingPickler.dumps(obj)
        monkeypatch.undo()
        assert inner(arena).blocks is blocks
        arrived = while_reading(reader.recv, lambda: writer.send_bytes(message))
        assert dict(arena.statistics().fallbacks) == {"detached": Fallback(1, len(message))}

    np.testing.assert_array_equal(obj, arrived)


@pytest.mark.parametrize("head", [b"", b"\x80\x05", b"\x80\x20"])
def test_bytes_that_are_no_pickle_are_not_counted(older, head):
    reader, writer = older
    data = head + bytes(MIB) + (b"." if head == b"\x80\x20" else b"")
    with oobpickle.enabled() as arena:
        assert data == while_reading(reader.recv_bytes, lambda: writer.send_bytes(data))
        assert arena.statistics().n_fallbacks == 0


def test_a_connection_handed_to_a_running_process_stays_in_band():
    with oobpickle.enabled():
        reader, writer = multiprocessing.Pipe(False)
        hook = installed.current
        with reader, writer:
            assert hook.channels.known(writer.fileno())
            multiprocessing.reduction.DupFd(reader.fileno())
            assert not hook.channels.known(writer.fileno())
        multiprocessing.resource_sharer.stop(timeout=20)


def test_messages_unread_at_the_end_of_the_block_can_still_be_read():
    with oobpickle.enabled() as arena:
        reader, writer = multiprocessing.Pipe(False)
        writer.send(BIG)
    with reader, writer:
        arrived = reader.recv()

    np.testing.assert_array_equal(BIG, arrived)
    assert arena.statistics().nbytes_resident >= BIG.nbytes
    del arrived
    assert 0 == arena.statistics().nbytes_resident


def test_an_envelope_made_before_the_end_of_the_block_can_be_sent_after_it():
    """A feeder thread may be between pickling and writing."""
    with oobpickle.enabled():
        reader, writer = multiprocessing.Pipe(False)
        frame_of_a_sender(writer)
        envelope = frame_of_a_sender(writer)
        assert type(envelope) is Envelope
    with reader, writer:
        writer.send_bytes(envelope)
        del envelope
        np.testing.assert_array_equal(BIG, reader.recv())


def frame_of_a_sender(self):
    """Pickle as ``Connection.send`` does, which has the connection in ``self``."""
    assert self.fileno() >= 0
    return multiprocessing.connection._ForkingPickler.dumps(BIG)


def test_an_envelope_that_is_never_sent_gives_its_blocks_back():
    with oobpickle.enabled() as arena:
        reader, writer = multiprocessing.Pipe(False)
        with reader, writer:
            frame_of_a_sender(writer)

        assert {"free": 1} == {k: v for k, v in arena.statistics().n_blocks.items() if v}


def test_a_send_without_readers_gives_its_blocks_back():
    with oobpickle.enabled() as arena:
        reader, writer = multiprocessing.Pipe(False)
        reader.close()
        with writer, pytest.raises(BrokenPipeError):
            writer.send(BIG)

        assert {"free": 1} == {k: v for k, v in arena.statistics().n_blocks.items() if v}


def test_raw_bytes_of_a_message_can_be_loaded_later():
    with oobpickle.enabled() as arena:
        reader, writer = multiprocessing.Pipe(False)
        with reader, writer:
            writer.send(BIG)
            raw = reader.recv_bytes()
            arena.trim()

            np.testing.assert_array_equal(BIG, pickle.loads(raw))


def test_what_somebody_else_put_on_top_stays():
    with oobpickle.enabled():
        ours = multiprocessing.connection.Pipe
        theirs = multiprocessing.connection.Pipe = lambda duplex=True: ours(duplex)
    try:
        assert multiprocessing.connection.Pipe is theirs
        reader, writer = multiprocessing.connection.Pipe()
        reader.close()
        writer.close()
    finally:
        multiprocessing.connection.Pipe = replaced_pipe(ours)


def replaced_pipe(hooked):
    return next(cell.cell_contents for cell in hooked.__closure__ if callable(cell.cell_contents))


def _free_threaded_build(monkeypatch):
    monkeypatch.setattr(_system, "FREE_THREADED", True)


def _without_gil(monkeypatch):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)


@pytest.mark.parametrize("simulate", [_free_threaded_build, _without_gil])
def test_a_free_threaded_python_is_refused(monkeypatch, simulate):
    simulate(monkeypatch)
    before = replaced_objects()
    with (
        pytest.warns(FallbackWarning, match=r"not in use.*free-threaded.*\(python3.14, not"),
        oobpickle.enabled(),
    ):
        assert before == replaced_objects()
        reader, writer = multiprocessing.Pipe(duplex=False)
        with reader, writer, ThreadPoolExecutor(1) as threads:
            sent = threads.submit(writer.send, np.arange(100_000))
            assert (reader.recv() == np.arange(100_000)).all()
            sent.result()
        assert oobpickle.statistics().n_messages_out_of_band == 0
    with pytest.raises(ArenaError, match="free-threaded"):
        oobpickle.install()
    assert before == replaced_objects()


@pytest.mark.parametrize("simulate", [_free_threaded_build, _without_gil])
def test_a_free_threaded_python_declines_offers(monkeypatch, simulate):
    found = []
    monkeypatch.setattr(SharedArena, "find", found.append)
    simulate(monkeypatch)
    _api.accept(secrets.token_bytes(32))

    assert found == []


def test_without_shared_memory_everything_stays_as_it_was(monkeypatch):
    monkeypatch.setenv("OOBPICKLE_BACKING", "none")
    before = replaced_objects()
    with (
        pytest.warns(FallbackWarning, match="not in use.*OOBPICKLE_BACKING is 'none'"),
        oobpickle.enabled(threshold=7) as arena,
    ):
        assert before == replaced_objects()
        assert (arena.closed, arena.options.threshold) == (True, 7)
        arena.trim()
        done = arena.statistics()
        assert done == oobpickle.statistics()
        assert (done.n_messages_out_of_band, done.n_fallbacks, done.nbytes["held"]) == (0, 0, 0)
    assert arena.statistics() == done
    with pytest.raises(ArenaError, match="not enabled"):
        oobpickle.statistics()
    with pytest.raises(ArenaError):
        oobpickle.install()


def test_what_locals_returned_to_a_caller_of_dumps_stays_as_it_is():
    def pickled(wanted, obj):
        mine = locals()
        multiprocessing.connection._ForkingPickler.dumps(obj)
        return mine, wanted

    with pytest.warns(FallbackWarning), oobpickle.enabled():
        variables, _ = pickled(1, BIG)

    assert variables["wanted"] == 1
    assert variables["obj"] is BIG


def test_a_warning_does_not_take_the_place_of_an_error_of_the_program():
    """Where warnings are errors."""
    with pytest.raises(ZeroDivisionError), oobpickle.enabled():
        installed.current.count_fallback("channel", MIB)
        raise ZeroDivisionError
    with pytest.raises(FallbackWarning, match="1 message"), oobpickle.enabled():
        installed.current.count_fallback("channel", MIB)
