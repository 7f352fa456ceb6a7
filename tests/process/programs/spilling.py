"""Messages for which memory has no room go to a file on disk, and its room comes back."""

import contextlib
import errno
import functools
import gc
import multiprocessing
import os
import signal
import threading
import warnings

import inside
import numpy as np
from inside import KILLED, Token, content, eventually, fork, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._native import core
from table import HELD, IN_FLIGHT, LEASED, Table

MIB = 1 << 20
CAPACITY = 8 * MIB
NBYTES = 3_000_000
N = 8


@contextlib.contextmanager
def _enabled(folder, **options):
    """Yield an arena with little memory; when it is left nothing is on disk."""
    with oobpickle.enabled(capacity=CAPACITY, spill_dir=folder, **options) as arena:
        yield arena
        gc.collect()
        _assert_disk_empty(arena)
    assert not os.listdir(folder)


def _on_disk(arena):
    """Bytes of the file on disk."""
    return os.fstat(inner(arena).descriptors[3]).st_blocks * 512


def _assert_disk_empty(arena):
    """Not at once: what the dead had comes back to whoever looks."""

    def is_empty():
        arena.trim()
        return _on_disk(arena) == arena.statistics().nbytes_on_disk == 0

    eventually(is_empty)
    inside.assert_table_in_order(arena)


_is_on_disk = functools.partial(inside.is_in_arena, on_disk=True)


def _pipe():
    return multiprocessing.Pipe(duplex=False)


def _make(seed, nbytes=NBYTES):
    return message(seed, nbytes)


def _spilled(arena, n=N, nbytes=NBYTES):
    """Return messages that this process holds: two are in memory, the others on disk."""
    read, write = _pipe()
    held = []
    for seed in range(n):
        write.send(message(seed, nbytes))
        held.append(read.recv())
    assert _is_on_disk(arena, held[-1][1])
    return held


# --- results beyond memory


def results_beyond_memory(folder, method):
    """All are held at once, whole and writable, and the room on disk comes back."""
    with _enabled(folder) as arena:
        with multiprocessing.get_context(method).Pool(2) as pool:
            held = list(pool.imap(_make, range(N)))
            for seed, one in enumerate(held):
                verify(one, seed)
                one[1][:] = seed
            for seed, one in enumerate(held):
                assert (one[1] == seed).all(), seed
            now = arena.statistics()
            assert now.n_messages_out_of_band == N
            assert now.n_fallbacks == now.n_copied_on_receive == 0, now
            n_memory = sum(not _is_on_disk(arena, one[1]) for one in held)
            assert 1 <= n_memory <= CAPACITY // NBYTES
            assert now.n_spilled == N - n_memory
            assert now.nbytes_spilled == now.n_spilled * NBYTES
            assert now.nbytes_on_disk >= now.nbytes_spilled > now.nbytes["held"]
            assert now.nbytes["held"] == n_memory * NBYTES
            assert now.n_blocks["held"] == N
            assert now.seconds_spilling > 0
            assert _on_disk(arena) >= now.nbytes_spilled
            assert "went there, as memory was full" in str(now)
            del held[1:], one
            gc.collect()
            assert arena.statistics().nbytes_on_disk == _on_disk(arena) == 0
            # There is room in memory again, so that is where the next ones go.
            for seed in range(3):
                verify(pool.apply(_make, (seed,)), seed)
            assert arena.statistics().n_spilled == now.n_spilled
            pool.close()
            pool.join()
        del held


def in_a_memory_cgroup(folder, tasks_file):
    """240 MB are held where 200 MB are allowed, by the default capacity, also over a fork."""
    with open(tasks_file, "w") as file:
        file.write(str(os.getpid()))
    nbytes, n = 20_000_000, 12
    with oobpickle.enabled(spill_dir=folder) as arena:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            held = [pool.apply(_make, (seed, nbytes)) for seed in range(n)]
            assert arena.statistics().n_fallbacks == 0
            assert arena.statistics().nbytes_spilled > 80 * 10**6
            pool.close()
            pool.join()
        _verify_all(held)
        held = [one for one in held if _is_on_disk(arena, one[1])]
        reap(fork(lambda: [verify(one) for one in held]))
        del held[:]
        gc.collect()
        _assert_disk_empty(arena)


def arguments_beyond_memory(folder, method):
    """What is sent to a child that is started, and what that sends on."""
    context = multiprocessing.get_context(method)
    with _enabled(folder) as arena:
        held = _spilled(arena, n=3)
        read, write = context.Pipe(duplex=False)
        child = context.Process(target=_send_twice, args=(message(9, 2 * NBYTES), write, folder))
        child.start()
        write.close()
        for _ in range(2):
            verify(read.recv(), 9)
        child.join()
        assert child.exitcode == 0
        for seed, one in enumerate(held):
            verify(one, seed)
        del held, one


def _send_twice(one, write, folder):
    verify(one, 9)
    with oobpickle.enabled(spill_dir=os.path.join(folder, "..", os.path.basename(folder))) as arena:
        assert arena.options.spill_dir == os.path.realpath(folder)
        for _ in range(2):
            write.send(one)
        assert arena.statistics().n_spilled


def _many():
    """Large, small, strided, in Fortran's order, empty, and a stream of its own size."""
    numbers = content(7, 4 * MIB).view(np.uint32)
    square = numbers.reshape(1024, 1024)
    return {
        "whole": numbers,
        "every third": numbers[::3],
        "a column": square[:, 5:900:7],
        "backwards": square[::-2, ::-1],
        "transposed": np.asfortranarray(square[:, :300]),
        "bits of rows": square.reshape(256, 4, 1024)[:, 1:3, 100:],
        "pairs": numbers.view("u2,u2")[::5],
        "small": [numbers[n : n + 2000] for n in range(100)],
        "tiny": [numbers[n : n + 100] for n in range(300)],
        "empty": numbers[:0],
        "bytes": [numbers[n : n + 50_000].tobytes() for n in range(3)],
        "bytearray": bytearray(numbers[:90_000]),
        "stream": [bytes([n % 251]) * 1000 for n in range(900)],
    }


def all_kinds_of_buffers(folder):
    """On disk are the values that plain pickle would have delivered."""
    with _enabled(folder) as arena:
        filler = _spilled(arena, n=4)
        read, write = _pipe()
        sender = threading.Thread(target=write.send, args=(_many(),))
        sender.start()
        found, wanted = read.recv(), _many()
        sender.join()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert _are_equal(found[name], value), name
        now = arena.statistics()
        assert now.n_fallbacks == 0
        assert _is_on_disk(arena, found["whole"])
        assert now.nbytes_spilled > 4 * NBYTES - CAPACITY + 12 * MIB, now
        del filler, found


def _are_equal(one, other):
    if isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
    if type(other) is list and isinstance(other[0], np.ndarray):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return type(one) is type(other) and one == other


def some_buffers_in_memory(folder):
    """A message that finds room for its first buffers only is not moved: the others go to disk.

    Also one that would find room: so not each of many looks for it.
    """
    with _enabled(folder) as arena:
        read, write = _pipe()
        sent = [content(seed, nbytes) for seed, nbytes in enumerate([3 * MIB, 6 * MIB, MIB, MIB])]
        write.send(sent)
        found = read.recv()
        assert all(map(np.array_equal, found, sent))
        assert [_is_on_disk(arena, one) for one in found] == [False, True, True, True]
        assert arena.statistics().nbytes_spilled == 8 * MIB
        write.send(message(1, MIB))
        assert not _is_on_disk(arena, verify(read.recv(), 1)[1])
        del found


def a_wait_comes_first(folder):
    """With `wait_timeout` a sender waits for memory; what finds none in that time goes to disk."""
    with _enabled(folder, wait_timeout=20) as arena:
        read, write = _pipe()
        held = []
        for seed in range(2):
            write.send(message(seed, NBYTES))
            held.append(read.recv())
        sender = threading.Thread(target=write.send, args=(message(2, NBYTES),))
        sender.start()
        eventually(lambda: _is_waiting(sender))
        del held[0]
        verify(read.recv(), 2)
        sender.join()
        assert arena.statistics().n_spilled == 0
    with _enabled(folder, wait_timeout=0.01) as arena:
        for seed, one in enumerate(_spilled(arena)):
            verify(one, seed)
        now = arena.statistics()
        assert now.n_spilled >= N - CAPACITY // NBYTES
        assert now.n_fallbacks == 0
        del one


def _is_waiting(thread):
    import sys

    frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        if frame.f_code.co_name == "_wait_for":
            return True
        frame = frame.f_back
    return False


def free_pages_of_other_sizes(folder):
    """Memory that is kept for messages of other sizes is no reason to go to disk."""
    with _enabled(folder) as arena:
        read, write = _pipe()
        for seed, nbytes in enumerate((100_000, 7_000_000, 3_000_000, 500_000, 5_000_000)):
            write.send(message(seed, nbytes))
            verify(read.recv(), seed)
        now = arena.statistics()
        assert now.n_messages_out_of_band == 5
        assert now.n_spilled == 0, now


def copies_of_receivers(folder):
    """With `copy_on_receive=True` what was on disk is ordinary memory, and the disk free again."""
    with _enabled(folder, copy_on_receive=True) as arena:
        read, write = _pipe()
        threads = [threading.Thread(target=write.send, args=(_make(n),)) for n in range(N)]
        leases = [inner(arena).acquire([NBYTES]) for _ in range(2)]
        for thread in threads:
            thread.start()
        held = [read.recv() for _ in range(N)]
        for thread in threads:
            thread.join()
        assert arena.statistics().n_spilled == N
        assert arena.statistics().n_copied_on_receive == N
        assert _on_disk(arena) == 0
        for one in held:
            verify(one)
        for lease in leases:
            lease.release()


# --- one object for many


def handles_beyond_memory(folder):
    """What `broadcast` and `share` store may lie on disk, and is freed with its last reference."""
    with _enabled(folder) as arena:
        filler = _spilled(arena, n=3)
        read, write = _pipe()
        with oobpickle.broadcast(message(5, 2 * NBYTES), readonly=False) as handle:
            assert arena.statistics().nbytes_on_disk > 2 * NBYTES
            write.send(handle)
            one = verify(read.recv(), 5)
            one[1][:] = 1
            verify(handle.value, 5)
        with oobpickle.share(np.zeros(NBYTES)) as shared:
            assert arena.statistics().nbytes_on_disk > 8 * NBYTES
            write.send(shared)
            arrived = read.recv()
            with arrived.writing() as array:
                array += 1
            with shared.reading() as array:
                assert (array == 1).all()
        assert arena.statistics().n_fallbacks == 0
        del filler, one, array
        arrived.close()


# --- the disk refuses


@contextlib.contextmanager
def _enabled_with_fallbacks(folder, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _enabled(folder, **options) as arena:
            yield arena
    texts = [str(one.message) for one in caught if one.category is oobpickle.FallbackWarning]
    assert len(texts) == 1, texts
    assert "the disk of spill_dir was full too" in texts[0]


def a_full_disk(folder, what):
    """What finds no room on disk either arrives, is counted, and the text says so."""
    point, number = {
        "reserve": ("disk.reserve", errno.ENOSPC),
        "write": ("disk.write", errno.ENOSPC),
        "damaged": ("disk.write", errno.EIO),
    }[what]
    with _enabled_with_fallbacks(folder) as arena:
        held = _spilled(arena, n=4)
        read, write = _pipe()
        for hit in (1, 3):  # the first of five buffers, and the third
            sent = [content(10 * hit + n, NBYTES) for n in range(5)]
            before = arena.statistics()
            core.arm(point, hit, -number)
            sender = threading.Thread(target=write.send, args=(sent,))
            sender.start()
            found = read.recv()
            sender.join()
            core.arm(None, 0, 0)
            assert all(map(np.array_equal, found, sent))
            now = arena.statistics()
            assert set(now.fallbacks) == {"disk"}, now.fallbacks
            assert now.n_fallbacks == before.n_fallbacks + 1
            assert now.nbytes_on_disk == before.nbytes_on_disk, "something stays on disk"
            assert now.n_blocks["leased"] == now.n_blocks["in_flight"] == 0
        # Once there is room, that is where messages go again.
        write.send(message(77, NBYTES))
        one = verify(read.recv(), 77)
        assert _is_on_disk(arena, one[1])
        for seed, it in enumerate(held):
            verify(it, seed)
        del held, one, it


def a_mount_that_is_full(folder):
    """A real one: the folder is a tmpfs of 16 MB, which is memory as well, and said to be."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with oobpickle.enabled(capacity=CAPACITY, spill_dir=folder) as arena:
            with multiprocessing.get_context("fork").Pool(2) as pool:
                held = pool.map(_make, range(12), chunksize=1)
                pool.close()
                pool.join()
            for seed, one in enumerate(held):
                verify(one, seed)
            now = arena.statistics()
            assert now.n_spilled
            assert set(now.fallbacks) == {"disk"}, now.fallbacks
            assert now.n_spilled + now.n_messages_out_of_band + now.n_fallbacks >= 12
            del held, one
            gc.collect()
            assert _on_disk(arena) == 0
    texts = [str(one.message) for one in caught if one.category is oobpickle.FallbackWarning]
    assert ["in memory as well" in text for text in texts] == [True, False], texts
    assert "the disk of spill_dir was full too" in texts[1]


def a_mount_that_is_read_only(folder):
    refused = None
    try:
        oobpickle.install(spill_dir=folder)
    except OSError as error:
        refused = error.errno, error.filename, "not mounted read-only" in str(error)
    assert refused == (errno.EROFS, os.path.realpath(folder), True)
    assert inside.our_descriptors() == []


def a_lost_descriptor(folder):
    """Somebody closes the file on disk: what was received stays, what is sent goes in-band."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with oobpickle.enabled(capacity=CAPACITY, spill_dir=folder) as arena:
            held = _spilled(arena, n=4)
            watcher = os.dup(inner(arena).descriptors[3])
            os.close(inner(arena).descriptors[3])
            read, write = _pipe()
            sender = threading.Thread(target=write.send, args=(message(9, NBYTES),))
            sender.start()
            verify(read.recv(), 9)
            sender.join()
            assert set(arena.statistics().fallbacks) == {"detached"}
            for seed, one in enumerate(held):
                verify(one, seed)
            reap(fork(_verify_all, held))
            for seed, one in enumerate(held):
                verify(one, seed)
            del held, one
            gc.collect()
        assert os.fstat(watcher).st_blocks == 0


# --- deaths


def a_sender_killed(folder, point):
    """Wherever it dies, the room on disk comes back."""
    with _enabled(folder) as arena:
        held = _spilled(arena, n=3)
        before = arena.statistics().nbytes_on_disk
        read, write = _pipe()
        pid = fork(write.send, [content(n, NBYTES) for n in range(5)], fault=point)
        reap(pid, KILLED)
        write.close()

        def is_back():
            inner(arena).reclaim.look()
            return arena.statistics().nbytes_on_disk == before

        if not read.poll():
            eventually(is_back)
        with contextlib.suppress(EOFError):
            for one in [read.recv()]:
                for n, array in enumerate(one):
                    assert np.array_equal(array, content(n, NBYTES))
                del one, array
        gc.collect()
        eventually(is_back)
        for seed, one in enumerate(held):
            verify(one, seed)
        del held, one


def a_receiver_killed(folder, method):
    """What it held, and what it had not read, comes back; the others go on."""
    context = multiprocessing.get_context(method)
    with _enabled(folder) as arena:
        held = _spilled(arena, n=3)
        before = arena.statistics().nbytes_on_disk
        (read, write), (ready, tell) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        child = context.Process(target=_receive_and_die, args=(read, tell))
        child.start()
        for seed in range(6):
            write.send(message(seed, NBYTES))
        assert ready.recv() == "held"
        table = Table.of(arena)
        states = [state for i, state, _ in table.owned() if table.is_on_disk(i)]
        assert {HELD, IN_FLIGHT} <= set(states)
        assert LEASED not in states
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        read.close()

        def is_back():
            inner(arena).reclaim.look()
            return arena.statistics().nbytes_on_disk == before

        eventually(is_back)
        for seed, one in enumerate(held):
            verify(one, seed)
        del held, one


def _receive_and_die(read, tell):
    held = [verify(read.recv()) for _ in range(4)]
    tell.send("held")
    signal.pause()
    del held


# --- forks


def a_fork_copies_nothing(folder):
    """Parent and child have what was held, apart from each other, and it stays on disk."""
    with _enabled(folder) as arena:
        held = _spilled(arena)
        before, on_disk = arena.statistics(), _on_disk(arena)
        written, checked, dropped = Token(), Token(), Token()

        def child():
            for seed, one in enumerate(held):
                verify(one, seed)
                one[1][::4096] = 255 - seed  # a byte of each page
            written.give()
            checked.take()
            for seed, one in enumerate(held):
                assert (one[1][::4096] == 255 - seed).all()
                one[1][::4096] = content(seed, NBYTES)[::4096]
            dropped.take()
            for seed, one in enumerate(held):
                verify(one, seed)

        pid = fork(child)
        written.take()
        for seed, one in enumerate(held):
            verify(one, seed)
            one[1][1::4096] = seed
        checked.give()
        now = arena.statistics()
        assert now.n_copied_at_fork - before.n_copied_at_fork == CAPACITY // NBYTES
        assert now.n_shared_after_fork == 0
        assert _on_disk(arena) == on_disk, "what was held has left the disk"
        reap(fork(_verify_some, held))  # once more, from what is a view already
        for seed, one in enumerate(held):
            assert (one[1][1::4096] == seed).all()
        places = [inside.address(one[1]) for one in held]
        assert all(map(inside.is_private, places))
        del held[:], one
        gc.collect()
        assert not any(map(inside.is_private, places)), "what was written is still there"
        assert _on_disk(arena) >= on_disk - MIB, "the child has it"
        # The room of what the parent has dropped is not given to others.
        filler = _spilled(arena, n=4)
        dropped.give()
        reap(pid)
        for seed, one in enumerate(filler):
            verify(one, seed)
        del filler, one


def _verify_all(held):
    for seed, one in enumerate(held):
        verify(one, seed)


def _verify_some(held):
    for seed, one in enumerate(held):
        assert (one[1][1::4096] == seed).all()
        assert np.array_equal(one[1][2::4096], content(seed, NBYTES)[2::4096])


def a_fork_that_has_to_copy(folder, what):
    """Where nothing can be published, what is held becomes ordinary memory."""
    with _enabled(folder) as arena:
        go = Token()
        holder = fork(_stop_with_the_lock, arena, go) if what == "lock" else None
        held = _spilled(arena)
        if holder:
            go.give()
            os.waitpid(holder, os.WUNTRACED)
        else:
            core.arm("fork.view", 1, -errno.ENOMEM)
        pid = fork(_verify_and_write, held)
        core.arm(None, 0, 0)
        if holder:
            os.kill(holder, signal.SIGCONT)
            reap(holder)
        for seed, one in enumerate(held):
            verify(one, seed)
        reap(pid)
        for seed, one in enumerate(held):
            verify(one, seed)
        now = arena.statistics()
        assert now.n_copied_at_fork == N, now
        assert now.n_shared_after_fork == 0
        assert _on_disk(arena) == 0
        del held, one


def _stop_with_the_lock(arena, go):
    go.take()
    inside.stop_with_the_lock(arena)


def _verify_and_write(held):
    for seed, one in enumerate(held):
        verify(one, seed)
        one[1][:] = 0


def a_parent_killed_after_a_fork(folder):
    """The child keeps what it has inherited; with it the room comes back."""
    with _enabled(folder) as arena:
        ready, go, done = Token(), Token(), Token()

        def middle():
            held = _spilled(arena)
            pid = fork(child, held)
            if pid:
                signal.pause()

        def child(held):
            ready.give()
            go.take()
            filler = _spilled(arena, n=3)
            for seed, one in enumerate(held):
                verify(one, seed)
                one[1][:] = 0
            _verify_all(filler)
            done.give()

        pid = fork(middle)
        ready.take()
        os.kill(pid, signal.SIGKILL)
        reap(pid, KILLED)
        inner(arena).reclaim.look()
        go.give()
        done.take()
        eventually(lambda: arena.trim() or len(inner(arena).blocks.participants()) == 1)


def arrays_after_the_block(folder):
    """They stay valid on disk, also in a child that is forked then; with them the file is gone."""
    with oobpickle.enabled(capacity=CAPACITY, spill_dir=folder) as arena:
        held = _spilled(arena)
        watcher = os.dup(inner(arena).descriptors[3])
    for seed, one in enumerate(held):
        verify(one, seed)
    reap(fork(_verify_and_write, held))
    for seed, one in enumerate(held):
        verify(one, seed)
    del held, one
    gc.collect()
    assert os.fstat(watcher).st_blocks == 0
    os.close(watcher)


# --- older processes


def an_older_pool(folder):
    """It is invited to join, and has the file on disk, too."""
    with multiprocessing.get_context("fork").Pool(1) as pool, warnings.catch_warnings():
        pool.apply(os.getpid)
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with _enabled(folder) as arena:
            held = []
            for seed in range(N):
                held.append(verify(pool.apply(_make, (seed,)), seed))
                verify(pool.apply(_same, (held[-1],)), seed)
            eventually(lambda: verify(pool.apply(_make, (1,))) and arena.statistics().n_spilled > 2)
            assert "space" not in arena.statistics().fallbacks
            del held
        pool.close()
        pool.join()


def _same(one):
    return verify(one)


if __name__ == "__main__":
    inside.main()
