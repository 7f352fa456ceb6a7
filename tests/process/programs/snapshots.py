"""What is sent is changed meanwhile: by a signal handler, by another thread.

Each change is one call that keeps the GIL, and plain pickling copies each array in one such call:
so what arrives was whole at one moment.
"""

import array
import contextlib
import multiprocessing
import signal
import threading
import warnings

import inside
import numpy as np
from inside import eventually, fork, reap

import oobpickle

MIB = 1 << 20
#: Of each of nine parts: one piece, a few, and many are written.
SMALL, LARGE, LARGER = MIB // 4, 3 * MIB, 12 * MIB


class Changing:
    """Memory of several kinds, of which each is filled with one value at a time."""

    def __init__(self, nbytes, *, overlapping=False):
        records = np.dtype([("a", "i1"), ("b", "f8")], align=True)
        self.memories = [bytearray(nbytes) for _ in range(7)]
        whole = [np.frombuffer(memory, np.uint8) for memory in self.memories]
        rows = whole[2].reshape(-1, 1024)
        self.parts = {
            "array": whole[0],
            "fortran": whole[1].reshape(-1, 1024).T,
            "strided": rows[:, ::2],
            "records": whole[3].view(records),
            "masked": np.ma.MaskedArray(whole[4], False),
            "masked strided": np.ma.MaskedArray(whole[6].reshape(-1, 1024)[:, 1::3], False),
            "bytearray": bytearray(nbytes),
            "array.array": array.array("d", bytes(nbytes)),
        }
        if overlapping:
            self.parts |= {"one and": whole[5], "the same": whole[5][: nbytes // 2]}
        self.patterns = [bytes([k]) * nbytes for k in range(5)]
        self.turn = 0
        self.views = [memoryview(memory) for memory in self.memories]

    def change(self):
        self.turn += 1
        pattern = self.patterns[self.turn % 5]
        for view in self.views:
            view[:] = pattern
        memoryview(self.parts["bytearray"])[:] = pattern
        memoryview(self.parts["array.array"]).cast("B")[:] = pattern


def _torn_in(parts):
    return [name for name, part in parts.items() if _is_torn(part)]


def _is_torn(part):
    if isinstance(part, (bytearray, array.array)):
        part = np.frombuffer(part, np.uint8)
    if isinstance(part, np.ma.MaskedArray):
        part = part.data
    if part.dtype.names:
        part = part["b"].view("u8") - part["a"] * np.uint64(0x0101010101010101)
        return bool(part.any())
    return bool((part != part[(0,) * part.ndim]).any())


@contextlib.contextmanager
def _receiver_of_whole_messages(capacity):
    """Yield what sends to a process that fails if a message is not whole."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=capacity) as arena:
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)

        def receive():
            write.close()
            while (parts := read.recv()) is not None:
                assert (torn := _torn_in(parts)) == [], torn

        pid = fork(receive)
        read.close()
        yield write
        write.send(None)
        reap(pid)
        statistics = arena.statistics()
        found = statistics.n_messages_out_of_band > 0, statistics.n_fallbacks > 0
        assert found == (capacity > MIB, capacity == MIB), statistics


@contextlib.contextmanager
def _alarms(handler, every_s):
    def handle(*_):
        handler()
        signal.setitimer(signal.ITIMER_REAL, every_s)

    signal.signal(signal.SIGALRM, handle)  # instead of the watchdog's, for a moment
    signal.setitimer(signal.ITIMER_REAL, every_s)
    try:
        yield
    finally:
        # One that is on its way still finds a handler: without one, Python would complain.
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(inside.WATCHDOG_S)


def by_a_signal_handler():
    """Of a process with one thread, while it falls back to the pipe."""
    _changed_by_handler(MIB)


def by_a_signal_handler_out_of_band():
    _changed_by_handler(512 * MIB)


def _changed_by_handler(capacity):
    with _receiver_of_whole_messages(capacity) as write:
        for nbytes, n in (SMALL, 10), (LARGE, 3), (LARGER, 1):
            for overlapping in [False, True] if n > 1 else [False]:
                changing = Changing(nbytes, overlapping=overlapping)
                with _alarms(changing.change, nbytes / 5e8):
                    for _ in range(n):
                        write.send(changing.parts)
                assert changing.turn > 0


@contextlib.contextmanager
def _another_thread(change):
    stop = threading.Event()

    def go_on():
        while not stop.is_set():
            change()
            stop.wait(0.001)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def by_another_thread():
    _changed_by_thread(MIB)


def by_another_thread_out_of_band():
    _changed_by_thread(512 * MIB)


def _changed_by_thread(capacity):
    with _receiver_of_whole_messages(capacity) as write:
        for nbytes, n in (SMALL, 10), (LARGE, 2):
            changing = Changing(nbytes, overlapping=n > 2)
            with _another_thread(changing.change):
                for _ in range(n):
                    write.send(changing.parts)


def while_a_feeder_sends():
    """What was put into a queue is pickled, and written, by another thread."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        queue, simple = multiprocessing.Queue(), multiprocessing.SimpleQueue()
        for nbytes in 3 * [SMALL, 2 * SMALL] + [LARGE]:
            changing = Changing(nbytes, overlapping=nbytes == SMALL)
            with _alarms(changing.change, nbytes / 1e9):
                queue.put(changing.parts)
                assert (torn := _torn_in(queue.get())) == [], torn
                sending = threading.Thread(target=simple.put, args=[changing.parts])
                sending.start()
                assert (torn := _torn_in(simple.get())) == [], torn
                sending.join()


class Frame:
    """Its pixels are decompressed into one memory, again and again."""

    scratch = np.empty(MIB, np.uint8)

    def __init__(self, value, nbytes):
        self.value, self.nbytes = value, nbytes

    def __reduce__(self):
        self.scratch[: self.nbytes] = self.value
        return list, ((self.scratch[: self.nbytes],),)


class PutOff:
    """Does its work when it is pickled: it changes an array that was pickled before."""

    def __init__(self, array):
        self.array = array

    def __getstate__(self):
        self.array[:] = 7
        return {"done": True}


def scratch_memory():
    """Plain pickle takes the content when it reduces an object; so do we, wherever it goes."""
    for capacity in MIB, 256 * MIB:
        with warnings.catch_warnings(), oobpickle.enabled(capacity=capacity):
            warnings.simplefilter("ignore")
            with multiprocessing.Pool(1) as pool:
                sizes = (MIB, MIB // 10, 100, 5000, MIB // 2)
                frames = [Frame(value, nbytes) for value, nbytes in enumerate(sizes)]
                arrived = pool.apply(_returned, (frames,))
                for value, ((array,), nbytes) in enumerate(zip(arrived, sizes, strict=True)):
                    assert (array.shape, set(array.tolist())) == ((nbytes,), {value})
                array = np.ones(MIB)
                arrived = pool.apply(_first, ([array, PutOff(array)],))
                assert (arrived == 1).all()
                assert (array == 7).all()


def _returned(obj):
    return obj


def _first(objects):
    return objects[0]


def _send_and_resize(write, nbytes, after_s):
    memories = [bytearray(nbytes), array.array("b", bytes(nbytes))]

    def resize(*_):
        for memory in memories:
            memory.append(1)

    signal.signal(signal.SIGALRM, resize)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    write.send([*memories, np.ones(nbytes, np.uint8)])
    eventually(lambda: len(memories[1]) > nbytes)


def a_handler_resizes_what_is_sent():
    """It can, and what arrives is what the bytearray held before, or after."""
    with warnings.catch_warnings(), oobpickle.enabled(capacity=MIB):
        warnings.simplefilter("ignore")
        read, write = multiprocessing.Pipe(duplex=False)
        done_read, done_write = multiprocessing.Pipe(duplex=False)

        def receive():
            while (nbytes := read.recv()) is not None:
                for memory in read.recv()[:2]:
                    assert len(memory) - nbytes in (0, 1), (len(memory), nbytes)
                done_write.send(None)

        pid = fork(receive)
        for nbytes in 4 * SMALL, 4 * LARGE:
            for turn in range(10):
                write.send(nbytes)
                _send_and_resize(write, nbytes, after_s=(1 + turn) * nbytes / 5e9)
                done_read.recv()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(inside.WATCHDOG_S)
        write.send(None)
        reap(pid)


if __name__ == "__main__":
    inside.main()
