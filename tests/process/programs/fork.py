"""Forks while received arrays are alive: from then on they are ordinary memory of both sides."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading

import inside
import numpy as np
from inside import Token, content, fork, is_in_arena, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._memory import fork_hooks
from oobpickle._native import core

SIZES = (65_536, 70_001, 1_000_000, 5_000_000)
MIB = 1 << 20


def _pipe():
    return multiprocessing.Pipe(duplex=False)


def _received(seed, nbytes=1_000_000):
    """Return a message that lies in the arena."""
    read, write = _pipe()
    write.send(message(seed, nbytes))
    return verify(read.recv(), seed)


def _recycle(arena, seed, nbytes):
    """Return a message of another content that lies where the last one of its size lay."""
    received = _received(seed, nbytes)
    assert is_in_arena(arena, received[1])
    return received


# --- each side has its own value


def parent_writes_first():
    oobpickle.install(capacity=256 * MIB)
    held = [_received(seed, size) for seed, size in enumerate(SIZES)]
    written, seen = Token(), Token()

    def child():
        written.take()
        for one in held:
            verify(one)
            one[1][:] = 201
        seen.give()
        assert all((one[1] == 201).all() for one in held)

    pid = fork(child)
    for one in held:
        one[1][:] = 101
    written.give()
    seen.take()
    assert all((one[1] == 101).all() for one in held)
    reap(pid)


def a_child_holds_nothing_of_its_parents():
    """What it may hold before messages are copied on arrival is all for its own."""
    arena = oobpickle.install(capacity=256 * MIB)
    held = [_received(seed) for seed in range(3)]
    assert inner(arena).blocks.n_held == 3

    def child():
        assert inner(arena).blocks.n_held == 0
        held.clear()
        gc.collect()
        assert inner(arena).blocks.n_held == 0
        own = _received(4)
        assert inner(arena).blocks.n_held == 1, own
        del own
        assert inner(arena).blocks.n_held == 0

    reap(fork(child))
    assert inner(arena).blocks.n_held == 3


def child_writes_first():
    oobpickle.install(capacity=256 * MIB)
    held = [_received(seed, size) for seed, size in enumerate(SIZES)]

    def child():
        for one in held:
            verify(one)
            one[1][:] = 201

    reap(fork(child))
    for one in held:
        verify(one)
        one[1][::4096] = 1
        one[1][::4096] = content(one[0], one[1].nbytes)[::4096]
        verify(one)


def parts_of_one_message_and_small_survivors():
    oobpickle.install(capacity=256 * MIB)
    read, write = _pipe()
    write.send([message(n, 3_000 + 17 * n) for n in range(100)] + [message(500, 200_000)])
    parts = read.recv()
    survivor = parts[50]
    del parts

    def child():
        verify(survivor)
        survivor[1][:] = 3

    reap(fork(child))
    verify(survivor)


def child_outlives_the_release_and_the_recycling():
    arena = oobpickle.install(capacity=256 * MIB)
    held = [_received(seed, size) for seed, size in enumerate(SIZES)]
    recycled, ready = Token(), Token()

    def child():
        untouched = held
        ready.give()
        recycled.take()
        for one in untouched:
            verify(one)

    pid = fork(child)
    ready.take()
    held = None
    others = [_recycle(arena, 900 + n, size) for n, size in enumerate(SIZES)]
    for one in others:
        one[1][:] = 9
    recycled.give()
    reap(pid)
    assert all((one[1] == 9).all() for one in others)


def another_sender_recycles_the_block():
    arena = oobpickle.install(capacity=256 * MIB)
    read, write = _pipe()
    go = Token()

    def sender():
        for seed in range(20):
            go.take()
            write.send(message(seed))

    pid = fork(sender)
    go.give()
    held = verify(read.recv(), 0)
    children = []
    for seed in range(1, 20):
        verified, dropped = Token(), Token()

        def child(held=held, seed=seed, dropped=dropped, verified=verified):
            dropped.take()
            verify(held, seed - 1)
            held[1][:] = 1
            verified.give()

        children.append((fork(child), dropped, verified))
        del held, child
        go.give()
        held = verify(read.recv(), seed)
        assert is_in_arena(arena, held[1])
        for _, dropped, verified in children[-1:]:
            dropped.give()
            verified.take()
        verify(held, seed)
    for child, _, _ in children:
        reap(child)
    reap(pid)
    assert arena.statistics().n_copied_on_receive == 0


def parent_is_killed_and_its_blocks_are_recycled():
    arena = oobpickle.install(capacity=64 * MIB)
    dead, checked = Token(), Token()

    def parent():
        held = [_received(seed, 1_000_000) for seed in range(5)]

        def child():
            dead.take()
            for one in held:
                verify(one)
            checked.give()

        fork(child)
        os.kill(os.getpid(), 9)

    reap(fork(parent), inside.KILLED)
    inside.eventually(inner(arena).reclaim.reap)  # its child may not have left its lock yet
    others = [_recycle(arena, 70 + n, 1_000_000) for n in range(5)]
    dead.give()
    checked.take()
    for one in others:
        verify(one)
    inside.assert_table_in_order(arena)


def child_of_a_child():
    arena = oobpickle.install(capacity=256 * MIB)
    first = _received(1)
    recycled = Token()

    def child():
        second = _received(2)

        def grandchild():
            third = _received(3)
            recycled.take()
            for one in (first, second, third):
                verify(one)
                one[1][:] = 77

        pid = fork(grandchild)
        second[1][:] = 22
        verify(first, 1)
        _recycle(arena, 902, 1_000_000)
        recycled.give()
        reap(pid)
        assert (second[1] == 22).all()
        verify(first, 1)

    pid = fork(child)
    reap(pid)
    verify(first, 1)
    gc.collect()
    arena.trim()
    assert arena.statistics().n_blocks["held"] == 1
    inside.assert_table_in_order(arena)


def fifty_generations():
    """Each child holds what it got and what all its ancestors got."""
    oobpickle.install(capacity=256 * MIB)

    def generation(n, held):
        held = [*held, _received(n, 80_000)]
        if n < 50:
            reap(fork(generation, n + 1, held))
        for seed, one in enumerate(held):
            verify(one, seed)
            one[1][:] = 0

    generation(0, [])


# --- the child as a participant


def child_receives_into_the_block_of_its_inherited_array():
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    held = _received(7)
    ready = Token()

    def child():
        ready.give()
        received = verify(read.recv(), 66)
        verify(held, 7)
        received[1][:] = 1
        verify(held, 7)
        held[1][:] = 2
        assert (received[1] == 1).all()

    pid = fork(child)
    ready.take()
    held = None
    write.send(message(66))
    reap(pid)
    arena.trim()
    assert arena.statistics().n_blocks["held"] == 0
    inside.assert_table_in_order(arena)


def child_sends_from_the_block_of_its_inherited_array():
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    held = _received(7)
    dropped = Token()

    def child():
        dropped.take()
        for seed in range(20, 24):
            write.send(message(seed))  # into the recycled block
            verify(held, 7)
        write.send(held)
        lease = inner(arena).acquire([1_000_000])
        lease.destinations[0][:] = b"\1" * 1_000_000
        lease.release()
        verify(held, 7)

    pid = fork(child)
    held = None
    gc.collect()
    dropped.give()
    for seed in (20, 21, 22, 23, 7):
        verify(read.recv(), seed)
    reap(pid)


def child_sends_and_receives():
    arena = oobpickle.install(capacity=64 * MIB)
    held = _received(1)
    to_child, from_parent = _pipe()
    to_parent, from_child = _pipe()

    def child():
        before = arena.statistics()
        assert before.n_participants == 2, before
        for seed in range(30):
            received = verify(to_child.recv(), seed)
            assert is_in_arena(arena, received[1]) or held
            from_child.send((seed + 1, content(seed + 1, 1_000_000)))
            verify(held, 1)

    pid = fork(child)
    for seed in range(30):
        from_parent.send(message(seed))
        verify(to_parent.recv(), seed + 1)
        verify(held, 1)
    reap(pid)
    assert arena.statistics().n_fallbacks == 0
    inside.assert_table_in_order(arena)


def the_exit_of_a_child_frees_nothing_of_the_parent():
    arena = oobpickle.install(capacity=64 * MIB)
    held = [_received(seed, 500_000) for seed in range(6)]
    for leave in (sys.exit, lambda: os._exit(0)):
        pid = os.fork()
        if pid == 0:
            leave()
        reap(pid)
        newcomers = [_received(100 + n, 500_000) for n in range(6)]
        for one in (*held, *newcomers):
            verify(one)
        assert arena.statistics().n_blocks["held"] == 12
    inside.assert_table_in_order(arena)


def child_that_drops_everything_frees_nothing_of_the_parent():
    arena = oobpickle.install(capacity=64 * MIB)
    held = [_received(seed, 500_000) for seed in range(6)]

    def child():
        held.clear()
        gc.collect()
        mine = [_received(200 + n, 500_000) for n in range(6)]
        arena.trim()
        for one in mine:
            verify(one)

    reap(fork(child))
    inner(arena).reclaim.reap()
    assert arena.statistics().n_blocks["held"] == 6
    for one in held:
        verify(one)
    del one
    held.clear()
    assert arena.statistics().n_blocks["held"] == 0


def message_packed_before_the_fork_and_sent_after_it():
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    pickler = multiprocessing.connection._ForkingPickler

    class Channel:
        """`dumps` looks for the connection of its caller, as `Connection.send` has it."""

        _send_bytes = multiprocessing.connection.Connection._send_bytes

        def __init__(self, handle):
            self._handle = handle

        def pack(self, obj):
            return pickler.dumps(obj)

    packed = Channel(write.fileno()).pack(message(5))

    def child():
        nonlocal packed
        packed = None
        gc.collect()
        for seed in range(10, 20):
            _received(seed)

    reap(fork(child))
    write.send_bytes(packed)
    verify(read.recv(), 5)
    assert arena.statistics().n_messages_out_of_band == 11


# --- threads


def threads_send_and_receive_while_another_forks():
    arena = oobpickle.install(capacity=256 * MIB)
    held = [_received(seed, 100_000 + seed) for seed in range(5)]
    stop, failures = threading.Event(), []

    def traffic(base):
        read, write = _pipe()
        kept, n = [], 0
        try:
            while not stop.is_set():
                n += 1
                write.send(message(base + n, 70_000 + 5_000 * (n % 40)))
                kept = [verify(read.recv(), base + n), *kept[:3]]
                for one in kept:
                    verify(one)
                kept[0][1][:] = 5
                kept[0][1][:] = content(kept[0][0], kept[0][1].nbytes)
        except BaseException as error:
            failures.append(error)

    def child():
        for one in held:
            verify(one)
        for seed in range(3):
            one = _received(500 + seed, 200_000)
            one[1][:] = 1

    threads = [threading.Thread(target=traffic, args=(base,)) for base in (10_000, 20_000)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            reap(fork(child))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    for one in held:
        verify(one)
    inside.assert_table_in_order(arena)


def threads_work_and_collect_while_pools_and_programs_start():
    """`Pool`, `subprocess`, `os.fork` and a fork of the fork; what was received is garbage soon."""
    arena = oobpickle.install(capacity=256 * MIB)
    held = [_received(seed, 100_000 + seed) for seed in range(5)]
    stop, failures, n_dead = threading.Event(), [], 0

    class Cycle:
        def __init__(self, received):
            self.received, self.itself = received, self

        def __del__(self):
            nonlocal n_dead
            try:
                verify(self.received)
                n_dead += 1
            except BaseException as error:
                failures.append(error)

    def traffic(base):
        read, write = _pipe()
        n = 0
        try:
            while not stop.is_set():
                n += 1
                write.send(message(base + n, 70_000 + 5_000 * (n % 40)))
                received = verify(read.recv(), base + n)
                received[1][::4096] += 1
                received[1][::4096] -= 1
                Cycle(received)
        except BaseException as error:
            failures.append(error)

    def collect():
        while not stop.is_set():
            gc.collect(0)

    def child():
        for one in held:
            verify(one)
        gc.collect()
        pid = fork(lambda: [verify(one)[1].fill(1) for one in held])
        held.append(_received(500, 200_000))
        reap(pid)
        for one in held:
            verify(one)

    threads = [threading.Thread(target=traffic, args=(base,)) for base in (10_000, 20_000)]
    threads.append(threading.Thread(target=collect))
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
                for seed, one in enumerate(pool.imap(_held_and_more, [held] * 3)):
                    verify((seed, one))
                    held[seed] = seed, one
            for _ in range(4):
                reap(fork(child))
            subprocess.run([sys.executable, "-c", ""], preexec_fn=gc.collect, check=True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    gc.collect()
    assert not failures, failures
    assert n_dead > 50, n_dead
    for one in held:
        verify(one)
    assert arena.statistics().n_shared_after_fork == 0
    inside.assert_table_in_order(arena)


def feeder_threads_copy_while_this_one_forks():
    arena = oobpickle.install(capacity=512 * MIB)
    held = _received(3, 5_000_000)
    queues = [multiprocessing.Queue() for _ in range(2)]

    def child():
        verify(held, 3)[1].fill(0)

    for seed in range(4):
        for queue in queues:
            queue.put(message(seed, 40_000_000))
        reap(fork(child))
    for seed in range(4):
        for queue in queues:
            verify(queue.get(), seed)
        reap(fork(child))
        verify(held, 3)
    for queue in queues:
        queue.close()
        queue.join_thread()
    assert set(arena.statistics().fallbacks) <= {"busy"}, arena.statistics()
    inside.assert_table_in_order(arena)


def two_threads_fork_at_once():
    arena = oobpickle.install(capacity=64 * MIB)
    sys.setswitchinterval(1e-5)
    held = _received(1)
    epoch, slot = core.epoch(), inner(arena).blocks.slot
    failures = []

    def child():
        assert core.epoch() == epoch + 1, "the child goes on as its parent"
        assert inner(arena).blocks.slot != slot
        verify(held, 1)

    def forks():
        try:
            for _ in range(40):
                reap(fork(child))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=forks) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    _received(2)
    assert arena.statistics().n_fallbacks == 0
    inside.assert_table_in_order(arena)


def what_is_claimed_between_the_hook_and_the_fork():
    """By a hook that comes later, or another thread: it is a copy already."""
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    received = [_received(1)]
    armed = True

    def receive():
        if armed:
            write.send(message(7))
            thread = threading.Thread(target=lambda: received.append(read.recv()))
            thread.start()
            thread.join()

    def child():
        for one in received:
            one[1][:] = 0

    core.fork_before()  # as a hook of ours that runs before others
    receive()
    armed = False
    reap(fork(child))
    core.fork_in_parent()
    verify(received[0], 1)
    verify(received[1], 7)
    assert not is_in_arena(arena, received[1][1])
    reap(fork(received[1][1].fill, 0))
    verify(received[1], 7)
    assert is_in_arena(arena, _received(8)[1])
    inside.assert_table_in_order(arena)


def fork_while_another_thread_takes_over_many_blocks():
    """Those that it has not come to yet are left alone."""
    arena = oobpickle.install(capacity=1 << 30)
    sys.setswitchinterval(1e-5)
    read, write = _pipe()
    stop, wrong = threading.Event(), []

    def receive():
        try:
            while (received := read.recv()) is not None:
                for one in received:
                    verify(one)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=receive)
    thread.start()

    def send():
        for seed in range(6 * inside.REPEATS):
            write.send([message(seed + n, 2_000_000) for n in range(8)])
        stop.set()

    sender = threading.Thread(target=send)
    sender.start()
    while not stop.is_set():
        reap(fork(lambda: None))
    sender.join()
    write.send(None)
    thread.join()
    assert not wrong, wrong
    assert arena.statistics().n_shared_after_fork == 0
    inside.assert_table_in_order(arena)


def arrays_that_die_in_another_thread_during_forks():
    arena = oobpickle.install(capacity=256 * MIB)
    sys.setswitchinterval(1e-5)
    stop = threading.Event()
    shelf = [None] * 64

    def drop():
        n = 0
        while not stop.is_set():
            n += 1
            shelf[n % 64] = None

    thread = threading.Thread(target=drop)
    thread.start()
    kept = _received(1, 2_000_000)
    for _ in range(14 * inside.REPEATS):
        for n in range(64):
            shelf[n] = _received(n, 66_000)

        def child():
            for one in list(shelf):
                if one is not None:
                    verify(one)
            verify(kept, 1)

        reap(fork(child))
        verify(kept, 1)
    stop.set()
    thread.join()
    shelf.clear()
    gc.collect()
    arena.trim()
    assert arena.statistics().n_blocks["held"] == 1
    inside.assert_table_in_order(arena)
    # No range stays private without an array over it: messages arrive uncopied again.
    n_copied = arena.statistics().n_copied_on_receive
    for n in range(80):
        shelf.append(_received(n, 66_000))
    assert arena.statistics().n_copied_on_receive == n_copied


# --- pages and costs


def file_pages_are_gone_before_fork_returns():
    arena = oobpickle.install(capacity=512 * MIB)
    held = [_received(seed, 20_000_000) for seed in range(3)]
    assert os.fstat(inner(arena).descriptors[0]).st_blocks * 512 >= 60_000_000
    waiting, done = Token(), Token()

    def child():
        waiting.take()
        for one in held:
            verify(one)
        done.give()

    pid = fork(child)
    left = os.fstat(inner(arena).descriptors[0]).st_blocks * 512
    assert left < 1_000_000, left
    statistics = arena.statistics()
    assert statistics.n_copied_at_fork == 3
    assert statistics.nbytes_copied_at_fork == 60_000_000
    assert statistics.n_shared_after_fork == 0
    waiting.give()
    done.take()
    reap(pid)


def recycled_smaller_blocks_leave_no_pages():
    arena = oobpickle.install(capacity=512 * MIB)
    large = _received(1, 300_000)
    del large
    held = _received(2, 265_000)
    reap(fork(lambda: None))
    verify(held)
    del held
    arena.trim()
    assert os.fstat(inner(arena).descriptors[0]).st_blocks == 0


def released_private_ranges_are_shared_again():
    arena = oobpickle.install(capacity=256 * MIB)
    for round in range(20):
        held = _received(round, 3_000_000)
        assert is_in_arena(arena, held[1])
        reap(fork(lambda: None))
        verify(held, round)
        held[1][:] = 0
        del held
    statistics = arena.statistics()
    assert statistics.n_copied_on_receive == 0
    assert statistics.n_blocks["free"] == 1
    assert statistics.n_copied_at_fork == 20


def subprocess_is_unaffected():
    arena = oobpickle.install(capacity=64 * MIB)
    held = _received(3)
    listing = subprocess.run(
        [sys.executable, "-c", "import os; print([os.readlink(f'/proc/self/fd/{fd}') for fd in"
         " os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}')])"],
        capture_output=True, text=True, check=True, close_fds=False,
    )  # fmt: skip
    assert "oobpickle" not in listing.stdout, listing.stdout
    assert os.system("true") == 0
    assert arena.statistics().n_copied_at_fork == 0
    verify(held)
    assert arena.statistics().n_participants == 1


def subprocess_with_preexec_fn():
    arena = oobpickle.install(capacity=64 * MIB)
    held = _received(3)
    for _ in range(3):
        subprocess.run([sys.executable, "-c", ""], preexec_fn=lambda: None, check=True)
    verify(held)
    _received(4)
    inner(arena).reclaim.reap()
    assert arena.statistics().n_participants == 1


def without_an_arena_the_hooks_do_nothing():
    assert fork_hooks.start.cache_info().currsize == 0
    reap(fork(lambda: None))
    arena = oobpickle.install(capacity=64 * MIB)
    _received(1)
    oobpickle.uninstall()
    assert inside.our_descriptors() == []
    assert inner(arena).blocks.ended
    reap(fork(lambda: None))


def a_fork_after_the_block_keeps_what_is_left():
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        held = _received(3)
    ready, written = Token(), Token()

    def child():
        ready.take()
        verify(held)
        held[1][:] = 4
        written.give()

    pid = fork(child)
    held[1][:] = 5
    ready.give()
    written.take()
    assert (held[1] == 5).all()
    reap(pid)
    held = None
    gc.collect()
    assert arena.statistics().nbytes_resident == 0, arena.statistics()
    oobpickle.install()  # whoever comes next takes the old arena away
    oobpickle.uninstall()
    assert inside.our_descriptors() == []


# --- fork pools

_global = None


def _sum_of_global(factor):
    verify(_global)
    result = int(_global[1].sum(dtype=np.int64)) * factor
    _global[1][:] = factor
    _global[1][:] = content(*_global[:1], _global[1].nbytes)
    return result, content(factor, 300_000)


_n_tasks = multiprocessing.get_context("fork").Value("i", 0)


def _held_and_more(held):
    for one in held:
        verify(one)
        one[1][:] = 3
    seed = _n_tasks.value % 3
    _n_tasks.value += 1
    return content(seed, 150_000)


def pool_inherits_received_arrays():
    global _global
    arena = oobpickle.install(capacity=64 * MIB)
    _global = _received(11, 2_000_000)
    expected = int(_global[1].sum(dtype=np.int64))
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=3) as pool:
        for n, (total, echo) in enumerate(pool.imap(_sum_of_global, range(30))):
            assert total == expected * n
            verify((n, echo))
            verify(_global)
        pool.close()
        pool.join()
    verify(_global)
    assert arena.statistics().n_fallbacks == 0
    inside.assert_table_in_order(arena)


if __name__ == "__main__":
    inside.main()
