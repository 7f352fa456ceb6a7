"""The arena in one process: senders, receivers, room, ends."""

import ctypes
import errno
import gc
import multiprocessing
import os
import signal
import struct
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import oobpickle
from conftest import eventually
from kernel import IS_EMULATED
from oobpickle import ArenaError, ArenaFullError, EnvelopeError, StaleEnvelopeError
from oobpickle._memory import headroom, reclaim, sending
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.files import name_of
from oobpickle._memory.options import Options
from oobpickle._memory.pipes import channel_id
from oobpickle._native import core
from participants import first_of, number_of_mappings, send, stopped_holder, vanish
from table import (
    FREE,
    Table,
    commit_word,
)

MIB = 1 << 20


def address(view):
    return np.frombuffer(view, np.uint8).ctypes.data


def test_where_nothing_tells_of_forks_its_name_is_made_anew(arena, monkeypatch):
    """It names a process: a child made by clone(2) says its own id, from its first message on."""
    for pid in (os.getpid(), 7):
        monkeypatch.setattr(core, "epoch", lambda: 0)
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        assert arena.name == name_of(arena.identity, arena.descriptors) != b""
        monkeypatch.undo()


def test_destinations_are_aligned_and_writable(arena):
    lease = arena.acquire([1, 7, 65, 70_000, 3 * MIB])

    assert {0} == {address(view) % 64 for view in lease.destinations}
    assert not any(view.readonly for view in lease.destinations)
    lease.release()


def test_the_receiver_gets_the_very_memory_that_the_sender_wrote(arena):
    lease = arena.acquire([100_000])
    written = address(lease.destinations[0])
    pairs = lease.pairs
    lease.seal(0)
    lease.depart()

    (view,) = arena.receiving.claim(pairs, [100_000])

    assert written == address(view)


def test_a_block_comes_back_when_the_last_view_of_it_is_gone(arena):
    (view,) = arena.receiving.claim(*send(arena, b"x" * MIB))
    array = np.frombuffer(view, np.uint8)[5:].reshape(-1, 1)
    kept = array.view("u1").T[0, 3:]
    del view, array
    gc.collect()

    assert MIB == arena.statistics().nbytes["held"]
    del kept
    assert 0 == arena.statistics().nbytes["held"]


def test_a_message_is_loaded_once(arena):
    blocks, needs = send(arena, b"x" * MIB)
    views = arena.receiving.claim(blocks, needs)

    with pytest.raises(StaleEnvelopeError, match="loaded already"):
        arena.receiving.claim(blocks, needs)
    del views
    with pytest.raises(StaleEnvelopeError):
        arena.receiving.claim(blocks, needs)


def test_a_dropped_lease_gives_its_blocks_back(arena):
    lease = arena.acquire([MIB, 100])
    lease.seal(0)
    del lease

    assert {"free": 2, "leased": 0, "in_flight": 0, "held": 0} == arena.statistics().n_blocks


def test_a_settled_lease_does_not(arena):
    sent = send(arena, b"x")
    gc.collect()

    assert 1 == arena.statistics().n_blocks["in_flight"]
    arena.receiving.claim(*sent)


def test_the_message_of_a_full_arena_has_the_numbers_and_the_option(make_arena):
    arena = make_arena(capacity=4 * MIB)
    lease = arena.acquire([3 * MIB])

    with pytest.raises(ArenaFullError, match=r"need 2\.0 MiB, 1\.0 MiB left of 4\.0 MiB") as error:
        arena.acquire([2 * MIB], wait_timeout=0)

    assert "full" == error.value.reason
    assert "capacity=" in str(error.value)
    lease.release()


def test_a_message_that_finds_no_room_leaves_nothing_leased(make_arena):
    arena = make_arena(capacity=4 * MIB)

    with pytest.raises(ArenaFullError):
        arena.acquire([MIB, MIB, MIB, 2 * MIB], wait_timeout=0)

    assert 0 == arena.statistics().n_blocks["leased"]
    arena.acquire([3 * MIB], wait_timeout=0).release()


def test_idle_pages_of_other_sizes_make_room(make_arena):
    arena = make_arena(capacity=8 * MIB)
    for size in (64 << 10, MIB, 7 * MIB, 2 * MIB, 8 * MIB, 5000):
        arena.acquire([size], wait_timeout=0).release()

    assert arena.statistics().nbytes_resident <= 8 * MIB


def test_a_sender_waits_for_room_that_is_given_back(make_arena):
    arena = make_arena(capacity=4 * MIB)
    held = arena.acquire([4 * MIB])
    waiting = threading.Event()
    original = arena.reclaim.make_room

    def make_room(reason, need, *, again):
        waiting.set()
        return original(reason, need, again=again)

    arena.reclaim.make_room = make_room
    thread = threading.Thread(target=lambda: waiting.wait(20) and held.release())
    thread.start()
    lease = arena.acquire([4 * MIB], wait_timeout=20)
    thread.join()

    lease.release()


def test_too_little_memory_on_the_machine_is_found_before_it_is_taken(arena, monkeypatch):
    monkeypatch.setattr(headroom, "available_nbytes", lambda: 300 * MIB)
    monkeypatch.setattr(headroom, "limit_nbytes", lambda: 16 << 30)
    before = arena.statistics().nbytes_resident

    with pytest.raises(ArenaFullError, match="too little memory: need 50 MiB") as error:
        arena.acquire([50 * MIB], wait_timeout=0)

    assert "memory" == error.value.reason
    assert before == arena.statistics().nbytes_resident
    assert 0 == arena.statistics().n_blocks["leased"]
    assert 0 == arena.blocks.resident


def test_free_blocks_of_other_sizes_give_their_pages_when_memory_is_short(make_arena, monkeypatch):
    arena = make_arena(capacity=256 * MIB)
    arena.blocks.keep_nbytes = 256 * MIB
    arena.acquire([MIB] * 100).release()
    assert arena.blocks.resident == 100 * MIB
    monkeypatch.setattr("oobpickle._memory.sending._MARGIN_NBYTES", 0)
    monkeypatch.setattr(headroom, "available_nbytes", lambda: 150 * MIB - arena.blocks.resident)
    arena.sending._allowance = 0

    lease = arena.acquire([60 * MIB], wait_timeout=0)

    assert arena.blocks.resident == 60 * MIB
    lease.release()


@pytest.mark.parametrize("wait_timeout", [None, 1e-3])
def test_what_waits_in_vain_by_default_does_so_once(make_arena, monkeypatch, wait_timeout):
    """Until there is room again; who says how long to wait is taken at his word."""
    arena, pauses = make_arena(capacity=8 * MIB, wait_timeout=wait_timeout), []
    clock = SimpleNamespace(monotonic=lambda: 1 + sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(sending, "time", clock)
    held = [arena.acquire([MIB]) for _ in range(8)]

    def n_pauses(nbytes):
        before = len(pauses)
        with pytest.raises(ArenaFullError):
            arena.acquire([nbytes])
        return len(pauses) - before

    assert n_pauses(MIB)
    assert [n_pauses(MIB) > 0, n_pauses(2 * MIB) > 0] == [wait_timeout is not None] * 2
    assert n_pauses(MIB // 2)
    held.pop().release()
    held.append(arena.acquire([MIB]))
    assert n_pauses(MIB)
    assert n_pauses(MIB) == 0 or wait_timeout is not None
    for lease in held:
        lease.release()


def test_copy_out_gives_the_block_back_at_once(make_arena):
    arena = make_arena(copy_on_receive=True)
    blocks, needs = send(arena, b"x" * MIB, b"y" * 100)

    views = arena.receiving.claim(blocks, needs)

    assert [b"x" * MIB, b"y" * 100] == [bytes(view) for view in views]
    assert 0 == arena.statistics().nbytes["held"]
    assert (2, MIB + 100) == (
        arena.statistics().n_copied_on_receive,
        arena.statistics().nbytes_copied_on_receive,
    )
    views[0][:1] = b"z"  # private and writable


def test_receivers_copy_out_when_half_of_the_capacity_is_held(make_arena):
    arena = make_arena(capacity=8 * MIB)
    views = [arena.receiving.claim(*send(arena, bytes([i]) * MIB)) for i in range(6)]

    assert arena.blocks.held <= 5 * MIB
    assert [bytes([i]) * MIB for i in range(6)] == [bytes(view) for (view,) in views]
    assert arena.statistics().n_copied_on_receive >= 1


@pytest.mark.parametrize(("nbytes", "n_copied"), [(2 * MIB, 2), (2 * MIB + 1, 0)])
def test_a_message_above_a_quarter_of_the_capacity_is_not_copied(make_arena, nbytes, n_copied):
    arena = make_arena(capacity=8 * MIB)
    views = [arena.receiving.claim(*send(arena, bytes([i]) * nbytes)) for i in range(3)]
    views += [arena.receiving.claim(*send(arena, b"\3" * MIB)) for i in range(n_copied // 2)]

    assert n_copied == arena.statistics().n_copied_on_receive
    assert [bytes([i]) * nbytes for i in range(3)] == [bytes(view) for (view,) in views[:3]]


def test_copy_out_false_never_copies(make_arena):
    arena = make_arena(capacity=8 * MIB, copy_on_receive=False)
    views = [arena.receiving.claim(*send(arena, b"x" * MIB)) for i in range(6)]

    assert 6 * MIB == arena.statistics().nbytes["held"]
    assert 0 == arena.statistics().n_copied_on_receive
    del views


def test_beyond_the_limit_of_mappings_receivers_copy_out(arena):
    arena.receiving._most_held = 3
    views = [arena.receiving.claim(*send(arena, b"x" * 100)) for i in range(8)]

    assert 3 == arena.blocks.n_held
    assert {b"x" * 100} == {bytes(view) for (view,) in views}


def test_a_closed_arena_gives_no_leases_but_loads_what_is_on_its_way(make_arena):
    arena = make_arena()
    sent = send(arena, b"x" * MIB)
    arena.close()
    arena.detach()

    with pytest.raises(ArenaFullError, match="closed"):
        arena.acquire([1])
    (view,) = arena.receiving.claim(*sent)
    assert b"x" * MIB == bytes(view)
    assert not arena.try_destroy()
    del view
    assert arena.try_destroy()


def test_closing_gives_free_pages_back_before_it_returns(make_arena):
    arena = make_arena()
    arena.acquire([5 * MIB, 100]).release()
    assert arena.statistics().nbytes_resident >= 5 * MIB

    arena.close()

    assert 0 == arena.statistics().nbytes_resident


def test_closing_frees_what_nobody_can_read_while_that_can_be_seen(make_arena):
    """Once it is closed nobody says what he reads, so an empty channel means nothing any more."""
    arena = make_arena()
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        lease = arena.acquire([MIB])
        lease.seal(channel_id(writer.fileno()))
        lease.depart()
        lease.settle()
        assert arena.statistics().n_blocks["in_flight"] == 1
        arena.close()

        assert arena.statistics().n_blocks["in_flight"] == 0
        assert arena.statistics().nbytes_resident == 0


def test_pages_of_arrays_that_outlive_the_arena_go_back_when_they_die(make_arena):
    arena = make_arena()
    (first,) = arena.receiving.claim(*send(arena, b"x" * MIB))
    (second,) = arena.receiving.claim(*send(arena, b"y" * MIB))
    arena.close()
    arena.detach()

    assert 2 * MIB == arena.statistics().nbytes_resident
    del first
    assert MIB == arena.statistics().nbytes_resident
    assert b"y" * MIB == bytes(second)
    del second
    assert 0 == arena.statistics().nbytes_resident


def _hold(arena, *sizes):
    """Receive a message of so many bytes each, in a block of its own."""
    held = []
    for seed, nbytes in enumerate(sizes):
        pairs, needs = send(arena, bytes([seed + 1]) * nbytes)
        (view,) = arena.receiving.claim(pairs, needs)
        held.append(view)
    return held


def _are_right(held):
    return all(bytes(view) == bytes([seed + 1]) * len(view) for seed, view in enumerate(held))


def test_what_is_held_of_an_arena_can_become_memory_of_its_own(make_arena):
    arena = make_arena()
    held = _hold(arena, 100, 5000, MIB, 3 * MIB, 100_000)
    places = [address(view) for view in held]
    inode = os.fstat(arena.descriptors[0]).st_ino
    arena.close()
    arena.detach()

    assert not arena.try_destroy()
    assert not arena.try_destroy(most_nbytes=4 * MIB)  # it is more
    assert arena.try_destroy(most_nbytes=8 * MIB)

    assert arena.blocks.ended
    with open("/proc/self/maps") as maps:  # nothing but private pages of the arrays
        mine = [line for line in maps if f" {inode} " in line]
    assert len(held) == len(mine)
    assert {"rw-p"} == {line.split()[1] for line in mine}
    assert _are_right(held)
    assert [address(view) for view in held] == places
    held[3][:] = b"x" * 3 * MIB  # beside its neighbours
    del held[3]
    assert _are_right(held[:3])
    assert bytes(held[3]) == b"\x05" * 100_000
    gc.collect()


def test_what_is_held_besides_arrays_keeps_an_arena(make_arena):
    arena = make_arena()
    (held,) = _hold(arena, MIB)
    unread = send(arena, b"unread")
    arena.close()
    assert not arena.try_destroy(most_nbytes=8 * MIB)
    arena.receiving.claim(*unread)
    arena.detach()
    assert _are_right([held])

    assert arena.try_destroy(most_nbytes=8 * MIB)
    assert _are_right([held])


def test_what_cannot_become_private_keeps_its_arena(make_arena):
    arena = make_arena()
    held = _hold(arena, MIB, MIB)
    arena.close()
    arena.detach()
    core.arm("mapping.privatize", 2, -errno.ENOMEM)
    assert not arena.try_destroy(most_nbytes=8 * MIB)
    core.arm(None, 0, 0)
    assert _are_right(held)

    assert arena.try_destroy(most_nbytes=8 * MIB)
    assert _are_right(held)


def test_statistics_outlive_the_memory():
    arena = SharedArena.create(Options(capacity=64 * MIB))
    arena.acquire([100]).release()
    arena.close()
    arena.detach()
    assert arena.try_destroy()

    assert 1 == arena.statistics().n_blocks["free"]
    assert arena.closed
    assert arena.try_destroy()  # again does nothing
    with pytest.raises(ArenaFullError):
        arena.acquire([1])


def name_with(arena, numbers):
    """Return a name that says that the arena's files are somewhere else."""
    return arena.identity + struct.pack("<5I", os.getpid(), *[*numbers, 0xFFFFFFFF][:4])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["nothing", "fifo", "directory", "short", "foreign", "public"])
def test_an_address_that_names_something_else_is_refused(arena, tmp_path, which, kind):
    opened = {
        "nothing": list,
        "fifo": lambda: list(os.pipe()),
        "directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
        "short": lambda: [os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)],
        "foreign": lambda: [private_file(os.fstat(arena.descriptors[0]).st_size)],
        "public": lambda: [os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o644)],
    }[kind]()
    numbers = list(arena.descriptors)
    numbers[which] = opened[0] if opened else 999
    before, n_mapped = os.listdir("/proc/self/fd"), number_of_mappings()
    try:
        with pytest.raises((ArenaError, OSError)):
            SharedArena.find(name_with(arena, numbers))
        assert len(before) == len(os.listdir("/proc/self/fd"))
        assert n_mapped == number_of_mappings()
    finally:
        for fd in opened:
            os.close(fd)


@pytest.mark.parametrize(("user", "mode"), [(0, 0o640), (0, 0o602), (65534, 0o600)])
def test_files_that_others_may_open_are_not_attached_to(arena, user, mode):
    os.fchmod(arena.descriptors[0], mode)
    if user:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.fchown(arena.descriptors[0], user, user)

    with pytest.raises(ArenaError, match="not private to this user"):
        SharedArena.find(arena.name)


def private_file(nbytes):
    fd = os.memfd_create("oobpickle-test")
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, nbytes)
    return fd


def test_a_message_that_nobody_can_read_is_reclaimed(arena):
    read_fd, write_fd = os.pipe()
    lease = arena.acquire([100, MIB])
    lease.seal(os.fstat(write_fd).st_ino)
    lease.depart()
    lease.settle()
    os.write(write_fd, b"envelope")

    assert 0 == arena.reclaim.reclaim()
    os.close(read_fd)
    assert 2 == arena.reclaim.reclaim()
    assert 2 == arena.statistics().n_reclaimed
    os.close(write_fd)


def test_a_message_whose_reader_may_be_hidden_is_kept(arena, monkeypatch):
    read_fd, write_fd = os.pipe()
    lease = arena.acquire([MIB])
    lease.seal(os.fstat(write_fd).st_ino)
    lease.depart()
    lease.settle()
    os.close(read_fd)
    os.close(write_fd)
    with monkeypatch.context() as patch:
        patch.setattr(reclaim, "pid_namespace", lambda: 1)

        assert 0 == arena.reclaim.reclaim()
    eventually(arena.reclaim.reclaim)


def test_a_message_with_an_unknown_channel_is_kept(arena):
    sent = send(arena, b"x" * MIB)

    assert 0 == arena.reclaim.reclaim()
    arena.receiving.claim(*sent)


def test_what_was_written_is_what_arrives(arena):
    contents = [os.urandom(n) for n in (1, 100, 70_000, 0, 3 * MIB)]
    pairs, needs = send(arena, *contents)

    found = arena.receiving.claim(pairs, needs)

    assert contents == [bytes(view) for view in found]


def test_messages_take_no_reference_of_what_never_dies(arena):
    # They are immortal from 3.12 on: but a wheel that was built there runs on 3.11, too. And 3.14
    # shows what modules take that were built with older headers, up to a limit, where it stays.
    constants = (None, False)
    before = [sys.getrefcount(constant) for constant in constants]

    for _ in range(300):
        arena.receiving.claim(*send(arena, b"x"))
        arena.reclaim.reap()
        arena.blocks.is_damaged(0)

    after = [sys.getrefcount(constant) for constant in constants]
    gained = [a - b for a, b in zip(after, before, strict=True)]
    assert min(gained) > -250, (before, after)
    if sys.version_info < (3, 12):
        assert max(gained) < 250, (before, after)


@pytest.mark.parametrize("block", [(0, 99), (5, 1), (1 << 19, 1), (1 << 40, 1), (0, 0)])
def test_placements_that_mean_nothing_are_refused(arena, block):
    sent = send(arena, b"x" * MIB)

    with pytest.raises(StaleEnvelopeError):
        arena.receiving.claim(struct.pack("<2Q", *block), [MIB])
    with pytest.raises(StaleEnvelopeError):
        arena.receiving.claim(sent[0], [MIB + 1])
    arena.receiving.claim(*sent)


def test_a_released_block_is_used_again(arena):
    pairs, needs = send(arena, b"x" * MIB)
    (view,) = arena.receiving.claim(pairs, needs)
    del view

    again, _ = send(arena, b"y" * MIB)

    index, generation = first_of(pairs)
    assert (index, generation + 1) == first_of(again)
    arena.receiving.claim(again, needs)


def test_a_message_whose_second_block_is_gone_is_given_back(arena):
    """Nobody else can load the rest of it."""
    pairs, needs = send(arena, b"x" * MIB, b"y" * MIB)
    index, _ = struct.unpack_from("<2Q", pairs, 16)
    rows = Table.of(arena).rows
    before = rows["commit"][index]
    rows["commit"][index] = commit_word(index, FREE, 0, 77)

    with pytest.raises(EnvelopeError):
        arena.receiving.claim(pairs, needs)

    assert arena.statistics().n_blocks["held"] == 0
    assert arena.statistics().n_quarantined == 1
    rows["commit"][index] = before
    arena.receiving.claim(pairs[16:], needs[1:])


def test_a_message_received_before_its_sender_has_settled_is_held(arena):
    """Sender and receiver may be threads of one process: the feeder thread of a queue."""
    lease = arena.acquire([MIB])
    pairs = lease.pairs
    lease.seal(0)
    lease.depart()
    (view,) = arena.receiving.claim(pairs, [MIB])
    lease.settle()
    del lease

    assert MIB == arena.statistics().nbytes["held"]
    assert 1 == arena.blocks.n_held
    del view
    assert 0 == arena.blocks.n_held


def test_without_the_lock_messages_arrive_and_arrays_die(arena):
    sent = [send(arena, bytes([n % 256]) * 60_000) for n in range(1000)]
    go_on = stopped_holder(arena)
    try:
        arrived = [arena.receiving.claim(*one)[0] for one in sent]
        assert all(bytes(view) == bytes([n % 256]) * 60_000 for n, view in enumerate(arrived))
        before = core.epoch()
        del arrived
        assert before == core.epoch()
        assert arena.statistics().n_blocks["held"] == 0
        with pytest.raises(ArenaFullError, match="stopped") as error:
            arena.acquire([100])
        assert "busy" == error.value.reason
    finally:
        go_on()

    assert {"free": 1000, "leased": 0, "in_flight": 0, "held": 0} == arena.statistics().n_blocks


def test_each_step_is_counted(arena):
    """So whoever waits for the lock sees that its holder is not stopped."""
    steps = Table.of(arena).participant(arena.blocks.slot).steps
    before = int(steps[0])

    arena.acquire([100]).release()

    assert before < int(steps[0])


def test_a_dead_holder_of_the_lock_is_followed(arena):
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    lease = other.acquire([MIB])
    Table.of(arena).header("lock", "u4")[0] = other.blocks.slot + 1
    vanish(other)

    arena.acquire([100]).release()

    arena.reclaim.reap()
    assert 1 == arena.statistics().n_participants
    assert 0 == arena.statistics().n_blocks["leased"]
    del lease


@pytest.mark.parametrize("n_freed", [1, 2, 3])
def test_what_a_dead_one_was_about_to_free_is_freed(arena, n_freed):
    leases = [arena.acquire([MIB]) for _ in range(4)]
    for lease in leases:
        lease.release()

    pid = os.fork()
    if pid == 0:
        core.arm("free.linked", n_freed, signal.SIGKILL)
        arena.acquire([100])
        os._exit(0)
    assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    arena.reclaim.reap()
    Table.of(arena).assert_in_order()
    assert {"free": 4, "leased": 0, "in_flight": 0, "held": 0} == arena.statistics().n_blocks


def test_the_child_of_a_signal_handler_does_not_wait_for_the_lock_in_its_parents_name(arena):
    go_on = stopped_holder(arena)
    core.wait_for_the_lock(500_000)
    pids = []
    before = signal.signal(signal.SIGALRM, lambda *_: pids.append(os.fork()))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(ArenaFullError) as error:
            arena.acquire([100])
        if pids[0] == 0:
            os._exit(0 if error.value.reason == "detached" else 1)
    finally:
        if pids and pids[0] == 0:
            os._exit(2)
        signal.signal(signal.SIGALRM, before)
        status = os.waitpid(pids[0], 0)[1]
        go_on()

    assert "busy" == error.value.reason
    assert 0 == status


def test_who_inherits_a_slot_and_its_lock_goes_on(arena):
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    slot = other.blocks.slot
    vanish(other)
    assert 1 == arena.reclaim.reap()
    Table.of(arena).header("lock", "u4")[0] = slot + 1

    third = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))

    assert slot == third.blocks.slot
    third.acquire([100]).release()
    vanish(third)
    arena.reclaim.reap()


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_free_blocks_keep_no_more_than_they_may(arena, kept):
    """The death of an array does it, without another call."""
    arena.blocks.keep_nbytes = kept * MIB
    views = [arena.receiving.claim(*send(arena, b"x" * MIB)) for _ in range(8)]
    assert 8 * MIB == arena.statistics().nbytes_resident

    del views

    assert kept * MIB == arena.statistics().nbytes_resident
    arena.reclaim.reap()
    assert kept * MIB == arena.statistics().nbytes["free"] == arena.blocks.resident


def test_what_was_prepared_does_not_count(arena):
    arena.preallocate(nbytes=10 * MIB)
    arena.blocks.keep_nbytes = 2 * MIB
    views = [arena.receiving.claim(*send(arena, b"x" * MIB)) for _ in range(4)]
    del views

    assert 12 * MIB == arena.statistics().nbytes_resident


@pytest.mark.parametrize("how", ["a message takes it", "trim"])
def test_what_was_prepared_is_not_idle_before_it_was_used(arena, how):
    arena.preallocate(nbytes=MIB)
    table = Table.of(arena)
    assert 0 == table["idle"]

    if how == "trim":
        arena.trim()
    else:
        lease = arena.acquire([MIB])
    assert 0 == table["idle"]

    if how != "trim":
        lease.release()
        assert MIB == table["idle"]


@pytest.mark.parametrize(
    ("limits", "available", "kept", "is_machines"),
    [
        ([], 1 << 30, (1 << 30) // 4, True),
        ([], MIB // 2, MIB // 4, False),  # what is held may stay: half of what is left
        ([3 << 30, 1 << 30], 16 << 30, (1 << 30) // 8, False),
        ([9 << 30], 1 << 30, (1 << 30) // 4, True),
    ],
)
def test_the_limit_follows_the_memory_that_there_is(
    arena, monkeypatch, limits, available, kept, is_machines
):
    sent = [send(arena, b"x" * MIB) for _ in range(2)]
    monkeypatch.setattr(headroom, "limits", lambda: [(n, "", "", ("", "")) for n in limits])
    monkeypatch.setattr(headroom, "available_on_machine_nbytes", lambda: available)
    (view,) = arena.receiving.claim(*sent[0])
    assert arena.blocks.keep_nbytes == 64 * MIB
    del view

    monkeypatch.setattr("oobpickle._memory.receiving._LEAST_KEPT_NBYTES", MIB // 64)
    (view,) = arena.receiving.claim(*sent[1])

    # What has pages is counted as available: it will be, when the view has died.
    assert arena.blocks.keep_nbytes == kept + (2 * MIB // 4 if is_machines else 0)
    assert bytes(view) == b"x" * MIB


def test_a_fork_makes_ordinary_memory_of_what_is_held(arena):
    (view,) = arena.receiving.claim(*send(arena, b"a" * MIB))
    index = Table.of(arena).owned()[0][0]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if bytes(view) == b"a" * MIB else 1)
    view[:1] = b"b"

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert 0 == arena.statistics().nbytes_resident
    assert (1, MIB) == (
        arena.statistics().n_copied_at_fork,
        arena.statistics().nbytes_copied_at_fork,
    )
    assert index == Table.of(arena).owned()[0][0]  # it is held, and nobody else gets it
    del view
    (again,) = arena.receiving.claim(*send(arena, b"c" * MIB))
    assert index == Table.of(arena).owned()[0][0]
    assert b"c" * MIB == bytes(again)
    eventually(lambda: arena.reclaim.reap() or arena.statistics().n_participants == 1)


@pytest.mark.skipif(IS_EMULATED, reason="an emulator makes a fork(3) of it, or ignores the advice")
def test_the_child_of_a_raw_clone_knows_that_it_is_nobody(arena):
    """No handler runs there: it releases nothing, and sends nothing."""
    views = arena.receiving.claim(*send(arena, b"x" * MIB))
    libc = ctypes.PyDLL(None)
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    pid = libc.syscall(number, int(signal.SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        status = 1
        try:
            del views
            with pytest.raises(ArenaFullError):
                arena.acquire([MIB])
            status = core.epoch()
        finally:
            os._exit(status)

    assert 0 == os.waitpid(pid, 0)[1]
    assert 1 == arena.statistics().n_blocks["held"]
    del views


def test_a_fork_gives_back_the_pages_of_a_larger_message_before(arena):
    del arena.receiving.claim(*send(arena, b"x" * 2 * MIB))[:]
    (view,) = arena.receiving.claim(*send(arena, b"y" * (MIB + MIB // 2)))
    assert 1 == Table.of(arena).n_rows
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

    assert 0 == os.fstat(arena.descriptors[0]).st_blocks
    assert b"y" * (MIB + MIB // 2) == bytes(view)
    del view
    arena.reclaim.reap()


def test_a_child_sees_what_comes_in_a_block_that_was_its_parents(arena):
    """Its copy of the array is private memory in that place: the file is mapped elsewhere."""
    (view,) = arena.receiving.claim(*send(arena, b"a" * MIB))
    dropped, sent = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.read(dropped[0], 1)
            (mine,) = arena.receiving.claim(*send(arena, b"m" * MIB))
            assert (b"a" * MIB, b"m" * MIB) == (bytes(view), bytes(mine))
            mine[:1] = b"n"
            assert bytes(view[:1]) == b"a"
            status = 0
        finally:
            os._exit(status)
    del view
    os.write(dropped[1], b"x")

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for fd in (*dropped, *sent):
        os.close(fd)
    eventually(lambda: arena.reclaim.reap() or arena.statistics().n_participants == 1)


def test_the_end_of_the_senders_lease_leaves_what_a_fork_has_made_private(arena):
    """A queue's feeder keeps the envelope until its next message."""
    lease = arena.acquire([MIB])
    lease.destinations[0][:] = b"x" * MIB
    pairs = lease.pairs
    lease.seal(0)
    lease.depart()
    lease.settle()
    (view,) = arena.receiving.claim(pairs, [MIB])
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    del lease

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert b"x" * MIB == bytes(view)
    del view
    (again,) = arena.receiving.claim(*send(arena, b"y" * MIB))
    assert b"y" * MIB == bytes(again)
    eventually(lambda: arena.reclaim.reap() or arena.statistics().n_participants == 1)


def test_what_a_fork_cannot_make_private_is_counted(arena):
    (view,) = arena.receiving.claim(*send(arena, b"a" * MIB))
    core.arm("mapping.privatize", 1, -errno.ENOMEM)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    core.arm(None, 0, 0)

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert 1 == arena.statistics().n_shared_after_fork
    assert b"a" * MIB == bytes(view)
    eventually(lambda: arena.reclaim.reap() or arena.statistics().n_participants == 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_pages_that_the_system_refuses_are_a_reason_too(arena, number):
    core.arm("mapping.reserve", 1, -number)

    with pytest.raises(ArenaFullError, match=os.strerror(number)) as error:
        arena.acquire([MIB], wait_timeout=0)

    assert "space" == error.value.reason
    assert 0 == arena.statistics().n_blocks["leased"]


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "table"), (errno.EIO, "damaged")])
def test_a_table_without_a_row_is_a_reason_too(arena, number, reason):
    core.arm("row.make", 1, -number)

    with pytest.raises(ArenaFullError) as error:
        arena.acquire([MIB], wait_timeout=0)

    assert reason == error.value.reason
    assert {} == {k: n for k, n in arena.statistics().n_blocks.items() if n}


def test_messages_that_find_it_full_do_not_count_its_blocks_each(make_arena, monkeypatch):
    arena, n_counted = make_arena(capacity=8 * MIB), []
    held = [arena.acquire([MIB]) for _ in range(8)]
    census = arena.blocks.census
    blocks = SimpleNamespace(
        lease=arena.blocks.lease,
        joined=True,
        census=lambda: n_counted.append(1) or census(),
    )
    monkeypatch.setattr(arena.sending, "_blocks", blocks)
    monkeypatch.setattr(sending, "_COUNT_EVERY_S", 1000)

    for _ in range(50):
        with pytest.raises(ArenaFullError, match=r"8\.0 MiB leased"):
            arena.acquire([MIB])

    assert len(n_counted) <= 2
    for lease in held:
        lease.release()


def test_no_page_is_taken_from_a_damaged_block_that_is_held(arena):
    sent = send(arena, b"x" * MIB)
    (view,) = arena.receiving.claim(*sent)
    index, _ = first_of(sent[0])
    commit = Table.of(arena).rows["commit"]
    before, commit[index] = commit[index], 0xBAD << 40
    arena.trim()

    assert arena.statistics().n_quarantined == 1
    assert b"x" * MIB == bytes(view)
    commit[index] = before
    del view
    arena.blocks.census()


def test_a_table_of_another_version_is_refused(arena):
    data, table, locks = arena.descriptors
    copies = [os.dup(fd) for fd in (data, table, locks)]
    version = Table.of(arena)._words(8, 1, "u8")
    version[0] += 1
    try:
        with pytest.raises(ArenaError, match=r"version 7, expected .* and 6"):
            SharedArena.attach(*copies)
    finally:
        version[0] -= 1
        for fd in copies:
            os.close(fd)


def test_a_damaged_header_is_refused_before_anything_is_mapped(arena):
    copies = [os.dup(fd) for fd in arena.descriptors]
    n_mapped, capacity = number_of_mappings(), Table.of(arena).header("capacity")
    capacity[0] ^= 1
    try:
        with pytest.raises(ArenaError, match=r"header .* is damaged"):
            SharedArena.attach(*copies)
    finally:
        capacity[0] ^= 1
        for fd in copies:
            os.close(fd)
    del capacity
    assert n_mapped == number_of_mappings()


def test_attached_twice_is_two_participants(arena):
    """One process stands for two: each has its own slot and its own view of the blocks."""
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    sent = send(arena, b"x" * MIB)
    (view,) = other.receiving.claim(*sent)

    assert b"x" * MIB == bytes(view)
    assert arena.options == other.options
    assert 2 == arena.statistics().n_participants
    assert MIB == arena.statistics().nbytes["held"]
    del view
    vanish(other)
    assert 1 == arena.reclaim.reap()
    assert 1 == arena.statistics().n_participants


def test_what_a_dead_participant_had_is_room_for_the_next(make_arena):
    arena = make_arena(capacity=8 * MIB)
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    lease = other.acquire([4 * MIB])
    views = other.receiving.claim(*send(arena, b"x" * 3 * MIB))
    vanish(other)

    arena.acquire([6 * MIB], wait_timeout=0).release()

    assert 1 == arena.statistics().n_participants
    del views, lease


def test_a_message_that_was_read_is_its_readers_to_keep(arena):
    read_fd, write_fd = os.pipe()
    lease = arena.acquire([100, MIB])
    pairs, needs = lease.pairs, [len(view) for view in lease.destinations]
    lease.seal(os.fstat(write_fd).st_ino)
    lease.depart()
    lease.settle()
    os.write(write_fd, b"envelope")

    def read():
        message = os.read(read_fd, 100)
        assert 0 == arena.reclaim.reclaim()
        return message, first_of(pairs)

    assert b"envelope" == arena.receiving.receive(read)
    assert 0 == arena.reclaim.reclaim()
    views = arena.receiving.claim(pairs, needs)
    assert 0 == arena.reclaim.reclaim()
    del views
    os.close(read_fd)
    os.close(write_fd)


def test_a_message_that_was_read_and_is_given_up_comes_back(arena):
    pairs, _ = send(arena, b"x" * MIB, b"y" * MIB)
    arena.blocks.adopt(*first_of(pairs))

    arena.receiving.discard(*first_of(pairs))
    arena.receiving.discard(*first_of(pairs))

    assert 1 == arena.reclaim.reclaim()  # what follows the first
    assert {"free": 2, "leased": 0, "in_flight": 0, "held": 0} == arena.statistics().n_blocks


def test_many_threads_send_and_receive(arena):
    errors = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            contents = [rng.bytes(int(n)) for n in rng.integers(1, 200_000, 3)]
            found = arena.receiving.claim(*send(arena, *contents))
            if [bytes(view) for view in found] != contents:
                errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == errors
    assert 0 == arena.statistics().n_blocks["in_flight"]


def test_a_large_block_is_used_again_for_a_larger_message(make_arena):
    arena = make_arena(capacity=512 * MIB)
    arena.blocks.keep_nbytes = 512 * MIB
    for nbytes in (113 * MIB, 127 * MIB, 113 * MIB):
        lease = arena.acquire([nbytes])
        lease.destinations[0][-1:] = b"x"
        index = lease.blocks[0].index
        lease.release()
        del lease

    assert index == 0


def test_a_block_that_is_larger_than_a_window_has_its_own(make_arena):
    arena = make_arena(capacity=512 * MIB)
    large, small = arena.blocks.lease([70 * MIB, 100])  # no page of them is made

    assert 128 * MIB == Table.of(arena).offset(small.index)
    del large, small


def test_the_index_of_a_message_that_is_copied_is_held_until_the_rest_is_claimed(make_arena):
    arena = make_arena(copy_on_receive=True)
    pairs, needs = send(arena, b"x" * MIB, b"y" * MIB)

    index = arena.receiving.claim(pairs[:16], needs[:1], is_index=True)
    assert 0 == arena.reclaim.look()
    (rest,) = arena.receiving.claim(pairs[16:], needs[1:])

    assert b"y" * MIB == bytes(rest)
    del index


def test_who_keeps_all_keeps_what_others_have_read(arena):
    """A child may have the bytes of its parent, which could not be listed."""
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    sent = send(arena, b"x" * MIB)
    other.blocks.adopt(*first_of(sent[0]))
    vanish(other)
    arena.reclaim.reap()
    arena.blocks.keep_all()

    assert 0 == arena.reclaim.reclaim()
    arena.receiving.claim(*sent)


def test_what_was_sent_on_since_it_was_looked_at_is_kept(arena):
    sent = send(arena, b"x" * MIB)
    looked = arena.blocks.unowned()
    arena.blocks.settle(arena.blocks.send_on(*first_of(sent[0]), 77))

    assert 0 == arena.blocks.free_lost(looked)
    arena.receiving.claim(*sent)


def test_pages_that_a_dead_process_may_not_have_made_are_made_again(arena):
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    other.blocks.lease([MIB])  # and dies before it has reserved them
    vanish(other)
    arena.reclaim.reap()
    assert 0 == arena.statistics().nbytes_resident

    arena.acquire([MIB]).release()

    assert MIB == arena.statistics().nbytes_resident == arena.blocks.resident


def test_a_damaged_place_is_left_alone(arena):
    arena.acquire([MIB]).release()
    place = Table.of(arena).rows["place"]
    before, place[0] = place[0], (1 << 64) - 1
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    assert other.blocks.is_damaged(0)
    other.blocks.unmap()
    other.statistics()
    vanish(other)
    place[0] = before
    Table.of(arena).rows["commit"][0] = commit_word(0, FREE, 0, 1)
    arena.reclaim.reap()


def claim(arena, pairs, needs):
    (block,) = arena.blocks.claim(pairs, needs, False)
    return block


def test_what_is_detached_from_its_arena_outlives_it(arena):
    block = claim(arena, *send(arena, b"x" * MIB))
    arena.close()
    assert arena.try_destroy(most_nbytes=MIB)

    assert not block.is_on_disk
    assert block.nbytes_fresh == block.nbytes_resident == 0
    block.reserve(1)
    assert bytes(block) == b"x" * MIB


def test_what_is_claimed_after_others_were_detached_keeps_the_arena(arena):
    messages = [send(arena, content * MIB) for content in (b"x", b"y")]
    first = claim(arena, *messages[0])
    arena.close()
    assert arena.blocks.part(MIB)
    second = claim(arena, *messages[1])
    assert bytes(first) == b"x" * MIB
    del first

    assert not arena.blocks.end()
    assert bytes(second) == b"y" * MIB
    del second


# --- preallocate


@pytest.fixture
def block():
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        yield arena


@pytest.mark.parametrize(
    "like",
    [
        np.zeros(1_000_000),
        [np.zeros(1000)] * 3 + [np.zeros(500_000), "text"],
        {"a": np.zeros(100), "b": b"x" * 1_000_000},
        [np.zeros(1000) for _ in range(2000)],
    ],
    ids=["one", "several", "large stream", "many small"],
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_messages_find_what_was_prepared(block, like, count):
    block.preallocate(like, count=count)
    resident = block.statistics().nbytes_resident
    assert (resident > 0) is (count > 0)

    read, write = multiprocessing.Pipe(duplex=False)
    received = []
    for _ in range(count):
        write.send(like)
        received.append(read.recv())

    done = block.statistics()
    assert resident == done.nbytes_resident
    assert (count, 0) == (done.n_messages_out_of_band, done.n_fallbacks)


def test_a_number_of_bytes_is_prepared(block):
    block.preallocate(nbytes=5_000_001, count=2)

    statistics = block.statistics()
    assert 2 * 5_000_001 <= statistics.nbytes["free"] < 2 * 5_000_001 + 2 * 4096
    block.trim()
    assert 0 == block.statistics().nbytes_resident


def test_what_there_is_no_room_for_says_so_and_the_rest_is_ready(block):
    with pytest.raises(oobpickle.ArenaFullError, match="64"):
        block.preallocate(nbytes=20 * MIB, count=4)

    statistics = block.statistics()
    assert 60 * MIB == statistics.nbytes["free"] == statistics.nbytes_resident
    assert 0 == statistics.nbytes["leased"]
    assert 0 == statistics.n_fallbacks


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, TypeError, "not both"),
        ({"like": 1, "nbytes": 1}, TypeError, "not both"),
        ({"nbytes": 0}, ValueError, "nbytes must be 1"),
        ({"nbytes": 1.5}, TypeError, "nbytes must be an int"),
        ({"nbytes": 1, "count": -1}, ValueError, "count must be 0"),
        ({"nbytes": 1, "count": True}, TypeError, "count must be an int"),
    ],
)
def test_what_cannot_be_prepared_is_refused(block, arguments, error, text):
    with pytest.raises(error, match=text):
        block.preallocate(**arguments)
    assert 0 == block.statistics().nbytes_resident


def test_an_arena_that_was_left_refuses_to_prepare():
    with oobpickle.enabled() as arena:
        pass
    with pytest.raises(oobpickle.ArenaFullError, match="closed"):
        arena.preallocate(nbytes=10)


@pytest.mark.parametrize(("look_s", "earliest_s"), [(0.001, 0.1), (1.0, 5.0)])
def test_a_look_in_vain_is_not_repeated_for_four_times_as_long(
    arena, monkeypatch, look_s, earliest_s
):
    clock, looks = [100.0], []

    def look():
        looks.append(clock[0])
        clock[0] += look_s
        return 0

    monkeypatch.setattr("oobpickle._memory.reclaim.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(arena.reclaim, "look", look)
    arena.reclaim.look_for_lost()
    for second in (0.999, 1.001):
        clock[0] = 100.0 + second * earliest_s
        arena.reclaim.look_for_lost()

    assert [100.0, 100.0 + 1.001 * earliest_s] == looks


# --- what was larger before


def test_what_is_kept_does_not_keep_the_pages_of_a_larger_message_before_it(make_arena):
    arena = make_arena(capacity=256 * MIB)
    arena.blocks.keep_nbytes = 256 * MIB
    del arena.receiving.claim(*send(arena, bytes(50 * MIB)))[:]
    (kept,) = arena.receiving.claim(*send(arena, b"x" * (30 * MIB)))
    assert arena.statistics().nbytes_resident == 50 * MIB

    other = arena.receiving.claim(*send(arena, b"y"))

    assert arena.statistics().nbytes_resident <= 34 * MIB
    assert arena._files.resident_nbytes() <= 34 * MIB
    assert bytes(kept) == b"x" * (30 * MIB)
    del kept, other
    (again,) = arena.receiving.claim(*send(arena, b"z" * (50 * MIB)))
    assert bytes(again) == b"z" * (50 * MIB)


def test_what_is_dropped_leaves_its_pages_to_the_next_message(make_arena):
    arena = make_arena(capacity=256 * MIB)
    arena.blocks.keep_nbytes = 256 * MIB
    for nbytes in (50 * MIB, 30 * MIB, 40 * MIB, 30 * MIB):
        del arena.receiving.claim(*send(arena, bytes(nbytes)))[:]
        assert arena.statistics().nbytes_resident == 50 * MIB


def test_no_load_waits_for_the_lock_to_give_pages_back(make_arena):
    arena = make_arena(capacity=256 * MIB)
    arena.blocks.keep_nbytes = 256 * MIB
    del arena.receiving.claim(*send(arena, bytes(50 * MIB)))[:]
    (kept,) = arena.receiving.claim(*send(arena, b"x" * (30 * MIB)))
    sent = send(arena, b"y")
    other = SharedArena.attach(*map(os.dup, arena.descriptors))
    lock = Table.of(arena).header("lock", "u4")
    core.wait_for_the_lock(60_000_000)
    lock[0] = other.blocks.slot + 1  # it lives, and does not move

    (view,) = arena.receiving.claim(*sent)

    assert other.blocks.slot + 1 == lock[0] & 0x7FFFFFFF
    lock[0] = 0
    core.wait_for_the_lock(2_000_000)
    assert bytes(view) == b"y"
    assert bytes(kept) == b"x" * (30 * MIB)
    assert arena.statistics().nbytes_resident == 50 * MIB + 4096
    del arena.receiving.claim(*send(arena, b"y"))[:]
    assert arena.statistics().nbytes_resident < 35 * MIB
    other.blocks.abandon()
    other._files.close()
