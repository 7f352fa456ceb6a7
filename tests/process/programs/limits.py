"""Limits of the system: with less room than wished for everything still arrives."""

import contextlib
import errno
import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings

import inside
import numpy as np
from inside import Token, eventually, fork, is_in_arena, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._arena import AbsentArena
from oobpickle._memory import headroom, huge_pages
from oobpickle._native import core

MIB = 1 << 20
GIB = 1 << 30


def _pipe():
    return multiprocessing.Pipe(duplex=False)


def _echo(received):
    return verify(received)[0], received[1]


@contextlib.contextmanager
def _enabled_with_warnings(**options):
    """Yield the arena and the list of FallbackWarnings."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with oobpickle.enabled(**options) as arena:
            yield arena, found
    found.extend(w for w in caught if w.category is oobpickle.FallbackWarning)


def _round_trips(n=4, nbytes=2_000_000, method="fork"):
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        for seed, one in enumerate(pool.imap(_echo, [message(n, nbytes) for n in range(n)])):
            verify(one, seed)
            one[1][:] = 0
        pool.close()
        pool.join()


def _limit(which, value):
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def _address_space_nbytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


# --- address space and file size


def _is_absent(arena):
    return isinstance(arena, AbsentArena)


def address_space():
    """From plenty to nearly nothing: in use or not, one warning at most, and the data arrives."""
    outcomes = set()
    for nbytes in (200 * GIB, 8 * GIB, GIB, 200 * MIB, 60 * MIB):

        def child(nbytes=nbytes):
            _limit(resource.RLIMIT_AS, _address_space_nbytes() + nbytes)
            with _enabled_with_warnings() as (arena, caught):
                _answers()  # not a Pool: its threads need more than the smallest of these limits
                if not _is_absent(arena):
                    statistics = arena.statistics()
                    assert statistics.n_messages_out_of_band > 0, statistics
            assert len(caught) == _is_absent(arena), [str(w.message) for w in caught]
            os._exit(10 + _is_absent(arena))

        pid = fork(child)
        outcomes.add(eventually(lambda pid=pid: inside.exit_of(pid), within_s=30)[0])
    assert outcomes <= {10, 11}, outcomes
    assert 10 in outcomes


def address_space_of_a_worker(method):
    """A worker that cannot map the arena receives all the same, and answers."""
    with _enabled_with_warnings() as (arena, _):
        read, write = _pipe()
        there, back = _pipe()
        process = multiprocessing.get_context(method).Process(
            target=_work_in_little_space, args=(read, back)
        )
        if method == "spawn":
            # The new interpreter has the limit before it attaches.
            limit = resource.getrlimit(resource.RLIMIT_AS)
            _limit(resource.RLIMIT_AS, 40 * GIB)
            os.environ["LITTLE_SPACE"] = "1"
        process.start()
        if method == "spawn":
            resource.setrlimit(resource.RLIMIT_AS, limit)
            del os.environ["LITTLE_SPACE"]
        for seed in range(4):
            write.send(message(seed))
            verify(there.recv(), seed)
        process.join()
        assert process.exitcode == 0
        assert arena.statistics().n_messages_out_of_band >= 4


def _work_in_little_space(read, back):
    if "LITTLE_SPACE" not in os.environ:
        _limit(resource.RLIMIT_AS, _address_space_nbytes() + 100 * MIB)
    for seed in range(4):
        back.send(verify(read.recv(), seed))


def file_size():
    outcomes = set()
    for nbytes in (0, MIB, 100 * MIB, 4 * GIB):

        def child(nbytes=nbytes):
            _limit(resource.RLIMIT_FSIZE, nbytes)  # with 0 a Pool finds no semaphore anyway
            with _enabled_with_warnings() as (arena, caught):
                _answers()
            assert len(caught) == _is_absent(arena), [str(w.message) for w in caught]
            os._exit(10 + _is_absent(arena))

        pid = fork(child)
        outcomes.add(eventually(lambda pid=pid: inside.exit_of(pid), within_s=30)[0])
    assert outcomes == {10, 11}, outcomes


def _answers():
    read, write = _pipe()
    there, back = _pipe()
    pid = fork(_answer, read, back)
    for seed in range(4):
        write.send(message(seed))
        verify(there.recv(), seed)[1][:] = 0
    reap(pid)


def _answer(read, back):
    for seed in range(4):
        back.send(verify(read.recv(), seed))


def file_size_of_a_worker():
    """EFBIG where a worker would reserve pages: it answers in-band."""
    with _enabled_with_warnings() as (arena, caught):
        read, write = _pipe()
        there, back = _pipe()

        def worker():
            _limit(resource.RLIMIT_FSIZE, 0)
            for seed in range(4):
                one = verify(read.recv(), seed)
                back.send(message(seed, 3_000_000))
                verify(one, seed)

        pid = fork(worker)
        for seed in range(4):
            write.send(message(seed))
            verify(there.recv(), seed)
        reap(pid)
        statistics = arena.statistics()
        assert set(statistics.fallbacks) <= {"space"}, statistics
        assert statistics.n_blocks["leased"] == 0, statistics
        inside.assert_table_in_order(arena)
    assert len(caught) == bool(statistics.fallbacks)


# --- descriptors


def descriptors_of_the_owner():
    """With 0 to 6 descriptors left, enabled() works or says that it does not."""
    outcomes = []
    for n_left in range(7):

        def child(n_left=n_left):
            read, write = _pipe()
            highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
            _limit(resource.RLIMIT_NOFILE, highest + n_left)
            with _enabled_with_warnings() as (arena, caught):
                small = message(1, 50_000)
                write.send(small)
                verify(read.recv(), 1)
            assert len(caught) == _is_absent(arena), [str(w.message) for w in caught]
            _limit(resource.RLIMIT_NOFILE, 256)
            assert inside.our_descriptors() == []
            os._exit(10 + _is_absent(arena))

        pid = fork(child)
        outcomes.append(eventually(lambda pid=pid: inside.exit_of(pid), within_s=30)[0])
    assert set(outcomes) == {10, 11}, outcomes
    assert outcomes == sorted(outcomes, reverse=True), outcomes


def descriptors_of_a_worker():
    """A child that has no descriptor left cannot join: it receives and sends all the same."""
    with _enabled_with_warnings() as (arena, caught):
        read, write = _pipe()
        there, back = _pipe()
        held = message(9)
        write.send(held)
        held = verify(read.recv(), 9)

        def worker():
            for seed in range(4):
                received = verify(read.recv(), seed)
                back.send(message(seed + 10))
                verify(received, seed)
                verify(held, 9)
            os._exit(0)

        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = [os.dup(0) for _ in range(5)]
        _limit(resource.RLIMIT_NOFILE, max(highest, *used) + 1)
        pid = fork(worker)
        for seed in range(4):
            write.send(message(seed))
            verify(there.recv(), seed + 10)
        reap(pid)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for fd in used:
            os.close(fd)
        verify(held, 9)
        statistics = arena.statistics()
        assert set(statistics.fallbacks) <= {"detached"}, statistics
        held = None
        gc.collect()
        arena.trim()
        assert arena.statistics().n_blocks["in_flight"] == 0, arena.statistics()
        inside.assert_table_in_order(arena)
    assert len(caught) == bool(statistics.fallbacks)


def descriptors_closed_by_the_user(which):
    """A worker closes what it did not open, as daemons do, and opens files of its own there."""
    with _enabled_with_warnings(capacity=64 * MIB) as (arena, caught):
        read, write = _pipe()
        there, back = _pipe()
        closed, seen = Token(), Token()

        def worker(folder):
            held = verify(read.recv(), 0)
            mine = {0, 1, 2, read.fileno(), back.fileno(), *seen.descriptors, *closed.descriptors}
            opened = []
            for fd in range(3, 64) if which == "all" else [inner(arena).descriptors[0]]:
                if fd not in mine:
                    with contextlib.suppress(OSError):
                        os.close(fd)
            while len(opened) < 20:
                path = os.path.join(folder, str(len(opened)))
                opened.append(os.open(path, os.O_RDWR | os.O_CREAT))
            closed.give()
            for seed in range(1, 4):
                received = verify(read.recv(), seed)
                back.send(message(seed + 10))
                verify(received, seed)
            seen.take()
            verify(held, 0)
            for fd in opened:
                status = os.fstat(fd)
                assert (status.st_size, status.st_blocks) == (0, 0), "a stranger's file was written"

        with tempfile.TemporaryDirectory() as folder:
            pid = fork(worker, folder)
            write.send(message(0))
            closed.take()
            for seed in range(1, 4):
                write.send(message(seed))
                verify(there.recv(), seed + 10)
            # It lives: what it holds is not taken from it.
            inner(arena).reclaim.reap()
            leases = _fill(arena)
            for destination in [lease.destinations[0] for lease in leases]:
                destination[:] = bytes(MIB)
            del leases, destination
            seen.give()
            reap(pid)
        statistics = arena.statistics()
        assert set(statistics.fallbacks) == {"detached"}, statistics
        arena.trim()
        statistics = arena.statistics()
        assert statistics.nbytes == dict.fromkeys(statistics.nbytes, 0), statistics
        inside.assert_table_in_order(arena)
    assert len(caught) == bool(statistics.fallbacks)


def _fill(arena):
    leases = []
    with contextlib.suppress(oobpickle.ArenaFullError):
        while True:
            leases.append(inner(arena).acquire([MIB], wait_timeout=0))
    return leases


def another_user():
    """A worker that drops its privileges cannot open anything again: messages go on."""
    with _enabled_with_warnings(capacity=64 * MIB) as (arena, caught):
        read, write = _pipe()
        there, back = _pipe()

        def worker():
            os.setgid(65534)
            os.setuid(65534)
            held = verify(read.recv(), 0)
            back.send(message(10))

            def grandchild():
                received = verify(read.recv(), 1)
                verify(held, 0)
                back.send(message(11))
                verify(received, 1)

            reap(fork(grandchild))
            held[1][:] = 1
            arena.trim()
            verify(read.recv(), 2)
            back.send(message(12))

        pid = fork(worker)
        for seed in range(3):
            write.send(message(seed))
            arena.trim()
            verify(there.recv(), seed + 10)
        reap(pid)
        statistics = arena.statistics()
        assert set(statistics.fallbacks) == {"detached"}, statistics
        assert statistics.n_messages_out_of_band + statistics.n_fallbacks == 6, statistics
        arena.trim()
        inside.assert_table_in_order(arena)
    assert len(caught) == bool(statistics.fallbacks)


# --- room


def full_of_held_results():
    with _enabled_with_warnings(capacity=16 * MIB, wait_timeout=0, copy_on_receive=False) as (
        arena,
        caught,
    ):
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            results = [pool.apply(_make, (seed, 3_000_000)) for seed in range(10)]
            for seed, one in enumerate(results):
                verify(one, seed)
            n_inside = sum(is_in_arena(arena, one[1]) for one in results)
            # Where huge pages are asked for, a block takes whole ones.
            n_expected = 16 * MIB // (4 * MIB if huge_pages.policy() else 3_002_368)
            assert n_inside == n_expected, n_inside
            assert arena.statistics().fallbacks["full"].n_messages == 10 - n_expected
            del results, one
            for seed in range(4):
                assert is_in_arena(arena, pool.apply(_make, (seed, 3_000_000))[1])
            assert arena.statistics().n_fallbacks == 10 - n_expected
            pool.close()
            pool.join()
    assert len(caught) == 1
    assert "full" in str(caught[0].message)


def _make(seed, nbytes):
    return message(seed, nbytes)


def waiting_for_room():
    """With `wait_timeout` a sender waits for what a receiver is about to drop."""
    with oobpickle.enabled(capacity=8 * MIB, wait_timeout=20) as arena:
        read, write = _pipe()
        filled = Token()

        def receiver():
            held = [verify(read.recv(), seed) for seed in range(2)]
            filled.give()
            eventually(lambda: os.read(go_read, 1))
            del held
            for seed in range(2, 6):
                verify(read.recv(), seed)

        go_read, go = os.pipe()
        pid = fork(receiver)
        for seed in range(2):
            write.send(message(seed, 3_900_000))
        filled.take()
        os.write(go, b"x")
        for seed in range(2, 6):
            write.send(message(seed, 3_900_000))
        reap(pid)
        assert arena.statistics().n_fallbacks == 0, arena.statistics()


# --- backings


def backing(kind):
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        name = os.readlink(f"/proc/self/fd/{inner(arena).descriptors[0]}")
        directory = {"shm": "/dev/shm", "tmp": tempfile.gettempdir()}.get(kind, "/memfd:")
        assert name.startswith(directory), name
        assert name.endswith("(deleted)"), name
        held = []
        for method in ("fork", "spawn"):
            _round_trips(method=method)
        read, write = _pipe()
        write.send(message(1))
        held = verify(read.recv(), 1)

        def child():
            verify(held, 1)
            held[1][:] = 3
            write.send(message(2))

        pid = fork(child)
        verify(read.recv(), 2)
        reap(pid)
        verify(held, 1)
        statistics = arena.statistics()
        assert statistics.n_fallbacks == 0, statistics
        inside.assert_table_in_order(arena)


def backing_none():
    with _enabled_with_warnings() as (arena, caught):
        assert _is_absent(arena)
        _round_trips()
        assert arena.statistics() == oobpickle.statistics()
    assert len(caught) == 1
    assert "not in use" in str(caught[0].message)
    with contextlib.suppress(oobpickle.ArenaError):
        oobpickle.install()
        raise AssertionError("installed")


# --- in the middle of a message with many buffers


def in_the_middle(what):
    """Some buffers have their blocks when the next is refused: all goes in-band, nothing stays."""
    capacity = 24 * MIB if what == "full" else 256 * MIB
    with _enabled_with_warnings(capacity=capacity, wait_timeout=0) as (arena, caught):
        read, write = _pipe()
        sender = threading.Thread(target=write.send, args=(_many(1),))
        with _refusing(what, arena) as refused:
            sender.start()
            _verify_many(read.recv(), 1)
            sender.join()
        assert refused or what in ("full", "shm"), "nothing was refused"
        statistics = arena.statistics()
        reason = _REASONS.get(what, what)
        assert set(statistics.fallbacks) == {reason}, statistics
        assert statistics.fallbacks[reason].n_messages == 1
        assert statistics.fallbacks[reason].nbytes > N_MANY * MIB
        assert statistics.n_messages_out_of_band == 0
        assert {**statistics.n_blocks, "free": 0} == dict.fromkeys(statistics.n_blocks, 0)
        inside.assert_table_in_order(arena)
        # What is small enough finds room; and so does the same message, once it is permitted.
        one, check = (_many(2), _verify_many) if refused else (message(2), verify)
        sender = threading.Thread(target=write.send, args=(one,))
        sender.start()
        check(read.recv(), 2)
        sender.join()
        assert arena.statistics().n_messages_out_of_band == 1, arena.statistics()
    assert len(caught) == 1, [str(w.message) for w in caught]


N_MANY = 70
_REASONS = {"shm": "space", "allocate": "space", "unsupported": "space"}


def _many(seed):
    return [inside.content(100 * seed + n, MIB) for n in range(N_MANY)]


def _verify_many(received, seed):
    assert len(received) == N_MANY
    for n, array in enumerate(received):
        assert np.array_equal(array, inside.content(100 * seed + n, MIB)), n
        array[:] = 0


@contextlib.contextmanager
def _refusing(what, arena):
    """Refuse it from the tenth block on; yield a list of what was refused."""
    refused, undos = [], []

    def patched(module, name, refusal):
        original = getattr(module, name)

        def call(*args):
            refused.append(args)
            return refusal(*args)

        setattr(module, name, call)
        undos.append(lambda: setattr(module, name, original))

    def failing(point, number):
        core.arm(point, 11, -number)
        refused.append(point)
        undos.append(lambda: core.arm(None, 0, 0))

    {
        "allocate": lambda: failing("mapping.reserve", errno.ENOSPC),
        "unsupported": lambda: failing("mapping.reserve", errno.EOPNOTSUPP),
        "memory": lambda: (
            failing("headroom.look", errno.ENOMEM),
            patched(headroom, "available_nbytes", lambda: 0),
        ),
        "table": lambda: failing("row.make", errno.ENOSPC),
        "damaged": lambda: failing("row.make", errno.EIO),
    }.get(what, lambda: None)()
    try:
        yield refused
    finally:
        for undo in undos:
            undo()


def limits_between_messages():
    """None of these stands in the way of a process that has joined already."""
    for which, value in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, None),  # little more than it has by then
    ):
        reap(fork(_go_on_under, which, value))


def _go_on_under(which, value):
    before = resource.getrlimit(which)
    with _enabled_with_warnings(capacity=256 * MIB) as (arena, caught):
        read, write = _pipe()
        if which == resource.RLIMIT_AS:
            value = _address_space_nbytes() + 400 * MIB
        for seed in range(3):
            sender = threading.Thread(target=write.send, args=(_many(seed),))
            sender.start()
            _verify_many(read.recv(), seed)
            sender.join()
            _limit(which, value)
        resource.setrlimit(which, before)
        statistics = arena.statistics()
        assert statistics.n_messages_out_of_band + statistics.n_fallbacks == 3, statistics
        assert statistics.n_blocks["leased"] == 0, statistics
        inside.assert_table_in_order(arena)
    assert len(caught) == bool(statistics.fallbacks)


# --- a fast producer and a slow consumer


def slow_consumer():
    """`Pool.imap` runs ahead of slow workers by an eighth of the capacity: here two messages."""
    nbytes, n_tasks = 4_000_000, 40
    with oobpickle.enabled(capacity=64 * MIB) as arena:
        context = multiprocessing.get_context("fork")
        gate, go = os.pipe()
        with context.Pool(2) as pool:
            made = []

            def tasks():
                for seed in range(n_tasks):
                    made.append(seed)
                    yield gate, message(seed, nbytes)

            results = pool.imap_unordered(_once_let, tasks())  # either may take what lets it go
            seen = set()
            ahead = most = 0
            for n in range(n_tasks):
                if n < 3:
                    _wait_until_nothing_is_made(made)
                    ahead = max(ahead, len(made) - n)
                    sizes = arena.statistics().nbytes
                    most = max(most, sizes["in_flight"] + sizes["held"] + sizes["leased"])
                os.write(go, b"x")
                seen.add(results.next(30))
            assert seen == set(range(n_tasks))
            pool.close()
            pool.join()
        statistics = arena.statistics()
        assert statistics.n_fallbacks == 0, statistics
        assert 2 <= ahead <= 8, ahead
        assert 2 * nbytes <= most <= 8 * nbytes, most
        os.close(gate)
        os.close(go)


def _wait_until_nothing_is_made(made, for_s=0.2):
    n_made, since = -1, 0.0

    def rests():
        nonlocal n_made, since
        if len(made) != n_made:
            n_made, since = len(made), time.monotonic()
        return time.monotonic() - since > for_s

    eventually(rests)


def _once_let(task):
    gate, received = task
    os.read(gate, 1)
    return verify(received)[0]


# --- core dumps


def core_dump(folder):
    """Every mapping of ours is left out of it, in parent and child, also what a fork made private.

    The last word has the kernel: it dumps this very process, by SIGABRT.
    """
    os.chdir(folder)
    with oobpickle.enabled(capacity=GIB):
        read, write = _pipe()
        sender = threading.Thread(target=write.send, args=(message(1, 300_000_000),))
        sender.start()
        held = verify(read.recv(), 1)
        sender.join()
        _assert_not_dumped(3)
        reap(fork(_assert_not_dumped, 3))
        _assert_not_dumped(3)
        write.send(message(2))
        later = verify(read.recv(), 2)
        _assert_not_dumped(3)
        print("ready", flush=True)
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        faulthandler.disable()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.abort()
        del held, later


def _assert_not_dumped(at_least):
    found, name = {}, ""
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split(" ", 1)[0]:
                name = line
            elif line.startswith("VmFlags:") and "oobpickle-" in name:
                found[name] = "dd" in line.split()
    kinds = {name.split("oobpickle-")[1].split()[0] for name in found}
    assert len(kinds) >= at_least, found
    assert all(found.values()), found


# --- the memory cgroup


def memory_cgroup(tasks_file, nbytes):
    """400 MB are wanted where 200 MB are allowed: nobody is killed, everything arrives."""
    nbytes = int(nbytes)
    with open(tasks_file, "w") as file:
        file.write(str(os.getpid()))
    with _enabled_with_warnings(capacity=GIB, wait_timeout=0) as (arena, caught):
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            held, n_checked = [], 0
            for seed in range(400_000_000 // nbytes):
                one = verify(pool.apply(_make, (seed, nbytes)), seed)
                n_checked += 1
                if is_in_arena(arena, one[1]):
                    held.append(one)  # what travelled in-band is not kept: that would be 400 MB
            assert n_checked * nbytes == 400_000_000
            for one in held:
                verify(one)
            statistics = arena.statistics()
            assert set(statistics.fallbacks) == {"memory"}, statistics
            assert statistics.nbytes_resident < 200 * 10**6
            pool.close()
            pool.join()
        del held, one
    assert len(caught) == 1
    assert "memory" in str(caught[0].message)
    sys.stdout.write("done")


if __name__ == "__main__":
    inside.main()
