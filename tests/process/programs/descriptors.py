"""Somebody closes all descriptors, as daemons and servers do, and opens files of his own there."""

import contextlib
import fcntl
import gc
import multiprocessing
import os
import socket
import struct
import sys
import threading
import warnings

import inside
from inside import Token, content, fork, message, reap, verify

import oobpickle
from internals import inner

MIB = 1 << 20
MOST = 64  # more than any of these programs has open


@contextlib.contextmanager
def _enabled(**options):
    """Enabled, and what it says at the end may be that messages travelled in-band."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with oobpickle.enabled(**{"capacity": 64 * MIB, **options}) as arena:
            yield arena


class Files:
    """What is opened where the closed ones were; it must stay as it was."""

    def __init__(self, kind, numbers):
        self.kind, self.numbers = kind, sorted(numbers)
        made = [number for number in self.numbers if self._make(number)]
        self.before = {number: self._state(number) for number in made}

    def _make(self, number):
        if self.kind == "closed":
            return False
        if self.kind == "null":
            fd = os.open("/dev/null", os.O_RDWR)
        elif self.kind == "pipes":
            fd = self._one_of(*os.pipe())
        elif self.kind == "sockets":
            one, other = socket.socketpair()
            fd = self._one_of(one.detach(), other.detach())
        elif self.kind == "memfds":
            fd = os.memfd_create("theirs")
            os.write(fd, b"theirs" * 10_000)
        else:
            fd = os.open(f"/proc/self/fd/{self._common()}", os.O_RDWR)
        if fd != number:
            os.dup2(fd, number)
            os.close(fd)
        return True

    def _one_of(self, fd, other):
        os.dup2(other, 200)
        if other != 200:
            os.close(other)
        return fd

    def _common(self):
        if not hasattr(self, "common"):
            name = os.path.join("/tmp", f"descriptors-{os.getpid()}")
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.unlink(name)
            os.write(fd, b"theirs" * 10_000)
            self.common = 201
            os.dup2(fd, self.common)
            os.close(fd)
        return self.common

    def _state(self, number):
        status = os.fstat(number)
        state = [status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns]
        if self.kind in ("files", "memfds", "the same file"):
            state += [status.st_blocks, os.pread(number, 100_000, 0) == b"theirs" * 10_000]
            state += [self._is_locked(number)]
        return state

    def _is_locked(self, number):
        again = os.open(f"/proc/self/fd/{number}", os.O_RDWR)
        try:
            return any(_is_byte_locked(again, byte) for byte in range(20))
        finally:
            os.close(again)

    def assert_untouched(self):
        for number, state in self.before.items():
            found = self._state(number)
            assert found == state, f"{self.kind} {number}: {state} became {found}"


def _is_byte_locked(fd, byte):
    """Tell whether another open file description holds the byte."""
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, 36, query)  # F_OFD_GETLK
    return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK


def _close_all(kind, keep=(), only=None):
    """Close all descriptors but those, and open others on their numbers."""
    kept = {0, 1, 2, *(end if isinstance(end, int) else end.fileno() for end in keep)}
    numbers = []
    for fd in range(3, MOST) if only is None else only:
        if fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)
                numbers.append(fd)
    return Files(kind, numbers)


def _numbers_of_the_arena():
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "oobpickle-" in os.readlink(f"/proc/self/fd/{name}"):
                yield int(name)


def _send(end, seed):
    end.send(message(seed))


def _send_alone(end, seed):
    """Send, as a process that has nothing of its parent's files."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            assert "descriptors-" not in name, name
    _send(end, seed)


def _started(method, target, *args):
    process = multiprocessing.get_context(method).Process(target=target, args=args)
    process.start()
    return process


def _received_from(method, read, write, seed):
    target = _send if method == "fork" else _send_alone
    process = _started(method, target, write, seed)
    received = verify(read.recv(), seed)
    process.join()
    assert process.exitcode == 0
    return received


def _assert_in_band(arena, n_least):
    fallbacks = arena.statistics().fallbacks
    assert set(fallbacks) == {"detached"}, fallbacks
    assert fallbacks["detached"].n_messages >= n_least, fallbacks


KINDS = ("closed", "files", "memfds", "pipes", "sockets", "null")


def _each(case, arguments):
    """Run a case for each of them, in a child that has no arena yet."""
    for argument in arguments:
        reap(fork(case, argument))


# --- the parent


def closed_in_the_parent(method):
    """What it holds stays, what it starts sends to it, and what it sends arrives."""
    if method == "fork":
        _each(lambda kind: _close_in_the_parent(kind, method), KINDS)
    else:
        _close_in_the_parent({"spawn": "closed", "forkserver": "files"}[method], method)


def _close_in_the_parent(kind, method):
    with _enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        kept = [_received_from("fork", read, write, seed) for seed in range(3)]
        if method != "fork":
            kept.append(_received_from(method, read, write, 3))  # and its helpers are there
        assert arena.statistics().n_fallbacks == 0
        keep = [read, write]
        if method != "fork":
            keep += _of_the_helpers()
        theirs = _close_all(kind, keep)
        others = [_received_from(method, read, write, 4), _received_from("fork", read, write, 5)]
        thread = threading.Thread(target=_send, args=(write, 8))
        thread.start()
        others.append(verify(read.recv(), 8))
        thread.join()
        kept[0][1][:] = 0
        for one in [*kept[1:], *others]:
            verify(one)
        _assert_in_band(arena, 1)
        assert arena.statistics().n_participants >= 1
        arena.trim()
        theirs.assert_untouched()
    theirs.assert_untouched()
    for one in [*kept[1:], *others]:
        verify(one)
    with _enabled():  # and once more
        verify(_received_from("fork", read, write, 9))
    theirs.assert_untouched()


def _of_the_helpers():
    """What multiprocessing itself needs to start processes."""
    from multiprocessing.forkserver import _forkserver
    from multiprocessing.resource_tracker import _resource_tracker

    found = [_resource_tracker._fd, _forkserver._forkserver_alive_fd]
    return [fd for fd in found if fd is not None]


def daemonized():
    """A double fork and a new session, as daemons do it; install() instead of a block."""
    _each(_daemonize, ("closed", "files"))


def _daemonize(kind):
    oobpickle.install(capacity=64 * MIB)
    read, write = multiprocessing.Pipe(duplex=False)
    write.send(message(1))
    kept, done = verify(read.recv(), 1), Token()

    def first():
        os.setsid()
        reap(fork(second))

    def second():
        theirs = _close_all(kind, [read, write, *done.descriptors])
        more = [_received_from("fork", read, write, seed) for seed in (2, 3, 4)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for seed, array in enumerate(pool.imap(_content, range(4))):
                assert (array == content(seed, 300_000)).all()
        for one in (kept, *more):
            verify(one)
            one[1][:] = 9
        oobpickle.statistics()
        theirs.assert_untouched()
        done.give()

    pid = fork(first)
    done.take()
    reap(pid)
    verify(kept, 1)
    arena = oobpickle.install()
    inside.assert_table_in_order(arena)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        oobpickle.uninstall()


def the_warning_says_what_has_happened():
    """Somebody whose code makes a daemon of the process recognizes it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", oobpickle.FallbackWarning)
        with oobpickle.enabled(capacity=64 * MIB):
            read, write = multiprocessing.Pipe(duplex=False)
            _close_all("closed", [read, write])
            verify(_received_from("fork", read, write, 1), 1)
    (warning,) = [one for one in caught if one.category is oobpickle.FallbackWarning]
    for words in ("descriptors were closed", "os.closerange", "daemon", "before the block"):
        assert words in str(warning.message), warning.message


def _content(seed):
    return content(seed, 300_000)


# --- one of many


def closed_in_a_worker():
    """The others go on; what it holds is its own, and what it had comes back when it ends."""
    _each(_close_in_a_worker, ("closed", "memfds"))


def _close_in_a_worker(kind):
    with _enabled() as arena:
        there, back = multiprocessing.Pipe(), multiprocessing.Pipe()
        closed, go, filled = Token(), Token(), Token()

        def worker():
            kept = verify(there[1].recv(), 0)
            theirs = _close_all(
                kind, [there[1], back[1], *closed.descriptors, *go.descriptors, *filled.descriptors]
            )
            closed.give()
            go.take()
            received = [verify(there[1].recv(), seed) for seed in range(1, 6)]

            def grandchild():
                for one in (kept, *received):
                    verify(one)
                    one[1][:] = 3
                _send(back[1], 20)

            reap(fork(grandchild))
            _send(back[1], 21)
            filled.take()
            for one in (kept, *received):
                verify(one)
            oobpickle.statistics()
            theirs.assert_untouched()

        pid = fork(worker)
        _send(there[0], 0)
        closed.take()
        for seed in range(1, 6):
            _send(there[0], seed)  # out of band: it loads them all the same
        go.give()
        verify(back[0].recv(), 20)
        verify(back[0].recv(), 21)
        # It lives: nobody takes from it what it has.
        inner(arena).reclaim.reap()
        leases = []
        with contextlib.suppress(oobpickle.ArenaFullError):
            while True:
                leases.append(inner(arena).acquire([MIB], wait_timeout=0))
        for lease in leases:
            lease.destinations[0][:] = bytes(MIB)
        leases.clear()
        filled.give()
        reap(pid)
        inner(arena).reclaim.reap()
        read, write = multiprocessing.Pipe(duplex=False)
        n_before = arena.statistics().n_messages_out_of_band
        write.send(message(30))
        verify(read.recv(), 30)
        assert arena.statistics().n_messages_out_of_band == n_before + 1
        inside.assert_table_in_order(arena)


def some_are_closed():
    """Any of them alone: data, table, the locks file, the proof of life."""
    _each(_close_one, range(4))


def _close_one(which):
    with _enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        write.send(message(0))
        kept = verify(read.recv(), 0)
        fds = inside.descriptors_of(arena)
        theirs = _close_all("memfds", only=[fds[which]])
        if which == 0:
            _received_from("spawn", read, write, 1)
        more = _received_from("fork", read, write, 5)

        def child():
            for one in (kept, more):
                verify(one)
                one[1][:] = 1
            _send(write, 6)

        pid = fork(child)
        verify(read.recv(), 6)
        reap(pid)
        for one in (kept, more):
            verify(one)
        arena.statistics()
        theirs.assert_untouched()
    theirs.assert_untouched()
    verify(kept)


def a_fork_without_descriptors():
    """Held blocks become ordinary memory all the same; their pages are given back, and used again.

    Once their arrays have died, the ranges show the file again.
    """
    arena = oobpickle.install(capacity=256 * MIB)
    read, write = multiprocessing.Pipe(duplex=False)
    held = []
    for seed, nbytes in enumerate((70_001, 1_000_000, 5_000_000)):
        write.send(message(seed, nbytes))
        held.append(verify(read.recv(), seed))
    resident = arena.statistics().nbytes_resident
    watcher = os.dup(inner(arena).descriptors[0])
    theirs = _close_all("files", [read, write, watcher])
    written, seen = Token(), Token()

    def child():
        written.take()
        for one in held:
            verify(one)
            one[1][:] = 201
        seen.give()
        assert all((one[1] == 201).all() for one in held)

    pid = fork(child)
    assert os.fstat(watcher).st_blocks * 512 < resident
    assert arena.statistics().n_copied_at_fork == 3
    assert arena.statistics().n_shared_after_fork == 0
    for one in held:
        one[1][:] = 101
    written.give()
    seen.take()
    assert all((one[1] == 101).all() for one in held)
    reap(pid)
    theirs.assert_untouched()
    addresses = [inside.address(one[1]) for one in held]
    held.clear()
    one = None
    for address in addresses:
        assert not inside.is_private(address)
    os._exit(0)


def a_message_in_a_range_that_is_private():
    """The range was made private by a fork, and lost its descriptor: the file is read elsewise."""
    with _enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        there, back = multiprocessing.Pipe(duplex=False)
        _send(write, 0)
        held, go = verify(read.recv(), 0), Token()

        def child():
            theirs = _close_all("files", [there, *go.descriptors])
            go.give()
            received = verify(there.recv(), 1)
            verify(held, 0)
            received[1][:] = 1
            verify(held, 0)
            theirs.assert_untouched()

        pid = fork(child)
        go.take()
        held = None
        gc.collect()
        inner(arena).blocks.reap()
        _send(back, 1)
        reap(pid)
        assert arena.statistics().n_fallbacks == 0
        there.close()


def closed_while_another_thread_sends():
    """Whatever step it is in the middle of, nobody is kept waiting, and no message is wrong."""
    with _enabled() as arena:
        for _ in range(4):
            _close_while_sending("closed")
            _close_while_sending("files")
        read, write = multiprocessing.Pipe(duplex=False)
        n_before = arena.statistics().n_messages_out_of_band
        for seed in range(5):
            _send(write, seed)
            verify(read.recv(), seed)
        assert arena.statistics().n_messages_out_of_band == n_before + 5
        inner(arena).reclaim.reap()
        inside.assert_table_in_order(arena)


def _close_while_sending(kind):
    read, write = multiprocessing.Pipe(duplex=False)
    closed, started = Token(), Token()

    def worker():
        def send():
            for seed in range(30):
                _send(write, seed)
                if seed == 5:
                    started.give()

        sender = threading.Thread(target=send)
        sender.start()
        started.take()
        # Not all: whoever reads a file has a number for a moment that nobody may close.
        theirs = _close_all(kind, only=list(_numbers_of_the_arena()))
        sender.join()
        theirs.assert_untouched()
        closed.take()  # it lives on

    pid = fork(worker)
    for seed in range(30):
        verify(read.recv(), seed)
    closed.give()
    reap(pid)


def closed_before_the_child_has_them():
    """A child whose main module closes everything gets its arguments, and its files stay open."""
    os.environ["CLOSE_ALL"] = "1"
    with _enabled():
        process = _started("spawn", _check, content(1, 500_000))
        process.join()
        assert process.exitcode == 0


def _check(array):
    assert (array == content(1, 500_000)).all()
    _theirs.assert_untouched()


def _needed_by_spawn():
    """What `multiprocessing.spawn` has open while it imports the main module."""
    frame, found = sys._getframe(1), set()
    while frame is not None:
        names = ("fd", "parent_sentinel", "tracker_fd", "pipe_handle")
        found |= {frame.f_locals.get(name) for name in names}
        frame = frame.f_back
    return [fd for fd in found if isinstance(fd, int)]


if __name__ == "__mp_main__" and "CLOSE_ALL" in os.environ:
    _theirs = _close_all("files", _needed_by_spawn())


def no_strange_file_is_opened():
    """Who looks for an arena by the name that its sender gave opens nothing that is not of one."""
    from oobpickle._memory import files

    with _enabled() as arena:
        name = inner(arena).name
        fds = [os.dup(fd) for fd in inner(arena).descriptors]
        theirs = _close_all("files", fds)
        opened = []
        sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
        with contextlib.suppress(OSError):
            files.open_by_name(name)
            raise AssertionError("opened")
        assert all(flags & os.O_PATH for _, _, flags in opened), opened
        theirs.assert_untouched()


if __name__ == "__main__":
    inside.main()
