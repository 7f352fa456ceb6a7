"""One memory for all, between processes: the lock, its dead owners, and how the handle travels."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
from multiprocessing import managers, shared_memory

import inside
import numpy as np
from inside import KILLED, REPEATS, Token, eventually, fork, reap

import oobpickle

N_TIMES = 10_000
LATE_S = 60


@dataclasses.dataclass
class State:
    counts: np.ndarray
    data: np.ndarray
    name: str = "state"


def _state():
    return State(np.zeros(4, int), np.ones(50_000))


def _count(shared, n, which=0):
    for _ in range(n):
        with shared.writing() as state:
            state.counts[which] += 1
    return n


def _count_in_threads(shared, n):
    threads = [threading.Thread(target=_count, args=(shared, n)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _counts(shared):
    with shared.reading(timeout=LATE_S) as state:
        return state.counts.tolist()


def _raised(kind, call, *args):
    """Return the text of the error that a call ends with."""
    try:
        call(*args)
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")


# --- counting


def count_in_processes(method):
    """Four processes and two threads, each with the same counter."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), oobpickle.share(_state()) as shared:
        processes = [context.Process(target=_count, args=(shared, N_TIMES)) for _ in range(4)]
        for process in processes:
            process.start()
        _count_in_threads(shared, N_TIMES)
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert _counts(shared)[0] == 6 * N_TIMES == shared.version


def count_in_pools(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), oobpickle.share(_state()) as shared:
        with context.Pool(2) as pool:
            assert pool.starmap(_count, [(shared, 50)] * 20) == [50] * 20
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            done = [pool.submit(_count, shared, 50, 1) for _ in range(20)]
            assert [one.result() for one in done] == [50] * 20
        assert _counts(shared) == [1000, 1000, 0, 0]


_of_worker = []


def _start_worker(shared):
    _of_worker.append(shared)


def _count_own(n):
    return _count(_of_worker[0], n, 2)


def count_what_workers_start_with(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), oobpickle.share(_state()) as shared:
        with context.Pool(2, _start_worker, (shared,)) as pool:
            pool.map(_count_own, [10] * 10)
        assert _counts(shared) == [0, 0, 100, 0]


def _pass_on(inbox, outbox):
    outbox.put({"back": inbox.get()})


def send_it_around(method):
    """Through queues, and back: it is the same memory."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), oobpickle.share(_state()) as shared:
        inbox, outbox = context.Queue(), context.SimpleQueue()
        process = context.Process(target=_pass_on, args=(inbox, outbox))
        process.start()
        inbox.put(shared)
        arrived = outbox.get()["back"]
        process.join()
        _count(arrived, 3)
        assert _counts(shared)[0] == 3
        inbox.close()
        inbox.join_thread()


# --- what else crosses


def _change_structure(shared):
    with shared.writing() as state:
        state.name = "other"


def _take_out(shared):
    return shared.unlocked.counts, shared.unlocked.data


def errors_and_copies_come_back(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), oobpickle.share(_state()) as shared, context.Pool(1) as pool:
        text = _raised(oobpickle.SharedStructureError, pool.apply, _change_structure, (shared,))
        assert text.startswith("$.name was changed")
        counts, data = pool.apply(_take_out, (shared,))
        counts[0] = data[0] = 5
        assert _counts(shared) == [0, 0, 0, 0]
        assert shared.unlocked.data[0] == 1


def a_receiver_that_has_not_joined_is_an_error_of_the_sender(method):
    """And neither a lost message, nor a pool that hangs."""
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        pool.apply(abs, (1,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", oobpickle.FallbackWarning)
            with oobpickle.enabled(), oobpickle.share(_state()) as shared:
                text = _raised(TypeError, pool.apply, _count, (shared, 1))
                assert "has not joined" in text, text
                assert pool.apply(abs, (-2,)) == 2


def _use_segment(segment, array):
    segment.buf[0] = 7
    assert array[0] == 3
    array[0] = 9
    name = segment.name
    segment.close()
    return name


def _use_list(values, proxy):
    values[1] = "other"
    proxy.append(values[0])
    values.shm.close()


def what_others_share_crosses_as_without_us(method):
    """Segments and lists by name, proxies as proxies; an array over a segment by value."""
    context = multiprocessing.get_context(method)
    with (
        oobpickle.enabled(),
        managers.SharedMemoryManager(ctx=context) as segments,
        context.Manager() as manager,
        context.Pool(1) as pool,
    ):
        for segment in (shared_memory.SharedMemory(create=True, size=200_000), None):
            used = segment or segments.SharedMemory(200_000)
            array = np.ndarray(200_000, np.uint8, used.buf)
            array[:] = 3
            assert pool.apply(_use_segment, (used, array)) == used.name
            assert array[:2].tolist() == [7, 3]
            del array
            used.close()
            if segment:
                segment.unlink()
        values, proxy = segments.ShareableList([1, "value", 2.5]), manager.list()
        pool.apply(_use_list, (values, proxy))
        assert list(values) == [1, "other", 2.5]
        assert list(proxy) == [1]
        values.shm.close()


_inherited = []


def _inherit(*shared):
    _inherited.extend(shared)


def _add(shared, large):
    """To what has a lock, and what has none; beside something that goes out of band."""
    array, value, raw = shared
    with array.get_lock(), value.get_lock():
        array[0] += large[0]
        value.value += 1
        raw[0] += 1


def _add_to_inherited(large):
    _add(_inherited, large)


def _change(array):
    array[0] = 9


def arrays_and_values_cross_as_without_us(method):
    """By inheritance, as one memory; in a message an error. An array over one is sent by value."""
    context = multiprocessing.get_context(method)
    shared = context.Array("d", 50_000), context.Value("i"), context.RawArray("d", 50_000)
    large = np.ones(50_000)
    with oobpickle.enabled() as arena:
        process = context.Process(target=_add, args=(shared, large))
        process.start()
        process.join()
        assert process.exitcode == 0
        with context.Pool(1, _inherit, shared) as pool:
            pool.map(_add_to_inherited, [large] * 2)
            array, value, raw = shared
            assert (array[0], value.value, raw[0]) == (3, 3, 3)
            for one in shared:
                text = _raised(RuntimeError, pool.apply, _change, (one,))
                assert "only be shared between processes through inheritance" in text
            for over in (np.frombuffer(array.get_obj()), np.ctypeslib.as_array(raw)):
                pool.apply(_change, (over,))
                assert over[0] == 3
        assert arena.statistics().n_messages_out_of_band >= 3


# --- dead owners


def _die_writing(shared, taken):
    with shared.writing() as state:
        state.counts[0] = 1
        taken.put(os.getpid())
        while True:
            signal.pause()


def a_holder_is_killed(method):
    """The lock is free, and the next is told; once somebody has written nobody is any more."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), oobpickle.share(_state()) as shared:
        taken = context.SimpleQueue()
        process = context.Process(target=_die_writing, args=(shared, taken))
        process.start()
        pid = taken.get()
        text = _raised(TimeoutError, shared.reading(timeout=0.05).__enter__)
        assert f"process {pid} has it" in text, text
        os.kill(pid, signal.SIGKILL)
        process.join()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with shared.writing(timeout=LATE_S) as state:
                assert shared.owner_died
                assert state.counts[0] == 1
                state.counts[0] = 0
        assert [one.category for one in told] == [oobpickle.LockOwnerDiedWarning]
        assert told[0].filename == __file__
        assert not shared.owner_died
        assert _counts(shared) == [0, 0, 0, 0]


def _points():
    return [
        "shared_lock.taken",
        "shared_lock.entered",
        "shared_lock.counted",
        "shared_lock.ended",
        "shared_lock.given",
    ]


#: Where it may have been in the middle of a change.
_TOLD = {"shared_lock.entered", "shared_lock.counted"}


def holders_die_at_every_point():
    oobpickle.install()
    with oobpickle.share(_state()) as shared:
        for point in _points() * REPEATS:
            version = shared.version
            pid = fork(_count, shared, 3, fault=f"{point}:2")
            reap(pid, KILLED)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                with shared.writing(timeout=LATE_S) as state:
                    state.counts[:] = 0
            assert bool(told) == (point in _TOLD), point
            grown = 1 if point in ("shared_lock.taken", "shared_lock.entered") else 2
            assert shared.version == version + grown + 1, (point, version, shared.version)
    oobpickle.uninstall()


def who_takes_over_dies_too():
    """What the first has left is told to the third."""
    oobpickle.install()
    with oobpickle.share(_state()) as shared:
        reap(fork(_count, shared, 1, fault="shared_lock.entered"), KILLED)
        reap(fork(_count, shared, 1, fault="shared_lock.taken"), KILLED)
        reap(fork(_count, shared, 1, fault="shared_lock.inherited"), KILLED)
        try:
            with shared.reading(timeout=LATE_S):
                raise AssertionError("nothing was told")
        except oobpickle.LockOwnerDiedWarning:
            assert shared.owner_died
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with shared.writing(timeout=LATE_S):
                pass
        assert _counts(shared) == [0, 0, 0, 0]
    oobpickle.uninstall()


def who_arrives_dies():
    """In the middle of mapping it: the memory comes back."""
    arena = oobpickle.install()
    with oobpickle.share(_state()) as shared:
        before = arena.statistics().n_references
        read, write = multiprocessing.Pipe(duplex=False)

        def child():
            write.send(shared)
            read.recv()

        for hit in (1, 2):
            reap(fork(child, fault=f"view.shared:{hit}"), KILLED)
        arena.trim()
        assert _counts(shared) == [0, 0, 0, 0]
        eventually(lambda: arena.trim() or arena.statistics().n_references == before)
    assert arena.statistics().nbytes_published == 0
    oobpickle.uninstall()


def many_holders_are_killed_at_random():
    """Two that count go on, while others are killed wherever they are."""
    oobpickle.install()
    with oobpickle.share(_state()) as shared:
        warnings.simplefilter("ignore", oobpickle.LockOwnerDiedWarning)
        state = shared.unlocked

        def count_on():
            n = 0
            while not state.counts[3]:
                n += _count(shared, 1, 1)
            assert n > 0

        busy = [fork(count_on) for _ in range(2)]
        chance = np.random.default_rng(1)
        for _ in range(30 * REPEATS):
            pid = fork(_count, shared, 1 << 40, 2)
            until = time.monotonic() + float(chance.random()) / 200
            eventually(lambda until=until: time.monotonic() > until)
            os.kill(pid, signal.SIGKILL)
            reap(pid, KILLED)
            with shared.writing(timeout=LATE_S):
                state.counts[2] = 0
        state.counts[3] = 1
        for pid in busy:
            reap(pid)
    oobpickle.uninstall()


# --- forks and ends


def a_fork_within_a_turn():
    oobpickle.install()
    with oobpickle.share(_state()) as shared:
        held, done = Token(), Token()
        with shared.writing() as state:
            pid = os.fork()
            if pid == 0:
                try:
                    with shared.reading(timeout=0):
                        os._exit(1)
                except TimeoutError:
                    held.give()
                done.take()
                _count(shared, 1)  # in a turn of its own
            else:
                held.take()
                state.counts[1] = 7
        if pid == 0:  # the end of the block in the child is none
            os._exit(0 if shared.version == 2 else 2)
        assert shared.version == 1
        done.give()
        reap(pid)
        assert _counts(shared) == [1, 7, 0, 0]
    oobpickle.uninstall()


def a_child_outlives_its_parent(method):
    """And shares with another one, after the arena has been closed."""
    context = multiprocessing.get_context(method)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with oobpickle.enabled():
            shared = oobpickle.share(_state())
            ready = context.SimpleQueue()
            names = [_Open(write), _Open(write)]
            for name in names:
                context.Process(target=_outlive, args=(shared, ready, os.getpid(), name)).start()
            for _ in names:
                ready.get()
        os._exit(0)
    os.close(write)
    reap(pid)
    with open(read, "rb") as file:
        assert file.read() == b"donedone"


class _Open:
    """A descriptor that a child gets, however it is started."""

    def __init__(self, fd):
        self._fd = fd

    def __reduce__(self):
        return _opened, (multiprocessing.reduction.DupFd(self._fd),)

    def write(self, data):
        os.write(self._fd, data)


def _opened(duplicate):
    return _Open(duplicate.detach())


def _outlive(shared, ready, parent, file):
    ready.put(1)
    eventually(lambda: not _is_there(parent))
    _count(shared, 500)
    eventually(lambda: shared.version == 1000)
    assert _counts(shared)[0] == 1000
    file.write(b"done")


def _is_there(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- waiting


def _follow(shared, until, results):
    """Return the versions that it saw, and what was in the array then."""
    seen = [0]
    while seen[-1] < until:
        seen.append(shared.wait(seen[-1], timeout=LATE_S))
        with shared.reading() as state:
            assert state.counts[0] >= seen[-1]
            assert (state.data == state.data[0]).all()
    results.put(seen)


def versions_are_waited_for(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled(), oobpickle.share(_state()) as shared:
        results = context.SimpleQueue()
        arguments = (shared, 300, results)
        processes = [context.Process(target=_follow, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        for n in range(300):
            with shared.writing() as state:
                state.counts[0] = n + 1
                state.data[:] = n
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert all(seen == sorted(set(seen)) and seen[-1] == 300 for seen in found)


def a_writer_dies_while_others_wait():
    """Who waits for a version sees each that was counted, wherever the writer was killed."""
    oobpickle.install()
    warnings.simplefilter("ignore", oobpickle.LockOwnerDiedWarning)
    with oobpickle.share(_state()) as shared:
        for point in ("shared_lock.counted", "shared_lock.ended", "shared_lock.given"):
            version = shared.version
            waiting = Token()

            def wait(version=version, waiting=waiting):
                waiting.give()
                assert shared.wait(version, timeout=LATE_S) == version + 1

            pid = fork(wait)
            waiting.take()
            eventually(lambda pid=pid: _is_asleep(pid))
            reap(fork(_count, shared, 1, fault=point), KILLED)
            reap(pid)
    oobpickle.uninstall()


def _is_asleep(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def an_interrupt_ends_each_wait():
    oobpickle.install()
    with oobpickle.share(_state()) as shared:
        for wait in (lambda: shared.wait(shared.version), lambda: shared.writing().__enter__()):
            begun = Token()
            with shared.writing():

                def child(wait=wait, begun=begun):
                    try:
                        begun.give()
                        wait()
                    except KeyboardInterrupt:
                        _count(shared, 1)
                        os._exit(42)

                pid = fork(child)
                begun.take()
                eventually(lambda pid=pid: _is_asleep(pid))
                os.kill(pid, signal.SIGINT)
            reap(pid, 42)
    oobpickle.uninstall()


def nothing_stays_without_an_arrival():
    """A handle in a queue that nobody reads."""
    arena = oobpickle.install()
    shared = oobpickle.share(_state())
    unread = queue.SimpleQueue()
    read, write = multiprocessing.Pipe(duplex=False)
    write.send(shared)
    unread.put(read)
    shared.close()
    assert arena.statistics().nbytes_published > 0
    read.close()
    write.close()
    arena.trim()
    assert arena.statistics().nbytes_published == 0
    assert arena.statistics().n_references == 0
    oobpickle.uninstall()


if __name__ == "__main__":
    inside.main()
