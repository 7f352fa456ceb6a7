"""Processes that are started with large arguments: the process object is a message itself."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import sys
import tempfile
import threading
import types
import warnings
from multiprocessing import resource_tracker

import inside
from inside import Model, content

import oobpickle

MIB = 1 << 20


def _started(context, *args, exit_code=0, target=print):
    process = context.Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == exit_code, process.exitcode


def _check(model):
    model.check()
    model.counts[:] = 0


def killed_before_it_runs(method, point):
    """What it was sent comes back, wherever it dies, while the process object lives on."""
    os.environ["OOBPICKLE_FAULT"] = point  # the fork server inherits it, and its children
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([])  # else it has this module, which disarms in its children
    with oobpickle.enabled() as arena:
        process = context.Process(target=_check, args=(Model(1),))
        process.start()
        process.join(60)
        expected = inside.KILLED if method == "spawn" else 255  # what the fork server says of it
        assert process.exitcode in (inside.KILLED, expected), process.exitcode
        assert arena.statistics().n_messages_out_of_band == 1
        inside.assert_empty(arena)


def never_launched():
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # it needs the executable too
    context.set_executable(os.path.join(os.path.dirname(__file__), "nothing"))
    n_open = len(os.listdir("/proc/self/fd"))
    with oobpickle.enabled() as arena:
        n_open_inside = len(os.listdir("/proc/self/fd"))
        for seed in range(3):
            process = context.Process(target=_check, args=(Model(seed),))
            try:
                process.start()
            except BrokenPipeError:
                continue
            process.join(60)
            assert process.exitcode == 255, process.exitcode
            process.close()
        assert arena.statistics().n_messages_out_of_band == 3
        inside.assert_empty(arena)
        assert len(os.listdir("/proc/self/fd")) == n_open_inside
    assert len(os.listdir("/proc/self/fd")) == n_open


def not_enough_room(method):
    context = multiprocessing.get_context(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with oobpickle.enabled(capacity=MIB) as arena:
            _started(context, Model(1), target=_check)
            assert arena.statistics().n_messages_out_of_band == 0
            assert list(arena.statistics().fallbacks) == ["full"]
            assert arena.statistics().fallbacks["full"].nbytes >= Model(1).nbytes()
    assert [w.category for w in caught] == [oobpickle.FallbackWarning]


class _Counted:
    n_reductions = 0

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        _Counted.n_reductions += 1
        return _Counted, self.parts


def reduced_once(method):
    context = multiprocessing.get_context(method)
    for capacity in (MIB, 64 * MIB):
        with warnings.catch_warnings(), oobpickle.enabled(capacity=capacity):
            warnings.simplefilter("ignore")
            for parts in ((), (content(1, 2 * MIB),)):
                _Counted.n_reductions = 0
                _started(context, _Counted(*parts), target=type)
                assert _Counted.n_reductions == 1


def refused(method):
    """Plain pickle's error, and nothing stays leased or open."""
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        first = context.Process(target=_check, args=(Model(0),))
        first.start()  # the helpers too
        n_open = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            process = context.Process(target=_check, args=(Model(1), threading.Lock()))
            try:
                process.start()
                raise AssertionError("a lock was pickled")
            except TypeError:
                del process
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == n_open
        first.join()
        inside.assert_empty(arena)


def _call_with(function, connection, _model):
    connection.send((function(), len(os.listdir("/proc/self/fd"))))


def connections_among_the_arguments(method):
    """Also if cloudpickle has to take them apart again; a child has nothing to spare open."""
    context = multiprocessing.get_context(method)
    n_open = set()
    with oobpickle.enabled() as arena:
        for model in (None, Model(1)):
            for function in (dict, dict):
                read, write = context.Pipe(duplex=False)
                process = context.Process(target=_call_with, args=(function, write, model))
                process.start()
                write.close()
                returned, n_open_there = read.recv()
                assert returned == {}
                n_open.add(n_open_there)
                process.join()
                assert process.exitcode == 0
        assert arena.statistics().n_messages_out_of_band == 2
        assert arena.statistics().n_fallbacks == 0
    assert len(n_open) == 1, n_open


class _FailsToLoad:
    def __init__(self):
        self.model = Model(1)

    def __setstate__(self, state):
        state["model"].check()
        sys.excepthook = lambda *_: None
        raise RuntimeError("in __setstate__")


def error_in_the_child(method):
    context = multiprocessing.get_context(method)
    with oobpickle.enabled() as arena:
        _started(context, _FailsToLoad(), exit_code=1)
        assert arena.statistics().n_messages_loaded == 1
        inside.assert_empty(arena)


def _keep_subprocess_to_the_end():
    """Do what gevent does: a class of `subprocess` and ``os.close`` of a module of its own."""
    module = types.ModuleType("closing")
    module.close, module.itself = os.close, module
    exec(  # a module that the interpreter takes apart before those that were imported earlier
        "import subprocess\n"
        "def check(fd): return fd\n"
        "def close_checked(fd): close(check(fd))\n"
        "def keep(): subprocess.Popen\n",
        module.__dict__,
    )
    sys.modules["closing"] = module
    os.register_at_fork(before=module.keep)
    multiprocessing.connection.Connection._close.__defaults__ = (module.close_checked,)


def _put(queue, path):
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), 2)
    _keep_subprocess_to_the_end()
    queue.put(content(1, MIB))


def _printed_at_exit(method):
    """Return what a child prints whose last act is to send, without the addresses in it."""
    context = multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "printed")
        queue = context.SimpleQueue()
        process = context.Process(target=_put, args=(queue, path))
        process.start()
        assert (queue.get() == content(1, MIB)).all()
        process.join(60)
        assert process.exitcode == 0
        return re.sub("0x[0-9a-f]+", "", path.read_text())


def silent_at_its_exit(method):
    """What keeps `subprocess` to the end of the interpreter does not keep our connections.

    CPython 3.14 prints something at the end of such a child without us, too.
    """
    plain = _printed_at_exit(method)
    assert not plain or sys.version_info >= (3, 14), plain
    with oobpickle.enabled() as arena:
        assert _printed_at_exit(method) == plain
        assert arena.statistics().n_messages_out_of_band == 1


if __name__ == "__main__":
    inside.main()
