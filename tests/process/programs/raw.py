"""Readers who take a message's bytes themselves: they have it, until it is loaded or they end."""

import asyncio
import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import inside
from inside import Token, eventually, fork, message, reap, verify

import oobpickle
from internals import inner
from oobpickle import _faults
from table import Table

MIB = 1 << 20
N = 3
_late = []

# Before the first arena is made: so it comes before what joins in the child.
os.register_at_fork(after_in_child=lambda: _late and _late.pop().take())


def _pipe():
    return multiprocessing.Pipe(duplex=False)


def _send_and_end(writer, n=N):
    for seed in range(n):
        writer.send(message(seed))


def _messages_in(data):
    """Yield the messages in what was read from a pipe."""
    while data:
        (nbytes,) = struct.unpack("!i", data[:4])
        yield data[4 : 4 + nbytes]
        data = data[4 + nbytes :]


def _read(fd, n=N):
    """Read so many messages without a connection, and no byte more."""
    found = []
    while len(found) < n:
        (nbytes,) = struct.unpack("!i", os.read(fd, 4))
        data = b""
        while len(data) < nbytes:
            data += os.read(fd, nbytes - len(data))
        found.append(data)
    return found


def _load(spool):
    """Load messages, each for the first time, and see that each can be loaded once."""
    for seed, data in enumerate(spool):
        verify(pickle.loads(data), seed)
        _assert_stale(data)
    for data in spool:
        _assert_stale(data)


def _assert_stale(data):
    with contextlib.suppress(oobpickle.StaleEnvelopeError):
        pickle.loads(data)
        raise AssertionError("the message was loaded a second time")


def _press(arena):
    """Do all that makes an arena look for lost messages, and use again what it finds."""
    arena.trim()
    for _ in range(2):
        leases = []
        with contextlib.suppress(oobpickle.ArenaFullError):
            while True:
                leases.append(inner(arena).acquire([MIB], wait_timeout=0))
        for lease in leases:
            for destination in lease.destinations:
                destination[::4096] = bytes(len(destination) // 4096)
            lease.release()
        arena.trim()
    read, write = _pipe()
    for seed in range(20):
        write.send(message(seed))
        verify(read.recv(), seed)


def _n_in_flight(arena):
    return arena.statistics().n_blocks["in_flight"]


# --- who reads, and with what


async def _read_to_the_end(connection):
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), connection
    )
    data = await reader.read()
    transport.close()
    return data


def asyncio_reads(method):
    """It closes the pipe at its end, when nothing is loaded yet and the sender is gone."""
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    process = multiprocessing.get_context(method).Process(target=_send_and_end, args=(write,))
    process.start()
    write.close()
    spool = list(_messages_in(asyncio.run(_read_to_the_end(read))))
    process.join()
    assert read.closed
    _press(arena)
    assert _n_in_flight(arena) == N, arena.statistics()
    _load(spool)
    inside.assert_empty(arena)


def the_parent_reads():
    for duplex in (False, True):
        arena = oobpickle.install(capacity=32 * MIB)
        read, write = multiprocessing.Pipe(duplex)
        pid = fork(_send_and_end, write)
        spool = _read(read.fileno())
        reap(pid)
        _press(arena)
        write.close()
        _press(arena)
        _load(spool)
        inside.assert_empty(arena)
        oobpickle.uninstall()


def a_spawned_child_reads():
    """The sender lives, and needs the room."""
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_read_and_load_when_told, args=(read, there))
    process.start()
    read.close()
    there.close()
    _send_and_end(write)
    assert here.recv() == "read"
    _press(arena)
    write.close()
    _press(arena)
    here.send("load")
    assert here.recv() == "loaded"
    process.join()
    assert process.exitcode == 0
    inside.assert_empty(arena)


def _read_and_load_when_told(read, connection):
    spool = _read(read.fileno())
    read.close()
    connection.send("read")
    connection.recv()
    _load(spool)
    connection.send("loaded")


def the_sender_reads():
    arena = oobpickle.install(capacity=32 * MIB)
    for duplex in (False, True):
        read, write = multiprocessing.Pipe(duplex)
        _send_and_end(write)
        spool = _read(read.fileno())
        _press(arena)
        read.close()
        write.close()
        _press(arena)
        _load(spool)
    inside.assert_empty(arena)


def spooled_to_a_file():
    """By a file object over a copy of the descriptor; read by somebody else, the reader's child."""
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    reap(fork(_send_and_end, write))
    write.close()
    with tempfile.TemporaryFile() as spool:
        with os.fdopen(os.dup(read.fileno()), "rb") as source:
            spool.write(source.read())
        read.close()
        _press(arena)
        spool.seek(0)
        messages = list(_messages_in(spool.read()))
    reap(fork(_load, messages))
    for data in messages:
        _assert_stale(data)
    inside.assert_empty(arena)


def a_number_that_was_taken_before_the_fork():
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    fd = read.fileno()
    has_read, go_on, go = Token(), Token(), Token()

    def starter():
        fork(reader)

    def reader():
        spool = _read(fd)
        has_read.give()
        go.take()
        _load(spool)
        go_on.give()

    reap(fork(starter))
    read.close()
    inner(arena).blocks.retain([])  # as if the one who asked had ended too
    _send_and_end(write)
    write.close()
    has_read.take()
    _press(arena)
    go.give()
    go_on.take()


def a_selector_of_the_user():
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    pid = fork(_send_and_end, write)
    assert select.select([read], [], [], 20)[0]
    spool = _read(read._handle)
    reap(pid)
    write.close()
    read.close()
    _press(arena)
    _load(spool)
    inside.assert_empty(arena)


def a_pipe_of_the_user():
    """Nobody has a connection that reads there; so that it is empty proves nothing."""
    arena = oobpickle.install(capacity=32 * MIB)
    fd, other_fd = os.pipe()
    with multiprocessing.connection.Connection(other_fd, readable=False) as write:
        reap(fork(_send_and_end, write))
    spool = _read(fd)
    _press(arena)
    assert arena.statistics().n_fallbacks == 0
    _load(spool)
    _assert_gone_with_its_channel(arena)
    os.close(fd)


def _assert_gone_with_its_channel(arena):
    fd, other_fd = os.pipe()
    with multiprocessing.connection.Connection(other_fd, readable=False) as write:
        _send_and_end(write)
    arena.trim()
    assert _n_in_flight(arena) == N
    os.close(fd)
    inside.assert_empty(arena)


# --- connections, whose messages are loaded later or never


def read_through_a_connection():
    """`recv_bytes` and `recv_bytes_into`: also in the process that has sent."""
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    _send_and_end(write)
    spool = [read.recv_bytes() for _ in range(N - 1)]
    buffer = bytearray(1000)
    nbytes = read.recv_bytes_into(buffer)
    spool.append(bytes(buffer[:nbytes]))
    write.close()
    read.close()
    _press(arena)
    _load(spool)
    inside.assert_empty(arena)


def a_sink_that_ends():
    """Several blocks a message, sent by a process that lives on; its parent needs the room."""
    arena = oobpickle.install(capacity=32 * MIB)
    for ending in (0, inside.KILLED):
        read, write = _pipe()
        has_read, go_on = Token(), Token()

        def sink(read=read, has_read=has_read, ending=ending):
            for _ in range(N):
                read.recv_bytes()
            has_read.give()
            while ending:
                signal.pause()

        def sender(write=write, go_on=go_on):
            for seed in range(N):
                write.send([message(seed), message(seed, 300_000)])
            go_on.take()

        pid, living = fork(sink), fork(sender)
        has_read.take()
        if ending:
            arena.trim()
            assert _n_in_flight(arena) == 2 * N, arena.statistics()
            os.kill(pid, signal.SIGKILL)
        reap(pid, ending)
        eventually(lambda: arena.trim() or _n_in_flight(arena) == 0)
        go_on.give()
        reap(living)
    inside.assert_empty(arena)


def a_raw_reader_that_ends():
    """What it has read is worth nothing now; the one who sent it lives."""
    arena = oobpickle.install(capacity=32 * MIB)
    for ending in (0, inside.KILLED):
        read, write = _pipe()
        has_read = Token()

        def reader(read=read, has_read=has_read, ending=ending):
            _read(read.fileno())
            has_read.give()
            while ending:
                signal.pause()

        pid = fork(reader)
        _send_and_end(write)
        has_read.take()
        if ending:
            _press(arena)
            assert _n_in_flight(arena) == N, arena.statistics()
            os.kill(pid, signal.SIGKILL)
        reap(pid, ending)
        eventually(lambda: arena.trim() or _n_in_flight(arena) == 0)
    inside.assert_empty(arena)


def _join_only_after(token):
    """Let the next child of this process take long to join."""
    _late.append(token)


def children_of_a_reader_that_ends():
    """They have its bytes, as with plain pickle; also one that has not joined yet by then."""
    arena = oobpickle.install(capacity=32 * MIB)
    for has_asked, is_late in ((False, False), (False, True), (True, False), (True, True)):
        read, write = _pipe()
        joined, go, done = Token(), Token(), Token()

        def child(spool, is_late=is_late, joined=joined, go=go, done=done):
            if not is_late:
                joined.give()
                go.take()
            _load(spool)
            done.give()

        def reader(child=child, read=read, asks=has_asked, late=is_late, joined=joined, go=go):
            spool = _read(read.fileno()) if asks else [read.recv_bytes() for _ in range(N)]
            if late:
                _join_only_after(go)
            fork(child, spool)
            if not late:
                joined.take()

        pid = fork(reader)
        _send_and_end(write)
        write.close()
        reap(pid)
        read.close()
        _press(arena)
        go.give()
        done.take()
        inside.assert_empty(arena)


def one_message_for_two():
    """The first load wins, wherever; the other one fails at once."""
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    report, answer = _pipe()
    ends = [_pipe() for _ in range(2)]

    def reader(read):
        while read.poll(None):
            try:
                received = read.recv()
            except oobpickle.StaleEnvelopeError:
                answer.send(None)
                continue
            if received is None:
                return
            received[1][:] = received[0]
            answer.send(received[0])
            assert (received[1] == received[0]).all(), "somebody else has it too"

    pids = [fork(reader, read) for read, _ in ends]
    for seed in range(1, 60):
        write.send(message(seed, 200_000))
        data = read.recv_bytes()
        for _, to in ends:
            to.send_bytes(data)
        assert sorted([report.recv() or 0 for _ in ends]) == [0, seed]
        _assert_stale(data)
    for _, to in ends:
        to.send(None)
    for pid in pids:
        reap(pid)
    inside.assert_empty(arena)


def sent_on_while_somebody_looks_for_lost_messages():
    """Before it is in the next channel it is in none."""
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    last_read, last_write = _pipe()
    reap(fork(_send_and_end, write))
    write.close()
    reach, reached = _faults.reach, []

    def look(name):
        if name == "receiving.sent_on":
            reached.append(name)
            _faults.reach = reach
            _press(arena)
            _faults.reach = look

    _faults.reach = look
    for data in _read(read.fileno(), 1) + [read.recv_bytes() for _ in range(N - 1)]:
        last_write.send_bytes(data)
    _faults.reach = reach
    assert len(reached) == N
    _press(arena)
    for seed in range(N):
        verify(last_read.recv(), seed)
    inside.assert_empty(arena)


def sent_on_to_nobody():
    """Who could not send it on has it still."""
    arena = oobpickle.install(capacity=32 * MIB)
    read, write = _pipe()
    reap(fork(_send_and_end, write))
    write.close()
    spool = [*_read(read.fileno(), 1), *(read.recv_bytes() for _ in range(N - 1))]
    read.close()
    for duplex in (False, True):
        last_read, last_write = multiprocessing.Pipe(duplex)
        last_read.close()
        for data in spool:
            with contextlib.suppress(BrokenPipeError):
                last_write.send_bytes(data)
                raise AssertionError("somebody reads it")
        last_write.close()
        _press(arena)
    _load(spool)
    inside.assert_empty(arena)


# --- after the block


def loaded_after_the_block():
    """By those who read it inside, whatever blocks came after; and then it is told apart."""
    gone = []
    for has_asked in (True, False):
        with oobpickle.enabled(capacity=32 * MIB) as arena:
            read, write = _pipe()
            reap(fork(_send_and_end, write))
            write.close()
            spool = _read(read.fileno()) if has_asked else [read.recv_bytes() for _ in range(N)]
            read.close()
        gone += spool
        for _ in range(2):
            with oobpickle.enabled(capacity=32 * MIB):
                pass
        assert not inner(arena).blocks.ended
        _load(spool)
        with oobpickle.enabled(capacity=32 * MIB):
            pass
        gc.collect()
        with oobpickle.enabled(capacity=32 * MIB):
            assert inner(arena).blocks.ended
            for data in gone:
                _assert_stale(data)
        for data in gone:
            _assert_stale(data)


# --- who is not meant


def _echo(received):
    return received


def what_multiprocessing_does_by_itself(method):
    """It asks for descriptors too, and reads through connections: nothing is noted."""
    arena = oobpickle.install(capacity=64 * MIB)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    there.send(message(1))
    assert here.poll()
    assert multiprocessing.connection.wait([here], 20) == [here]
    verify(here.recv(), 1)
    with context.Pool(1) as pool, ProcessPoolExecutor(1, context) as executor:
        for seed in range(2):
            verify(pool.apply(_echo, (message(seed),)), seed)
            verify(executor.submit(_echo, message(seed)).result(), seed)
        pool.close()
        pool.join()
    queue = context.Queue()
    process = context.Process(target=queue.put, args=(message(3),))
    process.start()
    verify(queue.get(), 3)
    process.join()
    there.fileno()
    assert [there.fileno() != -1, here._handle != -1] == [True, True]
    noted = _noted(arena)
    assert len(noted) == 1, noted  # that of this test, just now
    _, write = _pipe()
    write.fileno()
    assert _noted(arena) == noted


def _own_row(arena):
    return Table.of(arena).participant(inner(arena).blocks.slot)


def _noted(arena):
    return [int(source) for source in _own_row(arena).kept if source]


def _keeps_all(arena):
    return _own_row(arena).keeps_all[0] != 0


def what_a_program_was_given():
    """Nobody here asked for it to read there: what it has left unread is lost."""
    arena = oobpickle.install(capacity=32 * MIB)
    code = "import os, sys; os.read(int(sys.argv[1]), 1)"
    for duplex in (False, True):
        read, write = multiprocessing.Pipe(duplex)
        _send_and_end(write)
        fd = read.fileno()
        with subprocess.Popen([sys.executable, "-c", code, str(fd)], pass_fds=[fd]) as program:
            assert program.wait(20) == 0
        read.close()
        write.close()
        inside.assert_empty(arena)
    read, write = _pipe()
    _send_and_end(write)
    with subprocess.Popen([sys.executable, "-c", "input"], stdin=read) as program:
        assert program.wait(20) == 0
    read.close()
    inside.assert_empty(arena)


def more_channels_than_can_be_noted():
    """Then nothing is lost either; those whose messages were loaded make place for others."""
    arena = oobpickle.install(capacity=64 * MIB)
    for seed in range(100):
        read, write = _pipe()
        write.send(message(seed, 100_000))
        verify(pickle.loads(_read(read.fileno(), 1)[0]), seed)
        read.close()
        write.close()
    assert not _keeps_all(arena)
    spool = []
    for seed in range(100):
        read, write = _pipe()
        write.send(message(seed, 100_000))
        spool += _read(read.fileno(), 1)
        read.close()
        write.close()
    assert _keeps_all(arena)
    _press(arena)
    reap(fork(_load, spool))
    inside.assert_empty(arena)


if __name__ == "__main__":
    inside.main()
