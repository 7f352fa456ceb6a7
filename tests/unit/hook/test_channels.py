"""Channels: who is known."""

import contextlib
import fcntl
import math
import multiprocessing
import os
import resource
import struct
import tempfile

import pytest

from conftest import eventually, process_with
from kernel import needs_kernel
from oobpickle._hook import channels as channels_module
from oobpickle._hook.channels import Channels
from oobpickle._memory import reclaim
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._memory.pipes import channel_id
from oobpickle._memory.reclaim import UNPROVEN, pid_namespace
from oobpickle._native import core
from table import JOINED, VACANT, Table

MIB = 1 << 20


@pytest.fixture
def arena():
    arena = SharedArena.create(Options(capacity=64 * MIB))
    yield arena
    arena.close()
    arena.detach()
    assert arena.try_destroy()


def join_as(arena, pid):
    """Let the table say that a process has joined."""
    table = Table.of(arena)
    row = table.participant(1)
    row.pid[0], row.pid_namespace[0], row.state[0] = pid, pid_namespace(), JOINED
    table["n_slots"] = 2


@contextlib.contextmanager
def slot_held(arena, slot):
    """Hold a slot's proof of life, as its owner does."""
    fd = os.open(f"/proc/self/fd/{arena.descriptors[2]}", os.O_RDWR)
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 1 + slot, 1, 0)
    fcntl.fcntl(fd, 37, lock)  # F_OFD_SETLK
    try:
        yield
    finally:
        os.close(fd)


@pytest.fixture
def channels(arena):
    return Channels(arena)


@pytest.fixture(
    params=[
        pytest.param(False, id="pipe"),
        pytest.param(True, id="socket pair", marks=needs_kernel("sock_diag")),
    ]
)
def ends(request):
    reader, writer = multiprocessing.Pipe(request.param)
    with reader, writer:
        yield reader, writer


@pytest.fixture
def foreign(ends):
    """A process that has not joined and has the reading end open."""
    with process_with(ends[0].fileno()):
        yield


def test_a_channel_with_a_foreign_reader_is_unknown_until_it_is_noted(channels, ends, foreign):
    reader, writer = ends

    assert 0 == channels.known(writer.fileno())
    channels.note(reader.fileno(), writer.fileno())
    assert channel_id(reader.fileno()) == channels.known(writer.fileno())


def test_a_channel_whose_readers_all_take_part_is_known_after_one_look(channels, ends, monkeypatch):
    reader, writer = ends
    expected = channel_id(reader.fileno())

    assert expected == channels.known(writer.fileno())
    monkeypatch.setattr(channels_module, "readers", None)
    assert expected == channels.known(writer.fileno())


def test_a_look_in_vain_is_repeated_when_it_costs_little(channels, ends, monkeypatch):
    reader, writer = ends
    with process_with(reader.fileno()):
        assert 0 == channels.known(writer.fileno())
    eventually(lambda: channels.known(writer.fileno()) == channel_id(reader.fileno()))


def test_without_a_descriptor_to_look_a_channel_is_unknown(channels, ends):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        assert 0 == channels.known(ends[1].fileno())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    eventually(lambda: channels.known(ends[1].fileno()))


@pytest.mark.parametrize("hidden", ["descendant", "somebody else"])
def test_a_hidden_descendant_of_a_participant_may_read(channels, ends, monkeypatch, hidden):
    with process_with() as descendant:
        pid = descendant if hidden == "descendant" else 1
        monkeypatch.setattr(
            channels_module, "readers", lambda _: ({os.getpid()}, {os.getpid(), pid})
        )

        assert (0 == channels.known(ends[1].fileno())) is (hidden == "descendant")


def test_a_channel_that_nobody_can_read_is_unknown(channels, ends):
    reader, writer = ends
    reader.close()

    assert 0 == channels.known(writer.fileno())


def test_a_process_that_has_died_does_not_take_part(arena, channels, ends):
    """Its number may be somebody else's by now."""
    reader, writer = ends
    with process_with(reader.fileno()) as pid:
        join_as(arena, pid)

        assert 0 == channels.known(writer.fileno())
        assert pid not in arena.reclaim.living()


def test_a_process_of_another_namespace_does_not_take_part(arena, channels, ends, monkeypatch):
    """Its number is somebody else's here."""
    reader, writer = ends
    with process_with(reader.fileno()) as pid:
        join_as(arena, pid)
        with slot_held(arena, 1):
            monkeypatch.setattr(reclaim, "pid_namespace", lambda: pid_namespace() + 1)
            assert 0 == channels.known(writer.fileno())
            monkeypatch.undo()
            eventually(lambda: channels.known(writer.fileno()))
        Table.of(arena).participant(1).state[0] = VACANT


def test_an_end_that_was_handed_out_is_forgotten_on_both_sides(channels, ends):
    reader, writer = ends
    channels.note(reader.fileno(), writer.fileno())

    channels.forget(reader.fileno())

    assert [0, 0] == [channels.known(end.fileno()) for end in ends]


def test_a_file_that_is_handed_out_makes_nothing_doubtful(arena, channels, ends):
    """As the memory of a tensor is, with each message."""
    n_passed = arena.blocks.n_passed
    with tempfile.TemporaryFile() as file:
        channels.forget(file.fileno())

    assert n_passed == arena.blocks.n_passed


def test_what_a_program_inherits_is_looked_up_again(channels, ends):
    fds = [end.fileno() for end in ends]
    channels.note(*fds)
    expected = [channels.known(fd) for fd in fds]

    with channels.passing_on([fds[0]]):
        assert [0, 0] == [channels.known(fd) for fd in fds]
        with process_with(fds[0]):
            assert 0 == channels.known(fds[1])

    assert expected[1] == channels.known(fds[1])


def test_a_program_that_has_inherited_an_end_is_seen_at_once(channels, ends):
    channels.note(*(end.fileno() for end in ends))
    channels.known(ends[1].fileno())

    with channels.passing_on([ends[0].fileno()]):
        channels.known(ends[1].fileno())
        program = process_with(ends[0].fileno())
        program.__enter__()
    assert 0 == channels.known(ends[1].fileno())
    program.__exit__(None, None, None)


def test_two_programs_that_inherit_an_end_at_a_time(channels, ends):
    fds = [end.fileno() for end in ends]
    channels.note(*fds)
    first, second = channels.passing_on(fds[:1]), channels.passing_on(fds[:1])

    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)

    assert 0 == channels.known(fds[1])
    second.__exit__(None, None, None)
    assert channels.known(fds[1])


def test_what_is_handed_out_while_a_program_inherits_it_stays_unknown(channels, ends):
    fds = [end.fileno() for end in ends]
    channels.note(*fds)

    with channels.passing_on(fds[:1]):
        channels.forget(fds[0])

    assert 0 == channels.known(fds[1])


def test_what_was_handed_to_a_running_process_stays_unknown(channels, ends):
    fd = ends[0].fileno()
    channels.note(*(end.fileno() for end in ends))
    channels.forget(fd)

    with channels.passing_on([fd]):
        pass

    assert 0 == channels.known(ends[1].fileno())


def test_all_participants_look_again(arena, channels, ends):
    fds = [end.fileno() for end in ends]
    channels.note(*fds)
    other, late = Channels(arena, channels.to_bytes()), channels.to_bytes()

    with process_with(fds[0]):
        assert channels.known(fds[1]) == other.known(fds[1]) > 0
        with channels.passing_on([fds[0]]):
            pass
        assert [0, 0] == [other.known(fds[1]), Channels(arena, late).known(fds[1])]


def test_only_what_was_passed_on_is_looked_up_again(arena, channels, ends, foreign):
    channels.note(*(end.fileno() for end in ends))
    other = Channels(arena, channels.to_bytes())
    reader, writer = multiprocessing.Pipe(False)
    with reader, writer:
        channels.note(reader.fileno(), writer.fileno())
        with channels.passing_on([reader.fileno()]):
            pass

    expected = channel_id(ends[0].fileno())
    assert [expected] * 2 == [one.known(ends[1].fileno()) for one in (channels, other)]


@pytest.mark.parametrize("stuck", [False, True])
def test_what_cannot_be_listed_makes_all_doubtful(
    arena, channels, ends, foreign, stuck, monkeypatch
):
    channels.note(*(end.fileno() for end in ends))
    assert channels.known(ends[1].fileno())

    if stuck:
        table = Table.of(arena)
        core.wait_for_the_lock(5_000)
        with slot_held(arena, 1):
            table.header("lock", "u4")[0] = 2
            assert not arena.blocks.pass_on([1])
            table.header("lock", "u4")[0] = 0
        core.wait_for_the_lock(2_000_000)
    else:
        assert arena.blocks.pass_on(list(range(33)))

    assert 0 == channels.known(ends[1].fileno())


def test_descriptors_that_are_no_channels_matter_to_nobody(arena, channels):
    before = arena.blocks.n_passed

    with open("/dev/null") as file, channels.passing_on([1 << 20, file.fileno()]):
        pass

    assert before == arena.blocks.n_passed


def test_one_that_is_not_open_does_not_hide_the_others(channels, ends):
    channels.note(*(end.fileno() for end in ends))

    with channels.passing_on([1 << 20, ends[0].fileno()]):
        assert 0 == channels.known(ends[1].fileno())


def test_a_spawned_child_knows_what_its_parent_knows(arena, channels, ends):
    channels.note(*(end.fileno() for end in ends))

    child = Channels(arena, channels.to_bytes())

    assert [channels.known(e.fileno()) for e in ends] == [child.known(e.fileno()) for e in ends]


def test_the_oldest_channels_are_forgotten(channels, ends, monkeypatch):
    monkeypatch.setattr(channels_module, "_MOST_CHANNELS", 2)
    channels.note(*(end.fileno() for end in ends))
    reader, writer = multiprocessing.Pipe(True)
    with reader, writer:
        channels.note(reader.fileno(), writer.fileno())

        with process_with(ends[0].fileno()):
            assert 0 == channels.known(ends[1].fileno())
        assert 0 != channels.known(writer.fileno())


def test_what_is_passed_on_when_the_arena_has_gone_is_nobodys_business(arena, ends):
    """Another thread starts a program: it is in no operation that keeps the arena."""
    channels = Channels(arena)
    arena.close()
    arena.detach()
    assert arena.try_destroy()

    with channels.passing_on([ends[0].fileno()]):
        channels.forget(ends[1].fileno())
    assert arena.blocks.passed_since(arena.blocks.n_passed) == []


def test_older_processes_are_asked_as_long_as_they_follow(channels, ends, foreign):
    reader, writer = ends
    fd = writer.fileno()

    n_asked = sum(channels.asks(fd) for _ in range(200))
    assert 10 < n_asked < 100, n_asked
    for _ in range(1000):  # large messages of one who does not
        channels.ask_again()
    assert 0 < sum(channels.asks(fd) for _ in range(200)) < 100
    channels._vain[channel_id(fd)] = 1, math.inf  # nobody looks who is there now
    channels._older[channel_id(fd)] = (9, 1)  # somebody has joined, or come
    assert channels.asks(fd)
    channels.note(reader.fileno(), fd)
    assert not channels.asks(fd)


def test_only_a_channel_of_pipe_is_proved_empty(channels, ends):
    reader, writer = ends
    channel = channels.known(writer.fileno())

    assert channel | UNPROVEN == channels.marked(channel)
    channels.note(reader.fileno(), writer.fileno())
    assert channel == channels.marked(channel)
    assert 0 == channels.marked(0)


def test_both_ends_are_those_of_a_spawned_child_until_their_numbers_are_used_again(channels, ends):
    reader, writer = (end.fileno() for end in ends)
    channels.note(reader, writer)
    assert not channels.is_spawned(writer)
    channels.note_spawned(reader)

    assert channels.is_spawned(writer)
    assert channels.is_spawned(reader)
    assert not channels.is_spawned(None)
    channels.note(reader, writer)
    assert not channels.is_spawned(writer)


def test_what_is_no_channel_is_of_no_spawned_child(channels, arena, ends):
    for fd in arena.descriptors:
        channels.note_spawned(fd)

    assert not channels.is_spawned(ends[1].fileno())
    channels.spawned.add(0)
    assert channels.is_spawned(ends[1].fileno())
