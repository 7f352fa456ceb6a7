"""An onlooker sees what a participant sees, and changes nothing."""

import gc
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest

import oobpickle
from conftest import eventually
from internals import inner
from oobpickle._errors import ArenaError
from oobpickle._memory import table as tables
from oobpickle._memory.onlooker import arenas_of
from oobpickle._memory.pipes import channel_id
from oobpickle._memory.reclaim import pid_namespace
from table import LEASED, QUARANTINED, Table

LARGE = np.ones(50_000)  # 400,000 bytes: a block of its own


@pytest.fixture
def arena():
    with oobpickle.enabled(capacity=64 << 20) as arena:
        yield arena
        gc.collect()


@pytest.fixture
def pipe():
    read, write = multiprocessing.Pipe(duplex=False)
    yield read, write
    read.close()
    write.close()


def seen_of(arena):
    (found,) = [one for one in arenas_of(os.getpid()) if one.identity == arena.identity]
    return found


def file_of(arena):
    """Return the bytes and the pages of the table's file."""
    fd = inner(arena).descriptors[1]
    return os.pread(fd, tables.core.LAYOUT["table.rows"] + 64 * 100, 0), os.fstat(fd).st_blocks


def test_it_sees_what_a_participant_sees(arena, pipe):
    read, write = pipe
    write.send(LARGE)
    held = [read.recv()]
    with oobpickle.broadcast(LARGE) as handle:
        write.send(LARGE)
        write.send([LARGE.copy(), LARGE.copy(), bytes(500_000)])
        lease = inner(arena).acquire([100_000])
        seen = seen_of(arena)
        assert seen.statistics == arena.statistics()
        assert seen.statistics.n_published == 1
        (me,) = seen.participants
        assert (me.pid, me.pid_namespace, me.is_alive) == (os.getpid(), pid_namespace(), True)
        assert (me.leased, me.read) == ((1, 100_000), (0, 0))
        assert me.held == (2, 400_000)
        assert me.n_references == 1  # the handle
        ((channel, (n, nbytes)),) = seen.unread.items()
        assert (channel, n) == (channel_id(write.fileno()), 2)
        assert 1_700_000 < nbytes < 1_701_000
        read.recv()
        read.recv()
        del lease, handle
    del held


def test_what_was_read_and_not_loaded_is_the_reader_s(arena, pipe):
    read, write = pipe
    write.send([LARGE, LARGE.copy()])
    data = read.recv_bytes()
    (me,) = seen_of(arena).participants

    assert seen_of(arena).unread == {}
    assert (me.read, me.nbytes) == ((2, 800_000), 800_000)
    assert len(pickle.loads(data)) == 2


def test_nothing_changes(arena, pipe):
    read, write = pipe
    write.send(LARGE)
    before, descriptors = file_of(arena), os.listdir("/proc/self/fd")
    seen_of(arena)

    assert file_of(arena) == before
    assert os.listdir("/proc/self/fd") == descriptors
    read.recv()


def test_a_process_without_an_arena_and_one_that_does_not_exist():
    pid = os.fork()
    if pid == 0:
        os.closerange(3, 1 << 16)
        while True:
            signal.pause()
    try:
        eventually(lambda: arenas_of(pid) == [])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        arenas_of(pid)


def test_a_participant_that_died_is_dead_with_what_it_had(arena, pipe):
    read, write = pipe
    ready, say = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        held = read.recv()
        say.send(held.nbytes)
        signal.pause()
    write.send(LARGE)
    assert ready.recv() == LARGE.nbytes
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    seen = seen_of(arena)

    assert {one.pid: (one.is_alive, one.held[1]) for one in seen.participants} == {
        os.getpid(): (True, 0),
        pid: (False, LARGE.nbytes),
    }
    assert seen.n_gone == 0
    inner(arena).reclaim.reap()
    assert seen_of(arena).n_gone == 1
    assert len(seen_of(arena).participants) == 1
    ready.close()
    say.close()


def test_whose_the_lock_is(arena):
    assert not seen_of(arena).participants[0].has_the_lock
    table = Table.of(arena)
    table.header("lock", "u4")[0] = inner(arena).blocks.slot + 1
    try:
        assert seen_of(arena).participants[0].has_the_lock
    finally:
        table.header("lock", "u4")[0] = 0


def test_a_row_that_is_damaged_is_counted_and_believed_in_nothing(arena):
    lease = inner(arena).acquire([100_000])
    table = Table.of(arena)
    ((index, _, _),) = table.owned()
    good = table.rows["commit"][index].copy()
    table.rows["commit"][index] = good ^ (1 << 40)
    seen = seen_of(arena)

    assert seen.statistics == arena.statistics()
    assert seen.statistics.n_quarantined == 1
    assert seen.participants[0].leased == (0, 0)
    table.rows["commit"][index] = good
    assert seen_of(arena).participants[0].leased == (1, 100_000)
    del lease


def test_a_row_that_is_half_written_is_read_again(arena, monkeypatch):
    lease = inner(arena).acquire([100_000])
    pread, n_reads = os.pread, []

    def torn_at_first(fd, nbytes, at):
        found = pread(fd, nbytes, at)
        if at != tables.core.LAYOUT["table.rows"]:
            return found
        n_reads.append(at)
        return found if len(n_reads) > 1 else bytes(len(found))

    monkeypatch.setattr(os, "pread", torn_at_first)

    assert seen_of(arena).participants[0].leased == (1, 100_000)
    assert seen_of(arena).statistics.n_quarantined == 0
    del lease


def test_another_version(monkeypatch, arena):
    def is_none(_):
        raise ValueError("no table of this version: ...")

    monkeypatch.setattr("oobpickle._memory.table.core.constants", is_none)
    with pytest.raises(ArenaError, match="no table of this version"):
        arenas_of(os.getpid())


def test_the_words_are_those_of_the_layout():
    assert (tables.LEASED, tables.QUARANTINED) == (LEASED, QUARANTINED)
    layout = tables.core.LAYOUT
    n_participants = (layout["table.rows"] - layout["table.participants"]) / 1024

    assert n_participants == 4096
