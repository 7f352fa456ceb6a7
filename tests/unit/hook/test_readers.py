"""Who reads a message, and so whose pickler has made it."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.pool
import multiprocessing.queues
import pickle
import sys
import threading
from types import SimpleNamespace

import pytest

from oobpickle._hook import loky
from oobpickle._hook.readers import protocol_of

OBJECT = pickle.DEFAULT_PROTOCOL


class OwnPickler(multiprocessing.queues.SimpleQueue):
    def put(self, obj):
        self._writer.send_bytes(pickle.dumps(obj))


class OwnFeeder(multiprocessing.queues.Queue):
    def _feed(*args):
        raise NotImplementedError


class Counting(multiprocessing.queues.Queue):
    """What is put into it goes the usual way."""

    def put(self, obj, *args):
        self.n_put = 1
        super().put(obj, *args)


@pytest.fixture
def seen(monkeypatch):
    """What was found for each message that has been read; its length is read by itself."""
    found = []
    original = multiprocessing.connection.Connection._recv

    def _recv(self, size, *args):
        if size != 4:
            found.append(protocol_of(sys._getframe(1)))
        return original(self, size, *args)

    monkeypatch.setattr(multiprocessing.connection.Connection, "_recv", _recv)
    return found


@pytest.fixture
def ends():
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        yield reader, writer


def call_in(module, function):
    exec("function()", {"__name__": module, "function": function})


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("__main__", OBJECT),
        ("concurrent.futures.process", OBJECT),
        ("my.lokyfile", OBJECT),
        ("loky.process_executor", None),
        ("joblib.externals.loky.process_executor", None),
        ("joblib.pool", None),
        ("other.vendor.loky.backend", None),
    ],
)
def test_recv_by_anybody_but_libraries_with_their_own_picklers(seen, ends, module, expected):
    reader, writer = ends
    writer.send("an object")
    call_in(module, reader.recv)

    assert seen == [expected]


@pytest.mark.parametrize("package", ["loky", "joblib.externals.loky"])
def test_recv_by_a_library_that_is_served(seen, ends, package, monkeypatch):
    queues = SimpleNamespace(dumps=loky.hooked_dumps(pickle.dumps))
    monkeypatch.setitem(sys.modules, f"{package}.backend.queues", queues)
    reader, writer = ends
    writer.send("an object")
    call_in(f"{package}.process_executor", reader.recv)

    assert seen == [5]


def test_bytes_are_no_object(seen, ends):
    reader, writer = ends
    for _ in range(2):
        writer.send("an object")
    call_in("__main__", reader.recv_bytes)
    call_in("__main__", lambda: reader.recv_bytes_into(bytearray(100)))

    assert seen == [None, None]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (multiprocessing.queues.Queue, OBJECT),
        (multiprocessing.queues.JoinableQueue, OBJECT),
        (multiprocessing.queues.SimpleQueue, OBJECT),
        (Counting, OBJECT),
        (OwnFeeder, None),
        (OwnPickler, None),
    ],
)
def test_queues_by_how_they_pickle(seen, kind, expected):
    queue = kind(ctx=multiprocessing.get_context("spawn"))
    queue._writer.send("an object")
    if isinstance(queue, multiprocessing.queues.Queue):
        queue._sem.acquire()
    assert queue.get() == "an object"
    queue.close()

    assert seen == [expected]


@pytest.mark.parametrize(
    ("kind", "expected"), [(multiprocessing.queues.SimpleQueue, OBJECT), (OwnPickler, None)]
)
def test_results_of_a_pool_by_how_its_queue_pickles(seen, kind, expected):
    queue = kind(ctx=multiprocessing.get_context("spawn"))
    queue.put((0, 0, "a result"))
    queue.put(None)  # four bytes
    arguments = (queue, queue._reader.recv, {})
    thread = threading.Thread(target=multiprocessing.pool.Pool._handle_results, args=arguments)
    thread._state = multiprocessing.pool.RUN
    thread.start()
    thread.join()
    queue._reader.close()
    queue._writer.close()

    assert seen == [expected]
