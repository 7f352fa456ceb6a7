"""Pipes: what the kernel says about bytes that nobody has read yet."""

import errno
import fcntl
import os
import resource
import socket
import stat
import sys

import pytest

from conftest import process_with
from kernel import needs_kernel
from oobpickle._memory import pipes
from oobpickle._memory.pipes import (
    channel_id,
    is_broken,
    n_unread,
    readers,
    reading_end,
    unreadable,
    widened,
)

MIB = 1 << 20


@pytest.fixture(params=["pipe", "socket"])
def ends(request):
    """The reading and the writing end of a channel of each kind."""
    if request.param == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    opened = [reader, writer]
    yield opened
    for fd in opened:
        os.close(fd)


def close(ends, position):
    os.close(ends.pop(position))


def hide(monkeypatch, pid):
    listdir = os.listdir

    def look(path):
        if path == f"/proc/{pid}/fd":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", look)


def is_unreadable(channel, pids, **options):
    return unreadable([channel], pids, **options) == {channel}


# --- names


def test_both_ends_of_a_pipe_have_one_name():
    reader, writer = os.pipe()
    try:
        assert channel_id(reader) == channel_id(writer) != 0
    finally:
        os.close(reader)
        os.close(writer)


def test_a_duplicate_has_the_name_of_its_original(ends):
    copy = os.dup(ends[1])
    try:
        assert channel_id(copy) == channel_id(ends[1]) != 0
    finally:
        os.close(copy)


def test_different_channels_have_different_names(ends):
    others = [*os.pipe(), *(end.detach() for end in socket.socketpair())]
    try:
        assert not {channel_id(fd) for fd in ends} & {channel_id(fd) for fd in others}
        assert len({channel_id(fd) for fd in others}) == 3
    finally:
        for fd in others:
            os.close(fd)


def test_what_is_no_channel_has_no_name(tmp_path):
    with open(tmp_path / "file", "wb") as file, open("/dev/null", "wb") as null:
        assert (channel_id(file.fileno()), channel_id(null.fileno())) == (0, 0)


def test_a_closed_descriptor_is_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="Bad file"):
        channel_id(writer)


@pytest.mark.parametrize(
    "ends", ["pipe", pytest.param("socket", marks=needs_kernel("sock_diag"))], indirect=True
)
def test_the_reading_end_of_each_channel_has_its_name(ends):
    reader, writer = ends

    assert channel_id(reader) == reading_end(writer) != 0


@needs_kernel("sock_diag")
def test_both_ends_of_a_connection_know_each_other(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "address"))
        listener.listen()
        client.connect(str(tmp_path / "address"))
        server, _ = listener.accept()
        with server:
            assert channel_id(server.fileno()) == reading_end(client.fileno())
            assert channel_id(client.fileno()) == reading_end(server.fileno())


def test_what_is_no_connection_of_this_machine_has_no_reading_end(tmp_path, monkeypatch):
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as tcp,
        open(tmp_path / "file", "wb") as file,
        socket.socket(socket.AF_UNIX) as unconnected,
    ):
        fds = [end.fileno() for end in (tcp, file, unconnected)]
        assert [0, 0, 0] == [reading_end(fd) for fd in fds]
    one, other = socket.socketpair()
    with one, other:
        monkeypatch.setattr("oobpickle._memory.pipes._NETLINK_SOCK_DIAG", 99)
        assert 0 == reading_end(one.fileno())


def test_those_who_can_read_are_found(ends):
    channel = channel_id(ends[0])

    assert {os.getpid()} == readers(channel)[0]
    with process_with(ends[0]) as pid:
        assert {os.getpid(), pid} == readers(channel)[0]
        close(ends, 0)
        assert {pid} == readers(channel)[0]
    assert set() == readers(channel)[0]


def test_who_can_only_write_is_no_reader():
    reader, writer = os.pipe()
    channel = channel_id(reader)
    os.close(reader)
    try:
        with process_with(writer):
            assert set() == readers(channel)[0]
    finally:
        os.close(writer)


def test_readers_of_other_users_are_found(ends, monkeypatch):
    with process_with(ends[0]) as pid:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)

        assert {os.getpid(), pid} == readers(channel_id(ends[0]))[0]


def test_those_who_hide_what_they_have_open_are_named(ends, monkeypatch):
    with process_with(ends[0]) as pid:
        hide(monkeypatch, pid)
        found, hidden = readers(channel_id(ends[0]))

    assert {os.getpid()} == found
    assert pid in hidden


# --- bytes


def test_the_bytes_of_a_pipe_are_counted_at_both_ends():
    reader, writer = os.pipe()
    try:
        channel = channel_id(writer)
        os.write(writer, b"abcde")

        assert (n_unread(writer, channel), n_unread(reader, channel)) == (5, 5)
        os.read(reader, 3)
        assert (n_unread(writer, channel), n_unread(reader, channel)) == (2, 2)
    finally:
        os.close(reader)
        os.close(writer)


def test_nothing_is_unread_once_all_is_read(ends):
    reader, writer = ends
    channel = channel_id(writer)

    assert n_unread(writer, channel) == 0
    os.write(writer, b"abcde")
    assert n_unread(writer, channel) > 0
    os.read(reader, 2)
    assert n_unread(writer, channel) > 0
    os.read(reader, 3)
    assert n_unread(writer, channel) == 0


# --- its size


def size_of(fd):
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def test_a_pipe_holds_a_megabyte_for_a_while():
    reader, writer = os.pipe()
    try:
        before = size_of(reader)
        assert before < MIB
        with pytest.raises(EOFError), widened(reader):
            assert size_of(writer) == MIB
            os.set_blocking(writer, False)
            assert os.write(writer, bytes(2 * MIB)) == MIB
            assert os.read(reader, MIB) == bytes(MIB)
            raise EOFError
        assert size_of(reader) == before
    finally:
        os.close(reader)
        os.close(writer)


def test_a_pipe_that_is_needed_wide_stays_so():
    reader, writer = os.pipe()
    try:
        with widened(reader):
            assert os.write(writer, bytes(MIB)) == MIB
        assert size_of(reader) == MIB
        assert os.read(reader, MIB) == bytes(MIB)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_pipe_that_is_wide_stays_so():
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, MIB)
        with widened(reader):
            assert size_of(reader) == MIB
        assert size_of(reader) == MIB
    finally:
        os.close(reader)
        os.close(writer)


def test_what_cannot_be_widened_is_left_alone(ends, monkeypatch):
    if stat.S_ISFIFO(os.fstat(ends[0]).st_mode):

        def refuse(fd, command, *args):
            if command == fcntl.F_SETPIPE_SZ:
                raise PermissionError(errno.EPERM, "over the limit of this user")
            return call(fd, command, *args)

        call = fcntl.fcntl
        monkeypatch.setattr(fcntl, "fcntl", refuse)

    with widened(ends[0]):
        os.write(ends[1], b"abc")
        assert os.read(ends[0], 3) == b"abc"


# --- readers


def test_a_channel_without_reader_is_broken(ends):
    writer = ends[1]
    channel = channel_id(writer)

    assert not is_broken(writer, channel)
    close(ends, 0)
    assert is_broken(writer, channel)


def test_a_channel_with_unread_bytes_and_no_reader_is_broken(ends):
    writer = ends[1]
    os.write(writer, b"abc")
    close(ends, 0)

    assert is_broken(writer, channel_id(writer))


def test_the_read_end_of_a_pipe_without_writers_is_not_broken():
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    os.close(writer)
    try:
        assert not is_broken(reader, channel_id(reader))
    finally:
        os.close(reader)


def test_a_reader_in_another_process_counts(ends):
    with process_with(ends[0]):
        close(ends, 0)

        assert not is_broken(ends[0], channel_id(ends[0]))
    assert is_broken(ends[0], channel_id(ends[0]))


# --- unreadable


def test_unread_bytes_can_be_read(ends):
    os.write(ends[1], b"abc")

    assert not is_unreadable(channel_id(ends[0]), [])


def test_bytes_that_were_read_can_be_read_no_more(ends):
    os.write(ends[1], b"abc")
    os.read(ends[0], 3)

    assert is_unreadable(channel_id(ends[0]), [])


def test_an_empty_channel_counts_only_if_it_is_said(ends):
    channel = channel_id(ends[0])

    assert is_unreadable(channel, [])
    assert not is_unreadable(channel, [], even_if_empty=False)
    close(ends, 0)
    close(ends, 0)
    assert is_unreadable(channel, [], even_if_empty=False)


def test_bytes_without_any_reader_can_be_read_no_more(ends):
    channel = channel_id(ends[0])
    os.write(ends[1], b"abc")
    close(ends, 0)

    assert is_unreadable(channel, [])


def test_bytes_left_by_dead_writers_can_be_read(ends):
    channel = channel_id(ends[0])
    os.write(ends[1], b"abc")
    close(ends, 1)

    assert not is_unreadable(channel, [])
    os.read(ends[0], 3)
    assert is_unreadable(channel, [])


@pytest.mark.parametrize("listed", [True, False])
def test_a_channel_that_another_process_has_open_can_be_read(ends, listed):
    channel = channel_id(ends[0])
    os.write(ends[1], b"abc")
    with process_with(*ends) as pid:
        pids = [os.getpid(), pid] if listed else []
        close(ends, 0)
        close(ends, 0)

        assert not is_unreadable(channel, pids)
    assert is_unreadable(channel, pids)


@pytest.mark.parametrize(("pids", "expected"), [(["ours"], False), ([], True)])
def test_a_descendant_of_a_participant_that_hides_its_descriptors_may_read(
    ends, monkeypatch, pids, expected
):
    channel = channel_id(ends[0])
    with process_with(*ends) as hidden:
        close(ends, 0)
        close(ends, 0)
        hide(monkeypatch, hidden)

        assert is_unreadable(channel, [os.getpid() for _ in pids]) is expected


def test_processes_that_end_meanwhile_are_no_error(ends, monkeypatch):
    channel, listdir = channel_id(ends[0]), os.listdir
    close(ends, 0)
    close(ends, 0)
    monkeypatch.setattr(os, "listdir", lambda path: [*listdir(path), "4194999"])

    assert is_unreadable(channel, [4194998])


def test_each_of_several_channels_has_its_own_answer():
    pipes = [os.pipe() for _ in range(3)]
    one, two, three = channels = [channel_id(reader) for reader, _ in pipes]
    try:
        for _, writer in pipes[:2]:
            os.write(writer, b"abc")
        os.close(pipes[1][0])
        with process_with(*pipes[0]):
            os.close(pipes[0][0])
            os.close(pipes[0][1])

            assert unreadable(channels, []) == {two, three}
        assert unreadable({one, two, 0}, []) == {one, two}
    finally:
        for fd in (pipes[1][1], *pipes[2]):
            os.close(fd)


def test_without_a_descriptor_to_look_everything_can_be_read(ends):
    channel = channel_id(ends[0])
    close(ends, 0)
    close(ends, 0)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        answer = unreadable([channel], [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    assert answer == set()
    assert unreadable([channel], []) == {channel}


def test_something_without_a_name_can_always_be_read():

    assert not is_unreadable(0, [])


def test_asking_opens_nothing(ends):
    before = os.listdir("/proc/self/fd")
    n_unread(ends[1], channel_id(ends[0]))
    is_broken(ends[1], channel_id(ends[0]))
    is_unreadable(channel_id(ends[0]), [os.getpid(), os.getppid()])

    assert len(before) == len(os.listdir("/proc/self/fd"))


def test_that_an_unproven_channel_is_empty_says_nothing(ends):
    channel = channel_id(ends[0])
    assert is_unreadable(channel, [])

    assert not is_unreadable(channel, [], unproven=[channel])
    close(ends, 0)
    close(ends, 0)
    assert is_unreadable(channel, [], unproven=[channel])


@pytest.mark.parametrize("look", [lambda: pipes._descriptors_of("self"), pipes._own_pids])
def test_nothing_of_ours_runs_when_a_look_is_given_up(look):
    """A Ctrl-C in there would be printed and lost."""
    found, calls = look(), []
    next(found)
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code) if event == "call" else None)
    found.close()
    sys.setprofile(None)
    assert [code for code in calls if code.co_name != found.__name__] == []
