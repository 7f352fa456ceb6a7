"""What is left by who dies in a step or writes where he should not, and what is published."""

import ctypes
import gc
import os
import signal
import sys
import threading
from pickle import PickleBuffer

import pytest

from conftest import eventually
from oobpickle import ArenaFullError, EnvelopeError
from oobpickle._envelope import tables
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._native import core
from participants import first_of, number_of_mappings, send, stopped_holder, vanish
from table import (
    ADOPTED,
    FREE,
    JOINED,
    PUBLISHED,
    QUARANTINED,
    RELEASED,
    UNPROVEN,
    Table,
    place_word,
    resident_word,
)

MIB = 1 << 20


# --- what is left by somebody who dies with the lock, or writes where he should not


def test_who_takes_the_lock_over_from_a_dead_one_mends_what_that_left(arena):
    """Also if it died before it could say that it was in the middle of something."""
    arena.acquire([MIB]).release()
    arena.acquire([100]).release()
    other = SharedArena.attach(*map(os.dup, arena.descriptors))
    slot = other.blocks.slot
    other.blocks.abandon()
    other._files.close()
    del other
    gc.collect()
    table = Table.of(arena)
    table.header("lock", "u4")[0] = slot + 1
    table.lists("warm")[:] = 0  # as if it had unlinked what it was about to lease

    arena.acquire([100]).release()

    arena.acquire([100]).release()  # frees what was released
    table.assert_in_order()
    assert 2 == table.n_rows


def test_a_released_block_whose_entry_is_damaged_is_not_used_again(arena):
    lease = arena.acquire([MIB])
    index = lease.blocks[0].index
    lease.release()
    table = Table.of(arena)
    before = table.rows[index].copy()
    table.rows["generation"][index] += 7  # so that its check is wrong

    other = arena.acquire([MIB])

    assert index != other.blocks[0].index
    assert table.state(index) in (RELEASED, QUARANTINED)
    other.release()
    arena.acquire([100]).release()
    table.rows[index] = before  # and on the stack, as it was
    table.rows["below"][index] = table["released"]
    table["released"] = index + 1


@pytest.fixture
def while_waiting(arena):
    """Have something called while this process waits for the lock, which another one has."""
    other = SharedArena.attach(*map(os.dup, arena.descriptors))
    before = signal.getsignal(signal.SIGALRM)
    core.wait_for_the_lock(60_000_000)

    def have_called(act):
        lock = Table.of(arena).header("lock", "u4")

        def handler(*_):
            act()
            lock[0] = 0

        lock[0] = other.blocks.slot + 1  # it lives, and does not move
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    yield have_called
    core.wait_for_the_lock(2_000_000)
    signal.signal(signal.SIGALRM, before)
    other.blocks.abandon()
    other._files.close()


def test_a_signal_that_interrupts_no_sleep_is_seen(arena, while_waiting):
    """As one that comes between two of them, or goes to another thread."""
    while_waiting(lambda: None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    core.wait_for_the_lock(3_000_000)
    begins = threading.Event()

    def alarm():
        begins.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGALRM)

    thread = threading.Thread(target=alarm)
    thread.start()
    begins.set()
    n_dead = arena.blocks.reap()
    thread.join()

    assert n_dead == 0


@pytest.mark.parametrize("changed", [[], [None] * 5])
@pytest.mark.parametrize("name", ["publish", "refer", "free_lost"])
def test_a_list_that_changes_while_the_lock_is_waited_for_counts_as_it_was(
    arena, while_waiting, name, changed
):
    blocks = arena.acquire([MIB, MIB]).blocks
    if name == "refer":
        views = arena.blocks.publish(blocks)
        assert all(view.share() for view in views)
        call, items = views[0].refer, views
    elif name == "publish":
        call, items = arena.blocks.publish, blocks
    else:
        call, items = arena.blocks.free_lost, [(0, 0, 0), (1, 0, 0)]
    items = list(items)

    def change():
        items[:] = changed

    while_waiting(change)
    found = call(items)

    assert items == changed
    assert found == 0 if name == "free_lost" else len(found) == 2


def test_no_code_of_others_runs_under_the_lock(arena):
    found = []

    class Index:
        def __index__(self):
            found.append(Table.of(arena).header("lock", "u4")[0])
            return 0

    arena.blocks.free_lost([(Index(), 0, 0)])
    assert found == [0]


@pytest.mark.parametrize("name", ["lease", "publish", "refer", "claim", "take_idle"])
def test_without_memory_a_step_raises_or_has_a_result(name):
    """Whichever allocation fails. Both is an error of the next call."""
    testing = pytest.importorskip("_testcapi")
    arena = SharedArena.create(Options(capacity=64 * MIB))
    blocks = arena.blocks
    views = blocks.publish(arena.acquire([MIB]).blocks)
    assert views[0].share()
    results, is_over = [], False
    for n in range(1, 40):
        arguments = {
            "lease": lambda: ([MIB, MIB],),
            "publish": lambda: (arena.acquire([4096] * 2).blocks,),
            "refer": lambda: (views,),
            "claim": lambda: (*send(arena, b"x" * 5000), False),
            "take_idle": lambda: (MIB,),
        }[name]()
        call = getattr(views[0] if name == "refer" else blocks, name)
        error = result = None
        testing.set_nomemory(n, n + 1)
        try:
            result = call(*arguments)
        except MemoryError as caught:
            error = caught
        finally:
            testing.remove_mem_hooks()
        assert (result is None) == (error is not None)
        is_over = isinstance(result, list)
        results.append(type(error or result))
        del result, error, arguments

    assert is_over
    assert set(results) <= {list, MemoryError}
    views = call = None
    blocks.abandon()  # with blocks that have no object
    assert blocks.end()
    arena._files.close()


class Ends:
    """Garbage that ends an arena."""

    def __init__(self, blocks):
        self.blocks, self.itself = blocks, self

    def __del__(self):
        self.blocks.end()


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="no garbage is collected inside a function in C"
)
@pytest.mark.parametrize("name", ["claim", "unowned", "participants"])
def test_garbage_that_ends_the_arena_does_so_before_or_afterwards(arena, name):
    sent = [send(arena, b"x" * 5000) for _ in range(1000)]
    arguments = (*sent[0], False) if name == "claim" else ()
    call = getattr(arena.blocks, name)
    threshold = gc.get_threshold()
    gc.collect()
    gc.disable()
    try:
        Ends(arena.blocks)
        kept = [[] for _ in range(1000)]  # so that no list is left for the next one
        gc.set_threshold(1000 if name == "participants" else 1001)
        gc.enable()
        try:
            found = call(*arguments)
        except ValueError:
            found = None
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
    assert len(kept) == 1000
    del found, call
    gc.collect()
    arena.close()
    if not arena.blocks.ended:
        arena.blocks.free_lost(arena.blocks.unowned())
    else:
        arena._files.close()


def test_a_closed_arena_leases_nothing_under_the_lock(arena):
    arena.blocks.close()
    index, *_ = arena.blocks.lease([100])
    assert core.SHORTAGES[index] == "detached"
    assert arena.statistics().n_blocks["leased"] == 0


def test_a_block_whose_word_is_damaged_is_not_released(arena):
    (view,) = arena.receiving.claim(*send(arena, b"x" * MIB))
    table = Table.of(arena)
    index = table.owned()[0][0]
    commit = table.rows["commit"]
    commit[index] ^= 1 << 40  # of the check

    del view

    assert table.rows["below"][index] == 0 == table["released"]
    commit[index] ^= 1 << 40


def test_a_second_count_of_rows_that_is_not_the_last_is_not_believed(arena):
    """A newcomer has not counted them itself, and would write over what is in use."""
    leases = [arena.acquire([100]) for _ in range(3)]
    table = Table.of(arena)
    before = table["n_rows"]
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    table["n_rows"], table["n_rows_again"] = 0xBAD << 40, 2

    with pytest.raises(ArenaFullError) as error:
        other.acquire([100], wait_timeout=0)

    assert "damaged" == error.value.reason
    table["n_rows"], table["n_rows_again"] = before, 3
    vanish(other)
    arena.reclaim.reap()
    del leases[:]


@pytest.mark.parametrize(
    ("row", "offset", "size_class", "is_refused"),
    [
        (1, 0, None, True),  # where the first one is
        (1, 40 * MIB, None, False),
        (1, 63 * MIB, 40, True),  # in two windows
        (1, 65 * MIB, 60, True),  # large, and not in a window of its own
        (0, 40 * MIB, None, False),  # of two that overlap the later one is refused
    ],
)
def test_what_is_mapped_never_overlaps(arena, row, offset, size_class, is_refused):
    """Also if somebody forges a place with a right check: else it could be made inaccessible."""
    sent = [send(arena, content * 5000) for content in (b"a", b"b", b"c")]
    table = Table.of(arena)
    before = table.rows[:3].copy()
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    if size_class is None:
        size_class = table.size_class(row)
    table.rows["place"][row] = place_word(row, offset, size_class)

    found = []
    for pairs, needs in sent:
        try:
            found.append(other.receiving.claim(pairs, needs))
        except EnvelopeError:
            found.append(None)

    assert (found[row] is None) == is_refused
    assert found[1 - row] is None or bytes(found[1 - row][0]) == bytes([97 + 1 - row]) * 5000
    refused = [n for n in range(3) if found[n] is None]
    del found
    table.rows["place"][:3] = before["place"]
    for n in refused:  # whoever has known the right place all the time gets it
        table.rows["commit"][n] = before["commit"][n]
        assert bytes(arena.receiving.claim(*sent[n])[0]) == bytes([97 + n]) * 5000
    vanish(other)
    arena.reclaim.reap()


def test_a_place_that_is_read_later_does_not_overlap_the_next_one_either(arena):
    sent = [send(arena, content * 5000) for content in (b"a", b"b", b"c")]
    table = Table.of(arena)
    before = table.rows[:3].copy()
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    table.rows["place"][1] = 0  # as if it were not written yet
    first, third = (other.receiving.claim(*sent[n]) for n in (0, 2))
    table.rows["place"][1] = place_word(1, table.offset(2), table.size_class(2))

    with pytest.raises(EnvelopeError):
        other.receiving.claim(*sent[1])

    assert bytes(first[0]) + bytes(third[0]) == b"a" * 5000 + b"c" * 5000
    del first, third
    table.rows["place"][1], table.rows["commit"][1] = before["place"][1], before["commit"][1]
    assert bytes(arena.receiving.claim(*sent[1])[0]) == b"b" * 5000
    vanish(other)
    arena.reclaim.reap()


@pytest.mark.parametrize("act", ["fork", "cut", "drop"])
def test_who_believes_a_forged_number_of_pages_gives_back_no_other_blocks(arena, act):
    pairs, needs = send(arena, b"c" * 5000)
    (kept,) = arena.receiving.claim(*send(arena, b"a" * MIB))
    sent = send(arena, b"b" * MIB)
    table = Table.of(arena)
    first, second, _ = (index for index, *_ in table.owned())
    table.rows["resident"][second] = resident_word(second, 32 * MIB)
    if act == "fork":
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    elif act == "drop":
        arena.blocks.keep_nbytes = 0
        del kept
    else:
        table.rows["resident"][first] = resident_word(first, 32 * MIB)
        small = arena.receiving.claim(pairs, needs)
        arena.receiving.claim(*send(arena, b"d"))  # cuts off what is more than the message took
        assert bytes(small[0]) == b"c" * 5000
        del small

    (other,) = arena.receiving.claim(*sent)
    assert bytes(other) == b"b" * MIB
    for n in range(
        table.n_rows
    ):  # it is still what was forged, where nobody had reason to change it
        if table.resident(n) == 32 * MIB:
            table.rows["resident"][n] = resident_word(n, 0)
    if act != "cut":
        arena.receiving.claim(pairs, needs)
    table["dirty"] = 1  # the next step adds up
    arena.acquire([100]).release()


def test_what_may_be_read_unseen_is_kept_though_its_channel_was_not_proven(arena):
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    sent = send(arena, b"x" * MIB, channel=77 | UNPROVEN)
    other.blocks.keep(77)

    assert [] == arena.blocks.unowned()
    vanish(other)
    arena.reclaim.reap()
    assert 1 == len(arena.blocks.unowned())
    arena.receiving.claim(*sent)


def test_what_follows_another_message_than_that_in_its_first_block_is_lost(arena):
    pairs, _ = send(arena, b"x" * MIB, b"y" * MIB)
    arena.blocks.adopt(*first_of(pairs))
    arena.receiving.discard(*first_of(pairs))
    sent = send(arena, b"z" * MIB)
    assert first_of(pairs)[0] == first_of(sent[0])[0]

    assert arena.blocks.has_abandoned()
    assert 1 == arena.blocks.free_lost([])
    arena.receiving.claim(*sent)


def test_nothing_is_lost_for_certain_once_others_do_not_say_any_more_that_they_read(arena):
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    sent = send(arena, b"x" * MIB, channel=77)
    looked = arena.blocks.unowned()
    assert 1 == len(looked)
    arena.blocks.close()

    assert 0 == arena.blocks.free_lost(looked)
    arena.receiving.claim(*sent)
    vanish(other)


def test_who_has_read_what_was_in_a_block_before_has_not_read_what_is_in_it(arena):
    """It may write so, a moment too late."""
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    sent = send(arena, b"x" * MIB)
    index, generation = first_of(sent[0])
    incarnation = int(Table.of(arena).participant(other.blocks.slot).incarnation[0])
    vanish(other)
    arena.reclaim.reap()
    adopted = ADOPTED | incarnation << 28
    channel = Table.of(arena).rows["channel"]

    channel[index] = adopted | generation - 1
    assert [] == arena.blocks.unowned()
    channel[index] = adopted | generation
    assert 1 == len(arena.blocks.unowned())
    arena.receiving.claim(*sent)


def test_a_reference_takes_no_pages_of_a_free_block(arena):
    """Nobody would know any more which of them were made."""
    arena.acquire([100]).release()
    lease = arena.acquire([MIB])
    assert 1 == Table.of(arena).n_rows - 1

    (view,) = arena.blocks.publish(lease.blocks)

    assert 0 == view.nbytes_resident
    del view


def test_the_end_of_the_senders_lease_leaves_what_its_reader_has_sent_on(arena):
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    lease = arena.acquire([MIB])
    pairs = lease.pairs
    lease.seal(7)
    other.blocks.adopt(*first_of(pairs))
    other.blocks.settle(other.blocks.send_on(*first_of(pairs), 8))

    del lease

    (view,) = other.receiving.claim(pairs, [MIB])
    del view
    vanish(other)
    arena.reclaim.reap()


def killed(run, point):
    """Fork a child that is killed when it comes to a point while it runs something."""
    pid = os.fork()
    if pid == 0:
        core.arm(point, 1, signal.SIGKILL)
        run()
        os._exit(0)
    assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_one_was_giving_up_who_died_is_free_though_its_sender_lives(arena):
    pairs, _ = send(arena, b"x" * MIB)

    def read_and_give_up():
        arena.blocks.adopt(*first_of(pairs))
        arena.receiving.discard(*first_of(pairs))

    killed(read_and_give_up, "release.committed")

    arena.reclaim.reap()
    assert FREE == Table.of(arena).state(0)


def test_pages_that_one_had_given_back_who_died_are_not_counted(arena):
    sent = send(arena, b"x" * MIB)

    def receive_and_drop():
        arena.blocks.keep_nbytes = 0
        arena.receiving.claim(*sent)

    killed(receive_and_drop, "release.committed")

    arena.reclaim.reap()
    assert 0 == arena.statistics().nbytes_resident == arena.blocks.resident


def test_a_block_whose_lease_was_only_begun_is_used_again(arena):
    arena.acquire([MIB]).release()

    killed(lambda: arena.acquire([MIB]), "lease.written")

    arena.acquire([MIB]).release()
    assert 1 == Table.of(arena).n_rows
    assert 0 == arena.statistics().n_quarantined


def test_the_byte_of_a_slot_is_let_go_if_there_is_no_lock_to_join(arena):
    go_on = stopped_holder(arena)  # in slot 1
    newcomer = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    assert not newcomer.blocks.joined
    go_on()

    others = [SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors)) for _ in range(2)]

    assert [1, 2] == [other.blocks.slot for other in others]
    for one in (newcomer, *others):
        vanish(one)
    arena.reclaim.reap()


def test_what_a_dead_one_has_counted_stays_when_its_slot_is_taken_over(arena):
    """With so many that newcomers take the slots of the dead."""
    attached = [SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors)) for _ in range(15)]
    dead = attached.pop(3)
    slot = dead.blocks.slot
    send_lost(dead)
    assert 1 == dead.reclaim.reclaim() == arena.statistics().n_reclaimed
    vanish(dead)

    attached.append(SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors)))

    assert slot == attached[-1].blocks.slot
    assert 1 == arena.statistics().n_reclaimed
    for one in attached:
        vanish(one)
    arena.reclaim.reap()


def send_lost(arena):
    read_fd, write_fd = os.pipe()
    send(arena, b"x", channel=os.fstat(write_fd).st_ino)
    os.close(read_fd)
    os.close(write_fd)


def test_a_child_keeps_what_its_parent_had_read(arena):
    """It has the bytes, too."""
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    sent = send(arena, b"x" * MIB)
    other.blocks.adopt(*first_of(sent[0]))
    begun, end = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(begun[1], b"x")
        os.read(end[0], 1)
        os._exit(0)
    os.read(begun[0], 1)
    vanish(other)
    try:
        assert 1 == arena.reclaim.reap()
        assert [] == arena.blocks.unowned()
    finally:
        os.write(end[1], b"x")
        os.waitpid(pid, 0)
    arena.reclaim.reap()
    assert 1 == len(arena.blocks.unowned())
    arena.receiving.claim(*sent)
    for fd in (*begun, *end):
        os.close(fd)


def test_a_channel_with_many_messages_displaces_no_other_from_the_list(arena):
    for channel in (1, 2):
        assert arena.blocks.keep(channel)
    arena.blocks.retain([1] * 64 + [2])

    kept = Table.of(arena).participant(arena.blocks.slot).kept
    assert [1, 2] == [channel for channel in kept if channel]


def test_a_child_keeps_everything_if_its_parent_cannot_list_more(arena):
    """Also before it runs anything of ours."""
    for channel in range(1, 65):
        assert arena.blocks.keep(channel)
    sent = send(arena, b"x" * MIB)
    arena.blocks.adopt(*first_of(sent[0]))
    libc = ctypes.PyDLL(None)
    pid = libc.fork()
    if pid == 0:
        while True:
            libc.pause()

    row = Table.of(arena).participant(1)
    try:
        eventually(lambda: row.pid[0] == pid)
        assert 1 == row.keeps_all[0]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    arena.reclaim.reap()
    arena.receiving.claim(*sent)


# --- what is published


def published(arena):
    """Return a view of what was published, and which block that is."""
    lease = arena.acquire([MIB])
    index = lease.blocks[0].index
    (view,) = arena.blocks.publish(lease.blocks)
    return view, index


def test_references_are_counted_if_their_number_is_damaged(arena):
    view, index = published(arena)
    again = view.again()
    table = Table.of(arena)
    table.rows["channel"][index] = 0xBAD << 40 | 1

    del again

    assert PUBLISHED == table.state(index)
    assert 1 == table.n_named(index)
    del view
    assert table.state(index) in (FREE, RELEASED)


def test_who_died_before_it_had_references_of_its_own_keeps_nothing(arena):
    view, index = published(arena)
    again = view.again()
    del view
    core.arm("birth.in_child", 1, signal.SIGKILL)
    pid = os.fork()
    core.arm(None, 0, 0)
    assert signal.SIGKILL == os.waitpid(pid, 0)[1]
    table = Table.of(arena)
    assert 1 == table.participant(1).inherits[0]

    del again

    assert JOINED == table.participant(1).state[0]
    assert table.state(index) in (FREE, RELEASED)
    arena.reclaim.reap()


def test_a_view_that_is_dropped_is_unmapped(arena):
    views = [published(arena)[0] for _ in range(10)]
    before = number_of_mappings()

    del views

    assert before - 5 > number_of_mappings()


def test_nothing_is_referred_to_that_could_not_be_copied_any_more(arena):
    view, _ = published(arena)
    data = arena.descriptors[0]
    kept = os.dup(data)
    os.close(data)
    message = core.Message(None, 0, tables({}), arena.blocks)
    message.take(PickleBuffer(view))
    os.dup2(kept, data, inheritable=False)
    os.close(kept)

    assert [] == message.references
    assert MIB == message.nbytes
    del view
