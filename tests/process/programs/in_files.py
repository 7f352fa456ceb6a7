"""Arrays of loaded files between processes: as their place in the file, or by value."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Client, Listener
from pathlib import Path

import inside
import numpy as np
from inside import KILLED, Token, content, eventually, fork, message, reap, verify

import oobpickle

NOBODY = 65534
N_WORKERS = 4
NBYTES = 16 << 20
_model = None


class _Holder:
    """A user's object, with a model somewhere in it."""

    def __init__(self, model):
        self.parts = {"models": [model], "name": "holder"}


@contextlib.contextmanager
def _file(*models):
    """Yield the path of a file with models that `verify` knows."""
    with tempfile.TemporaryDirectory(prefix="files-") as folder:
        path = Path(folder, "model")
        oobpickle.dump(models or [message(1), message(2)], path)
        yield path


def _mappings(path):
    """Return the ranges at which a file, which may be gone, is mapped; nobody can write there."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *name = line.split(maxsplit=5)
        if "".join(name).removesuffix(" (deleted)") == os.fspath(path):
            assert permissions == "r--s"
            found.append([int(part, 16) for part in span.split("-")])
    return found


def _is_in(path, array):
    address = inside.address(array)
    return any(low <= address < high for low, high in _mappings(path))


def _sum(path, found, seed=1):
    """What a task makes of a model."""
    verify(found, seed)
    assert _is_in(path, found[1])
    assert not found[1].flags.writeable
    assert len(_mappings(path)) == 1
    return int(found[1].sum())


def _sum_of_parts(path, holder, part):
    assert _is_in(path, part)
    return _sum(path, holder.parts["models"][0]), int(part.sum())


def _back(path, found):
    """Return a part of what was received, and another with a change."""
    first, second = found
    changed = second[1].copy()
    changed[:] = 5
    return first[1][100_000:], changed


def _put(results, path, found):
    results.put(_sum(path, found))


def _load_and_return(path):
    global _model
    _model = oobpickle.load(path, "r")
    return _model[1][1]


def _of_global(_):
    return _model[0][1][: 500 << 10]


def everywhere(method):
    """Arguments, results, slices, at any depth; whatever the way and the start method."""
    context = multiprocessing.get_context(method)
    expected = int(content(1, 1_000_000).sum())
    global _model
    with _file() as path, oobpickle.enabled() as arena:
        _model = model = oobpickle.load(path, "r")
        results = context.SimpleQueue()
        process = context.Process(target=_put, args=(results, path, model[0]))
        process.start()
        assert results.get() == expected
        process.join()
        with context.Pool(1) as pool:
            part = model[0][1][200_000:900_000]
            found = pool.apply(_sum_of_parts, (path, _Holder(model[0]), part))
            assert found == (expected, int(part.sum()))
            assert pool.starmap(_sum, [(path, model[0])] * 4, 1) == [expected] * 4
            first, second = pool.apply(_back, (path, model))
            assert (first == model[0][1][100_000:]).all()
            assert _is_in(path, first)
            assert (second == 5).all()
            assert not _is_in(path, second)
            own = pool.apply(_load_and_return, (path,))
            assert (own == model[1][1]).all()
            assert _is_in(path, own)
            if method == "fork":
                inherited = pool.map(_of_global, range(4), 1)
                assert all((one == model[0][1][: 500 << 10]).all() for one in inherited)
                assert all(_is_in(path, one) for one in inherited)
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            total = executor.submit(_sum, path, model[1], 2).result()
            assert total == int(content(2, 1_000_000).sum())
        statistics = arena.statistics()
        assert statistics.n_fallbacks == 0
        assert statistics.nbytes_in_files > 9_000_000
        assert statistics.nbytes_out_of_band < 1_100_000, statistics  # what was changed
        assert "sent as their place" in str(statistics)
        assert len(_mappings(path)) == 1
        _model = inherited = None
        del model, part, first, second, own
        results.put(message(3))  # what has arrived is kept no longer
        verify(results.get(), 3)
        inside.assert_empty(arena)
        assert _mappings(path) == []


def whatever_becomes_of_it():
    """The file stays, or is deleted or replaced, and the sender lives, ends or is killed."""
    with oobpickle.enabled() as arena:
        for end, code in {"alive": None, "ended": 0, "killed": KILLED}.items():
            for what in ("stays", "deleted", "replaced"):
                _send_and_receive(end, code, what)
        assert arena.statistics().n_fallbacks == 0
        inside.assert_empty(arena)


def _send_and_receive(end, code, what):
    read, write = multiprocessing.Pipe(duplex=False)
    gone, done = Token(), Token()
    with _file() as path:

        def send():
            model = oobpickle.load(path, "r")
            write.send(model)
            done.give()
            if end != "ended":
                gone.take()
            verify(model[0], 1)

        pid = fork(send)
        done.take()
        if end == "killed":
            os.kill(pid, signal.SIGKILL)
        if code is not None:
            reap(pid, code)
        if what != "stays":
            path.unlink()
        if what == "replaced":
            oobpickle.dump(np.zeros(9), path)
        if code is None or what == "stays":
            first, second = read.recv()
            verify(first, 1)
            verify(second, 2)
            assert _is_in(path, first[1])
        else:
            _refused(read.recv, path)
        write.send(message(3))
        verify(read.recv(), 3)  # the channel goes on
        if code is None:
            gone.give()
            reap(pid)
    first = second = None
    assert _mappings(path) == []


def _refused(load, path):
    """Assert that a message cannot be loaded; return what is said."""
    story = "it was loaded"
    try:
        load()
    except oobpickle.EnvelopeError as error:
        story = str(error)
    assert f"in the file {path}, which process " in story
    return story


def a_file_on_its_way():
    """Whoever replaces or deletes a file, and has dropped its arrays, has it until they arrive."""
    with oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        with _file() as path:
            for n in range(5):
                oobpickle.dump(np.full(250_000, n), path)
                write.send(oobpickle.load(path, "r"))
            path.unlink()
            gc.collect()
            assert len(_mappings(path)) == 5
            for n in range(5):
                found = read.recv()
                assert (found == n).all()
                assert _is_in(path, found)
                del found
            write.send(message(3))  # with each message it is asked which have arrived
            verify(read.recv(), 3)
            assert not _mappings(path)
        inside.assert_empty(arena)


def files_of_a_loop():
    """A child that goes on reading, while its parent replaces the file again and again."""
    with _file() as path, oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)

        def worker():
            for n in range(200):
                found = read.recv()
                assert (found == n).all()

        pid = fork(worker)
        for n in range(200):
            oobpickle.dump(np.full(50_000, n), path)
            write.send(oobpickle.load(path, "r"))
        reap(pid)
        assert arena.statistics().nbytes_in_files == 200 * 400_000
        assert arena.statistics().n_fallbacks == 0


def a_task_of_a_pool():
    """A task whose file was written on its way fails, and the pool goes on."""
    with _file() as path, oobpickle.enabled() as arena:
        begun, go_on = Token(), Token()
        with multiprocessing.get_context("fork").Pool(1, _global, (begun, go_on)) as pool:
            waiting = pool.apply_async(_wait)
            begun.take()
            job = pool.apply_async(_sum, (path, oobpickle.load(path, "r")[0]))
            eventually(lambda: arena.statistics().nbytes_in_files)
            os.utime(path, ns=(1, 1))
            go_on.give()
            waiting.get()
            _refused(job.get, path)
            assert pool.apply(abs, (-3,)) == 3


def _global(*tokens):
    global _model
    _model = tokens


def _wait():
    begun, go_on = _model
    begun.give()
    go_on.take()


def another_user():
    """A worker that has given up its privileges can neither open the file nor see its sender."""
    with _file() as path, oobpickle.enabled() as arena:
        path.chmod(0o600)
        read, write = multiprocessing.Pipe(duplex=False)
        sent = Token()

        def worker():  # forked before: else it inherits the mapping of its parent
            sent.take()
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            assert "found Permission denied" in _refused(read.recv, path)
            verify(read.recv(), 3)

        pid = fork(worker)
        write.send(oobpickle.load(path, "r"))
        write.send(message(3))
        sent.give()
        reap(pid)
        assert arena.statistics().nbytes_in_files == 2_000_000


def who_cannot_open_it_sends_the_bytes():
    """A sender that has given up its privileges, and still has the file mapped."""
    with _file() as path, oobpickle.enabled() as arena:
        path.chmod(0o600)
        read, write = multiprocessing.Pipe(duplex=False)
        model = oobpickle.load(path, "r")

        def worker():
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            write.send(model)

        pid = fork(worker)
        found = read.recv()
        reap(pid)
        verify(found[0], 1)
        assert not _is_in(path, found[0][1])
        assert arena.statistics().nbytes_in_files == 0


def another_root():
    """The path of the file leads nowhere there, and there is no /proc to find the sender in."""
    with _file() as path, oobpickle.enabled():
        read, write = multiprocessing.Pipe(duplex=False)
        sent = Token()

        def worker():  # forked before: else it inherits the mapping of its parent
            sent.take()
            with tempfile.TemporaryDirectory() as folder:
                os.chroot(folder)
                os.chdir("/")
                assert "found No such file" in _refused(read.recv, path)
                os._exit(0)

        pid = fork(worker)
        write.send(oobpickle.load(path, "r"))
        sent.give()
        reap(pid)


def another_mount():
    """Where something else lies at the path, the file is found through its sender."""
    with _file() as path, tempfile.TemporaryDirectory() as folder, oobpickle.enabled():
        other = Path(folder, "other")
        oobpickle.dump(np.zeros(9), other)
        read, write = multiprocessing.Pipe(duplex=False)
        begun, sent = Token(), Token()

        def worker():
            assert ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0  # os.unshare is new in 3.12
            _mount("none", "/", _MS_REC | _MS_PRIVATE)
            _mount(other, path, _MS_BIND)
            assert len(oobpickle.load(path)) == 9
            begun.give()
            sent.take()
            verify(read.recv()[0], 1)
            os._exit(0)

        pid = fork(worker)
        begun.take()
        model = oobpickle.load(path, "r")
        write.send(model)
        sent.give()
        reap(pid)
        del model


_CLONE_NEWNS = 1 << 17
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18


def _mount(what, where, flags):
    arguments = [os.fsencode(what), os.fsencode(where), None, flags, None]
    if ctypes.CDLL(None, use_errno=True).mount(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount")


def closed_descriptors():
    """A process that has closed all descriptors sends and receives by the path."""
    with _warned(), _file() as path, oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        model = oobpickle.load(path, "r")
        write.send(model)

        def daemon():
            os.closerange(3, read.fileno())
            os.closerange(read.fileno() + 1, 100)
            verify(read.recv()[0], 1)
            os._exit(0)

        reap(fork(daemon))
        assert arena.statistics().nbytes_in_files == 2_000_000


def one_copy_for_all():
    """All together have the model that each of them has read once in memory."""
    with _file(content(1, NBYTES)) as path, oobpickle.enabled() as arena:
        pipes = [(multiprocessing.Pipe(), Token()) for _ in range(N_WORKERS)]
        pids = [fork(_read_all, path, theirs, done) for (_, theirs), done in pipes]
        ends = [ours for (ours, _), _ in pipes]
        for end in ends:
            assert end.recv() == "ready"
        (model,) = oobpickle.load(path, "r")
        expected = int(model.sum())
        for end in ends:
            end.send(model)
        assert [end.recv() for end in ends] == [expected] * N_WORKERS
        share = sum(_pss(pid, path) for pid in [os.getpid(), *pids]) / NBYTES
        for (_, done), pid in zip(pipes, pids, strict=True):
            done.give()
            reap(pid)
        assert 0.99 < share < 1.01, share
        assert arena.statistics().nbytes_in_files == N_WORKERS * NBYTES


def _read_all(path, end, done):
    end.send("ready")
    model = end.recv()
    assert _is_in(path, model)  # no copy
    end.send(int(model.sum()))
    done.take()


def _pss(pid, path):
    """Return a process's share of the pages of a file that it has mapped, bytes."""
    _, mapping = Path(f"/proc/{pid}/smaps").read_text().split(f"{path}\n")
    (size,) = [line.split()[1] for line in mapping.splitlines()[:10] if line.startswith("Pss:")]
    return int(size) << 10


def strangers():
    """What is no process of the block, as over TCP, or is older than it, gets the bytes."""
    here, there = multiprocessing.Pipe()

    def older():
        here.close()
        verify(there.recv(), 1)
        assert not _mappings(path)
        verify(there.recv(), 2)  # it was invited to join

    with _file() as path:
        pid = fork(older)
        there.close()
        with _warned(), oobpickle.enabled() as arena:
            model = oobpickle.load(path, "r")
            with (
                Listener(("localhost", 0)) as listener,
                Client(listener.address) as client,
                listener.accept() as accepted,
            ):
                sender = threading.Thread(target=client.send, args=(model[0],))
                sender.start()
                assert not _is_in(path, verify(accepted.recv(), 1)[1])
                sender.join()
            here.send(model[0])
            statistics = arena.statistics()
            assert statistics.nbytes_in_files == 0
            assert statistics.n_fallbacks == 2
            assert statistics.nbytes_fallbacks > 2_000_000  # what was sent, and not its place
            here.send(model[1])
            reap(pid)
            path.unlink()
            assert pickle.loads(pickle.dumps(model))[1][0] == 2


@contextlib.contextmanager
def _warned():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        yield


def after_the_block():
    """What has arrived stays; a message on its way arrives; nothing is left open."""
    before = sorted(os.listdir("/proc/self/fd"))
    with _file() as path:
        with oobpickle.enabled():
            read, write = multiprocessing.Pipe(duplex=False)
            model = oobpickle.load(path, "r")
            write.send(model)
            write.send(model)
            first = read.recv()
        path.unlink()
        second = read.recv()
        verify(first[0], 1)
        verify(second[0], 1)
        assert _is_in(path, second[0][1])
        del model, first, second
        gc.collect()
        assert _mappings(path) == []
        read.close()
        write.close()
        with oobpickle.enabled():
            pass  # what is not needed any more ends here, at the latest
        assert sorted(os.listdir("/proc/self/fd")) == before


def killed_receivers():
    """What a dead process had loaded, received and sent keeps nothing, and others go on."""
    with _file() as path, oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        there, back = multiprocessing.Pipe(duplex=False)
        model = oobpickle.load(path, "r")

        def worker():
            received, own = read.recv(), oobpickle.load(path, "r")
            back.send((received[0], own[1]))
            os.kill(os.getpid(), signal.SIGKILL)

        write.send(model)
        write.send(model)
        reap(fork(worker), KILLED)
        first, second = there.recv()
        verify(first, 1)
        verify(second, 2)
        reap(fork(lambda: verify(read.recv()[1], 2)))
        del first, second, model
        write.send(message(3))  # what has arrived is kept no longer
        verify(read.recv(), 3)
        inside.assert_empty(arena)
        assert _mappings(path) == []


def a_fork_while_files_are_in_use():
    """Parent and child have what was received, and both send it on; each drops its own."""
    with _file() as path, oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        model = oobpickle.load(path, "r")
        write.send(model)
        first, second = read.recv()
        del model

        def child():
            nonlocal first
            write.send(second)
            first = None
            verify(second, 2)
            assert len(_mappings(path)) == 1

        pid = fork(child)
        found = read.recv()
        verify(found, 2)
        assert _is_in(path, found[1])
        reap(pid)
        verify(first, 1)
        write.send(first)
        verify(read.recv(), 1)
        assert arena.statistics().nbytes_in_files == 4_000_000


def loky():
    """Arguments and results of its workers."""
    from loky import get_reusable_executor

    with _warned(), _file() as path, oobpickle.enabled() as arena:
        model = oobpickle.load(path, "r")
        executor = get_reusable_executor(1)
        first, second = executor.submit(_back, path, model).result()
        assert (second == 5).all()
        assert (first == model[0][1][100_000:]).all()
        assert _is_in(path, first)
        assert arena.statistics().nbytes_in_files == 2_900_000
        executor.shutdown(wait=True)


if __name__ == "__main__":
    inside.main()
