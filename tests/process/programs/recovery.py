"""What comes back, and what still works, after a process was killed, stopped, or left its mail."""

import contextlib
import fcntl
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import inside
from inside import Token, eventually, fork, is_in_arena, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._memory import receiving
from oobpickle._native import core
from table import Table

MIB = 1 << 20


def _pipe():
    return multiprocessing.Pipe(duplex=False)


def _kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def _fill(arena, nbytes=MIB):
    """Lease all the room there is; return the leases."""
    leases = []
    with contextlib.suppress(oobpickle.ArenaFullError):
        while True:
            leases.append(inner(arena).acquire([nbytes], wait_timeout=0))
    return leases


# --- killed with full hands


def worker_killed_while_it_holds_everything():
    arena = oobpickle.install(capacity=64 * MIB, copy_on_receive=False, wait_timeout=0)
    read, write = _pipe()
    full = Token()

    def worker():
        held = [verify(read.recv(), seed) for seed in range(30)]
        leases = _fill(arena)
        full.give()
        while held and leases:
            signal.pause()

    pid = fork(worker)
    for seed in range(30):
        write.send(message(seed, 2 * 10**6))
    full.take()
    assert _fill(arena) == []
    os.kill(pid, signal.SIGKILL)
    reap(pid, inside.KILLED)
    leases = _fill(arena, 2 * 10**6)
    assert len(leases) == 64 * MIB // (2 * 10**6), (len(leases), arena.statistics())
    assert arena.statistics().n_fallbacks == 0
    del leases
    inside.assert_empty(arena)


def worker_killed_between_reading_and_loading():
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()

    def worker():
        for _ in range(3):
            read.recv_bytes()
        _kill_self()

    pid = fork(worker)
    for seed in range(3):
        write.send(message(seed))
    reap(pid, inside.KILLED)
    inside.assert_empty(arena)


def kills_at_random_moments():
    arena = oobpickle.install(capacity=48 * MIB)
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    to_echo, echo_write = _pipe()
    echo_read, from_echo = _pipe()

    def echo():
        echo_write.close()
        held = []
        with contextlib.suppress(EOFError):
            while True:
                held = [verify(to_echo.recv()), *held[:2]]
                from_echo.send(message(held[0][0] + 1))
                for one in held:
                    verify(one)

    def victim():
        read, write = _pipe()
        held = []
        for n in range(10_000):
            write.send([message(n, size) for size in (100_000, 3_000, 900_000)])
            held = [*held[-3:], read.recv()]
            for one in held[-1]:
                verify(one, n)
            if n % 5 == 4:
                arena.trim()

    partner = fork(echo)
    to_echo.close()
    from_echo.close()
    try:
        for round in range(40):
            victims = [fork(victim) for _ in range(2)]
            deadline = time.perf_counter() + chance.uniform(0, 0.03)
            while time.perf_counter() < deadline:
                echo_write.send(message(round * 10))
                verify(echo_read.recv(), round * 10 + 1)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            for pid in victims:
                reap(pid, inside.KILLED)
            inside.assert_table_in_order(arena)
        arena.trim()
        echo_write.close()
        reap(partner)
        inside.assert_empty(arena)
    except BaseException:
        print("seed", seed, file=sys.stderr)
        raise


def owner_killed_while_it_closes(point):
    """The owner dies in uninstall(); the others go on with what they have."""
    ready, dead = Token(), Token()

    def owner():
        arena = oobpickle.install(capacity=64 * MIB)
        read, write = _pipe()

        def other():
            there, back = _pipe()
            held = [verify(read.recv(), seed) for seed in range(5)]
            ready.give()
            dead.take()
            for n in range(0 if arena.closed else 20):
                back.send(message(n))
                held.append(verify(there.recv(), n))
            for one in held:
                verify(one)
            # Whatever the owner managed: the table is whole.
            inner(arena).reclaim.reap()
            inside.assert_table_in_order(arena)

        fork(other)
        for seed in range(5):
            write.send(message(seed))
        ready.take()
        leases = _fill(arena)
        del leases
        inner(arena).blocks.reap()
        inside._faults.arm(point)
        oobpickle.uninstall()

    reap(fork(owner), inside.KILLED)
    dead.give()


def parent_killed_with_messages_in_flight(method):
    """Exits by SIGKILL; the harness sees that the workers exit too."""
    oobpickle.install(capacity=1 << 30)
    pool = multiprocessing.get_context(method).Pool(2)
    results = pool.imap(_double, [message(seed, 4_000_000) for seed in range(40)])
    verify(next(results))
    _kill_self()


def _double(received):
    verify(received)
    return message(received[0] + 1, 2 * received[1].nbytes)


def executor_with_a_killed_worker():
    with oobpickle.enabled(capacity=128 * MIB) as arena:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(2, context) as executor:
            verify(executor.submit(_double, message(1)).result())
            with contextlib.suppress(BrokenProcessPool):
                for n in range(4):
                    executor.submit(_die, message(n)).result()
                raise AssertionError("the executor survived")
        del executor
        with ProcessPoolExecutor(2, context) as executor:
            for one in executor.map(_double, [message(n) for n in range(10)]):
                verify(one)
        del executor, one
        inside.assert_empty(arena)
        assert arena.statistics().n_fallbacks == 0


def _die(received):
    verify(received)
    _kill_self()


# --- mail that nobody reads


def thirty_terminated_pools():
    """Terminated as `with Pool()` does it, while workers work and tasks and results are unread."""
    arena = oobpickle.install(capacity=1 << 30)
    nbytes, n_tasks = 300_000, 20
    seen = []
    for _ in range(30):
        # Looks for lost messages have an interval: rounds that are quicker share one, and what they
        # leave adds up.
        eventually(lambda: time.monotonic() >= inner(arena).reclaim._look_again_at)
        _terminate_a_pool(n_tasks, nbytes)
        seen.append(arena.statistics().nbytes["in_flight"])
    assert max(seen) <= 2 * (n_tasks + 6) * nbytes, seen  # two rounds: tasks, results, queue
    inside.assert_empty(arena)


def thirty_rounds_in_little_room():
    """The same with room for less than two rounds: nothing may go in-band for want of it."""
    arena = oobpickle.install(capacity=16 * MIB, wait_timeout=5)
    for _ in range(30):
        _terminate_a_pool(n_tasks=12, nbytes=500_000)
    assert arena.statistics().n_fallbacks == 0, arena.statistics()
    inside.assert_empty(arena)


_never_read, _never_written = os.pipe()


def _terminate_a_pool(n_tasks, nbytes):
    # The workers are within a task when they are terminated: if one is about to return a result,
    # CPython's own Pool.terminate() can wait for ever for the lock that it died with.
    context = multiprocessing.get_context("fork")
    unread = context.SimpleQueue()
    with context.Pool(2, _put_some, (unread, nbytes)) as pool:
        results = pool.imap(_work_on_the_first, [message(n, nbytes) for n in range(n_tasks)])
        verify(next(results), 0)
    del results, pool, unread
    gc.collect()  # pools are cycles; their pipes close with them


def _put_some(queue, nbytes):
    for seed in range(3):
        queue.put(message(seed, nbytes))


def _work_on_the_first(received):
    if verify(received)[0] > 0:
        os.read(_never_read, 1)
    return received


def queue_dropped_full():
    arena = oobpickle.install(capacity=256 * MIB)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    for seed in range(20):
        queue.put(message(seed))
    eventually(lambda: arena.statistics().nbytes["in_flight"] >= 20_000_000)
    queue.close()
    queue.join_thread()
    del queue
    inside.assert_empty(arena)
    assert arena.statistics().n_reclaimed == 20


def simple_queue_and_pipes_dropped_full():
    arena = oobpickle.install(capacity=256 * MIB)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    read, write = _pipe()
    here, there = multiprocessing.Pipe()
    for seed in range(5):
        queue.put(message(seed))
        write.send(message(seed))
        here.send(message(seed))
        there.send(message(seed))
    assert arena.statistics().n_blocks["in_flight"] == 20
    arena.trim()
    assert arena.statistics().n_blocks["in_flight"] == 20
    del queue
    read.close()
    write.close()
    here.close()
    there.close()
    inside.assert_empty(arena)


def mail_to_a_dead_reader():
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    here, there = multiprocessing.Pipe()

    def reader():
        write.close()
        here.close()
        verify(read.recv(), 0)
        verify(there.recv(), 0)
        _kill_self()

    pid = fork(reader)
    read.close()
    there.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for seed in range(9):
            write.send(message(seed))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for seed in range(9):
            here.send(message(seed))
    reap(pid, inside.KILLED)
    inside.assert_empty(arena)


# --- mail that somebody reads later


def sender_killed_after_send(kind):
    """What was sent arrives, even if all room was taken, and taken back, before it is read."""
    arena = oobpickle.install(capacity=64 * MIB, wait_timeout=0)
    context = multiprocessing.get_context("fork")
    if kind in ("Queue", "SimpleQueue"):
        queue = getattr(context, kind)()
        put, get = queue.put, queue.get
    else:
        get_end, put_end = multiprocessing.Pipe(duplex=kind == "duplex")
        put, get = put_end.send, get_end.recv

    def sender():
        if kind not in ("Queue", "SimpleQueue"):
            get_end.close()
        for seed in range(6):
            put(message(seed))
        if kind == "Queue":
            queue.close()
            queue.join_thread()
        _kill_self()

    pid = fork(sender)
    if kind not in ("Queue", "SimpleQueue"):
        put_end.close()
    reap(pid, inside.KILLED)
    _take_all_room_twice(arena, n_at_least=57)
    assert arena.statistics().n_blocks["in_flight"] == 6
    received = [verify(get(), seed) for seed in range(6)]
    assert all(is_in_arena(arena, one[1]) for one in received)
    assert arena.statistics().n_fallbacks == 0


def message_read_but_not_yet_loaded():
    """Its channel is empty and its sender is dead; but who has read it owns it."""
    arena = oobpickle.install(capacity=16 * MIB, wait_timeout=0)
    read, write = _pipe()
    relay_read, relay_write = _pipe()
    has_read, go_on, relayed = Token(), Token(), Token()

    def sender():
        for seed in range(3):
            write.send(message(seed))
        write.send([message(seed, 3_000) for seed in range(200)])
        _kill_self()

    def reader():
        raw = [read.recv_bytes() for _ in range(4)]
        has_read.give()
        go_on.take()
        for seed in range(2):
            verify(pickle.loads(raw[seed]), seed)
        for one in raw[2:]:
            relay_write.send_bytes(one)
        relayed.give()

    killed, living = fork(sender), fork(reader)
    reap(killed, inside.KILLED)
    has_read.take()
    _take_all_room_twice(arena, n_at_least=10)
    go_on.give()
    relayed.take()
    _take_all_room_twice(arena, n_at_least=10)
    verify(relay_read.recv(), 2)
    for seed, one in enumerate(relay_read.recv()):
        verify(one, seed)
    reap(living)
    del one
    inside.assert_empty(arena)


def _take_all_room_twice(arena, n_at_least):
    for _ in range(2):
        leases = _fill(arena)
        assert len(leases) >= n_at_least, len(leases)
        for lease in leases:
            lease.release()
        arena.trim()


def reader_on_its_way_in_a_socket():
    """While the reading end is passed on (SCM_RIGHTS), no process has a descriptor of it."""
    arena = oobpickle.install(capacity=16 * MIB, wait_timeout=0)
    read, write = _pipe()
    one, other = socket.socketpair()
    write.send(message(1))
    socket.send_fds(one, [b"x"], [read.fileno()])
    read.close()
    write.close()
    _take_all_room_twice(arena, n_at_least=14)
    _, (fd,), _, _ = socket.recv_fds(other, 1, 1)
    verify(multiprocessing.connection.Connection(fd, writable=False).recv(), 1)
    one.close()
    other.close()
    inside.assert_empty(arena)


def something_stuck_in_the_socket_of_a_stranger():
    """A program that is no descendant of a participant keeps nothing from being reclaimed."""
    one, other = socket.socketpair()

    def participant():
        one.close()
        other.close()
        arena = oobpickle.install(capacity=16 * MIB, wait_timeout=0)
        read, write = _pipe()
        write.send(message(1))
        read.close()
        write.close()
        arena.trim()
        assert arena.statistics().n_reclaimed == 1, arena.statistics()

    with open(os.devnull) as stuck:
        socket.send_fds(one, [b"x"], [stuck.fileno()])
    reap(fork(participant))
    one.close()
    other.close()


def descendant_of_a_process_that_reads_without_saying():
    """A child has uninstalled, forks and ends: its child still reads without saying when."""
    arena = oobpickle.install(capacity=16 * MIB, wait_timeout=0)
    read, write = _pipe()
    report, answer = multiprocessing.Pipe(duplex=False)
    has_read, go_on = Token(), Token()

    def child():
        oobpickle.uninstall()
        fork(grandchild)

    def grandchild():
        raw = read.recv_bytes()
        has_read.give()
        go_on.take()
        answer.send(verify(pickle.loads(raw))[0])

    reap(fork(child))
    read.close()
    write.send(message(5))
    has_read.take()
    _take_all_room_twice(arena, n_at_least=14)
    go_on.give()
    assert report.recv() == 5


_FOREIGN = """
import os, pickle, sys
from multiprocessing.connection import Connection
read, go, say = Connection(int(sys.argv[1]), writable=False), int(sys.argv[2]), int(sys.argv[3])
for _ in range(3):
    raw = read.recv_bytes()
    os.write(say, b"r")
    os.read(go, 1)
    os.write(say, bytes([pickle.loads(raw)[0]]))
"""


def program_that_inherited_a_connection():
    """It finds the arena with its first message; from then on nothing of it is reclaimed."""
    arena = oobpickle.install(capacity=16 * MIB, wait_timeout=0)
    read, write = _pipe()
    (go, go_on), (has_read, say) = os.pipe(), os.pipe()
    fds = read.fileno(), go, say
    program = subprocess.Popen([sys.executable, "-c", _FOREIGN, *map(str, fds)], pass_fds=fds)
    read.close()
    for seed in range(3):
        write.send(message(seed))
        assert os.read(has_read, 1) == b"r"
        if seed > 0:
            _take_all_room_twice(arena, n_at_least=14)
        os.write(go_on, b"x")
        assert os.read(has_read, 1) == bytes([seed])
    assert program.wait(20) == 0


def message_whose_load_is_interrupted():
    """Nobody has it any more: its memory comes back."""
    arena = oobpickle.install(capacity=16 * MIB)
    read, write = _pipe()
    claim = receiving.Receiving.claim

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for seed in range(40):
        write.send([message(seed), message(seed, 300_000)])
        receiving.Receiving.claim = interrupted
        with contextlib.suppress(KeyboardInterrupt):
            read.recv()
            raise AssertionError("loaded")
        receiving.Receiving.claim = claim
    assert arena.statistics().n_fallbacks == 0
    inside.assert_empty(arena)


def what_a_dead_one_has_counted_is_counted_once():
    """Also if who adds it up dies right before, or right after, it is in the sum."""
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()

    def sender():
        for seed in range(3):
            write.send(message(seed))

    for n, point in enumerate(("participant.summed", "participant.absorbed"), start=1):
        reap(fork(sender))
        for seed in range(3):
            verify(read.recv(), seed)
        reap(fork(inner(arena).blocks.reap, fault=point), expected=inside.KILLED)
        inner(arena).blocks.reap()
        found = arena.statistics()
        assert found.n_messages_out_of_band == 3 * n, (point, found)


def statistics_are_asked_for_while_blocks_are_left():
    arenas, errors, done = [], [], threading.Event()
    sys.setswitchinterval(1e-5)  # else this thread waits 5 ms each time that it has let the GIL go

    def ask():
        while not done.is_set():
            for arena in arenas[-2:]:
                try:
                    assert arena.statistics().n_fallbacks == 0
                    arena.trim()
                except oobpickle.ArenaFullError:
                    pass  # busy
                except BaseException as error:
                    errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(30):
            with oobpickle.enabled(capacity=16 * MIB) as arena:
                arenas.append(arena)
                read, write = _pipe()
                write.send(message(seed))
                verify(read.recv(), seed)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors, errors
    with oobpickle.enabled():
        pass
    assert all(inner(arena).blocks.ended for arena in arenas)


def message_read_after_the_block_was_left():
    with oobpickle.enabled(capacity=64 * MIB):
        read, write = _pipe()
        here, there = multiprocessing.Pipe()

        def sender():
            write.send(message(1))
            there.send(message(2))

        reap(fork(sender))
        write.close()
        there.close()
    received = [verify(read.recv(), 1), verify(here.recv(), 2)]
    received[0][1][:] = 1
    received[1][1][:] = 2


def a_message_loaded_twice():
    """The second time there is an error, whatever became of its memory; never another's data."""
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    sender_read, sender_write = _pipe()
    others = [[message(n, 3_000) for n in range(40)], message(1), [message(1), message(2, 300_000)]]
    for obj in others:
        write.send(obj)
        raw = read.recv_bytes()
        received = pickle.loads(raw)
        _assert_stale(raw)  # while it is held
        del received
        inner(arena).blocks.reap()
        _assert_stale(raw)  # while it is free
        sender_write.send(obj)
        _assert_stale(raw)  # while it is in flight again, with other content
        received = sender_read.recv()
        _assert_stale(raw)  # while it is held again
        del received
        arena.trim()
        _assert_stale(raw)  # while its pages are gone
    for position in range(8, len(raw), 7):  # altered on the way
        altered = bytearray(raw)
        altered[position] ^= 0x55
        with contextlib.suppress(pickle.UnpicklingError, AttributeError, ValueError, ImportError):
            pickle.loads(altered)
            raise AssertionError(f"byte {position} was altered, nobody complained")
    inside.assert_empty(arena)


def _assert_stale(raw):
    with contextlib.suppress(oobpickle.StaleEnvelopeError):
        pickle.loads(raw)
        raise AssertionError("the message was loaded a second time")


def process_with_a_fault_in_its_environment(point):
    """OOBPICKLE_FAULT reaches a spawned process; the others go on."""
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    there, back = _pipe()
    process = multiprocessing.get_context("spawn").Process(target=_echo_once, args=(read, back))
    os.environ["OOBPICKLE_FAULT"] = point
    process.start()
    del os.environ["OOBPICKLE_FAULT"]
    read.close()
    back.close()
    with contextlib.suppress(BrokenPipeError, EOFError):
        write.send(message(1))
        verify(there.recv(), 2)
    process.join(20)
    assert process.exitcode == inside.KILLED, process.exitcode
    inside.assert_empty(arena)


def _echo_once(read, back):
    verify(read.recv(), 1)
    back.send(message(2))


# --- stopped in the worst place


def _wait_less():
    """A quarter of the patience with a holder of the lock; one case below has all of it."""
    core.wait_for_the_lock(500_000)


def a_stopped_holder_of_the_lock():
    _wait_less()
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    echo_read, from_echo = _pipe()
    before = message(0)
    write.send(before)
    held = verify(read.recv(), 0)
    write.send(message(1))

    def stop_inside_a_step():
        inside.stop_with_the_lock(arena)
        from_echo.send(message(9))

    pid = fork(stop_inside_a_step)
    os.waitpid(pid, os.WUNTRACED)
    started = time.monotonic()
    received = verify(read.recv(), 1)  # a load works without the lock
    assert is_in_arena(arena, received[1])
    assert time.monotonic() - started < 1
    started = time.monotonic()
    for _ in range(10):  # small ones do not pay for it again and again
        write.send(message(2, 50_000))
        verify(read.recv(), 2)
    assert time.monotonic() - started < 5

    def sends():
        write.send(message(3))

    sender = fork(sends)
    verify(read.recv(), 3)
    reap(sender)
    assert time.monotonic() - started < 15
    verify(held, 0)
    del held, received  # a release works without it too
    os.kill(pid, signal.SIGCONT)
    reap(pid)
    verify(echo_read.recv(), 9)
    statistics = arena.statistics()
    assert set(statistics.fallbacks) <= {"busy", "detached"}, statistics.fallbacks
    write.send(message(4))
    received = verify(read.recv(), 4)
    assert is_in_arena(arena, received[1])
    del received
    inside.assert_empty(arena)


def sending_while_the_lock_is_held_by_a_stopped_process():
    """In-band after two seconds, the next ones soon; counted; out of band when it continues."""
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    fcntl.fcntl(write.fileno(), fcntl.F_SETPIPE_SZ, MIB)  # room for a message in-band
    pid = fork(lambda: inside.stop_with_the_lock(arena))
    os.waitpid(pid, os.WUNTRACED)
    waited_s = []
    for seed in range(5):
        started = time.monotonic()
        write.send(message(seed, 100_000))
        waited_s.append(time.monotonic() - started)
        verify(read.recv(), seed)
    assert 1.5 < waited_s[0] < 4, waited_s
    assert max(waited_s[1:]) < 0.5, waited_s
    statistics = arena.statistics()
    assert {"busy": 5} == {k: f.n_messages for k, f in statistics.fallbacks.items()}, statistics
    os.kill(pid, signal.SIGCONT)
    reap(pid)
    write.send(message(9))
    assert is_in_arena(arena, verify(read.recv(), 9)[1])
    assert arena.statistics().n_fallbacks == 5
    inside.assert_empty(arena)


def a_fork_while_the_lock_is_held_by_a_stopped_process():
    _wait_less()
    arena = oobpickle.install(capacity=64 * MIB)
    read, write = _pipe()
    received = Token()

    def stop_inside_a_step():
        received.take()
        inside.stop_with_the_lock(arena)

    pid = fork(stop_inside_a_step)
    write.send(message(1))
    held = verify(read.recv(), 1)
    received.give()
    os.waitpid(pid, os.WUNTRACED)

    def child():
        verify(held)
        held[1][:] = 1

    reap(fork(child))
    verify(held)
    os.kill(pid, signal.SIGCONT)
    reap(pid)
    held = None
    inside.assert_empty(arena)
    write.send(message(2))
    verify(read.recv(), 2)


def leaving_the_block_while_the_lock_is_held_by_a_stopped_process():
    _wait_less()
    started = time.monotonic()
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        read, write = _pipe()
        write.send(message(1))
        held = verify(read.recv(), 1)

        def stop_inside_a_step():
            inside.stop_with_the_lock(arena)

        pid = fork(stop_inside_a_step)
        os.waitpid(pid, os.WUNTRACED)
    assert time.monotonic() - started < 20
    verify(held)
    os.kill(pid, signal.SIGCONT)
    reap(pid)
    del held
    gc.collect()
    assert arena.statistics().nbytes_resident == 0, arena.statistics()
    oobpickle.install()
    oobpickle.uninstall()
    assert inside.our_descriptors() == []


def more_dead_than_slots_are_recovered_by_newcomers():
    arena = oobpickle.install(capacity=64 * MIB)

    def victim():
        inner(arena).acquire([1_000_000])
        _kill_self()

    for _ in range(100):
        reap(fork(victim), inside.KILLED)
    assert Table.of(arena)["n_slots"] <= 64
    assert arena.statistics().n_participants <= 64
    assert len(_fill(arena)) == 64
    inside.assert_empty(arena)


if __name__ == "__main__":
    inside.main()
