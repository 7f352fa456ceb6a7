"""Large messages for which there is no room: in-band, and in no more memory than they need."""

import fcntl
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import resource
import signal
import struct
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor

import inside
import numpy as np
from inside import Token, eventually, fork, message, reap, verify

import oobpickle
from oobpickle._memory.pipes import channel_id, n_unread

MIB = 1 << 20
NBYTES = 200 * MIB
#: Beside the object: two processes' imports and stacks grow a little while they work.
SLACK = 0.15


def _peak_nbytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _make(nbytes):
    return np.full(nbytes // 8, 7.0)


_before = 0


def _warm_up():
    global _before
    _make(MIB).sum()
    _before = _peak_nbytes()


def _peak_since():
    return _peak_nbytes() - _before


def _take(array):
    assert array.nbytes == NBYTES
    assert (array[:: 1 << 12] == 7).all()
    assert array.flags.writeable
    return array.nbytes


def _assert_little(what, nbytes):
    # The copy of a sender shrinks as that of the receiver grows: see the case below.
    n_most = (2 if what == "the sender" else 1) + SLACK
    assert nbytes < n_most * NBYTES, f"{what} took {nbytes / NBYTES:.2f} times the object"


def _result_of_a_pool(context):
    with context.Pool(1, _warm_up) as pool:
        _take(pool.apply(_make, (NBYTES,)))
        yield "the sender", pool.apply(_peak_since)
    yield "the receiver", _peak_since()


def _result_of_an_executor(context):
    with ProcessPoolExecutor(1, context, _warm_up) as executor:
        _take(executor.submit(_make, NBYTES).result())
        yield "the sender", executor.submit(_peak_since).result()
    yield "the receiver", _peak_since()


def _get_one(get, answer):
    _warm_up()
    answer.send("ready")
    _take(get())
    answer.send(_peak_since())


def _to_a_process(context, get, put):
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_get_one, args=(get, there))
    process.start()
    assert here.recv() == "ready"
    put(_make(NBYTES))
    yield "the receiver", here.recv()
    yield "the sender", _peak_since()
    process.join()


def _through_a_pipe(context):
    read, write = context.Pipe(duplex=False)
    yield from _to_a_process(context, read.recv, write.send)


def _through_a_simple_queue(context):
    queue = context.SimpleQueue()
    yield from _to_a_process(context, queue.get, queue.put)


WAYS = {
    "result": _result_of_a_pool,
    "executor": _result_of_an_executor,
    "pipe": _through_a_pipe,
    "SimpleQueue": _through_a_simple_queue,
}


def takes_what_it_needs(way, method):
    """Once the object in the receiver, and the object and one copy in the sender."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB) as arena:
        warnings.simplefilter("ignore")
        _warm_up()
        for what, nbytes in WAYS[way](multiprocessing.get_context(method)):
            _assert_little(what, nbytes)
        done = arena.statistics()
        assert (done.n_messages_out_of_band, done.fallbacks["full"].n_messages) == (0, 1), done


def a_pipe_is_as_wide_as_before():
    """And a message that is on its way behind a large one does not wait for that."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)
        before = fcntl.fcntl(read.fileno(), fcntl.F_GETPIPE_SZ)
        writer = threading.Thread(target=lambda: (write.send(_make(9 * MIB)), write.send("next")))
        writer.start()
        array = read.recv()
        assert array.nbytes == 9 * MIB
        assert (array == 7).all()
        assert read.recv() == "next"
        writer.join()
        assert fcntl.fcntl(read.fileno(), fcntl.F_GETPIPE_SZ) == before


def bytes_are_bytes():
    """Whoever reads the bytes of a message gets them all, and can send them on."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)
        other_read, other_write = multiprocessing.Pipe(duplex=False)
        pid = fork(_send_and_relay, write, read, other_write)
        verify(other_read.recv(), 1)
        whole = other_read.recv_bytes()
        assert type(whole) is bytes
        verify(pickle.loads(whole), 2)
        memory = bytearray(3 * MIB)
        n = other_read.recv_bytes_into(memory)
        verify(pickle.loads(memory[:n]), 3)
        reap(pid)


def _send_and_relay(write, read, other_write):
    sending = threading.Thread(target=lambda: write.send(message(1, 2 * MIB)))
    sending.start()
    other_write.send_bytes(read.recv_bytes())
    sending.join()
    other_write.send(message(2, 2 * MIB))
    other_write.send(message(3, 2 * MIB))


def other_threads_may_change_what_is_sent():
    """Then the message is what the object was when `send` was called."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)
        one = message(1, 8 * MIB)
        sending = threading.Thread(target=write.send, args=(one,))
        sending.start()
        eventually(lambda: _n_unread_in(write) > 0)
        one[1][:] = 0
        verify(read.recv(), 1)
        sending.join()


def _anonymous_nbytes(pid="self"):
    with open(f"/proc/{pid}/status") as file:
        found = (int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon:"))
        return next(found, 0)  # of a child that has ended


def _read_step_by_step(fd, memory, *pids):
    """Fill `memory` with a message; return the most ordinary memory that was in use meanwhile."""
    nbytes, done, most = struct.unpack("!i", os.read(fd, 4))[0], 0, 0
    while done < nbytes:
        done += os.readv(fd, [memoryview(memory)[done : min(nbytes, done + MIB)]])
        most = max(most, sum(map(_anonymous_nbytes, ("self", *pids))))
    return nbytes, most


def the_copy_goes_as_it_is_sent(way):
    """The object, its copy and what has arrived are never more than twice the object together."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB) as arena:
        warnings.simplefilter("ignore")
        memory = mmap.mmap(
            -1, NBYTES + MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # takes pages as it is filled
        read, write = multiprocessing.Pipe(duplex=False)
        queue = multiprocessing.Queue()
        one, pids = _make(NBYTES), []
        before = _anonymous_nbytes() - NBYTES
        if way == "queue":
            queue.put(one)
            read = queue._reader
        elif way == "thread":
            threading.Thread(target=write.send, args=(one,)).start()
        else:
            pids = [fork(lambda: write.send(one))]  # it has the pages of the object in common
            before *= 2
        nbytes, most = _read_step_by_step(read.fileno(), memory, *pids)
        most -= len(pids) * NBYTES
        for pid in pids:
            reap(pid)
        assert most - before < (2 + SLACK) * NBYTES, (most - before) / NBYTES
        assert (pickle.loads(memoryview(memory)[:nbytes]) == one).all()
        assert arena.statistics().fallbacks["full"].n_messages == 1


def not_enough_memory_for_a_strided_array():
    """Said before anything is written: the next message arrives."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)
        array = np.ones(8 * MIB)[::2]
        before = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 6 * MIB, before[1]))
        caught = None
        try:
            write.send([np.ones(MIB), array])
        except MemoryError as error:
            caught = error
        resource.setrlimit(resource.RLIMIT_AS, before)
        assert caught is not None
        write.send("small")
        assert read.recv() == "small"


def sender_killed_in_the_middle():
    """As ever: an error for this message, and the channel is at its end."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)
        started = Token()

        def send():
            read.close()
            signal.signal(signal.SIGALRM, lambda *_: (started.give(), os.kill(os.getpid(), 9)))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            write.send(message(1, 4 * MIB))

        pid = fork(send)
        write.close()
        started.take()
        reap(pid, inside.KILLED)
        caught = None
        try:
            read.recv()
        except OSError as error:
            caught = error
        assert "end of file" in str(caught), caught


def _n_unread_in(connection):
    return n_unread(connection.fileno(), channel_id(connection.fileno()))


_kept = []


def _keep(token):
    _kept.append(token)


def _take_kept():
    _kept[0].take()


def objects_in_queues_are_taken_when_they_are_pickled():
    """A feeder thread may write much later: what is changed then is not seen."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB) as arena:
        warnings.simplefilter("ignore")
        queue = multiprocessing.Queue()
        go = Token()
        pool = multiprocessing.get_context("fork").Pool(1, _keep, (go,))
        busy = pool.apply_async(_take_kept)
        one, other = message(1, 2 * MIB), message(2, 2 * MIB)
        queue.put(one)
        task = pool.apply_async(verify, (other,))
        eventually(lambda: arena.statistics().n_fallbacks == 2)
        eventually(lambda: _n_unread_in(queue._writer) and _n_unread_in(pool._inqueue._writer))
        one[1][:] = 0
        other[1][:] = 0
        go.give()
        verify(queue.get(), 1)
        busy.get()
        verify(task.get(), 2)
        pool.close()
        pool.join()


if __name__ == "__main__":
    inside.main()
