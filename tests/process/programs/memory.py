"""What memory is given back, and when: by arrays that die, by workers, under ``mlockall``."""

import ctypes
import functools
import gc
import multiprocessing
import os
import resource
import warnings

import inside
import numpy as np
from inside import content, eventually, fork, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._memory import receiving
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options

MIB = 1 << 20
LIMIT = 4 * MIB
NBYTES = 3_000_000  # a block of its own units of 2 MiB
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4


def _limit():
    """Let free blocks keep 4 MiB, as far as this process sees to it."""
    receiving._LEAST_KEPT_NBYTES = LIMIT
    receiving._KEPT_OF_AVAILABLE = 1 << 40


def _make(seed, nbytes=NBYTES):
    return message(seed, nbytes)


# --- what survives of a message


def small_survivors():
    """One of the arrays of each message is kept: what it keeps is at most sixteen times itself."""
    for n_items, n_arrays, most in ((64, 1600, 0), (1000, 400, 16 * 8000)):
        arena = oobpickle.install(capacity=64 * MIB)
        read, write = multiprocessing.Pipe(duplex=False)

        def produce(n_items=n_items, n_arrays=n_arrays, write=write):
            for i in range(100):
                write.send([np.full(n_items, float(i)) for _ in range(n_arrays)])

        pid = fork(produce)
        write.close()
        kept = [read.recv()[-1] for _ in range(100)]
        reap(pid)
        held = arena.statistics().nbytes["held"]
        assert held <= 100 * most, held
        for i, array in enumerate(kept):
            assert (array == i).all()
        del kept
        oobpickle.uninstall()


def in_band_of_many_arrays():
    """The copy that is written grows without being copied itself."""
    arrays = [np.ones(5 * MIB, np.uint8) for _ in range(60)]
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)

        def receive():
            write.close()
            for array in read.recv():
                assert (array == 1).all()

        pid = fork(receive)
        read.close()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write.send(arrays)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        reap(pid)
    assert grown < 1.2 * 300 * MIB, grown


# --- address space


def _address_space_nbytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096


def address_space_of_blocks():
    """A process maps what it uses, and ended arenas let go of it."""
    before = _address_space_nbytes()
    arenas = [SharedArena.create(Options(capacity=64 * MIB)) for _ in range(10)]
    for arena in arenas:
        arena.acquire([MIB]).release()
    assert _address_space_nbytes() - before < 10 * (64 + 72 + 8) * MIB
    for arena in arenas:
        arena.close()
        assert arena.try_destroy()
    assert _address_space_nbytes() - before < 20 * MIB


def address_space_and_trim():
    """Windows that nobody uses go with `trim`."""
    arena = SharedArena.create(Options(capacity=64 * MIB))
    before = _address_space_nbytes()
    arena.acquire([60 * MIB]).release()
    assert _address_space_nbytes() - before > 50 * MIB
    arena.trim()
    assert _address_space_nbytes() - before < 10 * MIB
    arena.close()
    assert arena.try_destroy()


def blocks_one_after_the_other():
    """Something is kept of each: descriptors and address space do not grow, but by the arrays."""
    n_items, kept, seen = 100_000, [], []
    for i in range(40):
        with oobpickle.enabled(capacity=64 * MIB):
            read, write = multiprocessing.Pipe(duplex=False)
            write.send(np.full(n_items, float(i)))
            kept.append(read.recv())
        read.close()
        write.close()
        if i in (19, 39):
            seen.append((len(os.listdir("/proc/self/fd")), _address_space_nbytes()))
    (n_first, first_nbytes), (n_last, last_nbytes) = seen
    assert n_first == n_last, (n_first, n_last)
    assert last_nbytes - first_nbytes < 20 * (8 * n_items + 2 * MIB), last_nbytes - first_nbytes
    reap(fork(_are_right, kept))
    for array in kept:
        array += 1
    _are_right([array - 1 for array in kept])


def _are_right(kept):
    for i, array in enumerate(kept):
        assert (array == i).all()
        array[:] = -1


# --- without another call


def comes_back(method):
    """Dropped by whatever drops it, here and in a worker: no call of ours is needed.

    At last there are arrays whose pages are to go, alive when the interpreters end: silently.
    """
    _limit()
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(capacity=256 * MIB) as arena, context.Pool(1, _limit) as pool:
        for drop in (list.clear, _drop_but_one, _drop_in_a_cycle):
            received = pool.map(_make, range(9), chunksize=1)
            for seed, one in enumerate(received):
                verify(one, seed)
            assert arena.statistics().nbytes_resident > 8 * NBYTES
            one = kept = drop(received)
            assert arena.statistics().nbytes_resident <= LIMIT + (NBYTES if kept is not None else 0)
            if kept is not None:
                assert (kept == content(3, NBYTES)[:1000]).all()
        del one, kept
        gc.collect()
        pool.map(_keep, [message(seed, NBYTES) for seed in range(9)], chunksize=1)
        assert arena.statistics().nbytes_resident > 8 * NBYTES
        pool.map(_drop, [0])
        assert arena.statistics().nbytes_resident <= LIMIT
        inside.assert_table_in_order(arena)
        _kept.extend(pool.map(_make, range(9), chunksize=1))
        pool.map(_keep, [message(seed, NBYTES) for seed in range(9)], chunksize=1)
        pool.close()
        pool.join()


def _drop_but_one(received):
    kept = received[3][1][:1000]
    received.clear()
    return kept


def _drop_in_a_cycle(received):
    received.append(received)
    while len(received) > 1:  # the one that is left is the list itself
        received.pop(0)
    received.clear()


_kept = []


def _keep(one):
    _kept.append(verify(one))
    return os.getpid()


def _drop(_):
    _kept.clear()


def forks_meanwhile():
    """Children have copies of what is to go, and drop them; the parent's stay what they are."""
    _limit()
    with oobpickle.enabled(capacity=256 * MIB) as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        held = []
        for seed in range(9):
            write.send(message(seed))
            held.append(verify(read.recv(), seed))
        reap(fork(_drop_and_receive, held))
        for seed, one in enumerate(held):
            verify(one, seed)
            one[1][:] = 0
        del held, one
        inside.assert_empty(arena)


def _drop_and_receive(held):
    for seed, one in enumerate(held):
        verify(one, seed)
    held.clear()
    del one
    read, write = multiprocessing.Pipe(duplex=False)
    for seed in range(20):
        write.send(message(seed))
        verify(read.recv(), seed)


def in_a_small_cgroup(tasks_file):
    """What was received and dropped makes room for the program's own memory."""
    with open(tasks_file, "w") as file:
        file.write(str(os.getpid()))
    with (
        oobpickle.enabled(capacity=256 * MIB) as arena,
        multiprocessing.get_context("fork").Pool(1) as pool,
    ):
        received = [verify(pool.apply(_make, (seed, 20_000_000)), seed) for seed in range(9)]
        assert arena.statistics().n_fallbacks == 0
        del received
        own = np.ones(230_000_000, np.uint8)
        assert own[-1] == 1
        pool.close()
        pool.join()


# --- the resident size


def _resident_nbytes(_=None):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def _little():
    inner(oobpickle.install()).blocks.entered_limit = 8 * MIB


def resident_size(method):
    """A worker does not grow by what others have of it, nor by what it has had."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(capacity=256 * MIB) as arena, context.Pool(1, _little) as pool:
        verify(pool.apply(_make, (0,)), 0)
        before = pool.apply(_resident_nbytes, (0,))
        kept = []
        for seed in range(12):
            kept.append(verify(pool.apply(_make, (seed,)), seed))
            pool.map(_keep, [message(seed, NBYTES)])
        grown = pool.apply(_resident_nbytes, (0,)) - before
        pool.map(_drop, [0])
        for seed in range(4):
            pool.map(_verified, [message(seed, NBYTES) for seed in range(6)], chunksize=1)
            verify(pool.apply(_make, (seed,)), seed)
        shrunk = pool.apply(_resident_nbytes, (0,)) - before
        for seed, one in enumerate(kept):
            verify(one, seed)
        assert arena.statistics().n_fallbacks == 0
        pool.close()
        pool.join()
    # It keeps 36 MB in the first loop, and nothing in the second.
    assert grown < 12 * NBYTES + 24 * MIB, grown
    assert shrunk < 24 * MIB, shrunk


def _publish(nbytes, n=1):
    """Store `n` objects for others, have all of them for a moment, and drop them."""
    stored = [oobpickle.broadcast(np.full(nbytes, 7, np.uint8)) for _ in range(n)]
    return all(one.value[-1] == 7 for one in stored)


def resident_size_of_who_publishes(method):
    """Nor does a worker grow by what it has stored for others."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(capacity=256 * MIB) as arena, context.Pool(1, _little) as pool:
        assert pool.apply(_publish, (80_000,))
        before = pool.apply(_resident_nbytes)
        assert pool.apply(_publish, (NBYTES, 12))
        assert pool.apply(_publish, (80_000, 2))
        grown = pool.apply(_resident_nbytes) - before
        assert arena.statistics().n_fallbacks == 0
        pool.close()
        pool.join()
    assert grown < 4 * NBYTES, grown


@functools.cache
def _several():
    return [message(seed, NBYTES) for seed in range(8)]


def _make_several():
    return _several()


def _n_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def several_blocks(method):
    """What a message of several arrays needed in its sender's page tables is there for the next."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(capacity=256 * MIB) as arena, context.Pool(1, _little) as pool:
        for n in range(6):
            if n == 3:
                before = pool.apply(_n_faults)
            for seed, one in enumerate(pool.apply(_make_several)):
                verify(one, seed)
            del one
        n_faults = pool.apply(_n_faults) - before
        assert arena.statistics().n_fallbacks == 0
        pool.close()
        pool.join()
    n_pages = 8 * NBYTES // 4096
    assert n_faults < n_pages / 20, (n_faults, n_pages)


def _verified(one):
    return verify(one)[0]


# --- what is accessible, and may be locked


def _accessible_nbytes():
    total = 0
    with open("/proc/self/maps") as file:
        for line in file:
            if "oobpickle-data" in line and "rw" in line.split()[1]:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                total += end - start
    return total


def accessible(method):
    """Of the sparse file no more than is used can be touched, and so be locked."""
    _limit()
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(capacity=256 * MIB) as arena, context.Pool(1) as pool:
        assert _accessible_nbytes() == 0
        received = [verify(pool.apply(_make, (seed,)), seed) for seed in range(10)]
        pool.map(_verified, [message(seed, NBYTES) for seed in range(3)], chunksize=1)
        assert pool.apply(_their_accessible_nbytes, (0,)) <= 14 * 4 * MIB
        assert 10 * NBYTES < _accessible_nbytes() <= 14 * 4 * MIB
        received.clear()
        arena.statistics()
        assert _accessible_nbytes() <= 4 * 4 * MIB
        arena.trim()
        assert _accessible_nbytes() <= 4 * 4 * MIB  # what it has sent, and others have given back
        verify(pool.apply(_make, (5,)), 5)
        reap(fork(_round_trips))
        pool.close()
        pool.join()


def _their_accessible_nbytes(_):
    return _accessible_nbytes()


def _round_trips():
    read, write = multiprocessing.Pipe(duplex=False)
    for seed in range(20):
        write.send(message(seed))
        verify(read.recv(), seed)


def locked(tasks_file, flags, when):
    """``mlockall`` in a small cgroup: all goes on, and is accounted for."""
    with open(tasks_file, "w") as file:
        file.write(str(os.getpid()))
    _limit()
    most = LIMIT + NBYTES  # a worker has the last argument until the next one comes
    flags, libc = int(flags), ctypes.CDLL(None, use_errno=True)
    with (
        oobpickle.enabled(capacity=256 * MIB) as arena,
        multiprocessing.get_context("fork").Pool(1) as pool,
    ):
        if when == "after":
            received = [verify(pool.apply(_make, (seed,)), seed) for seed in range(9)]
            del received
        assert libc.mlockall(flags) == 0, os.strerror(ctypes.get_errno())
        for forks in (False, True):
            received = [verify(pool.apply(_make, (seed,)), seed) for seed in range(12)]
            pool.map(_verified, received[:3], chunksize=1)
            if forks:  # makes ordinary memory of it
                reap(fork(_drop_and_receive, received[:3]))
            for seed, one in enumerate(received):
                verify(one, seed)
            del received, one
            # What is locked goes back with the next call.
            eventually(lambda: arena.statistics() and arena.statistics().nbytes_resident <= most)
            inside.assert_table_in_order(arena)
        assert arena.statistics().n_fallbacks == 0, arena.statistics()
        arena.trim()
        assert arena.statistics().nbytes_resident == 0
        started = multiprocessing.get_context("spawn").Process(target=_round_trips_of_a_child)
        started.start()
        started.join()
        assert started.exitcode == 0
        libc.munlockall()
        verify(pool.apply(_make, (5,)), 5)
        pool.close()
        pool.join()


def _round_trips_of_a_child():
    _round_trips()


if __name__ == "__main__":
    inside.main()
