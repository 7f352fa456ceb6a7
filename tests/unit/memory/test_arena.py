"""The arena in one process: senders, receivers, room, ends."""

import errno
import gc
import multiprocessing
import os
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import oobpickle
from conftest import eventually
from ledger_tools import assert_in_order
from oobpickle import ArenaError, ArenaFullError, EnvelopeError, StaleEnvelopeError, _copying
from oobpickle._memory import arena as arena_module
from oobpickle._memory import backing as backing_module
from oobpickle._memory import fork as fork_module
from oobpickle._memory import headroom
from oobpickle._memory import participants as participants_module
from oobpickle._memory.absent import AbsentArena
from oobpickle._memory.arena import Arena
from oobpickle._memory.huge_pages import BY_FAULT
from oobpickle._memory.layout import (
    BLOCKS_AT,
    FREE,
    H_CAPACITY,
    H_HELD,
    IN_FLIGHT,
    N_COLUMNS,
    commit_word,
)
from oobpickle._memory.options import Options
from oobpickle._memory.pipes import channel_id
from oobpickle._memory.segment import Segment

MIB = 1 << 20


@pytest.fixture
def make_arena():
    arenas = []

    def make(**options):
        options.setdefault("capacity", 64 * MIB)
        arenas.append(Arena.create(Options(**options)))
        return arenas[-1]

    yield make
    gc.collect()
    for arena in arenas:
        if arena.membership.retired:
            continue
        arena.drain()
        arena.membership.run(assert_in_order, arena.ledger)
        arena.close()
        arena.detach()
        assert arena.try_destroy(), "a test left a lease, an array or a message"


@pytest.fixture
def arena(make_arena):
    return make_arena()


def send(arena, *contents):
    """Send buffers; return what an envelope would say of them."""
    lease = arena.acquire([len(content) for content in contents])
    for destination, content in zip(lease.destinations, contents, strict=True):
        destination[:] = content
    lease.seal(0)
    lease.settle()
    return lease.blocks, list(lease._plan.needs)


def address(view):
    return np.frombuffer(view, np.uint8).ctypes.data


def test_what_was_written_is_what_arrives(arena):
    contents = [os.urandom(n) for n in (1, 100, 70_000, 0, 3 * MIB)]
    lease = arena.acquire([len(content) for content in contents])
    for destination, content in zip(lease.destinations, contents, strict=True):
        destination[:] = content
    lease.seal(0)
    lease.settle()
    views = arena.intake.claim(lease.blocks, lease._plan.needs)

    places = lease._plan.places
    found = [
        bytes(views[b][at : at + len(c)]) if b >= 0 else b""
        for (b, at), c in zip(places, contents, strict=True)
    ]
    assert contents == found


def test_destinations_are_aligned_and_writable(arena):
    lease = arena.acquire([1, 7, 65, 70_000, 3 * MIB])

    assert {0} == {address(view) % 64 for view in lease.destinations}
    assert not any(view.readonly for view in lease.destinations)
    lease.release()


def test_the_receiver_gets_the_very_memory_that_the_sender_wrote(arena):
    lease = arena.acquire([100_000])
    written = address(lease.destinations[0])
    lease.seal(0)
    lease.settle()

    (view,) = arena.intake.claim(lease.blocks, [100_000])

    assert written == address(view)


def test_a_block_comes_back_when_the_last_view_of_it_is_gone(arena):
    (view,) = arena.intake.claim(*send(arena, b"x" * MIB))
    array = np.frombuffer(view, np.uint8)[5:].reshape(-1, 1)
    kept = array.view("u1").T[0, 3:]
    del view, array
    gc.collect()

    assert MIB == arena.statistics().nbytes["held"]
    del kept
    assert 0 == arena.statistics().nbytes["held"]


def test_a_released_block_is_used_again(arena):
    blocks, needs = send(arena, b"x" * MIB)
    (view,) = arena.intake.claim(blocks, needs)
    del view

    again, _ = send(arena, b"y" * MIB)

    assert (blocks[0][0], blocks[0][1] + 1) == again[0]
    arena.intake.claim(again, needs)


def test_a_message_is_loaded_once(arena):
    blocks, needs = send(arena, b"x" * MIB)
    views = arena.intake.claim(blocks, needs)

    with pytest.raises(StaleEnvelopeError, match="loaded already"):
        arena.intake.claim(blocks, needs)
    del views
    with pytest.raises(StaleEnvelopeError):
        arena.intake.claim(blocks, needs)


@pytest.mark.parametrize("block", [(0, 99), (5, 1), (1 << 19, 1), (1 << 40, 1), (0, 0)])
def test_placements_that_mean_nothing_are_refused(arena, block):
    sent = send(arena, b"x" * MIB)

    with pytest.raises(StaleEnvelopeError):
        arena.intake.claim([block], [MIB])
    arena.intake.claim(*sent)


def test_a_dropped_lease_gives_its_blocks_back(arena):
    lease = arena.acquire([MIB, 100])
    lease.seal(0)
    del lease

    assert {"free": 2, "leased": 0, "in_flight": 0, "held": 0} == arena.statistics().n_blocks


def test_a_settled_lease_does_not(arena):
    sent = send(arena, b"x")
    gc.collect()

    assert 1 == arena.statistics().n_blocks["in_flight"]
    arena.intake.claim(*sent)


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
    original = arena.room.make

    def make(shortage, *, again):
        waiting.set()
        return original(shortage, again=again)

    arena.room.make = make
    thread = threading.Thread(target=lambda: waiting.wait(20) and held.release())
    thread.start()
    lease = arena.acquire([4 * MIB], wait_timeout=20)
    thread.join()

    lease.release()


def test_too_little_memory_on_the_machine_is_found_before_it_is_taken(arena, monkeypatch):
    monkeypatch.setattr(headroom, "available_nbytes", lambda: 300 * MIB)
    monkeypatch.setattr(headroom, "limit_nbytes", lambda: 16 << 30)
    before = arena.data.resident_nbytes()

    with pytest.raises(ArenaFullError, match="too little memory: need 50 MiB") as error:
        arena.acquire([50 * MIB], wait_timeout=0)

    assert "memory" == error.value.reason
    assert before == arena.data.resident_nbytes()
    assert 0 == arena.statistics().n_blocks["leased"]
    assert 0 == arena.membership.run(lambda: arena.ledger.words[19])


def test_pages_that_the_system_refuses_are_a_reason_too(arena, monkeypatch):
    def refuse(offset, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(arena.data), "reserve", lambda self, *range: refuse(*range))

    with pytest.raises(ArenaFullError, match="No space left") as error:
        arena.acquire([MIB], wait_timeout=0)

    assert "space" == error.value.reason


@pytest.mark.parametrize("wait_timeout", [None, 1e-3])
def test_what_waits_in_vain_by_default_does_so_once(make_arena, monkeypatch, wait_timeout):
    """Until there is room again; who says how long to wait is taken at his word."""
    arena, pauses = make_arena(capacity=8 * MIB, wait_timeout=wait_timeout), []
    clock = SimpleNamespace(monotonic=lambda: 1 + sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(arena_module, "time", clock)
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


def test_messages_that_find_it_full_do_not_count_its_blocks_each(make_arena, monkeypatch):
    arena, n_counted = make_arena(capacity=8 * MIB), []
    held = [arena.acquire([MIB]) for _ in range(8)]
    census, rebuild = arena.ledger.census, arena.ledger.rebuild
    monkeypatch.setattr(arena.ledger, "census", lambda: n_counted.append(1) or census())
    monkeypatch.setattr(arena.ledger, "rebuild", lambda: n_counted.append(1) or rebuild())
    monkeypatch.setattr(arena_module, "_COUNT_EVERY_S", 1000)

    for _ in range(50):
        with pytest.raises(ArenaFullError, match=r"8\.0 MiB leased"):
            arena.acquire([MIB])

    assert len(n_counted) <= 2
    for lease in held:
        lease.release()


def test_copy_out_gives_the_block_back_at_once(make_arena):
    arena = make_arena(copy_on_receive=True)
    blocks, needs = send(arena, b"x" * MIB, b"y" * 100)

    views = arena.intake.claim(blocks, needs)

    assert [b"x" * MIB, b"y" * 100] == [bytes(view) for view in views]
    assert 0 == arena.statistics().nbytes["held"]
    assert (2, MIB + 100) == (
        arena.statistics().n_copied_on_receive,
        arena.statistics().nbytes_copied_on_receive,
    )
    views[0][:1] = b"z"  # private and writable


def test_receivers_copy_out_when_half_of_the_capacity_is_held(make_arena):
    arena = make_arena(capacity=8 * MIB)
    views = [arena.intake.claim(*send(arena, bytes([i]) * MIB)) for i in range(6)]

    assert arena.ledger.words[H_HELD] <= 5 * MIB
    assert [bytes([i]) * MIB for i in range(6)] == [bytes(view) for (view,) in views]
    assert arena.statistics().n_copied_on_receive >= 1


@pytest.mark.parametrize(("nbytes", "n_copied"), [(2 * MIB, 2), (2 * MIB + 1, 0)])
def test_a_message_above_a_quarter_of_the_capacity_is_not_copied(make_arena, nbytes, n_copied):
    arena = make_arena(capacity=8 * MIB)
    views = [arena.intake.claim(*send(arena, bytes([i]) * nbytes)) for i in range(3)]
    views += [arena.intake.claim(*send(arena, b"\3" * MIB)) for i in range(n_copied // 2)]

    assert n_copied == arena.statistics().n_copied_on_receive
    assert [bytes([i]) * nbytes for i in range(3)] == [bytes(view) for (view,) in views[:3]]


def test_copy_out_false_never_copies(make_arena):
    arena = make_arena(capacity=8 * MIB, copy_on_receive=False)
    views = [arena.intake.claim(*send(arena, b"x" * MIB)) for i in range(6)]

    assert 6 * MIB == arena.statistics().nbytes["held"]
    assert 0 == arena.statistics().n_copied_on_receive
    del views


def test_beyond_the_limit_of_mappings_receivers_copy_out(arena):
    arena.intake._most_held = 3
    views = [arena.intake.claim(*send(arena, b"x" * 100)) for i in range(8)]

    assert 3 == len(arena.holdings.held)
    assert {b"x" * 100} == {bytes(view) for (view,) in views}


def test_a_message_received_before_its_sender_has_settled_is_held(arena):
    """Sender and receiver may be threads of one process: the feeder thread of a queue."""
    lease = arena.acquire([MIB])
    lease.seal(0)
    lease.depart()
    (view,) = arena.intake.claim(lease.blocks, [MIB])
    lease.settle()
    held = dict(arena.holdings.held)
    del lease
    arena.drain()

    assert held == arena.holdings.held != {}
    del view


def test_a_busy_ledger_loses_no_message(arena, monkeypatch):
    """Without the lock the bytes are copied out, and the block comes back later."""
    sent = send(arena, b"x" * MIB, b"y" * 100)

    views = arena.membership.mutex.threads.run(
        1.0, arena.intake.claim, *sent
    )  # as below a finalizer

    assert [b"x" * MIB, b"y" * 100] == [bytes(view) for view in views]
    assert {"free": 2, "leased": 0, "in_flight": 0, "held": 0} == arena.statistics().n_blocks
    with pytest.raises(StaleEnvelopeError):
        arena.intake.claim(*sent)


def test_a_busy_ledger_keeps_the_index_until_its_copy_is_gone(arena):
    sent = send(arena, b"x" * MIB)

    views = arena.membership.mutex.threads.run(
        1.0, lambda: arena.intake.claim(*sent, is_index=True)
    )

    assert 1 == arena.statistics().n_blocks["in_flight"]
    del views
    assert 1 == arena.statistics().n_blocks["free"]


@pytest.mark.parametrize("change", ["another reader", "taken back", "damaged"])
def test_what_changes_while_it_is_copied_without_the_lock_is_refused(arena, monkeypatch, change):
    """Nobody may change a block in flight that somebody loads; who does has taken it away."""
    ((index, generation),), needs = sent = send(arena, b"x" * MIB)
    before = arena.ledger.word[index]
    words = {
        "another reader": commit_word(index, IN_FLIGHT, 77, generation),
        "taken back": commit_word(index, FREE, 0, generation),
        "damaged": before ^ 1 << 40,
    }
    copy_of = type(arena.intake)._copy_of

    def copy_and_change(*args, **options):
        copied = copy_of(*args, **options)
        arena.ledger.word[index] = words[change]
        return copied

    monkeypatch.setattr(type(arena.intake), "_copy_of", copy_and_change)
    with pytest.raises(EnvelopeError):
        arena.membership.mutex.threads.run(1.0, arena.intake.claim, *sent)
    monkeypatch.undo()

    arena.ledger.word[index] = before
    assert not arena.holdings._unlocked
    (view,) = arena.intake.claim(*sent)
    assert bytes(view) == b"x" * needs[0]


def test_a_lease_whose_copy_goes_on_is_given_back_when_it_has_ended(arena, monkeypatch):
    """A helper may go on for moments after an interrupt: nobody gets the memory meanwhile."""
    busy = True
    monkeypatch.setattr(_copying, "is_busy", lambda: busy)
    lease = arena.acquire([MIB])
    (block,) = lease.blocks
    del lease
    arena.drain()
    assert arena.statistics().n_blocks["leased"] == 1
    other = arena.acquire([MIB])
    assert other.blocks[0][0] != block[0]

    busy = False
    other.release()
    assert arena.statistics().n_blocks["leased"] == 0


def test_what_died_behind_a_copy_that_goes_on_waits_but_is_not_lost(arena, monkeypatch):
    busy = True
    monkeypatch.setattr(_copying, "is_busy", lambda: busy)
    (held,) = arena.intake.claim(*send(arena, b"x" * MIB))
    lease = arena.acquire([MIB])
    del lease, held
    arena.drain()
    busy = False

    assert {"free": 2, "leased": 0, "in_flight": 0, "held": 0} == arena.statistics().n_blocks


def test_a_sender_with_a_busy_ledger_is_told(arena, monkeypatch):
    with pytest.raises(ArenaFullError) as error:
        arena.membership.mutex.threads.run(1.0, arena.acquire, [100])

    assert "busy" == error.value.reason


def free_but_private(arena):
    """Return a block, and the array over it, as in a forked child whose parent held the block."""
    (array,) = arena.intake.claim(*send(arena, b"a" * MIB))
    ((index, _),) = arena.holdings.held.items()
    arena.holdings.privatize()
    arena.membership.run(arena.ledger.mark_punched, [index])
    arena.ledger.release([(index, arena.ledger.generation[index])], arena.membership.slot)
    arena.holdings.held.clear()
    return index, array


def test_what_was_collected_aside_goes_when_the_lease_is_sealed(arena):
    index, _array = free_but_private(arena)
    lease = arena.acquire([MIB])
    assert index == lease.blocks[0][0]
    lease.destinations[0][:] = b"b" * MIB
    lease.seal(0)

    (destination,) = lease.destinations
    assert 0 == destination.nbytes == len(lease._aside)
    lease.release()


def test_a_private_copy_is_read_from_the_file_if_the_mapping_is_private(arena):
    index, array = free_but_private(arena)
    sent = send(arena, b"b" * MIB)  # written aside, then to the file
    assert index == sent[0][0][0]

    (arrived,) = arena.intake.claim(*sent)

    assert (b"a" * MIB, b"b" * MIB) == (bytes(array), bytes(arrived))
    del array, arrived
    arena.holdings.collect()
    assert {} == arena.holdings.private


def test_a_closed_arena_gives_no_leases_but_loads_what_is_on_its_way(make_arena):
    arena = make_arena()
    sent = send(arena, b"x" * MIB)
    arena.close()
    arena.detach()

    with pytest.raises(ArenaFullError, match="closed"):
        arena.acquire([1])
    (view,) = arena.intake.claim(*sent)
    assert b"x" * MIB == bytes(view)
    assert not arena.try_destroy()
    del view
    assert arena.try_destroy()


def test_closing_gives_free_pages_back_before_it_returns(make_arena):
    arena = make_arena()
    arena.acquire([5 * MIB, 100]).release()
    assert arena.data.resident_nbytes() >= 5 * MIB

    arena.close()

    assert 0 == arena.data.resident_nbytes()


def test_closing_frees_what_nobody_can_read_while_that_can_be_seen(make_arena):
    """Once it is closed nobody says what he reads, so an empty channel means nothing any more."""
    arena = make_arena()
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        lease = arena.acquire([MIB])
        lease.seal(channel_id(writer.fileno()))
        lease.settle()
        assert arena.statistics().n_blocks["in_flight"] == 1
        arena.close()

        assert arena.statistics().n_blocks["in_flight"] == 0
        assert arena.data.resident_nbytes() == 0


def test_pages_of_arrays_that_outlive_the_arena_go_back_when_they_die(make_arena):
    arena = make_arena()
    (first,) = arena.intake.claim(*send(arena, b"x" * MIB))
    (second,) = arena.intake.claim(*send(arena, b"y" * MIB))
    arena.close()
    arena.detach()

    assert 2 * MIB == arena.data.resident_nbytes()
    del first
    assert MIB == arena.data.resident_nbytes()
    assert b"y" * MIB == bytes(second)
    del second
    assert 0 == arena.data.resident_nbytes()


@pytest.mark.parametrize("backing", ["tmp", "memfd"])
def test_on_a_mount_that_may_be_full_the_ledger_has_its_pages_first(
    make_arena, monkeypatch, backing
):
    monkeypatch.setenv("OOBPICKLE_BACKING", backing)
    arena = make_arena()
    arena.acquire([100]).release()

    rows = N_COLUMNS * 4096
    participants = 8 * BLOCKS_AT
    assert arena._table.resident_nbytes() >= rows + (participants if backing == "tmp" else 0)


def test_no_room_for_the_table_is_a_full_arena(arena, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    arena._n_rows = 0
    monkeypatch.setattr(arena._table.__class__, "reserve", refuse)
    with pytest.raises(ArenaFullError, match=r"no room for the table.*No space") as caught:
        arena.acquire([100])

    assert "space" == caught.value.reason
    monkeypatch.undo()
    arena.acquire([100]).release()


def test_statistics_outlive_the_memory():
    arena = Arena.create(Options(capacity=64 * MIB))
    arena.acquire([100]).release()
    arena.close()
    arena.detach()
    assert arena.try_destroy()

    assert 1 == arena.statistics().n_blocks["free"]
    assert arena.closed
    assert arena.try_destroy()  # again does nothing
    with pytest.raises(ArenaFullError):
        arena.acquire([1])


@pytest.mark.parametrize("nbytes", [9 * MIB + 1, MIB])
def test_pages_that_only_a_fault_makes_huge_are_made_by_faults(arena, monkeypatch, nbytes):
    """`fallocate` would make small ones; so would faults for what is smaller than a huge page."""
    reserve, before = Segment.reserve, []

    def look(segment, offset, nbytes):
        before.append(segment.resident_nbytes())
        reserve(segment, offset, nbytes)

    monkeypatch.setattr(Segment, "reserve", look)
    arena.ledger.huge = BY_FAULT
    lease = arena.acquire([nbytes])
    resident = arena.data.resident_nbytes()
    lease.release()

    assert before[-1] == (resident if nbytes > 2 * MIB else 0)
    assert resident == (10 * MIB if nbytes > 2 * MIB else MIB)


def test_pages_that_a_fault_made_around_a_block_go_back_when_nothing_is_in_use(arena):
    arena.ledger.huge = BY_FAULT
    lease, other = arena.acquire([100_000]), arena.acquire([100_000])
    end = max(arena.ledger.offset[one.blocks[0][0]] for one in (lease, other)) + 200_000
    arena.data.array(end, 1)[:] = 1  # as the huge page of a fault would
    lease.release()
    arena.trim()
    in_use = arena.data.resident_nbytes()
    other.release()
    arena.trim()

    assert in_use > 100_000
    assert arena.data.resident_nbytes() == 0


def test_no_page_is_taken_from_a_damaged_block_that_is_held(arena):
    arena.ledger.huge = BY_FAULT
    sent = send(arena, b"x" * MIB)
    (view,) = arena.intake.claim(*sent)
    index = sent[0][0][0]
    word, arena.ledger.word[index] = arena.ledger.word[index], 0xBAD << 40
    arena.trim()

    assert arena.statistics().n_quarantined == 1
    assert b"x" * MIB == bytes(view)
    arena.ledger.word[index] = word
    del view


def test_a_ledger_of_another_version_is_refused(arena):
    data, table, locks = arena.descriptors
    copies = [os.dup(fd) for fd in (data, table, locks)]
    arena.ledger.words[1] += 1
    try:
        with pytest.raises(ArenaError, match=r"version 4, expected .* and 3"):
            Arena.attach(*copies)
    finally:
        arena.ledger.words[1] -= 1
        for fd in copies:
            os.close(fd)


def test_a_damaged_header_is_refused_before_anything_is_mapped(arena):
    copies = [os.dup(fd) for fd in arena.descriptors]
    n_mapped = number_of_mappings()
    arena.ledger.words[H_CAPACITY] ^= 1
    try:
        with pytest.raises(ArenaError, match=r"header .* is damaged"):
            Arena.attach(*copies)
        assert n_mapped == number_of_mappings()
    finally:
        arena.ledger.words[H_CAPACITY] ^= 1
        for fd in copies:
            os.close(fd)


def number_of_mappings():
    with open("/proc/self/maps") as file:
        return sum("oobpickle" in line for line in file)


def name_with(arena, numbers):
    """Return a name that says that the arena's files are somewhere else."""
    return arena.identity + struct.pack("<4I", os.getpid(), *numbers)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["nothing", "fifo", "directory", "short", "foreign", "public"])
def test_an_address_that_names_something_else_is_refused(arena, tmp_path, which, kind):
    opened = {
        "nothing": list,
        "fifo": lambda: list(os.pipe()),
        "directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
        "short": lambda: [os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)],
        "foreign": lambda: [private_file(arena.data.nbytes)],
        "public": lambda: [os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o644)],
    }[kind]()
    numbers = list(arena.descriptors)
    numbers[which] = opened[0] if opened else 999
    before, n_mapped = os.listdir("/proc/self/fd"), number_of_mappings()
    try:
        with pytest.raises((ArenaError, OSError)):
            Arena.find(name_with(arena, numbers))
        assert len(before) == len(os.listdir("/proc/self/fd"))
        assert n_mapped == number_of_mappings()
    finally:
        for fd in opened:
            os.close(fd)


@pytest.mark.parametrize(("user", "mode"), [(0, 0o640), (0, 0o602), (65534, 0o600)])
def test_files_that_others_may_open_are_not_attached_to(arena, user, mode):
    os.fchmod(arena.data.fd, mode)
    if user:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.fchown(arena.data.fd, user, user)

    with pytest.raises(ArenaError, match="not private to this user"):
        Arena.find(arena.name)


def private_file(nbytes):
    fd = os.memfd_create("oobpickle-test")
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, nbytes)
    return fd


def vanish(arena):
    """Take away what the kernel takes away when a process dies."""
    fork_module.unwatch(arena)
    arena.membership.close()
    arena.ledger.close()
    arena.data.close()
    arena._table.close()


def test_attached_twice_is_two_participants(arena):
    """One process stands for two: each has its own slot and its own view of the blocks."""
    other = Arena.attach(*(os.dup(fd) for fd in arena.descriptors))
    sent = send(arena, b"x" * MIB)
    (view,) = other.intake.claim(*sent)

    assert b"x" * MIB == bytes(view)
    assert arena.options == other.options
    assert 2 == arena.statistics().n_participants
    assert MIB == arena.statistics().nbytes["held"]
    del view
    other.drain()
    vanish(other)
    assert 1 == arena.membership.reap()
    assert 1 == arena.statistics().n_participants


def test_what_a_dead_participant_had_is_room_for_the_next(make_arena):
    arena = make_arena(capacity=8 * MIB)
    other = Arena.attach(*(os.dup(fd) for fd in arena.descriptors))
    lease = other.acquire([4 * MIB])
    views = other.intake.claim(*send(arena, b"x" * 3 * MIB))
    other.membership.mutex.locks.close()  # the kernel does this when a process dies

    arena.acquire([6 * MIB], wait_timeout=0).release()

    assert 1 == arena.statistics().n_participants
    del views, lease
    vanish(other)


def test_a_message_that_nobody_can_read_is_reclaimed(arena):
    read_fd, write_fd = os.pipe()
    lease = arena.acquire([100, MIB])
    lease.seal(os.fstat(write_fd).st_ino)
    lease.settle()
    os.write(write_fd, b"envelope")

    assert 0 == arena.room.reclaim()
    os.close(read_fd)
    assert 2 == arena.room.reclaim()
    assert 2 == arena.statistics().n_reclaimed
    os.close(write_fd)


def test_a_message_whose_reader_may_be_hidden_is_kept(arena, monkeypatch):
    read_fd, write_fd = os.pipe()
    lease = arena.acquire([MIB])
    lease.seal(os.fstat(write_fd).st_ino)
    lease.settle()
    os.close(read_fd)
    os.close(write_fd)
    with monkeypatch.context() as patch:
        patch.setattr(participants_module, "pid_namespace", lambda: 1)

        assert 0 == arena.room.reclaim()
    eventually(arena.room.reclaim)


@pytest.mark.parametrize("locked_nbytes", [0, 4096])
def test_where_memory_is_locked_the_data_is_not_mapped(arena, monkeypatch, locked_nbytes):
    """A sparse mapping could become resident as a whole."""
    monkeypatch.setattr(backing_module, "_own_status", lambda: {"VmLck": locked_nbytes})
    other = Arena.attach(*(os.dup(fd) for fd in arena.descriptors))

    assert other.data.mapped is (locked_nbytes == 0)
    (view,) = other.intake.claim(*send(arena, b"x" * MIB))
    assert bytes(view) == b"x" * MIB
    del view
    vanish(other)


@pytest.mark.parametrize("step", ["table", "data"])
def test_descriptors_that_somebody_has_closed_are_a_reason(arena, monkeypatch, step):
    reserve, closed = Segment.reserve, arena._table if step == "table" else arena.data

    def refuse(segment, *span):
        if segment is closed:
            raise ArenaError("closed")
        reserve(segment, *span)

    monkeypatch.setattr(Segment, "reserve", refuse)
    arena._n_rows = 0
    with pytest.raises(ArenaFullError) as caught:
        arena.acquire([MIB])

    assert "detached" == caught.value.reason


def test_a_message_that_was_read_is_its_readers_to_keep(arena):
    read_fd, write_fd = os.pipe()
    lease = arena.acquire([100, MIB])
    lease.seal(os.fstat(write_fd).st_ino)
    lease.settle()
    os.write(write_fd, b"envelope")

    def read():
        message = os.read(read_fd, 100)
        assert 0 == arena.room.reclaim()
        return message, lease.blocks[0]

    assert b"envelope" == arena.intake.receive(read)
    assert 0 == arena.room.reclaim()
    views = arena.intake.claim(lease.blocks, lease._plan.needs)
    assert 0 == arena.room.reclaim()
    del views
    os.close(read_fd)
    os.close(write_fd)


def test_a_message_with_an_unknown_channel_is_kept(arena):
    sent = send(arena, b"x" * MIB)

    assert 0 == arena.room.reclaim()
    arena.intake.claim(*sent)


def test_many_threads_send_and_receive(arena):
    errors = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            contents = [rng.bytes(int(n)) for n in rng.integers(1, 200_000, 3)]
            (views, places) = receive(*send_with_places(arena, contents))
            found = [
                bytes(views[b][at : at + len(c)])
                for (b, at), c in zip(places, contents, strict=True)
            ]
            if found != contents:
                errors.append(seed)

    def send_with_places(arena, contents):
        lease = arena.acquire([len(c) for c in contents], wait_timeout=20)
        for destination, content in zip(lease.destinations, contents, strict=True):
            destination[:] = content
        lease.seal(0)
        lease.settle()
        return lease.blocks, lease._plan

    def receive(blocks, plan):
        return arena.intake.claim(blocks, plan.needs), plan.places

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == errors
    assert 0 == arena.statistics().n_blocks["in_flight"]


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
    for arena in (block, AbsentArena(Options())):
        with pytest.raises(error, match=text):
            arena.preallocate(**arguments)
    assert 0 == block.statistics().nbytes_resident


def test_an_absent_arena_prepares_nothing():
    arena = AbsentArena(Options())
    arena.preallocate(np.zeros(10))
    assert 0 == arena.statistics().nbytes_resident


def test_an_arena_that_was_left_refuses_to_prepare():
    with oobpickle.enabled() as arena:
        pass
    with pytest.raises(oobpickle.ArenaFullError, match="closed"):
        arena.preallocate(nbytes=10)


def test_what_a_child_inherits_is_kept_and_not_taken_apart(arena):
    """To drop it would copy the pages of the parent that it lies in, one block after another."""
    lease = arena.acquire([100])
    books = arena.holdings.leased, arena.room._touched
    before = [dict(book) for book in books]
    pid = os.fork()
    if pid == 0:
        try:
            is_anew = arena.holdings.leased == {} and arena.room._touched == {}
            os._exit(0 if is_anew and [dict(book) for book in books] == before else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(pid, 0)

    assert 0 == os.waitstatus_to_exitcode(status)
    assert all(before)
    lease.release()


@pytest.mark.parametrize(("look_s", "earliest_s"), [(0.001, 0.1), (1.0, 5.0)])
def test_a_look_in_vain_is_not_repeated_for_four_times_as_long(
    arena, monkeypatch, look_s, earliest_s
):
    clock, looks = [100.0], []

    def look():
        looks.append(clock[0])
        clock[0] += look_s
        return 0

    monkeypatch.setattr("oobpickle._memory.room.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(arena.room, "reclaim", look)
    arena.room.look_for_lost()
    for second in (0.999, 1.001):
        clock[0] = 100.0 + second * earliest_s
        arena.room.look_for_lost()

    assert [100.0, 100.0 + 1.001 * earliest_s] == looks
