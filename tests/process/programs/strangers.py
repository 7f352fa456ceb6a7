"""Strangers: what is no participant, or could not become one, gets and sends everything whole."""

import contextlib
import ctypes
import errno
import multiprocessing
import multiprocessing.popen_spawn_posix
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from multiprocessing.connection import Client, Listener

import inside
import numpy as np
from inside import Token, eventually, fork, is_in_arena, message, reap, verify

import oobpickle
import oobpickle._api
from oobpickle._memory import files
from oobpickle._native import core
from table import Table

MIB = 1 << 20
N = 3
NOBODY = 65534
POLL_S = 20

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)
_kept = []

#: Never imports oobpickle. Answers each ``(seed, array)`` with what only the right bytes give.
_STRANGER = """
import ctypes, os, sys
sys.modules["oobpickle"] = None  # as where it is not installed
from multiprocessing.connection import Client, Connection, Listener
import numpy

def work(kind, where, user):
    if kind == "call":
        connection = Client(where, authkey=b"key")
    elif kind == "listen":
        with Listener(where, authkey=b"key") as listener:
            connection = listener.accept()
    else:
        connection = Connection(where)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        ctypes.CDLL(None).prctl(4, 1)  # dumpable, as any program that this user starts
    connection.send((os.getpid(), os.geteuid()))
    while (received := connection.recv()) is not None:
        seed, array = received
        connection.send((seed, type(array).__name__, array.flags.writeable, 255 - array))
"""


@contextlib.contextmanager
def _stranger(kind, where, *, user=None, prefix=(), fds=(), orphan=False):
    """A program that has not joined, until the block is left."""
    code = f"{_STRANGER}\nwork({kind!r}, {where!r}, {user!r})"
    command = [*prefix, sys.executable, "-c", code]
    if orphan:  # no descendant of ours either
        reap(fork(_start, command, fds))
        yield
        return
    with subprocess.Popen(command, pass_fds=fds) as program:
        yield
    assert program.returncode == 0


def _start(command, fds):
    _kept.append(subprocess.Popen(command, pass_fds=fds))


def _call(address):
    """Connect as soon as somebody listens."""

    def connect():
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return Client(address, authkey=b"key")

    return eventually(connect)


def _receive(connection):
    assert connection.poll(POLL_S), f"nothing within {POLL_S} s"
    return connection.recv()


def _since(before, after):
    """Return the messages out of band, and how many in-band and their bytes by reason."""
    counted = {
        reason: (
            found.n_messages - getattr(before.fallbacks.get(reason), "n_messages", 0),
            found.nbytes - getattr(before.fallbacks.get(reason), "nbytes", 0),
        )
        for reason, found in after.fallbacks.items()
    }
    return after.n_messages_out_of_band - before.n_messages_out_of_band, counted


def _exchange_in_band(arena, connection):
    """Both directions: the whole content, the types, and exactly what is counted."""
    before, nbytes = arena.statistics(), 0
    for seed in range(N):
        sent = message(seed)
        connection.send(sent)
        reply = _receive(connection)
        assert reply[:3] == (seed, "ndarray", True), reply[:3]
        assert type(reply[3]) is np.ndarray
        assert reply[3].dtype == np.uint8
        nbytes += oobpickle.dumps(sent).nbytes + len(pickle.dumps(reply))
        verify((seed, 255 - reply[3]), seed)
        reply[3][:] = 0
        verify(sent, seed)
    assert _since(before, arena.statistics()) == (0, {"channel": (2 * N, nbytes)})


@contextlib.contextmanager
def _enabled(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with oobpickle.enabled(**options) as arena:
            yield arena
            assert oobpickle.statistics().n_blocks["leased"] == 0
            inside.assert_table_in_order(arena)


# --- programs that never heard of the library


def tcp_within_one_tree():
    """Both ends have joined, but nobody can say who reads from a TCP connection."""
    with _enabled() as arena, Listener(("127.0.0.1", 0), authkey=b"key") as listener:
        pid = fork(_echo_over, listener.address)
        with listener.accept() as connection:
            for seed in range(N):
                connection.send(message(seed))
                verify(_receive(connection), seed)
        reap(pid)
        nbytes = 2 * sum(oobpickle.dumps(message(seed)).nbytes for seed in range(N))
        assert _since(_nothing(), arena.statistics()) == (0, {"channel": (2 * N, nbytes)})


def _echo_over(address):
    with Client(address, authkey=b"key") as connection:
        for seed in range(N):
            connection.send(verify(_receive(connection), seed))


def it_calls(family, when, *prefix):
    """A program that is older than the block, or not; no descendant, or one."""
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", 0) if family == "AF_INET" else None
        listener = stack.enter_context(Listener(address, family, authkey=b"key"))
        arena = stack.enter_context(_enabled()) if when == "inside" else None
        stack.enter_context(
            _stranger("call", listener.address, prefix=prefix, orphan=when == "before")
        )
        connection = stack.enter_context(listener.accept())
        pid, _ = _receive(connection)
        assert (pid < 10) is ("--pid" in prefix), pid  # among the first of a namespace
        if arena is None:
            arena = stack.enter_context(_enabled())
        _exchange_in_band(arena, connection)
        connection.send(None)


def we_call(when):
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        address = os.path.join(folder, "socket")
        arena = stack.enter_context(_enabled()) if when == "inside" else None
        stack.enter_context(_stranger("listen", address, orphan=when == "before"))
        connection = stack.enter_context(_call(address))
        _receive(connection)
        if arena is None:
            arena = stack.enter_context(_enabled())
        _exchange_in_band(arena, connection)
        connection.send(None)


def older_pipe(user, *prefix):
    """An end that it inherited before the block; we have that end open too, or not."""
    user = int(user) if user else None
    for keep in (True, False):
        here, there = multiprocessing.Pipe()
        fd = there.fileno()
        with here, there, _stranger("pipe", fd, user=user, prefix=prefix, fds=[fd]):
            pid, found = _receive(here)
            assert (pid < 10) is ("--pid" in prefix), pid
            assert user is None or found == user
            if not keep:
                there.close()
            with _enabled() as arena:
                _exchange_in_band(arena, here)
            here.send(None)


def program_with_a_block_of_its_own():
    """Two arenas, and each side counts what it sends."""
    with tempfile.TemporaryDirectory() as folder:
        address = os.path.join(folder, "socket")
        command = [sys.executable, "-W", "error", __file__, "_other_block", address]
        with subprocess.Popen(command) as program, _call(address) as connection:
            with _enabled() as arena:
                for seed in range(N):
                    connection.send(message(seed))
                    verify(_receive(connection), seed)
                done = _since(_nothing(), arena.statistics())
                nbytes = sum(oobpickle.dumps(message(seed)).nbytes for seed in range(N))
                assert done == (0, {"channel": (N, nbytes)}), done
                connection.send(done)
            assert program.wait(POLL_S) == 0


def _other_block(address):
    with (
        _enabled() as arena,
        Listener(address, authkey=b"key") as listener,
        listener.accept() as connection,
    ):
        for seed in range(N):
            connection.send(verify(_receive(connection), seed))
        assert _since(_nothing(), arena.statistics()) == _receive(connection)


def older_worker_with_another_version(method):
    """It declines the invitation, and goes on in-band."""
    with multiprocessing.get_context(method).Pool(1, _become_another_version) as pool:
        pool.apply(int)
        with _enabled() as arena:
            for seed in range(N):
                verify(pool.apply_async(verify, (message(seed),)).get(POLL_S), seed)
            n_out_of_band, counted = _since(_nothing(), arena.statistics())
            assert (n_out_of_band, counted["channel"][0]) == (0, 2 * N), counted
        pool.close()
        pool.join()


def _become_another_version():
    def refuse(_):
        raise oobpickle.ArenaError("another version")

    files._constants = refuse


def _nothing():
    return oobpickle._statistics.nothing()


# --- children that something is taken away from


def _checked(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _unshare_mounts():
    """Privileged or not: then in a user namespace, where nobody has a name."""
    if _libc.unshare(_CLONE_NEWNS) != 0:
        _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    _checked(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))


def _mount_on_proc(kind):
    _checked(_libc.mount(kind, b"/proc", kind, ctypes.c_ulong(0), None))


def _limit_address_space(nbytes):
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _take_away(what, folder):
    if what == "descriptors":
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    elif what == "address space":
        _limit_address_space(200 * MIB)  # enough for the table
    elif what == "most address space":
        _limit_address_space(60 * MIB)
    elif what == "files":
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if "oobpickle" in os.readlink(f"/proc/self/fd/{fd}"):
                    os.close(int(fd))
    elif what == "proc":
        _unshare_mounts()
        _mount_on_proc(b"tmpfs")
    elif what == "root":
        os.chroot(folder)
        os.chdir("/")
    elif what == "user":
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    elif what == "swap":
        page = ctypes.create_string_buffer(resource.getpagesize())
        _kept.append(page)
        _checked(_libc.mlock(page, resource.getpagesize()))
    elif what == "slots":
        core.arm("participant.slot", 1, -errno.EAGAIN)
    elif what == "hook":
        oobpickle.uninstall()
    else:
        raise ValueError(what)


if __name__ == "__mp_main__" and "TAKEN_AWAY" in os.environ:
    _take_away(os.environ["TAKEN_AWAY"], os.environ["FOLDER"])


def child_that_cannot_attach(what):
    """Its main module takes something away before the arena comes: it loads, and answers."""
    with tempfile.TemporaryDirectory() as folder, _enabled() as arena:
        here, there = multiprocessing.Pipe()
        os.environ.update(TAKEN_AWAY=what, FOLDER=folder)
        child = multiprocessing.get_context("spawn").Process(target=_echo_all, args=(there,))
        child.start()
        there.close()
        before, nbytes = arena.statistics(), 0
        for seed in range(N):
            here.send(message(seed))
            verify(_receive(here), seed)[1][:] = 0
            nbytes += message(seed)[1].nbytes
        here.send(None)
        child.join(POLL_S)
        assert child.exitcode == 0
        n_out_of_band, counted = _since(before, arena.statistics())
        reason = "channel" if what == "files" else "detached"
        assert arena.statistics().n_copied_on_receive == before.n_copied_on_receive
        if what in ("address space", "most address space", "swap"):  # it needs little of it
            assert (n_out_of_band, counted) == (2 * N, {})
            return
        assert n_out_of_band == N, n_out_of_band
        assert set(counted) == {reason}, counted
        assert counted[reason][0] == N, counted
        assert nbytes < counted[reason][1] < nbytes + 300 * N, counted


def _echo_all(connection):
    while (received := connection.recv()) is not None:
        connection.send(verify(received))


def worker_whose_initializer_takes_away(what, method):
    """Its pool's pipes and a socket: nothing is lost, and all is counted."""
    with tempfile.TemporaryDirectory() as folder, _enabled() as arena:
        os.mkdir(os.path.join(folder, "proc"))
        context = multiprocessing.get_context(method)
        with (
            Listener(None, "AF_UNIX") as listener,
            context.Pool(1, _connect_and_take_away, (listener.address, what, folder)) as pool,
        ):
            connection = listener.accept()
            for seed in range(N):
                verify(pool.apply_async(verify, (message(seed),)).get(POLL_S), seed)
            sending = pool.apply_async(_echo_over_kept, (N,))
            for seed in range(N):
                connection.send(message(seed))
                verify(_receive(connection), seed)
            assert sending.get(POLL_S) is None
            connection.close()
            pool.close()
            pool.join()
        n_out_of_band, counted = _since(_nothing(), arena.statistics())
        assert n_out_of_band + sum(n for n, _ in counted.values()) == 4 * N, counted
        assert n_out_of_band >= N, n_out_of_band
        assert set(counted) <= {"channel", "detached"}, counted
        # What is mapped already stays mapped; and the block of its parent is not its own to leave.
        harmless = what in ("address space", "swap") or (what, method) == ("hook", "fork")
        assert (n_out_of_band == 4 * N) is harmless, counted


def _connect_and_take_away(address, what, folder):
    connection = Client(address)
    _kept.append(connection)
    _take_away(what, folder)


def _echo_over_kept(n):
    connection = _kept[0]
    for seed in range(n):
        connection.send(verify(connection.recv(), seed))


def what_is_in_flight_stays(hidden_by):
    """Who cannot see a process in /proc must not free what it is about to read."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _enabled(capacity=16 * MIB, wait_timeout=0) as arena,
    ):
        os.mkdir(os.path.join(folder, "proc"))
        read, write = multiprocessing.Pipe(duplex=False)
        go = Token()

        def look():
            read.close()
            write.close()
            if hidden_by == "namespace":
                if _libc.unshare(_CLONE_NEWPID) != 0:
                    _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID))
                reap(fork(look_inside))
            else:
                _take_away(hidden_by, folder)
                arena.trim()

        def look_inside():
            assert os.getpid() == 1
            arena.trim()
            _unshare_mounts()
            _mount_on_proc(b"proc")
            arena.trim()

        def receive():
            write.close()
            go.take()
            verify(read.recv(), 1)

        reap(fork(write.send, message(1)))
        reader = fork(receive)
        read.close()
        write.close()
        reap(fork(look))
        assert arena.statistics().n_blocks["in_flight"] == 1
        go.give()
        reap(reader)
        assert arena.statistics().n_reclaimed == 0


def faulty_participant(seed):
    """It writes over the table, and the others go on: whole messages, or errors of ours."""
    rng = random.Random(int(seed))
    with _enabled_but_damaged(capacity=64 * MIB, wait_timeout=0) as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        there, back = multiprocessing.Pipe(duplex=False)
        ask, asked = multiprocessing.Pipe()
        scribbler = fork(_scribble, arena, asked, rng.random())
        worker = fork(_answer_or_refuse, read, back)
        held, n_refused, n_inside = [], 0, 0
        for n in range(_N_DAMAGED):
            # The last time also what says that the arena is closed.
            ask.send("all" if n == _N_DAMAGED - 1 else "most")
            if n % 2:
                ask.recv()  # or while the message is on its way
            write.send(message(n, rng.choice((200_000, 1_000_000, 3_000_000))))
            if not n % 2:
                ask.recv()
            assert there.poll(POLL_S), f"no answer to message {n}"
            try:
                answer = there.recv()
            except oobpickle.EnvelopeError:
                n_refused += 1
            else:
                n_refused += answer == "refused"
                if answer != "refused":
                    held.append(verify(answer, n))
                    n_inside += is_in_arena(arena, answer[1])
            for one in held:
                verify(one)
            del held[: len(held) - 3]
        write.send(None)
        ask.send(None)
        reap(worker)
        reap(scribbler)
        for one in held:
            verify(one)
        statistics = arena.statistics()
        assert statistics.n_quarantined > 0, statistics
        # Not of the statistics: those have been written over too.
        assert n_inside >= 5, n_inside
        assert n_refused < _N_DAMAGED // 4, n_refused
        assert set(statistics.fallbacks) <= {*_REASONS}, statistics
        del held, one, answer


_N_DAMAGED = 60
_REASONS = oobpickle._fallback.REASONS


@contextlib.contextmanager
def _enabled_but_damaged(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with oobpickle.enabled(**options) as arena:
            yield arena


def _scribble(arena, asked, seed):
    rng, table = random.Random(seed), Table.of(arena)
    words = np.frombuffer(table.bytes, np.uint64)
    rows, participants = (core.LAYOUT[f"table.{name}"] // 8 for name in ("rows", "participants"))
    passed, closed = (core.LAYOUT[f"header.{name}"] // 8 for name in ("n_passed", "closed"))
    first, last = (core.LAYOUT[f"header.{name}"] // 8 for name in ("lock", "bank"))
    while (which := asked.recv()) is not None:
        for _ in range(3):
            n_rows = min(table.n_rows, 1000)
            at = rng.choice(
                (
                    rng.randrange(first, last),
                    participants + rng.randrange(6 * 128),
                    rows + rng.randrange(8 * (n_rows + 1)),
                )
            )
            if at not in (passed, closed) or which == "all":
                old = int(words[at])
                words[at] = rng.choice((0, 1, old ^ 1 << rng.randrange(64), rng.getrandbits(64)))
        if which == "all":
            words[closed] = rng.getrandbits(64)
        asked.send("done")
    os._exit(0)


def _answer_or_refuse(read, back):
    kept = []
    while True:
        try:
            received = read.recv()
        except oobpickle.EnvelopeError:
            back.send("refused")
            continue
        if received is None:
            break
        kept.append(verify(received))
        back.send(message(received[0], received[1].nbytes))
        for one in kept:
            verify(one)
        del kept[: len(kept) - 2]
    os._exit(0)


def sender_without_a_descriptor():
    """It cannot look who reads from what is older than the block: it sends in-band."""
    read, write = multiprocessing.Pipe(duplex=False)
    with _enabled() as arena:
        pid = fork(_send_without_a_descriptor, write)
        write.close()
        for seed in range(N):
            verify(_receive(read), seed)
        reap(pid)
        n_out_of_band, counted = _since(_nothing(), arena.statistics())
        assert (n_out_of_band, counted["channel"][0]) == (0, N), counted


def _send_without_a_descriptor(write):
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    for seed in range(N):
        write.send(message(seed))


if __name__ == "__main__":
    inside.main()
