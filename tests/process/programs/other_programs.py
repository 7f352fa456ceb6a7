"""Programs that are started by hand: what they inherit brings them messages that they can load."""

import contextlib
import hashlib
import multiprocessing
import os
import pty
import select
import sys
import threading
import warnings
from multiprocessing import util

import inside
from inside import eventually, fork, message, reap, verify

import oobpickle
from internals import inner
from oobpickle._hook import installed
from oobpickle._hook.programs import hooked_exec
from table import Table

MIB = 1 << 20
N = 3
NBYTES = 300_000

#: Has only the standard library. Prints which bytes came as each of the messages.
_READER = """
import hashlib, os, pickle, struct, sys
fd = int(sys.argv[1])
def read(n):
    found = b""
    while len(found) < n:
        found += os.read(fd, n - len(found)) or sys.exit("end of file")
    return found
os.write(int(sys.argv[2]), b"ready\\n")
for _ in range(int(sys.argv[3])):
    number, content = pickle.loads(read(*struct.unpack("!i", read(4))))
    os.write(int(sys.argv[2]), b"%d %s\\n" % (number, hashlib.sha256(content).hexdigest().encode()))
"""


def _sent(number):
    return number, bytes(inside.content(number, NBYTES))


def _expected(n=N):
    return [f"{i} {hashlib.sha256(_sent(i)[1]).hexdigest()}" for i in range(n)]


def _argv(fd, out, n=N):
    return [sys.executable, "-I", "-S", "-c", _READER, str(fd), str(out), str(n)]


class Output:
    """What a program prints: a pipe of the system, nothing that oobpickle knows."""

    def __init__(self):
        self._read, self.fd = os.pipe()
        os.set_inheritable(self.fd, True)
        self._found = b""

    def line(self):
        while b"\n" not in self._found:
            assert select.select([self._read], [], [], 30)[0], "nothing printed"
            more = os.read(self._read, 1 << 16)
            assert more, f"the program has ended: {self._found!r}"
            self._found += more
        line, _, self._found = self._found.partition(b"\n")
        return line.decode()

    def close(self):
        os.close(self._read)
        os.close(self.fd)


@contextlib.contextmanager
def _enabled():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oobpickle.FallbackWarning)
        with oobpickle.enabled(capacity=64 * MIB) as arena:
            yield arena
            inside.assert_table_in_order(arena)


def _assert_in_band(arena, n):
    statistics = arena.statistics()
    assert statistics.fallbacks["channel"].n_messages == n, statistics
    assert statistics.n_fallbacks == n, statistics


# --- ways to start one; each returns a pid


def _posix_spawn(fd, out):
    os.set_inheritable(fd, True)
    return os.posix_spawn(sys.executable, _argv(fd, out), os.environ)


def _posix_spawnp(fd, out):
    os.set_inheritable(fd, True)
    return os.posix_spawnp(sys.executable, _argv(fd, out), os.environ)


def _posix_spawn_onto_stdin(fd, out):
    actions = [(os.POSIX_SPAWN_DUP2, fd, 0)]
    return os.posix_spawn(sys.executable, _argv(0, out), os.environ, file_actions=iter(actions))


def _spawnv(fd, out):
    os.set_inheritable(fd, True)
    return os.spawnv(os.P_NOWAIT, sys.executable, _argv(fd, out))


def _spawnlp(fd, out):
    os.set_inheritable(fd, True)
    return os.spawnlp(os.P_NOWAIT, "env", "env", *_argv(fd, out))


def _spawnv_passfds(fd, out):
    return util.spawnv_passfds(os.fsencode(sys.executable), _argv(fd, out), [fd, out])


STARTED = [
    _posix_spawn,
    _posix_spawnp,
    _posix_spawn_onto_stdin,
    _spawnv,
    _spawnlp,
    _spawnv_passfds,
]


def started_by_a_call():
    """The first message follows at once, and there were others in the channel before."""
    for duplex in (False, True):
        for start in STARTED:
            with _enabled() as arena:
                read, write = multiprocessing.Pipe(duplex)
                write.send(message(1))
                verify(read.recv(), 1)
                output = Output()
                pid = start(read.fileno(), output.fd)
                read.close()
                for number in range(N):
                    write.send(_sent(number))
                assert output.line() == "ready"
                assert [output.line() for _ in range(N)] == _expected(), start.__name__
                reap(pid)
                _assert_in_band(arena, N)
                assert arena.statistics().n_messages_out_of_band == 1
                write.close()
                output.close()
                inside.assert_empty(arena)


# --- ways to become one, in a child that was forked


def _execv(fd, out):
    os.set_inheritable(fd, True)
    os.execv(sys.executable, _argv(fd, out))


def _execve_onto_stdin(fd, out):
    os.dup2(fd, 0)
    os.execve(sys.executable, _argv(0, out), os.environ)


def _execvp_onto_stderr(fd, out):
    os.dup2(fd, 2)
    os.execvp("env", ["env", *_argv(2, out)])


def _execlpe(fd, out):
    os.set_inheritable(fd, True)
    os.execlpe("env", "env", *_argv(fd, out), os.environ)


BECOME = [_execv, _execve_onto_stdin, _execvp_onto_stderr, _execlpe]


def forked_and_replaced():
    for duplex in (False, True):
        for become in BECOME:
            _forked_and_replaced(become, *multiprocessing.Pipe(duplex), n_before=0)
            with _enabled() as arena:
                _forked_and_replaced(become, *multiprocessing.Pipe(duplex), n_before=1)
                _assert_in_band(arena, N)
                inside.assert_empty(arena)


def _forked_and_replaced(become, read, write, n_before):
    with read, write:
        output = Output()
        pid = fork(_talk_then_become, become, read, output.fd, n_before)
        for number in range(n_before):
            write.send(message(number))
        assert output.line() == "ready"
        for number in range(N):
            write.send(_sent(number))
        assert [output.line() for _ in range(N)] == _expected(), become.__name__
        reap(pid)
        output.close()


def _talk_then_become(become, read, out, n_before):
    for number in range(n_before):
        verify(read.recv(), number)
    become(read.fileno(), out)


def a_process_that_execs(method):
    """Its parent, and a third process, know that it is no participant any more."""
    context = multiprocessing.get_context(method)
    with _enabled() as arena:
        read, write = context.Pipe(duplex=False)
        said, say = context.Pipe(duplex=False)
        order, orders = context.Pipe(duplex=False)
        becoming = context.Process(target=_become, args=(read, say))
        sending = context.Process(target=_send_when_told, args=(write, order))
        becoming.start()
        sending.start()
        write.send(message(7))
        orders.send(8)
        assert said.recv() == "both"
        assert said.recv_bytes(6) == b"ready"
        write.send(_sent(0))
        assert said.recv_bytes().decode() == _expected()[0]
        orders.send(None)
        assert said.recv_bytes().decode() == _expected(2)[1]
        for process in (becoming, sending):
            process.join(60)
            assert process.exitcode == 0
        assert arena.statistics().n_messages_out_of_band == 2
        _assert_in_band(arena, 2)


_FRAMED_READER = """
import hashlib, os, pickle, struct
def read(n):
    found = b""
    while len(found) < n:
        found += os.read(0, n - len(found))
    return found
def say(text):
    os.write(1, struct.pack("!i", len(text)) + text)
say(b"ready")
for _ in range(2):
    number, content = pickle.loads(read(*struct.unpack("!i", read(4))))
    say(b"%d %s" % (number, hashlib.sha256(content).hexdigest().encode()))
"""


def _become(read, say):
    found = {read.recv()[0], read.recv()[0]}
    assert found == {7, 8}, found
    say.send("both")
    os.dup2(read.fileno(), 0)
    os.dup2(say.fileno(), 1)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _FRAMED_READER])


def _send_when_told(write, order):
    write.send(message(order.recv()))
    order.recv()
    write.send(_sent(1))


def _about_to_exec(read, say, go_on):
    verify(read.recv(), 1)
    os.set_inheritable(read.fileno(), True)

    def execv():  # the moment before the program takes over
        say.send("about to")
        go_on.recv()
        raise FileNotFoundError

    with contextlib.suppress(FileNotFoundError):
        hooked_exec(execv)()
    say.send("there is none")
    for number in (2, 3):
        verify(read.recv(), number)


def who_is_about_to_exec(method):
    """It is a participant still, and alive, and gets its messages in-band all the same."""
    context = multiprocessing.get_context(method)
    with _enabled() as arena:
        read, write = context.Pipe(duplex=False)
        said, say = context.Pipe(duplex=False)
        may_go_on, go_on = context.Pipe(duplex=False)
        process = context.Process(target=_about_to_exec, args=(read, say, may_go_on))
        process.start()
        read.close()
        write.send(message(1))
        assert said.recv() == "about to"
        sending = threading.Thread(target=write.send, args=(message(2),))
        sending.start()
        eventually(lambda: arena.statistics().n_fallbacks == 1)
        go_on.send(None)
        assert said.recv() == "there is none"
        sending.join()
        write.send(message(3))
        process.join(60)
        assert process.exitcode == 0
        _assert_in_band(arena, 1)
        assert arena.statistics().n_messages_out_of_band == 2


_JOINS = """
import sys
from multiprocessing.connection import Connection
here = Connection(int(sys.argv[1]))
while (received := here.recv()) is not None:
    here.send(received)
"""


def programs_that_join():
    """The first message asks them to."""
    for start in (_start_by_posix_spawn, _start_by_fork_and_exec):
        with _enabled() as arena:
            here, there = multiprocessing.Pipe()
            os.set_inheritable(there.fileno(), True)
            argv = [sys.executable, "-W", "error", "-c", _JOINS, str(there.fileno())]
            pid = start(argv)
            there.close()
            for seed in range(N):
                here.send(message(seed))
                verify(here.recv(), seed)
            _assert_in_band(arena, 1)
            assert arena.statistics().n_messages_out_of_band == 2 * N - 1
            here.send(None)
            reap(pid)
            here.close()
            inside.assert_empty(arena)


def _start_by_posix_spawn(argv):
    return os.posix_spawn(argv[0], argv, os.environ)


def _start_by_fork_and_exec(argv):
    started, say = os.pipe()  # the end that says so is closed at the exec
    pid = fork(os.execv, argv[0], argv)
    os.close(say)
    assert os.read(started, 1) == b""
    os.close(started)
    return pid


# --- what goes on while a program runs


def a_command_of_the_shell():
    """`os.system` waits, and another thread sends meanwhile."""
    with _enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        output = Output()
        os.set_inheritable(read.fileno(), True)

        def send():
            assert output.line() == "ready"
            for number in range(N):
                write.send(_sent(number))

        sending = threading.Thread(target=send)
        sending.start()
        code = " ".join(f"'{word}'" for word in _argv(read.fileno(), output.fd))
        os.environ["READER"] = _READER
        code = code.replace(f"'{_READER}'", '"$READER"')
        assert os.system(code) == 0
        sending.join()
        assert [output.line() for _ in range(N)] == _expected()
        _assert_in_band(arena, N)
        write.send(message(1))  # it has ended, and we have the reading end alone
        verify(read.recv(), 1)
        assert arena.statistics().n_messages_out_of_band == 1


def a_program_on_a_terminal():
    """`pty.spawn` forks and execs; here the terminal is the output."""
    with _enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        os.set_inheritable(read.fileno(), True)
        found = []

        def take(fd):
            data = os.read(fd, 1024)
            if b"ready" in data:
                write.send(_sent(0))
            found.append(data)
            return data

        taken = os.dup(1)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        try:
            status = pty.spawn(_argv(read.fileno(), 1, 1), take)
        finally:
            os.dup2(taken, 1)
            os.close(taken)
        assert status == 0
        assert _expected()[0] in b"".join(found).decode()
        _assert_in_band(arena, 1)


def waited_for():
    """`os.P_WAIT`: the exit code, also of a signal; senders go on meanwhile."""
    with _enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        os.set_inheritable(read.fileno(), True)
        python = [sys.executable, "-I", "-S", "-c"]
        quick = [*python, "import os; os._exit(3)"]
        assert os.spawnv(os.P_WAIT, sys.executable, quick) == 3
        dying = [*python, "import os; os.kill(os.getpid(), 9)"]
        assert os.spawnve(os.P_WAIT, sys.executable, dying, os.environ) == -9
        assert os.spawnv(os.P_WAIT, "/nowhere", ["nothing"]) == 127
        write.send(message(1))
        verify(read.recv(), 1)
        assert arena.statistics().n_messages_out_of_band == 1
        assert arena.statistics().n_fallbacks == 0


# --- where there is no such program


def _attempts(fd):
    os.set_inheritable(fd, True)
    yield lambda: os.execv("/nowhere", ["nothing"])
    yield lambda: os.execve("/nowhere", ["nothing"], {})
    yield lambda: os.execvp("there-is-no-such-program", ["nothing"])
    yield lambda: os.posix_spawn("/nowhere", ["nothing"], {})
    yield lambda: os.posix_spawnp("there-is-no-such-program", ["nothing"], {})
    actions = [(os.POSIX_SPAWN_DUP2, fd, 0)]
    yield lambda: os.posix_spawn("/nowhere", ["nothing"], {}, file_actions=actions)


def _try_them(read, *to_say):
    arena = installed.current.arena
    kept = _kept(arena)
    for attempt in _attempts(read.fileno()):
        with contextlib.suppress(FileNotFoundError):
            attempt()
            raise AssertionError("there is such a program")
    for wrong in (lambda: os.execv(), lambda: os.posix_spawn(1), lambda: os.execv("x", 1)):
        try:
            wrong()
        except TypeError:
            continue
        raise AssertionError("no error")
    assert _kept(arena) == kept
    for say in to_say:
        say.send(None)
    for number in range(N):
        verify(read.recv(), number)


def _kept(arena):
    row = Table.of(arena).participant(inner(arena).blocks.slot)
    return [int(source) for source in row.kept if source]


def a_program_that_does_not_exist(method):
    """Everything is as it was: the process goes on, and so do the messages to it."""
    context = multiprocessing.get_context(method)
    for duplex in (False, True):
        with oobpickle.enabled() as arena:
            read, write = context.Pipe(duplex)
            said, say = context.Pipe(duplex=False)
            process = context.Process(target=_try_them, args=(read, say))
            process.start()
            said.recv()
            for number in range(N):
                write.send(message(number))
            process.join(60)
            assert process.exitcode == 0
            assert arena.statistics().n_messages_out_of_band == N, arena.statistics()
            assert arena.statistics().n_fallbacks == 0
            _try_here(write, read)
            assert arena.statistics().n_messages_out_of_band == 2 * N
            assert arena.statistics().n_fallbacks == 0


def _try_here(write, read):
    sent = threading.Thread(target=lambda: [write.send(message(i)) for i in range(N)])

    class Say:
        send = staticmethod(lambda _: sent.start())

    _try_them(read, Say)
    sent.join()


# --- what was sent before


def what_a_program_cannot_load():
    """A message that waits when the program takes over is lost, and its memory comes back."""
    with _enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        for seed in range(N):
            write.send(message(seed))
        pid = fork(_read_as_cat_does, read)
        read.close()
        write.close()
        reap(pid)
        assert arena.statistics().n_messages_out_of_band == N
        inside.assert_empty(arena)


def _read_as_cat_does(read):
    os.dup2(read.fileno(), 0)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.execvp("cat", ["cat"])


# --- who passes nothing on


def programs_that_inherit_no_channel_change_nothing():
    with oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        stdin, feed = os.pipe()
        passed = inner(arena).blocks.n_passed
        assert os.system("true") == 0
        reap(os.posix_spawnp("true", ["true"], os.environ))
        reap(fork(os.execvp, "true", ["true"]))
        os.spawnlp(os.P_WAIT, "true", "true")
        os.set_inheritable(write.fileno(), True)  # whoever has it can write there, not read
        assert os.system("true") == 0
        assert inner(arena).blocks.n_passed == passed
        for fd in (stdin, feed):
            os.close(fd)
        write.send(message(1))
        verify(read.recv(), 1)
        assert arena.statistics().n_messages_out_of_band == 1


if __name__ == "__main__":
    inside.main()
